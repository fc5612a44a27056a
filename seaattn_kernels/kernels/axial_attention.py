"""Softmax attention along both squeezed axes of a block, all heads, in one launch.

Along an axis of length N, for each image and head, with the position tables interpolated to N:

    q = x_q + interp(table_q)        k = x_k + interp(table_k)        v = x_v
    p[i, j] = softmax_j(scale * q[i] . k[j])                          o[i] = sum_j p[i, j] v[j]

A program owns BLOCK queries of one head of one image on one axis, and walks over the keys with a
running maximum and sum (online softmax), so that no N x N matrix exists. Arithmetic is float32. D
and E are padded with zeros to powers of two from 16 on, the least that a product of tiles takes.

Backward makes p again from the logarithm of its normaliser. With do the gradient of o,

    dp = do v^T        delta = sum_j p dp        ds = p (dp - delta)
    dq = scale ds k    dk = scale ds^T q         dv = p^T do

A first kernel makes the normaliser and delta of every query. In the second a program owns BLOCK
positions: it walks over the keys for dq, then over the queries for dk and dv. The third carries dq
and dk back through the interpolation to the tables, over the batch in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from seaattn_kernels.kernels.launch import cdiv, launch, power_of_2, precision

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_RUNTIME = ["H", "W", "row_q_len", "row_k_len", "column_q_len", "column_k_len"]
_RUNTIME += ["programs", "scale", "heads"]


@triton.jit
def between(n, length, ratio):
    """Where linear interpolation (align_corners=False) looks: two indices, the second's weight."""
    position = tl.maximum((n + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), length - 1)
    return low, tl.minimum(low + 1, length - 1), position - low


@triton.jit
def load(x_ptr, table_ptr, c, n, N, length, inside):
    """``x[c, n] + interp(table)[c, n]`` in float32, zero outside; c and n broadcast."""
    low, high, weight = between(n, length, length / N)
    x = tl.load(x_ptr + c * N + n, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(table_ptr + c * length + low, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(table_ptr + c * length + high, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x + (first * (1 - weight) + second * weight), 0.0)


@triton.jit
def scores(q, k, j, N, PRECISION: tl.constexpr):
    """``q k`` for queries (BLOCK, D) and keys (D, BLOCK), minus infinity beyond the axis."""
    product = tl.dot(q, k, input_precision=PRECISION)
    return tl.where(j[None, :] < N, product, float("-inf"))


@triton.jit
def owned(pid, N, heads, BLOCK: tl.constexpr):
    """The image, the head and the positions of a program, counted along its axis."""
    blocks = tl.cdiv(N, BLOCK)
    b = (pid // blocks // heads).to(tl.int64)
    return b, (pid // blocks) % heads, (pid % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def online(s, largest, total):
    """A step of the online softmax: exponentials of ``s``, what earlier sums shrink by, and the
    running maximum and sum."""
    now = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(now == float("-inf"), 0.0, now)  # no finite score yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(largest - base)
    return p, shrink, now, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=_RUNTIME)
def attention_kernel(
    row_ptr, column_ptr, row_q_ptr, row_k_ptr, column_q_ptr, column_k_ptr,
    row_out_ptr, column_out_ptr, H, W, row_q_len, row_k_len, column_q_len, column_k_len,
    programs, scale, heads, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < programs:
        x_ptr, q_table, k_table, out_ptr = row_ptr, row_q_ptr, row_k_ptr, row_out_ptr
        N, q_len, k_len = H, row_q_len, row_k_len
    else:
        x_ptr, q_table, k_table, out_ptr = column_ptr, column_q_ptr, column_k_ptr, column_out_ptr
        N, q_len, k_len = W, column_q_len, column_k_len
        pid -= programs
    b, head, i = owned(pid, N, heads, BLOCK)
    x_ptr += b * (heads * (2 * D + E) * N)
    q_ptr = x_ptr + head * D * N
    k_ptr = x_ptr + (heads + head) * D * N
    v_ptr = x_ptr + (2 * heads * D + head * E) * N
    q_table += head * D * q_len
    k_table += head * D * k_len
    out_ptr += b * (heads * E * N) + head * E * N

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = (i[:, None] < N) & (d[None, :] < D)
    q = load(q_ptr, q_table, d[None, :], i[:, None], N, q_len, inside) * (scale * _LOG2E)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        in_d = (j[None, :] < N) & (d[:, None] < D)
        k = load(k_ptr, k_table, d[:, None], j[None, :], N, k_len, in_d)
        in_e = (j[:, None] < N) & (e[None, :] < E)
        v = tl.load(v_ptr + e[None, :] * N + j[:, None], mask=in_e, other=0.0).to(tl.float32)
        s = scores(q, k, j, N, PRECISION)
        p, shrink, largest, total = online(s, largest, total)
        out = out * shrink[:, None] + tl.dot(p, v, input_precision=PRECISION)
    inside = (i[:, None] < N) & (e[None, :] < E)
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + e[None, :] * N + i[:, None], out, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def statistics_kernel(
    row_ptr, column_ptr, row_q_ptr, row_k_ptr, column_q_ptr, column_k_ptr,
    row_gradient_ptr, column_gradient_ptr, row_statistics_ptr, column_statistics_ptr,
    H, W, row_q_len, row_k_len, column_q_len, column_k_len, programs, scale, heads,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each query the logarithm (base 2) of its normaliser, and delta: ``(B, heads, 2, N)``."""
    pid = tl.program_id(0)
    if pid < programs:
        x_ptr, q_table, k_table, gradient_ptr = row_ptr, row_q_ptr, row_k_ptr, row_gradient_ptr
        out_ptr = row_statistics_ptr
        N, q_len, k_len = H, row_q_len, row_k_len
    else:
        x_ptr, q_table, k_table = column_ptr, column_q_ptr, column_k_ptr
        gradient_ptr = column_gradient_ptr
        out_ptr = column_statistics_ptr
        N, q_len, k_len = W, column_q_len, column_k_len
        pid -= programs
    b, head, i = owned(pid, N, heads, BLOCK)
    x_ptr += b * (heads * (2 * D + E) * N)
    q_ptr = x_ptr + head * D * N
    k_ptr = x_ptr + (heads + head) * D * N
    v_ptr = x_ptr + (2 * heads * D + head * E) * N
    q_table += head * D * q_len
    k_table += head * D * k_len
    gradient_ptr += b * (heads * E * N) + head * E * N
    out_ptr += b * (heads * 2 * N) + head * 2 * N

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = (i[:, None] < N) & (d[None, :] < D)
    q = load(q_ptr, q_table, d[None, :], i[:, None], N, q_len, inside) * (scale * _LOG2E)
    inside = (i[:, None] < N) & (e[None, :] < E)
    gradient = tl.load(gradient_ptr + e[None, :] * N + i[:, None], mask=inside, other=0.0)
    gradient = gradient.to(tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        in_d = (j[None, :] < N) & (d[:, None] < D)
        k = load(k_ptr, k_table, d[:, None], j[None, :], N, k_len, in_d)
        in_e = (j[None, :] < N) & (e[:, None] < E)
        v = tl.load(v_ptr + e[:, None] * N + j[None, :], mask=in_e, other=0.0).to(tl.float32)
        s = scores(q, k, j, N, PRECISION)
        p, shrink, largest, total = online(s, largest, total)
        dp = tl.dot(gradient, v, input_precision=PRECISION)
        delta = delta * shrink + tl.sum(p * dp, 1)
    tl.store(out_ptr + i, largest + tl.log2(total), mask=i < N)
    tl.store(out_ptr + N + i, delta / total, mask=i < N)


@triton.jit(do_not_specialize=_RUNTIME)
def attention_backward_kernel(
    row_ptr, column_ptr, row_q_ptr, row_k_ptr, column_q_ptr, column_k_ptr,
    row_gradient_ptr, column_gradient_ptr, row_statistics_ptr, column_statistics_ptr,
    row_out_ptr, column_out_ptr,
    H, W, row_q_len, row_k_len, column_q_len, column_k_len, programs, scale, heads,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v, in the places of q, k and v in the axis vectors."""
    pid = tl.program_id(0)
    if pid < programs:
        x_ptr, q_table, k_table, gradient_ptr = row_ptr, row_q_ptr, row_k_ptr, row_gradient_ptr
        statistics_ptr, out_ptr = row_statistics_ptr, row_out_ptr
        N, q_len, k_len = H, row_q_len, row_k_len
    else:
        x_ptr, q_table, k_table = column_ptr, column_q_ptr, column_k_ptr
        gradient_ptr = column_gradient_ptr
        statistics_ptr, out_ptr = column_statistics_ptr, column_out_ptr
        N, q_len, k_len = W, column_q_len, column_k_len
        pid -= programs
    b, head, i = owned(pid, N, heads, BLOCK)
    x_ptr += b * (heads * (2 * D + E) * N)
    out_ptr += b * (heads * (2 * D + E) * N)
    q_at = head * D * N
    k_at = (heads + head) * D * N
    v_at = (2 * heads * D + head * E) * N
    q_table += head * D * q_len
    k_table += head * D * k_len
    gradient_ptr += b * (heads * E * N) + head * E * N
    statistics_ptr += b * (heads * 2 * N) + head * 2 * N

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    of_d = (i[:, None] < N) & (d[None, :] < D)
    of_e = (i[:, None] < N) & (e[None, :] < E)
    q = load(x_ptr + q_at, q_table, d[None, :], i[:, None], N, q_len, of_d) * (scale * _LOG2E)
    do = tl.load(gradient_ptr + e[None, :] * N + i[:, None], mask=of_e, other=0.0).to(tl.float32)
    normaliser = tl.load(statistics_ptr + i, mask=i < N, other=0.0)
    delta = tl.load(statistics_ptr + N + i, mask=i < N, other=0.0)

    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        in_d = (j[:, None] < N) & (d[None, :] < D)
        k_j = load(x_ptr + k_at, k_table, d[None, :], j[:, None], N, k_len, in_d)
        in_e = (j[:, None] < N) & (e[None, :] < E)
        v_j = tl.load(x_ptr + v_at + e[None, :] * N + j[:, None], mask=in_e, other=0.0)
        p = tl.exp2(scores(q, tl.trans(k_j), j, N, PRECISION) - normaliser[:, None])
        dp = tl.dot(do, tl.trans(v_j.to(tl.float32)), input_precision=PRECISION)
        dq += tl.dot(p * (dp - delta[:, None]), k_j, input_precision=PRECISION)
    dq = (dq * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_at + d[None, :] * N + i[:, None], dq, mask=of_d)

    k = load(x_ptr + k_at, k_table, d[None, :], i[:, None], N, k_len, of_d)
    v = tl.load(x_ptr + v_at + e[None, :] * N + i[:, None], mask=of_e, other=0.0).to(tl.float32)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        in_d = (j[:, None] < N) & (d[None, :] < D)
        q_j = load(x_ptr + q_at, q_table, d[None, :], j[:, None], N, q_len, in_d)
        q_j = q_j * (scale * _LOG2E)
        in_e = (j[:, None] < N) & (e[None, :] < E)
        do_j = tl.load(gradient_ptr + e[None, :] * N + j[:, None], mask=in_e, other=0.0)
        do_j = do_j.to(tl.float32)
        normaliser_j = tl.load(statistics_ptr + j, mask=j < N, other=float("inf"))
        delta_j = tl.load(statistics_ptr + N + j, mask=j < N, other=0.0)
        # Here the keys stand in rows, and a query beyond the axis has the probability zero.
        s = tl.dot(k, tl.trans(q_j), input_precision=PRECISION)
        p = tl.exp2(s - normaliser_j[None, :])
        dv += tl.dot(p, do_j, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do_j), input_precision=PRECISION)
        dk += tl.dot(p * (dp - delta_j[None, :]), q_j, input_precision=PRECISION)
    dk = (dk * _LN2).to(out_ptr.dtype.element_ty)  # the scale is in q already, and log2(e)
    tl.store(out_ptr + k_at + d[None, :] * N + i[:, None], dk, mask=of_d)
    tl.store(
        out_ptr + v_at + e[None, :] * N + i[:, None], dv.to(out_ptr.dtype.element_ty), mask=of_e
    )


@triton.jit(do_not_specialize=["B", "projected", "width", *_RUNTIME[:6]])
def tables_kernel(
    row_ptr, column_ptr, row_q_ptr, row_k_ptr, column_q_ptr, column_k_ptr,
    B, projected, width, H, W, row_q_len, row_k_len, column_q_len, column_k_len,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``dtable[c, p] = sum over images and n of dx[c, n] * weight of p at n``.

    A program owns BLOCK_C channels and BLOCK_P entries of one of the four tables.
    """
    pid = tl.program_id(0)
    table = pid % 4
    pid = pid // 4
    x_ptr, out_ptr, N, length = row_ptr, row_q_ptr, H, row_q_len
    if table == 1:
        out_ptr, length = row_k_ptr, row_k_len
    if table == 2:
        x_ptr, out_ptr, N, length = column_ptr, column_q_ptr, W, column_q_len
    if table == 3:
        x_ptr, out_ptr, N, length = column_ptr, column_k_ptr, W, column_k_len
    blocks = tl.cdiv(width, BLOCK_C)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (pid // blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += (table % 2) * width * N
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        low, high, weight = between(n, length, length / N)
        share = tl.where(low[:, None] == p[None, :], 1 - weight[:, None], 0.0)
        share += tl.where(high[:, None] == p[None, :], weight[:, None], 0.0)
        inside = (c[:, None] < width) & (n[None, :] < N)
        dx = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        image = x_ptr
        for _ in range(B):
            dx += tl.load(image + c[:, None] * N + n[None, :], mask=inside, other=0.0)
            image += projected * N
        total += tl.dot(dx, share, input_precision="ieee")
    inside = (c[:, None] < width) & (p[None, :] < length)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + c[:, None] * length + p[None, :], total, mask=inside)


def _sizes(row: Tensor, column: Tensor, tables: list[Tensor], heads: int, key_dim: int) -> tuple:
    """The runtime and the compile-time arguments that all kernels share, and their grid."""
    b, projected, h = row.shape
    w = column.shape[2]
    value_dim = projected // heads - 2 * key_dim
    block_d, block_e = power_of_2(key_dim, least=16), power_of_2(value_dim, least=16)
    # Larger blocks, fewer warps or prefetched tiles spill in the backward (docs/notes/triton.md).
    block, warps = 16, {48: 2, 64: 4, 80: 4}.get(block_d + block_e, 8)
    programs, others = (b * heads * cdiv(n, block) for n in (h, w))
    runtime = (h, w, *(table.shape[2] for table in tables), programs)
    constants = {
        "D": key_dim, "E": value_dim, "BLOCK": block, "BLOCK_D": block_d, "BLOCK_E": block_e,
        "PRECISION": precision(row), "num_warps": warps, "num_stages": 1,
    }  # fmt: skip
    return programs + others, runtime, constants


def axial_attention_pair(
    row: Tensor, column: Tensor, tables: list[Tensor], heads: int, key_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``(B, NQ, H)``, ``(B, NQ, W)``, four ``(1, heads*D, P)`` -> ``(B, DH, H)``, ``(B, DH, W)``.

    All arguments contiguous.
    """
    programs, runtime, constants = _sizes(row, column, tables, heads, key_dim)
    values = heads * constants["E"]
    out = tuple(axis.new_empty(axis.shape[0], values, axis.shape[2]) for axis in (row, column))
    launch(
        attention_kernel, programs, row, column, *tables, *out, *runtime, scale, heads, **constants
    )
    return out


def axial_attention_pair_backward(
    row_gradient: Tensor, column_gradient: Tensor, row: Tensor, column: Tensor,
    tables: list[Tensor], heads: int, key_dim: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of row, column and the four tables; all arguments contiguous."""
    programs, runtime, constants = _sizes(row, column, tables, heads, key_dim)
    b, projected, h = row.shape
    out = torch.empty_like(row), torch.empty_like(column)
    if b == 0:
        return (*out, *(torch.zeros_like(table) for table in tables))
    statistics = [
        axis.new_empty(b, heads, 2, axis.shape[2], dtype=torch.float32) for axis in (row, column)
    ]
    table_gradients = [torch.empty_like(table) for table in tables]
    width = heads * key_dim
    longest = max(table.shape[2] for table in tables)
    inputs = (row, column, *tables, row_gradient, column_gradient, *statistics)
    launch(statistics_kernel, programs, *inputs, *runtime, scale, heads, **constants)
    launch(attention_backward_kernel, programs, *inputs, *out, *runtime, scale, heads, **constants)
    launch(
        tables_kernel, 4 * cdiv(width, 16) * cdiv(longest, 16),
        *out, *table_gradients, b, projected, width, h, column.shape[2],
        *(table.shape[2] for table in tables), BLOCK_C=16, BLOCK_N=32, BLOCK_P=16, num_warps=4,
    )  # fmt: skip
    return (*out, *table_gradients)
