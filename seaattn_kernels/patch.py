"""Swap the Sea_Attention blocks of a model for the operators of this package, and back."""

import copy
import copyreg
import dataclasses
import sys
import types
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from seaattn_kernels import ops, probe
from seaattn_kernels.anatomy import Anatomy, Obstacle, facts, resembles
from seaattn_kernels.checks import autocast_dtype
from seaattn_kernels.fold import FoldCache, cuda_obstacle, traced
from seaattn_kernels.module import SeaAttention, run
from seaattn_kernels.report import Report, Row

_RECORD = "_seaattn"
_TRAINING_OPERATORS = ("training", "axial_attention_pair")


# --- what is reported -------------------------------------------------------------------------


def _describe(row: Row, parts: Anatomy, hard: bool) -> None:
    norms = sorted({type(norm).__name__ if norm else "no norm" for _, norm in parts.convolutions})
    variant = ["+".join(norms), parts.activation, "h_sigmoid" if hard else "sigmoid"]
    if parts.column == "col":
        variant.append("*_col* keys")
    row.variant = ", ".join(variant)
    row.shape = f"C={parts.channels} heads={parts.heads} D={parts.key_dim} E={parts.value_dim}"


def _settle(row: Row, parts: Anatomy, backend: str) -> None:
    """The backend of the whole block, on the device where it is."""
    weight = parts.convolutions[0].conv.weight
    device, dtype = weight.device, weight.dtype
    head = parts.key_dim, parts.value_dim
    obstacle = cuda_obstacle(parts.activation, parts.heads, *head)
    if backend == "auto":
        settled = ops.settle("sea_attention", backend, device, dtype, head, obstacle)
        row.backend, row.reason = settled
        return
    row.backend, row.reason = backend, None
    refused = ops.refusal("sea_attention", backend, device, dtype, head, obstacle)
    for operator in _TRAINING_OPERATORS:
        if refused and (reason := ops.refusal(operator, backend, device, dtype, head)):
            name = row.name or "the model"
            raise RuntimeError(
                f"backend {backend!r} can run {name} neither in eval mode nor in "
                f"training: {refused}; {reason}"
            )


# --- the swapped class -----------------------------------------------------------------------


class _Record:
    """What a swapped block carries beside its own attributes."""

    def __init__(self, row: Row, folds: FoldCache, backend: str, verify: bool = False) -> None:
        self.row = row
        self.folds = folds
        self.backend = backend
        self.verify = verify
        self.verified: set[str] = set()

    def copy(self) -> "_Record":
        """For a copy of the block, which folds for itself and is not verified."""
        row = dataclasses.replace(self.row, verdicts=dict(self.row.verdicts))
        return _Record(row, copy.deepcopy(self.folds), self.backend)

    def __deepcopy__(self, memo: dict) -> "_Record":
        return self.copy()

    def __reduce__(self) -> tuple:
        # Wherever a class of its own ways of pickling takes it along: None.
        return type(None), ()


class Swapped:
    """What a swapped block's class has before its own class.

    Everything but ``forward`` stays what it was: parameters, buffers, ``state_dict``, hooks of the
    block. Copies stay swapped; pickles hold the original class and open without this package.
    """

    #: None in what is made by calling the class, until it is swapped: it runs its own forward.
    _seaattn: _Record | None = None

    def forward(self, *args, **kwargs) -> Tensor:
        # Bound methods and other threads may outlive the swap, hence no super() here.
        record, own = getattr(self, _RECORD, None), _original(type(self)).forward
        if record is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return own(self, *args, **kwargs)
        (x,) = args
        checkable = record.verify and not traced() and not ops.transformed()
        if checkable and not _verified(self, x, record):
            return own(self, x)
        return run(self, x, record.folds, record.backend, partial(own, self))

    def refold(self) -> None:
        """Forget the folded weights, after an update that they cannot see: see SeaAttention."""
        _drop(self)

    def train(self, *args, **kwargs) -> nn.Module:
        _drop(self)
        return super().train(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> nn.Module:
        _drop(self)
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return _swap(super()._replicate_for_data_parallel(), _copied(self._seaattn))

    def __reduce_ex__(self, protocol: int) -> tuple:
        rebuild, arguments, *rest = super().__reduce_ex__(protocol)
        own, original = type(self), _original(type(self))
        arguments = tuple(original if value is own else value for value in arguments)
        if rebuild is copyreg.__newobj__:
            # Pickle insists on the class of the object there, and is to get another one.
            if len(arguments) == 1:
                rebuild, arguments = copyreg._reconstructor, (original, object, None)
            else:
                rebuild, arguments = partial(copyreg.__newobj__, *arguments), ()
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key != _RECORD}
        return rebuild, arguments, *rest

    def __deepcopy__(self, memo: dict) -> nn.Module:
        if hasattr(super(), "__deepcopy__"):
            twin = super().__deepcopy__(memo)
        else:
            twin = _rebuilt(self, lambda state: copy.deepcopy(state, memo), memo)
        return _swap(twin, _copied(self._seaattn))

    def __copy__(self) -> nn.Module:
        if hasattr(super(), "__copy__"):
            twin = super().__copy__()
        else:
            twin = _rebuilt(self, lambda state: state, {})
        return _swap(twin, _copied(self._seaattn))

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` compiles the original forward."""
        twin = copy.copy(self)
        _restore(twin)
        return twin

    def extra_repr(self) -> str:
        own = super().extra_repr()
        if self._seaattn is None:
            return own
        return ", ".join(filter(None, (own, f"backend={self._seaattn.backend!r}")))


@cache
def swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that a block of ``original`` gets: a subclass of it, importable from this file.

    Raises:
        Obstacle: where the class cannot have a subclass.
    """
    module = sys.modules[__name__]
    name, number = f"Swapped_{original.__name__}", 1
    while hasattr(module, name):
        number += 1
        name = f"Swapped_{original.__name__}_{number}"
    body = {"__module__": __name__, "__doc__": original.__doc__}
    try:
        made = types.new_class(name, (Swapped, original), exec_body=lambda ns: ns.update(body))
    except Exception as error:
        raise Obstacle(f"{original.__name__} cannot have a subclass: {error}") from error
    setattr(module, name, made)
    return made


def _original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a block had before the swap, or has."""
    order = kind.__mro__
    return order[order.index(Swapped) + 1] if Swapped in order else kind


def _swap(block: nn.Module, record: _Record | None) -> nn.Module:
    """Give a block the swapped class, and its record."""
    if not isinstance(block, Swapped):
        object.__setattr__(block, "__class__", swapped_class(type(block)))
    if record is not None:
        block.__dict__[_RECORD] = record
    return block


def _copied(record: _Record | None) -> _Record | None:
    return None if record is None else record.copy()


def _drop(block: nn.Module) -> None:
    if (record := getattr(block, _RECORD, None)) is not None:
        record.folds.drop()


def _restore(block: nn.Module) -> None:
    object.__setattr__(block, "__class__", _original(type(block)))
    block.__dict__.pop(_RECORD, None)


def _rebuilt(block: nn.Module, copy_state: Callable, memo: dict) -> nn.Module:
    """A copy of a swapped block in its original class."""
    rebuild, arguments, *rest = block.__reduce_ex__(4)
    twin = memo[id(block)] = rebuild(*arguments)
    if rest and rest[0] is not None:
        twin.__setstate__(copy_state(rest[0]))
    return twin


def _verified(block: nn.Module, x: Tensor, record: _Record) -> bool:
    """Compare at the first call of each kind; a block that fails gets its own forward back."""
    gradients = torch.is_grad_enabled()
    gradients = gradients and (x.requires_grad or any(p.requires_grad for p in block.parameters()))
    kind = _kind_of_call(block, x, gradients)
    if kind is None or kind in record.verified:
        return True
    row = record.row
    try:
        plain = copy.deepcopy(block, probe.without_hooks(block))
        _restore(plain)
        plain.__dict__.pop("forward", None)
        verdicts = probe.compare(plain, x, record.folds, record.backend, gradients)
    except Exception as error:
        if record.backend not in ("auto", "reference"):
            raise  # an explicit backend never gives way
        # Unverified, it runs its own forward, and is compared again at the next call.
        row.reason = f"{kind} could not be compared: {type(error).__name__}: {error}"
        return False
    record.verified.add(kind)
    row.verdicts |= {f"{what} of {kind}": verdict for what, verdict in verdicts.items()}
    failed = [what for what, verdict in verdicts.items() if not verdict.ok]
    if not failed:
        return True
    row.backend = None
    row.reason = f"the {failed[0]} of {kind} missed the error budget: {verdicts[failed[0]]}"
    if isinstance(block, Swapped):
        _restore(block)
    warnings.warn(f"{row.name or row.kind} runs its own forward again: {row.reason}", stacklevel=5)
    return False


def _kind_of_call(block: nn.Module, x: Tensor, gradients: bool) -> str | None:
    """Names the calls that one comparison stands for; None where none can be made."""
    if x.dim() != 4 or x.numel() == 0:
        return None
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    shared = any(isinstance(layer, nn.SyncBatchNorm) for layer in block.modules())
    if grouped and shared and block.training:
        return None  # statistics of all processes: one that compares would wait for the others
    words = ["x".join(map(str, x.shape)), x.device.type, str(x.dtype).removeprefix("torch.")]
    if (dtype := autocast_dtype(x.device)) is not None:
        words.append(f"autocast {str(dtype).removeprefix('torch.')}")
    words.append("training" if block.training else "eval")
    if gradients != block.training:
        words.append("with gradients" if gradients else "without gradients")
    return " ".join(words)


# --- public functions ------------------------------------------------------------------------


class _Found(NamedTuple):
    """A block that can be swapped."""

    block: nn.Module
    row: Row
    probed: probe.Probed


def _survey(model: nn.Module, backend: str | None) -> tuple[Report, list[_Found]]:
    """The report on a model, and those of its blocks that can be swapped.

    ``backend`` is that of all blocks; None for "auto", and what swapped ones have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    report = Report(type(model).__name__, len(modules))
    found: list[_Found] = []
    for name, module in modules.items():
        if isinstance(module, Swapped) and module._seaattn is not None:
            record = module._seaattn.copy()
            report[name] = row = record.row
            row.name = name
            try:
                parts = record.folds.anatomy(module)
                _describe(row, parts, parts.hard)
                _settle(row, parts, backend or record.backend)
            except Obstacle as reason:
                row.backend, row.reason = None, str(reason)
        elif isinstance(module, SeaAttention):
            report[name] = row = Row(name, type(module).__name__)
            row.backend = module.backend
            try:
                parts = module._folds.anatomy(module)
                _describe(row, parts, parts.hard)
                _settle(row, parts, row.backend)
            except (Obstacle, RuntimeError) as reason:
                row.backend, row.reason = None, str(reason)
            else:
                row.reason = row.reason or "already, a module of this package"
        elif resembles(module):
            report[name] = row = Row(name, _original(type(module)).__name__)
            try:
                probe.check_forward(module, _original(type(module)))
                probed = probe.probe(module)
            except Obstacle as reason:
                row.reason = str(reason)
                continue
            row.error = probed.error
            _describe(row, probed.anatomy, probed.hard)
            _settle(row, probed.anatomy, backend or "auto")
            found.append(_Found(module, row, probed))
    return report, found


def replace_sea_attention(model: nn.Module, backend: str = "auto", verify: bool = False) -> Report:
    """Let the Sea_Attention blocks of a model run on the operators of this package, in place.

    Blocks are recognised by their layers, whatever their class is called: upstream's, and copies
    with BatchNorm, SyncBatchNorm or biases, with ReLU, ReLU6, LeakyReLU or SiLU, with the hard or
    the true sigmoid. Each is first compared with its own forward and backward in float64 on a
    random copy. What differs, carries hooks or parametrizations inside, or holds layers of an
    unknown class, stays as it is, and the report says why.

    A block keeps its parameters, buffers, hooks and ``state_dict``; its class becomes a subclass of
    its own class. Copies stay swapped. Pickles hold the original class: they open, and run the
    original forward, without this package. Swapping again changes ``backend`` and ``verify`` only.

    Args:
        model: any module; blocks are looked for in all its submodules and in itself.
        backend: see :data:`ops.BACKENDS`.
        verify: at the first call of each shape, dtype and mode, hold the block to the error budget
            on the very map, in training with gradients; a block that misses it gets its own forward
            back, with a warning and the error in the report. Costs some thirty forwards of a block.

    Returns:
        The :class:`Report`, by name of the module; ``verify`` writes into it while the model runs.

    Raises:
        TypeError, ValueError: for a model that is no module, an unknown backend.
        RuntimeError: where an explicit backend can run a block neither in eval mode nor in
            training, with the reason; then nothing is swapped.
    """
    ops.check_backend(backend)
    report, found = _survey(model, backend)
    report.swapped = True
    for name, block in model.named_modules():
        if isinstance(block, Swapped) and block._seaattn is not None:
            record = _Record(report[name], block._seaattn.folds, backend, verify)
            block.__dict__[_RECORD] = record
    for block, row, probed in found:
        kinds = probed.anatomy.unproven | {_original(type(block))}
        folds = FoldCache(kinds, probed.hard, facts(block, kinds))
        try:
            _swap(block, _Record(row, folds, backend, verify))
        except Obstacle as reason:
            row.backend, row.reason = None, str(reason)
    return report


def restore_sea_attention(model: nn.Module) -> list[str]:
    """Give every block that :func:`replace_sea_attention` swapped its own class back.

    Returns:
        The names of those blocks.

    Raises:
        RuntimeError: where somebody else changed the class of a block after the swap.
    """
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, Swapped)}
    for name, block in swapped.items():
        if type(block) is not swapped_class(_original(type(block))):
            raise RuntimeError(
                f"{name or 'the model'} became a {type(block).__name__} after the swap: undo that"
            )
    for block in swapped.values():
        _restore(block)
    return list(swapped)


def explain(model: nn.Module) -> Report:
    """What :func:`replace_sea_attention` would do to a model, which stays as it is."""
    return _survey(model, None)[0]
