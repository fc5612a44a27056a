"""The kernels of csrc/cuda: what can be said of them anywhere, and what a GPU of 9.0 shows.

What needs no more of a GPU than its numbers runs on a CPU too, in the machine of ``emulated``.
"""

import copy
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import Emulator
from guarded import Guarded
from torch import nn

from bench.cases import CASES
from seaattn_kernels import SeaAttention, budget, fold, native, ops, overloads, reference, verify
from seaattn_kernels.kernels import cuda

ROOT = Path(__file__).parents[1]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.fixture(
    params=[
        pytest.param("cuda", id="gpu", marks=[pytest.mark.gpu, on_hopper]),
        pytest.param("cpu", id="emulated"),
    ]
)
def device(request, monkeypatch):
    """Where the block runs by the backend "cuda"."""
    if request.param == "cuda":
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("Triton interprets where there is no GPU")
    emulator = Emulator(request.getfixturevalue("cuda_libraries"))
    monkeypatch.setattr(cuda, "launch", emulator.launch)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(ops, "_cuda_refusal", lambda *given: None)
    monkeypatch.setattr(verify, "SEEDS", verify.SEEDS[:2])
    library = torch.library.Library("seaattn_kernels", "FRAGMENT")
    library.impl("sea_attention.cuda", overloads._BLOCK_ON_GPU["cuda"], "CPU")
    yield "cpu"
    library._destroy()


def make(case, dtype, device, activation="relu6", hard=True):
    module = SeaAttention(case.channels, case.key_dim, case.heads, 2, activation, backend="cuda")
    if not hard:
        module.sigmoid = nn.Sigmoid()
    return verify.randomise(module).to(device, dtype).eval()


# --- anywhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T1", "S2", "L2", "YOLOv8s-P5"])
def test_chunks_hold_the_weights(name):
    case = CASES[name]
    module = verify.randomise(SeaAttention(case.channels, case.key_dim, case.heads)).eval()
    with torch.no_grad():
        folded = module._folds.get(module)
    packed = folded.weights(torch.float16, 5, 7, "triton")
    chunked = folded.weights(torch.float16, 5, 7, "cuda")
    c, values, projected = case.channels, case.values, case.projected
    jobs, rows, channels = chunked.chunks.shape
    assert (rows % 64, channels) == (0, 64)
    place = torch.arange(8) ^ (torch.arange(rows) % 8)[:, None]
    pieces = chunked.chunks.unflatten(2, (8, 8))
    straight = pieces.gather(2, place[None, :, :, None].expand(pieces.shape)).flatten(2)
    gates = -(-values // 64)
    proj = straight[:gates].transpose(0, 1).flatten(1)
    pw = straight[gates:].transpose(0, 1).flatten(1)
    assert torch.equal(proj[:c, :values], packed.proj_weight[:, :values])
    assert torch.equal(pw[:c, :projected], packed.pw_weight[:, :projected])
    assert not proj[c:].any()
    assert not proj[:, values:].any()
    assert not pw[c:].any()
    taps = chunked.depthwise[gates:].transpose(0, 1).flatten(1)[:, :projected]
    assert torch.equal(taps[:9], packed.dw_weight[:, :projected])
    assert torch.equal(taps[9], packed.dw_bias[:projected])
    assert jobs == gates + -(-projected // 64)


def test_what_a_block_may_not_have():
    assert fold.cuda_obstacle("relu6", 8, 16, 32) is None
    assert "not silu" in fold.cuda_obstacle("silu", 8, 16, 32)
    assert "multiple of 8" in fold.cuda_obstacle("relu", 1, 2, 16)
    assert "got 16 and 24" in fold.cuda_obstacle("relu", 1, 16, 24)
    with torch.no_grad():
        module = verify.randomise(SeaAttention(16, 16, 1)).eval()
        folded = module._folds.get(module)
    assert folded.cuda_obstacle(2048, 2040) is None
    assert "65535 tiles" in folded.cuda_obstacle(2048, 2048)
    assert "not silu" in dataclasses.replace(folded, activation_code=4).cuda_obstacle(8, 8)


def test_refusals(monkeypatch):
    half, cpu, gpu = torch.float16, torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(native, "CUDA_REASON", "not compiled")
    assert ops.refusal("sea_attention", "cuda", gpu, half) == "not compiled"
    monkeypatch.setattr(native, "CUDA_REASON", None)
    assert "NVIDIA GPU" in ops.refusal("sea_attention", "cuda", cpu, half)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(ops._capabilities, gpu, (8, 0))
    assert "has run on compute capability 9.0 alone" in ops.refusal(
        "sea_attention", "cuda", gpu, half
    )
    assert ops.settle("sea_attention", "auto", gpu, half) == ("triton", None)
    monkeypatch.setitem(ops._capabilities, gpu, (9, 0))
    assert ops.refusal("sea_attention", "cuda", gpu, half) is None
    assert ops.settle("sea_attention", "auto", gpu, half) == ("cuda", None)
    assert ops.settle("sea_attention", "auto", gpu, half, obstacle="silu") == ("triton", None)
    assert ops.settle("sea_attention", "auto", gpu, torch.float32) == ("triton", None)
    assert "float32" in ops.refusal("sea_attention", "cuda", gpu, torch.float32)
    with pytest.raises(RuntimeError, match="silu"):
        ops.settle("sea_attention", "cuda", gpu, half, obstacle="silu")
    assert "no cuda implementation" in ops.refusal("training", "cuda", gpu, half)


def test_tiles_fit_into_shared_memory():
    for tile in cuda.TILES:
        assert tile.resident * (tile.shared + 1024) <= 228 * 1024
    longest = range(1, cuda.LONGEST_AXIS + 1)
    for head, all_heads in cuda._HEADS.items():
        for heads in all_heads:
            most = max(cuda.axis_shared(h, w, heads, *head) for h in longest for w in longest)
            assert most <= 227 * 1024


def test_small_maps_are_shared_by_clusters_and_large_ones_take_large_tiles():
    def of(b, side, c, projected):
        return cuda.finish_tile(b, side, side, c, projected, projected // 2, 132)

    assert of(1, 7, 192, 512).parts == 8
    assert of(1, 32, 192, 512).parts == 4
    assert of(64, 32, 192, 512)[:3] == (16, 192, 1)
    assert of(64, 32, 256, 640)[:3] == (8, 256, 1)
    assert of(16, 80, 128, 256)[:3] == (16, 128, 1)
    assert of(1, 7, 64, 128).parts <= 2  # no more parts than chunks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_shared_memory_is_that_of_the_sources(tmp_path):
    heads = [(d, e, h) for (d, e), counts in cuda._HEADS.items() for h in counts]
    sizes = [(1, 1), (7, 7), (16, 16), (17, 5), (32, 32), (33, 64), (64, 64)]
    lines = [f"seaattn::Layout<{t.rows}, {t.columns}, {t.parts}>::kBytes" for t in cuda.TILES]
    found = _printed(tmp_path, "finish", lines)
    assert found == [tile.shared for tile in cuda.TILES]
    lines = [
        f"seaattn::Layout<{d}, {e}>({h}, {w}, {n}).bytes" for d, e, n in heads for h, w in sizes
    ]
    found = _printed(tmp_path, "axis", lines)
    assert found == [cuda.axis_shared(h, w, n, d, e) for d, e, n in heads for h, w in sizes]


def _printed(folder, source, expressions):
    """Numbers that the host's part of a source computes."""
    prints = "".join(f'  printf("%d\\n", (int)({line}));\n' for line in expressions)
    path = folder / f"{source}.cu"
    path.write_text(
        f'#include "{ROOT}/csrc/cuda/{source}.cu"\n#include <cstdio>\nint main() {{\n{prints}}}\n'
    )
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([*command, str(path), "-o", str(folder / source)], check=True)
    done = subprocess.run([folder / source], check=True, capture_output=True, text=True)
    return list(map(int, done.stdout.split()))


# --- on a GPU, and emulated ------------------------------------------------------------------

LOW = (torch.float16, torch.bfloat16)
SHAPES = [
    ("B1", 2, 7, 7), ("B1", 1, 16, 16), ("S2", 2, 15, 9), ("L2", 3, 14, 14), ("T1", 2, 33, 20),
    ("L3", 1, 5, 64), ("YOLOv8s-P5", 2, 20, 20), ("T2", 1, 1, 1), ("B2", 1, 1, 19),
    pytest.param(("YOLOv8n-P3", 1, 80, 80), marks=pytest.mark.slow),
    pytest.param(("B1", 9, 32, 32), marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeps_the_budget(shape, dtype, device):
    name, b, h, w = shape
    case = CASES[name]
    sized = verify.BlockCase(b, case.channels, h, w, case.key_dim, case.heads, 2.0, "relu6")
    verdict = verify.block_verdict(sized, "cuda", dtype, device)
    assert verdict.ok, verdict


@pytest.mark.parametrize("tile", cuda.TILES, ids=lambda tile: "-".join(map(str, tile[:3])))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(2, 16, 24), (1, 19, 13)], ids=str)
def test_every_tile_writes_every_element_and_nothing_else(
    tile, channels_last, size, device, monkeypatch
):
    monkeypatch.setattr(cuda, "finish_tile", lambda *sizes: tile)
    module = make(CASES["B1"], torch.float16, device, "relu", hard=tile.columns != 64)
    b, h, w = size
    x = torch.randn(b, 192, h, w, device=device, dtype=torch.float16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        folded = module._folds.get(module)
        truth = reference.sea_attention(copy.deepcopy(module).double(), x.double())
        eager = reference.sea_attention(module, x)
        weights = folded.weights(x.dtype, h, w, "cuda")
        guard = Guarded(monkeypatch)
        run = overloads._BLOCK_ON_GPU["cuda"]
        ours = run(x, list(weights), 8, 16, folded.activation_code, 0.0, folded.hard)
        guard.check()
    verdict = budget.judge([ours], [eager], [truth], x.dtype)
    assert verdict.ok, verdict


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(1, 12, 10), (1, 40, 36)], ids=str)
def test_nan_and_infinity_go_where_the_reference_sends_them(value, size, device):
    case = CASES["T1"]
    module = make(case, torch.float16, device)
    b, h, w = size
    x = torch.randn(b, case.channels, h, w, device=device, dtype=torch.float16)
    x[0, 3, 4, 5] = value
    with torch.no_grad():
        ours = module(x)
        theirs = ops.sea_attention(x, module._folds.get(module), "triton")
    assert torch.equal(ours.isnan(), theirs.isnan())


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@on_hopper
def test_is_compiled():
    assert native.CUDA_REASON is None


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size", [(1, 16, 16), (4, 64, 48)], ids=str)
def test_graphs_streams_and_bits(size):
    from seaattn_kernels import graphed

    module = make(CASES["B1"], torch.float16, "cuda")
    b, h, w = size
    x = torch.randn(b, 192, h, w, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = module(x)
        for _ in range(5):
            assert torch.equal(module(x), expected)
        call = graphed(module, x)
        other = torch.randn_like(x)
        assert torch.equal(call(other), module(other))
        stream = torch.cuda.Stream()
        late = torch.full_like(x, float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            found = module(late)
        stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@on_hopper
def test_compiles_whole():
    torch._dynamo.reset()
    module = make(CASES["T1"], torch.float16, "cuda")
    x = torch.randn(2, 128, 15, 8, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
