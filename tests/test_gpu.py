"""What only a GPU can show: graphs, streams, devices, precision, tensors past 2**31 elements."""

import copy
import threading
import time

import pytest
import torch

from seaattn_kernels import SeaAttention, graphed, ops, reference, verify
from seaattn_kernels.kernels import block as block_kernels
from seaattn_kernels.kernels import launch
from seaattn_kernels.seaformer import seaformer_segmenter

pytestmark = pytest.mark.gpu

CASES = {
    case.name: case
    for case in verify.OPERATOR_CASES
    if case.name in ops.OPERATORS["triton"] and case.shapes[0][-1] > 1
}


def test_kernels_are_not_interpreted():
    assert not launch.INTERPRETED


def step(case, leaves, upstream):
    """Outputs and gradients of one operator."""
    out = case.run(leaves, "triton")
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def arguments(case, seed=0):
    leaves = [t.requires_grad_() for t in case.inputs(seed, "cuda", torch.float32)]
    upstream = [torch.randn_like(t) for t in case.run(leaves, "reference")]
    return leaves, upstream


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replays_in_a_graph(case):
    leaves, upstream = arguments(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(case, leaves, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(case, leaves, upstream)
    for seed in (1, 2):
        with torch.no_grad():
            for leaf, fresh in zip(leaves, case.inputs(seed, "cuda", torch.float32), strict=True):
                leaf.copy_(fresh)
        graph.replay()
        found = [t.clone() for t in recorded]
        for ours, theirs in zip(found, step(case, leaves, upstream), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_on_the_current_stream(case):
    """An input that is ready late, on a stream of its own, is waited for."""
    leaves, upstream = arguments(case)
    expected = step(case, leaves, upstream)
    late = [torch.full_like(t, float("nan")).requires_grad_() for t in leaves]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for target, source in zip(late, leaves, strict=True):
                target.copy_(source)
        found = step(case, late, upstream)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_on_a_device_that_is_not_current(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    leaves, upstream = arguments(case)
    expected = step(case, leaves, upstream)
    away = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
    assert torch.cuda.current_device() == 0
    found = step(case, away, [t.to("cuda:1") for t in upstream])
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.to("cuda:0"), theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twice_the_same_bits(case):
    leaves, upstream = arguments(case)
    first = step(case, leaves, upstream)
    for _ in range(5):
        for ours, theirs in zip(step(case, leaves, upstream), first, strict=True):
            assert torch.equal(ours, theirs)


def test_two_threads_at_once():
    block = verify.randomise(SeaAttention(64, 16, 4, backend="triton")).cuda().train()
    blocks = [copy.deepcopy(block) for _ in range(2)]
    x = torch.randn(4, 64, 33, 20, device="cuda")
    expected = copy.deepcopy(block)(x)
    found = [None, None]

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[index] = copy.deepcopy(blocks[index])(x)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in found:
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_training_takes_triton_by_itself():
    assert ops.settle("axial_attention_pair", "auto", torch.device("cuda"), torch.float32) == (
        ("triton", None)
        if torch.cuda.get_device_capability() >= (8, 0)
        else ("reference", "below compute capability 8.0 plain PyTorch is taken")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_under_autocast_and_in_a_graph_of_its_own(dtype):
    """A training step captured whole, as ``torch.cuda.make_graphed_callables`` does it."""
    block = verify.randomise(SeaAttention(128, 16, 4, backend="triton")).cuda().train()
    twin = copy.deepcopy(block)
    x = torch.randn(4, 128, 20, 20, device="cuda", requires_grad=True)
    enabled = dtype is not torch.float32
    with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(block), (x,))
        ours = graphed(x)
        theirs = reference.sea_attention(twin, x)
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    gradient = torch.randn_like(theirs)
    found = torch.autograd.grad(ours, x, gradient)[0]
    expected = torch.autograd.grad(theirs, x, gradient)[0]
    error = (found - expected).double().norm() / expected.double().norm()
    assert error < tolerance


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training):
    torch._dynamo.reset()
    block = verify.randomise(SeaAttention(64, 16, 4)).cuda().train(training)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 64, 15, 8, device="cuda", requires_grad=training)
    with torch.set_grad_enabled(training):
        ours, theirs = compiled(x), reference.sea_attention(twin, x)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    if training:
        found, expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (ours, theirs))
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-3


def test_graphs_of_the_compiler_replay_a_whole_model():
    torch._dynamo.reset()
    model = verify.randomise(seaformer_segmenter("t", 10)).cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 3, 64, 96, device="cuda")
            found = compiled(x).clone()
            torch.testing.assert_close(found, model(x), atol=1e-2, rtol=1e-2)
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["cudagraph_skips"] == 0


def test_products_follow_the_switch_of_tf32(monkeypatch):
    heads, d, e, n = 4, 24, 48, 64
    tensors = [torch.randn(2, heads * (2 * d + e), n, device="cuda") for _ in range(2)]
    tables = [torch.randn(1, heads * d, 16, device="cuda") for _ in range(4)]

    def pair(tensors, backend):
        first = tensors[2:]
        return ops.axial_attention_pair(*tensors[:2], first, heads, d, backend=backend)[0]

    truth = pair([t.double() for t in (*tensors, *tables)], "reference")
    errors = {}
    for switch in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", switch)
        found = pair([*tensors, *tables], "triton").double()
        errors[switch] = float((found - truth).norm() / truth.norm())
    assert errors["ieee"] < 2e-6
    assert 2e-5 < errors["tf32"] < 5e-3


# --- the whole block -------------------------------------------------------------------------

#: Maps that take each of the two ways to the axis vectors.
MAPS = {
    "direct": (torch.float16, (1, 128, 16, 16)),
    "squeezed": (torch.float32, (2, 128, 40, 33)),
}


def block_and_map(way):
    dtype, shape = MAPS[way]
    block = verify.randomise(SeaAttention(128, 16, 4, backend="triton")).cuda().to(dtype).eval()
    return block, torch.randn(shape, device="cuda", dtype=dtype)


# --- its launches, repeated by the library ---------------------------------------------------


@pytest.fixture
def plans(library, monkeypatch):
    """The plans that calls brought back from Python."""
    found = []
    plan = launch.plan
    monkeypatch.setattr(launch, "plan", lambda *a: found.append(plan(*a)) or found[-1])
    return found


def arguments_of(block, x):
    with torch.no_grad():
        folded = block._folds.get(block)
    return (
        list(folded.weights(x.dtype, x.shape[2], x.shape[3], "triton")),
        folded.heads,
        folded.key_dim,
        folded.activation_code,
        folded.negative_slope,
        folded.hard,
    )


LAUNCHED = torch.ops.seaattn_kernels.sea_attention.triton
PLANNED = torch.ops.seaattn_kernels.sea_attention_plan.triton


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["direct", "squeezed"])
def test_repeated_launches_give_the_bits_of_python(way, dtype, channels_last, plans, monkeypatch):
    monkeypatch.setattr(block_kernels, "plan", lambda *arguments: way)
    sides = {"direct": (9, 13), "squeezed": (40, 21)}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    block = verify.randomise(SeaAttention(72, 16, 3)).cuda().to(dtype).eval()
    for call in range(3):
        x = torch.randn(2, 72, *sides[way], device="cuda", dtype=dtype)
        x = x.contiguous(memory_format=layout)
        arguments = arguments_of(block, x)
        out = LAUNCHED(x, *arguments)
        assert len(plans) == 1 + call, "only the first call is Python's"
        assert plans[0]
        expected, _ = PLANNED(x, *arguments)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()


def test_a_map_of_another_kind_is_recorded_anew(plans):
    block = verify.randomise(SeaAttention(48, 16, 4, backend="triton")).cuda().half().eval()
    whole = torch.randn(1, 48, 10, 11, device="cuda", dtype=torch.float16)
    shifted = torch.empty(whole.numel() + 1, device="cuda", dtype=torch.float16)[1:].view_as(whole)
    shifted.copy_(whole)
    layout = torch.channels_last
    with torch.no_grad():
        for x in (whole, whole[:, :, :, :10].contiguous(), whole.to(memory_format=layout), shifted):
            before = len(plans)
            first = block(x)
            assert len(plans) == before + 1
            for _ in range(2):
                assert torch.equal(block(x), first)
            assert len(plans) == before + 1
        before = len(plans)
        sliced = whole[:, :, :, :10]
        assert torch.equal(block(sliced), block(sliced.contiguous()))
        assert len(plans) == before, "the copy is like the second map"


def test_repeated_launches_follow_the_switches(plans, monkeypatch):
    block = verify.randomise(SeaAttention(64, 16, 4, backend="triton")).cuda().eval()
    x = torch.randn(1, 64, 14, 15, device="cuda")
    found = {}
    with torch.no_grad():
        for again in range(2):
            for conv in ("ieee", "tf32"):
                for matmul in ("ieee", "tf32"):
                    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", conv)
                    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", matmul)
                    out = block(x)
                    assert again == 0 or torch.equal(found[conv, matmul], out)
                    found[conv, matmul] = out
    assert len(plans) == 4
    assert not torch.equal(found["ieee", "ieee"], found["tf32", "ieee"])


def test_a_thread_that_never_used_the_gpu(plans):
    block, x = block_and_map("direct")
    found = []

    def work():
        with torch.no_grad():
            found.extend(block(x) for _ in range(3))
        torch.cuda.synchronize()

    with torch.no_grad():
        expected = block(x)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(out, expected) for out in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_host_time_of_a_call(backend, dtype, library):
    """Calls are queued: the GPU is done with one before the host has issued the next."""
    block = verify.randomise(SeaAttention(128, 16, 4, backend=backend)).cuda().to(dtype).eval()
    x = torch.randn(1, 128, 7, 7, device="cuda", dtype=dtype)
    times = []
    with torch.no_grad():
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(1000):
                block(x)
            times.append((time.perf_counter() - start) / 1000)
    assert min(times) <= 25e-6, f"{1e6 * min(times):.1f} us"


# --- what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", MAPS)
def test_block_is_at_most_five_kernels(way):
    block, x = block_and_map(way)
    with torch.no_grad():
        block(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            block(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.name.endswith("_kernel")]
    assert len(kernels) == (4 if way == "direct" else 5), kernels


@pytest.mark.parametrize("way", MAPS)
def test_block_needs_little_memory_beside_the_map(way):
    block, x = block_and_map(way)
    with torch.no_grad():
        out = block(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x)
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    qkv = x.numel() // 128 * 256 * x.element_size()
    # The allocator rounds up to 512 bytes.
    assert extra <= 2 * qkv + 1024


@pytest.mark.parametrize("way", MAPS)
def test_block_replays_in_a_graph(way):
    block, x = block_and_map(way)
    call = graphed(block, x)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = torch.randn_like(x)
        with torch.no_grad():
            expected = block(fresh)
        assert torch.equal(call(fresh), expected)
    with pytest.raises(ValueError, match="the graph was made for"):
        call(x[:, :, 1:])


def test_graphed_under_autocast():
    block = verify.randomise(SeaAttention(128, 16, 4)).cuda().eval()
    x = torch.randn(1, 128, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.float16), torch.no_grad():
        call = graphed(block, x)
        assert torch.equal(call(x), block(x))


@pytest.mark.parametrize("way", MAPS)
def test_block_gives_the_same_bits_on_any_stream(way):
    block, x = block_and_map(way)
    with torch.no_grad():
        expected = block(x)
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            found = block(late)
        stream.synchronize()
        assert torch.equal(found, expected)
        for _ in range(5):
            assert torch.equal(block(x), expected)


def test_block_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    block, x = block_and_map("direct")
    with torch.no_grad():
        expected = block(x)
        assert torch.cuda.current_device() == 0
        found = block.to("cuda:1")(x.to("cuda:1"))
    assert torch.equal(found.to("cuda:0"), expected)


def test_inference_takes_the_fused_block_by_itself(monkeypatch):
    """Triton's, or on compute capability 9.0 that of csrc/cuda where it is compiled."""
    taken = []
    by_backend = ops.OVERLOADS["sea_attention"]
    for backend in ("triton", "cuda"):

        def watched(*arguments, backend=backend, overload=by_backend[backend]):
            taken.append(backend)
            return overload(*arguments)

        monkeypatch.setitem(by_backend, backend, watched)
    block, x = block_and_map("direct")
    block.backend = "auto"
    with torch.no_grad():
        block(x)
    head = block.key_dim, block.d
    chosen, _ = ops.settle("sea_attention", "auto", x.device, x.dtype, head)
    assert taken == ([] if chosen == "reference" else [chosen])
    assert bool(taken) is (torch.cuda.get_device_capability() >= (8, 0))


def test_products_of_maps_follow_the_switch_of_convolutions(monkeypatch):
    block, x = block_and_map("squeezed")
    with torch.no_grad():
        truth = reference.sea_attention(copy.deepcopy(block).double(), x.double())
        errors = {}
        for switch in ("ieee", "tf32"):
            monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", switch)
            errors[switch] = float((block(x) - truth).norm() / truth.norm())
    assert errors["ieee"] < 1e-5
    assert 1e-5 < errors["tf32"] < 1e-2


# --- past 2**31 elements ---------------------------------------------------------------------


@pytest.fixture
def huge():
    """A map of 2.4e9 elements in half precision."""
    needed = 4 * 2 * 3 * 2**28 * 3
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    torch.cuda.empty_cache()
    x = torch.randn(1, 9, 2**14, 2**14, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    yield x
    del x
    torch.cuda.empty_cache()


def test_squeeze_past_2_to_31(huge):
    b, c, h, w = huge.shape
    for x in (huge, huge.view(b, h, w, c).permute(0, 3, 1, 2), huge.view(c, b, h, w)):
        row, column = ops.axial_squeeze(x, "triton")
        for image in range(x.shape[0]):
            for channel in range(x.shape[1]):
                part = x[image, channel].float()
                for ours, theirs in (
                    (row[image, channel], part.mean(1)),
                    (column[image, channel], part.mean(0)),
                ):
                    torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=1e-2)
    spread = huge[:, :, :: 2**12, :: 2**12]
    row, column = ops.axial_squeeze(spread, "triton")
    torch.testing.assert_close(row, spread.mean(3), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(column, spread.mean(2), atol=1e-3, rtol=1e-3)


def test_maps_past_2_to_31(huge):
    b, c, h, w = huge.shape
    row = torch.randn(b, c, h, device="cuda", dtype=huge.dtype)
    column = torch.randn(b, c, w, device="cuda", dtype=huge.dtype)
    out = ops.broadcast_add(huge, row, column, "relu", backend="triton")
    last = huge[0, -1] + row[0, -1, :, None] + column[0, -1]
    torch.testing.assert_close(out[0, -1], last.relu(), atol=2e-2, rtol=2e-2)
    del out
    out = ops.gate(huge, huge, backend="triton")
    torch.testing.assert_close(out[0, -1], ops.gate(huge[:, -1:], huge[:, -1:])[0, 0])
    del out
    spread = torch.ops.seaattn_kernels.axial_squeeze_backward.triton(row, column, False)
    expected = row[0, -1, :, None].float() / w + column[0, -1].float() / h
    torch.testing.assert_close(spread[0, -1], expected.half(), atol=1e-6, rtol=1e-2)


def test_block_past_2_to_31():
    """A projected map of 2.5e9 elements."""
    side = 3136
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    block = verify.randomise(SeaAttention(16, 16, 4, backend="triton")).cuda().half().eval()
    x = torch.randn(1, 16, side, side, device="cuda", dtype=torch.float16)
    assert side * side * 256 > 2**31
    with torch.no_grad():
        out = block(x)
        expected = ops.sea_attention(x, block._folds.get(block), "reference")
    torch.testing.assert_close(out[..., -64:, :], expected[..., -64:, :], atol=3e-2, rtol=3e-2)
    torch.cuda.empty_cache()
