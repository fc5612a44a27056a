"""Row and column means of a map in one read, and their adjoint in one write.

    row[b, c, i] = mean_j x[b, c, i, j]          column[b, c, j] = mean_i x[b, c, i, j]

A program owns a band of rows and a strip of columns in BLOCK_C channels of one image. It walks down
the band with a tile of BLOCK_H rows: sums along the row leave with each tile, sums along the column
stay in registers until the end. One band and one strip, the whole map, is the usual case; the sums
of several are added by a second kernel, always in the same order. Sums run in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels.launch import OPTIONS, multiprocessors, on_device, power_of_2


@triton.jit(do_not_specialize=["C", "H", "W", "band", "bands", "strips"])
def squeeze_kernel(
    x_ptr, row_ptr, column_ptr, C, H, W, band, bands, strips,
    stride_b, stride_c, stride_h, stride_w, row_scale, column_scale,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    strip = pid % strips
    pid = pid // strips
    part = pid % bands
    pid = pid // bands
    blocks = tl.cdiv(C, BLOCK_C)
    b = (pid // blocks).to(tl.int64)
    c0 = (pid % blocks) * BLOCK_C
    w0 = strip * BLOCK_W
    first, last = part * band, tl.minimum(part * band + band, H)
    c = tl.arange(0, BLOCK_C)[:, None, None]
    h = tl.arange(0, BLOCK_H)[None, :, None]
    w = tl.arange(0, BLOCK_W)[None, None, :]
    # 64 bits for where a tile begins, 32 for the way within it.
    x_ptr += b * stride_b + c0.to(tl.int64) * stride_c + w0.to(tl.int64) * stride_w
    x_ptr += first.to(tl.int64) * stride_h
    local = c * stride_c + h * stride_h + w * stride_w
    here = (c0 + c < C) & (w0 + w < W)
    sums = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    c_row = c0 + tl.arange(0, BLOCK_C)[:, None]
    channel = b * C + c_row
    for h0 in range(first, last, BLOCK_H):
        tile = tl.load(x_ptr + local, mask=here & (h0 + h < last), other=0.0).to(tl.float32)
        sums += tile
        h_row = h0 + tl.arange(0, BLOCK_H)[None, :]
        tl.store(
            row_ptr + (channel * H + h_row) * strips + strip,
            (tl.sum(tile, 2) * row_scale).to(row_ptr.dtype.element_ty),
            mask=(c_row < C) & (h_row < last),
        )
        x_ptr += BLOCK_H * stride_h
    w_column = w0 + tl.arange(0, BLOCK_W)[None, :]
    tl.store(
        column_ptr + (channel * W + w_column) * bands + part,
        (tl.sum(sums, 1) * column_scale).to(column_ptr.dtype.element_ty),
        mask=(c_row < C) & (w_column < W),
    )


@triton.jit(do_not_specialize=["n", "parts"])
def combine_kernel(parts_ptr, out_ptr, n, parts, scale, BLOCK: tl.constexpr):
    """``out[i] = scale * (parts[i, 0] + parts[i, 1] + ...)``; a program owns BLOCK results."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + at * parts + part, mask=at < n, other=0.0)
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def place(C, H, W, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The image and the corner of this program's tile, in 64 bits."""
    pid = tl.program_id(0)
    across = tl.cdiv(W, BLOCK_W)
    w0 = (pid % across) * BLOCK_W
    pid = pid // across
    down = tl.cdiv(H, BLOCK_H)
    h0 = (pid % down) * BLOCK_H
    pid = pid // down
    blocks = tl.cdiv(C, BLOCK_C)
    return (
        (pid // blocks).to(tl.int64),
        ((pid % blocks) * BLOCK_C).to(tl.int64),
        h0.to(tl.int64),
        w0.to(tl.int64),
    )


@triton.jit(do_not_specialize=["C", "H", "W"])
def spread_kernel(
    row_ptr, column_ptr, x_ptr, C, H, W, row_scale, column_scale,
    row_b, row_c, row_h, column_b, column_c, column_w, stride_b, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``x[b, c, i, j] = row[b, c, i] / W + column[b, c, j] / H``; a program owns one tile.

    Derivation: the gradient of a mean over W reaches each of its W summands divided by W.
    """
    b, c0, h0, w0 = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    c = tl.arange(0, BLOCK_C)[:, None, None]
    h = tl.arange(0, BLOCK_H)[None, :, None]
    w = tl.arange(0, BLOCK_W)[None, None, :]
    c_in, h_in, w_in = c0 + c < C, h0 + h < H, w0 + w < W
    row = tl.load(
        row_ptr + b * row_b + c0 * row_c + h0 * row_h + (c * row_c + h * row_h),
        mask=c_in & h_in, other=0.0,
    )  # fmt: skip
    column = tl.load(
        column_ptr + b * column_b + c0 * column_c + w0 * column_w + (c * column_c + w * column_w),
        mask=c_in & w_in, other=0.0,
    )  # fmt: skip
    value = row.to(tl.float32) * row_scale + column.to(tl.float32) * column_scale
    start = b * stride_b + c0 * stride_c + h0 * stride_h + w0 * stride_w
    tl.store(
        x_ptr + start + (c * stride_c + h * stride_h + w * stride_w),
        value.to(x_ptr.dtype.element_ty),
        mask=c_in & h_in & w_in,
    )


class Tile(NamedTuple):
    """Channels, rows and columns that a program has in hand at a time."""

    c: int
    h: int
    w: int


def tile(c: int, h: int, w: int, channels_last: bool, elements: int = 2048) -> Tile:
    """A tile of at most ``elements``, longest along the axis that is contiguous in memory."""
    if channels_last:
        block_c = power_of_2(c, most=64)
        block_w = power_of_2(w, most=elements // block_c)
        return Tile(block_c, power_of_2(h, most=elements // (block_c * block_w)), block_w)
    block_w = power_of_2(w, most=min(elements, 256))
    block_h = power_of_2(h, most=elements // block_w)
    return Tile(power_of_2(c, most=min(elements // (block_h * block_w), 8)), block_h, block_w)


def bands(programs: int, h: int, block_h: int, most: int) -> int:
    """Into how many bands of rows a map is cut so that ``most`` programs have work.

    A second launch costs as much as some sixteen tiles: shorter bands do not pay.
    """
    if programs >= most:
        return 1
    return max(1, min(triton.cdiv(most, programs), h // (16 * block_h)))


def axial_squeeze(x: Tensor, mean: bool = True) -> tuple[Tensor, Tensor]:
    """``(B, C, H, W)`` of any strides -> ``(B, C, H)``, ``(B, C, W)`` in x's dtype.

    The means, or the sums.
    """
    b, c, h, w = x.shape
    if b == 0:
        return x.new_empty(b, c, h), x.new_empty(b, c, w)
    block = tile(c, h, w, x.stride(1) == 1 and x.stride(3) != 1)
    strips = triton.cdiv(w, block.w)
    programs = b * triton.cdiv(c, block.c) * strips
    parts = bands(programs, h, block.h, 2 * multiprocessors(x.device))
    band = triton.cdiv(triton.cdiv(h, parts), block.h) * block.h
    parts = triton.cdiv(h, band)
    row, column = x.new_empty(b, c, h), x.new_empty(b, c, w)
    row_parts = row if strips == 1 else row.new_empty(b, c, h, strips, dtype=torch.float32)
    column_parts = column if parts == 1 else row.new_empty(b, c, w, parts, dtype=torch.float32)
    row_scale, column_scale = (1 / w, 1 / h) if mean else (1.0, 1.0)
    with on_device(x):
        squeeze_kernel[(programs * parts,)](
            x, row_parts, column_parts, c, h, w, band, parts, strips, *x.stride(),
            row_scale if strips == 1 else 1.0, column_scale if parts == 1 else 1.0,
            BLOCK_C=block.c, BLOCK_H=block.h, BLOCK_W=block.w, num_warps=4, **OPTIONS,
        )  # fmt: skip
        for out, sums, scale in (
            (row, row_parts, row_scale),
            (column, column_parts, column_scale),
        ):
            if out is not sums:
                combine_kernel[(triton.cdiv(out.numel(), 256),)](
                    sums, out, out.numel(), sums.shape[3], scale,
                    BLOCK=256, num_warps=4, **OPTIONS,
                )  # fmt: skip
    return row, column


def axial_squeeze_backward(row: Tensor, column: Tensor, channels_last: bool) -> Tensor:
    """The gradient of the map from those of the means, in one write."""
    b, c, h = row.shape
    w = column.shape[2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((b, c, h, w), dtype=row.dtype, device=row.device, memory_format=layout)
    if b == 0:
        return x
    block = tile(c, h, w, channels_last)
    programs = b * triton.cdiv(c, block.c) * triton.cdiv(h, block.h) * triton.cdiv(w, block.w)
    with on_device(row):
        spread_kernel[(programs,)](
            row, column, x, c, h, w, 1 / w, 1 / h, *row.stride(), *column.stride(), *x.stride(),
            BLOCK_C=block.c, BLOCK_H=block.h, BLOCK_W=block.w, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return x
