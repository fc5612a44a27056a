"""The golden files: in float64 by plain PyTorch, in float32 by every backend.

tests/test_verify.py and tests/test_training.py hold them too, by "auto" and at other dtypes. Here
they are a part of what a change must not break, at what a backend costs: one file a backend is
enough where the error budget and the properties vary the shapes.
"""

import copy

import pytest
import torch
from cases import BACKENDS

from seaattn_kernels import budget, reference, verify

FILES = sorted(verify.GOLDEN.glob("*.npz"))

BLOCKS = [path for path in FILES if verify.load_golden(path).meta["kind"] == "sea_attention"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_float64(path):
    """Outputs, all gradients, running statistics, the folded path; logits of whole models."""
    golden = verify.load_golden(path)
    errors = verify.golden_errors(golden, "reference")
    assert errors.keys() >= golden.arrays.keys()
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_keeps_the_budget(backend, request):
    """The folded block, pooled over the files: one is a single sample."""
    if backend == "cpu":
        request.getfixturevalue("library")
    pooled = ([], [], [])
    for path in BLOCKS:
        golden = verify.load_golden(path)
        block = golden.model(backend).float().eval()
        x = golden.random("x").float()
        with torch.no_grad():
            found = block(x), reference.sea_attention(copy.deepcopy(block), x)
        for pool, value in zip(pooled, (*found, golden.arrays["eval/out"]), strict=True):
            pool.append(value)
    verdict = budget.judge(*pooled, torch.float32)
    assert verdict.ok, str(verdict)
