"""The judge can say no."""

import pytest
import torch

from seaattn_kernels import budget


@pytest.mark.parametrize("dtype", budget.BUDGETS)
def test_judge(dtype):
    truth = [torch.randn(1000, dtype=torch.float64) for _ in range(3)]
    eager = [t.to(dtype) for t in truth]
    assert budget.judge(eager, eager, truth, dtype).ok
    eps = torch.finfo(dtype).eps
    noise = [torch.randn(1000, dtype=torch.float64) * eps for _ in range(3)]

    def noisy(factor):
        return [t + factor * n for t, n in zip(truth, noise, strict=True)]

    assert budget.judge(noisy(5), noisy(5), truth, dtype).ok
    assert not budget.judge(noisy(9), noisy(5), truth, dtype).ok
    assert not budget.judge(noisy(5), eager, truth, dtype).ok
    spoiled = noisy(5)
    spoiled[1][7] += 200 * eps
    assert not budget.judge(spoiled, noisy(5), truth, dtype).ok
    spoiled[1][7] = float("nan")
    assert not budget.judge(spoiled, noisy(5), truth, dtype).ok
