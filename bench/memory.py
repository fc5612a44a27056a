"""Memory that a call takes beyond its result, as torch's allocators record it.

Other runtimes have allocators of their own: what they take is not seen.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    """Bytes beyond the result: most at once, and of all allocations together (on a CPU)."""

    peak: int
    total: int | None


def allocated(call: Callable[[], object], device: torch.device) -> Allocated:
    """What a warm ``call`` allocates; its result is a tensor or a sequence of them."""
    call()
    return _on_a_gpu(call, device) if device.type == "cuda" else _on_a_cpu(call)


def _on_a_gpu(call: Callable[[], object], device: torch.device) -> Allocated:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = _bytes(call())
    return Allocated(torch.cuda.max_memory_allocated(device) - before - result, None)


def _on_a_cpu(call: Callable[[], object]) -> Allocated:
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = call()
    result = _bytes(out)
    del out
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return Allocated(peak - result, sum(size for size in sizes if size > 0) - result)


def _bytes(out: object) -> int:
    tensors: Sequence = (out,) if isinstance(out, Tensor) else out
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the terminal what the profiler says at its begin and end, below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
