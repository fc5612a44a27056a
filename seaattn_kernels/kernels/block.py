"""The whole block in eval mode from folded weights, in four or five launches.

With ``N`` the length of an axis, ``D`` and ``E`` the channels of a key and of a value in a head,
``DH = heads*E``, ``NQ = heads*(2D + E)``:

    qkv  = Wqkv x + b                                              every pixel, (NQ, C)
    axis = mean of qkv along the other axis, + position
    o    = softmax(D^-0.5 q^T k) v                                 along each axis, per head
    e    = We act(o) + b                                           (DH, DH), row and column
    out  = sigma(Wproj act(v + e_row + e_column) + b) * (Wpw act(dw3x3(qkv) + b) + b)

    project  qkv into one map (pixels, NQ), in the dtype of x
    attend   a program owns BLOCK queries of one head of one image on one axis; it makes the axis
             vectors that it needs itself, as means
    encode   the product of both axes
    finish   a program owns BLOCK_M pixels and BLOCK_N channels of the result: depthwise 3x3 out
             of the map, the two products, the gate, one store

Two ways to the axis vectors, by :func:`plan`:

    direct       attend averages the projected map itself: project, attend, encode, finish.
                 Small maps, where a launch costs more than reading the map again
    squeezed     squeeze sums the projected map: project, squeeze, attend, encode, finish

Where csrc/cuda finishes the block, squeezed or

    clustered    one launch of csrc/cuda for attend and encode: project, axis, finish

Pixels are counted through the batch. Products accumulate in float32; axis vectors, the depthwise
stage and everything after a product are float32; o, e and the operands of products are in the dtype
of x, as the map is.

All launches share the current stream, and each waits for the one before.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels import cuda, squeeze
from seaattn_kernels.kernels.axial_attention import online, owned, scores
from seaattn_kernels.kernels.broadcast_add import activate
from seaattn_kernels.kernels.gate import sigmoid
from seaattn_kernels.kernels.launch import (
    INTERPRETED,
    all_registers,
    cdiv,
    fine_precision,
    launch,
    multiprocessors,
    power_of_2,
    precision,
)

_LOG2E = tl.constexpr(math.log2(math.e))
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` in float32."""
    if _INTERPRETED:  # where bfloat16 has no arithmetic
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in the dtype of a map, to the nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:  # where a cast to it truncates
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def block_of(pid, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a tile of a product; neighbouring programs share the rows."""
    across = tl.cdiv(columns, BLOCK_N)
    m = (pid // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, (pid % across) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def padded(n):
    """How far apart rows of so many channels begin."""
    return tl.cdiv(n, 16) * 16


@triton.jit
def load_weight(weight_ptr, n, k, N, K):
    """``weight[n, k]`` as (k, n), zero outside. Rows are filled with zeros: a mask that ends with
    them keeps loads of 16 bytes whole."""
    at = weight_ptr + n.to(tl.int64)[None, :] * padded(K) + k[:, None]
    return tl.load(at, mask=(n < N)[None, :] & (k < padded(K))[:, None], other=0.0)


@triton.jit(do_not_specialize=["B"])
def project_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, B, image, C, N, x_b, x_c, x_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[p, n] = sum_c weight[n, c] x[p, c] + bias[n]``; ``image`` pixels in each image."""
    p, n = block_of(tl.program_id(0), N, BLOCK_M, BLOCK_N)
    pixels = B * image
    x_ptr += (p // image).to(tl.int64)[:, None] * x_b + (p % image).to(tl.int64)[:, None] * x_p
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + c.to(tl.int64)[None, :] * x_c, mask=inside, other=0.0)
        total = product(x, load_weight(weight_ptr, n, c, N, C), total, PRECISION)
    total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    at = out_ptr + p.to(tl.int64)[:, None] * N + n[None, :]
    inside = (p < pixels)[:, None] & (n < N)[None, :]
    tl.store(at, rounded(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mean(
    x_ptr, n, c, inside, stride_n, stride_t, terms, scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``scale * sum_t x[n, t, c]`` as (n, c) in float32, zero outside."""
    at = x_ptr + n.to(tl.int64)[None, :, None] * stride_n + c[None, None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, terms, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        here = inside[None, :, :] & (t < terms)[:, None, None]
        x = tl.load(at + t.to(tl.int64)[:, None, None] * stride_t, mask=here, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    return total * scale


@triton.jit
def position(position_ptr, first, n, N, keys, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The position table of queries or keys at the positions n, as (n, channel)."""
    d = tl.arange(0, BLOCK_D)
    at = position_ptr + n[:, None] * (2 * keys) + first + d[None, :]
    return tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)


_RUNTIME = ["H", "W", "row_parts", "column_parts", "row_programs", "rows", "heads"]
_RUNTIME += ["scale", "slope"]


@triton.jit(do_not_specialize=_RUNTIME)
def attend_kernel(
    row_ptr, column_ptr, position_ptr, out_ptr, H, W, C,
    row_parts, column_parts, row_programs, rows, heads, scale, slope,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, DIRECT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``act(o)`` of both axes: ``(B*H, DH)``, then ``(B*W, DH)``.

    DIRECT: both pointers are the projected map (B, H, W, C). Otherwise they are its means in parts,
    (B, row_parts, H, C) and (B, column_parts, W, C).
    ``rows``: B*H. The first ``row_programs`` programs have queries on the rows.
    """
    pid = tl.program_id(0)
    keys = heads * D
    on_rows = pid < row_programs
    if on_rows:
        x_ptr, N, across, parts = row_ptr, H, W, row_parts
    else:
        x_ptr, N, across, parts = column_ptr, W, H, column_parts
        position_ptr += H * 2 * keys
        out_ptr += rows.to(tl.int64) * padded(heads * E)
        pid -= row_programs
    b, head, i = owned(pid, N, heads, BLOCK)
    if DIRECT:
        x_ptr += b * H * W * C
        stride_n, stride_t = tl.where(on_rows, W, 1) * C, tl.where(on_rows, 1, W) * C
        terms, factor = across, 1.0 / across
    else:
        x_ptr += b * parts * N * C
        stride_n, stride_t = C, N.to(tl.int64) * C
        terms, factor = parts, 1.0
    q_at, k_at, v_at = head * D, keys + head * D, 2 * keys + head * E
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    in_q = (i < N)[:, None] & (d < D)[None, :]
    q = mean(
        x_ptr, i, q_at + d, in_q, stride_n, stride_t, terms, factor,
        BLOCK, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    q = (q + position(position_ptr, q_at, i, N, keys, D, BLOCK_D)) * (scale * _LOG2E)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = mean(
            x_ptr, j, k_at + d, (j < N)[:, None] & (d < D)[None, :],
            stride_n, stride_t, terms, factor, BLOCK, BLOCK_D, BLOCK_T,
        )  # fmt: skip
        v = mean(
            x_ptr, j, v_at + e, (j < N)[:, None] & (e < E)[None, :],
            stride_n, stride_t, terms, factor, BLOCK, BLOCK_E, BLOCK_T,
        )  # fmt: skip
        k += position(position_ptr, k_at, j, N, keys, D, BLOCK_D)
        s = scores(q, tl.trans(k), j, N, PRECISION)
        p, shrink, largest, total = online(s, largest, total)
        out = out * shrink[:, None] + tl.dot(p, v, input_precision=PRECISION)
    out = activate(out / total[:, None], slope, ACTIVATION)
    at = out_ptr + (b * N + i)[:, None] * padded(heads * E) + head * E + e[None, :]
    inside = (i < N)[:, None] & (e < E)[None, :]
    tl.store(at, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "row_programs"])
def encode_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, columns, row_programs, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = We x + b`` of the positions on the rows, then of those on the columns.

    A program owns BLOCK_M positions of one axis and BLOCK_N channels; the first ``row_programs``
    have rows.
    """
    pid = tl.program_id(0)
    pitch, length = padded(N), rows
    if pid >= row_programs:
        pid -= row_programs
        length = columns
        x_ptr += rows.to(tl.int64) * pitch
        out_ptr += rows.to(tl.int64) * pitch
        weight_ptr += N * pitch
        bias_ptr += N
    m, n = block_of(pid, N, BLOCK_M, BLOCK_N)
    at = m.to(tl.int64)[:, None] * pitch
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + at + k[None, :], mask=(m < length)[:, None] & (k < N)[None, :], other=0.0
        )
        total = product(x, load_weight(weight_ptr, n, k, N, N), total, PRECISION)
    total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    inside = (m < length)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + at + n[None, :], rounded(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "slope"])
def finish_kernel(
    map_ptr, axis_ptr, dw_weight_ptr, dw_bias_ptr, pw_weight_ptr, pw_bias_ptr, proj_weight_ptr,
    proj_bias_ptr, out_ptr, B, image, H, W, C, N, VALUES, first, rows,
    out_b, out_c, out_p, slope,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, HARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The result from the projected map ``(pixels, N)`` and the encoded axes.

    ``first``: the first channel of v in the map; ``rows``: how many row vectors come before those
    of the columns.
    """
    p, c = block_of(tl.program_id(0), C, BLOCK_M, BLOCK_N)
    b, at = p // image, p % image
    h, w = at // W, at % W
    here = p < B * image
    map_ptr += p.to(tl.int64)[:, None] * N

    detail = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, N, BLOCK_K, num_stages=1):
        n = start + tl.arange(0, BLOCK_K)
        in_n = n < N
        z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        z += tl.load(dw_bias_ptr + n, mask=in_n, other=0.0)[None, :]
        for di in tl.range(3, num_stages=1):
            in_h = here & (h + di >= 1) & (h + di < H + 1)
            for dj in tl.static_range(3):
                in_w = in_h & (w + dj >= 1) & (w + dj < W + 1)
                offset = ((di - 1) * W + (dj - 1)).to(tl.int64) * N
                x = tl.load(
                    map_ptr + offset + n[None, :], mask=in_w[:, None] & in_n[None, :], other=0.0
                )
                weight = tl.load(dw_weight_ptr + (3 * di + dj) * N + n, mask=in_n, other=0.0)
                z += x.to(tl.float32) * weight[None, :]
        z = rounded(activate(z, slope, ACTIVATION), out_ptr.dtype.element_ty)
        detail = product(z, load_weight(pw_weight_ptr, c, n, C, N), detail, PRECISION)

    row_ptr = axis_ptr + (b * H + h).to(tl.int64)[:, None] * padded(VALUES)
    column_ptr = axis_ptr + (rows + b * W + w).to(tl.int64)[:, None] * padded(VALUES)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, VALUES, BLOCK_K, num_stages=2):
        n = start + tl.arange(0, BLOCK_K)
        inside = here[:, None] & (n < VALUES)[None, :]
        v = tl.load(map_ptr + first + n[None, :], mask=inside, other=0.0).to(tl.float32)
        row = tl.load(row_ptr + n[None, :], mask=inside, other=0.0).to(tl.float32)
        column = tl.load(column_ptr + n[None, :], mask=inside, other=0.0).to(tl.float32)
        z = rounded(activate(v + (row + column), slope, ACTIVATION), out_ptr.dtype.element_ty)
        gate = product(z, load_weight(proj_weight_ptr, c, n, C, VALUES), gate, PRECISION)

    in_c = c < C
    detail += tl.load(pw_bias_ptr + c, mask=in_c, other=0.0)[None, :]
    gate += tl.load(proj_bias_ptr + c, mask=in_c, other=0.0)[None, :]
    out_ptr += b.to(tl.int64)[:, None] * out_b + at.to(tl.int64)[:, None] * out_p
    tl.store(
        out_ptr + c.to(tl.int64)[None, :] * out_c,
        rounded(sigmoid(gate, HARD) * detail, out_ptr.dtype.element_ty),
        mask=here[:, None] & in_c[None, :],
    )


# --- blocks and ways, by the shape -----------------------------------------------------------

#: Axes on which attend averages the map itself: up to the first always, up to the second where the
#: map has at most so many bytes.
_DIRECT_AXIS, _LONGEST_DIRECT_AXIS, _DIRECT_BYTES = 16, 32, 4 << 20


def plan(b: int, h: int, w: int, projected: int, dtype: torch.dtype) -> str:
    """The way to the axis vectors: see the head of this file."""
    axis, size = max(h, w), b * h * w * projected * dtype.itemsize
    small = axis <= _LONGEST_DIRECT_AXIS and size <= _DIRECT_BYTES
    return "direct" if axis <= _DIRECT_AXIS or small else "squeezed"


class ProductTile(NamedTuple):
    """Rows and columns of a product that a program owns, the step along its sum, and warps."""

    m: int
    n: int
    k: int
    warps: int

    def programs(self, m: int, n: int) -> int:
        return cdiv(m, self.m) * cdiv(n, self.n)

    def constants(self, x: Tensor) -> dict[str, int]:
        """Of a kernel; only the largest tiles have several programs to a multiprocessor."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps,
            **(all_registers(x) if self.m * self.n < 64 * 128 else {}),
        }  # fmt: skip


# From the best reuse to the most programs: tiles, and how many programs a multiprocessor must get
# of one. In half precision or TF32, and in exact float32, whose products keep whole rows of both
# factors in registers. Those of finish: docs/notes/h200.md.
_PRODUCT = (
    (128, 128, 64, 8, 1), (64, 128, 64, 8, 1), (64, 64, 64, 4, 1), (32, 64, 64, 4, 1),
    (32, 32, 64, 4, 1), (16, 32, 64, 4, 1),
)  # fmt: skip
_FINISH = (
    (64, 128, 32, 8, 2), (64, 128, 64, 8, 0.75), (16, 128, 64, 8, 0.75), (16, 32, 128, 8, 0),
)  # fmt: skip
_EXACT = (
    (64, 64, 16, 8, 1), (32, 64, 16, 4, 1), (32, 32, 16, 4, 1), (16, 32, 32, 4, 1),
    (16, 16, 32, 4, 1),
)  # fmt: skip


@lru_cache(1024)
def product_tile(
    choices: tuple[tuple[float, ...], ...],
    m: int,
    n: int,
    processors: int,
    dtype: torch.dtype,
    precision: str,
) -> ProductTile:
    """The first of the choices that gives every multiprocessor its programs, or else the last."""
    wide = dtype is torch.float32
    exact = wide and precision == "ieee"
    widest = power_of_2(n, least=16)
    if INTERPRETED:  # which takes as long for a large tile as for a small one
        return ProductTile(256, widest, 128, 4)
    for block_m, block_n, block_k, warps, share in _EXACT if exact else choices:
        # A step of TF32 takes half the elements in as many bytes.
        block_k = block_k // 2 if wide and not exact else block_k
        found = ProductTile(block_m, min(block_n, widest), block_k, warps)
        if found.programs(m, n) >= share * processors:
            break
    return found


def attend_block(n: int, head: int, direct: bool) -> tuple[int, int, int]:
    """Of a program of attend: its queries, and keys at a time; lines or parts at a time; warps.

    ``n``: the longer axis; ``head``: D + E, padded; ``direct``: whether it averages the map.
    """
    if head > 128:
        return 16, 4, 8
    block = 16 if n <= 16 else 32
    return block, 8 if direct else 4, 4 if block == 16 or not direct else 8


def carve(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Uninitialised tensors of x's dtype in one allocation; sizes are multiples of 16."""
    return x.new_empty(sum(sizes)).split(sizes)


def _means(x: Tensor, cut: squeeze.Cut, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows and columns, written into ``scratch``: those of several strips and bands in parts."""
    b, c, h, w = x.shape
    size = b * c * h * cut.strips
    row, column = scratch[:size], scratch[size:]
    squeeze.sums(x, cut, row, column, 1 / w, 1 / h, channels_last=True)
    return row, column


def _scratch_size(shape: Sequence[int], cut: squeeze.Cut, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that hold the float32 of :func:`_means`."""
    b, c, h, w = shape
    sums = b * c * (h * cut.strips + w * cut.bands)
    return cdiv(sums * 4 // dtype.itemsize, 16) * 16


def _pixel_stride(x: Tensor) -> int:
    """Between neighbours of an image, whose pixels are evenly spaced."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def sea_attention(
    x: Tensor, weights: list[Tensor], heads: int, key_dim: int, activation: int,
    negative_slope: float, hard: bool, out: Tensor, chunked: bool = False,
) -> Tensor:  # fmt: skip
    """The block of ``x`` into ``out``: ``(B, C, H, W)`` both, the pixels of an image evenly spaced.

    ``weights``: the fields of ``fold.PackedWeights``; where ``chunked`` those of
    ``fold.ChunkedWeights``, for the kernels of :mod:`cuda`.
    """
    if chunked:
        (
            qkv_weight, qkv_bias, chunks, depthwise, pw_bias, encode_weight, encode_bias,
            proj_bias, position,
        ) = weights  # fmt: skip
    else:
        (
            qkv_weight, qkv_bias, dw_weight, dw_bias, pw_weight, pw_bias, encode_weight,
            encode_bias, proj_weight, proj_bias, position,
        ) = weights  # fmt: skip
    b, c, h, w = x.shape
    pixels, rows, columns = b * h * w, b * h, b * w
    projected = qkv_weight.shape[0]
    _, values, pitch = encode_weight.shape
    value_dim = values // heads
    # Eager makes the products of maps by convolutions.
    of_maps, of_axes = precision(x, torch.backends.cudnn.conv), fine_precision(x)
    if not chunked:
        way = plan(b, h, w, projected, x.dtype)
    elif max(h, w) <= cuda.LONGEST_AXIS and cuda.has_axis(heads, key_dim, value_dim):
        way = "clustered"
    else:
        way = "squeezed"

    def tile_of(choices: tuple[tuple[float, ...], ...], m: int, n: int) -> ProductTile:
        return product_tile(choices, m, n, multiprocessors(x.device), x.dtype, of_maps)

    def project(qkv: Tensor) -> None:
        block = tile_of(_PRODUCT, pixels, projected)
        launch(
            project_kernel, block.programs(pixels, projected),
            x, qkv_weight, qkv_bias, qkv, b, h * w, c, projected,
            x.stride(0), x.stride(1), _pixel_stride(x), PRECISION=of_maps, **block.constants(x),
        )  # fmt: skip

    def attend(row: Tensor, column: Tensor, attended: Tensor, strips: int, bands: int) -> None:
        block_d, block_e = power_of_2(key_dim, least=16), power_of_2(value_dim, least=16)
        block, terms, warps = attend_block(max(h, w), block_d + block_e, way == "direct")
        row_programs, others = (b * heads * cdiv(n, block) for n in (h, w))
        launch(
            attend_kernel, row_programs + others,
            row, column, position, attended, h, w, projected, strips, bands, row_programs, rows,
            heads, key_dim**-0.5, negative_slope,
            D=key_dim, E=value_dim, BLOCK=block, BLOCK_D=block_d, BLOCK_E=block_e,
            BLOCK_T=terms, DIRECT=way == "direct", ACTIVATION=activation, PRECISION=of_axes,
            num_warps=warps, num_stages=1, **all_registers(x),
        )  # fmt: skip

    def encode(attended: Tensor, encoded: Tensor) -> None:
        block = tile_of(_PRODUCT, rows + columns, values)
        row_programs, others = (block.programs(m, values) for m in (rows, columns))
        launch(
            encode_kernel, row_programs + others,
            attended, encode_weight, encode_bias, encoded, rows, columns, row_programs, values,
            PRECISION=of_maps, **block.constants(x),
        )  # fmt: skip

    def finish(qkv: Tensor, encoded: Tensor) -> None:
        if chunked:
            cuda.finish(
                qkv, encoded, chunks, depthwise, pw_bias, proj_bias, values, activation, hard, out
            )
            return
        block = tile_of(_FINISH, pixels, c)
        launch(
            finish_kernel, block.programs(pixels, c),
            qkv, encoded, dw_weight, dw_bias, pw_weight, pw_bias, proj_weight, proj_bias, out,
            b, h * w, h, w, c, projected, values, 2 * heads * key_dim, rows,
            out.stride(0), out.stride(1), _pixel_stride(out), negative_slope,
            ACTIVATION=activation, HARD=hard, PRECISION=of_maps, **block.constants(x),
        )  # fmt: skip

    map_size, axis_size = pixels * projected, (rows + columns) * pitch
    if way == "squeezed":
        shape, strides = (b, projected, h, w), (h * w * projected, 1, w * projected, projected)
        # Attend adds the parts: bands may be short.
        cut = squeeze.cut(shape, squeeze.lines(w, x.itemsize), x.device, least=2)
        size = _scratch_size(shape, cut, x.dtype)
        qkv, attended, scratch = carve(x, map_size, axis_size, max(size, axis_size))
        encoded = scratch[:axis_size]  # the means are dead by then
        project(qkv)
        means = _means(qkv.as_strided(shape, strides), cut, scratch[:size].view(torch.float32))
        attend(*means, attended, cut.strips, cut.bands)
        encode(attended, encoded)
    else:
        qkv, attended, encoded = carve(x, map_size, axis_size, axis_size)
        project(qkv)
        if way == "direct":
            attend(qkv, qkv, attended, 1, 1)
            encode(attended, encoded)
        else:
            cuda.axis(
                qkv, (b, h, w), position, encode_weight, encode_bias, heads, key_dim, activation,
                attended, encoded,
            )  # fmt: skip
    finish(qkv, encoded)
    return out
