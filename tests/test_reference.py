"""The specification, against loops written from the formulas, the official outputs and itself."""

import math

import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, fold, reference, verify
from seaattn_kernels.anatomy import dissect

DOUBLE = {"dtype": torch.float64}
GOLDEN_BLOCKS = [
    path
    for path in sorted(verify.GOLDEN.glob("*.npz"))
    if verify.load_golden(path).meta["kind"] == "sea_attention"
]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_squeeze_is_two_means():
    x = torch.randn(2, 3, 4, 5, **DOUBLE)
    row, column = reference.axial_squeeze(x)
    for b, c in ((0, 0), (1, 2)):
        for i in range(4):
            close(row[b, c, i], sum(x[b, c, i, j] for j in range(5)) / 5)
        for j in range(5):
            close(column[b, c, j], sum(x[b, c, i, j] for i in range(4)) / 4)


@pytest.mark.parametrize(("heads", "d", "e", "n"), [(1, 2, 4, 1), (3, 5, 2, 6)])
def test_attention_is_the_formula(heads, d, e, n):
    q, k = torch.randn(2, 2, heads * d, n, **DOUBLE)
    v = torch.randn(2, heads * e, n, **DOUBLE)
    out = reference.axial_attention(q, k, v, heads, 0.3)
    for b in range(2):
        for h in range(heads):
            for i in range(n):
                scores = [
                    0.3 * float(q[b, h * d : (h + 1) * d, i] @ k[b, h * d : (h + 1) * d, j])
                    for j in range(n)
                ]
                total = sum(math.exp(s) for s in scores)
                expected = sum(
                    math.exp(s) / total * v[b, h * e : (h + 1) * e, j] for j, s in enumerate(scores)
                )
                close(out[b, h * e : (h + 1) * e, i], expected)


def test_interpolation_is_linear_between_centres():
    table = torch.randn(1, 3, 16, **DOUBLE)
    for length in (1, 7, 16, 33):
        out = reference.interpolate(table, length)
        for i in range(length):
            at = min(max((i + 0.5) * 16 / length - 0.5, 0.0), 15.0)
            low = math.floor(at)
            high = min(low + 1, 15)
            close(
                out[0, :, i],
                table[0, :, low] * (1 - (at - low)) + table[0, :, high] * (at - low),
            )


def test_pair_adds_tables_to_q_and_k_alone():
    heads, d, e, h, w = 2, 3, 4, 5, 7
    keys = heads * d
    row = torch.randn(2, 2 * keys + heads * e, h, **DOUBLE)
    column = torch.randn(2, 2 * keys + heads * e, w, **DOUBLE)
    tables = torch.randn(4, 1, keys, 16, **DOUBLE)
    found = reference.axial_attention_pair(row, column, *tables, heads, d, 0.5)
    for axis, table_q, table_k, out in (
        (row, tables[0], tables[1], found[0]),
        (column, tables[2], tables[3], found[1]),
    ):
        q = axis[:, :keys] + reference.interpolate(table_q, axis.shape[2])
        k = axis[:, keys : 2 * keys] + reference.interpolate(table_k, axis.shape[2])
        close(out, reference.axial_attention(q, k, axis[:, 2 * keys :], heads, 0.5))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_broadcast_add(activation):
    layers = (nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU())
    layer = layers[reference.ACTIVATIONS.index(activation)]
    v, row, column = (
        4 * torch.randn(*shape, **DOUBLE) for shape in ((2, 3, 4, 5), (2, 3, 4), (2, 3, 5))
    )
    out = reference.broadcast_add(v, row, column, activation, 0.2)
    for i in range(4):
        for j in range(5):
            close(out[:, :, i, j], layer(v[:, :, i, j] + row[:, :, i] + column[:, :, j]))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="gelu"):
        reference.activate(torch.ones(1), "gelu")


def test_gate_values():
    x = torch.tensor([-9.0, -3.0, 0.0, 1.5, 3.0, 9.0], **DOUBLE).view(1, 1, 1, 6)
    y = torch.full_like(x, 2.0)
    close(reference.gate(x, y).flatten(), torch.tensor([0.0, 0.0, 1.0, 1.5, 2.0, 2.0], **DOUBLE))
    close(reference.gate(x, y, hard=False), 2 / (1 + (-x).exp()))


def test_gradients_at_the_kinks_are_zero_at_the_bounds():
    x = torch.tensor([-3.0, 3.0, 0.0], **DOUBLE).view(1, 1, 1, 3).requires_grad_()
    reference.gate(x, torch.ones_like(x)).sum().backward()
    close(x.grad.flatten(), torch.tensor([0.0, 0.0, 1 / 6], **DOUBLE))
    v = torch.tensor([0.0, 6.0, 3.0], **DOUBLE).view(1, 1, 1, 3).requires_grad_()
    zero = torch.zeros(1, 1, 3, **DOUBLE)
    reference.broadcast_add(v, zero[..., :1], zero, "relu6").sum().backward()
    close(v.grad.flatten(), torch.tensor([0.0, 0.0, 1.0], **DOUBLE))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_goes_through(activation):
    v = torch.tensor([float("nan"), 1.0]).view(1, 1, 1, 2)
    out = reference.broadcast_add(v, torch.zeros(1, 1, 1), torch.zeros(1, 1, 2), activation)
    assert out.isnan().tolist() == [[[[True, False]]]]
    assert reference.gate(v, torch.ones_like(v)).isnan().tolist() == [[[[True, False]]]]


@pytest.mark.parametrize("path", GOLDEN_BLOCKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_block_equals_the_official_output(path, mode):
    golden = verify.load_golden(path)
    block = golden.model().train(mode == "train")
    with torch.no_grad():
        out = reference.sea_attention(block, golden.random("x"))
    assert golden.error(f"{mode}/out", out) <= 1


def _folded(block, x):
    folded = fold.fold(dissect(block))
    weights = folded.weights(x.dtype, x.shape[2], x.shape[3])
    return reference.sea_attention_folded(
        x,
        weights,
        folded.heads,
        folded.key_dim,
        reference.ACTIVATIONS[folded.activation_code],
        folded.negative_slope,
        folded.hard,
    )


@pytest.mark.parametrize("case", verify.BLOCK_CASES, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["squeeze first", "project first"])
def test_both_squeezes_give_the_eager_block(case, first, monkeypatch):
    monkeypatch.setattr(reference, "squeeze_first", lambda *sizes: first)
    block = SeaAttention(case.channels, case.key_dim, case.heads, case.attn_ratio, case.activation)
    block = verify.randomise(block.double()).eval()
    x = torch.randn(case.batch, case.channels, case.height, case.width, **DOUBLE)
    with torch.no_grad():
        expected = reference.sea_attention(block, x)
        torch.testing.assert_close(_folded(block, x), expected, rtol=0, atol=1e-12 * 20)


def test_squeeze_first_follows_the_ratio():
    assert not reference.squeeze_first(4, 4)
    assert not reference.squeeze_first(1, 4096)
    assert reference.squeeze_first(32, 32)
    assert reference.squeeze_first(64, 128)


def test_depthwise_halo_is_zero_and_not_the_bias():
    """With weights that see the halo alone, a padded bias would show."""
    block = verify.randomise(SeaAttention(8, 2, 1).double()).eval()
    with torch.no_grad():
        block.dwconv.c.weight.zero_()
        block.dwconv.c.weight[:, :, 0, :] = 1.0
        x = torch.randn(1, 8, 1, 6, **DOUBLE)
        local = block.dwconv(torch.cat([block.to_q(x), block.to_k(x), block.to_v(x)], 1))
        bias = (
            block.dwconv.bn.bias
            - block.dwconv.bn.running_mean
            * block.dwconv.bn.weight
            * (block.dwconv.bn.running_var + block.dwconv.bn.eps).rsqrt()
        )
        close(local, bias.view(1, -1, 1, 1).expand_as(local))
        close(_folded(block, x), reference.sea_attention(block, x))


def test_layout_follows_the_first_map():
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    pixel = torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    assert reference.follow_layout(x, last).is_contiguous(memory_format=torch.channels_last)
    assert reference.follow_layout(last, x).is_contiguous()
    assert reference.follow_layout(last, x[:, :, ::2]).is_contiguous()
    assert reference.follow_layout(pixel, pixel).is_contiguous()


@pytest.mark.parametrize(
    "case",
    [c for c in verify.OPERATOR_CASES if sum(math.prod(s) for s in c.shapes) < 1000],
    ids=str,
)
def test_operators_have_first_and_second_derivatives(case):
    leaves = [t.requires_grad_() for t in case.inputs(0, "cpu", torch.float64)]
    function = lambda *tensors: case.run(tensors, "reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
