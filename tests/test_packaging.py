"""What pip builds, installed where nothing else of this checkout is, passes the tests."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What the tests of the installed package are: those that need no bench, in some two minutes.
TESTS = (
    "test_module.py", "test_seaformer.py", "test_migrate.py", "test_locate.py", "test_graphs.py",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the checkout, without what was built there."""
    copy = tmp_path_factory.mktemp("source") / "seaattn_kernels"
    ignored = shutil.ignore_patterns(
        ".*", "build", "*.so", "__pycache__", "*.egg-info", "results", "out"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def built(source, folder, *command, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=source, capture_output=True, text=True, timeout=900,
        env={**os.environ, "SEAATTN_FORCE_BUILD": "0", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module", params=["compiled", "pure"])
def wheel(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", folder)
    pure = request.param == "pure"
    if not pure and shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    return built(source, folder, *pip, SEAATTN_SKIP_BUILD=str(int(pure))), pure


def test_a_wheel_alone_passes_the_tests(wheel, tmp_path):
    path, pure = wheel
    names = zipfile.ZipFile(path).namelist()
    assert any(name.endswith(".so") for name in names) == (not pure)
    assert "seaattn_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("bench", "tests", "csrc", "docs"))]

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    # torch and pytest come from where this runs; .pth files there, an editable install, do not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, path],
        check=True,
    )
    outside = tmp_path / "outside"
    shutil.copytree(ROOT / "tests", outside / "tests")
    (outside / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers\nmarkers =\n    gpu: \n    slow: \n"
    )
    where = "import seaattn_kernels as s; print(s.__file__, s.ops.native.REASON)"
    told = subprocess.check_output([python, "-c", where], text=True, cwd=outside)
    assert str(site) in told
    assert ("None" in told) == (not pure)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         *(f"tests/{name}" for name in TESTS)],
        cwd=outside, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "SEAATTN_FORCE_BUILD": str(int(not pure))},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    subprocess.run(
        [python, "-m", "seaattn_kernels", "verify", "--golden", "tests/golden"],
        check=True, cwd=outside, timeout=600,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )  # fmt: skip


def test_a_source_distribution_has_what_a_build_and_the_tests_need(source, tmp_path):
    path = built(source, tmp_path, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("seaattn_kernels", "csrc", "tests", "bench", "docs", "examples"):
        for file in (ROOT / folder).rglob("*"):
            built_here = file.suffix in (".so", ".pyc", ".fatbin")
            hidden = built_here or {"__pycache__", "results"} & set(file.parts)
            if file.is_file() and not hidden:
                assert file.relative_to(ROOT).as_posix() in names
    assert {
        "LICENSE",
        "README.md",
        "setup.py",
        "Makefile",
        "constraints.txt",
        "CITATION.cff",
    } <= names
