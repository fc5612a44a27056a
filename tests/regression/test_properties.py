"""Every operator and the block, of any shape, strides, dtype and values, on every backend.

Values and gradients are held to the error budget beside plain PyTorch in the same dtype; a tiny
shape is run for several seeds, because an error of few numbers is noise.
"""

import copy
import math
from contextlib import contextmanager

import cases
import numpy as np
import pytest
import torch
from cases import BACKENDS, DTYPES, LAYOUTS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from seaattn_kernels import budget, reference, verify
from seaattn_kernels.kernels import block as triton_block
from seaattn_kernels.kernels import depthwise, normalize, squeeze
from seaattn_kernels.overloads import STAGES

#: Interpreted kernels take a hundred times as long.
EXAMPLES = {"reference": 15, "cpu": 40, "triton": 5}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("library")
    return request.param


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    """Maps cut into bands and strips, as where many programs run at once."""
    for module in (squeeze, normalize, depthwise):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(squeeze, "bands", lambda *sizes: 2)
    lines = squeeze.lines  # of up to 32 rows: most maps here would be one band
    monkeypatch.setattr(squeeze, "lines", lambda *sizes: lines(*sizes)._replace(h=4))


@pytest.fixture(autouse=True)
def _honest_interpreter(monkeypatch):
    """Of a number and NaN the larger is the number, as on a GPU, unless a kernel asks for NaN."""
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            name,
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )


def examples(backend, share=1.0):
    return settings(
        max_examples=math.ceil(EXAMPLES[backend] * share),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # shrinking an interpreted failure takes minutes
        suppress_health_check=list(HealthCheck),
    )


def seeds_of(numel, backend):
    return range(max(1, min(30, (200 if backend == "triton" else 1000) // max(1, numel))))


def maps(backend):
    most = (2, 6, 9, 9) if backend == "triton" else (3, 20, 20, 40)
    return st.one_of(
        st.sampled_from([(1, 1, 1, 1), (2, 3, 1, 17), (1, 2, 19, 1)]),
        st.tuples(*(st.integers(1, n) for n in most)),
    )


def axes(backend):
    """Images, heads, D, E, H, W and the length of the position tables."""
    most = (2, 2, 5, 9, 18, 18, 20) if backend == "triton" else (3, 3, 20, 20, 40, 40, 40)
    return st.tuples(*(st.integers(1, n) for n in most))


def operators(name, backend):
    if name == "axial_squeeze":
        return maps(backend).map(lambda shape: cases.of_a_map(name, shape))
    if name == "gate":
        return st.builds(
            lambda s, hard: cases.of_a_map(name, s, hard), maps(backend), st.booleans()
        )
    if name == "broadcast_add":
        return st.builds(
            lambda s, activation: cases.of_a_map(name, s, activation, 0.1),
            maps(backend),
            st.sampled_from(reference.ACTIVATIONS),
        )
    if name == "axial_attention":
        return axes(backend).map(lambda sizes: cases.one_axis(*sizes[:5]))
    return axes(backend).map(lambda sizes: cases.pair(*sizes))


OPERATORS = ("axial_squeeze", "axial_attention", "axial_attention_pair", "broadcast_add", "gate")


def scaled(tensors, values, name):
    """The same numbers of another kind."""
    dtype = tensors[0].dtype
    of_maps = name in ("axial_squeeze", "broadcast_add", "gate")
    if values == "denormal":
        tensors = [t.double() * torch.finfo(dtype).tiny * 0.1 for t in tensors]
    elif values == "large":
        # Of scores that are larger the softmax is one entry, and its error all or nothing.
        most = 1e3 if dtype is torch.float16 else 1e30
        tensors = [t.double() * (most if of_maps else 3) for t in tensors]
    elif values == "constant":
        tensors = [torch.full_like(t, 1 / 3) for t in tensors]
    elif values == "far from zero":
        tensors = [t.double() + (100 if of_maps else 1) for t in tensors]
    return [t.to(dtype) for t in tensors]


VALUES = ("normal", "normal", "large", "denormal", "constant", "far from zero")


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name, backend):
    @examples(backend)
    @given(
        operators(name, backend),
        st.sampled_from(DTYPES),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from(VALUES),
        st.integers(0, 1000),
    )
    def check(case, dtype, layout, values, start):
        pooled = {"forward": ([], [], []), "gradient": ([], [], [])}
        for seed in seeds_of(math.prod(case.shapes[0]), backend):
            tensors = scaled(case.inputs(start + seed, "cpu", dtype), values, name)
            tensors = [LAYOUTS[layout](t) for t in tensors]
            before = [t.clone() for t in tensors]
            upstream = cases.upstreams(case, tensors, start + seed)
            exact = [t.double() for t in tensors]
            found = (
                cases.operator_groups(case, tensors, upstream, backend),
                cases.operator_groups(case, tensors, upstream, "reference"),
                cases.operator_groups(case, exact, upstream, "reference"),
            )
            for kind, pools in pooled.items():
                for pool, groups in zip(pools, found, strict=True):
                    pool.extend(groups[kind])
            for t, old in zip(tensors, before, strict=True):
                assert torch.equal(t, old), "an input was written"
            first = found[0]["forward"][0]
            assert first.dtype is dtype
            if first.dim() == 4:
                assert reference.is_channels_last(first) == reference.is_channels_last(tensors[0])
        for kind, pools in pooled.items():
            verdict = budget.judge(*pools, dtype, gradient=kind == "gradient")
            assert verdict.ok, f"{kind}: {verdict}"

    check()


def assert_nan_in_the_same_channels(found, plain):
    """Of the gradient of a position table: within a channel a backend may spread it, by products
    with exact zeros."""
    assert torch.equal(found.isfinite().all(2), plain.isfinite().all(2))
    assert (found.isfinite() <= plain.isfinite()).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_nan_and_infinity_go_where_eagers_go(name, backend):
    @examples(backend)
    @given(
        operators(name, backend),
        st.sampled_from(DTYPES),
        st.sampled_from([math.nan, math.inf, -math.inf]),
        st.integers(0, 10**6),
    )
    def check(case, dtype, value, at):
        tensors = case.inputs(0, "cpu", dtype)
        # Not in a position table: its interpolation multiplies neighbours by exact zeros.
        places = tensors[:2] if name == "axial_attention_pair" else tensors
        chosen = places[at % len(places)]
        chosen.view(-1)[at % chosen.numel()] = value
        upstream = cases.upstreams(case, tensors, 1)
        found = cases.operator_groups(case, tensors, upstream, backend)
        plain = cases.operator_groups(case, tensors, upstream, "reference")
        for kind, ours in found.items():
            for index, (a, b) in enumerate(zip(ours, plain[kind], strict=True)):
                if kind == "gradient" and index >= 2 and name == "axial_attention_pair":
                    assert_nan_in_the_same_channels(a, b)
                    continue
                assert torch.equal(a.isnan(), b.isnan()), kind
                assert torch.equal(a.isposinf(), b.isposinf()), kind
                assert torch.equal(a.isneginf(), b.isneginf()), kind

    check()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_goes_through_every_activation(activation, backend):
    """And infinity as in eager; examples by chance may miss one."""
    x = cases.normal(0, 2, 3, 4, 5)
    x[0, 1, 2, 3], x[1, 2, 0, 1], x[1, 0, 1, 4] = math.nan, math.inf, -math.inf
    zero = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)]
    for case, others in (
        (cases.of_a_map("broadcast_add", x.shape, activation, 0.1), zero),
        (cases.of_a_map("gate", x.shape, True), [torch.ones_like(x)]),
        (cases.of_a_map("gate", x.shape, False), [torch.ones_like(x)]),
    ):
        (ours,), (theirs,) = (case.run([x, *others], b) for b in (backend, "reference"))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_softmax_of_scores_past_the_range_of_exp(size, backend):
    """Of one score that is the largest the probability is one; exp of it is infinite."""
    case = cases.one_axis(1, 2, 3, 4, 20)
    q, k, v = case.inputs(0, "cpu", torch.float32)
    (ours,), (theirs,) = (case.run([q * size, k, v], b) for b in (backend, "reference"))
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(name, dtype, backend):
    @examples("triton")
    @given(operators(name, "triton"))
    def check(case):
        tensors = [t[:0] if index < 3 and name != "axial_attention_pair" else t
                   for index, t in enumerate(case.inputs(0, "cpu", dtype))]  # fmt: skip
        if name == "axial_attention_pair":
            tensors[:2] = [t[:0] for t in tensors[:2]]
        found = cases.operator_groups(case, tensors, cases.upstreams(case, tensors, 1), backend)
        for t in found["forward"]:
            assert t.shape[0] == 0
        for gradient, t in zip(found["gradient"], tensors, strict=True):
            assert gradient.shape == t.shape
            assert not gradient.any()

    check()


#: Values at which a derivative jumps, and some beside them.
KINKS = (-3.0, 0.0, 3.0, 6.0, -0.0, 5.5, -2.5, 7.0)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_at_the_kinks_are_pytorchs(activation, dtype, backend):
    x = torch.tensor(KINKS, dtype=dtype).view(1, 1, 2, 4)
    zero = torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 1, 4, dtype=dtype)
    for case, tensors in (
        (cases.of_a_map("broadcast_add", x.shape, activation, 0.1), [x, *zero]),
        (cases.of_a_map("gate", x.shape, True), [x, torch.ones_like(x)]),
    ):
        one = [torch.ones_like(x)]
        found, plain = (
            cases.operator_groups(case, tensors, one, b) for b in (backend, "reference")
        )
        for ours, theirs in zip(found["gradient"], plain["gradient"], strict=True):
            atol = 2 * torch.finfo(dtype).eps * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# --- the operators of a training step --------------------------------------------------------


def _wide(arguments):
    def widen(t):
        return t.float() if isinstance(t, torch.Tensor) else t

    return [widen(t) for t in arguments]


def stage_options():
    return {
        "layout": st.sampled_from(list(LAYOUTS)),
        "axes": st.booleans(),
        "activation": st.sampled_from(reference.ACTIVATIONS),
        "hard": st.booleans(),
        "offset": st.sampled_from([0.0, 0.0, 100.0]),
    }


def assert_stage_is_right(name, backend, shape, dtype, start, options):
    """Beside plain PyTorch in float32: what is read in half precision is exact."""
    pooled = []
    for seed in seeds_of(math.prod(shape), backend):
        given_ = cases.stage_inputs(name, shape, dtype, start + seed, **options)
        found = cases.run_stage(name, given_, backend)
        eager = cases.run_stage(name, _wide(given_), "reference")
        truth = cases.stage_truth(name, given_)
        if name == "axial_moments":  # deviations are from the mean that was found
            for side in (found, eager, truth):
                mean = side[0].double()[:, None]
                side[2:] = [(t + mean).to(t.dtype) for t in side[2:]]
        pooled.append((found, eager, truth))
    for index, ours in enumerate(pooled[0][0]):
        kind = ours.dtype
        # Sums of gradients that were rounded before.
        judged = dtype if name == "normalize_add_backward" else kind
        columns = [[row[i][index] for row in pooled] for i in range(3)]
        columns[1] = [t.to(kind) for t in columns[1]]
        if ours.dim() == 4:
            verdict = budget.judge(*columns, judged)
            assert verdict.ok, f"output {index}: {verdict}"
            continue
        # Sums of channels: by pixel they are added in float32, some at a time, where eager
        # halves and halves.
        for found, _, exact in zip(*columns, strict=True):
            size = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
            atol = (16 if judged is torch.float32 else 2) * torch.finfo(judged).eps * size
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", STAGES)
def test_stage(name, backend):
    @examples(backend)
    @given(
        maps(backend),
        st.sampled_from(DTYPES if backend != "reference" else DTYPES[:1]),
        st.integers(0, 1000),
        st.fixed_dictionaries(stage_options()),
    )
    def check(shape, dtype, start, options):
        assert_stage_is_right(name, backend, shape, dtype, start, options)

    check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", STAGES)
def test_stage_of_many_images(name, layout, backend):
    """More parts of a sum than are added at once."""
    options = {"layout": layout, "offset": 10.0}
    assert_stage_is_right(name, backend, (40, 2, 5, 3), torch.float32, 0, options)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradients_of_stages_at_the_kinks_are_pytorchs(activation, backend):
    y = torch.tensor(KINKS).view(1, 1, 2, 4)
    as_it_is, none = torch.tensor([[0.0], [1.0], [0.0]]), torch.zeros(2, 1)
    one, row, column = torch.ones_like(y), torch.zeros(1, 1, 2), torch.zeros(1, 1, 4)

    def of(function):
        leaf = y.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    activated = of(lambda x: reference.activate(x, activation, 0.1))
    act = (reference.ACTIVATIONS.index(activation), 0.1)
    for name, arguments, expected in (
        ("normalize_backward", (one, y, as_it_is, none, None, None, *act), activated),
        ("normalize_add_backward", (one, y, as_it_is, row, column, *act), activated),
        (
            "normalize_gate_backward",
            (one, y, one, as_it_is, as_it_is, none, none, True),
            of(lambda x: reference.gate(x, one)),
        ),
    ):
        torch.testing.assert_close(cases.run_stage(name, arguments, backend)[0], expected)
    (sums,) = cases.run_stage("normalize_sums", (one, y, as_it_is, None, None, *act), backend)
    torch.testing.assert_close(sums[0, 0], activated.sum())


@pytest.mark.parametrize("name", STAGES)
def test_stage_of_numbers_that_are_none(name, backend):
    @examples(backend)
    @given(maps("triton"), st.sampled_from(reference.ACTIVATIONS), st.integers(0, 10**6))
    def check(shape, activation, at):
        arguments = cases.stage_inputs(name, shape, torch.float32, 0, activation=activation)
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        found_maps = [t for t in tensors if t.shape == shape] or tensors  # or of statistics alone
        chosen = found_maps[at % len(found_maps)]
        chosen.view(-1)[at % chosen.numel()] = math.nan
        found = cases.run_stage(name, arguments, backend)
        for ours, truth in zip(found, cases.stage_truth(name, arguments), strict=True):
            a, b = ours.isnan(), truth.isnan()
            if ours.shape[1:] == (1, 3, 3):  # which of the taps, PyTorch's dtypes disagree
                a, b = a.flatten(1).any(1), b.flatten(1).any(1)
            assert torch.equal(a, b)

    check()


# --- the block -------------------------------------------------------------------------------


def blocks(backend):
    most = (2, 20, 9, 9, 5, 2) if backend == "triton" else (3, 40, 30, 30, 20, 4)
    sizes = [st.integers(1, n) for n in most[:4]]
    return st.builds(
        verify.BlockCase,
        *sizes,
        st.integers(2, most[4]),
        st.integers(1, most[5]),
        st.sampled_from([1, 1.5, 2]),
        st.sampled_from(reference.ACTIVATIONS),
        st.booleans(),
    )


def assert_folded_is_right(case, backend, dtype, layout="contiguous", start=0):
    block = cases.make_block(case, backend, dtype).eval()
    exact = cases.exact_copy(block)
    pooled = ([], [], [])
    for seed in seeds_of(math.prod(case[:4]), backend):
        x = LAYOUTS[layout](cases.block_input(case, start + seed, dtype))
        before = x.clone()
        with torch.no_grad():
            found = block(x), reference.sea_attention(block, x)
            truth = reference.sea_attention(exact, x.double())
        assert torch.equal(x, before), "the input was written"
        assert reference.is_channels_last(found[0]) == reference.is_channels_last(x)
        for pool, value in zip(pooled, (*found, truth), strict=True):
            pool.append(value)
    verdict = budget.judge(*pooled, dtype)
    assert verdict.ok, str(verdict)


def test_folded_block(backend):
    @examples(backend, 1.5)
    @given(
        blocks(backend),
        st.sampled_from(DTYPES),
        st.sampled_from(list(LAYOUTS)),
        st.integers(0, 1000),
    )
    def check(case, dtype, layout, start):
        assert_folded_is_right(case, backend, dtype, layout, start)

    check()


@contextmanager
def way_of(monkeypatch, way):
    """Triton's ways to the axis vectors, which it chooses by the size of a map."""
    with monkeypatch.context() as patch:
        patch.setattr(triton_block, "plan", lambda *_: way)
        yield


@pytest.mark.parametrize("way", ["direct", "squeezed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ways_of_the_triton_block(way, dtype, monkeypatch):
    with way_of(monkeypatch, way):
        case = verify.BlockCase(2, 10, 11, 19, 5, 2, 1.5, "relu6")
        assert_folded_is_right(case, "triton", dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("threads", [1, 2])
def test_cpu_block_in_strips_and_bands(layout, threads, library):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = verify.BlockCase(1, 17, 75, 100, 16, 2, 2, "relu6")
        assert_folded_is_right(case, "cpu", torch.float32, layout)
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_in_a_block(backend):
    """In the image that has them, where eager has them, and in no other."""

    @examples(backend)
    @given(
        blocks("triton").map(lambda case: case._replace(batch=2)),
        st.sampled_from([math.nan, math.inf, -math.inf]),
        st.integers(0, 10**6),
    )
    def check(case, value, at):
        block = cases.make_block(case, backend).eval()
        x = cases.block_input(case, 0)
        x[1].view(-1)[at % x[1].numel()] = value
        with torch.no_grad():
            found, plain = block(x), reference.sea_attention(block, x)
        assert torch.equal(found.isnan(), plain.isnan())
        assert found[0].isfinite().all()

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_of_an_empty_batch(backend, dtype):
    case = verify.BlockCase(0, 16, 5, 6, 4, 2, 2, "relu6")
    block = cases.make_block(case, backend, dtype).eval()
    with torch.no_grad():
        assert block(cases.block_input(case, 0, dtype)).shape == (0, 16, 5, 6)


# --- what is folded follows its weights ------------------------------------------------------


def _optimizer_step(block):
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, fused=True)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _in_place(block):
    with torch.no_grad():
        block.to_q.c.weight.mul_(1.5)


def _another_parameter(block):
    block.proj[1].bn.bias = torch.nn.Parameter(block.proj[1].bn.bias + 1)


def _statistics(block):
    block.train()
    with torch.no_grad():
        block(torch.randn(4, 16, 5, 6))
    block.eval()


def _through_data(block):
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.5
    block.to(torch.float32)


def _written_before_a_cast(block):
    """Writes through ``.data`` are not seen until something drops the fold."""
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    block.to(torch.float32)


def _written_before_a_mode(block):
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    block.eval()


def _written_before_a_forward_with_gradients(block):
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    with torch.enable_grad():
        block(torch.randn(1, 16, 5, 6))


def _written_before_refold(block):
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    block.refold()


def _eps(block):
    for norm in (block.to_v.bn, block.dwconv.bn):
        norm.eps = 0.5


UPDATES = (
    _optimizer_step, _in_place, _another_parameter, _statistics, _through_data, _eps,
    _written_before_a_cast, _written_before_a_mode, _written_before_refold,
    _written_before_a_forward_with_gradients,
)  # fmt: skip


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__[1:])
@pytest.mark.parametrize("fast", ["reference", "cpu"])
def test_folded_weights_follow(update, fast, request):
    if fast == "cpu":
        request.getfixturevalue("library")
    case = verify.BlockCase(2, 16, 5, 6, 4, 2, 2, "relu6")
    block = cases.make_block(case, fast).eval()
    x = cases.block_input(case, 0)
    with torch.no_grad():
        old = block(x)
        update(block)
        found, plain = block(x), reference.sea_attention(block, x)
    size = float(plain.abs().max())
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4 * size)
    assert not torch.allclose(found, old, rtol=0, atol=1e-3 * size)


@pytest.mark.parametrize("fast", ["reference", "cpu"])
def test_tables_follow_the_size_of_the_map(fast, request):
    """Maps of many sizes through one block, back to the first: cached tables are of their size."""
    if fast == "cpu":
        request.getfixturevalue("library")
    case = verify.BlockCase(1, 16, 5, 6, 4, 2, 2, "relu6")
    block = cases.make_block(case, fast).eval()
    for h, w in ((5, 6), (6, 5), (16, 16), (23, 3), (3, 23), (5, 6)):
        x = cases.normal(0, 1, 16, h, w)
        with torch.no_grad():
            plain = reference.sea_attention(block, x)
            torch.testing.assert_close(block(x), plain, rtol=0, atol=1e-4)


# --- the training pass -----------------------------------------------------------------------


def assert_step_is_right(case, backend, dtype, layout="contiguous", start=0):
    block = cases.away_from_kinks(cases.make_block(case, backend, dtype)).train()
    exact = cases.exact_copy(block)
    pooled = {}
    for seed in seeds_of(math.prod(case[:4]) // 4, backend)[:4]:
        x = LAYOUTS[layout](cases.block_input(case, start + seed, dtype))
        upstream = cases.block_input(case, start + seed + 500, dtype)
        found = (
            cases.step_groups(block, x, upstream),
            cases.step_groups(block, x, upstream, plain=True),
            cases.step_groups(exact, x.double(), upstream, plain=True),
        )
        (out,) = found[0]["forward"]
        assert reference.is_channels_last(out) == reference.is_channels_last(x)
        for kind in found[0]:
            scales = [max(1e-3, float(t.abs().max())) for t in found[2][kind]]
            pools = pooled.setdefault(kind, ([], [], []))
            for pool, groups in zip(pools, found, strict=True):
                pool.extend(t.double() / s for t, s in zip(groups[kind], scales, strict=True))
    for kind, pools in pooled.items():
        verdict = budget.judge(*pools, dtype, gradient="gradient" in kind)
        assert verdict.ok, f"{kind}: {verdict}"


def test_training_pass(backend):
    """Output, all gradients and running statistics; away from the kinks."""

    @examples(backend, 0.6)
    @given(
        blocks(backend)
        .map(lambda case: case._replace(activation="silu"))
        # The norms of the encodes see an axis alone.
        .filter(lambda case: case.batch * min(case.height, case.width) >= 4),
        st.sampled_from(DTYPES),
        st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"]),
        st.integers(0, 1000),
    )
    def check(case, dtype, layout, start):
        assert_step_is_right(case, backend, dtype, layout, start)

    check()


def test_training_pass_of_nan(backend):
    """Without kinks, where PyTorch's vectors make zeros of NaN and its scalars do not."""
    case = verify.BlockCase(2, 6, 5, 7, 2, 2, 2, "silu", hard=False)
    block = cases.make_block(case, backend).train()
    x, upstream = cases.block_input(case, 0), cases.block_input(case, 1)
    x[1, 3, 2, 4] = math.nan
    found, plain = (cases.step_groups(block, x, upstream, plain) for plain in (False, True))
    for kind, ours in found.items():
        for a, b in zip(ours, plain[kind], strict=True):
            if kind == "gradients of tables":
                assert_nan_in_the_same_channels(a, b)
            else:
                assert torch.equal(a.isnan(), b.isnan()), kind


NORMS = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-5, 1e-3, 0.5]),
        "momentum": st.sampled_from([0.1, 0.03, None]),
        "frozen": st.sets(st.sampled_from(["dwconv", "pwconv", "proj", "proj_encode_row"])),
        "activation": st.sampled_from(reference.ACTIVATIONS),
        "hard": st.booleans(),
    }
)


@examples("cpu")
@given(NORMS, st.integers(0, 1000))
def test_norms_do_what_the_layers_do(options, seed):
    """Two steps in float64: everything but the order of sums is the same, kinks included."""
    case = verify.BlockCase(2, 7, 5, 4, 3, 2, 2, options["activation"], options["hard"])
    block = cases.make_block(case, "reference", torch.float64).train()
    for norm in block.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eps, norm.momentum = options["eps"], options["momentum"]
    for name in options["frozen"]:
        getattr(block, name).eval()
    twin = copy.deepcopy(block)
    for step in range(2):
        x, upstream = (cases.block_input(case, seed + k).double() for k in (step, step + 7))
        found, plain = cases.step_groups(block, x, upstream), cases.step_groups(
            twin, x, upstream, plain=True
        )  # fmt: skip
        for kind, ours in found.items():
            for a, b in zip(ours, plain[kind], strict=True):
                size = max(1.0, float(b.abs().max()))
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * size)
        block(x), reference.sea_attention(twin, x)
    for (name, a), b in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)
