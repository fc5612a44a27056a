"""Memory that the block takes in a forward on a CPU, beside what eager's operations allocate.

Read from the profiler's record of torch's allocator: nothing is assumed of what a call needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import Case
from bench.eager import as_eager
from bench.measure import block_of
from bench.timing import with_threads


class Allocated(NamedTuple):
    """Bytes beyond the result: of all tensors together, and most at once."""

    total: int
    peak: int


def measure(
    jobs: Sequence[tuple[Case, tuple[int, int]]], batch: int, threads: Sequence[int]
) -> list[dict]:
    """A row for each map and number of threads, in float32."""
    rows = []
    # One record of everything: the profiler announces each on the terminal.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for count in threads:
            with with_threads(count), torch.no_grad():
                for case, size in jobs:
                    row = {
                        "kind": "memory",
                        "case": case.name,
                        "height": size[0],
                        "width": size[1],
                        "batch": batch,
                        "dtype": "float32",
                        "device": "cpu",
                        "threads": count,
                    }
                    block, x = block_of(case), torch.randn(batch, case.channels, *size)
                    for name, model in (("eager", as_eager(block)), ("ours", block)):
                        model(x)  # which keeps folded weights
                        with record_function(f"{name} {len(rows)}"):
                            out: Tensor | None = model(x)
                        row["result_bytes"] = out.numel() * out.element_size()
                        out = None
                    rows.append(row)
    found = _within(record)
    for index, row in enumerate(rows):
        eager, ours = (_beyond(found[f"{name} {index}"], row) for name in ("eager", "ours"))
        row["eager_bytes"], row["eager_peak_bytes"] = eager
        row["scratch_bytes"], row["of_eager"] = ours.peak, ours.peak / eager.total
    return rows


def _within(record: profile) -> dict[str, list[int]]:
    """Bytes that were allocated (or freed, below 0) within each ``record_function``, in order."""
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.is_user_annotation()}
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return {
        name: [size for time, size in memory if begin <= time <= end]
        for name, (begin, end) in spans.items()
    }


def _beyond(sizes: Sequence[int], row: dict) -> Allocated:
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    total = sum(size for size in sizes if size > 0)
    return Allocated(total - row["result_bytes"], peak - row["result_bytes"])
