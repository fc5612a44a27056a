"""What every tile of csrc/cuda/finish.cu takes on this GPU, and what the choice among them loses.

A time is that of one launch in a CUDA graph of twenty, the tiles of a map interleaved. From those
that fill the GPU at most once follow the constants of ``kernels/tile_costs.py``, by least squares:
a tile takes FIXED_US and JOB_US for each of its jobs.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from bench.cases import CASES, Case
from bench.measure import capture
from bench.timing import interleave
from bench.works import block_of
from seaattn_kernels import native
from seaattn_kernels.kernels import cuda, tile_costs

_LAUNCHES = 20
#: The cases and maps that are timed, by batch.
MAPS = {
    1: [("T1", 7, 7), ("B1", 16, 16), ("B1", 32, 32), ("L1", 64, 64), ("L3", 16, 16)],
    16: [("B1", 16, 16), ("L2", 32, 32), ("YOLOv8s-P3", 80, 80), ("YOLOv8s-P5", 20, 20)],
    64: [("T1", 16, 16), ("B1", 32, 32)],
}


class Timed(NamedTuple):
    """The microseconds of each tile at a map."""

    case: Case
    batch: int
    height: int
    width: int
    us: Mapping[cuda.Tile, float]

    def line(self, processors: int) -> str:
        best = min(self.us, key=self.us.get)
        sizes = self.batch, self.height, self.width
        chosen = cuda.finish_tile(
            *sizes, self.case.channels, self.case.projected, self.case.values, processors
        )
        loss = self.us[chosen] / self.us[best] - 1
        return (
            f"{self.case.name:<12} {'x'.join(map(str, sizes)):<10} best {_name(best):<9} "
            f"{self.us[best]:7.1f} us   chosen {_name(chosen):<9} {100 * loss:3.0f} % slower"
        )


def _name(tile: cuda.Tile) -> str:
    return "-".join(map(str, tile[:3]))


def measure(name: str, batch: int, height: int, width: int, seconds: float) -> Timed:
    """Time the tiles of a block in float16 on random weights."""
    case = CASES[name]
    block = block_of(case).to("cuda", torch.float16)
    x = torch.randn(batch, case.channels, height, width, device="cuda", dtype=torch.float16)
    found: list[tuple] = []
    with torch.no_grad(), mock.patch.object(cuda, "finish", lambda *given: found.append(given)):
        folded = block._folds.get(block)
        torch.ops.seaattn_kernels.sea_attention_plan.cuda(
            x, folded.weights(x.dtype, height, width, "cuda"), folded.heads, folded.key_dim,
            folded.activation_code, folded.negative_slope, folded.hard,
        )  # fmt: skip
    (given,) = found

    def launches(tile: cuda.Tile) -> None:
        for _ in range(_LAUNCHES):
            cuda.finish(*given, tile)

    tiles = cuda.tiles(case.projected)
    calls = {_name(tile): capture(lambda tile=tile: launches(tile))[0] for tile in tiles}
    timings = interleave(calls, "cuda", seconds)
    us = {tile: 1e6 * timings[_name(tile)].median / _LAUNCHES for tile in tiles}
    return Timed(case, batch, height, width, us)


def fit(timed: Iterable[Timed], processors: int) -> tuple[float, dict[tuple[int, int], float]]:
    """FIXED_US and JOB_US."""
    kinds = sorted({tile[:2] for tile in cuda.TILES})
    rows, times = [], []
    for one in timed:
        for tile, us in one.us.items():
            blocks = tile.blocks(one.batch, one.height, one.width, one.case.channels)
            if blocks > processors:
                continue
            row = [1.0] + [0.0] * len(kinds)
            row[1 + kinds.index(tile[:2])] = tile.jobs(one.case.projected, one.case.values)
            rows.append(row)
            times.append(us)
    fixed, *jobs = np.linalg.lstsq(np.array(rows), np.array(times), rcond=None)[0]
    return float(fixed), {kind: float(us) for kind, us in zip(kinds, jobs, strict=True)}


def source(fixed: float, jobs: Mapping[tuple[int, int], float], gpu: str) -> str:
    """The text of ``kernels/tile_costs.py``."""
    lines = Path(tile_costs.__file__).read_text().splitlines(keepends=True)
    begin = next(at for at, line in enumerate(lines) if line.startswith("FIXED_US"))
    head = "".join(
        f"Measured on an {gpu}, float16.\n" if line.startswith("Measured on") else line
        for line in lines[:begin]
    )
    table = "".join(f"    {kind}: {us:.2f},\n" for kind, us in sorted(jobs.items()))
    return f"{head}FIXED_US = {fixed:.1f}\nJOB_US = {{\n{table}}}\n"


def run(arguments: argparse.Namespace) -> int:
    """Print the tiles of each map and the constants; write them where asked."""
    if native.CUDA_REASON is not None or not torch.cuda.is_available():
        print(f"there are no tiles to time: {native.CUDA_REASON or 'no GPU'}")
        return 1
    properties = torch.cuda.get_device_properties("cuda")
    timed = []
    for batch, maps in MAPS.items():
        for name, height, width in maps:
            timed.append(measure(name, batch, height, width, arguments.seconds))
            print(timed[-1].line(properties.multi_processor_count), flush=True)
    text = source(*fit(timed, properties.multi_processor_count), properties.name)
    print(text)
    if arguments.write:
        Path(tile_costs.__file__).write_text(text)
    return 0
