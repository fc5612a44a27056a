"""The loop: the providers of a work are built, checked, timed, and give a row each."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from bench import memory, peers
from bench.limit import Limit
from bench.timing import Result, Timing, check, interleave, started, with_threads
from bench.works import Work
from seaattn_kernels import ops
from seaattn_kernels.budget import SEEDS, Verdict

#: eager: upstream's forward. reference: folded PyTorch. triton, cuda, cpu: this package's kernels.
#: auto: the best backend of the device. channels_last: the same on maps in that layout. compile:
#: eager under torch.compile, compiled anew for each shape. freezing: the same with constant
#: weights. autotune: the same on a GPU with every kernel tuned, which takes long. onnxruntime,
#: openvino: eager in those runtimes.
PROVIDERS = (
    "eager", "reference", "triton", "cuda", "cpu", "auto", "channels_last",
    "compile", "freezing", "autotune", "onnxruntime", "openvino",
)  # fmt: skip
#: Those that are timed where nobody asks by name.
DEFAULT_PROVIDERS = ("eager", "reference", "triton", "cuda", "auto", "compile", *peers.PACKAGES)
_NEED_A_GPU = ("triton", "cuda", "autotune")
_NEED_A_CPU = ("cpu", "channels_last", "freezing", *peers.PACKAGES)
#: Above this ratio of its ends an interval says more about the machine than about the code.
WIDE = 1.5
#: Errors are pooled over ten maps, or over as many as hold so many numbers.
_ENOUGH = 2**24
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


def auto_backend(device: torch.device, dtype: torch.dtype, what: str = "sea_attention") -> str:
    """The backend that runs an operator, or whole blocks, where nobody asks for one.

    In exact float32 a GPU leaves large blocks to the reference all the same.
    """
    return ops.choose(what, "auto", device, dtype)


def refusal(provider: str, work: Work) -> str | None:
    """Why ``provider`` cannot be timed here, or None where it can."""
    device, dtype = work.setting.device, work.setting.dtype
    if provider in _NEED_A_GPU and device.type != "cuda":
        return f"it needs a GPU, got {device}"
    if provider in _NEED_A_CPU and device.type != "cpu":
        return f"it needs a CPU, got {device}"
    if provider in peers.PACKAGES:
        if dtype is not torch.float32:
            return f"it is set up for float32, got {dtype}"
        if reason := peers.refusal(provider):
            return reason
    return work.refusal(provider)


def available(providers: Iterable[str], work: Work) -> list[str]:
    """Eager and those of ``providers`` that run here, in the usual order.

    Without "auto" where that is another of them.
    """
    listed = [
        name
        for name in PROVIDERS
        if name == "eager" or (name in providers and refusal(name, work) is None)
    ]
    same = backend_of("auto", work) in listed
    return [name for name in listed if not (name == "auto" and same)]


def backend_of(provider: str, work: Work) -> str:
    """The backend that a provider of this package comes to; others are their own."""
    if provider not in ("auto", "channels_last"):
        return provider
    what = work.what if work.kind == "operator" else "sea_attention"
    if work.kind != "operator" and work.setting.step:
        what = "training"
    return auto_backend(work.setting.device, work.setting.dtype, what)


class _Replayed:
    """A candidate as a CUDA graph, captured anew for each input by ``bind``."""

    def __init__(self, candidate: Callable) -> None:
        self._candidate = candidate

    def bind(self, given: object) -> tuple[Callable[[], None], Result]:
        taken = getattr(self._candidate, "bind", lambda given: given)(given)
        try:
            return capture(lambda: self._candidate(taken))
        except Exception as error:  # a capture raises what it likes: the others go on
            raise RuntimeError(f"no capture: {type(error).__name__}: {error}") from error

    def __call__(self, captured: tuple[Callable[[], None], Result]) -> Result:
        replay, result = captured
        replay()
        return result


def capture(call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """The replay of a CUDA graph of ``call``, and the result that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def measure(
    work: Work,
    providers: Iterable[str],
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
    setting = work.setting
    listed = available(providers, work)
    where = f"{work.case} {'x'.join(map(str, work.size))} {work.what} {setting.mode}"
    judged = work.smooth()
    rows = []
    # The maps are inference tensors where a graph's are: other ones compile a model twice.
    with torch.inference_mode(not setting.step):
        inputs, truth = _inputs(judged, seeds)
        timed = inputs[0] if judged is work else work.given(seeds[0])
    for count in threads or (torch.get_num_threads(),):
        with with_threads(count), torch.inference_mode(not setting.step):
            candidates = _candidates(judged, listed, graphs)
            checked = check(candidates, inputs, truth, setting.dtype, setting.device, setting.step)
            for name, reason in checked.refused.items():
                log(f"{where} {name} is not timed, it is {reason}")
            if judged is not work:
                for name, candidate in _candidates(work, listed, graphs).items():
                    if name in checked.calls:
                        call, first, _ = started(candidate, timed, setting.device)
                        checked.calls[name], checked.first[name] = call, first
            limit = work.limit()
            calls = {**checked.calls, **limit.calls}
            timings = interleave(calls, setting.device, seconds, checked.first)
            bound = limit.read(timings)
            rows += [
                {
                    **work.identity(),
                    "threads": count,
                    **_row(name, timings, checked.verdicts[name], bound, work),
                    "backend": backend_of(name.split()[0], work),
                    **_taken(name, checked.calls[name], setting.device),
                    "command": repeat(work, name.split()[0], count),
                }
                for name in checked.calls
            ]
    return rows


def _inputs(work: Work, seeds: Sequence[int]) -> tuple[list, list[Result]]:
    """Ten maps, or as many as hold enough numbers, and the results in float64."""
    inputs, held = [], 0
    for seed in seeds[:: work.setting.batch]:  # a batch holds as many seeds as maps
        if held < _ENOUGH:
            inputs.append(work.given(seed))
            held += _numbers(inputs[-1])
    return inputs, [work.exact(given) for given in inputs]


@torch.inference_mode(False)  # weights made in it have no versions: a block folds them each time
def _candidates(work: Work, providers: Iterable[str], graphs: bool) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    for provider in providers:
        found[provider] = work.candidate(provider)
        if graphs:
            found[f"{provider} graph"] = _Replayed(found[provider])
    return found


def repeat(work: Work, provider: str, threads: int) -> str:
    """The command that measures one provider again, beside eager."""
    row = work.identity()
    kind = {"block": "block", "operator": work.what, "model": "model"}[work.kind]
    where = (
        f"--models {work.case.lower()}"
        if work.kind == "model"
        else f"--cases {work.case} --maps {row['height']}x{row['width']}"
    )
    return (
        f"python -m bench run --what {kind} --modes {row['mode']} {where} --batch {row['batch']} "
        f"--dtype {row['dtype']} --device {row['device']} --threads {threads} --peers {provider}"
    )


def _numbers(given: object) -> int:
    if isinstance(given, torch.Tensor):
        return given.numel()
    return sum(map(_numbers, given))


def _taken(name: str, call: Callable[[], object], device: torch.device) -> dict:
    """Memory of a call; of a graph, and where a runtime has its own allocator, it is unknown."""
    provider, _, graph = name.partition(" ")
    if graph or provider in peers.PACKAGES:
        return {"peak_bytes": None, "allocated_bytes": None}
    found = memory.allocated(call, device)
    return {"peak_bytes": found.peak, "allocated_bytes": found.total}


def _row(
    name: str, timings: Mapping[str, Timing], verdict: Verdict, bound: Limit, work: Work
) -> dict:
    """What was measured of a candidate."""
    timing = timings[name]
    provider, _, graph = name.partition(" ")
    eager = timings.get("eager graph" if graph else "eager")
    return {
        "provider": provider,
        "way": graph or "call",
        "ms": timing.median * 1e3,
        "ms_low": timing.low * 1e3,
        "ms_high": timing.high * 1e3,
        "ms_first": timing.first * 1e3,
        "ms_cold": timing.cold and timing.cold * 1e3,
        "timed_blocks": timing.blocks,
        "speedup": eager.median / timing.median if eager else None,
        "flops": work.flops,
        "bytes": work.bytes,
        "gflops": work.flops / timing.median / 1e9,
        "gbytes": work.bytes / timing.median / 1e9,
        "ms_limit": bound.seconds * 1e3,
        "of_limit": timing.median / bound.seconds,
        "matrix_gflops": bound.ceilings.flops / 1e9,
        "copy_gbytes": bound.ceilings.bandwidth / 1e9,
        "rms_error": verdict.rms,
        "rms_error_eager": verdict.eager_rms,
        "max_error": verdict.maximum,
        "max_error_eager": verdict.eager_maximum,
    }
