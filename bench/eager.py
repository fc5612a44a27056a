"""Upstream's eager forward, op by op: what every time and every error is compared with."""

import copy

from torch import Tensor, nn

from seaattn_kernels import SeaAttention, reference


class EagerSeaAttention(nn.Module):
    """The layers of ``SeaAttention`` run one by one: a block as people have it."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.sea_attention(self, x)


def as_eager(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``, same weights, in which every ``SeaAttention`` runs eagerly."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SeaAttention):
            module.__class__ = EagerSeaAttention
            del module._folds, module.backend
    return model
