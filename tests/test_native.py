"""The compiled library says what it was built with, and is refused where it does not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seaattn_kernels import native, ops, overloads

ROOT = Path(__file__).parents[1]


def test_build_is_read_from_the_file(library):
    assert library.BUILD["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert {"compiler", "c++", "simd", "backends"} <= library.BUILD.keys()
    assert library.BUILD["threads"] in ("openmp", "torch"), "at::parallel_for would be serial"


def test_there_is_one_openmp_runtime(library):
    """A second one would have a pool of its own, and the two would fight over the cores."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    assert len(runtimes) <= 1


def test_another_minor_version_of_torch_is_refused():
    reason = native.mismatch({"torch": "2.11.0"}, "2.13.1+cpu")
    assert "2.11.0" in reason
    assert "2.13.1" in reason
    assert native.mismatch({"torch": "2.13.0"}, "2.13.1+cu130") is None


def test_a_file_without_the_mark_is_refused(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(b"\x7fELF nothing")
    assert "unknown" in native.mismatch(native.read_build(path), torch.__version__)


def test_a_library_for_another_torch_is_not_loaded(tmp_path, library):
    """A copy of the package whose library claims another torch imports, and says why it is slow."""
    package = tmp_path / "seaattn_kernels"
    shutil.copytree(ROOT / "seaattn_kernels", package)
    (path,) = package.glob("_C*.so")
    mark = f"torch={library.BUILD['torch']}".encode()
    other = b"torch=1.99.0".ljust(len(mark), b"0")
    path.write_bytes(path.read_bytes().replace(b"build: " + mark, b"build: " + other))
    code = (
        "import warnings, torch, seaattn_kernels as s\n"
        "assert s.native.REASON and '1.99' in s.native.REASON, s.native.REASON\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        s.ops.axial_squeeze(torch.ones(1, 1, 2, 2))\n"
        "assert len(seen) == 1 and '1.99' in str(seen[0].message), seen\n"
        "try:\n"
        "    s.ops.axial_squeeze(torch.ones(1, 1, 2, 2), backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    assert '1.99' in str(error)\n"
        "else:\n"
        "    raise SystemExit('an explicit backend fell back')\n"
        "table = torch._C._dispatch_dump('seaattn_kernels::sea_attention.triton')\n"
        "assert 'CUDA: ' in table and 'launcher.cpp' not in table, table\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".nowhere"])
    library, build, reason = native._load()
    assert library is None
    assert build == {}
    assert "not built" in reason


def test_every_cpu_operator_has_a_kernel(library):
    operators = [name for name in ops.OPERATORS["cpu"] if name != "training"]
    for name in (*operators, *overloads.STAGES):
        key = f"seaattn_kernels::{name}.cpu"
        composite = name == "axial_attention"  # of the pair
        kernel = "CompositeImplicitAutograd" if composite else "CPU"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(key, kernel)


def test_the_launches_of_the_block_on_a_gpu_are_the_librarys(library):
    table = torch._C._dispatch_dump("seaattn_kernels::sea_attention.triton").splitlines()
    (cuda,) = (line for line in table if line.startswith("CUDA: "))
    assert "launcher.cpp" in cuda


def _setup(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    command += ["--build-temp", str(tmp_path)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SEAATTN_")}
    return subprocess.run(
        command,
        env={**variables, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("value", ["1", "true"])
def test_build_can_be_skipped(tmp_path, value):
    done = _setup(tmp_path, SEAATTN_SKIP_BUILD=value)
    assert done.returncode == 0
    assert "pure Python" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("forced", ["0", "1"])
def test_no_compiler_is_one_line_or_an_error(tmp_path, forced):
    done = _setup(tmp_path, CXX="no-such-compiler", PATH="/nowhere", SEAATTN_FORCE_BUILD=forced)
    assert done.returncode == int(forced)
    assert "no C++ compiler" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("forced", ["0", "1"])
def test_a_compiler_that_fails_is_one_line_or_an_error(tmp_path, forced):
    done = _setup(tmp_path, CXX="/bin/false", SEAATTN_FORCE_BUILD=forced)
    assert (done.returncode != 0) == (forced == "1")
    assert forced == "1" or "pure Python, compiling failed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_cannot_be_asked_for_without_nvcc(tmp_path):
    compiler = shutil.which("g++")
    done = _setup(tmp_path, CXX=compiler, PATH="/nowhere", SEAATTN_CUDA_ARCHS="9.0a")
    assert done.returncode != 0
    assert "no nvcc was found" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_are_compiled_one_file_each(tmp_path):
    code = (
        "import sys; sys.argv = ['setup.py', '--version']\n"
        "from pathlib import Path\n"
        "import setup\n"
        f"setup.compile_cuda(['90a'], Path({str(tmp_path)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.fatbin" for name in sources}
