"""The judge can say no: every planted fault and every error over the budget is noticed."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from seaattn_kernels import SeaAttention, budget, normalized, ops, reference, verify

GOLDEN = sorted(verify.GOLDEN.glob("*.npz"))
BLOCK = verify.GOLDEN / "square16.npz"


def test_all_golden_files_are_here():
    kinds = [verify.load_golden(path).meta["kind"] for path in GOLDEN]
    assert kinds.count("sea_attention") == 6
    assert kinds.count("seaformer_classifier") == 2
    assert kinds.count("seaformer_segmenter") == 1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden(path, backend):
    """Outputs, all gradients and running statistics, eval and train, and the folded path."""
    golden = verify.load_golden(path)
    errors = verify.golden_errors(golden, backend)
    assert errors.keys() >= golden.arrays.keys()
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_in_float32_keeps_the_budget(path):
    """The folded path and eager, both in float32, against the official float64 output."""
    golden = verify.load_golden(path)
    name = "eval/out" if golden.meta["kind"] == "sea_attention" else "logits"
    model = golden.model().float().eval()
    eager = copy.deepcopy(model)
    for layer in eager.modules():
        if isinstance(layer, SeaAttention):
            layer.forward = lambda x, layer=layer: reference.sea_attention(layer, x)
    x = golden.random("x").float()
    with torch.no_grad():
        verdict = budget.judge([model(x)], [eager(x)], [golden.arrays[name]], torch.float32)
    assert verdict.ok, str(verdict)


def test_golden_error_notices_a_wrong_shape_and_nan():
    golden = verify.load_golden(BLOCK)
    out = golden.arrays["eval/out"]
    assert golden.error("eval/out", out) == 0
    assert golden.error("eval/out", out + 1e-10) > 1
    assert golden.error("eval/out", out[:1]) == float("inf")
    assert golden.error("eval/out", out * float("nan")) == float("inf")


# --- planted faults --------------------------------------------------------------------------


def _attention_zeroed(monkeypatch):
    original = reference.axial_attention
    monkeypatch.setattr(reference, "axial_attention", lambda *a: 0 * original(*a))


def _scale_dropped(monkeypatch):
    original = reference.axial_attention
    monkeypatch.setattr(reference, "axial_attention", lambda q, k, v, h, s: original(q, k, v, h, 1))


def _softmax_over_queries(monkeypatch):
    original = reference.axial_attention
    swapped = lambda q, k, v, h, s: original(k, q, v, h, s)  # noqa: E731
    monkeypatch.setattr(reference, "axial_attention", swapped)


def _heads_mixed(monkeypatch):
    original = reference.axial_attention

    def mixed(q, k, v, heads, scale):
        return original(q.roll(1, dims=1), k, v, heads, scale)

    monkeypatch.setattr(reference, "axial_attention", mixed)


def _stage_changed(monkeypatch, name, faulty):
    """A fault in an operator of the training pass: ``faulty(stage, *arguments)``."""
    stages = ops.OVERLOADS[name]
    changed = {**stages, "reference": partial(faulty, stages["reference"])}
    monkeypatch.setitem(ops.OVERLOADS, name, changed)


def _rows_and_columns_swapped(monkeypatch):
    """On a square map nothing but the values changes."""
    folded = reference.sea_attention_folded

    def swapped(x, weights, *arguments):
        w = list(weights)
        w[6:10] = [*w[8:10], *w[6:8]]
        return folded(x, w, *arguments)

    def moments(stage, y):
        mean, deviations, row, column = stage(y)
        return mean, deviations, column, row

    _stage_changed(monkeypatch, "axial_moments", moments)
    monkeypatch.setattr(reference, "sea_attention_folded", swapped)


def _table_dropped(index):
    def plant(monkeypatch):
        pair, interpolate = ops.axial_attention_pair, reference.interpolate
        calls = iter(range(10**6))

        def without(row, column, tables, *rest):
            tables = [0 * t if i == index else t for i, t in enumerate(tables)]
            return pair(row, column, tables, *rest)

        def folded(table, length):
            """The fold interpolates q and k together: first the row's, then the column's."""
            half = table.shape[1] // 2
            table = table.clone()
            if next(calls) % 2 == index // 2:
                table[:, half * (index % 2) : half * (index % 2 + 1)] = 0
            return interpolate(table, length)

        monkeypatch.setattr(ops, "axial_attention_pair", without)
        if index < 4:
            monkeypatch.setattr("seaattn_kernels.fold.reference.interpolate", folded)

    return plant


def _dwconv_padded_with_the_bias(monkeypatch):
    convolve, last = F.conv2d, {}

    def conv2d(x, weight, bias, groups=1, padding=0):
        if groups == 1:
            last[bias.shape[0]] = bias
            return convolve(x, weight, bias)
        border = (
            last[x.shape[1]]
            .view(1, -1, 1, 1)
            .expand(x.shape[0], -1, x.shape[2] + 2, x.shape[3] + 2)
        )
        padded = border.clone()
        padded[:, :, 1:-1, 1:-1] = x
        return convolve(padded, weight, bias, groups=groups)

    functions = SimpleNamespace(**{**vars(F), "conv2d": conv2d})
    monkeypatch.setattr(reference, "F", functions)


def _weight_changed(index, change):
    """A fault in one folded tensor, by its place in BlockWeights."""

    def plant(monkeypatch):
        folded = reference.sea_attention_folded

        def faulty(x, weights, *arguments):
            weights = list(weights)
            weights[index] = change(weights[index])
            return folded(x, weights, *arguments)

        monkeypatch.setattr(reference, "sea_attention_folded", faulty)

    return plant


def _soft_gate(monkeypatch):
    folded = reference.sea_attention_folded
    for name in ("normalize_gate", "normalize_gate_sums", "normalize_gate_backward"):
        _stage_changed(monkeypatch, name, lambda stage, *a: stage(*a[:-1], not a[-1]))
    monkeypatch.setattr(reference, "sea_attention_folded", lambda *a: folded(*a[:-1], False))


def _activation_unclipped(monkeypatch):
    activate = reference.activate
    through = normalized._through_activation

    def unclipped(name):
        return "relu" if name == "relu6" else name

    monkeypatch.setattr(
        reference, "activate", lambda x, name, slope, **options: activate(x, "relu", slope)
    )
    monkeypatch.setattr(
        normalized, "activate", lambda x, name, slope: activate(x, unclipped(name), slope)
    )
    monkeypatch.setattr(
        normalized, "_through_activation", lambda g, z, name, s: through(g, z, unclipped(name), s)
    )


#: What each fault must show in: the folded path, the path with gradients, or both.
FAULTS = {
    "attention zeroed": (_attention_zeroed, "both"),
    "scale dropped": (_scale_dropped, "both"),
    "softmax over the queries": (_softmax_over_queries, "both"),
    "heads mixed": (_heads_mixed, "both"),
    "rows and columns swapped": (_rows_and_columns_swapped, "both"),
    **{
        f"position table {name} dropped": (_table_dropped(index), "both")
        for index, name in enumerate(("row q", "row k", "column q", "column k"))
    },
    "dwconv padded with the bias": (_dwconv_padded_with_the_bias, "folded"),
    "qkv bias missing": (_weight_changed(1, torch.zeros_like), "folded"),
    "encode bias missing": (_weight_changed(7, torch.zeros_like), "folded"),
    "proj bias missing": (_weight_changed(11, torch.zeros_like), "folded"),
    "kernel mirrored": (_weight_changed(2, lambda w: w.flip(2)), "folded"),
    "encode transposed": (_weight_changed(6, lambda w: w.t()), "folded"),
    "half precision": (_weight_changed(4, lambda w: w.half().double()), "folded"),
    "sigmoid instead of h_sigmoid": (_soft_gate, "both"),
    "ReLU instead of ReLU6": (_activation_unclipped, "both"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(fault, monkeypatch):
    plant, where = FAULTS[fault]
    golden = verify.load_golden(BLOCK)
    plant(monkeypatch)
    errors = verify.golden_errors(golden, "reference")
    assert errors["folded/out"] > 1
    if where == "both":
        assert errors["eval/out"] > 1
        assert errors["train/out"] > 1
        assert errors["eval/grad/x"] > 1


def test_planted_fault_is_noticed_in_float32(monkeypatch):
    """The budget is tight enough for a fault of the size of half precision."""
    case = verify.BLOCK_CASES[3]
    assert verify.block_verdict(case, "reference", torch.float32).ok
    _weight_changed(4, lambda w: w.half().float())(monkeypatch)
    assert not verify.block_verdict(case, "reference", torch.float32).ok


def test_a_fresh_block_would_hide_everything(monkeypatch):
    """Why every test randomises: without attention a fresh block gives the same output."""
    block = SeaAttention(16, backend="reference").eval()
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        expected = block(x)
        _attention_zeroed(monkeypatch)
        assert torch.equal(block(x), expected)
        block = verify.randomise(block)
        assert not torch.allclose(block(x), reference.sea_attention(block, x), atol=1e-3)
