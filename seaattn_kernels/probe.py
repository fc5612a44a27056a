"""Whether a block of somebody else's class computes what its structure says.

:func:`probe` settles it in float64 on small random maps, :func:`compare` holds a block to the error
budget on the map and in the dtype of a real call. Both work on copies: weights, statistics, modes
and the random state of the program stay as they are.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seaattn_kernels.anatomy import NORMS, Anatomy, Obstacle, dissect
from seaattn_kernels.budget import BUDGETS, GRADIENT_BUDGET, SEEDS, Verdict, judge
from seaattn_kernels.fold import FoldCache
from seaattn_kernels.module import run

#: Largest difference of a float64 copy, relative to the largest value: less than float32 can tell.
#: PyTorch's own backward of hardsigmoid in float64 is off by 3e-8.
TOLERANCE = 1e-6
#: Batch, height and width. The tables shrink, grow and stay; both orders of squeezing are met.
_MAPS = ((2, 5, 19), (1, 17, 16))
#: Gradients jump where a rounding crosses a kink of an activation, by whole terms of their sums.
_KINKS = 1e-2
#: How many numbers make the root mean square of an error steady.
_ENOUGH = 2**22


class Probed(NamedTuple):
    """A block that computes what its structure says, with the gate found and the largest error."""

    anatomy: Anatomy
    hard: bool
    error: float


def probe(block: nn.Module) -> Probed:
    """Compare a block's own forward and backward with the operators', in eval and training mode.

    A float64 copy on the CPU, its weights and BatchNorm statistics random, runs on random maps. The
    block itself is not called.

    Raises:
        Obstacle: with the reason why the operators may not stand in.
    """
    anatomy = dissect(block, trusted=None)
    for name, tensor in block.state_dict(keep_vars=True).items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Obstacle(f"{name} is a {type(tensor).__name__}")
    no_autocast = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), no_autocast:
        try:
            twin = _random_twin(block)
        except Exception as error:
            raise Obstacle(f"cannot be copied: {_first_line(error)}") from error
        gates = (True, False) if anatomy.hard is None else (anatomy.hard,)
        errors = {hard: _difference(twin, anatomy, hard) for hard in gates}
    hard = min(errors, key=errors.__getitem__)
    if errors[hard] > TOLERANCE:
        raise Obstacle(f"its forward computes something else (off by {errors[hard]:.1g})")
    return Probed(anatomy, hard, errors[hard])


def _random_twin(block: nn.Module) -> nn.Module:
    """A copy of the block in float64 on the CPU with random weights, and without its hooks."""
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, object] = {}
    for layer in block.modules():
        for table in (layer._parameters, layer._buffers):
            for key, tensor in table.items():
                if tensor is None or id(tensor) in memo:
                    continue
                value = torch.randn(
                    tensor.shape, generator=generator, dtype=torch.float64, device="cpu"
                )
                if tensor.dim() == 4:
                    value *= (2 / tensor[0].numel()) ** 0.5
                elif key == "running_var" or (isinstance(layer, NORMS) and key == "weight"):
                    value = 0.5 + value.abs()
                elif tensor.dim() == 0:
                    value = torch.zeros((), dtype=tensor.dtype)
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(value) if parameter else value
    return copy.deepcopy(block, memo | without_hooks(block))


def without_hooks(block: nn.Module) -> dict[int, object]:
    """A memo for ``copy.deepcopy`` that leaves the hooks of the block itself out of a copy."""
    tables = {name: value for name, value in vars(block).items() if "_hooks" in name}
    return {id(table): type(table)() for table in tables.values() if isinstance(table, dict)}


def _difference(twin: nn.Module, anatomy: Anatomy, hard: bool) -> float:
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in _MAPS:
        x, upstream = (
            torch.randn(
                batch, anatomy.channels, height, width,
                generator=generator, dtype=torch.float64, device="cpu",
            )
            for _ in range(2)
        )  # fmt: skip
        for training in (False, True):
            theirs, ours = copy.deepcopy(twin), copy.deepcopy(twin)
            size = "x".join(map(str, x.shape))
            try:
                expected = _results(theirs, theirs.forward, x, upstream if training else None)
            except Obstacle:
                raise
            except Exception as error:
                raise Obstacle(
                    f"its own forward fails on a random map of {size}: {_first_line(error)}"
                ) from error
            folds = FoldCache(anatomy.unproven, hard)
            found = _results(
                ours,
                lambda x, ours=ours, folds=folds: run(ours, x, folds, "reference", _no_eager),
                x,
                upstream if training else None,
            )
            worst = max(worst, _relative(found, expected))
    return worst


def _no_eager(x: Tensor) -> Tensor:
    raise AssertionError("the copy of a block is not read as the block was")


def _results(
    block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None
) -> dict[str, Tensor]:
    """The output, and in training also all gradients and the statistics after it."""
    training = upstream is not None
    block.train(training)
    leaf = x.detach().clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        out = forward(leaf)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        what = f"a map of {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise Obstacle(f"its forward returns {what}, not a map like its input")
    results = {"out": out.detach()}
    if training:
        named = {"x": leaf, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
        gradients = torch.autograd.grad(
            out, list(named.values()), upstream.to(out.dtype), materialize_grads=True
        )
        results |= dict(zip(named, gradients, strict=True))
        results |= {name: t.clone() for name, t in block.named_buffers() if t.is_floating_point()}
    return results


def _relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for name, value in expected.items():
        error = float((found[name] - value).abs().max() / value.abs().max().clamp(min=1))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# --- on the maps of real calls ---------------------------------------------------------------


def compare(
    block: nn.Module, x: Tensor, folds: FoldCache, backend: str, backward: bool
) -> dict[str, Verdict]:
    """Hold the operators to the error budget on a real map, under the autocast of the caller.

    The map itself and nine within some ten percent of it, fewer where one is large, run through
    copies of the block: by its own forward, by the operators, and by its own forward in float64.

    Args:
        block: of its own class, without hooks; not modified.
        x: the map of a call.
        folds: how the structure is to be read.
        backend: of the operators.
        backward: compare gradients and statistics as well. They differ by whole terms where a
            rounding crosses a kink of an activation: an error of a hundredth is let pass.

    Returns:
        A verdict for ``"output"`` and one for ``"gradients"``, whose errors are relative.
    """
    home = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        eager, ours, exact = (copy.deepcopy(block) for _ in range(3))
        exact = exact.to(home, torch.float64)
        folds = copy.deepcopy(folds)
        samples = _near(x)
        theirs = _live_results(eager, eager.forward, samples, backward)
        found = _live_results(
            ours, lambda x: run(ours, x, folds, backend, ours.forward), samples, backward
        )
        samples = [sample.to(home, torch.float64) for sample in samples]
        with torch.autocast(home.type, enabled=False):
            truth = _live_results(exact, exact.forward, samples, backward)
    dtype = theirs.outputs[0].dtype
    verdicts = {"output": _judge_outputs(found.outputs, theirs.outputs, truth.outputs, dtype)}
    if backward:
        verdicts["gradients"] = _judge_gradients(found.others, theirs.others, truth.others, dtype)
    return verdicts


class _Live(NamedTuple):
    outputs: list[Tensor]
    others: dict[str, Tensor]  # gradients and statistics


def _near(x: Tensor) -> list[Tensor]:
    """The map, and maps near it."""
    generator = torch.Generator().manual_seed(0)
    x = x.detach().clone()
    samples = [x]
    for _ in SEEDS[1 : max(1, _ENOUGH // x.numel())]:
        samples.append(x * (1 + 0.1 * torch.randn(x.shape, generator=generator)).to(x))
    return samples


def _live_results(
    block: nn.Module, forward: Callable[[Tensor], Tensor], samples: list[Tensor], backward: bool
) -> _Live:
    generator = torch.Generator().manual_seed(1)
    results = _Live([], {})
    for index, sample in enumerate(samples):
        leaf = sample.clone().requires_grad_(backward)
        out = forward(leaf)
        results.outputs.append(out.detach())
        if backward:
            named = {"x": leaf, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
            upstream = torch.randn(out.shape, generator=generator).to(out)
            found = torch.autograd.grad(out, list(named.values()), upstream, materialize_grads=True)
            for name, gradient in zip(named, found, strict=True):
                results.others[f"{name} {index}"] = gradient
    if backward:
        statistics = block.named_buffers()
        results.others.update((name, t) for name, t in statistics if t.is_floating_point())
    return results


def _judge_outputs(
    ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> Verdict:
    if dtype in BUDGETS:
        return judge(ours, eager, truth, dtype)
    # Eager is the truth itself in float64.
    error = _relative(dict(enumerate(ours)), dict(enumerate(truth)))
    return Verdict(error <= TOLERANCE, error, 0.0, error, 0.0)


def _judge_gradients(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> Verdict:
    """Of errors relative to each tensor, so that small tensors count as much as large ones."""
    size = {name: float(t.square().mean().sqrt()) for name, t in truth.items()}
    least = 1e-3 * max(size.values())

    def errors(found: dict[str, Tensor]) -> tuple[float, float]:
        squares = [
            float((found[name].to(t) - t).square().mean()) / max(size[name], least) ** 2
            for name, t in truth.items()
        ]
        return (sum(squares) / len(squares)) ** 0.5, max(squares) ** 0.5

    rms, maximum = errors(ours)
    eager_rms, eager_maximum = errors(eager)
    allowed = _KINKS if dtype in BUDGETS else TOLERANCE
    ok = rms <= GRADIENT_BUDGET.rms * eager_rms + allowed
    return Verdict(ok, rms, eager_rms, maximum, eager_maximum)
