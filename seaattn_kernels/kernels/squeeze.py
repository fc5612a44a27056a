"""Row and column means of a map in one read, and their adjoint in one write.

    row[b, c, i] = mean_j x[b, c, i, j]          column[b, c, j] = mean_i x[b, c, i, j]

A program owns a band of rows and a strip of columns in BLOCK_C channels of one image. It walks down
the band with a tile of BLOCK_H rows: sums along the row leave with each tile, sums along the column
stay in registers until the end. One band and one strip, the whole map, is the usual case; the sums
of several are added by a second kernel or by who reads them, always in the same order. Sums run in
float32.

Where channels are neighbours in memory, a warp has whole rows of the tile, a thread STEPS columns
of each: a row is summed within a warp, and all loads of a tile are under way at once. Warps
exchange the sums of columns, once, at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels.launch import cdiv, launch, multiprocessors, power_of_2

# Rows and columns are small: how they are aligned is not worth another compilation.
VECTORS = ["row_ptr", "row_b", "row_c", "row_h", "column_ptr", "column_b", "column_c", "column_w"]


@triton.jit
def span(block, BLOCK: tl.constexpr):
    """The indices of a block along an axis, in 64 bits: times a stride they may need them."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def walk(C, H, band, bands, strips, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """What this program owns: the image, channels, columns, the first row and the row after the
    last, and the numbers of its band and its strip."""
    pid = tl.program_id(0)
    strip = pid % strips
    pid = pid // strips
    part = pid % bands
    pid = pid // bands
    blocks = tl.cdiv(C, BLOCK_C)
    b = (pid // blocks).to(tl.int64)
    first = part * band
    last = tl.minimum(first + band, H)
    return b, span(pid % blocks, BLOCK_C), span(strip, BLOCK_W), first, last, part, strip


@triton.jit(
    do_not_specialize=["H", "band", "bands", "strips"],
    do_not_specialize_on_alignment=["row_ptr", "column_ptr"],
)
def squeeze_kernel(
    x_ptr, row_ptr, column_ptr, C, H, W, band, bands, strips,
    stride_b, stride_c, stride_h, stride_w, row_scale, column_scale,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``row`` is (B, C, H, strips), ``column`` (B, C, W, bands); where CHANNELS_LAST they are
    (B, strips, H, C) and (B, bands, W, C)."""
    b, c, _, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    h = first + tl.arange(0, BLOCK_H)
    step = tl.arange(0, STEPS)[:, None] * (BLOCK_W // STEPS)
    w = strip.to(tl.int64) * BLOCK_W + step + tl.arange(0, BLOCK_W // STEPS)[None, :]
    in_c, in_w = (c < C)[:, None], w < W
    x_ptr += b * stride_b + c[:, None, None, None] * stride_c
    x_ptr += h.to(tl.int64)[None, None, :, None] * stride_h + w[None, :, None, :] * stride_w
    here = in_c[:, :, None, None] & in_w[None, :, None, :]
    if CHANNELS_LAST:
        row_ptr += ((b * strips + strip) * H + h[None, :]) * C + c[:, None]
        column_ptr += ((b * bands + part) * W + w[None, :, :]) * C + c[:, None, None]
        row_h = C
    else:
        row_ptr += ((b * C + c[:, None]) * H + h[None, :]) * strips + strip
        column_ptr += ((b * C + c[:, None, None]) * W + w[None, :, :]) * bands + part
        row_h = strips
    sums = tl.zeros([BLOCK_C, STEPS, BLOCK_H, BLOCK_W // STEPS], tl.float32)
    for _ in range(first, last, BLOCK_H):
        in_h = (h < last)[None, :]
        tile = tl.load(x_ptr, mask=here & in_h[:, None, :, None], other=0.0).to(tl.float32)
        sums += tile
        row = tl.sum(tl.sum(tile, 1), 2) * row_scale
        tl.store(row_ptr, row.to(row_ptr.dtype.element_ty), mask=in_c & in_h)
        x_ptr += tl.full([], BLOCK_H, tl.int64) * stride_h
        row_ptr += BLOCK_H * row_h
        h += BLOCK_H
    column = (tl.sum(sums, 2) * column_scale).to(column_ptr.dtype.element_ty)
    tl.store(column_ptr, column, mask=in_c[:, :, None] & in_w[None, :, :])


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
    """The image of this program, and the channels, rows and columns of its tile."""
    pid = tl.program_id(0)
    across = tl.cdiv(W, BLOCK_W)
    w = span(pid % across, BLOCK_W)
    pid = pid // across
    down = tl.cdiv(H, BLOCK_H)
    h = span(pid % down, BLOCK_H)
    pid = pid // down
    blocks = tl.cdiv(C, BLOCK_C)
    c = span(pid % blocks, BLOCK_C)
    b = (pid // blocks).to(tl.int64)
    return b, c[:, None, None], h[None, :, None], w[None, None, :]


@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=VECTORS)
def spread_kernel(
    row_ptr, column_ptr, x_ptr, C, H, W, row_scale, column_scale,
    row_b, row_c, row_h, column_b, column_c, column_w, x_b, x_c, x_h, x_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``x[b, c, i, j] = row[b, c, i] / W + column[b, c, j] / H``; a program owns one tile.

    Derivation: the gradient of a mean over W reaches each of its W summands divided by W.
    """
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    c_in, h_in, w_in = c < C, h < H, w < W
    row = tl.load(row_ptr + b * row_b + c * row_c + h * row_h, mask=c_in & h_in, other=0.0)
    column = tl.load(
        column_ptr + b * column_b + c * column_c + w * column_w, mask=c_in & w_in, other=0.0
    )
    value = row.to(tl.float32) * row_scale + column.to(tl.float32) * column_scale
    tl.store(
        x_ptr + b * x_b + c * x_c + h * x_h + w * x_w,
        value.to(x_ptr.dtype.element_ty),
        mask=c_in & h_in & w_in,
    )


class Tile(NamedTuple):
    """Channels, rows and columns that a program has in hand at a time."""

    c: int
    h: int
    w: int


def by_channels(x: Tensor) -> bool:
    """Whether it is the channels of a map that are neighbours in memory."""
    return x.stride(1) == 1 and x.stride(3) != 1


def tile(h: int, w: int, by_channels: bool) -> Tile:
    """A tile of 2048 elements of a map, longest along the axis contiguous in memory.

    Few shapes of tiles for all shapes of maps: each is compiled anew.
    """
    if by_channels:
        block_c = 64
        block_w = power_of_2(w, least=8, most=32)
        block_h = 2048 // (block_c * block_w)
    else:
        block_w = power_of_2(w, least=8, most=256)
        block_h = power_of_2(h, least=8, most=min(32, 1024 // block_w))
        block_c = 2048 // (block_h * block_w)
    return Tile(block_c, block_h, block_w)


def lines(w: int, itemsize: int) -> Tile:
    """A tile of 64 contiguous bytes of channels at 256 pixels: four loads of 16 bytes a thread,
    each of eight columns a warp."""
    block_w = power_of_2(w, least=8, most=32)
    return Tile(64 // itemsize, 256 // block_w, block_w)


def tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """How many programs cover a map with a tile each, and their constants."""
    b, c, h, w = x.shape
    block = tile(h, w, by_channels(x))
    programs = b * cdiv(c, block.c) * cdiv(h, block.h) * cdiv(w, block.w)
    return programs, constants(block)


def constants(block: Tile) -> dict[str, int]:
    return {"BLOCK_C": block.c, "BLOCK_H": block.h, "BLOCK_W": block.w, "num_warps": 8}


def bands(programs: int, h: int, block_h: int, most: int, least: int = 16) -> int:
    """Into how many bands of rows a map is cut so that ``most`` programs have work.

    ``least``: tiles of a band. A second launch costs as much as some sixteen: shorter bands do not
    pay.
    """
    if not 0 < programs < most:
        return 1
    return max(1, min(cdiv(most, programs), h // (least * block_h)))


class Cut(NamedTuple):
    """How a map is cut: a program walks down a band of a strip with one tile."""

    tile: Tile
    strips: int
    bands: int
    band: int  # rows


def cut(shape: Sequence[int], block: Tile, device: torch.device, least: int = 16) -> Cut:
    """The cut of a map into tiles, so that a device has work; ``least``: of :func:`bands`."""
    b, c, h, w = shape
    strips = cdiv(w, block.w)
    programs = b * cdiv(c, block.c) * strips
    parts = bands(programs, h, block.h, 2 * multiprocessors(device), least)
    band = cdiv(cdiv(h, parts), block.h) * block.h
    return Cut(block, strips, cdiv(h, band), band)


def sums(
    x: Tensor, cut: Cut, row: Tensor, column: Tensor, row_scale: float, column_scale: float,
    channels_last: bool = False,
) -> None:  # fmt: skip
    """Write the sums of ``x`` times a factor, in parts: see :func:`squeeze_kernel`."""
    b, c, h, w = x.shape
    steps = cut.tile.w // 8 if by_channels(x) else 1
    launch(
        squeeze_kernel, b * cdiv(c, cut.tile.c) * cut.strips * cut.bands,
        x, row, column, c, h, w, cut.band, cut.bands, cut.strips, *x.stride(),
        row_scale, column_scale, STEPS=steps, CHANNELS_LAST=channels_last, **constants(cut.tile),
    )  # fmt: skip


def parts_of(out: Tensor, count: int) -> Tensor:
    """Where ``count`` programs leave their parts of ``out``; one writes the result itself."""
    return out if count == 1 else out.new_empty(*out.shape, count, dtype=torch.float32)


def combine(parts: Tensor, out: Tensor, scale: float) -> None:
    """Write ``scale`` times the sum of the parts of ``out``, where it has parts."""
    if out is not parts:
        launch(
            combine_kernel, cdiv(out.numel(), 256),
            parts, out, out.numel(), parts.shape[3], scale, BLOCK=256, num_warps=4,
        )  # fmt: skip


def axial_squeeze(x: Tensor, mean: bool = True) -> tuple[Tensor, Tensor]:
    """``(B, C, H, W)`` of any strides -> ``(B, C, H)``, ``(B, C, W)`` in x's dtype.

    The means, or the sums.
    """
    b, c, h, w = x.shape
    if by_channels(x):
        way = cut(x.shape, lines(w, x.itemsize), x.device, least=4)
    else:
        way = cut(x.shape, tile(h, w, False), x.device)
    row, column = x.new_empty(b, c, h), x.new_empty(b, c, w)
    row_parts, column_parts = parts_of(row, way.strips), parts_of(column, way.bands)
    row_scale, column_scale = (1 / w, 1 / h) if mean else (1.0, 1.0)
    sums(
        x, way, row_parts, column_parts,
        row_scale if way.strips == 1 else 1.0, column_scale if way.bands == 1 else 1.0,
    )  # fmt: skip
    combine(row_parts, row, row_scale)
    combine(column_parts, column, column_scale)
    return row, column


def axial_squeeze_backward(row: Tensor, column: Tensor, channels_last: bool) -> Tensor:
    """The gradient of the map from those of the means, in one write."""
    b, c, h = row.shape
    w = column.shape[2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((b, c, h, w), dtype=row.dtype, device=row.device, memory_format=layout)
    programs, blocks = tiles(x)
    launch(
        spread_kernel, programs, row, column, x, c, h, w, 1 / w, 1 / h,
        *row.stride(), *column.stride(), *x.stride(), **blocks,
    )  # fmt: skip
    return x
