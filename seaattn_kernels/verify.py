"""Whether this package is right here: the golden files, and a sweep of odd shapes.

In float64 a result must equal the golden files to ``1e-12 * max(1, max|reference|)``; in other
dtypes it is held to the error budget, beside eager PyTorch.
"""

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seaattn_kernels import ops, reference, seaformer
from seaattn_kernels.budget import BUDGETS, SEEDS, Verdict, judge
from seaattn_kernels.fold import cuda_obstacle
from seaattn_kernels.module import SeaAttention

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DOUBLE = 1e-12
STORED_SINGLE = 1e-6


# --- golden files ----------------------------------------------------------------------------


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a state_dict entry: a function of its name and shape alone."""
    generator = _generator(name)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if name.endswith("running_var"):
        return generator.uniform(0.5, 2.0, shape)
    if name.endswith("pos_embed"):
        return generator.standard_normal(shape)
    if len(shape) == 4:
        return generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    if len(shape) == 2:
        return 0.05 * generator.standard_normal(shape)
    if name.endswith(".weight"):
        return generator.uniform(0.5, 1.5, shape)
    return 0.3 * generator.standard_normal(shape)


def randomise(module: nn.Module) -> nn.Module:
    """Fill every parameter and BatchNorm statistic by name, and return the module.

    A fresh block multiplies its attention by a BatchNorm weight of 0; a comparison would pass with
    any attention at all.
    """
    state = module.state_dict()
    module.load_state_dict(
        {
            name: torch.from_numpy(np.asarray(golden_weight(name, tuple(entry.shape))))
            for name, entry in state.items()
        }
    )
    return module


class Golden(NamedTuple):
    """One file of outputs that the official code computed in float64."""

    meta: dict
    arrays: dict[str, Tensor]
    single: frozenset[str]  # entries stored as float32

    def random(self, name: str) -> Tensor:
        generator = _generator(f"{self.meta['name']}/{name}")
        return torch.from_numpy(generator.standard_normal(self.meta["shape"]))

    def model(self, backend: str = "auto") -> nn.Module:
        """The float64 module that the file describes, in training mode."""
        meta = self.meta
        if meta["kind"] == "sea_attention":
            names = ("dim", "key_dim", "num_heads", "attn_ratio", "activation")
            module = SeaAttention(**{name: meta[name] for name in names}, backend=backend)
        elif meta["kind"] == "seaformer_classifier":
            module = seaformer.seaformer(meta["variant"][-1].lower(), backend=backend)
        else:
            module = seaformer.seaformer_segmenter(
                meta["variant"], meta["num_classes"], backend=backend
            )
        return randomise(module.double())

    def error(self, name: str, value: Tensor) -> float:
        """``max|d| / max(1, max|stored|)``, in units of the tolerance: at most 1 is right."""
        stored = self.arrays[name]
        if value.shape != stored.shape:
            return float("inf")
        tolerance = STORED_SINGLE if name in self.single else DOUBLE
        difference = float((value.detach().cpu().double() - stored).abs().max())
        error = difference / (tolerance * max(1.0, float(stored.abs().max())))
        return error if error == error else float("inf")


def load_golden(path: Path) -> Golden:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        names = [name for name in file.files if name != "meta"]
        single = frozenset(name for name in names if file[name].dtype == np.float32)
        arrays = {name: torch.from_numpy(file[name]).double() for name in names}
    return Golden(meta, arrays, single)


def golden_errors(golden: Golden, backend: str = "auto", device: str = "cpu") -> dict[str, float]:
    """Every stored array against this package in float64, in units of the tolerance.

    A block gives ``folded/out`` too: the eval output again, through the folded weights.
    """
    if golden.meta["kind"] != "sea_attention":
        model = golden.model(backend).to(device).eval()
        with torch.no_grad():
            found = stage_outputs(model, golden.random("x").to(device))
        return {name: golden.error(name, found[name]) for name in golden.arrays}
    errors: dict[str, float] = {}
    for mode in ("eval", "train"):
        block = golden.model(backend).to(device).train(mode == "train")
        if mode == "eval":
            with torch.no_grad():
                folded = block(golden.random("x").to(device))
            errors["folded/out"] = golden.error("eval/out", folded)
        x = golden.random("x").to(device).requires_grad_()
        out = block(x)
        out.backward(golden.random("dout").to(device))
        found = {"out": out, "grad/x": x.grad}
        found |= {f"grad/{name}": p.grad for name, p in block.named_parameters()}
        found |= {f"buffer/{name}": buffer for name, buffer in block.named_buffers()}
        for name in golden.arrays:
            if name.startswith(f"{mode}/"):
                errors[name] = golden.error(name, found[name.removeprefix(f"{mode}/")])
    return errors


def stage_outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name, layer in model.named_children()
        if name.startswith("trans")
    ]
    found["logits"] = model(x)
    for handle in handles:
        handle.remove()
    return found


# --- the sweep of odd shapes -----------------------------------------------------------------


class BlockCase(NamedTuple):
    """A block and a map of uncommon size."""

    batch: int
    channels: int
    height: int
    width: int
    key_dim: int
    heads: int
    attn_ratio: float
    activation: str
    hard: bool = True  # the gate

    def __str__(self) -> str:
        return (
            f"{self.batch}x{self.channels}x{self.height}x{self.width} "
            f"D={self.key_dim} heads={self.heads} ratio={self.attn_ratio} {self.activation}"
            f"{'' if self.hard else ' sigmoid'}"
        )


BLOCK_CASES = (
    BlockCase(1, 16, 1, 1, 2, 2, 2, "relu6"),
    BlockCase(2, 3, 1, 17, 2, 1, 2, "relu"),
    BlockCase(2, 24, 7, 7, 10, 3, 1.5, "silu"),
    BlockCase(1, 32, 15, 8, 16, 2, 2, "relu6"),
    BlockCase(1, 40, 100, 3, 20, 2, 1, "leaky_relu"),
    BlockCase(3, 33, 19, 23, 24, 4, 2, "relu6"),
    BlockCase(1, 16, 75, 100, 16, 2, 2, "relu6"),
    BlockCase(2, 12, 16, 17, 4, 2, 2, "identity", hard=False),
)


def block_verdict(
    case: BlockCase, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> Verdict:
    """The folded block in ``dtype``, over ten inputs, against eager and float64."""
    block = SeaAttention(
        case.channels, case.key_dim, case.heads, case.attn_ratio, case.activation, backend=backend
    )
    if not case.hard:
        block.sigmoid = nn.Sigmoid()
    block = randomise(block).to(device, dtype).eval()
    exact = copy.deepcopy(block).double()
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for seed in SEEDS:
            x = _normal(seed, (case.batch, case.channels, case.height, case.width), device, dtype)
            truth = reference.sea_attention(exact, x.double())
            results.append((block(x), reference.sea_attention(block, x), truth))
    ours, eager, truths = zip(*results, strict=True)
    return judge(ours, eager, truths, dtype)


def _normal(seed: int, shape: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


class OperatorCase(NamedTuple):
    """An operator of ``ops``, its tensors' shapes, and its other arguments."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple = ()

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.name} {shapes}"

    def inputs(self, seed: int, device: str, dtype: torch.dtype) -> list[Tensor]:
        return [
            _normal(100 * seed + index, shape, device, dtype)
            for index, shape in enumerate(self.shapes)
        ]

    def run(self, tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
        """Call the public function; the result as a tuple."""
        function: Callable = getattr(ops, self.name)
        if self.name == "axial_attention_pair":
            row, column, *tables = tensors
            tensors = (row, column, tables)
        out = function(*tensors, *self.arguments, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def overload_arguments(self, tensors: Sequence[Tensor]) -> tuple:
        """What the public function hands to the registered overload."""
        if self.name == "broadcast_add":
            activation, slope = self.arguments
            return (*tensors, reference.ACTIVATIONS.index(activation), slope)
        if self.name == "axial_attention_pair":
            heads, key_dim = self.arguments
            return (*tensors, heads, key_dim, key_dim**-0.5)
        return (*tensors, *self.arguments)


def _operator_cases() -> Iterator[OperatorCase]:
    for b, c, h, w in (
        (1, 1, 1, 1),
        (2, 3, 1, 17),
        (1, 5, 100, 3),
        (2, 33, 15, 8),
        (1, 8, 75, 100),
    ):
        yield OperatorCase("axial_squeeze", ((b, c, h, w),))
        yield OperatorCase("gate", ((b, c, h, w),) * 2, (True,))
        yield OperatorCase("gate", ((b, c, h, w),) * 2, (False,))
        for activation in reference.ACTIVATIONS:
            yield OperatorCase(
                "broadcast_add", ((b, c, h, w), (b, c, h), (b, c, w)), (activation, 0.1)
            )
    for b, heads, d, e, h, w in ((1, 1, 2, 4, 1, 1), (2, 3, 10, 15, 7, 13), (1, 4, 24, 48, 33, 2)):
        keys, values = heads * d, heads * e
        projected = 2 * keys + values
        yield OperatorCase(
            "axial_attention", ((b, keys, h), (b, keys, h), (b, values, h)), (heads, d**-0.5)
        )
        yield OperatorCase(
            "axial_attention_pair",
            ((b, projected, h), (b, projected, w), *[(1, keys, 16)] * 4),
            (heads, d),
        )


OPERATOR_CASES = tuple(_operator_cases())


def operator_verdicts(
    case: OperatorCase, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Verdict, Verdict]:
    """Values and gradients of one operator over ten inputs, against the reference's."""
    columns: tuple[list, list, list] = ([], [], [])
    gradients: tuple[list, list, list] = ([], [], [])
    for seed in SEEDS:
        tensors = case.inputs(seed, device, dtype)
        variants = (
            (backend, tensors),
            ("reference", tensors),
            ("reference", [t.double() for t in tensors]),
        )
        upstream: list[Tensor] = []
        for index, (name, values) in enumerate(variants):
            leaves = [t.clone().requires_grad_() for t in values]
            out = case.run(leaves, name)
            if not upstream:
                upstream = [_normal(seed, t.shape, device, dtype) for t in out]
            columns[index].extend(out)
            grads = torch.autograd.grad(
                out, leaves, [g.to(t.dtype) for g, t in zip(upstream, out, strict=True)]
            )
            gradients[index].extend(grads)
    return judge(*columns, dtype), judge(*gradients, dtype, gradient=True)


# --- the command -----------------------------------------------------------------------------


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _runs(operator: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    return ops.refusal(operator, backend, torch.device(device), dtype) is None


def _cuda_obstacle(case: BlockCase) -> str | None:
    value_dim = int(case.attn_ratio * case.key_dim)
    return cuda_obstacle(case.activation, case.heads, case.key_dim, value_dim)


def run(golden_folder: Path | None = None, print_row: Callable[[str], None] = print) -> bool:
    """Check all that this machine can run, print a line each, and say whether all is right."""
    folder = golden_folder or GOLDEN
    files = sorted(folder.glob("*.npz"))
    if not files:
        if golden_folder is not None:
            raise FileNotFoundError(f"no golden files in {folder}")
        print_row("no golden files: they come with the source checkout")
    passed: list[bool] = []

    def row(ok: bool, what: str, result: str) -> None:
        passed.append(ok)
        print_row(f"{'ok  ' if ok else 'FAIL'}  {what:<68} {result}")

    for path in files:
        errors = golden_errors(load_golden(path))
        name, error = max(errors.items(), key=lambda item: item[1])
        row(
            error <= 1,
            f"golden {path.stem}, float64, {len(errors)} arrays",
            f"{error:.2e} of the tolerance ({name})",
        )
    for device in _devices():
        for dtype in BUDGETS:
            label = f"{str(dtype).removeprefix('torch.')} {device}"
            for backend in ops.BACKENDS[1:]:
                if _runs("sea_attention", backend, device, dtype):
                    for case in BLOCK_CASES:
                        if backend == "cuda" and _cuda_obstacle(case):
                            continue
                        verdict = block_verdict(case, backend, dtype, device)
                        row(verdict.ok, f"block {case} {label} {backend}", str(verdict))
                for case in OPERATOR_CASES:
                    if backend != "reference" and _runs(case.name, backend, device, dtype):
                        for kind, verdict in zip(
                            ("values", "gradients"),
                            operator_verdicts(case, backend, dtype, device),
                            strict=True,
                        ):
                            row(verdict.ok, f"{case} {kind} {label} {backend}", str(verdict))
    print_row(f"{passed.count(True)} passed, {passed.count(False)} failed")
    return all(passed)
