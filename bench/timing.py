"""The timing loop: check, then time candidates interleaved in one run.

A time means something only beside another one of the same run. So candidates take turns in short
blocks, the order rotates, and the median over blocks is reported with an interval. The first call
(folding, compilation, page faults) is timed apart. On a GPU blocks are timed by events, warm, and
once more a call at a time with the L2 cache overwritten before each.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seaattn_kernels.budget import Verdict, judge

BLOCK_SECONDS = 0.005
MOST_REPETITIONS = 1000
FEWEST_ROUNDS = 5
#: Thread pools spin on after a call; the next candidate must not share the cores with them.
PAUSE_SECONDS = 0.005
#: Calls of a block that are timed with a cold L2 cache.
COLD_CALLS = 5

#: A gradient below this share of the largest may be 0 but for rounding, as that of a bias before a
#: BatchNorm is: its error is not measured by its own size.
ROUNDING = 1e-4

Result = Tensor | Sequence[Tensor]


class Timing(NamedTuple):
    """Seconds a call: the median over blocks, its 95 % interval, and the first call.

    ``cold``: the median with the L2 cache overwritten before each call; None on a CPU.
    """

    median: float
    low: float
    high: float
    first: float
    blocks: int
    cold: float | None = None


class Checked(NamedTuple):
    """The calls of candidates that are right, the seconds of their first ones, all verdicts.

    ``refused``: the reason against each that is not right.
    """

    calls: dict[str, Callable[[], Result]]
    first: dict[str, float]
    verdicts: dict[str, Verdict]
    refused: dict[str, str]


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """``torch.set_num_threads``, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Order statistics that hold the median with 95 % confidence (below six samples: the extremes).

    How many samples lie below the true median is binomial, whatever the distribution of times: drop
    as many on each side as leave at most 1/40 of the probability there.
    """
    ordered = np.sort(samples)
    n, rank, below = len(ordered), 0, 1
    while 40 * (below + math.comb(n, rank + 1)) <= 2**n:
        rank += 1
        below += math.comb(n, rank)
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: str | torch.device = "cpu",
    seconds: float = 2.0,
    first: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time ``calls`` in turns for about ``seconds``, but for five rounds at least.

    ``first`` has the seconds of the first call of those that were called before.
    """
    device = torch.device(device)
    first = dict(first or {})
    samples: dict[str, list[float]] = {name: [] for name in calls}
    cold: dict[str, list[float]] = {name: [] for name in calls}
    flush = _flush(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name, call in calls.items():
            if name not in first:
                first[name], _ = timed_call(call, device)
        repetitions = {}
        for name, call in calls.items():
            estimate, _ = timed_call(call, device)
            wanted = math.ceil(BLOCK_SECONDS / max(estimate, 1e-9))
            repetitions[name] = min(wanted, MOST_REPETITIONS)
        names, rounds, start = list(calls), 0, time.perf_counter()
        while rounds < FEWEST_ROUNDS or time.perf_counter() - start < seconds:
            for name in names:
                time.sleep(PAUSE_SECONDS)
                calls[name]()
                samples[name].append(_block(calls[name], repetitions[name], device))
                if flush:
                    cold[name] += _cold(calls[name], flush)
            names.append(names.pop(0))
            rounds += 1
    return {
        name: Timing(
            float(np.median(times)),
            *median_interval(times),
            first[name],
            len(times),
            float(np.median(cold[name])) if cold[name] else None,
        )
        for name, times in samples.items()
    }


def check(
    candidates: Mapping[str, Callable[[Any], Result]],
    inputs: Sequence[Any],
    truth: Sequence[Result],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    gradients: bool = False,
) -> Checked:
    """Judge every candidate over all ``inputs``.

    Args:
        candidates: functions of one input; ``"eager"`` is among them and is the measure of the
            others. Their results are a tensor or a sequence of them.
        inputs: what a candidate takes: a map, or whatever else all of them understand.
        truth: the results in float64.
        dtype: of the results; with ``device``, where they are made.
        gradients: results hold some: each tensor is measured by its largest value, and all are
            held to the budget of gradients.

    A candidate with a method ``bind`` is called on what that makes of an input, ahead of time. A
    candidate that errs by more than the budget, or raises, is refused. The calls are those on the
    first input.
    """
    device = torch.device(device)
    exact = [tensor for result in truth for tensor in _tensors(result)]
    sizes = [t.detach().abs().max().item() for t in exact]
    sizes = [max(size, ROUNDING * max(sizes)) for size in sizes]

    def measured(results: Sequence[Result]) -> list[Tensor]:
        tensors = [tensor for result in results for tensor in _tensors(result)]
        if not gradients:
            return tensors
        return [t.detach().double() / size for t, size in zip(tensors, sizes, strict=True)]

    exact = measured(truth)
    eager: list[Tensor] = []
    found = Checked({}, {}, {}, {})
    for name in sorted(candidates, key=lambda name: name != "eager"):
        candidate = candidates[name]
        try:
            call, first, out = started(candidate, inputs[0], device)
            others = (started(candidate, x, device)[2] for x in inputs[1:])
            outputs = measured([out, *others])
        except Exception as error:  # compilers raise what they like: the others go on
            if name == "eager":
                raise
            lines = str(error).strip().splitlines() or ["no message"]
            found.refused[name] = f"raises {type(error).__name__}: {lines[0]}"
            continue
        eager = eager or outputs
        found.verdicts[name] = judge(outputs, eager, exact, dtype, gradient=gradients)
        if found.verdicts[name].ok:
            found.calls[name], found.first[name] = call, first
        else:
            found.refused[name] = f"wrong: {found.verdicts[name]}"
    return found


def started(
    candidate: Callable[[Any], Result], given: object, device: torch.device
) -> tuple[Callable[[], Result], float, Result]:
    """A candidate bound to an input: the call, seconds of the first, its result."""
    bind = getattr(candidate, "bind", None) or (lambda x: x)

    def start() -> tuple[object, Result]:
        return (taken := bind(given)), candidate(taken)

    seconds, (taken, out) = timed_call(start, device)
    return partial(candidate, taken), seconds, out


def _tensors(result: Result) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def timed_call(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Seconds of one call until its work is done, by the host's clock, and its result."""
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _block(call: Callable[[], object], repetitions: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repetitions):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repetitions
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def _flush(device: torch.device) -> Callable[[], object] | None:
    """Writes more than the L2 cache holds; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _cold(call: Callable[[], object], flush: Callable[[], object]) -> list[float]:
    """Seconds of single calls, each after ``flush``."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(COLD_CALLS)]
    for begin, end in pairs:
        flush()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
