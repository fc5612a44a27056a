"""Microbenchmarks under pytest-benchmark: an operator, or the block, and a backend each.

    pytest bench/micro --benchmark-autosave
    pytest bench/micro --benchmark-compare --benchmark-compare-fail=median:10%

Results are in groups by work, mode and map. Absolute times of an idle machine: `python -m bench`
compares in turns.
"""

import pytest
import torch

from bench.cases import CASES
from bench.measure import refusal
from bench.timing import started
from bench.works import OPERATORS, Block, Operator, Setting
from seaattn_kernels import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Of SeaFormer-B at 512x512, of -L, and of YOLOv8n at 640x640.
MAPS = (("B1", (16, 16)), ("L1", (32, 32)), ("YOLOv8n-P3", (80, 80)))
BACKENDS = ("eager", *ops.BACKENDS[1:])


@pytest.mark.parametrize("provider", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("what", [*OPERATORS, "block"])
@pytest.mark.parametrize(("case", "size"), MAPS, ids=[case for case, _ in MAPS])
def test_micro(benchmark, case, size, what, mode, provider):
    setting = Setting(DEVICE, torch.float32, step=mode == "step")
    work = (
        Block(CASES[case], size, setting)
        if what == "block"
        else Operator(what, CASES[case], size, setting)
    )
    if provider != "eager" and (reason := refusal(provider, work)):
        pytest.skip(reason)
    benchmark.group = f"{what} {mode} {case} {size[0]}x{size[1]}"
    candidate = work.candidate(provider)
    with torch.inference_mode(not setting.step):
        call, _, _ = started(candidate, work.given(0), DEVICE)

        def done() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark(done)
