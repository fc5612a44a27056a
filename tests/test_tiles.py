"""The times of tiles, and the constants that follow from them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tiles
from bench.cases import CASES
from seaattn_kernels.kernels import cuda, tile_costs

ROOT = Path(__file__).parents[1]


def timed(name, batch, side, fixed, jobs):
    case = CASES[name]
    us = {
        tile: fixed + jobs[tile[:2]] * tile.jobs(case.projected, case.values)
        for tile in cuda.tiles(case.projected)
    }
    return tiles.Timed(case, batch, side, side, us)


def test_the_constants_of_such_times_are_found_again():
    jobs = {kind: 0.5 + at for at, kind in enumerate(sorted(tile_costs.JOB_US))}
    given = [timed(name, 1, side, 4.0, jobs) for name, side in (("T1", 7), ("B1", 16), ("L3", 16))]
    crowded = timed("B1", 64, 32, 1000.0, jobs)  # more than a wave: not looked at
    fixed, found = tiles.fit([*given, crowded], 132)
    assert fixed == pytest.approx(4.0)
    assert found == pytest.approx(jobs)


def test_what_is_written_is_what_is_there():
    assert Path(tile_costs.__file__).read_text() == tiles.source(
        tile_costs.FIXED_US, tile_costs.JOB_US, "NVIDIA H200"
    )
    changed = {}
    exec(tiles.source(1.25, {(8, 64): 0.456}, "other GPU"), changed)
    assert changed["FIXED_US"] == pytest.approx(1.2)
    assert changed["JOB_US"] == {(8, 64): 0.46}
    assert "other GPU" in changed["__doc__"]


def test_a_line_tells_the_loss_of_the_choice():
    one = timed("B1", 1, 16, tile_costs.FIXED_US, tile_costs.JOB_US)
    assert "chosen 8-64-8" in one.line(132)
    assert one.line(132).endswith("  0 % slower")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be tiles")
def test_without_a_gpu_the_command_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tiles"], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "there are no tiles to time" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
def test_tiles_are_timed():
    found = tiles.measure("T1", 1, 7, 7, 0.01)
    assert set(found.us) == set(cuda.tiles(256))
    assert all(1 < us < 1000 for us in found.us.values())
