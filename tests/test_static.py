"""The static check of the kernels of Triton and CUDA: that it passes, and that it can fail."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget

from bench import nvcc, static
from seaattn_kernels.kernels import cuda, squeeze

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "seaattn_kernels" / "kernels"


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process in which Triton compiles, whatever it does in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_command(tmp_path):
    path = tmp_path / "static.json"
    kernels = ["gate_kernel", "combine_kernel", "spread_kernel"]
    done = run("-m", "bench", "static", "--targets", "sm_75", "gfx942", "--kernels", *kernels,
               "--out", str(path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert sorted((row["kernel"], row["target"]) for row in rows) == sorted(
        (kernel, target) for kernel in kernels for target in ("sm_75", "gfx942")
    )
    for row in rows:
        assert row["registers"] > 4
        assert 0 < row["occupancy"] <= 1
        assert row["predicted_us"] > 0
        assert row["kernel"] in done.stdout
        assert not row["wrong"]
    assert "sm_75 (T4): 3 compiled, 0 spill, 0 wrong" in done.stdout


def test_command_refuses():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench", "static", "--targets", "sm_90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
    done = run("-m", "bench", "static", "--targets", "sm_91")
    assert done.returncode != 0
    assert "sm_90" in done.stderr


FINDINGS = """
import dataclasses, json
from bench import static
from seaattn_kernels.kernels import axial_attention

# Blocks as a first version had them.
sizes = axial_attention._sizes
def large(*arguments):
    programs, runtime, constants = sizes(*arguments)
    return programs, runtime, constants | {"BLOCK": 64, "num_warps": 4}
axial_attention._sizes = large
static._HEADS = [(24, 48)]
static._SIDES = []
found = static.launches(static.TARGETS["sm_80"])
backward = next(one for one in found if one.kernel == "attention_backward_kernel")
spill = static.compiled(backward)
static.TARGETS["sm_80"] = dataclasses.replace(static.TARGETS["sm_80"], shared_program=1024)
shared = static.compiled(backward)
broken = json.loads(backward.data)
broken["signature"]["heads"] = "*fp32"
error = static.compiled(dataclasses.replace(backward, data=json.dumps(broken)))
print(json.dumps([spill.wrong, shared.wrong, error.wrong]))
"""


def test_sees_what_is_wrong():
    done = run("-c", FINDINGS)
    assert done.returncode == 0, done.stderr
    spill, shared, error = json.loads(done.stdout.splitlines()[-1])
    assert spill.startswith("spills ")
    assert shared.startswith("needs ")
    assert error.startswith("does not compile: ")


VECTORS = """
from bench import static
static._SIDES = []
for found in static.launches(static.TARGETS["sm_90"], brief=True):
    if found.example == "16x512x32x32 NCHW":
        text = static.binary(found).asm["ptx"]
        print(found.kernel, "ld.global.v4.b32" in text, "st.global.v4.b32" in text)
"""


def test_maps_move_in_vectors_of_sixteen_bytes():
    done = run("-c", VECTORS)
    assert done.returncode == 0, done.stderr
    of_maps = (
        "broadcast_add", "broadcast_add_backward", "gate", "gate_backward", "normalize",
        "normalize_backward", "normalize_add_backward", "normalize_gate",
        "normalize_gate_backward", "depthwise", "depthwise_backward",
    )  # fmt: skip
    of_sums = ("squeeze", "moments", "normalize_sums", "normalize_gate_sums")
    of_vectors = ("merge", "merge_moments", "center", "normalize_affine", "normalize_terms")
    assert set(done.stdout.splitlines()) == {
        *(f"{kernel}_kernel True True" for kernel in of_maps),
        *(f"{kernel}_kernel True False" for kernel in of_sums),
        *(f"{kernel}_kernel False False" for kernel in of_vectors),
        "spread_kernel False True",
    }


PARTS = """
import torch
from bench import static
from bench.cases import CASES
from bench.stages import recorded
for found in recorded(CASES["L1"], (64, 64), 1, torch.float16, static.TARGETS["sm_90"]):
    if found.kernel in ("squeeze_kernel", "attend_kernel"):
        text = static.binary(found).asm["ptx"]
        loads = [word for word in text.split() if word.startswith("ld.global")]
        tile = text[text.index("ld.global") : text.index("st.global")]
        print(found.programs, set(loads), tile.count("bar.sync"))
"""


def test_a_projected_map_and_its_parts_are_read_in_vectors_of_sixteen_bytes():
    """By a program for nearly every multiprocessor, and with one exchange through shared memory
    for the rows of a tile."""
    done = run("-c", PARTS)
    assert done.returncode == 0, done.stderr
    squeezed, attended = done.stdout.splitlines()
    assert squeezed == "128 {'ld.global.v4.b32'} 1"
    assert attended.startswith("32 {'ld.global.v4.b32'}")


def test_resident_programs():
    sm_80, sm_90, gfx942 = (static.TARGETS[name] for name in ("sm_80", "sm_90", "gfx942"))
    assert static.resident(sm_80, 32, 0, 8) == 8
    assert static.resident(sm_80, 128, 0, 8) == 2
    assert static.resident(sm_80, 255, 0, 8) == 1
    assert static.resident(sm_80, 32, 40 * 1024, 8) == 4
    assert static.resident(sm_90, 32, 0, 1) == 32  # of one warp
    assert static.resident(gfx942, 64, 0, 8) == 4
    assert static.resident(gfx942, 256, 0, 4) == 2


def test_targets_are_those_promised():
    assert list(static.TARGETS) == [
        "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942",
    ]  # fmt: skip
    assert static.TARGETS["gfx942"].triton == GPUTarget("hip", "gfx942", 64)
    assert static.TARGETS["sm_120"].capability == (12, 0)


def test_every_tile_of_a_map_is_compiled():
    """The sides that are swept reach each tile that a map of any size can get."""

    def tiles(sides):
        return {squeeze.lines(w, itemsize) for w in sides for itemsize in (2, 4)} | {
            squeeze.tile(h, w, squeeze.by_channels(x))
            for h in sides
            for w in sides
            for x in static._layouts(1, 128, h, w, static.DTYPES[0]).values()
        }

    assert tiles(static._SIDES) == tiles([1, 2, 5, *range(8, 70), 100, 128, 200, 256, 500, 1024])


@pytest.mark.parametrize("name", ["attention", "statistics", "attention_backward", "tables"])
def test_products_are_counted(name):
    values = {
        "row_ptr": torch.empty(2, 1, 1), "heads": 3, "H": 5, "W": 7, "D": 4, "E": 8, "B": 2,
        "row_q_len": 16, "row_k_len": 16, "column_q_len": 16, "column_k_len": 16, "width": 12,
    }  # fmt: skip
    pairs = 2 * 3 * (25 + 49)
    expected = {
        "attention": 2 * pairs * 12,
        "statistics": 2 * pairs * 12,
        "attention_backward": 2 * pairs * 40,
        "tables": 12 * (2 * 32 * 12 + 2 * 2 * 12),
    }
    assert static._FLOPS[f"{name}_kernel"](values) == expected[name]


SIZES = """
from collections import Counter
from functools import partial
from bench import static

def calls(dtypes):
    for h in range(33, 65):
        for w in range(33, 65):
            x = static._layouts(16, 128, h, w, dtypes[1])["NCHW"]
            yield "", partial(static._operators_of_a_map, x, [static._RELU6])
            yield "", partial(static._operators_of_an_axis, 16, 8, 16, 32, h, w, dtypes[1])

static._examples = calls
found = Counter(one.kernel for one in static.launches(static.TARGETS["sm_90"]))
print(max(found.values()), found["attention_kernel"], found["attention_backward_kernel"])
"""


def test_a_thousand_sizes_of_maps_share_three_compilations():
    """A size compiles anew only where it changes what is a multiple of 16."""
    done = run("-c", SIZES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "1", "1"]


# --- the kernels of csrc/cuda ------------------------------------------------------------------

with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.slow
@with_nvcc
def test_cuda_kernels_compile_without_a_spill():
    rows = nvcc.compile_all(list(static.TARGETS))
    assert not [row for row in rows if row.wrong or row.spill_bytes or row.registers < 8]
    found = {target: set() for target in nvcc.ARCHS}
    for row in rows:
        found[row.target].add(row.kernel)
    kinds = cuda._KIND.values()
    axis = {
        f"axis_{kind}_{d}_{e}_{heads}"
        for kind in kinds
        for (d, e), counts in cuda._HEADS.items()
        for heads in counts
    }
    finish = {f"finish_{kind}_{t.rows}_{t.columns}_{t.parts}" for kind in kinds for t in cuda.TILES}
    small = {name for name in finish if "_8_64_" in name}
    assert found["sm_90"] == axis | finish
    for target in ("sm_80", "sm_100"):
        assert axis | small <= found[target] <= axis | finish


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) many(float* a, int n) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = a[i * n];
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i + 1) % 64] + k;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i * n] = x[i];
}
"""
WRONG = """
import sys
from pathlib import Path
from bench import __main__, nvcc
nvcc.SOURCES = {"many": Path(sys.argv[1])}
sys.argv = ["bench", "static", "--targets", "sm_90", "--kernels", "many"]
sys.exit(__main__.main())
"""


@pytest.mark.slow
@with_nvcc
def test_cuda_kernels_that_spill_or_do_not_compile_fail(tmp_path):
    path = tmp_path / "many.cu"
    path.write_text(SPILLS)
    (row,) = nvcc.compiled(path, "sm_80")
    assert (row.kernel, row.target, row.registers) == ("many", "sm_80", 32)
    assert row.spill_bytes > 64
    assert row.wrong.startswith("spills ")
    done = run("-c", WRONG, str(path))
    assert done.returncode == 1, done.stderr
    assert "WRONG many sm_90 many.cu for sm_90a: spills" in done.stdout
    path.write_text(SPILLS.replace("int n", "int m"))
    (row,) = nvcc.compiled(path, "sm_100")
    assert row.wrong.startswith("does not compile: ")
    assert '"n" is undefined' in row.wrong
    path.write_text("")
    (row,) = nvcc.compiled(path, "sm_80")
    assert row.wrong == "ptxas reports no entry"


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert nvcc.compile_all(["sm_90"]) == []
    assert capsys.readouterr().out == "csrc/cuda is not compiled: there is no nvcc\n"
    assert nvcc.compile_all(["sm_75", "gfx942"]) == []
    assert capsys.readouterr().out == ""


# --- what compiles to something else than what it says ----------------------------------------


def _copies(node):
    """``(target, source)`` of an assignment of names to names, ``a = b`` or ``a, c = b, d``."""
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=True)
        for left, right in pairs:
            if isinstance(left, ast.Name) and isinstance(right, ast.Name):
                yield left.id, right.id


def aliased(source):
    """Names that a loop of a kernel takes over from others, where both begin as one value.

    Triton tells what a loop changes by comparing values: it takes ``a = b`` for no change then.
    """
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        for loop in ast.walk(function):
            if not isinstance(loop, ast.For | ast.While):
                continue
            inside = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
            before = [node for node in assigned if node.lineno < loop.lineno]
            shared = {name for node in before for pair in _copies(node) for name in pair}
            for node in before:
                if len(node.targets) > 1:  # a = b = value
                    shared |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            for node in inside:
                found += [
                    f"{function.name}: {left} = {right}"
                    for left, right in _copies(node)
                    if {left, right} <= shared
                ]
    return found


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_loop_hands_on_begins_as_values_of_its_own(path):
    assert aliased(path.read_text()) == []


def test_the_aliases_of_a_loop_are_seen():
    kernel = """
@triton.jit
def f(n):
    above = tl.zeros([1], tl.float32)
    {begin}
    for _ in range(n):
        above = here
        here = above + 1
"""
    assert aliased(kernel.format(begin="here = above")) == ["f: above = here"]
    assert aliased(kernel.format(begin="here, other = above, n")) == ["f: above = here"]
    assert aliased(kernel.format(begin="here = tl.zeros([1], tl.float32)")) == []
