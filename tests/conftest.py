import os
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
