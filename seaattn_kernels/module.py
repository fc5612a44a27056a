"""``SeaAttention``: upstream's module, on the operators of this package."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from seaattn_kernels import ops, reference, training
from seaattn_kernels.anatomy import Obstacle
from seaattn_kernels.checks import check_input
from seaattn_kernels.fold import FoldCache
from seaattn_kernels.layers import (
    Conv2d_BN,
    HSigmoid,
    SqueezeAxialPositionalEmbedding,
    make_activation,
)

#: Length of the learned position tables.
_POSITIONS = 16


def run(
    block: nn.Module,
    x: Tensor,
    folds: FoldCache,
    backend: str,
    eager: Callable[[Tensor], Tensor],
) -> Tensor:
    """The forward of a block by the operators, or by ``eager`` where they cannot stand in.

    In eval mode without gradients from folded weights, otherwise by the training pass. For ONNX and
    under ``torch.jit.trace`` by ``eager``, whatever the backend: what is written is read by others.
    """
    if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        out = folds.repeat(block, x, backend)
        if out is not None:
            return out
    if backend in ("auto", "reference") and ops.transformed():
        return eager(x)
    # Other runtimes know standard operators only.
    onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    if onnx or torch.jit.is_tracing():
        return eager(x)
    try:
        if torch.is_grad_enabled() and _differentiates(block, x):
            folds.drop_weights()
        elif (folded := folds.get(block)) is not None:
            return ops.sea_attention(x, folded, backend)
        anatomy = folds.anatomy(block)
        check_input(x, anatomy.convolutions[0].conv.weight)
        return reference.follow_layout(training.forward(anatomy, x, backend), x)
    except Obstacle as reason:
        if backend not in ("auto", "reference"):
            message = f"backend {backend!r} cannot run this block: {reason}"
            raise RuntimeError(message) from None
        return eager(x)


def _differentiates(block: nn.Module, x: Tensor) -> bool:
    if any(parameter.requires_grad for parameter in block.parameters()):
        return True
    return isinstance(x, Tensor) and x.requires_grad


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
    after those. Otherwise it runs the training pass (:mod:`training`), which keeps maps as the
    convolutions put them out and normalises them where they are read; BatchNorm is that of the
    layers, and a SyncBatchNorm works on a CPU too. Where a submodule was replaced or carries a
    hook, or the norms of q, k and v differ in mode, the block does what its submodules do.

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
        return run(self, x, self._folds, self.backend, self._forward_eager)

    def _forward_eager(self, x: Tensor) -> Tensor:
        out = reference.sea_attention(self, x)
        return out if ops.transformed() else reference.follow_layout(out, x)

    def refold(self) -> None:
        """Forget the folded weights, after an update that they cannot see (see the class)."""
        self._folds.drop()

    def train(self, mode: bool = True) -> "SeaAttention":
        self._folds.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"key_dim={self.key_dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _apply(self, *args, **kwargs) -> "SeaAttention":
        self._folds.drop()
        return super()._apply(*args, **kwargs)

    def __copy__(self) -> "SeaAttention":
        twin = type(self).__new__(type(self))
        twin.__setstate__({**self.__dict__, "_folds": FoldCache()})
        return twin

    def _replicate_for_data_parallel(self) -> "SeaAttention":
        replica = super()._replicate_for_data_parallel()
        replica._folds = FoldCache()
        return replica


Sea_Attention = SeaAttention
