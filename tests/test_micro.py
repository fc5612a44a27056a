"""The microbenchmarks: collected by pytest, in groups, and comparable as its users know it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_micro(tmp_path, library):
    path = tmp_path / "micro.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider",
            "-k", "B1 and (gate or block) and (eager or cpu)", f"--benchmark-json={path}",
            "--benchmark-max-time=0.01", "--benchmark-min-rounds=1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        # Beside other workers of a parallel run pytest-benchmark would time nothing.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["benchmarks"]
    groups = {(one["group"], one["params"]["provider"]) for one in found}
    assert groups == {
        (f"{what} {mode} B1 16x16", provider)
        for what in ("gate", "block")
        for mode in ("forward", "step")
        for provider in ("eager", "cpu")
    }
    assert all(one["stats"]["median"] > 0 for one in found)
