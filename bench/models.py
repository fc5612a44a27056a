"""The share that the attention has of a whole model's time, and how alike its answers are."""

import time
from statistics import median

import torch
from torch import Tensor, nn

from seaattn_kernels import SeaAttention

#: Calls in which the attention is timed on its own.
_CALLS = 11


@torch.inference_mode()
def same_class(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """The share of pixels in which both say the same."""
    return (a(x).argmax(1) == b(x).argmax(1)).double().mean().item()


@torch.inference_mode()
def attention_shares(
    eager: nn.Module, ours: nn.Module, blocks: list[str], x: Tensor
) -> list[float]:
    """The share of a call's time between entry and exit of the attention blocks, by hooks.

    On a CPU, where a call returns when its work is done. The models take turns.
    """
    found: list[list[float]] = [[], []]
    for _ in range(_CALLS):
        for shares, model in zip(found, (eager, ours), strict=True):
            shares.append(_share(model, blocks, x))
    return [median(shares) for shares in found]


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the attention blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, SeaAttention)]


def _share(model: nn.Module, blocks: list[str], x: Tensor) -> float:
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
