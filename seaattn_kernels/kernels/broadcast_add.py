"""Add a row and a column vector to a map and activate, in one read and one write.

    z[b, c, i, j] = v[b, c, i, j] + row[b, c, i] + column[b, c, j]          out = act(z)

A program owns one tile of BLOCK_C channels, BLOCK_H rows and BLOCK_W columns of an image. Backward:

    dv = dout * act'(z)          drow[i] = sum_j dv[i, j]          dcolumn[j] = sum_i dv[i, j]

The sums are W and H times the means of ``squeeze``.
"""

import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels import squeeze
from seaattn_kernels.kernels.launch import launch
from seaattn_kernels.kernels.squeeze import VECTORS, place

# The codes of ``reference.ACTIVATIONS``.
_IDENTITY, _RELU, _RELU6, _LEAKY_RELU, _SILU = (tl.constexpr(code) for code in range(5))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """``act(z)``; NaN goes through."""
    if ACTIVATION == _RELU:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == _RELU6:
        return tl.minimum(
            tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL),
            6.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(z > 0, z, z * slope)
    elif ACTIVATION == _SILU:
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def activate_backward(gradient, z, slope, ACTIVATION: tl.constexpr):
    """``gradient * act'(z)`` with PyTorch's values at the kinks: zero at the bounds themselves."""
    if ACTIVATION == _RELU:
        return tl.where(z <= 0, 0.0, gradient)
    elif ACTIVATION == _RELU6:
        return tl.where((z <= 0) | (z >= 6), 0.0, gradient)
    elif ACTIVATION == _LEAKY_RELU:
        return tl.where(z > 0, gradient, gradient * slope)
    elif ACTIVATION == _SILU:
        s = tl.sigmoid(z)
        return gradient * s * (1 + z * (1 - s))
    else:
        return gradient


@triton.jit
def total(
    v_ptr, row_ptr, column_ptr, b, c, h, w, C, H, W,
    v_b, v_c, v_h, v_w, row_b, row_c, row_h, column_b, column_c, column_w,
):  # fmt: skip
    """``z`` of a tile in float32."""
    c_in, h_in, w_in = c < C, h < H, w < W
    v = tl.load(v_ptr + b * v_b + c * v_c + h * v_h + w * v_w, mask=c_in & h_in & w_in, other=0.0)
    row = tl.load(row_ptr + b * row_b + c * row_c + h * row_h, mask=c_in & h_in, other=0.0)
    column = tl.load(
        column_ptr + b * column_b + c * column_c + w * column_w, mask=c_in & w_in, other=0.0
    )
    return v.to(tl.float32) + (row.to(tl.float32) + column.to(tl.float32))


@triton.jit(do_not_specialize=["H", "slope"], do_not_specialize_on_alignment=VECTORS)
def broadcast_add_kernel(
    v_ptr, row_ptr, column_ptr, out_ptr, C, H, W, slope,
    v_b, v_c, v_h, v_w, row_b, row_c, row_h, column_b, column_c, column_w,
    out_b, out_c, out_h, out_w, ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    z = total(
        v_ptr, row_ptr, column_ptr, b, c, h, w, C, H, W,
        v_b, v_c, v_h, v_w, row_b, row_c, row_h, column_b, column_c, column_w,
    )  # fmt: skip
    tl.store(
        out_ptr + b * out_b + c * out_c + h * out_h + w * out_w,
        activate(z, slope, ACTIVATION).to(out_ptr.dtype.element_ty),
        mask=(c < C) & (h < H) & (w < W),
    )


@triton.jit(do_not_specialize=["H", "slope"], do_not_specialize_on_alignment=VECTORS)
def broadcast_add_backward_kernel(
    gradient_ptr, v_ptr, row_ptr, column_ptr, out_ptr, C, H, W, slope,
    gradient_b, gradient_c, gradient_h, gradient_w, v_b, v_c, v_h, v_w,
    row_b, row_c, row_h, column_b, column_c, column_w, out_b, out_c, out_h, out_w,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    z = total(
        v_ptr, row_ptr, column_ptr, b, c, h, w, C, H, W,
        v_b, v_c, v_h, v_w, row_b, row_c, row_h, column_b, column_c, column_w,
    )  # fmt: skip
    inside = (c < C) & (h < H) & (w < W)
    gradient_ptr += b * gradient_b + c * gradient_c + h * gradient_h + w * gradient_w
    gradient = tl.load(gradient_ptr, mask=inside, other=0.0).to(tl.float32)
    dv = activate_backward(gradient, z, slope, ACTIVATION)
    tl.store(
        out_ptr + b * out_b + c * out_c + h * out_h + w * out_w,
        dv.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def broadcast_add(
    v: Tensor, row: Tensor, column: Tensor, activation: int, negative_slope: float, out: Tensor
) -> Tensor:
    """Write ``act(v + row[..., None] + column[..., None, :])`` into ``out``; any strides."""
    programs, blocks = squeeze.tiles(out)
    launch(
        broadcast_add_kernel, programs, v, row, column, out, *v.shape[1:], negative_slope,
        *v.stride(), *row.stride(), *column.stride(), *out.stride(),
        ACTIVATION=activation, **blocks,
    )  # fmt: skip
    return out


def broadcast_add_backward(
    gradient: Tensor, v: Tensor, row: Tensor, column: Tensor,
    activation: int, negative_slope: float, out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of v, written into ``out``, of the row and of the column."""
    programs, blocks = squeeze.tiles(out)
    launch(
        broadcast_add_backward_kernel, programs,
        gradient, v, row, column, out, *v.shape[1:], negative_slope, *gradient.stride(),
        *v.stride(), *row.stride(), *column.stride(), *out.stride(),
        ACTIVATION=activation, **blocks,
    )  # fmt: skip
    return (out, *squeeze.axial_squeeze(out, mean=False))
