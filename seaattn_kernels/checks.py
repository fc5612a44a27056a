"""What the operators accept: ranks, shapes, dtypes, devices, and the rule of autocast.

Every message names the argument and shows the offending value.
"""

import reprlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor

from seaattn_kernels.reference import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {reprlib.repr(x)}"  # an array has many numbers
    return f"shape {tuple(x.shape)}, {x.dtype}, {x.device}"


def check_tensor(name: str, x, layout: str) -> None:
    """Rank and dtype of one argument; ``layout`` reads like ``"B, C, H, W"``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor ({layout}), got {describe(x)}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must have the shape ({layout}), got {describe(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} ({layout}) may be empty in B only, got {describe(x)}")


def check_shape(name: str, x: Tensor, expected: Sequence[int], why: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} {why}, got {describe(x)}")


def check_positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_divides(heads: int, **tensors: Tensor) -> None:
    check_positive("heads", heads)
    for name, x in tensors.items():
        if x.shape[1] % heads:
            raise ValueError(
                f"{name} must have a multiple of heads={heads} channels, got {describe(x)}"
            )


# Asked here, once: not every version of torch.compile traces the question.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
    if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def autocast_off(device: torch.device) -> AbstractContextManager:
    """The tensors are cast: nothing inside an operator may be cast again."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def unify(names: str, tensors: Sequence[Tensor], cast: bool) -> Sequence[Tensor]:
    """One device, one dtype. Under autocast: its dtype where ``cast``, else the widest one's."""
    first = tensors[0]
    for name, x in zip(names.split(), tensors, strict=True):
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, {names.split()[0]} on {first.device}")
    target = autocast_dtype(first.device)
    if target is not None:
        if not cast:
            target = first.dtype
            for x in tensors:
                target = torch.promote_types(target, x.dtype)
            return [x.to(target) for x in tensors]
        if not any(x.dtype is torch.float64 for x in tensors):
            return [x.to(target) for x in tensors]
    for name, x in zip(names.split(), tensors, strict=True):
        if x.dtype is not first.dtype:
            raise TypeError(f"{name} is {x.dtype}, {names.split()[0]} is {first.dtype}")
    return tensors


def check_input(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless ``x`` is a map for a block whose first product has this ``(NQ, C, ...)`` weight.

    ``dtype`` is the block's, by default the weight's; under autocast any float dtype will do.
    """
    check_tensor("x", x, "B, C, H, W")
    dtype = dtype or weight.dtype
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have C={weight.shape[1]} channels, got {describe(x)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}")
    if x.dtype is not dtype:
        double = x.dtype is torch.float64 or dtype is torch.float64
        if double or autocast_dtype(x.device) is None:
            raise TypeError(f"x is {x.dtype}, the weights are {dtype}")


def activation_code(activation: str) -> int:
    """The number that stands for an activation in a schema; ``ValueError`` for an unknown name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return ACTIVATIONS.index(activation)
