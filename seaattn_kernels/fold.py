"""Convolution + BatchNorm -> the folded weights of a block, and when they are stale.

Folding happens in float32 (float64 for a float64 block): with ``s = gamma / sqrt(var + eps)``,
``weight' = s * weight`` and ``bias' = beta - s * mean``. Weights are cast once to each dtype that
is asked for; biases and position tables are not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from seaattn_kernels import layers, reference

#: How many map sizes keep their interpolated position tables.
MAP_SIZES = 64

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_CONVOLUTIONS = ("to_q", "to_k", "to_v", "dwconv", "pwconv")
_ENCODES = ("proj_encode_row", "proj_encode_column", "proj")
#: The layers of the position tables, in the order of ``axial_attention_pair``.
TABLES = ("pos_emb_rowq", "pos_emb_rowk", "pos_emb_columnq", "pos_emb_columnk")

#: Optimizer steps in this process. Fused optimizers write without moving a version.
_steps = [0]


def _count_step(*_) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def _traced() -> bool:
    """Whether the tensors at hand are not those of an ordinary call, or the call is recorded.

    Then nothing kept from another call may be used, and nothing of this one kept.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


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
    def dtype(self) -> torch.dtype:
        """Of the folding: float32, or float64."""
        return self.convolutions[0].dtype

    @property
    def device(self) -> torch.device:
        return self.convolutions[0].device

    def weights(self, dtype: torch.dtype, height: int, width: int) -> BlockWeights:
        """The tensors for a map of this dtype and size; kept for the last :data:`MAP_SIZES`."""
        if _traced():
            return BlockWeights(*self._cast(dtype), self._position(height, width))
        key = (dtype, height, width)
        ready = self._ready.get(key)
        return self._prepare(key) if ready is None else ready

    def _prepare(self, key: tuple[torch.dtype, int, int]) -> BlockWeights:
        # Without a lock, which a fork could leave held: threads at worst do the same work twice.
        dtype, height, width = key
        with torch.no_grad():
            if dtype not in self._casts:
                self._casts[dtype] = self._cast(dtype)
            ready = BlockWeights(*self._casts[dtype], self._position(height, width))
        for old in list(self._ready)[: 1 - MAP_SIZES]:
            self._ready.pop(old, None)
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


def _conv_layers(block: nn.Module) -> list[nn.Module]:
    """The eight Conv2d_BN of a block: q, k, v, depthwise, pointwise, row, column, proj."""
    plain = [getattr(block, name) for name in _CONVOLUTIONS]
    return plain + [getattr(block, name)[1] for name in _ENCODES]


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
        q, k, v, dw, pw, row, column, proj = map(_conv_bn, _conv_layers(block))
        projected = tuple(torch.cat(parts) for parts in zip(q, k, v, strict=True))
        convolutions = []
        for weight, bias in (projected, dw, pw, row, column, proj):
            kernel = weight[:, 0] if weight.shape[2] == 3 else weight[:, :, 0, 0]
            convolutions += [kernel.contiguous(), bias]
        wide = projected[0].dtype
        return FoldedWeights(
            convolutions=tuple(convolutions),
            tables=tuple(getattr(block, name).pos_embed.detach().to(wide) for name in TABLES),
            heads=block.num_heads,
            key_dim=block.key_dim,
            activation_code=reference.ACTIVATIONS.index(layers.activation_name(block.act)),
            negative_slope=getattr(block.act, "negative_slope", 0.0),
            hard=True,
            module_dtype=block.to_q.c.weight.dtype,
        )


def _sources(block: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a fold reads."""
    for layer in _conv_layers(block):
        conv, bn = layer.c, layer.bn
        tensors = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        yield from (tensor for tensor in tensors if tensor is not None)
    for name in TABLES:
        yield getattr(block, name).pos_embed


def alteration(layer: nn.Module) -> str | None:
    """What a user attached to a layer that a call around it would skip, or None."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "carries a forward hook"
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "carries a backward hook"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    return None


def bypass_obstacle(block: nn.Module) -> str | None:
    """Why an operator cannot stand in for proj.0, the sigmoid and the position tables, or None."""
    if reason := _encode_obstacle(block.proj):
        return f"proj {reason}"
    if layers.activation_name(block.proj[0]) is None:
        return f"proj.0 is {block.proj[0]}"
    if type(block.sigmoid) is not layers.HSigmoid:
        return f"sigmoid is {type(block.sigmoid).__name__}"
    bypassed = {"proj": block.proj, "proj.0": block.proj[0], "sigmoid": block.sigmoid}
    for name in TABLES:
        bypassed[name] = getattr(block, name, None)
        if type(bypassed[name]) is not layers.SqueezeAxialPositionalEmbedding:
            return f"{name} is {type(bypassed[name]).__name__}"
    for name, layer in bypassed.items():
        if reason := alteration(layer):
            return f"{name} {reason}"
    return None


def _encode_obstacle(layer: nn.Module | None) -> str | None:
    if type(layer) is not nn.Sequential or len(layer) != 2:
        return "is not an activation and a Conv2d_BN"
    return None


def _conv_bn_obstacle(layer: nn.Module | None, shape: tuple[int, ...]) -> str | None:
    """Why a layer is not the Conv2d_BN, with a weight of this shape, that it should be."""
    if type(layer) is not layers.Conv2d_BN or list(layer._modules) != ["c", "bn"]:
        return f"is {type(layer).__name__}({', '.join(getattr(layer, '_modules', ()))})"
    conv, bn = layer.c, layer.bn
    if type(conv) is not nn.Conv2d or type(bn) not in _NORMS:
        return f"is {type(conv).__name__} and {type(bn).__name__}"
    padding = shape[2] // 2
    plain = (
        tuple(conv.weight.shape) == shape
        and (conv.stride, conv.dilation, conv.padding) == ((1, 1), (1, 1), (padding, padding))
        and conv.groups == (1 if padding == 0 else shape[0])
        and conv.padding_mode == "zeros"
    )
    if not plain:
        return f"has another convolution than {shape}: {conv}"
    if bn.training:
        return "has a norm in training mode"
    if bn.running_mean is None or bn.running_var is None:
        return "has a norm without running statistics"
    return None


def obstacle(block: nn.Module) -> str | None:
    """Why the folded path would not compute what the submodules of ``block`` do, or None."""
    for name, layer in block.named_modules():
        if layer is not block and (reason := alteration(layer)):
            return f"{name} {reason}"
    if reason := bypass_obstacle(block):
        return reason
    keys = block.num_heads * block.key_dim
    channels, values = block.dim, block.dh
    projected = 2 * keys + values
    shapes = {
        "to_q": (keys, channels, 1, 1),
        "to_k": (keys, channels, 1, 1),
        "to_v": (values, channels, 1, 1),
        "dwconv": (projected, 1, 3, 3),
        "pwconv": (channels, projected, 1, 1),
        "proj_encode_row": (values, values, 1, 1),
        "proj_encode_column": (values, values, 1, 1),
        "proj": (channels, values, 1, 1),
    }
    described = {_description(getattr(block, "act", None))}
    for name, shape in shapes.items():
        layer = getattr(block, name, None)
        if name in _ENCODES:
            if reason := _encode_obstacle(layer):
                return f"{name} {reason}"
            described.add(_description(layer[0]))
            layer = layer[1]
        if reason := _conv_bn_obstacle(layer, shape):
            return f"{name} {reason}"
    if None in described:
        return f"one of its activations is none of {', '.join(reference.ACTIVATIONS)}"
    if len(described) > 1:
        return "its activations differ"
    for name in TABLES:
        table = getattr(block, name).pos_embed
        if table.shape[:2] != (1, keys):
            return f"{name} has the shape {tuple(table.shape)}"
    if block.scale != block.key_dim**-0.5:
        return f"scale is {block.scale}"
    return None


def _description(layer: nn.Module | None) -> tuple | None:
    name = layers.activation_name(layer)
    return name and (name, getattr(layer, "negative_slope", None))


class _Watch:
    """Everything a fold was made from, so that a change is seen in a few microseconds."""

    def __init__(self, block: nn.Module) -> None:
        self.steps = _steps[0]
        self.versions: list[tuple[dict, str, Tensor, int]] = []
        self.absent: list[tuple[dict, str]] = []
        self.children: list[tuple[dict, tuple[nn.Module, ...]]] = []
        self.scalars: list[tuple[nn.Module, str, object]] = [(block, "scale", block.scale)]
        self.attributes: list[dict] = []
        self.hooks: list[dict] = []
        for layer in block.modules():
            if layer._modules:
                self.children.append((layer._modules, tuple(layer._modules.values())))
            for table in (layer._parameters, layer._buffers):
                for key, tensor in table.items():
                    if key == "num_batches_tracked":
                        continue
                    if tensor is None:
                        self.absent.append((table, key))
                    elif not tensor.is_inference():
                        self.versions.append((table, key, tensor, tensor._version))
            for name in ("eps", "negative_slope"):
                if hasattr(layer, name):
                    self.scalars.append((layer, name, getattr(layer, name)))
            if isinstance(layer, _NORMS):
                self.scalars.append((layer, "training", layer.training))
            if layer is not block:
                self.attributes.append(layer.__dict__)
                self.hooks += [layer._forward_hooks, layer._forward_pre_hooks]

    def complete(self, block: nn.Module) -> bool:
        """Whether every tensor of a fold is watched: not so inference tensors, which have no
        version, and weights that are plain attributes, as in replicas."""
        watched = {id(tensor) for _, _, tensor, _ in self.versions}
        return all(id(tensor) in watched for tensor in _sources(block))

    def current(self) -> bool:
        if self.steps != _steps[0]:
            return False
        for table, key, tensor, version in self.versions:
            if table.get(key) is not tensor or tensor._version != version:
                return False
        for table, key in self.absent:
            if table.get(key) is not None:
                return False
        for table, children in self.children:
            if tuple(table.values()) != children:
                return False
        for layer, name, value in self.scalars:
            if getattr(layer, name) != value:
                return False
        for attributes in self.attributes:
            if "forward" in attributes:
                return False
        return not any(self.hooks)


class FoldCache:
    """The folded weights of one block: made when asked for, dropped when they may be stale.

    A fold is stale when a tensor it came from is another object or has another version, when a
    submodule, ``scale`` or an ``eps`` was replaced, when a hook was added, or when any optimizer
    made a step: fused ones move no version. ``.half()`` and ``.to()`` move none either, therefore
    :meth:`drop` in everything that goes through ``_apply``, in ``train()``, ``eval()`` and in a
    forward with gradients. Tensors made in inference mode have no version: a block of them folds in
    every call. Not seen: writes through ``.data``, collectives of ``torch.distributed`` on a
    parameter, and fused updates outside ``torch.optim``.
    """

    def __init__(self) -> None:
        self._record: tuple[_Watch, FoldedWeights] | None = None

    def get(self, block: nn.Module) -> FoldedWeights | None:
        """The folded weights, or None where the submodules must run.

        That is where :func:`obstacle` finds a reason, or where a weight needs a gradient.
        """
        # A compiler that saw the record would compile anew for each one.
        if not (traced := _traced()):
            record = self._record
            if record is not None and record[0].current():
                return record[1]
        if obstacle(block) is not None:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _sources(block)):
            return None
        if traced:
            return fold(block)
        watch = _Watch(block)
        folded = fold(block)
        if watch.complete(block):
            self._record = (watch, folded)
        return folded

    def drop(self) -> None:
        self._record = None
