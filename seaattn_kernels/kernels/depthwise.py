"""3x3 convolution of each channel of a map whose BatchNorm is pending, normalised on load.

    n(y) = (y - mean) * scale + shift in the map, 0 outside of it          affine: (3, C), float32
    out[i, j] = bias + sum_{s,t} weight[s, t] * n(y)[i + s - 1, j + t - 1]

A program owns a band of rows of BLOCK_W columns in BLOCK_C channels of one image. It walks down the
band with one row in hand, beside its shifts to the left and to the right: that is the lowest row of
the sum above it, the middle of its own and the highest of the one below. Backward, with g = dout:

    dn[i, j] = sum_{s,t} weight[s, t] * g[i + 1 - s, j + 1 - t]
    dweight[s, t] = sum_{i,j} n(y)[i, j] * g[i + 1 - s, j + 1 - t]

Both take the same nine shifts of g, for the pixels (i, j) of the band. A program walks that band in
every so many images and leaves its part of dweight; the parts are added in a fixed order.
Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels.launch import (
    all_registers,
    cdiv,
    launch,
    multiprocessors,
    power_of_2,
)
from seaattn_kernels.kernels.normalize import load_affine, merge_parts
from seaattn_kernels.kernels.squeeze import Cut, Tile, by_channels, walk

_SIZES = ["H", "band", "bands", "strips"]


@triton.jit
def load(ptr, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_normalized(ptr, inside, mean, scale, shift):
    """``n(y)``, and 0 outside of the map: the shift is no padding."""
    return tl.where(inside, (load(ptr, inside) - mean) * scale + shift, 0.0)


@triton.jit
def load_weight(weight_ptr, c, C, TAP: tl.constexpr):
    return tl.load(weight_ptr + c * 9 + TAP, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def load_weights(weight_ptr, c, C):
    """The nine weights of channels, row by row."""
    return (
        load_weight(weight_ptr, c, C, 0), load_weight(weight_ptr, c, C, 1),
        load_weight(weight_ptr, c, C, 2), load_weight(weight_ptr, c, C, 3),
        load_weight(weight_ptr, c, C, 4), load_weight(weight_ptr, c, C, 5),
        load_weight(weight_ptr, c, C, 6), load_weight(weight_ptr, c, C, 7),
        load_weight(weight_ptr, c, C, 8),
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def depthwise_kernel(
    y_ptr, affine_ptr, weight_ptr, bias_ptr, out_ptr, C, H, W, band, bands, strips,
    y_b, y_c, y_h, y_w, out_b, out_c, out_h, out_w,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b, c, w, first, last, _, _ = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    c, w = c[:, None], w[None, :]
    mean, scale, shift = load_affine(affine_ptr, c, C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = load_weights(weight_ptr, c, C)
    bias = tl.zeros([BLOCK_C, 1], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    # A step has row h in hand and completes row h - 1.
    h = first - 1
    y_ptr += b * y_b + c * y_c + h.to(tl.int64) * y_h + w * y_w
    out_ptr += b * out_b + c * out_c + (h.to(tl.int64) - 1) * out_h + w * out_w
    upper = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)  # what rows above gave to row h - 1
    lower = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)  # and to row h
    for _ in range(first - 1, last + 1):
        here = (c < C) & (h >= 0) & (h < H)
        left = load_normalized(y_ptr - y_w, here & (w > 0) & (w <= W), mean, scale, shift)
        middle = load_normalized(y_ptr, here & (w < W), mean, scale, shift)
        right = load_normalized(y_ptr + y_w, here & (w + 1 < W), mean, scale, shift)
        out = upper + (left * w20 + middle * w21 + right * w22) + bias
        written = (c < C) & (w < W) & (h > first)
        tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=written)
        upper = lower + (left * w10 + middle * w11 + right * w12)
        lower = left * w00 + middle * w01 + right * w02
        h += 1
        y_ptr += y_h
        out_ptr += out_h


@triton.jit(do_not_specialize=["B", "groups", *_SIZES])
def depthwise_backward_kernel(
    gradient_ptr, y_ptr, affine_ptr, weight_ptr, out_ptr, parts_ptr,
    B, C, H, W, band, bands, strips, groups, gradient_b, gradient_c, gradient_h, gradient_w,
    y_b, y_c, y_h, y_w, out_b, out_c, out_h, out_w,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    group, c, w, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    parts_ptr += (((group * bands + part) * strips + strip) * C + c) * 9
    stored = c < C
    c, w = c[:, None], w[None, :]
    c_in, w_in = c < C, w < W
    mean, scale, shift = load_affine(affine_ptr, c, C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = load_weights(weight_ptr, c, C)
    gradient_ptr += c * gradient_c + (first.to(tl.int64) - 1) * gradient_h + w * gradient_w
    y_ptr += c * y_c + first.to(tl.int64) * y_h + w * y_w
    out_ptr += c * out_c + (first.to(tl.int64) - 2) * out_h + w * out_w
    d00 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d01 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d02 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d10 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d11 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d12 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d20 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d21 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    d22 = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    b = group
    for _ in range(group.to(tl.int32), B, groups):
        gradient_at, y_at, out_at = (
            gradient_ptr + b * gradient_b, y_ptr + b * y_b, out_ptr + b * out_b,
        )  # fmt: skip
        # Of g the rows in the map, of n(y) those of the band: each pixel of it is taken once.
        h = first - 1
        # Each of its own: Triton takes `above = here` in a loop for no change where both began as
        # one value, and leaves `above` what it was.
        above = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
        here = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
        upper = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
        lower = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
        for _ in range(first - 1, last + 1):
            g_in = c_in & (h >= 0) & (h < H)
            left = load(gradient_at - gradient_w, g_in & (w > 0) & (w <= W))
            middle = load(gradient_at, g_in & w_in)
            right = load(gradient_at + gradient_w, g_in & (w + 1 < W))
            below = load_normalized(y_at, c_in & w_in & (h + 1 < last), mean, scale, shift)
            dn = upper + (right * w00 + middle * w01 + left * w02)
            tl.store(out_at, dn.to(out_at.dtype.element_ty), mask=c_in & w_in & (h > first))
            upper = lower + (right * w10 + middle * w11 + left * w12)
            lower = right * w20 + middle * w21 + left * w22
            d00 += above * right
            d01 += above * middle
            d02 += above * left
            d10 += here * right
            d11 += here * middle
            d12 += here * left
            d20 += below * right
            d21 += below * middle
            d22 += below * left
            above = here
            here = below
            h += 1
            gradient_at += gradient_h
            y_at += y_h
            out_at += out_h
        b += groups
    tl.store(parts_ptr, tl.sum(d00, 1), mask=stored)
    tl.store(parts_ptr + 1, tl.sum(d01, 1), mask=stored)
    tl.store(parts_ptr + 2, tl.sum(d02, 1), mask=stored)
    tl.store(parts_ptr + 3, tl.sum(d10, 1), mask=stored)
    tl.store(parts_ptr + 4, tl.sum(d11, 1), mask=stored)
    tl.store(parts_ptr + 5, tl.sum(d12, 1), mask=stored)
    tl.store(parts_ptr + 6, tl.sum(d20, 1), mask=stored)
    tl.store(parts_ptr + 7, tl.sum(d21, 1), mask=stored)
    tl.store(parts_ptr + 8, tl.sum(d22, 1), mask=stored)


def _cut(y: Tensor) -> Cut:
    """Rows of 512 elements, and bands of eight rows or more: the halo of a band is two."""
    b, c, h, w = y.shape
    if by_channels(y):
        tile = Tile(64, 1, 8)
    else:
        block_w = power_of_2(w, least=8, most=128)
        tile = Tile(512 // block_w, 1, block_w)
    strips = cdiv(w, tile.w)
    programs = max(1, b * cdiv(c, tile.c) * strips)
    band = cdiv(h, min(cdiv(_most(y), programs), cdiv(h, 8)))
    return Cut(tile, strips, cdiv(h, band), band)


def _most(y: Tensor) -> int:
    """How many programs, of four warps, are enough."""
    return 8 * multiprocessors(y.device)


def _constants(way: Cut) -> dict[str, int]:
    return {"BLOCK_C": way.tile.c, "BLOCK_W": way.tile.w, "num_warps": 4}


def depthwise(
    y: Tensor, affine: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Write the convolution of n(y) by a contiguous ``(C, 1, 3, 3)`` weight into ``out``."""
    b, c, h, w = y.shape
    way = _cut(y)
    launch(
        depthwise_kernel, b * cdiv(c, way.tile.c) * way.strips * way.bands,
        y, affine, weight, bias, out, c, h, w, way.band, way.bands, way.strips,
        *y.stride(), *out.stride(), **_constants(way),
    )  # fmt: skip
    return out


def depthwise_backward(
    gradient: Tensor, y: Tensor, affine: Tensor, weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of n(y), written into ``out``, and of the weight."""
    b, c, h, w = y.shape
    way = _cut(y)
    programs = cdiv(c, way.tile.c) * way.strips * way.bands
    groups = min(b, cdiv(_most(y), programs))
    parts = torch.empty(
        (groups * way.bands * way.strips, c, 9), dtype=torch.float32, device=y.device
    )
    launch(
        depthwise_backward_kernel, groups * programs, gradient, y, affine, weight, out, parts,
        b, c, h, w, way.band, way.bands, way.strips, groups,
        *gradient.stride(), *y.stride(), *out.stride(), **_constants(way), **all_registers(y),
    )  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    merge_parts(parts, dweight)
    return out, dweight
