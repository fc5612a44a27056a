"""The machine of ``emulated`` notices what is wrong in a kernel: faults are planted, one a run."""

import ctypes
import re
import shutil

import emulated
import pytest
import torch
from emulated import Emulator

from bench.cases import CASES
from seaattn_kernels import SeaAttention, overloads, verify
from seaattn_kernels.kernels import cuda

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton interprets where there is no GPU"
)
CASE = CASES["T1"]
# A cluster for each tile, and two warpgroups that meet seldom.
TILES = (cuda.Tile(8, 64, 4, 2), cuda.Tile(16, 192, 1, 1))
ENTRIES = ("16, 32, 4)", "8, 64, 4, 2)", "16, 192, 1, 1)")
#: Arguments of ``cuda.launch`` that an entry writes.
WRITTEN = {"axis": (10, 11), "finish": (12,)}


def launches(size, tile):
    """What the block launches of csrc/cuda for a random map, as arguments of ``cuda.launch``."""
    module = verify.randomise(SeaAttention(CASE.channels, CASE.key_dim, CASE.heads)).half().eval()
    b, h, w = size
    x = torch.randn(b, CASE.channels, h, w).half()
    found = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        weights = list(module._folds.get(module).weights(x.dtype, h, w, "cuda"))
        patch.setattr(cuda, "finish_tile", lambda *sizes: tile)
        patch.setattr(cuda, "launch", lambda *given: found.append(given))
        overloads._BLOCK_ON_GPU["cuda"](x, weights, CASE.heads, CASE.key_dim, 2, 0.0, True)
    return found


def results(emulator, given):
    """What a launch writes into tensors of NaN."""
    given = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
    written = [given[at].fill_(float("nan")) for at in WRITTEN[given[0]]]
    emulator.launch(*given)
    return written


@pytest.fixture(scope="module")
def cases(cuda_libraries):
    """Launches of each source, and their results."""
    emulator, found = Emulator(cuda_libraries), {"axis": [], "finish": []}
    torch.manual_seed(0)
    for size, tile in (((1, 19, 12), TILES[0]), ((1, 40, 36), TILES[0]), ((1, 19, 12), TILES[1])):
        axis, finish = launches(size, tile)
        right = results(emulator, axis)
        found["axis"].append((axis, right))
        if size == (1, 19, 12):
            finish[7].copy_(right[1])  # the encoded axes
            found["finish"].append((finish, results(emulator, finish)))
    return found


def complaint(emulator, given, right):
    """What is wrong with a launch, or None."""
    try:
        found = results(emulator, given)
    except RuntimeError as error:
        return str(error)
    same = all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    return None if same else "another result"


@pytest.mark.parametrize("source", ["axis", "finish"])
def test_all_orders_of_threads_give_the_same_bits(source, cases, cuda_libraries):
    emulator = Emulator(cuda_libraries, seeds=100)
    for case in cases[source]:
        assert [complaint(emulator, *case) for _ in range(10)] == [None] * 10


def test_products_without_warpgroups(cases, tmp_path):
    """As other compute capabilities make them, where nothing has run yet."""
    library = emulated.library(tmp_path, "finish", flags=("-D__CUDA_ARCH__=1000",))
    given, right = cases["finish"][0]
    found = results(Emulator({"finish": library}), given)
    torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (1, lambda name: name + "_9", "no such entry"),
        (2, lambda grid: (3, 1, 1), "cannot have"),
        (3, lambda threads: 128, "cannot have"),
        (4, lambda size: size // 2, "outside of shared memory"),
        (6, lambda qkv: qkv[:-8], "outside of all tensors"),
        (6, lambda qkv: torch.cat([qkv, qkv])[2 : qkv.numel()], "not aligned"),
    ],
)
def test_a_launch_that_a_gpu_would_refuse_or_not_survive(
    at, change, message, cases, cuda_libraries
):
    given, right = cases["axis"][0]
    wrong = [*given[:at], change(given[at]), *given[at + 1 :]]
    emulator = Emulator(cuda_libraries)
    with pytest.raises(RuntimeError, match=message):
        emulator.launch(*wrong)
    assert complaint(emulator, given, right) is None  # the machine goes on


# --- planted faults --------------------------------------------------------------------------

#: Passages with a statement between @, and what takes its place; "": nothing. The wait for map_free
#: is not among them, nor the __syncwarp before its arrival: who has waited for weight_free of that
#: stage needs neither.
FAULTS = {
    "axis.cu": [
        ("@copies_done();@\n  __syncthreads();\n  make_vectors", ""),
        ("copies_done();\n  @__syncthreads();@\n  make_vectors", ""),
        ("layout, H, W);\n  @__syncthreads();@\n\n  const int64_t of_rows", ""),
        ("    }\n    @__syncwarp();@\n#pragma unroll 1\n    for (int at = lane", ""),
        ("    @__syncwarp();@\n  }\n}", ""),
        ("@cluster_arrive();@", ""),
        ("@cluster_wait();@", ""),
        ("@copies_done();@\n  __syncthreads();\n\n#pragma", ""),
        ("copies_done();\n  @__syncthreads();@\n\n#pragma", ""),
    ],
    "tile.cuh": [
        ("@arrive_after_copies(bar);@", ""),
        ("@arrive_after_copies(bar);@", "arrive(bar)"),
    ],
    "finish.cu": [
        ("let_next_kernel_start();\n  @__syncthreads();@", ""),
        ("if constexpr (PARTS > 1) @cluster_arrive();@", ""),
        ("@wait(weight_free + stage, before & 1);@", ""),
        ("@wait(weight_free + stage, before & 1);@", "wait(weight_free + stage, ~before & 1)"),
        ("@wait(map_free + stage, before & 1);@", "wait(map_free + stage, ~before & 1)"),
        ("@meet(3, kWorkers);@  // the warpgroups", ""),
        ("@wait(weight_here + stage, j / L::kStages & 1);@", ""),
        ("@products_begin();@", ""),
        ("@products_end();@", ""),
        ("@wait(map_here + stage, j / L::kStages & 1);@", ""),
        ("@publish();@", ""),
        ("@arrive(map_free + stage);@", ""),
        ("@arrive(map_free + stage);@", "arrive(map_free + stage), arrive(map_free + stage)"),
        ("@products_wait();@\n    if (j > 0", ""),
        ("@arrive(weight_free + (j - 1) % L::kStages);@", ""),
        ("@meet(1, L::kTeam);@", ""),
        ("@meet(1, L::kTeam);@", "meet(1, 256)"),
        ("@cluster_wait();@  // all have started", ""),
        ("@products_wait();@\n  out +=", ""),
        ("@cluster_arrive(), cluster_wait();@\n    // This block's share", ""),
        ("@meet(3, kWorkers);@  // shared memory is free", ""),
        ("@meet(3, kWorkers);@\n  if (by_channels) {", ""),
    ],
}
NUMBERED = [(file, *fault) for file, faults in FAULTS.items() for fault in faults]


@pytest.fixture(scope="module")
def faulty(cuda_libraries, tmp_path_factory):
    """The sources with every fault, of which the variable ``planted`` chooses one."""
    sources = tmp_path_factory.mktemp("faulty")
    shutil.copytree(emulated.SOURCES, sources, dirs_exist_ok=True)
    for path in sources.iterdir():
        text, places = path.read_text(), {}
        for number, (file, passage, other) in enumerate(NUMBERED, 1):
            if file == path.name:
                before, statement, after = passage.split("@")
                assert text.count(before + statement + after) == 1, passage
                at = text.index(before + statement + after) + len(before)
                places.setdefault((at, at + len(statement)), []).append((number, other or 0))
        for (begin, end), choices in sorted(places.items(), reverse=True):
            instead = "".join(
                f"planted == {number} ? void(({other})) : " for number, other in choices
            )
            text = f"{text[:begin]}({instead}void(({text[begin : end - 1]})));{text[end:]}"
        lines = text.splitlines()
        for i, line in enumerate(lines):
            if line.startswith("  SEAATTN_ENTRY(") and not any(name in line for name in ENTRIES):
                lines[i] = "\\" * line.endswith("\\")
        if path.suffix == ".cu":
            lines.insert(0, 'extern "C" {\nint planted;\n}')
        path.write_text("\n".join(lines) + "\n")
    return {name: emulated.library(sources, name, sources) for name in ("axis", "finish")}


@pytest.mark.parametrize("number", range(1, len(NUMBERED) + 1))
def test_planted_faults_are_noticed(number, cases, faulty):
    file, passage, other = NUMBERED[number - 1]
    source = "axis" if file == "axis.cu" else "finish"
    ctypes.c_int.in_dll(faulty[source], "planted").value = number
    emulator = Emulator(faulty)
    found = (complaint(emulator, *case) for _ in range(60) for case in cases[source])
    found = next(filter(None, found), None)
    assert found, f"{file}: {passage} -> {other}"
    if "deadlock" in found:
        assert re.search(r"from thread 0 of block \(\d, \d, 0\): \w+ at finish\.cu:\d+", found)
