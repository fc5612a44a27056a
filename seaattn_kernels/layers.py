"""The layers a block is made of, with upstream's names, initialisation and state_dict keys."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Layers whose class alone says what they compute, and the name of that in the operators.
_ACTIVATIONS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
}
#: The activations that the operators compute.
ACTIVATIONS = tuple(_ACTIVATIONS.values())
_NORMS = {"BN": nn.BatchNorm2d, "BN2d": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}

_PART = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<part>to_[qkv]|dwconv|pwconv|proj|proj_encode_(?:row|col|column)"
    r"|pos_emb_(?:row|col|column)[qk])\.(?P<rest>.+)"
)
#: Names of the layers of a ``Conv2d_BN`` in copies, and upstream's.
_LAYERS = {"": "c", "conv": "c", "0": "c", "norm": "bn", "1": "bn"}


def activation_name(layer: nn.Module | None) -> str | None:
    """``"relu6"`` for an ``nn.ReLU6`` and so on; None for what computes something else."""
    if type(layer) is nn.ReLU6 and (layer.min_val, layer.max_val) != (0.0, 6.0):
        return None
    return _ACTIVATIONS.get(type(layer))


def make_activation(activation: str | type[nn.Module] | nn.Module | None) -> nn.Module:
    """A new activation layer from its name, class or an instance; ReLU6 for None.

    Raises:
        ValueError: for a name or a layer that the operators do not compute.
        TypeError: for anything else.
    """
    layer = nn.ReLU6() if activation is None else activation
    if isinstance(layer, str):
        layers = {name: kind for kind, name in _ACTIVATIONS.items()}
        if layer not in layers:
            raise ValueError(f"activation must be one of {tuple(layers)}, got {activation!r}")
        return layers[layer]()
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        layer = layer()
    if not isinstance(layer, nn.Module):
        raise TypeError(f"activation must be a name, an nn.Module or its class, got {activation!r}")
    if activation_name(layer) is None:
        known = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    return copy.deepcopy(layer)


def make_norm(norm_cfg: Mapping | None, channels: int) -> nn.Module:
    """A normalisation layer from a config such as ``dict(type="BN", requires_grad=True)``.

    Raises:
        ValueError: for a type other than BN, BN2d and SyncBN.
        TypeError: for an option that the layer does not have.
    """
    if norm_cfg is not None and not isinstance(norm_cfg, Mapping):
        raise TypeError(f"norm_cfg must be None or a mapping, got {norm_cfg!r}")
    options = {"type": "BN", **(norm_cfg or {})}
    kind = options.pop("type")
    requires_grad = options.pop("requires_grad", True)
    if not isinstance(kind, str) or kind not in _NORMS:
        raise ValueError(f"norm_cfg['type'] must be one of {tuple(_NORMS)}, got {kind!r}")
    try:
        norm = _NORMS[kind](channels, **options)
    except TypeError as error:
        raise TypeError(f"norm_cfg {norm_cfg!r}: {error}") from None
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return norm


class Conv2d_BN(nn.Sequential):
    """A convolution without bias, ``c``, and its batch normalisation, ``bn``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bn_weight: float = 1.0,
        norm_cfg: Mapping | None = None,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = make_norm(norm_cfg, out_channels)
        if self.bn.affine:
            nn.init.constant_(self.bn.weight, bn_weight)
            nn.init.zeros_(self.bn.bias)


def upstream_keys(keys: Iterable[str]) -> dict[str, str]:
    """Upstream's name for each key of a state_dict, which copies of the block spell otherwise.

    Within a block (a prefix that has ``to_q`` and tables ``pos_emb_*``): ``*_col*`` for
    ``*_column*``, ``conv`` or ``0`` for ``c``, ``norm`` or ``1`` for ``bn``, another name of a
    table for ``pos_embed``, a convolution without a container. Other keys stay what they are.
    """
    keys = list(keys)
    prefixes = {key[: found.start()] for key in keys if (found := re.search(r"\bto_q\.", key))}
    tabled = {key[: found.start()] for key in keys if (found := re.search(r"\bpos_emb_\w", key))}
    named = {}
    sizes = Counter(key.rpartition(".")[0] for key in keys)
    for key in keys:
        named[key] = key
        matched = _PART.fullmatch(key)
        if matched is None or matched["prefix"] not in prefixes & tabled:
            continue
        part = re.sub(r"_col(?=[qk]?$)", "_column", matched["part"])
        if part.startswith("pos_emb_"):
            if sizes[key.rpartition(".")[0]] == 1:
                named[key] = f"{matched['prefix']}{part}.pos_embed"
        else:
            index = "1." if part.startswith("proj") else ""
            # A norm that follows the convolution instead of sharing a container with it.
            rest = re.sub(r"^2\.(?=\w+$)", "bn.", matched["rest"]) if index else matched["rest"]
            rest = rest.removeprefix(index)
            head, _, leaf = rest.rpartition(".")
            named[key] = f"{matched['prefix']}{part}.{index}{_LAYERS.get(head, head)}.{leaf}"
    return named


class HSigmoid(nn.Module):
    """``relu6(x + 3) / 6``"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class SqueezeAxialPositionalEmbedding(nn.Module):
    """Adds a learned ``(1, channels, length)`` table, interpolated to the axis: ``(B, C, N)``."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, channels, length))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(
            self.pos_embed, size=x.shape[2], mode="linear", align_corners=False
        )
