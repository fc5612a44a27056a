"""Whether a block of somebody else's class computes what its structure says.

:func:`probe` settles it in float64 on small random maps, :func:`compare` holds a block to the error
budget on the map and in the dtype of a real call. Both work on copies: weights, statistics, modes
and the random state of the program stay as they are.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seaattn_kernels.anatomy import NORMS, Anatomy, Obstacle, dissect
from seaattn_kernels.budget import BUDGETS, GRADIENT_BUDGET, SEEDS, Verdict, judge
from seaattn_kernels.fold import FoldCache
from seaattn_kernels.module import run

#: Largest difference of a float64 copy, relative to the largest value. A softmax in float32 within
#: makes 2e-6 of gradients, PyTorch's own float64 backward of hardsigmoid 3e-8.
TOLERANCE = 1e-5
#: Batch, height, width: the tables shrink, grow and stay; both orders of squeezing are met.
_MAPS = ((2, 5, 19), (1, 17, 16))
#: Gain of the weights, map, whether in training mode, whether with gradients. A gain of 8 carries
#: values past every clamp.
_RUNS = (
    (1.0, 0, False, False), (1.0, 0, False, True), (1.0, 0, True, False), (1.0, 0, True, True),
    (1.0, 1, False, False), (1.0, 1, True, True), (8.0, 0, False, True), (8.0, 0, True, True),
)  # fmt: skip
#: Gradients jump where a rounding crosses a kink of an activation, by whole terms of their sums.
_KINKS = 1e-2
#: So many eps of the root mean square, of the largest value, are the rounding of any forward.
_ROUNDING = (4.0, 16.0)
#: Beside a result of eager that is off by as much there is nothing to compare.
_LOST = 1 / 3
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
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Obstacle(f"{name} is a {type(tensor).__name__}")
    gates = (True, False) if anatomy.hard is None else (anatomy.hard,)
    errors = dict.fromkeys(gates, 0.0)
    with _apart():
        try:
            twins = {gain: _random_twin(block, gain) for gain in (1.0, 8.0)}
        except Exception as error:
            raise Obstacle(f"cannot be copied: {_first_line(error)}") from error
        _check_dtype(copy.deepcopy(twins[1.0]).float(), anatomy)
        for gain, size, training, backward in _RUNS:
            x, upstream = _map(anatomy, _MAPS[size], 2), _map(anatomy, _MAPS[size], 3)
            upstream = upstream if backward else None
            twin = twins[gain].train(training)
            expected = _called(twin, x, upstream)
            for hard in gates:
                folds = FoldCache(anatomy.unproven, hard)
                found = _results(
                    twin, lambda x, t=twin, f=folds: run(t, x, f, "reference", _no_eager),
                    x, upstream,
                )  # fmt: skip
                # Scores, and their rounding in float32, grow with the square of the gain.
                errors[hard] = max(errors[hard], _relative(found, expected) / gain**2)
    hard = min(errors, key=errors.__getitem__)
    if errors[hard] > TOLERANCE:
        raise Obstacle(f"its forward computes something else (off by {errors[hard]:.1g})")
    return Probed(anatomy, hard, errors[hard])


def check_forward(block: nn.Module, kind: type[nn.Module], alone: bool = False) -> None:
    """Raise :class:`Obstacle` where a block is not called as ``block(x)``, or not by its class.

    Args:
        kind: the class whose forward it has.
        alone: refuse more arguments, also where they have defaults.
    """
    if isinstance(block, torch.jit.ScriptModule):
        raise Obstacle("is a TorchScript module")
    if "forward" in block.__dict__:
        raise Obstacle("has a forward of its own in the instance")
    taken = [
        parameter
        for parameter in list(inspect.signature(kind.forward).parameters.values())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    required = [parameter.name for parameter in taken if parameter.default is parameter.empty]
    if len(required) != 1 or (alone and len(taken) != 1):
        names = [parameter.name for parameter in taken] if alone else required
        raise Obstacle(f"its forward takes ({', '.join(names)}), not one map")


@contextmanager
def _apart() -> Iterator[None]:
    """Nothing of the caller's modes reaches what runs within, and no random state is moved."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        # Non-reentrant checkpointing counts what is saved for backward.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


def _map(anatomy: Anatomy, size: tuple[int, int, int], seed: int) -> Tensor:
    batch, height, width = size
    shape = (batch, anatomy.channels, height, width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _random_twin(block: nn.Module, gain: float) -> nn.Module:
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
                elif key == "running_var":
                    value = 0.5 + value.abs()
                elif isinstance(layer, NORMS) and key == "weight":
                    value = gain * (0.5 + value.abs())
                elif key == "bias":
                    value *= gain
                elif tensor.dim() == 0:
                    value = torch.zeros((), dtype=tensor.dtype)
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(value) if parameter else value
    return copy.deepcopy(block, memo | without_hooks(block))


def without_hooks(block: nn.Module) -> dict[int, object]:
    """A memo for ``copy.deepcopy`` that leaves the hooks of the block itself out of a copy."""
    tables = {name: value for name, value in vars(block).items() if "_hooks" in name}
    return {id(table): type(table)() for table in tables.values() if isinstance(table, dict)}


def _check_dtype(twin: nn.Module, anatomy: Anatomy) -> None:
    """Raise where a forward in float32 does not return float32, as under an autocast of its own."""
    x = _map(anatomy, _MAPS[0], 2).float()
    out = _called(twin.eval(), x, None)["out"]
    if out.dtype is not x.dtype:
        raise Obstacle(f"its forward returns {out.dtype} for {x.dtype}")


def _called(block: nn.Module, x: Tensor, upstream: Tensor | None) -> dict[str, Tensor]:
    """The results of a block's own forward, which must leave nothing behind."""
    before = _attributes(block)
    try:
        results = _results(block, _forward_of(block), x, upstream)
    except Obstacle:
        raise
    except Exception as error:
        size = "x".join(map(str, x.shape))
        raise Obstacle(
            f"its own forward fails on a random map of {size}: {_first_line(error)}"
        ) from error
    after = _attributes(block)
    if kept := [name for name, value in after.items() if before.get(name, x) is not value]:
        raise Obstacle(f"its forward keeps {', '.join(kept)}")
    return results


def _forward_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: type(block).forward(block, x)


def _attributes(block: nn.Module) -> dict[str, object]:
    return {
        f"{name}.{key}" if name else key: value
        for name, layer in block.named_modules()
        for key, value in vars(layer).items()
    }


def _no_eager(x: Tensor) -> Tensor:
    """What :func:`training.forward` cannot join is all that a dissected block may stumble over."""
    raise Obstacle("the norms of q, k and v differ in mode, eps or process group")


def _results(
    block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None
) -> dict[str, Tensor]:
    """The output, all gradients if there is one of the output, and the statistics after it.

    The statistics of the block are put back.
    """
    backward = upstream is not None
    tables = [layer._buffers for layer in block.modules()]
    before = [{k: t if t is None else t.clone() for k, t in table.items()} for table in tables]
    leaf = x.clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        out = forward(leaf)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        what = f"a map of {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise Obstacle(f"its forward returns {what}, not a map like its input")
    results = {"out": out.detach()}
    if backward:
        if not out.requires_grad:
            raise Obstacle("its forward gives no gradients")
        gradients = _gradients(block, leaf, out, upstream.to(out.dtype))
        results |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    results |= {name: t for name, t in block.named_buffers() if t.is_floating_point()}
    for table, values in zip(tables, before, strict=True):
        table.update(values)
    return results


def _gradients(block: nn.Module, x: Tensor, out: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of the input and of every parameter that wants one."""
    named = {"x": x, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(out, list(named.values()), upstream, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def _relative(found: Mapping, expected: Mapping) -> float:
    """The largest difference of any result, relative to its largest value.

    Some gradients are zero but for rounding: none counts for less than a hundredth of the largest.
    """
    size = {name: float(value.abs().max()) for name, value in expected.items()}
    least = max(1.0, 1e-2 * max(size.values()))
    worst = 0.0
    for name, value in expected.items():
        error = float((found[name] - value).abs().max()) / max(size[name], least)
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
    What is of the order of any forward's rounding passes whatever eager's error is.

    Args:
        block: of its own class, without hooks; not modified.
        x: the map of a call.
        folds: how the structure is to be read.
        backend: of the operators.
        backward: compare gradients and statistics as well. They differ by whole terms where a
            rounding crosses a kink of an activation: an error of a hundredth is let pass, of the
            root of eps in half precision.

    Returns:
        A verdict for ``"output"`` and one for ``"gradients"``, whose errors are relative; none
        where eager's own result is not finite or off by a third: nothing is to be learned there.
    """
    home = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    autocast = torch.is_autocast_enabled(x.device.type)
    with _apart(), torch.set_grad_enabled(backward):
        eager, ours, exact = (copy.deepcopy(block) for _ in range(3))
        exact = exact.to(home, torch.float64)
        folds = copy.deepcopy(folds)
        samples = _near(x)
        with torch.autocast(x.device.type, enabled=autocast):
            theirs = _live_results(eager, _forward_of(eager), samples, backward)
            found = _live_results(
                ours, lambda x: run(ours, x, folds, backend, _forward_of(ours)), samples, backward
            )
        samples = [sample.to(home, torch.float64) for sample in samples]
        with torch.autocast(home.type, enabled=False):
            truth = _live_results(exact, _forward_of(exact), samples, backward)
    dtype = theirs.outputs[0].dtype
    verdicts = {"output": _judge_outputs(found.outputs, theirs.outputs, truth.outputs, dtype)}
    if backward:
        verdicts["gradients"] = _judge_gradients(found.others, theirs.others, truth.others, dtype)
    return {what: verdict for what, verdict in verdicts.items() if verdict is not None}


class _Live(NamedTuple):
    outputs: list[Tensor]
    others: dict[str, Tensor]  # gradients and statistics


def _near(x: Tensor) -> list[Tensor]:
    """The map, and maps near it."""
    generator = torch.Generator().manual_seed(0)
    x = x.detach().clone()
    samples = [x]
    for _ in SEEDS[1 : max(1, _ENOUGH // x.numel())]:
        noise = torch.randn(x.shape, generator=generator, device="cpu")
        samples.append(x * (1 + 0.1 * noise).to(x))
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
            upstream = torch.randn(out.shape, generator=generator, device="cpu").to(out)
            found = _gradients(block, leaf, out, upstream)
            results.others.update((f"{name} {index}", value) for name, value in found.items())
    if backward:
        statistics = block.named_buffers()
        results.others.update((name, t) for name, t in statistics if t.is_floating_point())
    return results


def _judge_outputs(
    ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> Verdict | None:
    if not all(t.isfinite().all() for t in (*eager, *truth)):
        return None
    if dtype not in BUDGETS:  # eager is the truth itself in float64
        error = _relative(dict(enumerate(ours)), dict(enumerate(truth)))
        return Verdict(error <= TOLERANCE, error, 0.0, error, 0.0)
    verdict = judge(ours, eager, truth, dtype)
    rms = float(torch.cat([t.flatten() for t in truth]).square().mean().sqrt())
    largest = max(float(t.abs().max()) for t in truth)
    if verdict.eager_rms > _LOST * rms:
        return None
    eps = torch.finfo(dtype).eps
    rounding = verdict.rms <= _ROUNDING[0] * eps * rms
    rounding = rounding and verdict.maximum <= _ROUNDING[1] * eps * largest
    return verdict._replace(ok=verdict.ok or rounding)


def _judge_gradients(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> Verdict | None:
    """Of errors relative to each tensor, so that small tensors count as much as large ones."""
    if not all(t.isfinite().all() for t in (*eager.values(), *truth.values())):
        return None
    size = {name: float(t.square().mean().sqrt()) for name, t in truth.items()}
    least = max(1e-3 * max(size.values()), torch.finfo(torch.float64).tiny)

    def errors(found: dict[str, Tensor]) -> tuple[float, float]:
        squares = [
            float((found[name].to(t) - t).square().mean()) / max(size[name], least) ** 2
            for name, t in truth.items()
        ]
        return (sum(squares) / len(squares)) ** 0.5, max(squares) ** 0.5

    rms, maximum = errors(ours)
    eager_rms, eager_maximum = errors(eager)
    if eager_rms > _LOST:
        return None
    allowed = max(_KINKS, torch.finfo(dtype).eps ** 0.5) if dtype in BUDGETS else TOLERANCE
    ok = rms <= GRADIENT_BUDGET.rms * eager_rms + allowed
    return Verdict(ok, rms, eager_rms, maximum, eager_maximum)
