"""Convolution + BatchNorm -> the folded weights of a block, and when they are stale.

Folding happens in float32 (float64 for a float64 block): with ``s = gamma / sqrt(var + eps)``,
``weight' = s * weight`` and ``bias' = beta - s * mean``. Weights are cast once to each dtype that
is asked for; biases and position tables are not.
"""

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seaattn_kernels import layers, reference

#: How many map sizes keep their interpolated position tables.
MAP_SIZES = 64

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_CONVOLUTIONS = ("to_q", "to_k", "to_v", "dwconv", "pwconv")
_ENCODES = ("proj_encode_row", "proj_encode_column", "proj")
_TABLES = ("pos_emb_rowq", "pos_emb_rowk", "pos_emb_columnq", "pos_emb_columnk")
_lock = threading.Lock()


class BlockWeights(NamedTuple):
    """What the block operators take as ``weights``, in this order.

    Letters as in :mod:`seaattn_kernels.reference`; ``position`` holds the tables of q and k
    interpolated to the rows, then to the columns.
    """

    qkv_weight: Tensor  # (NQ, C)
    qkv_bias: Tensor  # (NQ,)
    dw_weight: Tensor  # (NQ, 3, 3)
    dw_bias: Tensor  # (NQ,)
    pw_weight: Tensor  # (C, NQ)
    pw_bias: Tensor  # (C,)
    row_weight: Tensor  # (DH, DH)
    row_bias: Tensor  # (DH,)
    column_weight: Tensor  # (DH, DH)
    column_bias: Tensor  # (DH,)
    proj_weight: Tensor  # (C, DH)
    proj_bias: Tensor  # (C,)
    axis_weight: Tensor  # (NQ, C): qkv_weight in float64, or float32 beside half precision
    position: Tensor  # (2*heads*D, H + W)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """A block in eval mode: twelve folded tensors, four raw position tables, and its constants."""

    convolutions: tuple[Tensor, ...] = field(repr=False)  # BlockWeights but for the last two
    tables: tuple[Tensor, ...] = field(repr=False)  # row q, k, column q, k: (1, heads*D, P)
    heads: int
    key_dim: int
    activation_code: int
    negative_slope: float
    hard: bool
    module_dtype: torch.dtype
    _casts: dict = field(default_factory=dict, init=False, repr=False)
    _ready: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def channels(self) -> int:
        return self.convolutions[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the folding: float32, or float64."""
        return self.convolutions[0].dtype

    @property
    def device(self) -> torch.device:
        return self.convolutions[0].device

    def weights(self, dtype: torch.dtype, height: int, width: int) -> BlockWeights:
        """The tensors for a map of this dtype and size; kept for the last :data:`MAP_SIZES`."""
        if torch.compiler.is_compiling():
            return BlockWeights(*self._cast(dtype), self._position(height, width))
        key = (dtype, height, width)
        ready = self._ready.get(key)
        return self._prepare(key) if ready is None else ready

    def _prepare(self, key: tuple[torch.dtype, int, int]) -> BlockWeights:
        dtype, height, width = key
        with _lock, torch.no_grad():
            if dtype not in self._casts:
                self._casts[dtype] = self._cast(dtype)
            ready = BlockWeights(*self._casts[dtype], self._position(height, width))
            if len(self._ready) >= MAP_SIZES:
                del self._ready[next(iter(self._ready))]
            self._ready[key] = ready
        return ready

    def _cast(self, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t if t.dim() == 1 else t.to(dtype) for t in self.convolutions]
        # Not every accelerator has float64.
        wider = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        axis_weight = self.convolutions[0].to(wider if dtype.itemsize >= 4 else self.dtype)
        return [*tensors, axis_weight]

    def _position(self, height: int, width: int) -> Tensor:
        row_q, row_k, column_q, column_k = self.tables
        row = reference.interpolate(torch.cat([row_q, row_k], dim=1), height)
        column = reference.interpolate(torch.cat([column_q, column_k], dim=1), width)
        return torch.cat([row, column], dim=2)[0]


def _conv_bn(layer: nn.Module) -> tuple[Tensor, Tensor]:
    conv, bn = layer.c, layer.bn
    wide = torch.float64 if conv.weight.dtype is torch.float64 else torch.float32
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    bias = -scale * bn.running_mean.to(wide)
    if conv.bias is not None:
        bias = bias + scale * conv.bias.to(wide)
    if bn.bias is not None:
        bias = bias + bn.bias.to(wide)
    return conv.weight.to(wide) * scale[:, None, None, None], bias


def fold(block: nn.Module) -> FoldedWeights:
    """Fold a block in which :func:`obstacle` finds nothing; no gradient, no cache."""
    with torch.no_grad():
        q, k, v, dw, pw = (_conv_bn(getattr(block, name)) for name in _CONVOLUTIONS)
        row, column, proj = (_conv_bn(getattr(block, name)[1]) for name in _ENCODES)
        projected = tuple(torch.cat(parts) for parts in zip(q, k, v, strict=True))
        convolutions = []
        for weight, bias in (projected, dw, pw, row, column, proj):
            kernel = weight[:, 0] if weight.shape[2] == 3 else weight[:, :, 0, 0]
            convolutions += [kernel.contiguous(), bias]
        wide = projected[0].dtype
        return FoldedWeights(
            convolutions=tuple(convolutions),
            tables=tuple(getattr(block, name).pos_embed.detach().to(wide) for name in _TABLES),
            heads=block.num_heads,
            key_dim=block.key_dim,
            activation_code=reference.ACTIVATIONS.index(layers.activation_name(block.act)),
            negative_slope=getattr(block.act, "negative_slope", 0.0),
            hard=True,
            module_dtype=block.to_q.c.weight.dtype,
        )


def obstacle(block: nn.Module) -> str | None:
    """Why the folded path would not compute what the submodules of ``block`` do, or None."""
    for name, layer in block.named_modules():
        if layer is block:
            continue
        if layer._forward_hooks or layer._forward_pre_hooks:
            return f"{name} carries a forward hook"
        if isinstance(layer, _NORMS):
            if layer.training:
                return f"{name} is in training mode"
            if layer.running_mean is None:
                return f"{name} has no running statistics"
    for name in _CONVOLUTIONS + _ENCODES:
        layer = getattr(block, name)
        if name in _ENCODES:
            layer = layer[1]
        if type(layer.c) is not nn.Conv2d or type(layer.bn) not in _NORMS:
            return f"{name} is {type(layer.c).__name__} and {type(layer.bn).__name__}"
    acts = [block.act, *(getattr(block, name)[0] for name in _ENCODES)]
    if layers.activation_name(block.act) is None:
        return f"act is {type(block.act).__name__}"
    described = {(type(act), getattr(act, "negative_slope", None)) for act in acts}
    if len(described) > 1:
        return "its activations differ"
    if type(block.sigmoid) is not layers.HSigmoid:
        return f"sigmoid is {type(block.sigmoid).__name__}"
    return None


class _Watch:
    """Everything a fold was made from, so that a change is seen in a few microseconds."""

    def __init__(self, block: nn.Module) -> None:
        self.complete = True
        self.versions: list[tuple[dict, str, Tensor, int]] = []
        self.identities: list[tuple[dict, str, object]] = []
        self.scalars: list[tuple[nn.Module, str, object]] = []
        self.hooks: list[dict] = []
        for layer in block.modules():
            for key, child in layer._modules.items():
                self.identities.append((layer._modules, key, child))
            for table in (layer._parameters, layer._buffers):
                for key, tensor in table.items():
                    if key == "num_batches_tracked":
                        continue
                    if tensor is None:
                        self.identities.append((table, key, None))
                    elif tensor.is_inference():
                        self.complete = False
                    else:
                        self.versions.append((table, key, tensor, tensor._version))
            for name in ("eps", "negative_slope"):
                if hasattr(layer, name):
                    self.scalars.append((layer, name, getattr(layer, name)))
            if isinstance(layer, _NORMS):
                self.scalars.append((layer, "training", layer.training))
            if layer is not block:
                self.hooks += [layer._forward_hooks, layer._forward_pre_hooks]

    def current(self) -> bool:
        for table, key, tensor, version in self.versions:
            if table.get(key) is not tensor or tensor._version != version:
                return False
        for table, key, value in self.identities:
            if table.get(key) is not value:
                return False
        for layer, name, value in self.scalars:
            if getattr(layer, name) != value:
                return False
        return not any(self.hooks)


class FoldCache:
    """The folded weights of one block: made when asked for, dropped when they may be stale.

    A fold is stale when a tensor it came from is another object or has another version, when a
    submodule or an ``eps`` was replaced, or a hook was added. Fused optimizers and ``.half()`` move
    no version: therefore :meth:`drop` in ``train()``, ``eval()`` and everything that goes through
    ``_apply``, and :meth:`suspend` in a forward with gradients, after which an optimizer step may
    come: nothing is kept until the next :meth:`drop`. Tensors made in inference mode have no
    version: a block of them folds in every call. Writes through ``.data`` are not seen.
    """

    def __init__(self) -> None:
        self._record: tuple[_Watch, FoldedWeights | None] | None = None
        self._suspended = False

    def get(self, block: nn.Module) -> FoldedWeights | None:
        """The folded weights, or None where :func:`obstacle` finds a reason against them."""
        if torch.compiler.is_compiling():
            return fold(block) if obstacle(block) is None else None
        record = self._record
        if record is not None and record[0].current():
            return record[1]
        watch = _Watch(block)
        folded = fold(block) if obstacle(block) is None else None
        if watch.complete and not self._suspended:
            self._record = (watch, folded)
        return folded

    def drop(self) -> None:
        self._record = None
        self._suspended = False

    def suspend(self) -> None:
        self._record = None
        self._suspended = True
