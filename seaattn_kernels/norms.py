"""What the BatchNorm layers of a block do in a training step, beside the arithmetic of a map.

Which statistics a layer takes, how they are merged over the processes of a SyncBatchNorm, and its
running averages, as ``torch.nn`` has them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Rule(NamedTuple):
    """How the channels of one map are normalised, by one layer or several side by side."""

    batch: bool  # by the statistics of the batch; else by constants
    eps: float
    group: "ProcessGroup | None"  # whose processes share the batch
    layers: tuple[nn.Module, ...]  # none where nothing is normalised


class Affine(NamedTuple):
    """The tensors of a rule, ``(C,)`` each, in float32 at least; gradients reach the layers."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None  # running statistics, where the rule takes constants
    var: Tensor | None


def gather(layers: Sequence[nn.Module | None], widths: Sequence[int]) -> tuple[Rule, Affine] | None:
    """One rule for layers side by side, of so many channels each; None where theirs differ.

    A layer that is missing is None.
    """
    rules = {_rule(layer) for layer in layers}
    if len(rules) != 1:
        return None
    (rule,) = rules
    if layers[0] is None:
        return rule, Affine(None, None, None, None)
    constant = not rule.batch
    affine = Affine(
        _beside([layer.weight for layer in layers], widths, 1.0),
        _beside([layer.bias for layer in layers], widths, 0.0),
        _beside([layer.running_mean for layer in layers], widths, 0.0) if constant else None,
        _beside([layer.running_var for layer in layers], widths, 1.0) if constant else None,
    )
    return rule._replace(layers=tuple(layers)), affine


def _rule(layer: nn.Module | None) -> Rule:
    if layer is None:
        return Rule(False, 0.0, None, ())
    batch = layer.training or (layer.running_mean is None and layer.running_var is None)
    return Rule(batch, layer.eps, _group(layer), ())


def _group(layer: nn.Module) -> "ProcessGroup | None":
    if type(layer) is not nn.SyncBatchNorm or not layer.training:
        return None
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = layer.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _beside(
    tensors: Sequence[Tensor | None], widths: Sequence[int], default: float
) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    kind = torch.promote_types(given[0].dtype, torch.float32)
    if len(tensors) == 1:
        return given[0].to(kind)
    return torch.cat(
        [
            given[0].new_full((width,), default, dtype=kind) if tensor is None else tensor.to(kind)
            for tensor, width in zip(tensors, widths, strict=True)
        ]
    )


def check_size(shape: Sequence[int], rule: Rule) -> None:
    """Raise PyTorch's ``ValueError`` where a batch has one value a channel."""
    if rule.batch and rule.group is None and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )


def merge(
    mean: Tensor, deviations: Tensor, count: int, group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean, sum of squared deviations and number of values a channel, over a group's processes.

    From those of this process. The parts are merged as in
    Chan, Golub and LeVeque (1979), in float64, in the order of the ranks: every process gets the
    same bits.
    """
    if group is None:
        return mean, deviations, count
    own = torch.cat([mean, deviations, mean.new_full((1,), count)]).double()
    own[: mean.shape[0]].nan_to_num_()  # the mean of no value
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    channels = mean.shape[0]
    means, squares, counts = torch.stack(parts).split([channels, channels, 1], dim=1)
    total = counts.sum()
    merged = (means * counts).sum(0) / total
    squares = squares.sum(0) + ((means - merged).square() * counts).sum(0)
    return merged.to(mean.dtype), squares.to(mean.dtype), total


def reduce(sums: Tensor, group: "ProcessGroup | None") -> Tensor:
    """The sums over the processes of a group; ``sums`` stays what it is."""
    if group is None:
        return sums
    total = sums.to(torch.float64, copy=True)
    torch.distributed.all_reduce(total, group=group)
    return total.to(sums.dtype)


#: A layer that averages, and the mean and the unbiased variance of its batch.
_Move = tuple[nn.Module, Tensor, Tensor]


@torch.no_grad()
def update(batches: Sequence[tuple[Rule, Tensor, Tensor]]) -> None:
    """Move the running averages towards the statistics of a batch, as the layers would.

    Of each map its rule, the means and the unbiased variances.
    """
    left: list[_Move] = []
    for rule, mean, unbiased in batches:
        widths = [layer.num_features for layer in rule.layers]
        parts = zip(rule.layers, mean.split(widths), unbiased.split(widths), strict=True)
        left += [part for part in parts if part[0].training and part[0].track_running_stats]
    # A layer that stands in two places moves twice, the second time from where the first left it.
    while left:
        layers = [layer for layer, _, _ in left]
        again = [layer in layers[:place] for place, layer in enumerate(layers)]
        _move([part for part, later in zip(left, again, strict=True) if not later])
        left = [part for part, later in zip(left, again, strict=True) if later]


def _move(parts: Sequence[_Move]) -> None:
    """Those of one momentum together: on a GPU one launch."""
    counts = [layer.num_batches_tracked for layer, _, _ in parts]
    if counts := [count for count in counts if count is not None]:
        torch._foreach_add_(counts, 1)
    by_factor: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for layer, mean, unbiased in parts:
        if layer.running_mean is None:
            continue
        averages = layer.running_mean, layer.running_var
        values = mean.to(averages[0].dtype), unbiased.to(averages[1].dtype)
        if layer.momentum is None and layer.num_batches_tracked is not None:
            factor = layer.num_batches_tracked.to(mean.dtype).reciprocal()
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, factor.to(average.dtype))
            continue
        old, new = by_factor.setdefault(layer.momentum or 0.0, ([], []))
        old += averages
        new += values
    for factor, (old, new) in by_factor.items():
        torch._foreach_lerp_(old, new, factor)
