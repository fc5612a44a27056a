"""Models by name: from a file of weights, a pickled model, or an import path."""

import ast
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seaattn_kernels import seaformer


class Located(NamedTuple):
    """What was found, in words, and the model or the weights."""

    what: str
    found: nn.Module | Mapping[str, Tensor]


def locate(name: str, trust: bool = False) -> list[Located]:
    """The models in a file, or the one behind ``package.module:attribute``.

    An attribute is a module, or a class or function that makes one:
    ``torchvision.models:resnet18``, ``"package.models:build('s', classes=3)"`` with literals.

    Raises:
        ValueError: with a reason for the user.
    """
    if Path(name).exists() or "/" in name:
        return list(_in_file(Path(name), trust))
    return [_imported(name)]


def _in_file(path: Path, trust: bool) -> Iterator[Located]:
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        if trust:
            hint = ""
            if isinstance(error, (ImportError, AttributeError)):
                hint = (
                    ". Where that is a copy of Sea_Attention, python -m seaattn_kernels migrate "
                    "writes a file that does without"
                )
            raise ValueError(f"{path} cannot be loaded: {error}{hint}") from error
        raise ValueError(
            f"{path} holds more than weights, or is no file of torch.save. Loading a pickled model "
            "runs code of the file: add --trust if you trust it"
        ) from error
    if isinstance(content, nn.Module):
        yield Located(f"the model in {path.name}", content)
        return
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, neither a model nor weights")
    models = {key: value for key, value in content.items() if isinstance(value, nn.Module)}
    for key, model in models.items():
        yield Located(f"the model under {key!r} in {path.name}", model)
    if not models:
        weights = seaformer.checkpoint_weights(content)
        if not weights:
            raise ValueError(f"{path} holds neither a model nor weights, but {list(content)[:5]}")
        call = seaformer.recognise(weights)
        known = f": load_checkpoint({call}, {str(path)!r}) loads them" if call else ""
        yield Located(f"weights in {path.name}{known}", weights)


def _imported(name: str) -> Located:
    matched = re.fullmatch(r"([\w.]+(?::[\w.]+)?)(\(.*\))?", name.strip())
    if matched is None:
        raise ValueError(f"{name} is neither a file nor package.module:attribute")
    try:
        found = pkgutil.resolve_name(matched[1])
    except Exception as error:
        raise ValueError(f"{name} is no file, and cannot be imported: {error}") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{name} is a {type(found).__name__}, not a model")
        positional, named = _arguments(matched[2] or "()")
        try:
            found = found(*positional, **named)
        except Exception as error:
            raise ValueError(f"{name} cannot be called: {error}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name} gives a {type(found).__name__}, not a model")
    return Located(name, found)


def _arguments(call: str) -> tuple[list, dict]:
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("more than one call")
        positional = [ast.literal_eval(value) for value in node.args]
        named = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the arguments {call} are not literals: {error}") from error
    return positional, named


def describe_weights(weights: Mapping[str, Tensor]) -> str:
    """The blocks whose weights are in a ``state_dict``, by the names of its keys, as text."""
    blocks = []
    for key, query in weights.items():
        matched = re.fullmatch(r"((?:.*\.)?)to_q\.(?:\w+\.)?weight", key)
        if matched is None or query.dim() != 4:
            continue
        prefix = matched[1]
        own = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
        if not any(name.startswith(("proj_encode_", "pos_emb_")) for name in own):
            continue
        norm = (
            "BatchNorm" if any(re.fullmatch(r"to_q\..*running_var", n) for n in own) else "no norm"
        )
        keys = ", *_col* keys" if any(name.startswith("proj_encode_col.") for name in own) else ""
        size = f"C={query.shape[1]}, {query.shape[0]} channels of queries"
        blocks.append(f"  {prefix.removesuffix('.') or '(the model)'}: {size}, {norm}{keys}")
    if not blocks:
        return f"none of its {len(weights)} tensors looks like one of Sea_Attention"
    return "\n".join(
        [
            f"{len(blocks)} blocks have the weights of Sea_Attention:",
            *blocks,
            "What a block computes is not in its weights: build the model, load them, and explain",
            "the model, by an import path or with seaattn_kernels.explain(model).",
        ]
    )
