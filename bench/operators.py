"""The differentiable operators, and a training step of the block, beside plain PyTorch.

Each is timed forward, and forward with backward (gradients of every input and parameter), called
from Python and, on a GPU, replayed from a CUDA graph. The limit of a forward is its tensors once
through memory, at the bandwidth of a large copy, and one launch: tensors that stay in a cache from
call to call can beat it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import ACTIVATION, Case
from bench.eager import as_eager
from bench.limit import GPU_COPY_BYTES
from bench.measure import block_of
from bench.timing import interleave
from seaattn_kernels.budget import SEEDS, judge
from seaattn_kernels.verify import OperatorCase

#: eager: plain PyTorch. compile: the same under torch.compile. triton: this package.
PROVIDERS = ("eager", "compile", "triton")

Forward = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """An operator or a block at one shape: its forward, and the parameters of it, by provider.

    "exact" is the forward that is given float64.
    """

    name: str
    inputs: Callable[[int], list[Tensor]]
    forward: dict[str, Forward]
    parameters: dict[str, list[Tensor]]

    def step(
        self, provider: str, inputs: Sequence[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        """Outputs, and the gradients of inputs and parameters."""
        out = self.forward[provider](inputs)
        leaves = [*inputs, *self.parameters[provider]]
        return [*out, *torch.autograd.grad(out, leaves, upstream)]


def _operator(case: OperatorCase, device: torch.device, dtype: torch.dtype) -> Work:
    def plain(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return case.run(tensors, "reference")

    forward = {
        "eager": plain,
        "compile": torch.compile(plain, dynamic=False),
        "triton": lambda tensors: case.run(tensors, "triton"),
        "exact": plain,
    }
    return Work(
        case.name,
        lambda seed: [t.requires_grad_() for t in case.inputs(seed, str(device), dtype)],
        forward,
        {name: [] for name in forward},
    )


def _block(case: Case, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Work:
    block = block_of(case).to(device, dtype).train()
    ours = copy.deepcopy(block)
    ours.backend = "triton"
    modules = {
        "eager": as_eager(block),
        "compile": torch.compile(as_eager(block), dynamic=False),
        "triton": ours,
        "exact": as_eager(block).double(),
    }

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()]

    return Work(
        "block",
        inputs,
        {
            name: lambda tensors, module=module: (module(tensors[0]),)
            for name, module in modules.items()
        },
        {name: list(module.parameters()) for name, module in modules.items()},
    )


def works(
    case: Case, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Work]:
    """The operators in the order in which a block calls them, then the block."""
    (h, w), c, projected, values = size, case.channels, case.projected, case.values
    table = (1, case.heads * case.key_dim, 16)
    for operator in (
        OperatorCase("axial_squeeze", ((batch, projected, h, w),)),
        OperatorCase(
            "axial_attention_pair",
            ((batch, projected, h), (batch, projected, w), *[table] * 4),
            (case.heads, case.key_dim),
        ),
        OperatorCase(
            "broadcast_add",
            ((batch, values, h, w), (batch, values, h), (batch, values, w)),
            (ACTIVATION, 0.0),
        ),
        OperatorCase("gate", ((batch, c, h, w),) * 2, (True,)),
    ):
        yield _operator(operator, device, dtype)
    yield _block(case, (batch, c, h, w), device, dtype)


def check(work: Work, provider: str, dtype: torch.dtype, seeds: Sequence[int]) -> str | None:
    """What is wrong with outputs and gradients, held to the budget of gradients."""
    ours, eager, truth = [], [], []
    for seed in seeds:
        inputs = work.inputs(seed)
        generator = torch.Generator(inputs[0].device).manual_seed(seed)
        upstream = [
            torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype)
            for t in work.forward["eager"](inputs)
        ]
        ours += work.step(provider, inputs, upstream)
        eager += work.step("eager", inputs, upstream)
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        truth += work.step("exact", inputs, [t.double() for t in upstream])
    sizes = [t.detach().abs().max().clamp(min=1e-6) for t in truth]
    ours, eager, truth = (
        [t.detach().double() / size for t, size in zip(tensors, sizes, strict=True)]
        for tensors in (ours, eager, truth)
    )
    verdict = judge(ours, eager, truth, dtype, gradient=True)
    return None if verdict.ok else f"wrong: {verdict}"


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Replays of a CUDA graph of ``call``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    case: Case,
    size: tuple[int, int],
    batch: int,
    providers: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,
    seeds: Sequence[int] = SEEDS,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """A row for each operator, mode, way of calling and provider that is right."""
    providers = [name for name in PROVIDERS if name == "eager" or name in providers]
    shape = {
        "kind": "operator",
        "case": case.name,
        "height": size[0],
        "width": size[1],
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    rows = []
    for work in works(case, size, batch, device, dtype):
        torch.compiler.reset()
        right = []
        for name in providers:
            try:
                wrong = check(work, name, dtype, seeds)
            except Exception as error:  # a compiler raises what it likes: the others go on
                wrong = f"raising {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if wrong is None:
                right.append(name)
            else:
                where = f"{case.name} {size[0]}x{size[1]} {work.name}"
                log(f"{where} {name} is not timed, it is {wrong}")
        rows += [{**shape, **row} for row in _timed(work, right, device, seconds, log)]
    return rows


def _timed(
    work: Work,
    providers: Sequence[str],
    device: torch.device,
    seconds: float,
    log: Callable[[str], None],
) -> list[dict]:
    inputs = work.inputs(0)
    out = work.forward["eager"](inputs)
    upstream = [torch.randn_like(t) for t in out]
    moved = sum(t.numel() * t.element_size() for t in (*inputs, *out))
    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for name in providers:
        for mode, call in (
            ("forward", lambda name=name: work.forward[name](inputs)),
            ("step", lambda name=name: work.step(name, inputs, upstream)),
        ):
            calls[name, mode, "call"] = call
            if device.type == "cuda":
                try:
                    calls[name, mode, "graph"] = graphed(call)
                except Exception as error:
                    log(f"{work.name} {mode} {name} is not captured: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        source = torch.empty(GPU_COPY_BYTES, device=device, dtype=torch.uint8)
        target, one = torch.empty_like(source), torch.empty(1, device=device)
        calls["copy", "", ""] = lambda: target.copy_(source)
        calls["launch", "", ""] = graphed(one.zero_)
    named = interleave({" ".join(key): call for key, call in calls.items()}, device, seconds)
    timings = {key: named[" ".join(key)] for key in calls}
    limit = None
    if device.type == "cuda":
        bandwidth = 2 * GPU_COPY_BYTES / timings.pop(("copy", "", "")).median
        launch = timings.pop(("launch", "", "")).median
        limit = None if work.name == "block" else moved / bandwidth + launch
    return [
        {
            "operator": work.name,
            "mode": mode,
            "way": way,
            "provider": name,
            "ms": timing.median * 1e3,
            "ms_low": timing.low * 1e3,
            "ms_high": timing.high * 1e3,
            "ms_first": timing.first * 1e3,
            "speedup": timings["eager", mode, way].median / timing.median,
            "bytes": moved,
            "ms_limit": limit * 1e3 if limit and mode == "forward" else None,
        }
        for (name, mode, way), timing in timings.items()
        if ("eager", mode, way) in timings
    ]


def table(rows: Sequence[dict]) -> str:
    """A line for each operator, mode and way of calling."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["operator"], row["mode"], row["way"])
        groups.setdefault(key, {})[row["provider"]] = row
    lines = []
    for (operator, mode, way), found in groups.items():
        eager = found["eager"]
        shape = f"{eager['batch']}x {eager['case']} {eager['height']}x{eager['width']}"
        times = ", ".join(
            f"{name} {row['ms'] * 1e3:.1f} us ({row['speedup']:.2f}x)"
            for name, row in found.items()
        )
        limit = f", limit {eager['ms_limit'] * 1e3:.1f} us" if eager["ms_limit"] else ""
        lines.append(f"{shape} {eager['dtype']} {operator} {mode}, {way}: {times}{limit}")
    return "\n".join(lines)
