"""Squeeze-enhanced axial attention in plain PyTorch: the specification of every operator.

Letters: ``B C H W`` the map, ``N`` the length of an axis, ``D`` the key dimension and ``E`` the
value dimension of a head, ``DH = heads*E``, ``NQ = heads*(2D + E)``. The formulas are those of
SeaFormer (arXiv 2301.13156, section 3.2). Everything here is differentiable, runs on any device and
in any float dtype, and is written to be read: other backends are measured against it in float64.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The position of a name is its code in the operator schemas.
ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "silu")


def activate(
    x: Tensor, activation: str, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor:
    """``act(x)`` elementwise; ``negative_slope`` is used by ``leaky_relu`` alone."""
    if activation == "identity":
        return x
    if activation == "relu":
        return F.relu(x, inplace)
    if activation == "relu6":
        return F.relu6(x, inplace)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope, inplace)
    if activation == "silu":
        return F.silu(x, inplace)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")


def interpolate(table: Tensor, length: int) -> Tensor:
    """Resample a ``(1, channels, P)`` position table to ``(1, channels, length)``, linearly."""
    return F.interpolate(table, size=length, mode="linear", align_corners=False)


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is channels_last and not also contiguous, as a map of one pixel is."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def follow_layout(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in channels_last where ``x`` is that and nothing else, contiguous otherwise."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return out.contiguous(memory_format=layout)


def _widen(x: Tensor) -> Tensor:
    """At least float32: the axis vectors are few, and a softmax of half precision loses much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def axial_squeeze(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means along W and along H: ``(B, C, H, W) -> (B, C, H), (B, C, W)``."""
    return x.mean(3), x.mean(2)


def axial_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """``o[:, i] = sum_j softmax_j(scale * q[:, i] . k[:, j]) v[:, j]`` within each head.

    ``q, k: (B, heads*D, N)``, ``v: (B, heads*E, N)`` -> ``(B, heads*E, N)``, in float32 within.
    """
    b, _, n = q.shape
    dtype = q.dtype
    q, k, v = (_widen(t).reshape(b, heads, t.shape[1] // heads, n) for t in (q, k, v))
    attention = (torch.matmul(q.transpose(2, 3), k) * scale).softmax(dim=-1)
    out = torch.matmul(v, attention.transpose(2, 3))
    return out.reshape(b, heads * out.shape[2], n).to(dtype)


def axial_attention_pair(
    row: Tensor,
    column: Tensor,
    row_q: Tensor,
    row_k: Tensor,
    column_q: Tensor,
    column_k: Tensor,
    heads: int,
    key_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Both axial attentions from the squeezed q, k, v and the position tables of q and k.

    ``row: (B, NQ, H)``, ``column: (B, NQ, W)``, tables ``(1, heads*D, P)``
    -> ``(B, DH, H)``, ``(B, DH, W)``.
    """

    def attend(axis: Tensor, table_q: Tensor, table_k: Tensor) -> Tensor:
        width, n = heads * key_dim, axis.shape[2]
        q, k, v = _widen(axis).split([width, width, axis.shape[1] - 2 * width], dim=1)
        q = q + interpolate(_widen(table_q), n)
        k = k + interpolate(_widen(table_k), n)
        return axial_attention(q, k, v, heads, scale).to(axis.dtype)

    return attend(row, row_q, row_k), attend(column, column_q, column_k)


def broadcast_add(
    v: Tensor, row: Tensor, column: Tensor, activation: str, negative_slope: float = 0.01
) -> Tensor:
    """``act(v + row[..., None] + column[..., None, :])``, in the layout of ``v``."""
    total = v + (row[..., :, None] + column[..., None, :])
    return follow_layout(activate(total, activation, negative_slope), v)


def gate(x: Tensor, y: Tensor, hard: bool = True) -> Tensor:
    """``h_sigmoid(x) * y`` with ``h_sigmoid(t) = relu6(t + 3)/6``, or ``sigmoid(x) * y``."""
    weight = F.relu6(x + 3) / 6 if hard else x.sigmoid()
    return follow_layout(weight * y, x)


def sea_attention(block: nn.Module, x: Tensor) -> Tensor:
    """The whole block, step by step as upstream's eager forward, by the submodules of ``block``.

    ``block`` has upstream's attributes: ``to_q, to_k, to_v, pos_emb_{row,column}{q,k},
    proj_encode_{row,column}, proj, dwconv, act, pwconv, sigmoid, num_heads, scale``.
    """
    q, k, v = block.to_q(x), block.to_k(x), block.to_v(x)
    detail = block.pwconv(block.act(block.dwconv(torch.cat([q, k, v], dim=1))))

    def attend(dim: int, position_q: nn.Module, position_k: nn.Module) -> Tensor:
        q_axis, k_axis, v_axis = position_q(q.mean(dim)), position_k(k.mean(dim)), v.mean(dim)
        b, _, n = q_axis.shape
        heads = block.num_heads
        q_axis, k_axis, v_axis = (
            t.reshape(b, heads, t.shape[1] // heads, n) for t in (q_axis, k_axis, v_axis)
        )
        attention = (torch.matmul(q_axis.transpose(2, 3), k_axis) * block.scale).softmax(dim=-1)
        out = torch.matmul(attention, v_axis.transpose(2, 3))
        return out.transpose(2, 3).reshape(b, v.shape[1], n)

    row = attend(3, block.pos_emb_rowq, block.pos_emb_rowk)
    column = attend(2, block.pos_emb_columnq, block.pos_emb_columnk)
    row = block.proj_encode_row(row[..., :, None])
    column = block.proj_encode_column(column[..., None, :])
    return block.sigmoid(block.proj(v + (row + column))) * detail


def squeeze_first(height: int, width: int) -> bool:
    """Whether to average ``x`` and project the means, or to project ``x`` and average that.

    Both give the same axis vectors. The first multiplies ``H + W`` more columns by the
    ``NQ x C`` weights, the second reads a map of ``NQ`` channels again instead of ``C``.
    """
    return 8 * (height + width) <= height * width


def sea_attention_folded(
    x: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    key_dim: int,
    activation: str,
    negative_slope: float,
    hard: bool,
) -> Tensor:
    """The whole block in eval mode from folded weights (the fields of ``fold.BlockWeights``).

    The axis vectors come from the two means of ``x`` where that is cheaper: a 1x1 convolution
    commutes with a mean. They are few, so they stay in the dtype of the biases, at least float32.
    The projection of a mean rounds once where the mean of a projection averages the roundings of a
    whole row: ``axis_weight`` is wider than the other weights to make up for it.
    """
    (
        qkv_weight, qkv_bias, dw_weight, dw_bias, pw_weight, pw_bias, row_weight, row_bias,
        column_weight, column_bias, proj_weight, proj_bias, axis_weight, position,
    ) = weights  # fmt: skip
    height, width = x.shape[2:]
    wide = qkv_bias.dtype
    keys = heads * key_dim

    def project(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(t, weight[:, :, None, None], bias.to(t.dtype))

    # In place where a map is ours: on a CPU these maps are many times a cache.
    qkv = project(x, qkv_weight, qkv_bias)
    if squeeze_first(height, width):
        means = torch.cat([x.mean(3, dtype=wide), x.mean(2, dtype=wide)], dim=2)
        axis = torch.matmul(axis_weight, means.to(axis_weight.dtype)).to(wide) + qkv_bias[:, None]
    else:
        axis = torch.cat([qkv.mean(3, dtype=wide), qkv.mean(2, dtype=wide)], dim=2)
    queries_keys = axis[:, : 2 * keys] + position
    values = axis[:, 2 * keys :]

    def attend(start: int, length: int, weight: Tensor, bias: Tensor) -> Tensor:
        q, k = queries_keys.narrow(2, start, length).split(keys, dim=1)
        v = values.narrow(2, start, length)
        out = activate(axial_attention(q, k, v, heads, key_dim**-0.5), activation, negative_slope)
        return (torch.matmul(weight.to(wide), out) + bias[:, None]).to(x.dtype)

    row = attend(0, height, row_weight, row_bias)
    column = attend(height, width, column_weight, column_bias)
    mixed = (qkv[:, 2 * keys :] + row[..., :, None]).add_(column[..., None, :])
    mixed = activate(mixed, activation, negative_slope, inplace=True)
    weight = project(mixed, proj_weight, proj_bias)
    weight = F.hardsigmoid(weight, inplace=True) if hard else weight.sigmoid_()
    local = F.conv2d(
        qkv, dw_weight[:, None], dw_bias.to(x.dtype), padding=1, groups=dw_weight.shape[0]
    )
    local = activate(local, activation, negative_slope, inplace=True)
    return follow_layout(weight.mul_(project(local, pw_weight, pw_bias)), x)
