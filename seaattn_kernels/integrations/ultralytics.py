"""Sea_Attention in the models of Ultralytics: a layer that their YAML files may name.

::

    from seaattn_kernels.integrations.ultralytics import register
    register()                                # then, in a model YAML: [-1, 1, SeaAttention, []]

A checkpoint holds the class below, so it opens wherever this package is installed; ``register`` is
what a process needs that builds a model from YAML, such as one that goes on with a training run.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import wraps

from torch import nn

from seaattn_kernels import module

#: What a YAML may call the layer.
NAMES = ("SeaAttention", "Sea_Attention")
#: What was there before, by the object that has it and the name.
_replaced: dict[tuple[object, str], object] = {}
_ABSENT = object()


class SeaAttention(module.SeaAttention):
    """:class:`seaattn_kernels.SeaAttention` with the channels of the map that it gets.

    In a YAML: ``[from, 1, SeaAttention, [dim, key_dim, num_heads, attn_ratio, activation]]``, each
    of them optional. ``dim`` says nothing: channels follow the width of the model.

    Args:
        channels: those of every layer before, and ``source`` the index of the one it reads.
    """

    def __init__(
        self,
        channels: Sequence[int],
        source: int,
        dim: int | None = None,
        key_dim: int = 16,
        num_heads: int = 4,
        attn_ratio: float = 2,
        activation: str | type[nn.Module] | nn.Module | None = None,
    ) -> None:
        if not isinstance(source, int):
            raise ValueError(f"SeaAttention reads one layer, got from={source!r}")
        super().__init__(channels[source], key_dim, num_heads, attn_ratio, activation)


def register() -> None:
    """Teach Ultralytics the layer, in this process and in those that its DDP starts.

    No file of it is changed. A second call does nothing.

    Raises:
        ImportError: where Ultralytics is not installed.
    """
    if _replaced:
        return
    from ultralytics.nn import tasks
    from ultralytics.utils import dist

    for name in NAMES:
        _replace(tasks, name, SeaAttention)
    _replace(tasks, "parse_model", _with_channels(tasks.parse_model))
    _replace(dist, "generate_ddp_file", _with_registration(dist.generate_ddp_file))


def unregister() -> None:
    """Undo :func:`register`. Models that exist go on working."""
    while _replaced:
        (owner, name), before = _replaced.popitem()
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def with_attention(
    model: str = "yolov8n.yaml", levels: Sequence[str] = ("P5",), arguments: Sequence = ()
) -> dict:
    """The configuration of a detector of the installed Ultralytics, with attention before its head.

    Args:
        model: the name of one of its YAML files, with the letter of its scale.
        levels: of the maps that the detection head reads, by the logarithm of their stride:
            ``"P3"``, ``"P4"``, ``"P5"`` and, where the model has them, ``"P2"`` and ``"P6"``.
        arguments: of the layers, as in a YAML.

    Returns:
        What ``ultralytics.nn.tasks.DetectionModel`` takes, or ``yaml.safe_dump`` for a file that
        ``ultralytics.YOLO`` opens.

    Raises:
        ValueError: for a level that is not there, a model that is no detector.
    """
    from ultralytics.nn import tasks

    config = tasks.yaml_model_load(model)
    rows = [*config["backbone"], *config["head"]]
    inputs = rows[-1][0]
    if not isinstance(inputs, list):
        raise ValueError(f"{model} has no head that reads several maps")
    strides = tasks.DetectionModel(dict(config), verbose=False).stride.tolist()
    read = {f"P{round(math.log2(stride))}": at for stride, at in zip(strides, inputs, strict=True)}
    if unknown := set(levels) - set(read):
        raise ValueError(f"{model} has no {', '.join(sorted(unknown))}, but {', '.join(read)}")
    attended = {read[level] for level in levels}
    made, moved = [], {}
    backbone = 0
    for index, (source, *rest) in enumerate(rows):
        sources = source if isinstance(source, list) else [source]
        # Whoever read an attended layer now reads the attention behind it.
        found = [at if at == -1 else moved[at if at >= 0 else index + at] for at in sources]
        made.append([found if isinstance(source, list) else found[0], *rest])
        if index in attended:
            made.append([-1, 1, NAMES[0], list(arguments)])
        moved[index] = len(made) - 1
        if index < len(config["backbone"]):
            backbone = len(made)
    return {**config, "backbone": made[:backbone], "head": made[backbone:]}


def _replace(owner: object, name: str, value: object) -> None:
    _replaced[owner, name] = getattr(owner, name, _ABSENT)
    setattr(owner, name, value)


def _with_channels(parse_model):
    """The parser reads an argument that is the name of a variable of its own as that variable.

    So it hands the layer its list ``ch`` of channels and ``f``, where the layer reads from.
    """

    @wraps(parse_model)
    def parse(d: Mapping, *rest, **more):
        rows = {
            part: [
                [source, times, kind, ["ch", "f", *arguments]]
                if kind in NAMES
                else [source, times, kind, arguments]
                for source, times, kind, arguments in d[part]
            ]
            for part in ("backbone", "head")
        }
        return parse_model({**d, **rows}, *rest, **more)

    return parse


def _with_registration(generate_ddp_file):
    """Its processes run a file of their own: they register first."""

    @wraps(generate_ddp_file)
    def generate(trainer) -> str:
        path = generate_ddp_file(trainer)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        head, found, tail = text.partition('if __name__ == "__main__":\n')
        if not found:
            raise RuntimeError("this version of Ultralytics starts its DDP processes otherwise")
        lines = (
            f"    import sys\n    sys.path = {sys.path!r}\n"
            f"    from {__name__} import register\n    register()\n"
        )
        with open(path, "w", encoding="utf-8") as file:
            file.write(head + found + lines + tail)
        return path

    return generate
