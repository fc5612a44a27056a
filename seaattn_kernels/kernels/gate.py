"""Weigh a map by the sigmoid of another: ``sigma(x) * y``, elementwise, in one pass.

    hard:  sigma(t) = clamp(t + 3, 0, 6) / 6          true:  sigma(t) = 1 / (1 + exp(-t))

    dx = dout * y * sigma'(x)          dy = dout * sigma(x)

``sigma'`` of the hard one is 1/6 strictly between -3 and 3 and zero elsewhere, NaN's too. A program
owns BLOCK neighbouring elements; all maps share one dense layout, so that a flat index will do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels.launch import cdiv, launch

_BLOCK = 1024


@triton.jit
def sigmoid(x, HARD: tl.constexpr):
    if HARD:
        t = tl.minimum(
            tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL),
            6.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
        return t / 6.0
    else:
        return tl.sigmoid(x)


@triton.jit
def gate_kernel(x_ptr, y_ptr, out_ptr, n, HARD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (sigmoid(x, HARD) * y).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def gate_backward_kernel(
    gradient_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, n, HARD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    weight = sigmoid(x, HARD)
    if HARD:
        t = x + 3.0
        dx = tl.where((t <= 0.0) | (t >= 6.0), 0.0, gradient * y / 6.0)
    else:
        dx = gradient * y * weight * (1 - weight)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)
    tl.store(dy_ptr + at, (gradient * weight).to(dy_ptr.dtype.element_ty), mask=at < n)


def gate(x: Tensor, y: Tensor, hard: bool) -> Tensor:
    """``sigma(x) * y`` for two maps of one dense layout, in that layout."""
    out = torch.empty_like(x)
    n = out.numel()
    launch(gate_kernel, cdiv(n, _BLOCK), x, y, out, n, HARD=hard, BLOCK=_BLOCK, num_warps=4)
    return out


def gate_backward(gradient: Tensor, x: Tensor, y: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and y; all maps of one dense layout."""
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    n = x.numel()
    launch(
        gate_backward_kernel, cdiv(n, _BLOCK), gradient, x, y, dx, dy, n,
        HARD=hard, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return dx, dy
