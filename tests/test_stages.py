"""The model of what a block costs: its numbers, and the crossover that follows from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import stages, static
from bench.cases import CASES
from seaattn_kernels.crossover import EXACT_FLOAT32_FLOPS

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """Python in a process in which Triton compiles, whatever it does in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


STAGES = """
import json, torch
from bench import stages, static
from bench.cases import CASES

rows = stages.stages(static.TARGETS["sm_90"], torch.float16, [CASES["B1"]])
print(json.dumps(stages.as_data(rows)))
print(stages.table(rows))
"""


def test_stages():
    case = CASES["B1"]
    data, *table = run(STAGES).splitlines()
    rows = json.loads(data)
    assert len(rows) == 2 * len(case.maps) == len(table) - 1
    for row, line in zip(rows, table[1:], strict=True):
        assert 4 <= len(row["kernels"]) == len(row["programs"]) == len(row["waves"]) <= 5
        assert all(waves > 0 for waves in row["waves"])
        assert row["predicted_us"] > row["limit_us"] > stages.LAUNCH_US
        shape = f"{row['batch']}x{row['height']}x{row['width']}"
        assert f"B1          {shape} " in line
        assert f"finish {row['programs'][-1]} (" in line
        least = case.flops(row["height"], row["width"], row["batch"])
        assert 0.9 * least <= row["flops"] <= 1.4 * least
        fewest = case.fewest_bytes(row["height"], row["width"], row["batch"], 2)
        assert row["bytes"] > fewest
    # A wave is what the card holds at once: 132 multiprocessors, several programs each.
    large = next(row for row in rows if row["batch"] == 64 and row["width"] == 64)
    assert large["programs"][-1] == 4096
    assert large["waves"][-1] < 4096 / 132


def test_limit_of_a_stage():
    target, case = static.TARGETS["sm_90"], CASES["B1"]
    small = stages.limit_us(case, (8, 8), 1, torch.float16, target)
    assert stages.LAUNCH_US < small < stages.LAUNCH_US + 0.2
    large = stages.limit_us(case, (32, 32), 64, torch.float16, target)
    assert large == pytest.approx(2 + case.flops(32, 32, 64) / 989e6)


CROSSOVER = """
from bench import stages, static
for target in static.TARGETS.values():
    if target.strict:
        print(*target.capability, stages.crossover_flops(target))
"""


def test_the_crossover_table_is_what_the_model_says():
    found = {}
    for line in run(CROSSOVER).splitlines():
        major, minor, flops = line.split()
        found[int(major), int(minor)] = float(flops)
    assert found.keys() >= EXACT_FLOAT32_FLOPS.keys()
    for capability, flops in found.items():
        assert EXACT_FLOAT32_FLOPS.get(capability, float("inf")) == pytest.approx(flops, rel=0.05)
