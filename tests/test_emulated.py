"""The machine of ``emulated`` notices what is wrong in a kernel: faults are planted one at a time."""

import ctypes
import shutil

import emulated
import pytest
import torch

from bench.cases import CASES
from seaattn_kernels import SeaAttention, overloads, verify
from seaattn_kernels.kernels import cuda

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets where there is no GPU"),
    pytest.mark.skipif(
        shutil.which(emulated.compiler()[0]) is None, reason="needs a C++ compiler"
    ),
]
CASE = CASES["T1"]
TILES = (cuda.Tile(8, 64, 4, 2), cuda.Tile(16, 128, 1, 1))
ENTRIES = ("16, 32, 4)", "8, 64, 4, 2)", "16, 128, 1, 1)")


def launches(size, tile, dtype=torch.float16):
    """What the block of a random map launches of csrc/cuda, and the tensors that hold its results.

    Each as the arguments of ``cuda.launch``, with the numbers of the tensors that it writes.
    """
    module = verify.randomise(SeaAttention(CASE.channels, CASE.key_dim, CASE.heads)).to(dtype).eval()
    x = torch.randn(size[0], CASE.channels, *size[1:], dtype=dtype)
    found = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        weights = module._folds.get(module).weights(dtype, *size[1:], "cuda")
        patch.setattr(cuda, "finish_tile", lambda *sizes: tile)
        patch.setattr(cuda, "launch", lambda *given: found.append(given))
        overloads._BLOCK_ON_GPU["cuda"](x, list(weights), CASE.heads, CASE.key_dim, 2, 0.0, True)
    return found


def results(emulator, given, written):
    """What a launch writes into tensors of NaN."""
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    for at in written:
        given[at].fill_(float("nan"))
    emulator.launch(*given)
    return [given[at] for at in written]


@pytest.fixture(scope="module")
def cases(cuda_libraries):
    """Launches of each source: arguments, which of them are written, and what with."""
    emulator = emulated.Emulator(cuda_libraries)
    cases = {"axis": [], "finish": []}
    for tile in TILES:
        axis, finish = launches((1, 19, 12), tile)
        *_, attended, encoded, _, _, _, _ = axis
        results_of_axis = results(emulator, axis, (10, 11))
        encoded.copy_(results_of_axis[1])
        if tile is TILES[0]:
            cases["axis"].append((axis, (10, 11), results_of_axis))
        cases["finish"].append((finish, (12,), results(emulator, finish, (12,))))
    return cases


def notices(emulator, case):
    """Whether a launch fails, or writes anything else than it should."""
    given, written, right = case
    try:
        found = results(emulator, given, written)
    except RuntimeError as error:
        return str(error)
    same = all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    return None if same else "another result"


@pytest.mark.parametrize("source", ["axis", "finish"])
def test_all_orders_of_threads_give_the_same_bits(source, cases, cuda_libraries):
    emulator = emulated.Emulator(cuda_libraries, seeds=100)
    for case in cases[source]:
        assert [notices(emulator, case) for _ in range(20)] == [None] * 20


# --- planted faults --------------------------------------------------------------------------

#: Of each source: a passage with a statement between @, and what takes its place; "": nothing.
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
        ("if (before >= 0) @wait(weight_free + stage, before & 1);@", ""),
        ("if (before >= 0) @wait(weight_free + stage, before & 1);@",
         "wait(weight_free + stage, before & 1 ^ 1)"),
        ("if (before >= 0) @wait(map_free + stage, before & 1);@", ""),
        ("if (before >= 0) @wait(map_free + stage, before & 1);@",
         "wait(map_free + stage, before & 1 ^ 1)"),
        ("@meet(3, kWorkers);@  // the warpgroups", ""),
        ("if (j >= 0) @wait(weight_here + stage, j / L::kStages & 1);@", ""),
        ("@products_begin();@", ""),
        ("@products_end();@", ""),
        ("@wait(map_here + stage, j / L::kStages & 1);@", ""),
        ("@publish();@", ""),
        ("@__syncwarp();@", ""),
        ("if (lane == 0) @arrive(map_free + stage);@", ""),
        ("if (lane == 0) @arrive(map_free + stage);@",
         "arrive(map_free + stage), arrive(map_free + stage)"),
        ("@products_wait();@\n    if (j > 0", ""),
        ("if (j > 0 && lane == 0) @arrive(weight_free + (j - 1) % L::kStages);@", ""),
        ("@meet(1, L::kTeam);@", ""),
        ("@meet(1, L::kTeam);@", "meet(1, 256)"),
        ("@cluster_wait();@  // all have started", ""),
        ("@products_wait();@\n  out +=", ""),
        ("@cluster_arrive(), cluster_wait();@\n    // This block's share", ""),
        ("@meet(3, kWorkers);@  // shared memory is free", ""),
        ("@meet(3, kWorkers);@\n  if (by_channels) {", ""),
    ],
}  # fmt: skip
ALL = [(file, *fault) for file, faults in FAULTS.items() for fault in faults]


def sources_of(folder):
    """The sources with every fault, of which the variable ``planted`` chooses one."""
    shutil.copytree(emulated.SOURCES, folder, dirs_exist_ok=True)
    for path in folder.iterdir():
        text, places = path.read_text(), {}
        for number, (file, passage, other) in enumerate(ALL, 1):
            if file == path.name:
                before, statement, after = passage.split("@")
                assert text.count(before + statement + after) == 1, passage
                at = text.index(before + statement + after) + len(before)
                places.setdefault((at, at + len(statement)), []).append((number, other or 0))
        for (begin, end), choices in sorted(places.items(), reverse=True):
            instead = (f"planted == {number} ? void(({other})) : " for number, other in choices)
            planted = f"({''.join(instead)}void(({text[begin : end - 1]})));"
            text = text[:begin] + planted + text[end:]
        lines = text.splitlines()
        for i, line in enumerate(lines):
            if line.startswith("  SEAATTN_ENTRY(") and not any(name in line for name in ENTRIES):
                lines[i] = "\\" * line.endswith("\\")
        if path.suffix == ".cu":
            lines.insert(0, 'extern "C" {\nint planted;\n}')
        path.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    sources, folder = sources_of(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("so")
    return {name: emulated.library(folder, name, sources) for name in ("axis", "finish")}


@pytest.mark.parametrize("number", range(1, len(ALL) + 1))
def test_planted_faults_are_noticed(number, cases, faulty):
    file, passage, other = ALL[number - 1]
    source = "axis" if file == "axis.cu" else "finish"
    emulator = emulated.Emulator(faulty)
    planted = ctypes.c_int.in_dll(faulty[source], "planted")
    planted.value = number
    found = [notices(emulator, case) for _ in range(20) for case in cases[source]]
    print([f and f.splitlines()[0] for f in found])
    assert any(found), f"{file}: {passage} -> {other}"
