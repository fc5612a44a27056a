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
from seaattn_kernels import SeaAttention, graphed, ops
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.verify import randomise

#: eager: upstream's forward. reference: folded PyTorch. triton: the fused block, on a GPU.
#: auto: the best backend of the device. compile: eager under torch.compile, compiled anew for each
#: shape. autotune: the same on a GPU with every kernel tuned, which takes long.
PROVIDERS = ("eager", "reference", "triton", "auto", "compile", "autotune")
#: Those that are timed where nobody asks by name.
DEFAULT_PROVIDERS = PROVIDERS[:-1]
_COMPILED = {"compile": None, "autotune": "max-autotune-no-cudagraphs"}
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
    """The backend that runs whole blocks where nobody asks for one.

    In exact float32 a GPU leaves large blocks to the reference all the same.
    """
    return ops.choose("sea_attention", "auto", device, dtype)


def refusal(provider: str, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``provider`` cannot be timed here, or None where it can."""
    if provider in ("triton", "autotune") and device.type != "cuda":
        return f"it needs a GPU, got {device}"
    if provider == "triton":
        head = case.key_dim, case.values // case.heads
        return ops.refusal("sea_attention", "triton", device, dtype, head)
    return None


def available(
    providers: Sequence[str], case: Case, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Eager and those of ``providers`` that run here, in the usual order.

    Without "auto" where that is another of them.
    """
    listed = [
        name
        for name in PROVIDERS
        if name == "eager" or (name in providers and refusal(name, case, device, dtype) is None)
    ]
    same = auto_backend(device, dtype) in listed
    return [name for name in listed if not (name == "auto" and same)]


def block_of(case: Case) -> SeaAttention:
    """The block in eval mode, every parameter and statistic random, on the CPU in float32."""
    block = SeaAttention(case.channels, case.key_dim, case.heads, ATTN_RATIO, ACTIVATION)
    return randomise(block).eval()


def _provide(name: str, block: SeaAttention) -> nn.Module:
    if name == "eager":
        return as_eager(block)
    if name in _COMPILED:
        torch.compiler.reset()
        return torch.compile(as_eager(block), dynamic=False, mode=_COMPILED[name])
    block = copy.deepcopy(block)
    block.backend = name
    return block


def _replay(model: nn.Module, copies: int) -> Callable[[Tensor], Tensor]:
    """``model`` as a CUDA graph, captured by the first call.

    A replay overwrites the result of the one before, so the first ``copies`` results, which are
    judged together, are copies.
    """
    graph = None

    def call(x: Tensor) -> Tensor:
        nonlocal graph, copies
        if graph is None:
            try:
                graph = graphed(model, x)
            except Exception as error:  # a capture raises what it likes: the others go on
                raise RuntimeError(f"no capture: {type(error).__name__}: {error}") from error
        out = graph(x)
        if copies == 0:
            return out
        copies -= 1
        return out.clone()

    return call


def extra_bytes(call: Callable[[Tensor], Tensor], x: Tensor) -> int | None:
    """Memory that a warm call takes at its peak, without its result; None on a CPU."""
    if x.device.type != "cuda":
        return None
    call(x)
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    out = call(x)
    taken = torch.cuda.max_memory_allocated(x.device) - before
    return taken - out.numel() * out.element_size()


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
    graphs: bool = False,
) -> list[dict]:
    """A row for each provider that is right; the others are logged with the reason.

    With ``graphs`` there is a second row of each, of way "graph": replayed from a CUDA graph, its
    speed-up over eager that is replayed too. Its first call holds the capture.
    """
    height, width = size
    block = block_of(case).to(device, dtype)
    models = {name: _provide(name, block) for name in available(providers, case, device, dtype)}
    exact = as_eager(block).double()
    limit = limit_of(case, height, width, batch, dtype, device)
    # The maps are inference tensors as the copies in a graph are: other ones compile a model twice.
    with torch.inference_mode():
        # A batch holds as many seeds as maps: errors are pooled over ten maps, or more.
        shape = (batch, case.channels, *size)
        inputs = [_map(seed, shape, device, dtype) for seed in seeds[::batch]]
        candidates: dict[str, Callable[[Tensor], Tensor]] = {}
        for provider, model in models.items():
            candidates[provider] = model
            if graphs:
                candidates[f"{provider} graph"] = _replay(model, len(inputs))
        measured = check_then_time(candidates, inputs, exact, seconds, limit.calls)
        extra = {
            name: extra_bytes(model, inputs[0])
            for name, model in models.items()
            if name not in measured.refused
        }
    bound = limit.read(measured.timings)
    where = f"{case.name} {height}x{width}"
    for name, reason in measured.refused.items():
        log(f"{where} {name} is not timed, it is {reason}")
    rows = []
    for name in candidates:
        if name in measured.refused:
            continue
        timing, verdict = measured.timings[name], measured.verdicts[name]
        provider, _, graph = name.partition(" ")
        eager = measured.timings.get("eager graph" if graph else "eager")
        rows.append(
            {
                "kind": "block",
                "case": case.name,
                "height": height,
                "width": width,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                "provider": provider,
                "way": graph or "call",
                "backend": auto_backend(device, dtype) if provider == "auto" else provider,
                "ms": timing.median * 1e3,
                "ms_low": timing.low * 1e3,
                "ms_high": timing.high * 1e3,
                "ms_first": timing.first * 1e3,
                "timed_blocks": timing.blocks,
                "speedup": eager.median / timing.median if eager else None,
                "extra_bytes": extra.get(name),
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
