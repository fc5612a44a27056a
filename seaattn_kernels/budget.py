"""How a result in a rounding dtype is judged: the error budget.

A result is right when its error against float64, pooled over seeds, is at most that of eager
PyTorch in the same dtype on the same device times a factor, plus a floor for results that eager
gets exactly right: half an eps of the root mean square, four of the largest value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SEEDS = range(10)


class Budget(NamedTuple):
    """Factors on eager's root mean square error and on its largest error."""

    rms: float
    maximum: float


BUDGETS = {
    torch.float16: Budget(1.1, 2.0),
    torch.bfloat16: Budget(1.1, 2.0),
    torch.float32: Budget(1.5, 2.0),
}
GRADIENT_BUDGET = Budget(1.5, 3.0)
FLOOR = Budget(0.5, 4.0)  # in eps of the dtype


class Verdict(NamedTuple):
    """Pooled errors of a candidate beside eager's, and whether they keep the budget."""

    ok: bool
    rms: float
    eager_rms: float
    maximum: float
    eager_maximum: float

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.2e} (eager {self.eager_rms:.2e}), "
            f"max {self.maximum:.2e} (eager {self.eager_maximum:.2e})"
        )


def judge(
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    gradient: bool = False,
) -> Verdict:
    """Pool the errors of tensors of ``dtype`` against float64 and hold them to the budget."""

    def errors(tensors: Sequence[Tensor]) -> tuple[float, float]:
        pooled = torch.cat(
            [
                (x.detach().double() - y.detach().to(x.device, torch.float64)).flatten()
                for x, y in zip(tensors, truth, strict=True)
            ]
        )
        return float(pooled.square().mean().sqrt()), float(pooled.abs().max())

    budget = GRADIENT_BUDGET if gradient else BUDGETS[dtype]
    eps = torch.finfo(dtype).eps
    size_rms, size_maximum = errors([torch.zeros_like(t) for t in truth])
    rms, maximum = errors(ours)
    eager_rms, eager_maximum = errors(eager)
    ok = (
        rms <= budget.rms * eager_rms + FLOOR.rms * eps * size_rms
        and maximum <= budget.maximum * eager_maximum + FLOOR.maximum * eps * size_maximum
    )
    return Verdict(ok, rms, eager_rms, maximum, eager_maximum)
