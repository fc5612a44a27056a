"""One block at one map: build the providers, check them, time them, give rows."""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.cases import ACTIVATION, ATTN_RATIO, Case
from bench.eager import as_eager
from bench.limit import limit_of
from bench.timing import check_then_time
from seaattn_kernels import SeaAttention, ops
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.verify import randomise

#: eager: upstream's forward. reference: folded PyTorch. auto: the best backend of the device.
#: compile: eager under torch.compile, compiled anew for each shape.
PROVIDERS = ("eager", "reference", "auto", "compile")
#: Above this ratio of its ends an interval says more about the machine than about the code.
WIDE = 1.5
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_argument(text: str) -> torch.device:
    """A device that is there, for argparse."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return device


def positive_argument(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def busy(rows: Sequence[dict]) -> str | None:
    """A line for the reader where most intervals are wide."""
    wide = sum(row["ms_high"] > WIDE * row["ms_low"] for row in rows)
    if 2 * wide <= len(rows):
        return None
    return f"{wide} of {len(rows)} intervals are wide: is the machine busy with other work?"


def auto_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs whole blocks where nobody asks for one."""
    return ops.choose("sea_attention", "auto", device, dtype)


def available(providers: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """``providers`` and eager, without "auto" where that is the reference, in the usual order."""
    same = auto_backend(device, dtype) == "reference"
    return [
        name
        for name in PROVIDERS
        if name == "eager" or (name in providers and not (name == "auto" and same))
    ]


def block_of(case: Case) -> SeaAttention:
    """The block in eval mode, every parameter and statistic random, on the CPU in float32."""
    block = SeaAttention(case.channels, case.key_dim, case.heads, ATTN_RATIO, ACTIVATION)
    return randomise(block).eval()


def _provide(name: str, block: SeaAttention) -> nn.Module:
    if name == "eager":
        return as_eager(block)
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(as_eager(block), dynamic=False)
    block = copy.deepcopy(block)
    block.backend = name
    return block


def measure(
    case: Case,
    size: tuple[int, int],
    providers: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    seconds: float = 2.0,
    seeds: Sequence[int] = SEEDS,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """A row for each provider that is right; the others are logged with the reason."""
    height, width = size
    block = block_of(case).to(device, dtype)
    candidates = {name: _provide(name, block) for name in available(providers, device, dtype)}
    exact = as_eager(block).double()
    limit = limit_of(case, height, width, batch, dtype, device)
    # A batch holds as many seeds as maps: errors are pooled over ten maps, or more.
    inputs = [_map(seed, (batch, case.channels, *size), device, dtype) for seed in seeds[::batch]]
    with torch.inference_mode():
        measured = check_then_time(candidates, inputs, exact, seconds, limit.calls)
    bound = limit.read(measured.timings)
    eager = measured.timings["eager"].median
    where = f"{case.name} {height}x{width}"
    for name, reason in measured.refused.items():
        log(f"{where} {name} is not timed, it is {reason}")
    rows = []
    for name in candidates:
        if name in measured.refused:
            continue
        timing, verdict = measured.timings[name], measured.verdicts[name]
        rows.append(
            {
                "kind": "block",
                "case": case.name,
                "height": height,
                "width": width,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                "provider": name,
                "backend": auto_backend(device, dtype) if name == "auto" else name,
                "ms": timing.median * 1e3,
                "ms_low": timing.low * 1e3,
                "ms_high": timing.high * 1e3,
                "ms_first": timing.first * 1e3,
                "timed_blocks": timing.blocks,
                "speedup": eager / timing.median,
                "ms_limit": bound.seconds * 1e3,
                "of_limit": timing.median / bound.seconds,
                "limit_gflops": bound.gflops,
                "matrix_gflops": bound.matrix_gflops,
                "rms_error": verdict.rms,
                "rms_error_eager": verdict.eager_rms,
                "max_error": verdict.maximum,
                "max_error_eager": verdict.eager_maximum,
            }
        )
    return rows


def _map(seed: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
