"""What a block is made of: which of its layers plays which part, read from their structure.

A block is recognised by the names of its layers and by what they are, not by its class. What a
class of its own computes cannot be read: such classes count only where they are trusted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from seaattn_kernels import layers

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
#: The classes of this package that compute what their structure says.
OWN = frozenset({layers.HSigmoid, layers.SqueezeAxialPositionalEmbedding})

_CONVOLUTIONS = (
    "to_q", "to_k", "to_v", "dwconv", "pwconv", "proj_encode_row", "proj_encode_column", "proj",
)  # fmt: skip
_TABLES = ("pos_emb_rowq", "pos_emb_rowk", "pos_emb_columnq", "pos_emb_columnk")
#: The layers that the operators leave to the block.
_CALLED = (*_CONVOLUTIONS[:-1], "act")
#: Layers without weights that a forward may use in place of a function.
_IDLE = (nn.Softmax, nn.Identity)


class Obstacle(Exception):
    """Why a module is not a block that the operators compute."""


class ConvNorm(NamedTuple):
    """A convolution and the norm behind it, if there is one."""

    conv: nn.Conv2d
    norm: nn.Module | None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a block, and its constants."""

    convolutions: tuple[ConvNorm, ...]  # q, k, v, depthwise, pointwise, row, column, proj
    position: tuple[tuple[nn.Module, str], ...]  # layer and its table's name: row q, k, column q, k
    heads: int
    scale: float
    activation: str
    negative_slope: float
    hard: bool | None  # None where the structure does not tell the gate
    column: str  # "column", or "col" in copies
    unproven: frozenset[type]  # classes that must compute what their structure says

    @property
    def channels(self) -> int:
        return self.convolutions[0].conv.weight.shape[1]

    @property
    def key_dim(self) -> int:
        """D"""
        return self.convolutions[0].conv.weight.shape[0] // self.heads

    @property
    def value_dim(self) -> int:
        """E"""
        return self.convolutions[2].conv.weight.shape[0] // self.heads

    @property
    def tables(self) -> list[Tensor]:
        """``(1, heads*D, P)`` each: of the row's q and k, of the column's q and k."""
        return [getattr(layer, name) for layer, name in self.position]


def resembles(module: nn.Module) -> bool:
    """Whether a module looks like a block: by its layers, or else by its class."""
    names = [name for name, _ in module.named_children()]
    squeezes = any(name.startswith(("proj_encode_", "pos_emb_")) for name in names)
    called = type(module).__name__.lower().replace("_", "")
    return {"to_q", "to_k", "to_v"} <= set(names) and (squeezes or "seaattention" in called)


def dissect(
    block: nn.Module, trusted: Iterable[type] | None = OWN, hard: bool | None = None
) -> Anatomy:
    """The parts of a block.

    Args:
        block: any module.
        trusted: classes with a forward of their own that do what their structure says; None to
            take every class for that and name them in ``unproven``.
        hard: the gate, where the structure does not tell.

    Raises:
        Obstacle: with the reason why the operators cannot stand in for the layers.
    """
    names = {role: _name(block, role) for role in (*_CALLED, "proj", *_TABLES)}
    if missing := [role for role, name in names.items() if block._modules.get(name) is None]:
        raise Obstacle(f"has no {', '.join(missing)}")
    if own := _own_tensors(block):
        raise Obstacle(f"has parameters of its own: {', '.join(own)}")
    for name, layer in block.named_modules():
        if layer is not block and (reason := _alteration(layer)):
            raise Obstacle(f"{name} {reason}")
    parts = {role: block._modules[name] for role, name in names.items()}
    unproven: set[type] = set()
    gate, known = _gate(block, set(names.values()), unproven)
    hard = hard if known is None else known

    leaves = {role: _leaves(names[role], layer, unproven) for role, layer in parts.items()}
    activations = {_activation(names["act"], leaves["act"])}
    for role in ("proj", "proj_encode_row", "proj_encode_column"):
        activations.add(_activation(names[role], leaves[role][:1]))
        leaves[role] = leaves[role][1:]
    if len(activations) > 1:
        raise Obstacle("its activations differ")
    convolutions = tuple(
        _conv_norm(names[role], parts[role], leaves[role]) for role in _CONVOLUTIONS
    )
    shapes = [layer.conv.weight.shape for layer in convolutions]
    keys, channels = shapes[0][:2]
    values = shapes[2][0]
    width = 2 * keys + values
    for role, layer, shape in zip(
        _CONVOLUTIONS,
        convolutions,
        (
            (keys, channels), (keys, channels), (values, channels), (width,), (channels, width),
            (values, values), (values, values), (channels, values),
        ),
        strict=True,
    ):  # fmt: skip
        _check_convolution(names[role], layer.conv, shape)
    heads = getattr(block, "num_heads", None)
    if not isinstance(heads, Integral) or heads < 1 or keys % heads or values % heads:
        raise Obstacle(f"num_heads is {heads}, with {keys} channels of keys, {values} of values")
    scale = getattr(block, "scale", (keys // heads) ** -0.5)
    if not isinstance(scale, Real):
        raise Obstacle(f"scale is {type(scale).__name__}, not a number")
    position = tuple(
        (parts[role], _table(names[role], parts[role], keys, unproven)) for role in _TABLES
    )
    if trusted is not None:
        for name, layer in block.named_modules():
            if type(layer) in unproven and type(layer) not in trusted and layer is not block:
                raise Obstacle(f"{name} is {type(layer).__name__}, which nothing is known of")
        if hard is None:
            raise Obstacle(f"its gate is {gate}, not a sigmoid")
    name, slope = activations.pop()
    return Anatomy(
        convolutions=convolutions,
        position=position,
        heads=int(heads),
        scale=float(scale),
        activation=name,
        negative_slope=slope,
        hard=hard,
        column="col" if names["proj_encode_column"] == "proj_encode_col" else "column",
        unproven=frozenset(unproven),
    )


def facts(block: nn.Module, kinds: Iterable[type]) -> dict[str, object]:
    """What else the forward of a block may depend on, and a watch can compare.

    The forwards of the classes ``kinds``, and the plain attributes (numbers, strings, tuples) of
    the block and of its layers of these classes.
    """
    kinds = frozenset(kinds)
    found: dict[str, object] = {f"{kind.__name__}.forward": kind.forward for kind in kinds}
    for name, layer in block.named_modules():
        if layer is block or type(layer) in kinds:
            attributes = plain_attributes(layer)
            found |= {f"{name}.{key}" if name else key: t for key, t in attributes.items()}
    return found


def changed(block: nn.Module, kinds: Iterable[type], known: Mapping[str, object]) -> list[str]:
    """The names of those :func:`facts` that are not what they were."""
    # By name: not every version of torch.compile reads the dictionary of an instance.
    layers = dict(block.named_modules())
    now = {f"{kind.__name__}.forward": kind.forward for kind in kinds}
    found = []
    for name, value in known.items():
        layer, _, attribute = name.rpartition(".")
        current = now[name] if name in now else getattr(layers.get(layer), attribute, None)
        if current != value:
            found.append(name)
    return found


def plain_attributes(layer: nn.Module) -> dict[str, object]:
    """The attributes of a layer that are numbers, strings, None or tuples of those."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_")
        and name != "training"
        and (
            isinstance(value, plain)
            or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value))
        )
    }


def _name(block: nn.Module, role: str) -> str:
    """The attribute that plays a role: its own name, or the shorter one of some copies."""
    short = role.replace("column", "col")
    return short if role not in block._modules and short in block._modules else role


def _alteration(layer: nn.Module) -> str | None:
    """What a user attached to a layer that a call around it would skip, or None."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "carries a forward hook"
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "carries a backward hook"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    if is_parametrized(layer):
        return "carries a parametrization"
    return None


def _own_tensors(layer: nn.Module) -> list[str]:
    tables = (layer._parameters, layer._buffers)
    return [name for table in tables for name, t in table.items() if t is not None]


def _leaves(name: str, layer: nn.Module, unproven: set[type]) -> list[nn.Module]:
    """The layers that a container calls one after the other, itself if it is none."""
    if not layer._modules:
        return [layer]
    if own := _own_tensors(layer):
        raise Obstacle(f"{name} has parameters of its own: {', '.join(own)}")
    if type(layer).forward is not nn.Sequential.forward:
        unproven.add(type(layer))
    found = []
    for child in layer._modules.values():
        if child is not None:
            found += _leaves(name, child, unproven)
    return found


def _activation(name: str, leaves: list[nn.Module]) -> tuple[str, float]:
    kind = layers.activation_name(leaves[0]) if len(leaves) == 1 else None
    if kind is None:
        found = ", ".join(type(leaf).__name__ for leaf in leaves)
        raise Obstacle(
            f"the activation of {name} is {found}, none of {', '.join(layers.ACTIVATIONS)}"
        )
    return kind, float(getattr(leaves[0], "negative_slope", 0.0))


def _conv_norm(name: str, layer: nn.Module, leaves: list[nn.Module]) -> ConvNorm:
    kinds = [type(leaf) for leaf in leaves if type(leaf) is not nn.Identity]
    if kinds[:1] != [nn.Conv2d] or len(kinds) > 2 or not set(kinds[1:]) <= set(NORMS):
        found = " and ".join(kind.__name__ for kind in kinds) or type(layer).__name__
        raise Obstacle(f"{name} is {found}, not a convolution and a batch norm")
    found = [leaf for leaf in leaves if type(leaf) is not nn.Identity]
    return ConvNorm(found[0], found[1] if len(found) == 2 else None)


def _check_convolution(name: str, conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
    """Of the plain 1x1 kind for ``(out, in)``, depthwise 3x3 for ``(channels,)``."""
    size, groups = (1, 1) if len(shape) == 2 else (3, shape[0])
    expected = (*shape, 1, 1) if len(shape) == 2 else (shape[0], 1, 3, 3)
    plain = (
        tuple(conv.weight.shape) == expected
        and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), groups)
        and (conv.padding in ((size // 2,) * 2, "same") or (size == 1 and conv.padding == "valid"))
        and conv.padding_mode == "zeros"
    )
    if not plain:
        wanted = f"1x1 from {shape[-1]} to {shape[0]} channels"
        if size == 3:
            wanted = f"depthwise 3x3 of {shape[0]} channels"
        raise Obstacle(f"{name} is {conv}, not {wanted}")


def _table(name: str, layer: nn.Module, keys: int, unproven: set[type]) -> str:
    """The name of the position table in its layer. In replicas parameters are plain attributes."""
    # Not every version of torch.compile reads the dictionary of an instance.
    attributes = {} if torch.compiler.is_compiling() else dict(layer.__dict__)
    attributes.update(layer._parameters)
    found = {key: t for key, t in attributes.items() if isinstance(t, Tensor)}
    if len(found) != 1 or layer._modules or any(t is not None for t in layer._buffers.values()):
        raise Obstacle(f"{name} is {type(layer).__name__}, not one position table")
    (key, table), *_ = found.items()
    if table.dim() != 3 or tuple(table.shape[:2]) != (1, keys):
        raise Obstacle(f"{name} has a table of {tuple(table.shape)}, not (1, {keys}, length)")
    unproven.add(type(layer))
    return key


def _gate(block: nn.Module, taken: set[str], unproven: set[type]) -> tuple[str | None, bool | None]:
    """What closes the block: the class of that layer and whether it is the hard sigmoid.

    A block without such a layer may call a function, and what a class of its own computes is not to
    be read either: None.
    """
    gates = {}
    for name, layer in block._modules.items():
        if name in taken or layer is None or type(layer) in _IDLE:
            continue
        if name != "sigmoid" and type(layer) not in (nn.Sigmoid, nn.Hardsigmoid):
            raise Obstacle(f"has a layer that Sea_Attention has not: {name}")
        gates[name] = layer
    if len(gates) > 1:
        raise Obstacle(f"has several gates: {', '.join(gates)}")
    for name, layer in gates.items():
        kind = type(layer)
        if kind in (nn.Sigmoid, nn.Hardsigmoid, layers.HSigmoid):
            return kind.__name__, kind is not nn.Sigmoid
        if _own_tensors(layer) or not all(type(m) is nn.ReLU6 for m in layer._modules.values()):
            raise Obstacle(f"{name} is {kind.__name__}, not a sigmoid")
        unproven.add(kind)
        return kind.__name__, None
    return None, None
