"""A whole segmenter before and after ``replace_sea_attention``, and the attention's share of it."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from bench.eager import as_eager
from bench.picture import photograph
from bench.timing import Measured, check_then_time, with_threads
from seaattn_kernels import SeaAttention, replace_sea_attention, seaformer
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.report import Report
from seaattn_kernels.verify import randomise

#: Calls in which the attention is timed on its own.
_SHARE_CALLS = 11


class Segmenter:
    """A model that classifies each pixel of one picture ``x``: eager, and replaced."""

    def __init__(self, model: nn.Module, x: Tensor, title: str) -> None:
        self.title = title
        self.eager = as_eager(model)
        self.ours = copy.deepcopy(self.eager)
        self.report: Report = replace_sea_attention(self.ours)
        exact = as_eager(model).double()
        self._blocks = [
            name for name, module in model.named_modules() if isinstance(module, SeaAttention)
        ]
        with torch.inference_mode():
            # A deep network magnifies rounding at a few pixels by far: ten samples make a steady
            # error.
            self._views = [x.roll(seed * x.shape[3] // len(SEEDS), dims=3) for seed in SEEDS]
            self._truth = [exact(view.double()) for view in self._views]

    @torch.inference_mode()
    def measure(self, seconds: float) -> Measured:
        candidates = {"eager": self.eager, "ours": self.ours}
        return check_then_time(candidates, self._views, self._truth, seconds)

    @torch.inference_mode()
    def same_class(self) -> float:
        """The share of pixels in which both say the same."""
        x = self._views[0]
        return (self.ours(x).argmax(1) == self.eager(x).argmax(1)).double().mean().item()

    @torch.inference_mode()
    def attention_shares(self) -> dict[str, float]:
        """The share of a call's time between entry and exit of the attention blocks, by hooks.

        On a CPU, where a call returns when its work is done.
        """
        shares: dict[str, list[float]] = {"eager": [], "ours": []}
        for _ in range(_SHARE_CALLS):
            for name, found in shares.items():
                found.append(_attention_share(getattr(self, name), self._blocks, self._views[0]))
        return {name: median(found) for name, found in shares.items()}

    def row(self, measured: Measured) -> dict:
        verdict, eager, ours = (
            measured.verdicts["ours"], measured.timings["eager"], measured.timings["ours"],
        )  # fmt: skip
        x = self._views[0]
        return {
            "kind": "model",
            "case": self.title,
            "height": x.shape[2],
            "width": x.shape[3],
            "batch": 1,
            "dtype": str(x.dtype).removeprefix("torch."),
            "device": x.device.type,
            "threads": torch.get_num_threads(),
            "provider": "auto",
            "ms_eager": eager.median * 1e3,
            "ms": ours.median * 1e3,
            "ms_low": ours.low * 1e3,
            "ms_high": ours.high * 1e3,
            "ms_first": ours.first * 1e3,
            "speedup": eager.median / ours.median,
            "same_class": self.same_class(),
            "rms_error": verdict.rms,
            "rms_error_eager": verdict.eager_rms,
            "max_error": verdict.maximum,
            "max_error_eager": verdict.eager_maximum,
        }


def _attention_share(model: nn.Module, blocks: list[str], x: Tensor) -> float:
    inside = 0.0

    def enter(*_) -> None:
        nonlocal inside
        inside -= time.perf_counter()

    def leave(*_) -> None:
        nonlocal inside
        inside += time.perf_counter()

    handles = []
    for block in map(model.get_submodule, blocks):
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    begin = time.perf_counter()
    model(x)
    whole = time.perf_counter() - begin
    for handle in handles:
        handle.remove()
    return inside / whole


def measure(
    variants: Iterable[str], threads: Sequence[int], seconds: float, log: Callable[[str], None]
) -> list[dict]:
    """A row for each SeaFormer segmenter, on a CPU in float32, and number of threads."""
    rows = []
    for variant in variants:
        model = randomise(seaformer.seaformer_segmenter(variant)).eval()
        segmenter = Segmenter(model, photograph(None), f"SeaFormer-{variant.upper()} segmenter")
        for count in threads:
            with with_threads(count):
                measured = segmenter.measure(seconds)
                if "ours" not in measured.timings:
                    log(f"{segmenter.title} is not timed, it is {measured.refused['ours']}")
                    continue
                shares = segmenter.attention_shares()
                rows.append(
                    {
                        **segmenter.row(measured),
                        "attention_share_eager": shares["eager"],
                        "attention_share": shares["ours"],
                    }
                )
    return rows
