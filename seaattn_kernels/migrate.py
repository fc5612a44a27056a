"""Pickled models whose source carried a copy of the block: opened without that source.

A pickle names its classes by where they were when it was written, so the checkpoint of a model with
a hand-edited source opens beside that source alone. Here its copies of the block become
:class:`seaattn_kernels.SeaAttention`, whose class is where this package is.
"""

import os
import pickle
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from seaattn_kernels import layers, probe
from seaattn_kernels.anatomy import Anatomy, ConvNorm, Obstacle, dissect, resembles
from seaattn_kernels.module import SeaAttention


class Mapped(NamedTuple):
    """A block that has this package's class now, or kept its own for a reason."""

    name: str  # of the module, behind the key of the model in the file
    was: str  # the full name of its class
    reason: str | None  # why it kept that
    error: float | None = None  # against its own forward, in float64; None where that is missing
    notes: tuple[str, ...] = ()  # what to know about it


class Opened(NamedTuple):
    """The content of a checkpoint, and its blocks. As text, what became of them."""

    content: object
    blocks: list[Mapped]

    def __str__(self) -> str:
        if not self.blocks:
            return "no model in it has a copy of Sea_Attention: nothing to map"
        lines = []
        for block in self.blocks:
            told = f"stays {block.was}: {block.reason}"
            if block.reason is None:
                error = "" if block.error is None else f" (error {block.error:.0e})"
                told = "; ".join((f"{block.was} -> SeaAttention{error}", *block.notes))
            lines.append(f"{block.name or 'the model'}: {told}")
        return "\n".join(lines)


class _Missing(nn.Module):
    """What a class that cannot be imported becomes while a file is read."""


def open_checkpoint(path: str | Path) -> Opened:
    """Load a file of ``torch.save``, with the copies of the block in it as ``SeaAttention``.

    Unpickling runs code of the file: open what you trust alone. A block whose class can be imported
    is compared with its own forward first, as :func:`replace_sea_attention` does; of one whose
    class is missing the layers tell all but a gate that is a function or a class of its own, which
    counts as h_sigmoid. Blocks, convolutions, norms, parameters and buffers stay the objects that
    they were, under upstream's names, with the hooks of the block; the layers around them are new.

    Raises:
        ValueError: where classes are missing that are no part of a block, with their names; where
            the file is TorchScript, or cannot be read for want of a class.
        OSError, RuntimeError, pickle.UnpicklingError: where the file cannot be read.
    """
    absent: dict[tuple[str, str], type] = {}
    try:
        content = torch.load(
            path, map_location="cpu", pickle_module=_pickle(absent), weights_only=False
        )
    except (TypeError, AttributeError, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}{_named(absent)}") from error
    if isinstance(content, torch.jit.ScriptModule):
        raise ValueError(f"{path} is TorchScript, which holds code in place of classes")
    models = list(_models(content))
    visited = {type(layer) for _, model in models for layer in model.modules()}
    blocks: list[Mapped] = []
    for key, model in models:
        for name, layer in list(model.named_modules(prefix=key)):
            foreign = resembles(layer) and not isinstance(layer, SeaAttention)
            if (foreign or isinstance(layer, _Missing)) and (block := _mapped(name, layer)):
                blocks.append(block)
    left = {type(layer) for _, model in models for layer in model.modules()}
    missing = {key: kind for key, kind in absent.items() if kind in left or kind not in visited}
    if missing:
        told = [f"\n{block.name}: {block.reason}" for block in blocks if block.reason]
        raise ValueError(f"{path} cannot be opened{_named(missing)}{''.join(told)}")
    return Opened(content, blocks)


def migrate(source: str | Path, target: str | Path) -> Opened:
    """Write ``target``, a file of ``torch.save`` that opens with this package in place of copies.

    See :func:`open_checkpoint`, whose result and errors these are. ``target`` is written whole or
    not at all, and may be ``source``.
    """
    opened = open_checkpoint(source)
    partial = Path(f"{target}.partial")
    try:
        torch.save(opened.content, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return opened


def _named(classes: Mapping[tuple[str, str], type]) -> str:
    names = ", ".join(sorted(".".join(key) for key in classes))
    return f": it needs classes that are not here: {names}" if names else ""


def _pickle(absent: dict[tuple[str, str], type]) -> types.ModuleType:
    """The module ``pickle`` with an unpickler that goes on where a class is missing.

    ``absent`` gets what stands for it, by module and name.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):
                kind = types.new_class(name.rpartition(".")[2], (_Missing,))
                kind.__module__ = module
                return absent.setdefault((module, name), kind)

    lenient = types.ModuleType("pickle")
    lenient.__dict__.update(vars(pickle))
    lenient.Unpickler = Unpickler
    lenient.load = lambda file, **options: Unpickler(file, **options).load()
    return lenient


def _models(content: object, key: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The models anywhere in dictionaries, lists and tuples, by their keys."""
    # What stands for a class that was no module has none of a module's attributes.
    if isinstance(content, nn.Module) and "_modules" in vars(content):
        yield key, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _models(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _models(value, f"{key}.{index}" if key else str(index))


def _mapped(name: str, layer: nn.Module) -> Mapped | None:
    """Give a block this package's class. None for a layer of upstream's outside a block."""
    was, missing = _full_name(layer), isinstance(layer, _Missing)
    children = list(layer._modules)
    if missing and type(layer).__name__ == "Conv2d_BN" and children == ["c", "bn"]:
        layer.__class__ = layers.Conv2d_BN
        return None
    if missing and type(layer).__name__ == "h_sigmoid":
        layer.__class__ = layers.HSigmoid
        return None
    if missing and not resembles(layer):
        return None
    notes = []
    try:
        if missing:
            if "forward" in vars(layer):
                raise Obstacle("has a forward of its own in the instance")
            anatomy, error = dissect(layer, trusted=None), None
            hard = anatomy.hard is not False
            notes.append("its class is not here: taken for what its layers say")
            gate = layer._modules.get("sigmoid")
            clamps = gate is not None and any(type(part) is nn.ReLU6 for part in gate.modules())
            if anatomy.hard is None and not clamps:
                notes.append("nothing tells its gate: taken for h_sigmoid")
        else:
            probe.check_forward(layer, type(layer), alone=True)
            anatomy, hard, error = probe.probe(layer)
    except Obstacle as reason:
        return Mapped(name, was, str(reason))
    before = [id(parameter) for parameter in layer.parameters()]
    _become(layer, anatomy, hard)
    if before != [id(parameter) for parameter in layer.parameters()]:
        notes.append("its parameters were in another order: start without the optimizer's state")
    return Mapped(name, was, None, error, tuple(notes))


def _full_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _become(block: nn.Module, anatomy: Anatomy, hard: bool) -> None:
    """Turn a block into a ``SeaAttention`` around its own convolutions, norms and tables."""
    ratio = anatomy.value_dim / anatomy.key_dim
    activation = anatomy.activation
    if activation == "leaky_relu":
        activation = nn.LeakyReLU(anatomy.negative_slope)
    with torch.device("meta"):
        made = SeaAttention(
            anatomy.channels, anatomy.key_dim, anatomy.heads, ratio, activation=activation
        )
    made.train(block.training)
    q, k, v, depthwise, pointwise, row, column, proj = anatomy.convolutions
    holders = (
        (made.to_q, q), (made.to_k, k), (made.to_v, v), (made.dwconv, depthwise),
        (made.pwconv, pointwise), (made.proj_encode_row[1], row),
        (made.proj_encode_column[1], column), (made.proj[1], proj),
    )  # fmt: skip
    for holder, parts in holders:
        _hold(holder, parts)
    tables = (made.pos_emb_rowq, made.pos_emb_rowk, made.pos_emb_columnq, made.pos_emb_columnk)
    for table, (layer, name) in zip(tables, anatomy.position, strict=True):
        table.pos_embed = getattr(layer, name)
    made.scale = anatomy.scale
    if not hard:
        made.sigmoid = nn.Sigmoid().train(block.training)
    own = {key: value for key, value in vars(block).items() if key not in vars(made)}
    hooks = {
        key: value
        for key, value in vars(block).items()
        if "_hooks" in key or key == "_is_full_backward_hook"
    }
    object.__setattr__(block, "__class__", SeaAttention)
    block.__dict__ = {**own, **vars(made), **hooks}


def _hold(holder: nn.Module, parts: ConvNorm) -> None:
    holder.c = parts.conv
    if parts.norm is None:
        del holder.bn
    else:
        holder.bn = parts.norm
