"""The probe says yes to blocks that compute what they look like, and to nothing else."""

import copy

import eager_blocks as eager
import pytest
import torch
from torch import nn

from seaattn_kernels import fold, ops, probe, reference, verify
from seaattn_kernels.anatomy import Obstacle, dissect


def make(kind=eager.Sea_Attention, **options):
    return verify.randomise(kind(16, **options).double())


@pytest.mark.parametrize("options", [
    {"key_dim": 2, "num_heads": 1},
    {"key_dim": 10, "num_heads": 3, "attn_ratio": 1.5},
    {"key_dim": 24, "num_heads": 2, "attn_ratio": 0.25},
])  # fmt: skip
def test_sizes(options):
    found = probe.probe(make(**options))
    assert found.error < 1e-11
    assert found.hard
    assert found.anatomy.key_dim == options["key_dim"]


def test_finds_the_gate_that_the_structure_does_not_tell():
    assert probe.probe(make(eager.FunctionalSigmoid)).hard is False
    assert probe.probe(make(eager.FunctionalHardsigmoid)).hard is True
    assert dissect(make(eager.FunctionalSigmoid), trusted=None).hard is None


def _fresh(block):
    """BatchNorm weights of zero, as a new block has them: its attention counts nothing."""
    with torch.no_grad():
        for layer in (block.proj[1], block.proj_encode_row[1], block.proj_encode_column[1]):
            layer.bn.weight.zero_()
        for table in dissect(block, trusted=None).tables:
            table.zero_()


class OtherAttention(eager.Sea_Attention):
    def attend(self, q, k, v, encode):
        return super().attend(k, q, v, encode)


class NoTable(eager.Sea_Attention):
    def attend(self, q, k, v, encode):
        return super().attend(q - self.pos_emb_rowq(torch.zeros_like(q)), k, v, encode)


class NearestTable(eager.SqueezeAxialPositionalEmbedding):
    def forward(self, x):
        return x + nn.functional.interpolate(self.pos_embed, size=x.shape[2])


class Nearest(eager.Sea_Attention):
    table = NearestTable


class Stops(eager.Sea_Attention):
    """The same values, other gradients."""

    def attend(self, q, k, v, encode):
        return super().attend(q.detach(), k, v, encode)


class OtherStatistics(eager.Sea_Attention):
    """The same values and gradients, other statistics after them."""

    def forward(self, x):
        self.to_q(x)
        return super().forward(x)


class Rectified(eager.Sea_Attention):
    """ReLU where its layer says ReLU6: the same for small values."""

    def attend(self, q, k, v, encode):
        return super().attend(q, k, v, lambda x: encode[1](x.relu()))


class Clamped(eager.Sea_Attention):
    """Scores cannot leave a wide range."""

    def attend(self, q, k, v, encode):
        b, _, n = q.shape
        q, k, v = (t.reshape(b, self.num_heads, -1, n) for t in (q, k, v))
        scores = torch.einsum("bhdi,bhdj->bhij", q, k).mul(self.scale).clamp(-10, 10)
        out = torch.einsum("bhij,bhej->bhei", scores.softmax(-1), v)
        return encode(out.reshape(b, self.dh, n, 1)).squeeze(3)


class EvalGradients(eager.Sea_Attention):
    def forward(self, x):
        if not self.training:
            x = x.detach() + 0.5 * (x - x.detach())
        return super().forward(x)


class TrainingWithoutGradients(eager.Sea_Attention):
    def forward(self, x):
        out = super().forward(x)
        return 2 * out if self.training and not torch.is_grad_enabled() else out


@pytest.mark.parametrize(
    "kind",
    [
        OtherAttention, NoTable, Nearest, Stops, OtherStatistics, Rectified, Clamped, EvalGradients,
        TrainingWithoutGradients,
    ],
)  # fmt: skip
def test_a_difference_in_anything_is_seen_on_a_fresh_block(kind):
    block = make(kind)
    _fresh(block)
    with pytest.raises(Obstacle, match="its forward computes something else"):
        probe.probe(block)


class Keeps(eager.Sea_Attention):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class Casts(eager.Sea_Attention):
    def forward(self, x):
        return super().forward(x).bfloat16()


class OwnAutocast(eager.Sea_Attention):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Keeps, "its forward keeps last"),
        (Casts, "its forward returns torch.bfloat16 for torch.float32"),
        (OwnAutocast, "its forward returns torch.bfloat16 for torch.float32"),
    ],
)
def test_a_forward_that_does_more(kind, reason):
    with pytest.raises(Obstacle, match=reason):
        probe.probe(make(kind))


class FloatSoftmax(eager.Sea_Attention):
    """As people write it for half precision."""

    def attend(self, q, k, v, encode):
        b, _, n = q.shape
        q, k, v = (t.reshape(b, self.num_heads, -1, n) for t in (q, k, v))
        scores = torch.einsum("bhdi,bhdj->bhij", q, k).mul(self.scale)
        weights = scores.float().softmax(-1).to(v.dtype)
        out = torch.einsum("bhij,bhej->bhei", weights, v)
        return encode(out.reshape(b, self.dh, n, 1).contiguous()).squeeze(3)


def test_a_softmax_in_float32_passes():
    assert 1e-12 < probe.probe(make(FloatSoftmax)).error < 1e-5


def _faulty(monkeypatch, name, fault):
    """``fault(result)`` in place of what every backend of an operator gives."""

    def changed(overload):
        return lambda *arguments: fault(overload(*arguments))

    overloads = {backend: changed(found) for backend, found in ops.OVERLOADS[name].items()}
    monkeypatch.setitem(ops.OVERLOADS, name, overloads)


@pytest.mark.parametrize(
    "name", ["axial_moments", "axial_attention_pair", "depthwise", "normalize", "normalize_gate"]
)
def test_a_fault_of_an_operator_is_seen(name, monkeypatch):
    def fault(out):
        # Of the axial means: the first are statistics, which constant ones do without.
        return (*out[:-1], 1.0001 * out[-1]) if isinstance(out, tuple) else 1.0001 * out

    _faulty(monkeypatch, name, fault)
    with pytest.raises(Obstacle, match="its forward computes something else"):
        probe.probe(make())


def test_a_fault_of_the_folded_block_is_seen(monkeypatch):
    folded = reference.sea_attention_folded
    monkeypatch.setattr(reference, "sea_attention_folded", lambda *a: 1.0001 * folded(*a))
    with pytest.raises(Obstacle, match="its forward computes something else"):
        probe.probe(make())


def _inference_mode():
    with torch.inference_mode():
        return eager.Sea_Attention(16)


def _meta():
    with torch.device("meta"):
        return eager.Sea_Attention(16)


def _tied():
    block = make(eager.NoNorm)
    block.to_k.weight = block.to_q.weight
    block.act = block.proj[0]
    return block


BLOCKS = {
    "inference mode": _inference_mode,
    "meta": _meta,
    "tied": _tied,
    "half": lambda: make().half(),
    "bfloat16": lambda: make().bfloat16(),
    "frozen": lambda: make().requires_grad_(False),
    "no statistics": lambda: _untracked(make()),
    "NaN": lambda: _nan(make()),
    "channels_last": lambda: make().to(memory_format=torch.channels_last),
}


def _untracked(block):
    for layer in (block.to_q, block.to_k, block.to_v):
        layer.bn.track_running_stats = False
        layer.bn.running_mean = layer.bn.running_var = None
    return block


def test_norms_that_differ_are_a_reason():
    block = make().eval()
    block.to_q.bn.running_mean = block.to_q.bn.running_var = None
    with pytest.raises(Obstacle, match="norms of q, k and v differ"):
        probe.probe(block)


def _nan(block):
    with torch.no_grad():
        block.to_q.c.weight.fill_(float("nan"))
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_states_of_a_block(name):
    block = BLOCKS[name]()
    for context in (torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")):
        with context():
            assert probe.probe(block).error < 1e-11


# --- on real maps ----------------------------------------------------------------------------


def compared(kind, x, backward=True, dtype=torch.float32, backend="auto", training=True):
    block = make(kind).to(dtype).train(training)
    found = probe.probe(block)
    state = {name: t.clone() for name, t in block.state_dict().items()}
    folds = fold.FoldCache(found.anatomy.unproven, found.hard)
    verdicts = probe.compare(block, x.to(dtype), folds, backend, backward)
    assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())
    return verdicts


X = torch.randn(2, 16, 18, 20, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_the_operators_keep_the_budget(dtype, training):
    verdicts = compared(eager.Sea_Attention, X, dtype=dtype, training=training)
    assert verdicts.keys() == {"output", "gradients"}
    for verdict in verdicts.values():
        assert verdict.ok, verdict
        assert verdict.rms < 100 * torch.finfo(dtype).eps
    alone = compared(eager.Sea_Attention, X, backward=False, dtype=dtype, training=training)
    assert alone.keys() == {"output"}


@pytest.mark.parametrize("name", ["axial_attention_pair", "normalize", "normalize_gate"])
def test_a_fault_on_a_real_map_misses_the_budget(name, monkeypatch):
    def fault(out):
        if out[0].dtype is torch.float64:
            return out
        return (1.01 * out[0], out[1]) if isinstance(out, tuple) else 1.0001 * out

    _faulty(monkeypatch, name, fault)
    # In training the norms would take a factor away.
    assert not compared(eager.Sea_Attention, X, training=False)["output"].ok


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.9 * grad


def test_a_wrong_gradient_of_one_small_tensor_misses_the_budget(monkeypatch):
    function = ops.axial_attention_pair

    def wrong(row, column, tables, *rest):
        if row.dtype is not torch.float64:
            tables = [_Scaled.apply(tables[0]), *tables[1:]]
        return function(row, column, tables, *rest)

    monkeypatch.setattr(ops, "axial_attention_pair", wrong)
    verdicts = compared(eager.Sea_Attention, X)
    assert verdicts["output"].ok
    assert not verdicts["gradients"].ok


def test_large_maps_are_compared_once(monkeypatch):
    monkeypatch.setattr(probe, "_ENOUGH", 2 * X.numel())
    assert len(probe._near(X)) == 2
    monkeypatch.setattr(probe, "_ENOUGH", X.numel() // 2)
    samples = probe._near(X)
    assert len(samples) == 1
    assert torch.equal(samples[0], X)


def test_a_copy_without_hooks():
    block = make()
    block.register_forward_hook(lambda *_: None)
    twin = copy.deepcopy(block, probe.without_hooks(block))
    assert len(block._forward_hooks) == 1
    assert len(twin._forward_hooks) == 0
