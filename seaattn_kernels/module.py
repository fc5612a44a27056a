"""``SeaAttention``: upstream's module, on the operators of this package."""

import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from seaattn_kernels import ops, reference
from seaattn_kernels.checks import check_input
from seaattn_kernels.fold import TABLES, FoldCache, bypass_obstacle
from seaattn_kernels.layers import (
    Conv2d_BN,
    HSigmoid,
    SqueezeAxialPositionalEmbedding,
    activation_name,
    make_activation,
)

#: Length of the learned position tables.
_POSITIONS = 16


class SeaAttention(nn.Module):
    """Squeeze-enhanced axial attention (SeaFormer, arXiv 2301.13156, section 3.2).

    ::

        q, k, v = BN(Wq x), BN(Wk x), BN(Wv x)
        row     = BN(Wer act(attention of the row means))        column the same
        gate    = h_sigmoid(BN(Wp act(v + row[..., :, None] + column[..., None, :])))
        detail  = BN(Wpw act(BN(dw3x3(cat(q, k, v)))))
        out     = gate * detail

    ``(B, C, H, W) -> (B, C, H, W)``, in the layout and dtype of the input (autocast's under
    autocast). Parameters, buffers, their names and their initialisation are upstream's; proj and
    the two encodes start with a BatchNorm weight of 0, so a fresh block puts out ``0.5 * detail``.

    In eval mode without gradients the block runs from folded weights, :func:`ops.sea_attention`.
    They follow in-place updates, optimizers, ``load_state_dict``, ``.half()``, ``.to()``; they do
    not see what moves no version counter: writes through ``.data``, collectives of
    ``torch.distributed`` on a parameter, fused updates outside ``torch.optim``. Call :meth:`refold`
    after those. Otherwise the block runs its submodules and the differentiable operators. Where a
    submodule was replaced or carries a hook, the block does what its submodules do.

    Args:
        dim: channels C.
        key_dim: D, channels of a query or key of one head.
        num_heads: number of heads.
        attn_ratio: a head's values have ``E = int(attn_ratio * D)`` channels.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"identity"``, the
            ``nn`` class or an instance of it; None means ReLU6.
        norm_cfg: None or ``dict(type="BN" | "BN2d" | "SyncBN", eps=..., momentum=...,
            requires_grad=...)``.
        backend: ``"auto"``, ``"reference"``, ``"triton"``, ``"cpu"`` or ``"cuda"``; an explicit one
            never falls back.

    Raises:
        TypeError, ValueError: for a bad argument, or an input of wrong type, dtype, rank, channels.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int = 16,
        num_heads: int = 4,
        attn_ratio: float = 2,
        activation: str | type[nn.Module] | nn.Module | None = None,
        norm_cfg: Mapping | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("key_dim", key_dim), ("num_heads", num_heads)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        dim, key_dim, num_heads = int(dim), int(key_dim), int(num_heads)
        if not isinstance(attn_ratio, Real) or not math.isfinite(attn_ratio):
            raise ValueError(f"attn_ratio must be a finite number, got {attn_ratio!r}")
        if int(attn_ratio * key_dim) < 1:
            raise ValueError(
                f"attn_ratio * key_dim must be at least 1, got {attn_ratio} * {key_dim}"
            )
        ops.check_backend(backend)
        self.backend = backend
        self.dim = dim
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.scale = key_dim**-0.5
        self.attn_ratio = attn_ratio
        self.d = int(attn_ratio * key_dim)
        self.nh_kd = keys = key_dim * num_heads
        self.dh = values = self.d * num_heads
        projected = 2 * keys + values

        def encode(channels: int) -> nn.Sequential:
            layer = Conv2d_BN(values, channels, bn_weight=0.0, norm_cfg=norm_cfg)
            return nn.Sequential(make_activation(activation), layer)

        # The order is upstream's: a seed gives the same weights.
        self.to_q = Conv2d_BN(dim, keys, norm_cfg=norm_cfg)
        self.to_k = Conv2d_BN(dim, keys, norm_cfg=norm_cfg)
        self.to_v = Conv2d_BN(dim, values, norm_cfg=norm_cfg)
        self.proj = encode(dim)
        self.proj_encode_row = encode(values)
        self.pos_emb_rowq = SqueezeAxialPositionalEmbedding(keys, _POSITIONS)
        self.pos_emb_rowk = SqueezeAxialPositionalEmbedding(keys, _POSITIONS)
        self.proj_encode_column = encode(values)
        self.pos_emb_columnq = SqueezeAxialPositionalEmbedding(keys, _POSITIONS)
        self.pos_emb_columnk = SqueezeAxialPositionalEmbedding(keys, _POSITIONS)
        self.dwconv = Conv2d_BN(
            projected, projected, kernel_size=3, padding=1, groups=projected, norm_cfg=norm_cfg
        )
        self.act = make_activation(activation)
        self.pwconv = Conv2d_BN(projected, dim, norm_cfg=norm_cfg)
        self.sigmoid = HSigmoid()
        self._folds = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        if ops.transformed() and self.backend in ("auto", "reference"):
            return reference.sea_attention(self, x)
        if torch.is_grad_enabled() and self._differentiates(x):
            self._folds.drop()
        elif (folded := self._folds.get(self)) is not None:
            return ops.sea_attention(x, folded, self.backend)
        weight = getattr(getattr(self.to_q, "c", None), "weight", None)
        if isinstance(weight, Tensor):
            check_input(x, weight)
        return reference.follow_layout(self._forward_layers(x), x)

    def refold(self) -> None:
        """Forget the folded weights, after an update that they cannot see (see the class)."""
        self._folds.drop()

    def train(self, mode: bool = True) -> "SeaAttention":
        self._folds.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"key_dim={self.key_dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _differentiates(self, x: Tensor) -> bool:
        if any(parameter.requires_grad for parameter in self.parameters()):
            return True
        return isinstance(x, Tensor) and x.requires_grad

    def _forward_layers(self, x: Tensor) -> Tensor:
        """The submodules, with operators for those that :func:`fold.bypass_obstacle` checks."""
        if reason := bypass_obstacle(self):
            if self.backend not in ("auto", "reference"):
                raise RuntimeError(f"backend {self.backend!r} cannot run this block: {reason}")
            return reference.sea_attention(self, x)
        activation = activation_name(self.proj[0])
        negative_slope = getattr(self.proj[0], "negative_slope", 0.0)
        tables = [getattr(self, name).pos_embed for name in TABLES]
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        qkv = torch.cat([q, k, v], dim=1)
        row, column = ops.axial_squeeze(qkv, self.backend)
        row, column = ops.axial_attention_pair(
            row, column, tables, self.num_heads, self.key_dim, self.scale, self.backend
        )
        row = self.proj_encode_row(row[..., :, None])[..., 0]
        column = self.proj_encode_column(column[..., None, :])[..., 0, :]
        mixed = ops.broadcast_add(v, row, column, activation, negative_slope, self.backend)
        detail = self.pwconv(self.act(self.dwconv(qkv)))
        return ops.gate(self.proj[1](mixed), detail, backend=self.backend)

    def _apply(self, *args, **kwargs) -> "SeaAttention":
        self._folds.drop()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        # Copies and pickles fold for themselves.
        state = self.__dict__.copy()
        state.pop("_folds")
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._folds = FoldCache()

    def _replicate_for_data_parallel(self) -> "SeaAttention":
        replica = super()._replicate_for_data_parallel()
        replica._folds = FoldCache()
        return replica


Sea_Attention = SeaAttention
