"""A real training run: a small SeaFormer on handwritten digits, eager and replaced.

The replaced model has the seed of the eager one: weights, batches and dropped branches are the
same, and only rounding differs. A run grows that within ten steps to some hundredths of the loss,
eager's own too (weights that differ by 1e-7 are enough). How far apart it may bring two runs is
what eager runs with other seeds show: the most that two of three differ by.
"""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench.eager import EagerSeaAttention, as_eager
from bench.saved import saved_bytes
from bench.timing import median_interval, timed_call
from seaattn_kernels import replace_sea_attention
from seaattn_kernels.seaformer import CONFIGS, Classifier, Config

BATCH, SIDE, LEARNING_RATE = 32, 32, 2e-3
#: Of accuracy, beyond what seeds differ by: nine of the 450 pictures held out.
MARGIN = 0.02


def refusal() -> str | None:
    """Why there is nothing to learn from, or None."""
    if importlib.util.find_spec("sklearn") is None:
        return "scikit-learn, which has the digits, is not installed: pip install scikit-learn"
    return None


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures to learn from and held out, ``(n, 3, 32, 32)``, and the digits of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear").repeat(1, 3, 1, 1)
    parts = train_test_split(x, torch.from_numpy(labels), random_state=0, stratify=labels)
    return tuple(part.to(device) for part in parts)


def small(variant: str) -> Config:
    """The variant with half the channels around its attention, which has maps of 8x8 and 4x4."""
    config = CONFIGS[variant]
    stages = tuple(
        tuple(
            (kernel, grow, width // 2, 1 if 0 < at < 4 else step)
            for kernel, grow, width, step in of
        )
        for at, of in enumerate(config.stages)
    )
    return replace(config, stages=stages, stem=config.stem // 2)


@dataclass
class Run:
    """A model in training: a step is settled by its number and by the seed."""

    name: str
    seed: int
    model: nn.Module
    steps: int
    backends: str = "eager"
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self._rate = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, LEARNING_RATE, total_steps=self.steps
        )

    def step(self, x: Tensor, labels: Tensor) -> None:
        torch.manual_seed(1_000_003 * self.seed + len(self.losses))
        chosen = torch.randperm(len(x))[:BATCH].to(x.device)
        x, labels = x[chosen], labels[chosen]

        def learn() -> Tensor:
            self._optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), labels)
            loss.backward()
            self._optimizer.step()
            return loss

        seconds, loss = timed_call(learn, x.device)
        self._rate.step()
        self.seconds.append(seconds)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """In eval mode, in which a replaced block runs from folded weights."""
        return (self.model.eval()(x).argmax(1) == labels).double().mean().item()

    def opened(self) -> float:
        """The mean size of the BatchNorm weights that start at 0 and hide the attention; the least.

        They are those behind the projections of the axes and of the gate.
        """
        return min(
            layer[1].bn.weight.abs().mean().item()
            for block in self.model.modules()
            if isinstance(block, EagerSeaAttention)
            for layer in (block.proj, block.proj_encode_row, block.proj_encode_column)
        )


def measure(variant: str, seed: int, steps: int, device: torch.device) -> list[dict]:
    """A row for each run; they take turns, a step each."""
    x, held_out, labels, held_out_labels = digits(device)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return as_eager(Classifier(small(variant), num_classes=10)).to(device)

    ours = build(seed)
    report = replace_sea_attention(ours)
    backends = ", ".join(sorted({row.backend or "own forward" for row in report.values()}))
    runs = [
        Run("eager", seed, build(seed), steps),
        Run("ours", seed, ours, steps, backends),
        *(Run("other seed", other, build(other), steps) for other in (seed + 1, seed + 2)),
    ]
    kept = [saved_bytes(copy.deepcopy(run.model), x[:BATCH]) for run in runs]
    for _ in tqdm(range(steps), "training", unit="step", dynamic_ncols=True, disable=None):
        for run in runs:
            run.step(x, labels)
    rows = []
    for run, size in zip(runs, kept, strict=True):
        ms_low, ms_high = (1e3 * bound for bound in median_interval(run.seconds))
        rows.append(
            {
                "kind": "training",
                "run": run.name,
                "case": f"SeaFormer-{variant.upper()}, half as wide",
                "height": SIDE,
                "width": SIDE,
                "batch": BATCH,
                "dtype": "float32",
                "device": device.type,
                "threads": torch.get_num_threads(),
                "backend": run.backends,
                "seed": run.seed,
                "ms": 1e3 * median(run.seconds),
                "ms_low": ms_low,
                "ms_high": ms_high,
                "speedup": median(runs[0].seconds) / median(run.seconds),
                "saved_bytes": size,
                "accuracy": run.accuracy(held_out, held_out_labels),
                "opened": run.opened(),
                "losses": run.losses,
            }
        )
    return rows


def smooth(losses: Sequence[float]) -> np.ndarray:
    """The mean over a twentieth of the steps, of each that has as many before it."""
    count = max(1, len(losses) // 20)
    return np.convolve(losses, np.full(count, 1 / count), "valid")


def _apart(a: dict, b: dict) -> tuple[float, float]:
    """How far two runs are from each other: losses on the mean, accuracy."""
    losses = np.abs(smooth(a["losses"]) - smooth(b["losses"])).mean()
    return float(losses), abs(a["accuracy"] - b["accuracy"])


def verdict(rows: Sequence[dict]) -> dict:
    """How far ours is from eager, how far eager's seeds are, and whether ours is within that."""
    eager, ours, *others = rows
    loss, accuracy = _apart(eager, ours)
    seeds = [_apart(*pair) for pair in combinations([eager, *others], 2)]
    noise, accuracy_noise = (max(values) for values in zip(*seeds, strict=True))
    opened = min(row["opened"] for row in rows)
    replaced = "own forward" not in ours["backend"]
    return {
        "loss_difference": loss,
        "loss_noise": noise,
        "accuracy_difference": accuracy,
        "accuracy_noise": accuracy_noise,
        "accuracy_margin": MARGIN,
        "opened": opened,
        "replaced": replaced,
        "holds": (
            loss <= noise and accuracy <= accuracy_noise + MARGIN and opened > 0 and replaced
        ),
    }


def table(rows: Sequence[dict], found: dict) -> str:
    lines = [
        f"{'run':<20}{'seed':>5}{'step (ms)':>12}{'kept (MiB)':>12}{'loss':>9}{'held out':>10}"
    ]
    for row in rows:
        name = f"{row['run']} ({row['backend']})" if row["run"] == "ours" else row["run"]
        lines.append(
            f"{name:<20}{row['seed']:>5}{row['ms']:>12.1f}{row['saved_bytes'] / 2**20:>12.1f}"
            f"{smooth(row['losses'])[-1]:>9.4f}{100 * row['accuracy']:>8.1f} %"
        )
    loss, accuracy = (
        (found[f"{what}_difference"], found[f"{what}_noise"]) for what in ("loss", "accuracy")
    )
    lines += [
        "kept: for the backward, by the whole model. loss: the mean over the last twentieth.",
        f"loss: ours is {loss[0]:.2g} from eager's on the mean, two seeds up to {loss[1]:.2g}",
        f"held out: ours is {100 * accuracy[0]:.1f} % from eager's, two seeds up to "
        f"{100 * accuracy[1]:.1f} %, and {100 * MARGIN:g} % more is allowed",
        f"weights that are 0 at the start and hide the attention: {found['opened']:.1g} or more",
        "ours learns as eager does" if found["holds"] else "OURS DOES NOT LEARN AS EAGER DOES",
    ]
    return "\n".join(lines)
