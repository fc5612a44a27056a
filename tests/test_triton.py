"""The Triton kernels through their operators: interpreted on a CPU, compiled on a GPU.

The interpreter proves indexing and algebra, not rounding and not races.
"""

import copy
import subprocess
import sys
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import pytest
import torch
from guarded import Guarded
from torch._dynamo.testing import CompileCounterWithBackend

from seaattn_kernels import SeaAttention, budget, ops, reference, verify
from seaattn_kernels.kernels import launch, squeeze

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU all of these are its tests.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

LOW = (torch.float16, torch.bfloat16, torch.float32)
CASES = [case for case in verify.OPERATOR_CASES if case.name in ops.OPERATORS["triton"]]
SMALL = {case.name: case for case in reversed(CASES) if case.shapes[0][-1] > 1}


def values(case, tensors, backend="triton"):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = case.run(leaves, backend)
    return leaves, out


# Half precision on the largest map would only take the interpreter longer.
RUNS = [(c, t) for c in CASES for t in LOW if t is torch.float32 or c.shapes[0][-1] != 100]


def _heavy(case):
    """Takes the interpreter more than two seconds: many programs, or long loops."""
    large = max(map(prod, case.shapes)) > 4000
    return large or (case.name.startswith("axial_attention") and case.shapes[0][-1] > 1)


def _marked(runs):
    return [pytest.param(*run, marks=pytest.mark.slow) if _heavy(run[0]) else run for run in runs]


@pytest.mark.parametrize(("case", "dtype"), _marked(RUNS), ids=str)
def test_values_and_gradients_keep_the_budget(case, dtype):
    for verdict in verify.operator_verdicts(case, "triton", dtype, DEVICE):
        assert verdict.ok, verdict


MAPS = {
    "tiled": (1, 3, 70, 300),
    "bands": (1, 2, 600, 20),
    "long row": (2, 1, 3, 1100),
    "many channels": (1, 200, 3, 5),
    "column": (2, 5, 37, 1),
}


def _layouts(x):
    b, c, h, w = x.shape
    wide = x.new_zeros(b + 1, c + 2, h + 3, w + 4)
    wide[1:, 1:-1, 2:-1, 3:-1] = x
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[1:, 1:-1, 2:-1, 3:-1],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:, :1].expand(b, c, h, w),
    }


@pytest.mark.parametrize(
    "shape",
    [pytest.param(m, marks=[pytest.mark.slow] * (max(m) > 512)) for m in MAPS.values()],
    ids=MAPS.keys(),
)
@pytest.mark.parametrize(
    "layout",
    [
        "contiguous",
        pytest.param("channels_last", marks=pytest.mark.slow),
        "sliced",
        "transposed",
        "expanded",
    ],
)
def test_maps_of_any_size_and_stride(shape, layout):
    x = _layouts(torch.randn(shape, device=DEVICE))[layout]
    b, c, h, w = shape
    row, column = torch.randn(b, c, h, device=DEVICE), torch.randn(b, c, w, device=DEVICE)
    upstream = torch.randn(b, 1, 1, w, device=DEVICE).expand(b, c, h, w)
    calls = {
        "squeeze": lambda x, backend: ops.axial_squeeze(x, backend),
        "broadcast_add": lambda x, backend: ops.broadcast_add(x, row, column, "silu", 0.1, backend),
        "gate": lambda x, backend: ops.gate(x, 2 * x, True, backend),
    }
    for name, call in calls.items():
        results = []
        for backend in ("triton", "reference"):
            leaf = x.detach().requires_grad_()
            out = call(leaf, backend)
            gradients = (row, column) if name == "squeeze" else upstream
            (gradient,) = torch.autograd.grad(out, leaf, gradients)
            results.append([*(out if isinstance(out, tuple) else (out,)), gradient])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
            assert ours.shape == theirs.shape
    out = ops.broadcast_add(x, row, column, "relu", backend="triton")
    assert reference.is_channels_last(out) == reference.is_channels_last(x)
    assert out.is_contiguous() or reference.is_channels_last(out)


def test_squeeze_of_the_largest_map():
    x = torch.randn(1, 1, 1024, 1024, device=DEVICE, requires_grad=True)
    upstream = [torch.randn(1, 1, 1024, device=DEVICE) for _ in range(2)]
    found = []
    for backend in ("triton", "reference"):
        means = ops.axial_squeeze(x, backend)
        found.append([*means, *torch.autograd.grad(means, x, upstream)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bands_are_added_in_a_fixed_order(layout, monkeypatch):
    x = torch.randn(1, 2, 700, 30, device=DEVICE).contiguous(memory_format=layout)
    monkeypatch.setattr(squeeze, "multiprocessors", lambda device: 64)
    assert squeeze.bands(2, 700, 64, 128) == 1
    monkeypatch.setattr(squeeze, "bands", lambda *sizes: 5)
    row, column = squeeze.axial_squeeze(x)
    torch.testing.assert_close(row, x.mean(3))
    torch.testing.assert_close(column, x.mean(2))
    for _ in range(3):
        again = squeeze.axial_squeeze(x)
        assert torch.equal(again[0], row)
        assert torch.equal(again[1], column)


@pytest.mark.parametrize("shape", [(2, 33, 37, 70), (1, 5, 1, 9), (3, 40, 9, 1)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sums_by_channels_in_parts(shape, dtype, monkeypatch):
    """As the block takes them, channels last: every part is written, and nothing else."""
    b, c, h, w = shape
    memory = torch.randn(b, h, w, c, device=DEVICE, dtype=dtype)
    x = memory.as_strided(shape, (h * w * c, 1, w * c, c))
    monkeypatch.setattr(squeeze, "multiprocessors", lambda device: 64)
    cut = squeeze.cut(shape, squeeze.lines(w, x.itemsize), x.device, least=2)
    assert (cut.strips, cut.bands) == ((3, 2) if h == 37 else (1, 1))
    guarded = Guarded(monkeypatch)
    found = []
    for _ in range(2):
        row = torch.empty((b, cut.strips, h, c), dtype=torch.float32, device=DEVICE)
        column = torch.empty((b, cut.bands, w, c), dtype=torch.float32, device=DEVICE)
        squeeze.sums(x, cut, row, column, 1 / w, 1 / h, channels_last=True)
        found.append((row, column))
    guarded.check()
    row, column = found[0]
    for ours, theirs in ((row, memory.float().mean(2)), (column, memory.float().mean(1))):
        torch.testing.assert_close(ours.sum(1), theirs, atol=1e-6, rtol=1e-5)
    first = memory[:, : cut.band].float().sum(1) / h
    torch.testing.assert_close(column[:, 0], first, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(ours, again) for ours, again in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("shape", "parts", "programs"),
    [
        ((1, 512, 64, 64), (2, 4), 128),
        ((1, 256, 80, 80), (3, 5), 120),
        ((16, 256, 80, 80), (3, 1), 384),
        ((64, 512, 32, 32), (1, 1), 1024),
        ((1, 512, 128, 128), (4, 4), 256),
    ],
)
def test_bands_of_a_projected_map(shape, parts, programs, monkeypatch):
    """On an H200, in float16."""
    monkeypatch.setattr(squeeze, "multiprocessors", lambda device: 132)
    cut = squeeze.cut(shape, squeeze.lines(shape[3], 2), torch.device("cpu"), least=2)
    assert (cut.strips, cut.bands) == parts
    assert shape[0] * shape[1] // cut.tile.c * cut.strips * cut.bands == programs


@pytest.mark.parametrize(
    ("heads", "d", "e", "h", "w", "lengths"),
    [
        (1, 2, 4, 1, 1, (16,) * 4),
        pytest.param(3, 10, 15, 100, 3, (16, 7, 1, 40), marks=pytest.mark.slow),
        pytest.param(2, 20, 40, 65, 64, (16,) * 4, marks=pytest.mark.slow),
        pytest.param(1, 24, 48, 17, 129, (16,) * 4, marks=pytest.mark.slow),
        (1, 64, 128, 20, 33, (16,) * 4),
        (4, 16, 5, 8, 8, (8,) * 4),
    ],
)
def test_attention_of_any_size(heads, d, e, h, w, lengths):
    projected, keys = heads * (2 * d + e), heads * d
    tensors = [torch.randn(2, projected, n, device=DEVICE) for n in (h, w)]
    tensors += [torch.randn(1, keys, n, device=DEVICE) for n in lengths]
    upstream = [torch.randn(2, heads * e, n, device=DEVICE) for n in (h, w)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = ops.axial_attention_pair(*leaves[:2], leaves[2:], heads, d, 0.3, backend=backend)
        found = torch.autograd.grad(out, leaves, [g.to(dtype) for g in upstream])
        results.append([*out, *found])
    for ours, truth in zip(*results, strict=True):
        truth = truth.detach()
        size = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(ours.double(), truth, atol=2e-5 * size, rtol=0)


@pytest.mark.slow
def test_long_axes():
    n = 4096 if DEVICE == "cuda" else 1024  # the interpreter takes a minute for the longest
    row, column = torch.randn(1, 16, n, device=DEVICE), torch.randn(1, 16, 2, device=DEVICE)
    tables = [torch.randn(1, 4, 16, device=DEVICE)] * 4
    ours, theirs = (
        ops.axial_attention_pair(row, column, tables, 1, 4, backend=backend)
        for backend in ("triton", "reference")
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- NaN, kinks, extremes --------------------------------------------------------------------


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_through(activation, value):
    x = torch.randn(1, 2, 3, 5, device=DEVICE)
    x[0, 1, 2, 3] = value
    zero = torch.zeros(1, 2, 3, device=DEVICE), torch.zeros(1, 2, 5, device=DEVICE)
    calls = [
        lambda x, b: ops.broadcast_add(x, *zero, activation, 0.1, b),
        lambda x, b: ops.gate(x, torch.ones_like(x), True, b),
        lambda x, b: ops.gate(x, torch.ones_like(x), False, b),
        lambda x, b: ops.gate(torch.ones_like(x), x, True, b),
    ]
    for call in calls:
        results = []
        for backend in ("triton", "reference"):
            leaf = x.detach().requires_grad_()
            out = call(leaf, backend)
            results.append((out, *torch.autograd.grad(out.sum(), leaf)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    row, column = ops.axial_squeeze(x, "triton")
    torch.testing.assert_close(row, x.mean(3), equal_nan=True)
    torch.testing.assert_close(column, x.mean(2), equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4, -1e4])
@pytest.mark.parametrize("channel", [0, 5, 9])
def test_attention_of_extreme_values(value, channel):
    row, column = torch.randn(1, 16, 7, device=DEVICE), torch.randn(1, 16, 5, device=DEVICE)
    row[0, channel, 3] = value
    tables = [torch.randn(1, 4, 16, device=DEVICE)] * 4
    ours, theirs = (
        ops.axial_attention_pair(row, column, tables, 1, 4, backend=backend)
        for backend in ("triton", "reference")
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_attention_where_a_block_of_keys_scores_minus_infinity():
    """The running maximum is minus infinity until a finite score comes."""
    row, column = torch.ones(1, 16, 20, device=DEVICE), torch.randn(1, 16, 5, device=DEVICE)
    row[0, 4:8, :17] = -float("inf")
    tables = [torch.zeros(1, 4, 16, device=DEVICE)] * 4
    ours, theirs = (
        ops.axial_attention_pair(row, column, tables, 1, 4, backend=backend)[0]
        for backend in ("triton", "reference")
    )
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradients_at_the_kinks_are_pytorchs(activation):
    x = torch.tensor([-3.0, 0.0, 3.0, 6.0, -1e-7, 6.1], device=DEVICE).view(1, 1, 1, 6)
    zero = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 6, device=DEVICE)
    for call in (
        lambda x, b: ops.broadcast_add(x, *zero, activation, 0.1, b),
        lambda x, b: ops.gate(x, torch.ones_like(x), True, b),
    ):
        found = []
        for backend in ("triton", "reference"):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(call(leaf, backend).sum(), leaf)[0])
        torch.testing.assert_close(*found)


# --- every element, and no other -------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("case", "channels_last"),
    _marked(
        [(case, False) for case in CASES]
        + [(case, True) for case in CASES if len(case.shapes[0]) == 4]
    ),
    ids=str,
)
def test_every_element_is_written_and_nothing_else(case, channels_last, dtype, monkeypatch):
    tensors = case.inputs(0, DEVICE, dtype)
    if channels_last:
        tensors = [
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors
        ]
    leaves = [t.requires_grad_() for t in tensors]
    upstream = [torch.randn_like(t) for t in case.run(leaves, "reference")]
    guarded = Guarded(monkeypatch)
    out = case.run(leaves, "triton")
    forward = len(guarded.blocks)
    torch.autograd.grad(out, leaves, upstream)
    assert len(guarded.blocks) > forward
    guarded.check()


def test_the_guard_sees_an_element_that_is_not_written(monkeypatch):
    from seaattn_kernels.kernels import gate

    guarded = Guarded(monkeypatch)
    monkeypatch.setattr(gate, "_BLOCK", 16)
    x = torch.ones(1, 1, 4, 4, device=DEVICE)
    gate.gate(x, x, True)
    guarded.check()
    torch.empty(3, device=DEVICE)
    with pytest.raises(AssertionError, match="not all of it written"):
        guarded.check()


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(case, gradients):
    tensors = [t.requires_grad_(gradients) for t in case.inputs(0, DEVICE, torch.float32)]
    overload = getattr(torch.ops.seaattn_kernels, case.name).triton
    torch.library.opcheck(overload, case.overload_arguments(tensors))


def test_opcheck_of_the_backward_operators():
    packet = torch.ops.seaattn_kernels
    maps = [torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    row = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True)
    column = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(packet.gate_backward.triton, (*maps, False))
    torch.library.opcheck(packet.broadcast_add_backward.triton, (*maps[:2], row, column, 4, 0.0))
    torch.library.opcheck(packet.axial_squeeze_backward.triton, (row, column, True))
    axes = [torch.randn(2, 16, n, device=DEVICE, requires_grad=True) for n in (4, 5)]
    tables = [torch.randn(1, 4, 6, device=DEVICE, requires_grad=True) for _ in range(4)]
    gradients = [torch.randn(2, 8, n, device=DEVICE, requires_grad=True) for n in (4, 5)]
    torch.library.opcheck(
        packet.axial_attention_pair_backward.triton, (*gradients, *axes, *tables, 1, 4, 0.5)
    )


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_double_backward_is_the_references(case):
    tensors = case.inputs(0, DEVICE, torch.float32)
    found = []
    for backend in ("triton", "reference"):
        leaves, out = values(case, tensors, backend)
        first = torch.autograd.grad(sum((t * t).sum() for t in out), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    for ours, theirs in zip(*found, strict=True):
        size = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, atol=1e-4 * size, rtol=0)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_compiles_to_one_graph_of_any_size(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(*tensors):
        return case.run(tensors, "triton")

    for seed in range(3):
        tensors = case.inputs(seed, DEVICE, torch.float32)
        if len(case.shapes) <= 2:  # arguments of one shape: any other will do
            tensors = [torch.cat([t] * (1 + seed), dim=-1) for t in tensors]
        for ours, theirs in zip(call(*tensors), case.run(tensors, "reference"), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_empty_batch(case):
    tensors = [
        t[:0] if t.shape[0] != 1 or t.dim() == 4 else t
        for t in case.inputs(0, DEVICE, torch.float32)
    ]
    leaves = [t.requires_grad_() for t in tensors]
    out = case.run(leaves, "triton")
    assert all(t.shape[0] == 0 for t in out)
    found = torch.autograd.grad(sum(t.sum() for t in out), leaves)
    assert all((g == 0).all() for g in found)


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    """Where another one is current; for a backward pass autograd's thread sets none."""
    state = {"device": 0}
    seen = []

    @contextmanager
    def device(wanted):
        before, state["device"] = state["device"], wanted.index
        yield
        state["device"] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda x, **constants: seen.append((grid, x.device.index, state["device"]))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state["device"])
    for index in (0, 1):
        launch.launch(Kernel(), 7, SimpleNamespace(device=torch.device("cuda", index)))
    launch.launch(Kernel(), 0, SimpleNamespace(device=torch.device("cuda", 0)))
    assert seen == [((7,), 0, 0), ((7,), 1, 1)]
    assert state["device"] == 0


PRECISION = """
import torch
from seaattn_kernels.kernels import launch

launch.capability = lambda device: (9, 0)
x = torch.empty(1)
half, brain = x.half(), x.bfloat16()
matmul, found = torch.backends.cuda.matmul, [launch.precision(x)]
torch.set_float32_matmul_precision("high")
found.append(launch.precision(x))
matmul.allow_tf32 = False
found.append(launch.precision(x))
matmul.fp32_precision = "tf32"
found.append(launch.precision(x))
matmul.fp32_precision = "ieee"
found += [launch.precision(x), launch.precision(half), launch.precision(brain)]
torch.backends.fp32_precision, matmul.fp32_precision = "tf32", "none"
found.append(launch.precision(x))
launch.capability = lambda device: (7, 5)
found += [launch.precision(x), launch.precision(brain)]
print(*found)
"""


def test_precision_follows_every_spelling_of_the_switch():
    done = subprocess.run([sys.executable, "-c", PRECISION], capture_output=True, text=True)
    assert done.stdout.split() == [
        "ieee", "tf32", "ieee", "tf32", "ieee", "ieee", "tf32", "tf32", "ieee", "ieee",
    ], done.stderr  # fmt: skip


def test_heads_too_wide_for_registers():
    d, e = ops.WIDEST_HEAD
    for key_dim, value_dim in ((d + 1, 4), (4, e + 1)):
        row = torch.randn(1, 2 * key_dim + value_dim, 3, device=DEVICE)
        tables = [torch.randn(1, key_dim, 16, device=DEVICE)] * 4
        with pytest.raises(RuntimeError, match="heads of at most D, E = "):
            ops.axial_attention_pair(row, row, tables, 1, key_dim, backend="triton")
        q, k, v = row.split([key_dim, key_dim, value_dim], dim=1)
        with pytest.raises(RuntimeError, match="heads of at most D, E = "):
            ops.axial_attention(q, k, v, 1, 0.1, backend="triton")


def test_refusals(monkeypatch):
    x = torch.randn(1, 2, 3, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="does not compute in float64"):
        ops.axial_squeeze(x.double(), "triton")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="needs a GPU; TRITON_INTERPRET=1"):
            ops.axial_squeeze(x, "triton")
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(ops, "_capability", lambda device: (7, 5))
    reason = ops.refusal("gate", "triton", cuda, torch.bfloat16)
    assert "compute capability 8.0" in reason
    assert ops.settle("gate", "auto", cuda, torch.float16) == (
        "reference", "below compute capability 8.0 plain PyTorch is taken",
    )  # fmt: skip
    monkeypatch.setattr(ops, "_capability", lambda device: (9, 0))
    assert ops.settle("gate", "auto", cuda, torch.bfloat16) == ("triton", None)
    assert ops.settle("sea_attention", "auto", cuda, torch.float32) == ("triton", None)
    assert ops.refusal("gate", "triton", torch.device("meta"), torch.float32) is not None


# --- the block in training -------------------------------------------------------------------


BLOCKS = [
    path
    for path in sorted(verify.GOLDEN.glob("*.npz"))
    if verify.load_golden(path).meta["kind"] == "sea_attention"
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_golden_training_keeps_the_budget(dtype):
    """Outputs, gradients and running statistics, pooled each over the files, beside eager's.

    Over all of them: in half precision a rounding that crosses a kink flips a gradient, for eager
    and for us, and in a single file it is chance who has the larger flip.
    """
    pooled = {kind: ([], [], []) for kind in ("out", "grad/", "buffer/")}
    for path in BLOCKS:
        golden = verify.load_golden(path)
        found = {}
        for name in ("triton", "eager"):
            block = golden.model("triton").to(DEVICE, dtype).train()
            x = golden.random("x").to(DEVICE, dtype).requires_grad_()
            out = block(x) if name == "triton" else reference.sea_attention(block, x)
            out.backward(golden.random("dout").to(DEVICE, dtype))
            found[name] = {"out": out, "grad/x": x.grad}
            found[name] |= {f"grad/{key}": p.grad for key, p in block.named_parameters()}
            found[name] |= {f"buffer/{key}": b for key, b in block.named_buffers()}
        stored = {
            name.removeprefix("train/"): value
            for name, value in golden.arrays.items()
            if name.startswith("train/")
        }
        assert len(stored) > 40
        for name, truth in stored.items():
            kind = next(kind for kind in pooled if name.startswith(kind))
            scale = max(1e-3, float(truth.abs().max()))
            tensors = (found["triton"][name], found["eager"][name], truth)
            for pool, tensor in zip(pooled[kind], tensors, strict=True):
                pool.append(tensor.detach().cpu().double() / scale)
    for kind, pools in pooled.items():
        verdict = budget.judge(*pools, dtype, gradient=kind == "grad/")
        assert verdict.ok, (kind, str(verdict))


def test_training_step_runs_on_triton_alone(monkeypatch):
    block = verify.randomise(SeaAttention(16, 4, 2, backend="triton")).to(DEVICE)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 16, 5, 6, device=DEVICE)
    block(x).square().sum().backward()
    reference.sea_attention(twin, x).square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        size = max(1.0, float(theirs.grad.abs().max()))
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * size, rtol=0)
