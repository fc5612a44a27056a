"""A block is read from its structure, and everything that is not one is named."""

import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, layers, reference, verify
from seaattn_kernels.anatomy import Obstacle, dissect


def make(**options):
    return verify.randomise(SeaAttention(12, 4, 2, **options).double()).eval()


X = torch.randn(2, 12, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_parts_of_a_block():
    block = make(activation="leaky_relu", attn_ratio=1.5)
    parts = dissect(block)
    assert (parts.channels, parts.heads, parts.key_dim, parts.value_dim) == (12, 2, 4, 6)
    assert (parts.scale, parts.activation, parts.negative_slope) == (0.5, "leaky_relu", 0.01)
    assert parts.hard
    assert parts.column == "column"
    assert [layer.norm for layer in parts.convolutions[:2]] == [block.to_q.bn, block.to_k.bn]
    assert parts.convolutions[3].conv is block.dwconv.c
    assert parts.convolutions[-1].norm is block.proj[1].bn
    assert parts.tables[3] is block.pos_emb_columnk.pos_embed


# --- obstacles -------------------------------------------------------------------------------


def _hook(name):
    return lambda b: b.get_submodule(name).register_forward_hook(lambda m, i, o: o + 1)


def _replace(name, make_value):
    def update(block):
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, make_value(block))

    return update


def _own_forward(name):
    def patch(block):
        layer = block.get_submodule(name)
        forward = layer.forward
        layer.forward = lambda x: forward(x) + 1

    return patch


class Lora(nn.Module):
    """A wrapper that shows the layers of what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = nn.Conv2d(12, 8, 1).double()

    @property
    def c(self):
        return self.base.c

    @property
    def bn(self):
        return self.base.bn

    def forward(self, x):
        return self.base(x) + self.extra(x)


class Scaled(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Softplus2(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()).double())

    def forward(self, x):
        return nn.functional.softplus(x) * self.beta


class Doubled(layers.SqueezeAxialPositionalEmbedding):
    def forward(self, x):
        return super().forward(2 * x)


def _dwconv(**options):
    return _replace(
        "dwconv.c",
        lambda b: verify.randomise(nn.Conv2d(32, 32, 3, groups=32, bias=False, **options).double()),
    )


OBSTACLES = {
    "to_q carries a forward hook": _hook("to_q"),
    "proj.1.bn carries a forward hook": _hook("proj.1.bn"),
    "pos_emb_rowk carries a forward hook": _hook("pos_emb_rowk"),
    "sigmoid carries a forward hook": _hook("sigmoid"),
    "to_q.bn has a forward of its own": _own_forward("to_q.bn"),
    "sigmoid has a forward of its own": _own_forward("sigmoid"),
    "proj.0 carries a forward hook": lambda b: b.proj[0].register_forward_pre_hook(lambda *_: None),
    "to_q carries a backward hook": lambda b: b.to_q.register_full_backward_hook(lambda *_: None),
    "to_v carries a backward hook": lambda b: b.to_v.register_full_backward_pre_hook(
        lambda *_: None
    ),
    "the activation of act is GELU, none of identity, relu, relu6, leaky_relu, silu": (
        _replace("act", lambda b: nn.GELU())
    ),
    "the activation of act is ReLU6, none of identity, relu, relu6, leaky_relu, silu": (
        _replace("act.max_val", lambda b: 5.0)
    ),
    "to_k is Conv2d and BatchNorm2d and Conv2d, not a convolution and a batch norm": (
        _replace("to_k", lambda b: Lora(b.to_k))
    ),
    "to_v is Conv2d and BatchNorm2d and ReLU, not a convolution and a batch norm": (
        lambda b: b.to_v.append(nn.ReLU())
    ),
    "proj is Conv2d and BatchNorm2d and Tanh, not a convolution and a batch norm": (
        lambda b: b.proj.append(nn.Tanh())
    ),
    "dwconv is Conv2d and GroupNorm, not a convolution and a batch norm": (
        _replace("dwconv.bn", lambda b: nn.GroupNorm(4, 32).double())
    ),
    "to_q is Scaled, which nothing is known of": _replace("to_q", lambda b: Scaled(b.to_q)),
    "pos_emb_rowq is Doubled, which nothing is known of": (
        _replace("pos_emb_rowq", lambda b: Doubled(8, 16).double())
    ),
    "pos_emb_columnk is Identity, not one position table": (
        _replace("pos_emb_columnk", lambda b: nn.Identity())
    ),
    "pos_emb_rowk has a table of (1, 1, 16), not (1, 8, length)": (
        _replace("pos_emb_rowk", lambda b: Doubled(1, 16).double())
    ),
    "its activations differ": _replace("proj.0", lambda b: nn.ReLU()),
    "sigmoid is Tanh, which nothing is known of": _replace("sigmoid", lambda b: nn.Tanh()),
    "sigmoid is Softplus2, not a sigmoid": _replace("sigmoid", lambda b: Softplus2()),
    "dwconv is Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2), "
    "groups=32, bias=False), not depthwise 3x3 of 32 channels": _dwconv(padding=2, dilation=2),
    "dwconv is Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=32, "
    "bias=False, padding_mode=reflect), not depthwise 3x3 of 32 channels": (
        _dwconv(padding=1, padding_mode="reflect")
    ),
    "pwconv.c carries a parametrization": lambda b: torch.nn.utils.parametrizations.weight_norm(
        b.pwconv.c
    ),
    "num_heads is 3, with 8 channels of keys, 16 of values": _replace("num_heads", lambda b: 3),
    "has a layer that Sea_Attention has not: drop": _replace("drop", lambda b: nn.Dropout(0.1)),
    "has parameters of its own: gamma": (
        _replace("gamma", lambda b: nn.Parameter(torch.ones(12).double()))
    ),
}
#: A forward of these is not what the layers compute in turn, or has no meaning at all.
WITHOUT_FORWARD = ("num_heads", "pos_emb_rowk has a table")


@pytest.mark.parametrize("reason", OBSTACLES)
def test_obstacle_is_named_and_the_submodules_run(reason):
    block = make()
    with torch.no_grad():
        block(X)  # the fold from before must not be used
        OBSTACLES[reason](block)
        with pytest.raises(Obstacle) as raised:
            dissect(block)
        assert str(raised.value) == reason
        if reason.startswith(WITHOUT_FORWARD):
            return
        expected = reference.sea_attention(block, X)
        torch.testing.assert_close(block(X), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(block(X), expected, rtol=0, atol=1e-11)
    block.backend = "cpu"
    block.refold()
    with pytest.raises(RuntimeError, match="cannot run this block"):
        block(X)


def test_layers_that_are_missing_are_named():
    block = make()
    del block.act
    block.pos_emb_rowq = None
    with pytest.raises(Obstacle, match="has no act, pos_emb_rowq"):
        dissect(block)
    with pytest.raises(Obstacle, match="has no to_q, to_k, to_v, dwconv, pwconv"):
        dissect(nn.Linear(3, 4))


def test_classes_of_other_people_are_named():
    block = make()
    block.to_q, block.pos_emb_rowq, block.sigmoid = Scaled(block.to_q), Doubled(8, 16), nn.Tanh()
    parts = dissect(block, trusted=None)
    assert parts.unproven == {
        Scaled, Doubled, layers.SqueezeAxialPositionalEmbedding, nn.Tanh
    }  # fmt: skip
    assert parts.hard is None
    assert dissect(block, trusted=parts.unproven, hard=False).hard is False
    with pytest.raises(Obstacle, match="sigmoid is Tanh"):
        dissect(block, trusted=parts.unproven - {nn.Tanh})
    with pytest.raises(Obstacle, match="its gate is Tanh"):
        dissect(block, trusted=parts.unproven)


def test_layers_without_weights_may_stand_beside():
    block = make()
    block.softmax, block.nothing = nn.Softmax(-1), nn.Identity()
    dissect(block)
    block.gate = nn.Sigmoid()
    with pytest.raises(Obstacle, match="has several gates: sigmoid, gate"):
        dissect(block)
