"""The timing loop: check, then time candidates interleaved in one run.

A time means something only beside another one of the same run. So candidates take turns in short
blocks, the order rotates, and the median over blocks is reported with an interval. The first call
(folding, compilation, page faults) is timed apart.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seaattn_kernels.budget import Verdict, judge

BLOCK_SECONDS = 0.005
MOST_REPETITIONS = 1000
FEWEST_ROUNDS = 5
#: Thread pools spin on after a call; the next candidate must not share the cores with them.
PAUSE_SECONDS = 0.005


class Timing(NamedTuple):
    """Seconds a call: the median over blocks, its 95 % interval, and the first call."""

    median: float
    low: float
    high: float
    first: float
    blocks: int


class Measured(NamedTuple):
    """Timings of the candidates that are right, and the reason against each of the others."""

    timings: dict[str, Timing]
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
            names.append(names.pop(0))
            rounds += 1
    return {
        name: Timing(float(np.median(times)), *median_interval(times), first[name], len(times))
        for name, times in samples.items()
    }


def check_then_time(
    candidates: Mapping[str, Callable[[Tensor], Tensor]],
    inputs: Sequence[Tensor],
    truth: Sequence[Tensor],
    seconds: float = 2.0,
    alongside: Mapping[str, Callable[[], object]] | None = None,
) -> Measured:
    """Judge every candidate over all ``inputs``, then time those that are right on the first one.

    Args:
        candidates: functions of a map; ``"eager"`` is among them and is the measure of the others.
        inputs: maps of one shape, dtype and device.
        truth: what the function makes of them in float64.
        seconds: for the timing; see :func:`interleave`.
        alongside: calls timed in the same loop and not judged, such as those of a limit.

    A candidate with a method ``bind`` is called on what that makes of a map, ahead of time. A
    candidate that errs by more than the budget, or raises, is refused, not timed.
    """
    device, dtype = inputs[0].device, inputs[0].dtype
    eager: list[Tensor] = []
    bound: dict[str, object] = {}
    first: dict[str, float] = {}
    verdicts: dict[str, Verdict] = {}
    refused: dict[str, str] = {}
    for name in sorted(candidates, key=lambda name: name != "eager"):
        call = candidates[name]
        bind = getattr(call, "bind", None) or (lambda x: x)

        def start(call=call, bind=bind) -> tuple[object, Tensor]:
            return (taken := bind(inputs[0])), call(taken)

        try:
            first[name], (bound[name], out) = timed_call(start, device)
            outputs = [out, *(call(bind(x)) for x in inputs[1:])]
        except Exception as error:  # compilers raise what they like: the others go on
            if name == "eager":
                raise
            lines = str(error).strip().splitlines() or ["no message"]
            refused[name] = f"raises {type(error).__name__}: {lines[0]}"
            continue
        eager = eager or outputs
        verdicts[name] = judge(outputs, eager, truth, dtype)
        if not verdicts[name].ok:
            refused[name] = f"wrong: {verdicts[name]}"
    calls = {
        name: lambda call=call, taken=bound[name]: call(taken)
        for name, call in candidates.items()
        if name not in refused
    }
    timings = interleave({**calls, **(alongside or {})}, device, seconds, first)
    return Measured(timings, verdicts, refused)


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
