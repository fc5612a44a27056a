"""The operators' contract: schemas, fakes, autograd, autocast, layouts, checks, backends."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from seaattn_kernels import (
    SeaAttention,
    budget,
    fold,
    native,
    ops,
    overloads,
    reference,
    verify,
)
from seaattn_kernels.anatomy import dissect

ROOT = Path(__file__).parents[1]
LOW = (torch.float16, torch.bfloat16, torch.float32)


def smallest_cases():
    """The smallest case of each operator that is not a single pixel."""
    seen = {}
    for case in verify.OPERATOR_CASES:
        if case.shapes[0][-1] > 1:
            seen.setdefault(case.name, case)
    return list(seen.values())


CASES = smallest_cases()


def overload(name, backend="reference"):
    return getattr(getattr(torch.ops.seaattn_kernels, name), backend)


def block_and_input(dtype=torch.float32, channels=16, size=(9, 8)):
    block = verify.randomise(SeaAttention(channels, 4, 2)).to(dtype).eval()
    return block, torch.randn(2, channels, *size, dtype=dtype)


# --- registration ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_reference(case, gradients):
    tensors = [t.requires_grad_(gradients) for t in case.inputs(0, "cpu", torch.float32)]
    torch.library.opcheck(overload(case.name), case.overload_arguments(tensors))


def test_opcheck_block():
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    weights = list(folded.weights(x.dtype, 9, 8))
    torch.library.opcheck(overload("sea_attention"), (x, weights, 2, 4, 2, 0.0, True))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_cpu_squeeze(library, dtype, layout):
    x = torch.randn(2, 3, 4, 5).to(dtype, memory_format=layout).requires_grad_()
    torch.library.opcheck(overload("axial_squeeze", "cpu"), (x,))
    row, column = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    last = layout == torch.channels_last
    arguments = (row.requires_grad_(), column.requires_grad_(), last)
    torch.library.opcheck(overload("axial_squeeze_backward", "cpu"), arguments)


def _sized(name, b, h, w):
    """An operator case of 3 heads, D=5, E=7 on a map of this size."""
    c = 3 * (2 * 5 + 7)
    return {
        "axial_squeeze": verify.OperatorCase(name, ((b, c, h, w),)),
        "axial_attention": verify.OperatorCase(
            name, ((b, 15, h), (b, 15, h), (b, 21, h)), (3, 0.4)
        ),
        "axial_attention_pair": verify.OperatorCase(
            name, ((b, c, h), (b, c, w), *[(1, 15, 16)] * 4), (3, 5)
        ),
        "broadcast_add": verify.OperatorCase(
            name, ((b, c, h, w), (b, c, h), (b, c, w)), ("relu6", 0.0)
        ),
        "gate": verify.OperatorCase(name, ((b, c, h, w),) * 2, (True,)),
    }[name]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_compiles_to_one_graph_of_any_size(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: _sized(case.name, 4, 9, 8).run(t, "auto"),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for size in ((4, 9, 8), (6, 13, 10), (5, 11, 23)):
        sized = _sized(case.name, *size)
        tensors = sized.inputs(0, "cpu", torch.float32)
        for found, expected in zip(compiled(*tensors), sized.run(tensors, "auto"), strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_schemas_hold_tensors_and_numbers_only():
    allowed = {"Tensor", "Optional[Tensor]", "List[Tensor]", "int", "float", "bool"}
    for name in overloads.SCHEMAS:
        packet = getattr(torch.ops.seaattn_kernels, name)
        for backend in packet.overloads():
            assert {str(a.type) for a in getattr(packet, backend)._schema.arguments} <= allowed


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flop_formula_counts_what_the_products_do(case):
    """Without autograd keys the operator is counted by its formula, with them by its parts."""
    tensors = case.inputs(0, "cpu", torch.float32)
    arguments = case.overload_arguments(tensors)
    case.run(tensors, "reference")
    with torch.inference_mode(), FlopCounterMode(display=False) as formula:
        overload(case.name)(*arguments)
    with torch.no_grad(), FlopCounterMode(display=False) as parts:
        overload(case.name)(*arguments)
    assert formula.get_total_flops() == parts.get_total_flops()


def test_every_operator_has_a_flop_formula():
    assert ops._FLOPS.keys() == overloads.SCHEMAS.keys()


@pytest.mark.parametrize("size", [(3, 4), (32, 16)])
def test_flop_formula_of_the_block(size):
    block, x = block_and_input(size=size)
    folded = fold.fold(dissect(block))
    counts = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode, FlopCounterMode(display=False) as counter:
            ops.sea_attention(x, folded, "reference")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "case", [c for c in verify.OPERATOR_CASES if c.name in ops.OPERATORS["cpu"]], ids=str
)
def test_cpu_operators_keep_the_budget(library, case, dtype):
    for verdict in verify.operator_verdicts(case, "cpu", dtype):
        assert verdict.ok, verdict


def test_cpu_squeeze_of_large_maps_and_large_means(library):
    """Sums of a million terms, and a mean a thousand times the deviation."""
    for x in (torch.randn(1, 1, 1024, 1024), 1000 + torch.randn(1, 40, 33, 129)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            ours, eager = ops.axial_squeeze(x, "cpu"), ops.axial_squeeze(x, "reference")
            verdict = budget.judge(ours, eager, reference.axial_squeeze(x.double()), x.dtype)
            assert verdict.ok, verdict


def test_cpu_squeeze_of_more_than_two_to_the_31_elements(library):
    """Rows that share one memory: 2.2e9 elements are read, and few are stored."""
    line = torch.randn(2000)
    x = line.expand(1, 1, 1_100_000, 2000)
    assert x.numel() > 2**31
    row, column = ops.axial_squeeze(x, "cpu")
    torch.testing.assert_close(column[0, 0], line)
    torch.testing.assert_close(row[0, 0, [0, -1]], line.mean().expand(2))
    torch.testing.assert_close(row.amin(), row.amax())


def _view(x, kind):
    """The values of x in another memory layout, in the middle of a buffer full of NaN."""
    b, c, h, w = x.shape
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "expanded":
        return x[:, :, :, :1].expand(b, c, h, w)
    guard = torch.full((b + 2, c + 2, h + 2, 2 * w + 2), float("nan"), dtype=x.dtype)
    view = guard[1:-1, 1:-1, 1:-1, 1:-1]
    view = view[..., ::2] if kind == "strided" else view[..., :w]
    return view.copy_(x)


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "expanded", "strided", "sliced"])
@pytest.mark.parametrize("dtype", LOW)
def test_cpu_squeeze_reads_any_strides_and_nothing_else(library, kind, dtype):
    x = _view(torch.randn(2, 35, 6, 7, dtype=dtype), kind)
    before = x.clone()
    for ours, exact in zip(
        ops.axial_squeeze(x, "cpu"), reference.axial_squeeze(x.double()), strict=True
    ):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, exact.to(dtype))
    assert torch.equal(x, before)


def test_cpu_squeeze_writes_every_element(library):
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled with NaN
    try:
        for shape in ((2, 33, 5, 7), (1, 1, 1, 1), (3, 65, 1, 40)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
                row, column = ops.axial_squeeze(x, "cpu")
                (grad,) = torch.autograd.grad(row.sum() + column.sum(), x)
                for out in (row, column, grad):
                    assert not out.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cpu_squeeze_gradient(library, layout):
    """Expanded and sliced upstream gradients; the gradient has the layout of x; twice."""
    x = torch.randn(2, 33, 6, 7).contiguous(memory_format=layout).requires_grad_()
    row, column = ops.axial_squeeze(x, "cpu")
    expanded = torch.randn(2, 33, 1).expand(2, 33, 6)
    sliced = torch.randn(2, 33, 14)[..., ::2]
    (grad,) = torch.autograd.grad((row, column), x, (expanded, sliced))
    torch.testing.assert_close(grad, expanded[..., :, None] / 7 + sliced[..., None, :] / 6)
    assert grad.is_contiguous(memory_format=layout)

    one = torch.randn_like(row).requires_grad_()
    (grad,) = torch.autograd.grad(ops.axial_squeeze(x, "cpu")[0], x, one, create_graph=True)
    second = torch.randn_like(grad)
    (found,) = torch.autograd.grad(grad, one, second)
    torch.testing.assert_close(found, second.mean(3))


def test_cpu_squeeze_has_the_same_bits_on_any_number_of_threads(library):
    x = torch.randn(3, 70, 40, 56)
    threads = torch.get_num_threads()
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(ops.axial_squeeze(y, "cpu"))
            for row, column in found[1:]:
                assert torch.equal(row, found[0][0])
                assert torch.equal(column, found[0][1])
    finally:
        torch.set_num_threads(threads)


def test_cpu_squeeze_from_several_threads_at_once(library):
    maps = [torch.randn(2, 20 + i, 9, 11) for i in range(4)]
    expected = [reference.axial_squeeze(x) for x in maps]
    wrong = []

    def work(i):
        for _ in range(50):
            for a, b in zip(ops.axial_squeeze(maps[i], "cpu"), expected[i], strict=True):
                if not torch.allclose(a, b, atol=1e-6):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# --- the elementwise operators of the CPU ----------------------------------------------------

ELEMENTWISE = [
    *(("broadcast_add", (activation, 0.1)) for activation in reference.ACTIVATIONS),
    *(("gate", (hard,)) for hard in (True, False)),
]


def _ramp(first, last, shape, dtype):
    """Numbers that every dtype holds."""
    count = torch.Size(shape).numel()
    return torch.linspace(first, last, count).bfloat16().to(dtype).view(shape)


def elementwise(name, arguments, x, backend):
    """Outputs and gradients of an operator of a map, the other arguments made from the map."""
    leaf = x.detach().requires_grad_()
    if name == "gate":
        others = [x.detach().flip(3).requires_grad_()]
    else:
        b, c, h, w = x.shape
        others = [_ramp(-1, 1, (b, c, n), x.dtype).requires_grad_() for n in (h, w)]
    out = getattr(ops, name)(leaf, *others, *arguments, backend=backend)
    upstream = _ramp(-1, 2, out.shape, out.dtype)
    return [out, *torch.autograd.grad(out, [leaf, *others], upstream)]


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "expanded", "strided", "sliced"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("name", "arguments"), ELEMENTWISE)
def test_cpu_elementwise_reads_any_strides_and_nothing_else(library, name, arguments, dtype, kind):
    x = _view(torch.randn(2, 19, 6, 7, dtype=dtype), kind)
    before = x.clone()
    found = elementwise(name, arguments, x, "cpu")
    exact = elementwise(name, arguments, x.double(), "reference")
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), truth, atol=16 * eps, rtol=4 * eps)
    assert reference.is_channels_last(found[0]) == reference.is_channels_last(x)
    assert reference.is_channels_last(found[1]) == reference.is_channels_last(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(1, 2, 3, 1100), (1, 1030, 2, 3), (1, 1, 1, 1), (2, 3, 40, 50)])
@pytest.mark.parametrize(("name", "arguments"), ELEMENTWISE)
def test_cpu_elementwise_of_any_size(library, name, arguments, shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape).contiguous(memory_format=layout)
        found = [elementwise(name, arguments, x, backend) for backend in ("cpu", "reference")]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("length", [12, 40])  # a tail of lanes, and whole ones
@pytest.mark.parametrize(("name", "arguments"), ELEMENTWISE)
def test_cpu_elementwise_at_kinks_and_beyond_numbers(library, name, arguments, length):
    """PyTorch's gradients at exactly 0, 6, -3 and 3; NaN, infinity and the range of exp."""
    inf = float("inf")
    values = [-3.0, 0.0, 3.0, 6.0, float("nan"), inf, -inf, -90.0, 90.0, -0.0, 6.1, -1e-7]
    x = torch.tensor(values).repeat(4)[:length].view(1, 1, 1, length)
    results = []
    for backend in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        if name == "gate":
            out = ops.gate(leaf, torch.ones_like(x), *arguments, backend=backend)
        else:
            zero = torch.zeros(1, 1, 1), torch.zeros(1, 1, length)
            out = ops.broadcast_add(leaf, *zero, *arguments, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        # At NaN PyTorch's own is one thing in a vector and another in its tail.
        results.append([out, gradient[~x.isnan()]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize(("name", "arguments"), ELEMENTWISE)
@pytest.mark.parametrize("dtype", LOW)
def test_cpu_elementwise_writes_every_element_and_the_same_bits(library, name, arguments, dtype):
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled with NaN
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(3, 37, 33, 31, dtype=dtype).contiguous(memory_format=layout)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(elementwise(name, arguments, x, "cpu"))
            for others in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
            assert not any(t.isnan().any() for t in found[0])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ops.OPERATORS["cpu"]], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_cpu(library, case, gradients):
    tensors = [t.requires_grad_(gradients) for t in case.inputs(0, "cpu", torch.float32)]
    torch.library.opcheck(overload(case.name, "cpu"), case.overload_arguments(tensors))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ops.OPERATORS["cpu"]], ids=str)
def test_double_backward_on_the_cpu_keeps_the_budget(library, case):
    columns = []
    for backend, dtype in (
        ("cpu", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in case.inputs(0, "cpu", torch.float32)]
        out = case.run(leaves, backend)
        first = torch.autograd.grad(sum((t * t).sum() for t in out), leaves, create_graph=True)
        columns.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    verdict = budget.judge(*columns, torch.float32, gradient=True)
    assert verdict.ok, verdict


def test_cpu_elementwise_checks_what_it_is_given(library):
    x, row, column = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 4)
    add, gate = overload("broadcast_add", "cpu"), overload("gate", "cpu")
    for arguments, message in (
        ((x, column, row, 0, 0.0), r"\(B, C, H\), \(B, C, W\) of one dtype, got \[1, 2, 3, 4\]"),
        ((x, row.double(), column, 0, 0.0), "of one dtype, got"),
        ((x, row, column, 5, 0.0), "no activation 5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add(*arguments)
    with pytest.raises(RuntimeError, match="of one shape and dtype, got"):
        gate(x, x[..., :3], True)
    with pytest.raises(RuntimeError, match="of one shape and dtype, got"):
        overload("gate_backward", "cpu")(x[:, :1], x, x, True)
    with pytest.raises(RuntimeError, match="the gradient must be like v"):
        overload("broadcast_add_backward", "cpu")(x[:, :1], x, row, column, 0, 0.0)


# --- the attention of the CPU ----------------------------------------------------------------


def _pair(b, heads, d, e, h, w, points=(16, 5, 1, 40)):
    """An odd pair: every table has a length of its own."""
    projected, keys = heads * (2 * d + e), heads * d
    tables = [(1, keys, p) for p in points]
    return verify.OperatorCase(
        "axial_attention_pair", ((b, projected, h), (b, projected, w), *tables), (heads, d)
    )


PAIRS = [
    _pair(1, 1, 1, 1, 1, 1),
    _pair(2, 3, 10, 15, 7, 13),
    _pair(3, 2, 5, 3, 16, 17),
    _pair(1, 2, 13, 9, 31, 130),
]


def _with_gradients(case, tensors, backend, upstream=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = case.run(leaves, backend)
    if upstream is None:
        upstream = [_ramp(-1, 2, t.shape, t.dtype) for t in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", [*PAIRS, _pair(1, 1, 24, 48, 1024, 257)], ids=str)
def test_cpu_pair_keeps_the_budget(library, case, dtype):
    for verdict in verify.operator_verdicts(case, "cpu", dtype):
        assert verdict.ok, verdict


def _axis_view(x, kind):
    """The values of x in another memory layout, in the middle of a buffer full of NaN."""
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "expanded":
        return x[..., :1].expand(x.shape)
    b, c, n = x.shape
    guard = torch.full((b + 2, c + 2, 2 * n + 2), float("nan"), dtype=x.dtype)
    view = guard[1:-1, 1:-1, 1:-1]
    view = view[..., ::2] if kind == "strided" else view[..., :n]
    return view.copy_(x)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "strided", "sliced"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["axial_attention", "axial_attention_pair"])
def test_cpu_attention_reads_any_strides_and_nothing_else(library, name, dtype, kind):
    """Of inputs and of upstream gradients."""
    case = PAIRS[2]
    if name == "axial_attention":
        case = verify.OperatorCase(name, ((3, 10, 17), (3, 10, 17), (3, 6, 17)), (2, 0.4))
    tensors = [_axis_view(t, kind) for t in case.inputs(0, "cpu", dtype)]
    before = [t.clone() for t in tensors]
    upstream = [_axis_view(torch.randn_like(t), kind) for t in case.run(tensors, "cpu")]
    found = _with_gradients(case, tensors, "cpu", upstream)
    exact = _with_gradients(
        case, [t.double() for t in tensors], "reference", [g.double() for g in upstream]
    )
    assert all(t.is_contiguous() for t in found[: len(upstream)])
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), truth, atol=32 * eps, rtol=8 * eps)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", LOW)
def test_cpu_attention_writes_every_element_and_the_same_bits(library, dtype):
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled with NaN
    try:
        for case in (*PAIRS, _pair(5, 4, 16, 32, 40, 56)):
            tensors = case.inputs(0, "cpu", dtype)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(_with_gradients(case, tensors, "cpu"))
            for others in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
            assert not any(t.isnan().any() for t in found[0])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


POISONED = """
import sys, torch
from seaattn_kernels import verify
case = verify.OperatorCase(
    "axial_attention_pair", ((2, 76, 5), (2, 76, 19), *[(1, 20, 16)] * 4), (2, 10))
leaves = [t.requires_grad_() for t in case.inputs(0, "cpu", torch.float32)]
out = case.run(leaves, "cpu")
torch.save([*out, *torch.autograd.grad(sum(t.square().sum() for t in out), leaves)], sys.argv[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc fills fresh memory")
def test_what_lies_beyond_an_axis_reaches_no_result(library, tmp_path):
    """The axes are padded to whole vectors: the same bits when the padding is 3e38."""
    results = []
    for perturb in ("0", "128"):
        path = tmp_path / perturb
        subprocess.run(
            [sys.executable, "-c", POISONED, str(path)],
            check=True,
            env={**os.environ, "MALLOC_PERTURB_": perturb},
            cwd=ROOT,
            timeout=120,
        )
        results.append(torch.load(path))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(t.isnan().any() for t in results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("channel", [3, 13, 25])  # of q, k, v
def test_cpu_attention_beyond_numbers(library, channel, value):
    """NaN, infinity and scores past the range of exp go where the reference's go."""
    case = PAIRS[2]
    tensors = case.inputs(0, "cpu", torch.float32)
    tensors[0][1, channel, 4] = value
    found = case.run(tensors, "cpu")
    for ours, theirs in zip(found, case.run(tensors, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_cpu_attention_of_large_scores(library):
    """A softmax of one 1 and otherwise zeros, without overflow."""
    case = verify.OperatorCase("axial_attention", ((1, 4, 20),) * 3, (2, 1000.0))
    tensors = case.inputs(0, "cpu", torch.float32)
    (ours,), (theirs,) = case.run(tensors, "cpu"), case.run(tensors, "reference")
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert ours.isfinite().all()


def test_cpu_pair_of_an_empty_batch_has_table_gradients_of_zero(library):
    case = PAIRS[1]
    tensors = [t if t.shape[0] == 1 else t[:0] for t in case.inputs(0, "cpu", torch.float32)]
    *maps, a, b, c, d = _with_gradients(case, tensors, "cpu")
    assert all(t.shape[0] == 0 for t in maps)
    assert not any(t.any() for t in (a, b, c, d))


def test_cpu_pair_checks_what_it_is_given(library):
    row, column, table = torch.randn(2, 8, 3), torch.randn(2, 8, 5), torch.randn(1, 2, 4)
    tables = [table] * 4
    pair = overload("axial_attention_pair", "cpu")
    for arguments, message in (
        ((row[0], column, *tables, 1, 2, 1.0), r"row must be .* got \[8, 3\]"),
        ((row, column, *tables, 1, 4, 1.0), r"row must be .* heads = 1, D = 4"),
        ((row, column, *tables, 3, 1, 1.0), r"row must be .* heads = 3"),
        ((row, column, *tables, 0, 1, 1.0), r"row must be .* heads = 0"),
        ((row, column[:1], *tables, 1, 2, 1.0), r"\[2, 8, 3\] Float and \[1, 8, 5\]"),
        ((row, column[..., :0], *tables, 1, 2, 1.0), "not of length 0"),
        ((row, column.half(), *tables, 1, 2, 1.0), "of one dtype"),
        ((row, column, *tables[:3], table[..., :0], 1, 2, 1.0), r"got \[1, 2, 0\]"),
        ((row, column, *tables[:3], table[:, :1], 1, 2, 1.0), r"heads\*D = 2"),
        ((row, column, *tables[:3], table.half(), 1, 2, 1.0), r"of the dtype of row, Float, got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pair(*arguments)
    backward = overload("axial_attention_pair_backward", "cpu")
    gradients = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    for wrong in ((gradients[1], gradients[1]), (gradients[0], gradients[1].half())):
        with pytest.raises(RuntimeError, match=r"a gradient must be \[2, 4, [35]\] Float, got"):
            backward(*wrong, row, column, *tables, 1, 2, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 3, 20, 20, 40, 40)]),
    points=st.tuples(*[st.integers(1, 40)] * 4),
    dtype=st.sampled_from(LOW),
    kind=st.sampled_from(["transposed", "strided", "sliced"]),
    seed=st.integers(0, 2**20),
)
def test_pair_of_any_size(sizes, points, dtype, kind, seed):
    case = _pair(*sizes, points)
    tensors = [_axis_view(t, kind) for t in case.inputs(seed, "cpu", dtype)]
    exact = _with_gradients(case, [t.double() for t in tensors], "reference")
    # A score's gradient is what is left of sums of E products, nothing where an axis is one long.
    terms = sizes[3] ** 0.5
    for ours, truth in zip(_with_gradients(case, tensors, "auto"), exact, strict=True):
        eps = torch.finfo(dtype).eps * max(1.0, terms, float(truth.detach().abs().max()))
        torch.testing.assert_close(ours.double(), truth, atol=64 * eps, rtol=0)


# --- training on the CPU ---------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ops.OPERATORS["cpu"]], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_cpu_operators_train_in_one_graph(library, case, dynamic):
    tensors = case.inputs(0, "cpu", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: case.run(t, "cpu"), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    found = []
    for function in (compiled, lambda *t: case.run(t, "reference")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        found.append([*out, *torch.autograd.grad(sum((t * t).sum() for t in out), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ops.OPERATORS["cpu"]], ids=str)
def test_cpu_gradients_are_recorded_only_where_asked_for(library, case):
    leaves = [t.requires_grad_() for t in case.inputs(0, "cpu", torch.float32)]
    out = case.run(leaves, "cpu")
    plain = torch.autograd.grad(sum(t.sum() for t in out), leaves, retain_graph=True)
    assert not any(g.requires_grad for g in plain)
    upstream = [torch.ones_like(t, requires_grad=True) for t in out]
    recorded = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    assert all(g.requires_grad for g in recorded)


def test_cpu_operators_of_one_input_or_one_output(library):
    """Inputs without gradients, and a result that nothing depends on."""
    case = PAIRS[1]
    row, *rest = case.inputs(0, "cpu", torch.float32)
    found = []
    for backend in ("cpu", "reference"):
        leaf = row.clone().requires_grad_()
        out, _ = case.run([leaf, *rest], backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        found.append(gradient)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.gate(x.detach(), x, backend="cpu").sum(), x)
    torch.testing.assert_close(gradient, torch.nn.functional.hardsigmoid(x.detach()))


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 40, 20, 20)]),
    dtype=st.sampled_from(LOW),
    kind=st.sampled_from(["channels_last", "transposed", "strided", "sliced"]),
    seed=st.integers(0, 2**31),
)
def test_squeeze_of_any_map(shape, dtype, kind, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = _view(x, kind)
    for ours, exact in zip(ops.axial_squeeze(x), reference.axial_squeeze(x.double()), strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, exact.to(dtype))


def test_nan_and_infinity_stay_in_their_row_and_column():
    x = torch.zeros(1, 2, 3, 4)
    x[0, 1, 2, 3] = float("nan")
    x[0, 0, 0, 1] = float("inf")
    row, column = ops.axial_squeeze(x)
    assert row.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert column.isnan().nonzero().tolist() == [[0, 1, 3]]
    assert row.isinf().nonzero().tolist() == [[0, 0, 0]]
    assert column.isinf().nonzero().tolist() == [[0, 0, 1]]


# --- rules for all ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inputs_are_neither_modified_nor_aliased(case):
    tensors = case.inputs(0, "cpu", torch.float32)
    before = [t.clone() for t in tensors]
    state = torch.random.get_rng_state()
    out = case.run(tensors, "auto")
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    assert not storages & {t.untyped_storage().data_ptr() for t in out}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_empty_batch(case):
    tensors = [t if t.shape[0] == 1 else t[:0] for t in case.inputs(0, "cpu", torch.float32)]
    full = case.run(case.inputs(0, "cpu", torch.float32), "auto")
    for empty, out in zip(case.run(tensors, "auto"), full, strict=True):
        assert empty.shape == (0, *out.shape[1:])


def test_identity_does_not_alias():
    v = torch.randn(1, 2, 3, 4)
    out = ops.broadcast_add(v, torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    assert torch.equal(out, v)
    assert out.data_ptr() != v.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
def test_layout_follows_the_first_map(compiled):
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    row, column = torch.zeros(2, 16, 9), torch.zeros(2, 16, 8)
    functions = (
        lambda t: ops.gate(t, x),
        lambda t: ops.broadcast_add(t, row, column, "relu"),
        lambda t: ops.sea_attention(t, folded),
    )
    last = x.contiguous(memory_format=torch.channels_last)
    sliced = torch.randn(2, 32, 9, 8).contiguous(memory_format=torch.channels_last)[:, ::2]
    with torch.no_grad():
        for function in functions:
            if compiled:
                torch._dynamo.reset()
                function = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert function(x).is_contiguous()
            assert function(last).is_contiguous(memory_format=torch.channels_last)
            assert not function(last).is_contiguous()
            assert function(sliced).is_contiguous()


def test_layout_of_a_pixel_is_contiguous():
    x = torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    assert ops.gate(x, x).stride() == torch.empty(2, 3, 1, 1).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_attention_and_block_and_promotes_the_others(dtype):
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    by_name = {case.name: case for case in CASES}
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        for name in ("axial_attention", "axial_attention_pair"):
            tensors = by_name[name].inputs(0, "cpu", torch.float32)
            tensors[0] = tensors[0].to(dtype)
            for out in by_name[name].run(tensors, "auto"):
                assert out.dtype is dtype
        assert ops.sea_attention(x, folded).dtype is dtype
        assert ops.axial_squeeze(x.to(dtype))[0].dtype is dtype
        assert ops.axial_squeeze(x)[0].dtype is torch.float32
        assert ops.gate(x.to(dtype), x.to(dtype)).dtype is dtype
        assert ops.gate(x.to(dtype), x).dtype is torch.float32
        mixed = ops.broadcast_add(x.to(dtype), x.mean(3), x.mean(2).to(dtype))
        assert mixed.dtype is torch.float32
        double = [t.double() for t in by_name["axial_attention"].inputs(0, "cpu", dtype)]
        assert by_name["axial_attention"].run(double, "auto")[0].dtype is torch.float64
        with pytest.raises(TypeError, match=r"k is torch.float32, q is torch.float64"):
            ops.axial_attention(double[0], *(t.float() for t in double[1:]), 3, 1.0)


def test_autocast_reaches_nothing_inside_the_block():
    """The axis vectors stay float32: the same result as a block called in the low dtype."""
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.sea_attention(x, folded, "reference")
    low = x.bfloat16()
    weights = folded.weights(torch.bfloat16, 9, 8)
    with torch.no_grad():
        expected = reference.sea_attention_folded(low, weights, 2, 4, "relu6", 0.0, True)
    assert torch.equal(found, expected)


def test_block_has_no_backward():
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    with pytest.raises(RuntimeError, match="no backward"):
        ops.sea_attention(x.requires_grad_(), folded)


# --- bad input -------------------------------------------------------------------------------

X = torch.randn(2, 4, 3, 5)
ROW, COLUMN = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
Q = torch.randn(2, 4, 3)
PAIR = (torch.randn(1, 16, 3), torch.randn(1, 16, 5), [torch.randn(1, 4, 16)] * 4)
BAD = [
    (TypeError, "x must be a tensor", lambda: ops.axial_squeeze([1.0])),
    (ValueError, r"x .*\(B, C, H, W\), got shape \(4, 3, 5\)", lambda: ops.axial_squeeze(X[0])),
    (ValueError, r"x .*got shape \(2, 4, 0, 5\)", lambda: ops.axial_squeeze(X[:, :, :0])),
    (ValueError, r"x .*got shape \(2, 4, 3, 0\)", lambda: ops.axial_squeeze(X[..., :0])),
    (TypeError, r"x .*torch.int64", lambda: ops.axial_squeeze(X.long())),
    (TypeError, r"x .*torch.complex64", lambda: ops.axial_squeeze(X.cfloat())),
    (ValueError, "backend .*'metal'", lambda: ops.axial_squeeze(X, backend="metal")),
    (ValueError, r"k must have shape \(2, 4, 3\)", lambda: ops.axial_attention(Q, Q[:1], Q, 2, 1)),
    (ValueError, "v must have shape", lambda: ops.axial_attention(Q, Q, Q[..., :2], 2, 1.0)),
    (ValueError, "q must have a multiple of heads=3", lambda: ops.axial_attention(Q, Q, Q, 3, 1.0)),
    (ValueError, "heads .*got 0", lambda: ops.axial_attention(Q, Q, Q, 0, 1.0)),
    (ValueError, "heads .*got 1.5", lambda: ops.axial_attention(Q, Q, Q, 1.5, 1.0)),
    (TypeError, "k is torch.float64", lambda: ops.axial_attention(Q, Q.double(), Q, 2, 1.0)),
    (ValueError, "v is on meta", lambda: ops.axial_attention(Q, Q, Q.to("meta"), 2, 1.0)),
    (
        ValueError,
        "column .*in B and NQ",
        lambda: ops.axial_attention_pair(PAIR[0], Q, PAIR[2], 2, 2),
    ),
    (
        ValueError,
        "tables must be four.*None",
        lambda: ops.axial_attention_pair(*PAIR[:2], None, 2, 2),
    ),
    (TypeError, "scale .*None", lambda: ops.axial_attention(Q, Q, Q, 2, None)),
    (TypeError, "negative_slope .*None", lambda: ops.broadcast_add(X, ROW, COLUMN, "relu", None)),
    (
        ValueError,
        "tables must be four",
        lambda: ops.axial_attention_pair(*PAIR[:2], PAIR[2][:3], 2, 2),
    ),
    (ValueError, r"tables\[0\] .*\(1, 2, 16\)", lambda: ops.axial_attention_pair(*PAIR, 2, 1)),
    (ValueError, "row must have more than 2", lambda: ops.axial_attention_pair(*PAIR, 2, 4)),
    (ValueError, "key_dim .*got -1", lambda: ops.axial_attention_pair(*PAIR, 2, -1)),
    (ValueError, "row must have shape", lambda: ops.broadcast_add(X, COLUMN, COLUMN)),
    (ValueError, "column must have shape", lambda: ops.broadcast_add(X, ROW, ROW)),
    (ValueError, "activation .*'gelu'", lambda: ops.broadcast_add(X, ROW, COLUMN, "gelu")),
    (TypeError, "row is torch.float16", lambda: ops.broadcast_add(X, ROW.half(), COLUMN)),
    (ValueError, "y must have shape", lambda: ops.gate(X, X[:1])),
    (TypeError, "y is torch.float64", lambda: ops.gate(X, X.double())),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_names_the_argument_and_shows_the_value(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_bad_input_of_the_block():
    block, x = block_and_input()
    folded = fold.fold(dissect(block))
    for error, message, bad in (
        (ValueError, "C=16 channels", x[:, :8]),
        (ValueError, r"\(B, C, H, W\)", x[0]),
        (TypeError, "x is torch.float16, the weights are torch.float32", x.half()),
        (TypeError, "x is torch.float64, the weights are torch.float32", x.double()),
        (ValueError, "x is on meta", x.to("meta")),
    ):
        with pytest.raises(error, match=message):
            ops.sea_attention(bad, folded)
    with pytest.raises(TypeError, match=r"folded must be a fold.FoldedWeights, got SeaAttention"):
        ops.sea_attention(x, block)


# --- choice of a backend ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_explicit_backend_without_an_implementation_raises(case, backend, monkeypatch):
    monkeypatch.setattr(ops, "OPERATORS", {**ops.OPERATORS, backend: ()})
    with pytest.raises(RuntimeError, match=f"no {backend} implementation of {case.name}"):
        case.run(case.inputs(0, "cpu", torch.float32), backend)


def test_explicit_cpu_backend_refuses_what_it_cannot(library):
    with pytest.raises(RuntimeError, match="float64"):
        ops.axial_squeeze(X.double(), "cpu")
    with pytest.raises(RuntimeError, match="CPU tensors, got meta"):
        ops.axial_squeeze(X.to("meta"), "cpu")


def test_auto(library, monkeypatch):
    device = torch.device("cpu")
    for name in ops.OPERATORS["cpu"]:
        assert ops.choose(name, "auto", device, torch.float32) == "cpu"
        assert ops.choose(name, "auto", device, torch.float64) == "reference"
        assert ops.choose(name, "auto", torch.device("meta"), torch.float32) == "reference"
    monkeypatch.setitem(ops.OPERATORS, "cpu", ("axial_squeeze",))
    assert ops.choose("gate", "auto", device, torch.float32) == "reference"


def test_auto_says_once_that_it_falls_back(monkeypatch):
    monkeypatch.setattr(native, "REASON", "the library is broken")
    monkeypatch.setattr(ops, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            ops.axial_squeeze(X)
            ops.gate(X, X)
            ops.axial_squeeze(X.double())
    assert [str(warning.message) for warning in seen] == [
        "seaattn_kernels uses plain PyTorch: the library is broken"
    ]
    with pytest.raises(RuntimeError, match="the library is broken"):
        ops.axial_squeeze(X, backend="cpu")


def test_environment_sets_what_auto_means(library):
    code = (
        "import warnings, torch\n"
        "from seaattn_kernels import ops\n"
        "d = torch.device('cpu')\n"
        "ops.OPERATORS['cpu'] = ('axial_squeeze',)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(*(ops.choose(o, 'auto', d, torch.float32) for o in ('axial_squeeze', 'gate')))\n"
        "print(len(seen))\n"
    )
    expected = {
        "": "cpu reference 0",
        "reference": "reference reference 0",
        "cpu": "cpu reference 1",
        "triton": "reference reference 1",
    }
    for value, words in expected.items():
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SEAATTN_BACKEND": value, "TRITON_INTERPRET": "0"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.split() == words.split(), (value, done)


def test_environment_is_checked(monkeypatch):
    monkeypatch.setattr(ops, "_AUTO", "metal")
    with pytest.raises(ValueError, match=r"SEAATTN_BACKEND .*'metal'"):
        ops.axial_squeeze(X)


def test_a_call_costs_little_beside_its_arithmetic():
    """The checks and the choice of a backend, over the bare registered overload."""
    from timeit import repeat

    x = torch.randn(1, 8, 4, 4)
    bare = overload("gate")
    public = min(repeat(lambda: ops.gate(x, x, backend="reference"), number=200, repeat=20))
    direct = min(repeat(lambda: bare(x, x, True), number=200, repeat=20))
    assert (public - direct) / 200 < 40e-6


def test_the_capability_of_a_gpu_is_not_traced(monkeypatch):
    """The question goes to the driver, which no compiler reads."""
    monkeypatch.setattr(ops, "_capabilities", {})
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (9, int(time.time() > 0) - 1)
    )
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def call(x):
        chosen = ops.choose("gate", "auto", torch.device("cuda", 0), x.dtype)
        return x + 1 if chosen == "triton" else x

    assert torch.equal(call(torch.zeros(2)), torch.ones(2))
    assert list(ops._capabilities) == [torch.device("cuda", 0)]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability as far as the choice of a backend can see."""

    def gpu(capability, precision):
        monkeypatch.setattr(ops, "_capability", lambda device: capability)
        monkeypatch.setattr(ops, "_exact_convolutions", lambda: precision == "ieee")

    return gpu


@pytest.mark.parametrize(
    ("capability", "precision", "dtype", "side", "faster"),
    [
        ((9, 0), "ieee", torch.float32, 16, False),
        ((9, 0), "ieee", torch.float32, 512, True),
        ((9, 0), "tf32", torch.float32, 512, False),
        ((9, 0), "ieee", torch.float16, 512, False),
        ((8, 9), "ieee", torch.float32, 512, False),
    ],
)
def test_crossover_to_folded_pytorch(gpu, capability, precision, dtype, side, faster):
    gpu(capability, precision)
    block, _ = block_and_input(channels=32)
    with torch.no_grad():
        folded = block._folds.get(block)
    x = SimpleNamespace(
        dtype=dtype, device=torch.device("cuda", 0), shape=torch.Size((8, 32, side, side))
    )
    assert ops._folded_is_faster(x, folded) is faster
    x.device = torch.device("cpu")
    assert not ops._folded_is_faster(x, folded)


def test_crossover_is_for_auto_alone(monkeypatch):
    """An explicit backend never gives way, nor what SEAATTN_BACKEND sets."""
    block, x = block_and_input()
    with torch.no_grad():
        folded = block._folds.get(block)
    asked = []
    monkeypatch.setattr(ops, "_folded_is_faster", lambda *arguments: True)
    monkeypatch.setattr(
        ops, "choose", lambda operator, backend, *rest: asked.append(backend) or "reference"
    )
    ops.sea_attention(x, folded)
    ops.sea_attention(x, folded, "triton")
    monkeypatch.setattr(ops, "_AUTO", "triton")
    ops.sea_attention(x, dataclasses.replace(folded))  # in which nothing is settled yet
    assert asked == ["reference", "triton", "auto"]


def test_the_switch_of_convolutions_is_not_traced():
    @torch.compile(fullgraph=True, backend="eager")
    def call(x):
        return x + 1 if ops._exact_convolutions() else x - 1

    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision, expected in (("ieee", 1), ("tf32", -1)):
            torch._dynamo.reset()
            conv.fp32_precision = precision
            assert call(torch.zeros(1)) == expected
    finally:
        conv.fp32_precision = before


def test_what_was_settled_for_a_map_is_not_settled_again(monkeypatch):
    block = verify.randomise(SeaAttention(16)).eval()
    x = torch.randn(2, 16, 5, 6)
    with torch.no_grad():
        folded = block._folds.get(block)
        expected = ops.sea_attention(x, folded)
        settled = []
        select = ops._select
        monkeypatch.setattr(ops, "_select", lambda *a: settled.append(a[2].shape) or select(*a))
        assert torch.equal(ops.sea_attention(x, folded), expected)
        assert not settled
        ops.sea_attention(x[:1], folded)
        ops.sea_attention(x, folded, "reference")
        assert len(settled) == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ops.sea_attention(x, folded).dtype is torch.bfloat16
        with pytest.raises(ValueError, match="C=16"):
            ops.sea_attention(x[:, 1:], folded)
        with pytest.raises(TypeError, match="float64"):
            ops.sea_attention(x.double(), folded)
    with pytest.raises(RuntimeError, match="no backward"):
        ops.sea_attention(x.requires_grad_(), folded)
    with torch.no_grad():
        for width in range(100):
            ops.sea_attention(torch.randn(1, 16, 1, width + 1), folded)
    assert len(folded.calls) == fold.MAP_SIZES


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.names.append(str(function))
        return function(*arguments, **(kwargs or {}))


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        self.names.append(str(function))
        return function(*arguments, **(kwargs or {}))


@torch.no_grad()
def test_a_repeated_call_is_seen_by_all_who_watch(library):
    block = verify.randomise(SeaAttention(16)).eval()
    x = torch.randn(2, 16, 5, 6)
    expected = block(x)
    name = "seaattn_kernels.sea_attention.cpu"
    for mode in (Counted(), Seen()):
        with mode:
            assert torch.equal(block(x), expected)
        assert name in mode.names
    with torch.profiler.profile() as profile:
        block(x)
    assert "seaattn_kernels::sea_attention" in {event.key for event in profile.key_averages()}
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(torch.func.vmap(block)(x[None])[0], expected, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(block(dual)).tangent is not None
    assert type(block(torch.nn.Parameter(x))) is torch.Tensor
    assert torch.equal(block(x[:, :, :, ::1]), expected)
    with pytest.raises(TypeError, match=r"x must be a tensor .*, got ndarray") as error:
        block(x.numpy())
    assert len(str(error.value)) < 120


@torch.no_grad()
def test_an_error_of_a_repeated_call_is_raised(library, monkeypatch):
    block = verify.randomise(SeaAttention(16)).eval()
    x = torch.randn(2, 16, 5, 6)
    folded = block._folds.get(block)
    weights = folded.weights(x.dtype, 5, 6, "cpu")
    folded.calls.keep(x, "auto", "cpu", weights[:3], (4, 16, 1, 0.0, True))
    with pytest.raises(RuntimeError):
        folded.calls.repeat(x, "auto")
    with pytest.raises(TypeError):
        folded.calls.keep(x, "auto", "cpu", (1,), (4, 16, 1, 0.0, True))
    with pytest.raises(RuntimeError, match="nowhere"):
        folded.calls.keep(x, "auto", "nowhere", weights, (4, 16, 1, 0.0, True))
