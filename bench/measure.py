"""One block at one map: build the providers, check them, time them, give rows."""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench import peers
from bench.cases import ACTIVATION, ATTN_RATIO, Case
from bench.eager import as_eager
from bench.limit import Limit, limit_of
from bench.timing import Measured, check_then_time, with_threads
from seaattn_kernels import SeaAttention, graphed, ops
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.verify import randomise

#: eager: upstream's forward. reference: folded PyTorch. triton: the fused block, on a GPU.
#: auto: the best backend of the device. channels_last: the same on maps in that layout. compile:
#: eager under torch.compile, compiled anew for each shape. freezing: the same with constant
#: weights. autotune: the same on a GPU with every kernel tuned, which takes long. onnxruntime,
#: openvino: eager in those runtimes.
PROVIDERS = (
    "eager", "reference", "triton", "auto", "channels_last",
    "compile", "freezing", "autotune", "onnxruntime", "openvino",
)  # fmt: skip
#: Those that are timed where nobody asks by name.
DEFAULT_PROVIDERS = ("eager", "reference", "triton", "auto", "compile")
_NEED_A_GPU = ("triton", "autotune")
_NEED_A_CPU = ("channels_last", "freezing", "onnxruntime", "openvino")
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
    if provider in _NEED_A_GPU and device.type != "cuda":
        return f"it needs a GPU, got {device}"
    if provider in _NEED_A_CPU and device.type != "cpu":
        return f"it needs a CPU, got {device}"
    if provider in peers.PACKAGES:
        if dtype is not torch.float32:
            return f"it is set up for float32, got {dtype}"
        return peers.refusal(provider)
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


class _ChannelsLast:
    """A model on maps in that layout, brought into it ahead of time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def bind(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor) -> Tensor:
        return self._model(x)


def _provide(name: str, block: SeaAttention) -> Callable:
    if name == "eager":
        return as_eager(block)
    if name == "channels_last":
        return _ChannelsLast(copy.deepcopy(block))
    if name == "freezing":
        torch.compiler.reset()
        return peers.Freezing(as_eager(block))
    if name == "onnxruntime":
        return peers.OnnxRuntime(block)
    if name == "openvino":
        return peers.OpenVino(block)
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
    threads: Sequence[int] = (),
) -> list[dict]:
    """A row for each provider that is right; the others are logged with the reason.

    With ``graphs`` there is a second row of each, of way "graph": replayed from a CUDA graph, its
    speed-up over eager that is replayed too. Its first call holds the capture. With ``threads`` all
    of that with each of these numbers of threads.
    """
    block = block_of(case).to(device, dtype)
    exact = as_eager(block).double()
    # A batch holds as many seeds as maps: errors are pooled over ten maps, or more. The maps are
    # inference tensors as the copies in a graph are: other ones compile a model twice.
    with torch.inference_mode():
        shape = (batch, case.channels, *size)
        inputs = [_map(seed, shape, device, dtype) for seed in seeds[::batch]]
        truth = [exact(x.double()) for x in inputs]
    listed = available(providers, case, device, dtype)
    rows = []
    for count in threads or (torch.get_num_threads(),):
        with with_threads(count):
            models = {name: _provide(name, block) for name in listed}
            candidates: dict[str, Callable[[Tensor], Tensor]] = {}
            for provider, model in models.items():
                candidates[provider] = model
                if graphs:
                    candidates[f"{provider} graph"] = _replay(model, len(inputs))
            limit = limit_of(case, *size, batch, dtype, device)
            with torch.inference_mode():
                measured = check_then_time(candidates, inputs, truth, seconds, limit.calls)
                extra = {
                    name: extra_bytes(model, inputs[0])
                    for name, model in models.items()
                    if name not in measured.refused
                }
            for name, reason in measured.refused.items():
                log(f"{case.name} {size[0]}x{size[1]} {name} is not timed, it is {reason}")
            bound = limit.read(measured.timings)
            rows += [
                {
                    "kind": "block",
                    "case": case.name,
                    "height": size[0],
                    "width": size[1],
                    "batch": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "device": device.type,
                    "threads": torch.get_num_threads(),
                    **_row(name, measured, bound),
                    "backend": _backend(name.split()[0], device, dtype),
                    "extra_bytes": extra.get(name),
                }
                for name in candidates
                if name not in measured.refused
            ]
    return rows


def _backend(provider: str, device: torch.device, dtype: torch.dtype) -> str:
    return auto_backend(device, dtype) if provider in ("auto", "channels_last") else provider


def _row(name: str, measured: Measured, bound: Limit) -> dict:
    """What was measured of a candidate."""
    timing, verdict = measured.timings[name], measured.verdicts[name]
    provider, _, graph = name.partition(" ")
    eager = measured.timings.get("eager graph" if graph else "eager")
    return {
        "provider": provider,
        "way": graph or "call",
        "ms": timing.median * 1e3,
        "ms_low": timing.low * 1e3,
        "ms_high": timing.high * 1e3,
        "ms_first": timing.first * 1e3,
        "timed_blocks": timing.blocks,
        "speedup": eager.median / timing.median if eager else None,
        "ms_limit": bound.seconds * 1e3,
        "of_limit": timing.median / bound.seconds,
        "limit_gflops": bound.gflops,
        "matrix_gflops": bound.matrix_gflops,
        "rms_error": verdict.rms,
        "rms_error_eager": verdict.eager_rms,
        "max_error": verdict.maximum,
        "max_error_eager": verdict.eager_maximum,
    }


def _map(seed: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
