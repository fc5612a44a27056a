import fcntl
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Threads that wait by spinning make a busy machine a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from seaattn_kernels import native

# Triton reads this when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Convolutions of folded and of unfolded weights round to TF32 differently.
torch.backends.cudnn.allow_tf32 = False

# Worker threads of a test runner would fight over the cores that torch takes.
torch.set_num_threads(min(2, os.cpu_count() or 1))


_REGRESSION = Path(__file__).parent / "regression"


def pytest_collection_modifyitems(items):
    for item in items:
        if _REGRESSION in item.path.parents:
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def library():
    """The compiled library; a machine without a C++ compiler has none."""
    if native.REASON is not None:
        if os.environ.get("SEAATTN_FORCE_BUILD") == "1":
            pytest.fail(native.REASON)
        pytest.skip(native.REASON)
    return native


@pytest.fixture(scope="session")
def cuda_libraries(tmp_path_factory):
    """csrc/cuda for the machine of ``emulated``: compiled once, whatever processes run tests."""
    import emulated

    if shutil.which(emulated.compiler()[0]) is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with open(folder / "emulated", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return {name: emulated.library(folder, name) for name in ("axis", "finish")}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def hasty(monkeypatch):
    """A round of timing and small ceilings, for tests of the benchmark that look at no time."""
    monkeypatch.setattr("bench.timing.FEWEST_ROUNDS", 1)
    monkeypatch.setattr("bench.timing.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("bench.limit._MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr("bench.limit._COPY_BYTES", {"cpu": 1024})


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """Runs a stage of ultralytics_stages.py, by name in a folder; what it printed.

    In a process of its own: importing Ultralytics changes settings of torch, and functions of PIL.
    """
    if find_spec("ultralytics") is None:
        pytest.skip("ultralytics is not installed")
    settings, root = tmp_path_factory.mktemp("settings"), Path(__file__).parents[1]

    def run(name, folder):
        environment = {**os.environ, "YOLO_CONFIG_DIR": str(settings), "PYTHONPATH": str(root)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, root / "tests" / "ultralytics_stages.py", name, folder],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    return run
