"""What the launches of a block cost by the model, at every stage of the models, without a GPU.

    waves       programs over the most that the card holds at once
    predicted   for each launch LAUNCH_US and the larger of FLOP / rate and bytes / bandwidth, the
                rate cut by the multiprocessors that have no program in the last wave
    limit       the larger of FLOP / rate and bytes / bandwidth of the block as a whole, every map
                once, and one launch: that of bench/limit.py, from the data sheet

Rates are the card's; no product reaches them, so the predictions compare shapes and do not promise
times. The same model says from where on folded PyTorch is the faster of the two.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bench import static
from bench.cases import CASES, Case

#: A kernel that waits for the one before in a CUDA graph.
LAUNCH_US = 2.0
#: What folded PyTorch launches, and how often it reads or writes a map of C, NQ and DH channels.
FOLDED_LAUNCHES, FOLDED_MAPS = 20, (10, 6, 7)
#: The part of the rate that products in exact float32 reach: from a library, and in these kernels,
#: which keep their factors in registers. An assumption until it is measured.
LIBRARY_RATE, KERNEL_RATE = 0.85, 0.35


@dataclass(frozen=True)
class Stage:
    """A block at one map, by the launches in order."""

    case: str
    batch: int
    height: int
    width: int
    dtype: str
    target: str
    kernels: list[str]
    programs: list[int]
    waves: list[float]
    flops: int
    bytes: int
    predicted_us: float
    limit_us: float


def recorded(
    case: Case, size: tuple[int, int], batch: int, dtype: torch.dtype, target: static.Target
) -> list[static.Launch]:
    """The launches of a block, in order."""
    found: list[static.Launch] = []
    x = torch.empty(batch, case.channels, *size, dtype=dtype, device="meta")
    with static.recorded(target, found.append, [f"{case.name} {batch}x{size[0]}x{size[1]}"]):
        static.whole_block(x, case.heads, case.key_dim, case.values // case.heads)
    return found


def stages(
    target: static.Target,
    dtype: torch.dtype = torch.float16,
    cases: Sequence[Case] = tuple(CASES.values()),
    batches: Sequence[int] = static.BATCHES,
) -> list[Stage]:
    """Every case at every map and batch."""
    calls = [
        (case, size, batch, recorded(case, size, batch, dtype, target))
        for case in cases
        for size in case.maps.values()
        for batch in batches
    ]
    unique = {one.kernel + one.data: one for *_, launches in calls for one in launches}
    rows = static.compiled_in_parallel(list(unique.values()))
    resident = {key: max(1, row.resident) for key, row in zip(unique, rows, strict=True)}
    return [
        Stage(
            case.name,
            batch,
            *size,
            str(dtype).removeprefix("torch."),
            target.name,
            kernels=[one.kernel.removesuffix("_kernel") for one in launches],
            programs=[one.programs for one in launches],
            waves=[
                one.programs / (target.processors * resident[one.kernel + one.data])
                for one in launches
            ],
            flops=sum(one.flops for one in launches),
            bytes=sum(one.bytes for one in launches),
            predicted_us=sum(LAUNCH_US + _work_us(one, target) for one in launches),
            limit_us=limit_us(case, size, batch, dtype, target),
        )
        for case, size, batch, launches in calls
    ]


def _work_us(launched: static.Launch, target: static.Target) -> float:
    full = -(-launched.programs // target.processors) * target.processors
    products_us, bytes_us = static.bounds_us(launched)
    return max(products_us * full / launched.programs, bytes_us)


def limit_us(
    case: Case, size: tuple[int, int], batch: int, dtype: torch.dtype, target: static.Target
) -> float:
    rate = target.half if dtype.itemsize == 2 else target.tflops
    products_us = case.flops(*size, batch) / (rate * 1e6)
    bytes_us = case.fewest_bytes(*size, batch, dtype.itemsize) / (target.gbytes * 1e3)
    return LAUNCH_US + max(products_us, bytes_us)


def table(rows: Sequence[Stage]) -> str:
    """A line for each stage."""
    lines = [
        f"{'stage':<11} {'map':<12} {'target':<7} {'MFLOP':>9} {'MB':>8} {'pred. us':>9} "
        f"{'limit us':>9} {'of it':>6}  launches: programs (waves)"
    ]
    for row in rows:
        launches = ", ".join(
            f"{kernel} {programs} ({waves:.2f})"
            for kernel, programs, waves in zip(row.kernels, row.programs, row.waves, strict=True)
        )
        lines.append(
            f"{row.case:<11} {f'{row.batch}x{row.height}x{row.width}':<12} {row.target:<7} "
            f"{row.flops / 1e6:>9.1f} {row.bytes / 1e6:>8.2f} {row.predicted_us:>9.1f} "
            f"{row.limit_us:>9.1f} {row.limit_us / row.predicted_us:>6.2f}  {launches}"
        )
    return "\n".join(lines)


def as_data(rows: Sequence[Stage]) -> list[dict]:
    return [asdict(row) for row in rows]


# --- where folded PyTorch is faster ----------------------------------------------------------


def exact_float32_us(
    case: Case, size: tuple[int, int], batch: int, target: static.Target
) -> tuple[float, float]:
    """Of this package's launches and of folded PyTorch, with exact products of float32."""
    flops = case.flops(*size, batch)
    pixels = batch * size[0] * size[1]
    widths = (case.channels, case.projected, case.values)
    folded_bytes = 4 * pixels * sum(n * c for n, c in zip(FOLDED_MAPS, widths, strict=True))
    fused = 0.0
    with static.float32_products("ieee"):
        launches = recorded(case, size, batch, torch.float32, target)
    for launched in launches:
        products_us, bytes_us = static.bounds_us(launched)
        fused += LAUNCH_US + max(products_us / KERNEL_RATE, bytes_us)
    # Every map goes through memory between two launches: the times add up.
    folded = FOLDED_LAUNCHES * LAUNCH_US + flops / (LIBRARY_RATE * target.tflops * 1e6)
    return fused, folded + folded_bytes / (target.gbytes * 1e3)


def crossover_flops(target: static.Target, batches: Sequence[int] = static.BATCHES) -> float:
    """FLOP of the largest call below which these kernels always win in exact float32, by the model;
    infinity where they win everywhere."""
    calls = [
        (case.flops(*size, batch), *exact_float32_us(case, size, batch, target))
        for case in CASES.values()
        for size in case.maps.values()
        for batch in batches
    ]
    lost = min((flops for flops, fused, folded in calls if fused > folded), default=math.inf)
    won = [flops for flops, _, _ in calls if flops < lost]
    return math.inf if len(won) == len(calls) else max(won)
