"""What every launcher needs, and all that differs between devices and versions of Triton."""

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

#: Whether Triton interprets kernels on the CPU; it reads the environment when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Contraction of a*b + c is chosen here: the default differs between versions of Triton.
_OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}

#: The launches of each thread, while they are recorded.
_thread = threading.local()


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Run ``programs`` of a kernel on the device of the first argument, on its current stream.

    Triton launches on the current device: it is made that of the tensors, in a backward pass too.
    """
    device = arguments[0].device
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[(programs,)](*arguments, **constants, **_OPTIONS)
    else:
        compiled = kernel[(programs,)](*arguments, **constants, **_OPTIONS)
    if getattr(_thread, "launches", None) is not None:
        note(_handle(compiled, len(arguments)), (programs, 1, 1), arguments)


# --- launches that csrc/triton repeats -------------------------------------------------------


class Handle(NamedTuple):
    """A kernel as the driver launches it. ``kinds``: of its parameters, as Triton names them."""

    function: int
    threads: int
    shared: int  # bytes of shared memory
    kinds: tuple[str, ...]


@contextmanager
def recording() -> Iterator[list[tuple]]:
    """Note the launches of this thread: kernel (None: of no use alone), grid, arguments."""
    _thread.launches = launches = []
    try:
        yield launches
    finally:
        _thread.launches = None


def note(handle: Handle | None, grid: tuple[int, int, int], arguments: Sequence) -> None:
    """Add a launch to those that this thread records, if it does."""
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        launches.append((handle, grid, arguments))


#: What a kernel may need of a launch beside programs, threads, shared memory and arguments.
_NEEDS = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")


def plan(launches: Sequence[tuple], tensors: Sequence[Tensor]) -> list[int]:
    """The recorded launches as numbers, which csrc/triton repeats with other tensors.

    First the bytes of the workspace, the one allocation that is none of ``tensors``. Then of each
    launch: the handle of the kernel, the three sizes of its grid, threads, bytes of shared memory,
    the number of parameters, and two numbers for each of these. They are the place of a tensor,
    after all of them the workspace's, and bytes from its begin; or -1 and a number as the kernel
    takes it.

    Empty where the launches cannot be repeated from that.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    workspaces = {}
    numbers = []
    for handle, grid, arguments in launches:
        if handle is None:
            return []
        parameters = []
        # Triton passes null for what is no argument: two scratches, which no such kernel needs.
        for argument, kind in zip_longest(arguments, handle.kinds, fillvalue=0):
            if kind == "constexpr":  # the number 1, which is compiled in
                continue
            if not isinstance(argument, Tensor):
                parameters.append((-1, _bits(argument, kind)))
            elif id(argument) in places:
                parameters.append((places[id(argument)], 0))
            else:
                storage = argument.untyped_storage()
                workspaces[storage.data_ptr()] = storage.nbytes()
                parameters.append((len(tensors), argument.data_ptr() - storage.data_ptr()))
        if (-1, None) in parameters:
            return []
        numbers += [handle.function, *grid, handle.threads, handle.shared]
        numbers += [len(parameters), *(number for pair in parameters for number in pair)]
    return [*workspaces.values(), *numbers] if len(workspaces) == 1 else []


def _handle(compiled, count: int) -> Handle | None:
    """Of what Triton compiled for so many arguments; None where a launch needs more than these."""
    if compiled is None or compiled.metadata.num_ctas != 1:
        return None
    metadata = compiled.metadata
    if any(getattr(metadata, need, True) for need in _NEEDS):
        return None
    kinds = list(compiled.src.signature.values())[:count]  # it goes on with the constants
    passed = sum(kind != "constexpr" for kind in kinds) + 2
    if passed != _parameters(compiled):
        return None
    return Handle(
        compiled.function, 32 * metadata.num_warps, metadata.shared, (*kinds, "i64", "i64")
    )


def _bits(number: float, kind: str) -> int | None:
    """A number as an integer whose low bytes a kernel reads; None for kinds that none has here."""
    if kind == "fp32":
        return struct.unpack("<i", struct.pack("<f", number))[0]
    return int(number) if kind in ("i32", "i64") else None


def _parameters(compiled) -> int:
    """How many parameters the binary of a kernel takes; 0 where Triton kept no assembly."""
    _, _, entry = compiled.asm.get("ptx", "").partition(".entry")
    return entry.partition(")")[0].count(".param")


# --- what differs between devices ------------------------------------------------------------


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at the least."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def all_registers(x: Tensor) -> dict[str, int]:
    """The option that keeps an assembler from spilling to fit one more program into a
    multiprocessor, for kernels whose programs are few."""
    return {"maxnreg": 255} if capability(x.device) > (0, 0) else {}


def cdiv(n: int, size: int) -> int:
    """How many blocks of ``size`` cover ``n``. Triton's own takes 4 us a call on the host."""
    return -(-n // size)


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that holds ``n``, between the bounds."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


def precision(x: Tensor, switch=None) -> str:
    """The input precision of products: PyTorch's TF32 switch of matmul for float32.

    ``switch``: another one of ``torch.backends``. The factors of attention are float32 whatever
    ``x`` is. TF32 drops their low bits without rounding: less than bfloat16 has lost, more than
    float16 has. Factors in half precision take no notice.
    """
    if capability(x.device) < (8, 0) or x.dtype is torch.float16:
        return "ieee"
    # allow_tf32, the older name of the switch, cannot be read where the newer one was set.
    switch = switch or torch.backends.cuda.matmul
    return "ieee" if x.dtype is torch.float32 and switch.fp32_precision != "tf32" else "tf32"


def fine_precision(x: Tensor) -> str:
    """As :func:`precision`, and for float16 on matrix units what float32 has but for a bit or two:
    three TF32 products, of the high and the low bits."""
    if capability(x.device) >= (8, 0) and x.dtype is torch.float16:
        return "tf32x3"
    return precision(x)
