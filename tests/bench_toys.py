"""A block that takes no time, and rows as ``measure`` makes them, for tests of the benchmark."""

from pathlib import Path

import torch

from bench import results
from bench.cases import Case
from bench.works import Block, Operator, Setting

ROOT = Path(__file__).parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOY = Case("toy", 8, 4, 1, stride=4)
PNG = b"\x89PNG\r\n\x1a\n"
#: What says which measurement a row is.
IDENTITY = (
    "kind", "what", "mode", "case", "height", "width", "batch", "dtype", "device", "threads",
    "provider", "way",
)  # fmt: skip


def block(step: bool = False, batch: int = 1, case: Case = TOY, size=(3, 4), **more) -> Block:
    return Block(case, size, setting(step=step, batch=batch, **more))


def operator(name: str, step: bool = False, batch: int = 1, **more) -> Operator:
    return Operator(name, TOY, (3, 4), setting(step=step, batch=batch, **more))


def setting(device=CPU, dtype=torch.float32, batch: int = 1, step: bool = False) -> Setting:
    return Setting(device, dtype, batch, step)


def row(provider: str = "auto", ms: float = 1.0, eager: float = 2.0, **more) -> dict:
    """A row of a block that nobody measured."""
    ms = eager if provider == "eager" else ms
    found = {
        "kind": "block", "what": "block", "mode": "forward", "case": "T1", "height": 16,
        "width": 16, "batch": 1, "dtype": "float32", "device": "cpu", "threads": 2,
        "provider": provider, "way": "call", "ms": ms, "ms_low": 0.99 * ms, "ms_high": 1.01 * ms,
        "ms_first": 9.0, "ms_cold": None, "timed_blocks": 20, "speedup": eager / ms,
        "flops": 10**8, "bytes": 10**6, "gflops": 0.1 / ms * 1e3, "gbytes": 1 / ms,
        "ms_limit": 0.5, "of_limit": ms / 0.5, "matrix_gflops": 200.0, "copy_gbytes": 10.0,
        "rms_error": 1e-7, "rms_error_eager": 2e-7, "max_error": 1e-6, "max_error_eager": 2e-6,
        "backend": "cpu" if provider == "auto" else provider,
        "peak_bytes": 3 * 2**19, "allocated_bytes": 3 * 2**20, "command": "python -m bench run",
    }  # fmt: skip
    return {**found, **more}


def document(rows, **more) -> dict:
    """Of rows, as ``bench run`` writes it."""
    return {**results.document(rows, CPU), "not_timed": [], "done": [], **more}
