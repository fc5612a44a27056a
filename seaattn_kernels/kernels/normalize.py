"""Read maps whose BatchNorm is pending: a map is normalised where it is loaded, never kept so.

    n(y) = (y - mean) * scale + shift                        affine = mean, scale, shift: (3, C)
    normalize                  act(n(y) + row[i] + column[j])
    normalize_gate             sigma(n(x)) * n(y)

With g the gradient of n(y), for normalize_sums and normalize_backward that is
``dout * act'(n(y)) + row[i] + column[j]``, a gradient passes the BatchNorm in two steps:

    sums = sum g, sum g * (y - mean)         dy = scale * (g - terms[0] - (y - mean) * terms[1])

Maps are (B, C, H, W) of any strides; arithmetic, affines, terms and sums are float32. A program
that only writes a map owns one tile, as in ``broadcast_add``. One that sums owns a band and a strip
of an image, as in ``squeeze``, and leaves its part of the sums: a second kernel adds the parts,
always in the same order.

Statistics are of deviations from a value r near the mean, that of the first tile of a band: sums of
squares themselves would cancel where the mean is large. With n values, S = sum y - r and
Q = sum (y - r)^2 a band has the mean ``r + S/n`` and squared deviations of ``Q - S^2/n``. No more
cancels than Q is larger than that, at most as many times as there are tiles in the band. Bands are
merged as in Chan, Golub and LeVeque (1979).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels import squeeze
from seaattn_kernels.kernels.broadcast_add import activate, activate_backward
from seaattn_kernels.kernels.gate import sigmoid
from seaattn_kernels.kernels.launch import all_registers, cdiv, launch, multiprocessors
from seaattn_kernels.kernels.squeeze import VECTORS, Cut, place, span, walk

_SIZES = ["H", "band", "bands", "strips"]


@triton.jit
def load(ptr, b, c, h, w, stride_b, stride_c, stride_h, stride_w, inside):
    """A tile of a map in float32, 0 outside of it."""
    ptr += b * stride_b + c * stride_c + h * stride_h + w * stride_w
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, b, c, h, w, stride_b, stride_c, stride_h, stride_w, inside, tile):
    ptr += b * stride_b + c * stride_c + h * stride_h + w * stride_w
    tl.store(ptr, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_axes(
    row_ptr, column_ptr, b, c, h, w, c_in, h_in, w_in,
    row_b, row_c, row_h, column_b, column_c, column_w,
):  # fmt: skip
    """``row[i] + column[j]`` of a tile in float32, 0 outside of the map."""
    row = tl.load(row_ptr + b * row_b + c * row_c + h * row_h, mask=c_in & h_in, other=0.0)
    column = tl.load(
        column_ptr + b * column_b + c * column_c + w * column_w, mask=c_in & w_in, other=0.0
    )
    return tl.where(h_in & w_in, row.to(tl.float32) + column.to(tl.float32), 0.0)


@triton.jit
def load_affine(affine_ptr, c, C):
    """Mean, scale and shift of channels."""
    mean = tl.load(affine_ptr + c, mask=c < C, other=0.0)
    scale = tl.load(affine_ptr + C + c, mask=c < C, other=0.0)
    shift = tl.load(affine_ptr + 2 * C + c, mask=c < C, other=0.0)
    return mean, scale, shift


@triton.jit
def load_terms(terms_ptr, c, C):
    offset = tl.load(terms_ptr + c, mask=c < C, other=0.0)
    factor = tl.load(terms_ptr + C + c, mask=c < C, other=0.0)
    return offset, factor


@triton.jit
def through_gate(gradient, x, y, HARD: tl.constexpr):
    """The gradients of x and y from that of ``sigma(x) * y``; zero at the bounds of the hard."""
    weight = sigmoid(x, HARD)
    if HARD:
        dx = tl.where((x <= -3.0) | (x >= 3.0), 0.0, gradient * y / 6.0)
    else:
        dx = gradient * y * weight * (1 - weight)
    return dx, gradient * weight


# --- statistics ------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=["parts_ptr", "row_ptr", "column_ptr"],
)
def moments_kernel(
    y_ptr, parts_ptr, row_ptr, column_ptr, C, H, W, band, bands, strips, y_b, y_c, y_h, y_w,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``parts[part] = n, r, S/n, Q - S^2/n`` of channels, and the sums of ``y - r`` along W and H,
    ``(B, C, H, strips)`` and ``(B, C, W, bands)``, where these are given."""
    b, c, w, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    h = first + tl.arange(0, BLOCK_H)
    y_ptr += b * y_b + c[:, None, None] * y_c
    y_ptr += h.to(tl.int64)[None, :, None] * y_h + w[None, None, :] * y_w
    here = (c < C)[:, None, None] & (w < W)[None, None, :]
    width = tl.minimum(W - strip * BLOCK_W, BLOCK_W)
    # Loaded again below, from a cache.
    tile = tl.load(y_ptr, mask=here & (h < last)[None, :, None], other=0.0).to(tl.float32)
    size = (tl.minimum(last - first, BLOCK_H) * width).to(tl.float32)
    center = tl.sum(tl.sum(tile, 2), 1) / size
    sums = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    if row_ptr is not None:
        row_ptr += ((b * C + c[:, None]) * H + h[None, :]) * strips + strip
    for _ in range(first, last, BLOCK_H):
        inside = here & (h < last)[None, :, None]
        tile = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, tile - center[:, None, None], 0.0)
        sums += deviation
        squares += deviation * deviation
        if row_ptr is not None:
            stored = (c < C)[:, None] & (h < last)[None, :]
            tl.store(row_ptr, tl.sum(deviation, 2), mask=stored)
            row_ptr += BLOCK_H * strips
        y_ptr += tl.full([], BLOCK_H, tl.int64) * y_h
        h += BLOCK_H
    along_h = tl.sum(sums, 1)
    if column_ptr is not None:
        column_ptr += ((b * C + c[:, None]) * W + w[None, :]) * bands + part
        tl.store(column_ptr, along_h, mask=(c < C)[:, None] & (w < W)[None, :])
    size = ((last - first) * width).to(tl.float32)
    offset = tl.sum(along_h, 1) / size
    squares = tl.sum(tl.sum(squares, 2), 1) - offset * offset * size
    # Of equal values rounding may leave less than nothing.
    squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    parts_ptr += ((b * bands + part) * strips + strip) * 4 * C + c
    tl.store(parts_ptr, tl.zeros([BLOCK_C], tl.float32) + size, mask=c < C)
    tl.store(parts_ptr + C, center, mask=c < C)
    tl.store(parts_ptr + 2 * C, offset, mask=c < C)
    tl.store(parts_ptr + 3 * C, squares, mask=c < C)


@triton.jit(do_not_specialize=["C", "parts"])
def merge_moments_kernel(
    parts_ptr, mean_ptr, squares_ptr, C, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and squared deviations of channels from their parts; a program owns BLOCK_C channels."""
    c = span(tl.program_id(0), BLOCK_C)
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        here = (part < parts)[:, None] & (c < C)[None, :]
        at = parts_ptr + part.to(tl.int64)[:, None] * 4 * C + c[None, :]
        n = tl.load(at, mask=here, other=0.0)
        means = tl.load(at + C, mask=here, other=0.0) + tl.load(at + 2 * C, mask=here, other=0.0)
        within = tl.load(at + 3 * C, mask=here, other=0.0)
        new_count = tl.sum(n, 0)
        new_mean = tl.sum(n * means, 0) / tl.maximum(new_count, 1.0)
        deviation = means - new_mean[None, :]
        squares += tl.sum(within + n * deviation * deviation, 0)
        # Together with the parts before.
        total = count + new_count
        share = new_count / tl.maximum(total, 1.0)
        delta = new_mean - mean
        squares += delta * delta * (count * share)
        mean += delta * share
        count = total
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(squares_ptr + c, squares, mask=c < C)


@triton.jit
def center_axis(
    block, sums_ptr, out_ptr, parts_ptr, mean_ptr, n, C, N, M,
    own, own_step, other, others, other_step, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[b, c, i] = 1/M sum_k sums[b, c, i, k] + m_k * (r_k - mean)`` over the pieces of m_k of
    the M values that i has on the other axis, each with an r of its own.

    The axis itself, of N elements, is cut into pieces of ``own``, the other into pieces of
    ``other``; a step leads from a piece to the next in ``parts``.
    """
    at = span(block, BLOCK)
    inside = at < n
    i = at % N
    c = at // N % C
    part = at // N // C * (tl.cdiv(N, own) * others) + i // own * own_step
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    parts_ptr += part * 4 * C + C + c
    sums_ptr += at * others
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(others):
        r = tl.load(parts_ptr, mask=inside, other=0.0)
        size = tl.minimum(other, M - k * other).to(tl.float32)
        total += tl.load(sums_ptr, mask=inside, other=0.0) + size * (r - mean)
        parts_ptr += tl.full([], other_step, tl.int64) * 4 * C
        sums_ptr += 1
    tl.store(out_ptr + at, total / M, mask=inside)


@triton.jit(
    do_not_specialize=["B", "C", "H", "W", "band", "bands", "strip", "strips"],
    do_not_specialize_on_alignment=["rows_ptr", "columns_ptr", "row_ptr", "column_ptr"],
)
def center_kernel(
    rows_ptr, columns_ptr, row_ptr, column_ptr, parts_ptr, mean_ptr, B, C, H, W,
    band, bands, strip, strips, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean deviations along W and H from the sums that :func:`moments_kernel` left; a program owns
    BLOCK elements of the rows or of the columns."""
    block = tl.program_id(0)
    n = B.to(tl.int64) * C
    of_rows = tl.cdiv(n * H, BLOCK)
    if block < of_rows:
        center_axis(
            block, rows_ptr, row_ptr, parts_ptr, mean_ptr, n * H, C, H, W,
            band, strips, strip, strips, 1, BLOCK,
        )  # fmt: skip
    else:
        center_axis(
            block - of_rows, columns_ptr, column_ptr, parts_ptr, mean_ptr, n * W, C, W, H,
            strip, 1, band, bands, strips, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "width", "parts"])
def merge_kernel(
    parts_ptr, first_ptr, second_ptr, n, width, parts,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = parts[0, i] + parts[1, i] + ...``; a program owns BLOCK of ``width`` sums.

    The first n are those of one tensor, the rest those of another, if there is one.
    """
    at = span(tl.program_id(0), BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        here = (part < parts)[:, None] & (at < width)[None, :]
        tile = tl.load(
            parts_ptr + part.to(tl.int64)[:, None] * width + at[None, :], mask=here, other=0.0
        )
        total += tl.sum(tile, 0)
    tl.store(first_ptr + at, total.to(first_ptr.dtype.element_ty), mask=at < n)
    if second_ptr is not None:
        total = total.to(second_ptr.dtype.element_ty)
        tl.store(second_ptr + (at - n), total, mask=(at >= n) & (at < width))


# --- forward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "slope"], do_not_specialize_on_alignment=VECTORS)
def normalize_kernel(
    y_ptr, affine_ptr, row_ptr, column_ptr, out_ptr, C, H, W, slope,
    y_b, y_c, y_h, y_w, row_b, row_c, row_h, column_b, column_c, column_w,
    out_b, out_c, out_h, out_w, ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out = act(n(y) + row[i] + column[j])``; a program owns one tile."""
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    c_in, h_in, w_in = c < C, h < H, w < W
    inside = c_in & h_in & w_in
    mean, scale, shift = load_affine(affine_ptr, c, C)
    y = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside)
    z = (y - mean) * scale + shift
    if row_ptr is not None:
        z += load_axes(
            row_ptr, column_ptr, b, c, h, w, c_in, h_in, w_in,
            row_b, row_c, row_h, column_b, column_c, column_w,
        )  # fmt: skip
    z = activate(z, slope, ACTIVATION)
    store(out_ptr, b, c, h, w, out_b, out_c, out_h, out_w, inside, z)


@triton.jit(do_not_specialize=["H"])
def normalize_gate_kernel(
    x_ptr, y_ptr, x_affine_ptr, y_affine_ptr, out_ptr, C, H, W,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, out_b, out_c, out_h, out_w, HARD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out = sigma(n(x)) * n(y)``; a program owns one tile."""
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    inside = (c < C) & (h < H) & (w < W)
    x_mean, x_scale, x_shift = load_affine(x_affine_ptr, c, C)
    y_mean, y_scale, y_shift = load_affine(y_affine_ptr, c, C)
    x = load(x_ptr, b, c, h, w, x_b, x_c, x_h, x_w, inside)
    y = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside)
    weight = sigmoid((x - x_mean) * x_scale + x_shift, HARD)
    out = weight * ((y - y_mean) * y_scale + y_shift)
    store(out_ptr, b, c, h, w, out_b, out_c, out_h, out_w, inside, out)


# --- backward --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*_SIZES, "slope"], do_not_specialize_on_alignment=VECTORS)
def normalize_sums_kernel(
    gradient_ptr, y_ptr, affine_ptr, row_ptr, column_ptr, parts_ptr,
    C, H, W, band, bands, strips, slope, gradient_b, gradient_c, gradient_h, gradient_w,
    y_b, y_c, y_h, y_w, row_b, row_c, row_h, column_b, column_c, column_w,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``parts[part] = sum g, sum g * (y - mean)``; a program owns a band of a strip."""
    b, c, w, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    parts_ptr += ((b * bands + part) * strips + strip) * 2 * C + c
    stored = c < C
    c, w = c[:, None, None], w[None, None, :]
    h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    mean, scale, shift = load_affine(affine_ptr, c, C)
    sums = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    products = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    for _ in range(first, last, BLOCK_H):
        c_in, h_in, w_in = c < C, h < last, w < W
        inside = c_in & h_in & w_in
        g = load(gradient_ptr, b, c, h, w, gradient_b, gradient_c, gradient_h, gradient_w, inside)
        deviation = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside) - mean
        g = activate_backward(g, deviation * scale + shift, slope, ACTIVATION)
        if row_ptr is not None:
            g += load_axes(
                row_ptr, column_ptr, b, c, h, w, c_in, h_in, w_in,
                row_b, row_c, row_h, column_b, column_c, column_w,
            )  # fmt: skip
        sums += g
        products += g * deviation
        h += BLOCK_H
    tl.store(parts_ptr, tl.sum(tl.sum(sums, 2), 1), mask=stored)
    tl.store(parts_ptr + C, tl.sum(tl.sum(products, 2), 1), mask=stored)


@triton.jit(do_not_specialize=["H", "slope"], do_not_specialize_on_alignment=VECTORS)
def normalize_backward_kernel(
    gradient_ptr, y_ptr, affine_ptr, terms_ptr, row_ptr, column_ptr, out_ptr, C, H, W, slope,
    gradient_b, gradient_c, gradient_h, gradient_w, y_b, y_c, y_h, y_w,
    row_b, row_c, row_h, column_b, column_c, column_w, out_b, out_c, out_h, out_w,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out = scale * (g - terms[0] - (y - mean) * terms[1])``; a program owns one tile.

    Derivation: y reaches its loss by n(y), by the mean (every g of the channel: ``sum g / m``) and
    by the variance (``sum g (y - mean) / m``, and the deviation of y itself).
    """
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    c_in, h_in, w_in = c < C, h < H, w < W
    inside = c_in & h_in & w_in
    mean, scale, shift = load_affine(affine_ptr, c, C)
    offset, factor = load_terms(terms_ptr, c, C)
    g = load(gradient_ptr, b, c, h, w, gradient_b, gradient_c, gradient_h, gradient_w, inside)
    deviation = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside) - mean
    g = activate_backward(g, deviation * scale + shift, slope, ACTIVATION)
    if row_ptr is not None:
        g += load_axes(
            row_ptr, column_ptr, b, c, h, w, c_in, h_in, w_in,
            row_b, row_c, row_h, column_b, column_c, column_w,
        )  # fmt: skip
    dy = scale * (g - offset - deviation * factor)
    store(out_ptr, b, c, h, w, out_b, out_c, out_h, out_w, inside, dy)


@triton.jit(
    do_not_specialize=[*_SIZES, "slope"],
    do_not_specialize_on_alignment=[*VECTORS, "row_sums_ptr", "column_sums_ptr"],
)
def normalize_add_backward_kernel(
    gradient_ptr, y_ptr, affine_ptr, row_ptr, column_ptr, out_ptr, row_sums_ptr, column_sums_ptr,
    C, H, W, band, bands, strips, slope, gradient_b, gradient_c, gradient_h, gradient_w,
    y_b, y_c, y_h, y_w, row_b, row_c, row_h, column_b, column_c, column_w,
    out_b, out_c, out_h, out_w, ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``g = dout * act'(n(y) + row[i] + column[j])`` and its sums along W and H.

    A program owns a band of a strip; sums are ``(B, C, H, strips)`` and ``(B, C, W, bands)``.
    """
    b, c, w, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    rows = first + tl.arange(0, BLOCK_H)
    row_sums_ptr += ((b * C + c[:, None]) * H + rows[None, :]) * strips + strip
    column_sums_ptr += ((b * C + c[:, None]) * W + w[None, :]) * bands + part
    vectors_c, vectors_w = (c < C)[:, None], (w < W)[None, :]
    c, w = c[:, None, None], w[None, None, :]
    h = rows.to(tl.int64)[None, :, None]
    mean, scale, shift = load_affine(affine_ptr, c, C)
    along_h = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    for _ in range(first, last, BLOCK_H):
        c_in, h_in, w_in = c < C, h < last, w < W
        inside = c_in & h_in & w_in
        y = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside)
        z = (y - mean) * scale + shift + load_axes(
            row_ptr, column_ptr, b, c, h, w, c_in, h_in, w_in,
            row_b, row_c, row_h, column_b, column_c, column_w,
        )  # fmt: skip
        g = load(gradient_ptr, b, c, h, w, gradient_b, gradient_c, gradient_h, gradient_w, inside)
        g = activate_backward(g, z, slope, ACTIVATION)
        store(out_ptr, b, c, h, w, out_b, out_c, out_h, out_w, inside, g)
        tl.store(row_sums_ptr, tl.sum(g, 2), mask=vectors_c & (rows < last)[None, :])
        along_h += g
        row_sums_ptr += BLOCK_H * strips
        rows += BLOCK_H
        h += BLOCK_H
    tl.store(column_sums_ptr, tl.sum(along_h, 1), mask=vectors_c & vectors_w)


@triton.jit(do_not_specialize=["C"])
def normalize_affine_kernel(
    mean_ptr, deviations_ptr, weight_ptr, bias_ptr, affine_ptr, inverse_ptr, unbiased_ptr,
    C, count, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, scale and shift; 1/sqrt(var + eps); the unbiased variance. A program owns BLOCK
    channels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    deviations = tl.load(deviations_ptr + c, mask=inside, other=0.0)
    inverse = 1.0 / tl.sqrt_rn(deviations / count + eps)
    scale = inverse
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0.0)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0)
    tl.store(affine_ptr + c, mean, mask=inside)
    tl.store(affine_ptr + C + c, scale, mask=inside)
    tl.store(affine_ptr + 2 * C + c, shift, mask=inside)
    tl.store(inverse_ptr + c, inverse, mask=inside)
    tl.store(unbiased_ptr + c, deviations / (count - 1.0), mask=inside)


@triton.jit(do_not_specialize=["C"])
def normalize_terms_kernel(
    sums_ptr, inverse_ptr, terms_ptr, weight_ptr, C, count, BLOCK: tl.constexpr
):
    """The terms, and the gradient of the weight. A program owns BLOCK channels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    inverse = tl.load(inverse_ptr + c, mask=inside, other=0.0)
    factor = tl.load(sums_ptr + C + c, mask=inside, other=0.0) * inverse
    tl.store(terms_ptr + c, tl.load(sums_ptr + c, mask=inside, other=0.0) / count, mask=inside)
    tl.store(terms_ptr + C + c, factor * inverse / count, mask=inside)
    tl.store(weight_ptr + c, factor, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["parts_ptr"])
def normalize_gate_sums_kernel(
    gradient_ptr, x_ptr, y_ptr, x_affine_ptr, y_affine_ptr, parts_ptr,
    C, H, W, band, bands, strips, gradient_b, gradient_c, gradient_h, gradient_w,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, HARD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``parts[part]`` = the two sums of the gradient of n(x), then of that of n(y).

    A program owns a band of a strip.
    """
    b, c, w, first, last, part, strip = walk(C, H, band, bands, strips, BLOCK_C, BLOCK_W)
    parts_ptr += ((b * bands + part) * strips + strip) * 4 * C + c
    stored = c < C
    c, w = c[:, None, None], w[None, None, :]
    h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
    x_mean, x_scale, x_shift = load_affine(x_affine_ptr, c, C)
    y_mean, y_scale, y_shift = load_affine(y_affine_ptr, c, C)
    x_sums = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    x_products = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    y_sums = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    y_products = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], tl.float32)
    for _ in range(first, last, BLOCK_H):
        inside = (c < C) & (h < last) & (w < W)
        gradient = load(
            gradient_ptr, b, c, h, w, gradient_b, gradient_c, gradient_h, gradient_w, inside
        )
        x = load(x_ptr, b, c, h, w, x_b, x_c, x_h, x_w, inside) - x_mean
        y = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside) - y_mean
        of_x, of_y = through_gate(gradient, x * x_scale + x_shift, y * y_scale + y_shift, HARD)
        x_sums += of_x
        x_products += of_x * x
        y_sums += of_y
        y_products += of_y * y
        h += BLOCK_H
    tl.store(parts_ptr, tl.sum(tl.sum(x_sums, 2), 1), mask=stored)
    tl.store(parts_ptr + C, tl.sum(tl.sum(x_products, 2), 1), mask=stored)
    tl.store(parts_ptr + 2 * C, tl.sum(tl.sum(y_sums, 2), 1), mask=stored)
    tl.store(parts_ptr + 3 * C, tl.sum(tl.sum(y_products, 2), 1), mask=stored)


@triton.jit(do_not_specialize=["H"])
def normalize_gate_backward_kernel(
    gradient_ptr, x_ptr, y_ptr, x_affine_ptr, y_affine_ptr, x_terms_ptr, y_terms_ptr,
    dx_ptr, dy_ptr, C, H, W, gradient_b, gradient_c, gradient_h, gradient_w,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, dx_b, dx_c, dx_h, dx_w, dy_b, dy_c, dy_h, dy_w,
    HARD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``dx`` and ``dy``, each as ``normalize_backward`` has it; a program owns one tile."""
    b, c, h, w = place(C, H, W, BLOCK_C, BLOCK_H, BLOCK_W)
    inside = (c < C) & (h < H) & (w < W)
    x_mean, x_scale, x_shift = load_affine(x_affine_ptr, c, C)
    y_mean, y_scale, y_shift = load_affine(y_affine_ptr, c, C)
    x_offset, x_factor = load_terms(x_terms_ptr, c, C)
    y_offset, y_factor = load_terms(y_terms_ptr, c, C)
    gradient = load(
        gradient_ptr, b, c, h, w, gradient_b, gradient_c, gradient_h, gradient_w, inside
    )
    x = load(x_ptr, b, c, h, w, x_b, x_c, x_h, x_w, inside) - x_mean
    y = load(y_ptr, b, c, h, w, y_b, y_c, y_h, y_w, inside) - y_mean
    of_x, of_y = through_gate(gradient, x * x_scale + x_shift, y * y_scale + y_shift, HARD)
    dx = x_scale * (of_x - x_offset - x * x_factor)
    dy = y_scale * (of_y - y_offset - y * y_factor)
    store(dx_ptr, b, c, h, w, dx_b, dx_c, dx_h, dx_w, inside, dx)
    store(dy_ptr, b, c, h, w, dy_b, dy_c, dy_h, dy_w, inside, dy)


# --- launchers -------------------------------------------------------------------------------


def _cut(x: Tensor) -> Cut:
    """As ``squeeze.cut``, in shorter bands: these parts are merged by a second launch anyway."""
    b, c, h, w = x.shape
    tile = squeeze.tile(h, w, squeeze.by_channels(x))
    strips = cdiv(w, tile.w)
    programs = max(1, b * cdiv(c, tile.c) * strips)
    bands = min(cdiv(4 * multiprocessors(x.device), programs), cdiv(h, 2 * tile.h))
    band = cdiv(cdiv(h, bands), tile.h) * tile.h
    return Cut(tile, strips, cdiv(h, band), band)


def _halved(way: Cut) -> Cut:
    """With half a tile, for several maps and sums: a whole one takes the registers of two."""
    c, h, _ = way.tile
    smaller = {"c": c // 2} if c > 1 else {"h": h // 2}
    return way._replace(tile=way.tile._replace(**smaller))


def _parts(x: Tensor, way: Cut, sums: int) -> Tensor:
    """Where the programs of a cut leave ``sums`` numbers a channel, each its own."""
    b, c = x.shape[:2]
    shape = (b * way.bands * way.strips, sums, c)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _walk(kernel, x: Tensor, way: Cut, *arguments, **constants) -> None:
    """Launch a kernel whose programs walk down bands; ``arguments`` holds the sizes and them."""
    b, c = x.shape[:2]
    programs = b * cdiv(c, way.tile.c) * way.strips * way.bands
    constants |= squeeze.constants(way.tile) | all_registers(x)
    launch(kernel, programs, *arguments, **constants)


def _sizes(x: Tensor, way: Cut) -> tuple[int, ...]:
    return *x.shape[1:], way.band, way.bands, way.strips


def _strides(vector: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if vector is None else vector.stride()


def merge_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write the sums over the first axis of ``parts`` into one contiguous tensor, or two."""
    width = first.numel() + (0 if second is None else second.numel())
    launch(
        merge_kernel, cdiv(width, 32), parts, first, second, first.numel(), width, parts.shape[0],
        BLOCK_P=32, BLOCK=32, num_warps=4,
    )  # fmt: skip


def _merge_moments(parts: Tensor) -> tuple[Tensor, Tensor]:
    count, _, c = parts.shape
    mean, squares = parts.new_empty(c), parts.new_empty(c)
    launch(
        merge_moments_kernel, cdiv(c, 32), parts, mean, squares, c, count,
        BLOCK_P=32, BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    return mean, squares


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel, ``(C,)`` in float32; 0 of no image."""
    way = _cut(y)
    parts = _parts(y, way, 4)
    _walk(moments_kernel, y, way, y, parts, None, None, *_sizes(y, way), *y.stride())
    return _merge_moments(parts)


def axial_moments(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`moments`, and the mean deviations along W and H, ``(B, C, H)`` and ``(B, C, W)``."""
    b, c, h, w = y.shape
    way = _cut(y)
    parts = _parts(y, way, 4)
    row, column = parts.new_empty(b, c, h), parts.new_empty(b, c, w)
    rows, columns = squeeze.parts_of(row, way.strips), squeeze.parts_of(column, way.bands)
    _walk(moments_kernel, y, way, y, parts, rows, columns, *_sizes(y, way), *y.stride())
    mean, squares = _merge_moments(parts)
    launch(
        center_kernel, cdiv(row.numel(), 256) + cdiv(column.numel(), 256),
        rows, columns, row, column, parts, mean, b, c, h, w,
        way.band, way.bands, way.tile.w, way.strips, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return mean, squares, row, column


def normalize_affine(
    mean: Tensor, deviations: Tensor, weight: Tensor | None, bias: Tensor | None, count: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Affine, 1/sqrt(var + eps) and unbiased variance from moments; all contiguous, float32."""
    channels = mean.shape[0]
    affine = mean.new_empty(3, channels)
    inverse, unbiased = torch.empty_like(mean), torch.empty_like(mean)
    launch(
        normalize_affine_kernel, cdiv(channels, 256),
        mean, deviations, weight, bias, affine, inverse, unbiased,
        channels, float(count), eps, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return affine, inverse, unbiased


def normalize_terms(sums: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The terms of the backward, and the gradient of the weight; all contiguous, float32."""
    channels = inverse.shape[0]
    terms, weight = torch.empty_like(sums), torch.empty_like(inverse)
    launch(
        normalize_terms_kernel, cdiv(channels, 256),
        sums, inverse, terms, weight, channels, float(count), BLOCK=256, num_warps=4,
    )  # fmt: skip
    return terms, weight


def normalize(
    y: Tensor, affine: Tensor, row: Tensor | None, column: Tensor | None,
    activation: int, negative_slope: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """Write ``act(n(y) + row[..., None] + column[..., None, :])`` into ``out``; any strides."""
    programs, blocks = squeeze.tiles(out)
    launch(
        normalize_kernel, programs, y, affine, row, column, out, *y.shape[1:], negative_slope,
        *y.stride(), *_strides(row), *_strides(column), *out.stride(),
        ACTIVATION=activation, **blocks,
    )  # fmt: skip
    return out


def normalize_sums(
    gradient: Tensor, y: Tensor, affine: Tensor, row: Tensor | None, column: Tensor | None,
    activation: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    """``(2, C)``: the sums of ``g`` and of ``g * (y - mean)``."""
    way = _cut(y)
    parts = _parts(y, way, 2)
    _walk(
        normalize_sums_kernel, y, way, gradient, y, affine, row, column, parts, *_sizes(y, way),
        negative_slope, *gradient.stride(), *y.stride(), *_strides(row), *_strides(column),
        ACTIVATION=activation,
    )  # fmt: skip
    sums = parts.new_empty(2, y.shape[1])
    merge_parts(parts, sums)
    return sums


def normalize_backward(
    gradient: Tensor, y: Tensor, affine: Tensor, terms: Tensor,
    row: Tensor | None, column: Tensor | None,
    activation: int, negative_slope: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradient of y into ``out``."""
    programs, blocks = squeeze.tiles(out)
    launch(
        normalize_backward_kernel, programs, gradient, y, affine, terms, row, column, out,
        *y.shape[1:], negative_slope, *gradient.stride(), *y.stride(),
        *_strides(row), *_strides(column), *out.stride(), ACTIVATION=activation, **blocks,
    )  # fmt: skip
    return out


def normalize_add_backward(
    gradient: Tensor, y: Tensor, affine: Tensor, row: Tensor, column: Tensor,
    activation: int, negative_slope: float, out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of n(y), written into ``out``, and of row and column, in float32."""
    b, c, h, w = y.shape
    tile = squeeze.tile(h, w, squeeze.by_channels(out))
    way = _halved(squeeze.cut(out.shape, tile, out.device))
    row_sums, column_sums = affine.new_empty(b, c, h), affine.new_empty(b, c, w)
    rows = squeeze.parts_of(row_sums, way.strips)
    columns = squeeze.parts_of(column_sums, way.bands)
    _walk(
        normalize_add_backward_kernel, y, way, gradient, y, affine, row, column, out,
        rows, columns, *_sizes(y, way), negative_slope, *gradient.stride(), *y.stride(),
        *row.stride(), *column.stride(), *out.stride(), ACTIVATION=activation,
    )  # fmt: skip
    squeeze.combine(rows, row_sums, 1.0)
    squeeze.combine(columns, column_sums, 1.0)
    return out, row_sums, column_sums


def normalize_gate(
    x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor, hard: bool, out: Tensor
) -> Tensor:
    """Write ``sigma(n(x)) * n(y)`` into ``out``."""
    programs, blocks = squeeze.tiles(out)
    launch(
        normalize_gate_kernel, programs, x, y, x_affine, y_affine, out, *x.shape[1:],
        *x.stride(), *y.stride(), *out.stride(), HARD=hard, **blocks,
    )  # fmt: skip
    return out


def normalize_gate_sums(
    gradient: Tensor, x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    """``(2, C)`` each: the sums of :func:`normalize_sums` for n(x) and for n(y)."""
    way = _halved(_cut(x))
    parts = _parts(x, way, 4)
    _walk(
        normalize_gate_sums_kernel, x, way, gradient, x, y, x_affine, y_affine, parts,
        *_sizes(x, way), *gradient.stride(), *x.stride(), *y.stride(), HARD=hard,
    )  # fmt: skip
    x_sums, y_sums = (parts.new_empty(2, x.shape[1]) for _ in range(2))
    merge_parts(parts, x_sums, y_sums)
    return x_sums, y_sums


def normalize_gate_backward(
    gradient: Tensor, x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor,
    x_terms: Tensor, y_terms: Tensor, hard: bool, dx: Tensor, dy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradients of x and y into ``dx`` and ``dy``."""
    programs, blocks = squeeze.tiles(dx)
    launch(
        normalize_gate_backward_kernel, programs, gradient, x, y, x_affine, y_affine,
        x_terms, y_terms, dx, dy, *x.shape[1:], *gradient.stride(), *x.stride(), *y.stride(),
        *dx.stride(), *dy.stride(), HARD=hard, **blocks, **all_registers(x),
    )  # fmt: skip
    return dx, dy
