"""Whether what a fold was made from is as it was: asked before every call, in microseconds."""

from itertools import chain
from operator import is_

from torch import Tensor, nn

from seaattn_kernels import native
from seaattn_kernels.anatomy import NORMS, plain_attributes


class PythonWatch:
    """Whether objects are as they were when this was made; the library has it in C++.

    Args:
        types: objects, with their types.
        tables: dictionaries, with their values in order.
        attributes: a dictionary or a class, a name, and its value there; None where it is missing.
        tensors: their versions, which updates in place move.

    All but versions by identity: an equal object in place of another is a change.
    """

    def __init__(
        self,
        types: tuple[tuple[object, type], ...],
        tables: tuple[tuple[dict, tuple], ...],
        attributes: tuple[tuple[dict | type, str, object], ...],
        tensors: tuple[Tensor, ...],
    ) -> None:
        self._types, self._tables, self._attributes = types, tables, attributes
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def current(self) -> bool:
        return (
            all(type(thing) is kind for thing, kind in self._types)
            and all(
                len(table) == len(values) and all(map(is_, table.values(), values))
                for table, values in self._tables
            )
            and all(_get(owner, name) is value for owner, name, value in self._attributes)
            and all(tensor._version == version for tensor, version in self._versions)
        )


def _get(owner: dict | type, name: str) -> object:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


Watch = PythonWatch if native.LIBRARY is None else native.LIBRARY.Watch

#: What an anatomy reads of a layer beside its class, children and tensors.
_SCALARS = ("scale", "num_heads", "negative_slope", "min_val", "max_val")
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def structure(block: nn.Module, trusted: frozenset[type], of_facts: bool) -> Watch:
    """Of everything that an anatomy is read from.

    ``of_facts``: of the plain attributes of the block and of layers of trusted classes too.
    """
    layers = list(block.modules())
    tables = [(layer._modules, tuple(layer._modules.values())) for layer in layers]
    attributes = [(kind, "forward", kind.forward) for kind in trusted]
    attributes.append((block.__dict__, "_modules", block._modules))
    for layer in layers:
        own = layer.__dict__
        names = [name for name in _SCALARS if name in own]
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            names += _GEOMETRY
        if of_facts and (layer is block or type(layer) in trusted):
            names += plain_attributes(layer)
        attributes += [(own, name, own[name]) for name in names]
        if layer is not block:
            attributes.append((own, "forward", None))
            tables += [(own[hooks], ()) for hooks in _HOOKS]
    types = [(layer, type(layer)) for layer in layers]
    return Watch(tuple(types), tuple(tables), tuple(attributes), ())


def weights(block: nn.Module, steps: dict[str, int]) -> tuple[Watch, set[int]]:
    """Of the tensors and numbers that a fold is made from, and the ids of these tensors.

    Tensors made in inference mode have no version and are not among them. ``steps``: a count that
    must hold still too.
    """
    layers = list(block.modules())
    tables = [table for layer in layers for table in (layer._parameters, layer._buffers)]
    counts = {id(layer._buffers.get("num_batches_tracked")) for layer in layers}
    tensors = [
        tensor
        for tensor in chain.from_iterable(table.values() for table in tables)
        if tensor is not None and id(tensor) not in counts and not tensor.is_inference()
    ]
    attributes = [(steps, "count", steps["count"])]
    for layer in layers:
        if isinstance(layer, NORMS):
            attributes += [
                (layer.__dict__, name, layer.__dict__[name]) for name in ("training", "eps")
            ]
    watched = Watch(
        (), tuple((table, tuple(table.values())) for table in tables), tuple(attributes),
        tuple(tensors),
    )  # fmt: skip
    return watched, {id(tensor) for tensor in tensors}
