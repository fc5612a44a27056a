"""What is timed: counts, limits, checks, and who runs what."""

from collections import Counter
from math import prod

import pytest
import torch
from bench_toys import CPU, GPU, TOY, block, operator, setting
from torch import nn

from bench import peers, works
from bench.cases import CASES, Case
from bench.eager import EagerSeaAttention, as_eager
from bench.limit import ProductTime, Roofline, products
from bench.measure import measure
from bench.timing import Timing
from bench.works import OPERATORS, Block, Model, Operator, block_of
from seaattn_kernels import SeaAttention, ops, seaformer
from seaattn_kernels.patch import Swapped
from seaattn_kernels.verify import randomise

pytestmark = pytest.mark.usefixtures("hasty")


def _measure(work, providers=("auto",), **more):
    said = []
    rows = measure(work, providers, seconds=0, seeds=range(2), log=said.append, **more)
    return rows, said


def _small_model(step=False, side=64, batch=1):
    """Of SeaFormer-T, on a picture of a size at which it is soon done."""
    picture = torch.randn(1, 3, side, side + 32)
    return Model("t", setting(step=step, batch=batch), picture=picture)


# --- counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_bytes_of_an_operator_are_those_of_its_tensors(name):
    work = operator(name, batch=2)
    given = work.given(0)
    tensors = [*given, *work.candidate("eager")(given)]
    assert work.bytes == sum(t.nbytes for t in tensors)
    half = operator(name, batch=2, dtype=torch.float16)
    assert (half.flops, half.bytes) == (work.flops, work.bytes // 2)
    step = operator(name, step=True, batch=2)
    assert (step.flops, step.bytes) == (3 * work.flops, 2 * work.bytes)


def test_flops_of_an_operator_are_its_sums_and_products():
    batch, (h, w) = 2, (3, 4)
    keys, values = 4, 8
    flops = {name: operator(name, batch=batch).flops for name in OPERATORS}
    pixels = batch * h * w
    assert (TOY.projected, TOY.values, TOY.channels) == (2 * keys + values, values, 8)
    assert flops["axial_squeeze"] == 2 * pixels * TOY.projected, "into a row and into a column"
    assert flops["broadcast_add"] == 2 * pixels * values
    assert flops["gate"] == 3 * pixels * TOY.channels, "x + 3, / 6, times y"
    # q k^T and p v along both axes.
    assert flops["axial_attention_pair"] == 2 * batch * (keys + values) * (h * h + w * w)


def test_flops_and_bytes_of_a_block_are_those_of_its_case():
    work = block(batch=2)
    assert (work.flops, work.bytes) == (TOY.flops(3, 4, 2), TOY.fewest_bytes(3, 4, 2, 4))
    step = block(step=True, batch=2)
    assert (step.flops, step.bytes) == (3 * work.flops, 2 * work.bytes)


def test_flops_and_bytes_of_a_model_are_counted():
    single, several = _small_model(), _small_model(batch=3)
    layers = {id(m): m for m in single.module.modules() if isinstance(m, nn.Conv2d)}
    seen = []
    for layer in layers.values():
        layer.register_forward_hook(
            lambda m, _, out: seen.append(2 * out.numel() * prod(m.weight.shape[1:]))
        )
    with torch.no_grad():
        out = as_eager(single.module)(single.given(0))
    assert sum(seen) <= single.flops <= 1.05 * sum(seen), "convolutions, and the attention"
    assert several.flops == 3 * single.flops
    weights = sum(p.numel() for p in single.module.parameters())
    assert single.bytes == 4 * (single.given(0).numel() + out.numel() + weights)
    assert several.bytes < 3 * single.bytes, "weights are read once"


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_measured(name, step, library):
    work = operator(name, step=step)
    rows, said = _measure(work, ("auto", "triton", "reference"))
    assert not said
    assert [row["provider"] for row in rows] == ["eager", "auto"]
    for row in rows:
        assert (row["kind"], row["what"], row["case"]) == ("operator", name, "toy")
        assert row["mode"] == ("step" if step else "forward")
        assert (row["height"], row["width"], row["batch"]) == (3, 4, 1)
        assert row["ms"] > 0
        assert row["gflops"] == pytest.approx(work.flops / row["ms"] / 1e6)
        assert row["gbytes"] == pytest.approx(work.bytes / row["ms"] / 1e6)
        # The larger of the two rates that this run measured.
        flops, moved = work.flops / row["matrix_gflops"], work.bytes / row["copy_gbytes"]
        assert row["ms_limit"] == pytest.approx(max(flops, moved) / 1e6)
    assert rows[0]["speedup"] == 1
    assert (rows[0]["backend"], rows[1]["backend"]) == ("eager", "cpu")


def test_a_step_of_a_block_is_measured(library):
    rows, said = _measure(block(step=True), ("auto", "reference", "channels_last"))
    assert not said
    assert [row["provider"] for row in rows] == ["eager", "reference", "auto", "channels_last"]
    assert {(row["kind"], row["mode"]) for row in rows} == {("block", "step")}
    assert rows[2]["backend"] == rows[3]["backend"] == "cpu"
    for row in rows:
        assert 0 < row["rms_error"] <= row["max_error"] < 1e-4


def test_a_step_gives_the_result_and_every_gradient():
    work = block(step=True, batch=2)
    given = work.given(3)
    x, upstream = given
    found = work.candidate("auto")(given)
    module = as_eager(work.module)
    shapes = [x[0].shape, x[0].shape, *(p.shape for p in module.parameters())]
    assert [t.shape for t in found] == shapes
    for out, exact in zip(found, work.exact(given), strict=True):
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    leaf = x[0].detach().clone().requires_grad_()
    (module(leaf) * upstream[0]).sum().backward()
    torch.testing.assert_close(found[1], leaf.grad, rtol=1e-3, atol=1e-3)
    assert all(t.is_leaf and t.requires_grad for t in x), "given again as it was"
    assert leaf.grad is not None
    assert x[0].grad is None


def test_channels_last_maps_are_made_ahead(library):
    work = block(batch=2)
    model, x = work.candidate("channels_last"), work.given(0)
    taken = model.bind(x)
    assert taken.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        out = model(taken)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, as_eager(work.module)(x))


def test_a_step_in_channels_last_has_gradients_of_its_own_maps():
    work = block(step=True, batch=2)
    model, given = work.candidate("channels_last"), work.given(0)
    taken = model.bind(given)
    for side in taken:
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in side)
    assert taken[0][0].is_leaf
    assert taken[0][0].requires_grad
    assert not taken[1][0].requires_grad
    for out, wanted in zip(model(taken), work.candidate("auto")(given), strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)


def test_a_model_is_measured_eager_and_replaced(library):
    work = _small_model()
    rows, said = _measure(work)
    assert not said
    assert [row["provider"] for row in rows] == ["eager", "auto"]
    assert {(row["kind"], row["what"], row["case"]) for row in rows} == {
        ("model", "SeaFormer-T segmenter", "T")
    }
    assert (rows[0]["height"], rows[0]["width"]) == (64, 96)
    replaced = [isinstance(m, Swapped) for m in work.candidate("auto").modules()]
    assert sum(replaced) == 4
    views = [work.given(seed) for seed in range(3)]
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[0].sort(dim=3)[0], views[1].sort(dim=3)[0]), "shifted"


def test_a_step_of_a_model_draws_nothing():
    """Masks of dropout would be other ones in float64, and the check would be of those."""
    work = _small_model(step=True, side=96)
    assert isinstance(work.module.decode_head.dropout, nn.Dropout2d)
    given = work.given(0)
    first, again = (work.candidate("eager")(given)[0] for _ in range(2))
    assert torch.equal(first, again)
    judged = work.smooth()
    kinked = (nn.ReLU, nn.ReLU6, type(SeaAttention(8, 4, 1).sigmoid))
    assert not any(isinstance(m, kinked) for m in judged.module.modules())
    assert any(isinstance(m, kinked) for m in work.module.modules()), "what is timed is as it was"
    assert [t.shape for t in judged.given(0)[0]] == [t.shape for t in given[0]]


@pytest.mark.slow
def test_a_step_of_a_model_is_measured(library):
    rows, said = _measure(_small_model(step=True, side=128))
    assert not said
    assert [row["provider"] for row in rows] == ["eager", "auto"]
    for row in rows:
        assert 0 < row["rms_error"] < 1e-2


# --- checks ----------------------------------------------------------------------------------


def test_a_planted_error_in_the_attention_leaves_no_row(monkeypatch):
    class Planted(SeaAttention):
        def forward(self, x):
            out = super().forward(x)
            return out + 1e-4 * out.abs().max()

    original = Block._ours

    def ours(self, backend):
        module = original(self, backend)
        module.__class__ = Planted
        return module

    monkeypatch.setattr(Block, "_ours", ours)
    rows, said = _measure(block(case=CASES["T2"], size=(4, 4)), ["reference"])
    assert [row["provider"] for row in rows] == ["eager"]
    assert len(said) == 1
    assert said[0].startswith("T2 4x4 block forward reference is not timed, it is wrong: rms")


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_a_wrong_operator_is_not_timed(step, monkeypatch):
    right = ops.gate

    def wrong(x, y, hard=True, backend="auto"):
        return right(x, y, hard, backend) * (1.001 if backend != "reference" else 1)

    monkeypatch.setattr(ops, "gate", wrong)
    for name in OPERATORS:
        rows, said = _measure(operator(name, step=step))
        timed = [row["provider"] for row in rows]
        assert timed == (["eager"] if name == "gate" else ["eager", "auto"])
        mode = "step" if step else "forward"
        assert [line.split(" is not timed")[0] for line in said] == (
            [f"toy 3x4 gate {mode} auto"] if name == "gate" else []
        )


class _WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is off by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.001 * gradient


def test_a_step_whose_gradient_alone_is_wrong_is_refused(monkeypatch):
    right = ops.gate

    def wrong(x, y, hard=True, backend="auto"):
        return right(x, y if backend == "reference" else _WrongGradient.apply(y), hard, backend)

    monkeypatch.setattr(ops, "gate", wrong)
    assert [row["provider"] for row in _measure(operator("gate"))[0]] == ["eager", "auto"]
    rows, (line,) = _measure(operator("gate", step=True))
    assert [row["provider"] for row in rows] == ["eager"]
    assert line.startswith("toy 3x4 gate step auto is not timed, it is wrong: rms")


def test_a_block_whose_gradient_alone_is_wrong_is_refused(monkeypatch):
    original = Block._ours

    def ours(self, backend):
        module = original(self, backend)
        module.register_forward_pre_hook(lambda _, x: (_WrongGradient.apply(x[0]),))
        return module

    monkeypatch.setattr(Block, "_ours", ours)
    assert not _measure(block(), ["reference"])[1]
    rows, (line,) = _measure(block(step=True), ["reference"])
    assert [row["provider"] for row in rows] == ["eager"]
    assert line.startswith("toy 3x4 block step reference is not timed, it is wrong: rms")


def test_a_step_is_judged_smooth_and_timed_as_it_is(monkeypatch):
    """At a kink the gradients of two that are right may differ."""
    seen = []
    original = Operator.candidate

    def candidate(self, provider):
        inner = original(self, provider)

        def call(given):
            seen.append((self._operator.arguments, provider))
            return inner(given)

        return call

    monkeypatch.setattr(Operator, "candidate", candidate)
    _measure(operator("gate", step=True))
    counts = Counter(seen)
    for provider in ("eager", "auto"):
        assert counts[(False,), provider] == 2, "smooth, once an input"
        assert counts[(True,), provider] > 2
    seen.clear()
    _measure(operator("gate"))
    assert {arguments for arguments, _ in seen} == {(True,)}, "a forward is judged as it is"


def test_a_smooth_twin_has_no_kinks_and_the_same_sizes():
    for work in (block(step=True), *(operator(name, step=True) for name in OPERATORS)):
        twin = work.smooth()
        assert twin.identity() == work.identity()
        for given, smooth in zip(work.given(0), twin.given(0), strict=True):
            assert [t.shape for t in given] == [t.shape for t in smooth]
    twin = block(step=True).smooth()
    assert isinstance(twin.module.act, nn.SiLU)
    assert isinstance(twin.module.sigmoid, nn.Sigmoid)
    assert operator("gate", step=True).smooth()._operator.arguments == (False,)
    assert operator("broadcast_add", step=True).smooth()._operator.arguments == ("silu", 0.0)
    for forward in (block(), operator("gate"), _small_model()):
        assert forward.smooth() is forward


# --- who runs what ---------------------------------------------------------------------------


def test_the_block_is_compiled_in_the_mode_of_the_provider(monkeypatch):
    asked = []
    original = torch.compile

    def compiled(model, **options):
        asked.append(options)
        return original(model, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("compile", "autotune"):
        assert isinstance(block().candidate(name)._orig_mod, EagerSeaAttention)
        operator("gate").candidate(name)
        block(step=True).candidate(name)
    modes = [None] * 3 + ["max-autotune-no-cudagraphs"] * 3
    assert asked == [{"dynamic": False, "mode": mode} for mode in modes]


def test_a_work_says_which_providers_do_not_do_it():
    wide = Case("wide", 8, 128, 1, stride=4)
    for provider in ("freezing", *peers.PACKAGES):
        assert block().refusal(provider) is None
        assert _small_model().refusal(provider) is None
        assert block(step=True).refusal(provider) == "it runs no backward"
        assert operator("gate").refusal(provider) == "it runs whole blocks"
    assert operator("gate").refusal("channels_last") == "it runs whole blocks"
    assert operator("gate").refusal("reference") == "it is eager here"
    assert block().refusal("reference") is None
    for provider in ("eager", "compile", "autotune", "auto"):
        assert block(step=True).refusal(provider) is None
        assert operator("gate", step=True).refusal(provider) is None
    on_a_gpu = Block.__new__(Block)  # weights are not moved to a GPU that may not be here
    on_a_gpu.setting, on_a_gpu._table = setting(GPU, torch.float16), wide
    assert "(128, 256)" in on_a_gpu.refusal("triton")
    on_a_gpu.setting = setting(GPU, torch.float16, step=True)
    assert "(128, 256)" in on_a_gpu.refusal("triton")
    on_a_gpu._table = TOY
    assert on_a_gpu.refusal("triton") is None
    double = setting(CPU, torch.float64)
    assert "float64" in Operator("gate", TOY, (3, 4), double).refusal("cpu")


def test_a_provider_runs_the_backend_of_its_name(monkeypatch):
    asked = []
    right = ops.gate
    monkeypatch.setattr(ops, "gate", lambda *given, backend: asked.append(backend) or right(*given))
    work = operator("gate")
    asked.clear()
    for provider in ("eager", "cpu", "triton", "auto"):
        work.candidate(provider)(work.given(0))
    assert asked == ["reference", "cpu", "triton", "auto"]
    for provider in ("reference", "cpu", "triton", "auto"):
        assert block().candidate(provider).backend == provider
    assert block().candidate("channels_last")._candidate.backend == "auto"


def test_blocks_are_random_by_name():
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            block_of(TOY).state_dict().values(),
            randomise(SeaAttention(8, 4, 1)).state_dict().values(),
            strict=True,
        )
    )
    assert not block_of(TOY).training
    assert block(step=True).module.training


# --- the limit -------------------------------------------------------------------------------


def test_the_limit_adds_up_the_better_layout_of_each_product():
    case = CASES["T1"]
    assert products(case, 8, 8, 2) == {
        (256, 128, 128): 1, (128, 256, 128): 1, (128, 128, 128): 1,
        (128, 128, 16): 2, (256, 128, 32): 1,
    }  # fmt: skip
    limit = ProductTime(products(case, 8, 8, 2), torch.float32)
    assert len(limit.calls) == 2 * 5 + 2
    for name, call in limit.calls.items():
        if name not in ("matrix", "copy"):
            m, _, n = map(int, name.split()[0].split("x"))
            assert call().shape in ((m, n), (n, m))
    seconds = {
        name: 1.0 if "weights @ map" in name else 0.5 if "128x128x16" in name else 3.0
        for name in limit.calls
    }
    read = limit.read({name: Timing(t, t, t, t, 1) for name, t in seconds.items()})
    assert read.seconds == 4 * 1.0 + 2 * 0.5
    assert read.ceilings.flops == pytest.approx(2 * 32**3 / 3), "of the ceilings of the fixture"
    assert read.ceilings.bandwidth == pytest.approx(2 * 1024 / 3)


def test_a_step_has_two_more_products_of_each():
    forward, step = (products(TOY, 3, 4, 2, step) for step in (False, True))
    assert step.total() == 3 * forward.total()
    work = [sum(n * prod(shape) for shape, n in found.items()) for found in (forward, step)]
    assert work[1] == 3 * work[0]
    # Of the projection: itself, weights^T @ gradient, gradient @ map^T.
    projected, channels, pixels = TOY.projected, TOY.channels, 2 * 3 * 4
    for shape in ((projected, channels, pixels), (projected, pixels, channels)):
        assert step[shape] > forward[shape]
    assert step[channels, projected, pixels] == 2, "the product back has such sizes too"


def test_the_roofline_is_the_larger_of_two_times_and_a_launch():
    limit = Roofline(3 * 2 * 32**3, 2 * 1024, torch.float16, CPU)
    assert set(limit.calls) == {"matrix", "copy"}
    for call in limit.calls.values():
        call()
    timings = {name: Timing(t, t, t, t, 1) for name, t in (("matrix", 0.5), ("copy", 1.0))}
    assert limit.read(timings).seconds == pytest.approx(1.5), "three products of the large one"
    bound = Roofline(1, 8 * 1024, torch.float16, CPU)
    assert bound.read(timings).seconds == pytest.approx(4.0), "moves four times the copy's bytes"
    launched = {**timings, "launch": Timing(0.25, 0, 0, 0, 1)}
    assert bound.read(launched).seconds == pytest.approx(4.25)
    assert bound.read(launched).ceilings.launch == 0.25


def test_blocks_on_a_cpu_have_the_time_of_their_products_as_limit():
    assert isinstance(block().limit(), ProductTime)
    assert block().limit().products == products(TOY, 3, 4, 1)
    assert block(step=True).limit().products == products(TOY, 3, 4, 1, step=True)
    assert type(operator("gate").limit()) is Roofline
    assert type(_small_model().limit()) is Roofline


def test_a_large_product_takes_float32_as_convolutions_do(monkeypatch):
    from bench.limit import _as_convolutions

    seen = []
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision
    call = _as_convolutions(lambda: seen.append(matmul.fp32_precision))
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(conv, "fp32_precision", precision)
        call()
    assert seen == ["tf32", "ieee"]
    assert matmul.fp32_precision == before


def test_a_photograph_is_what_models_see_unless_there_is_another(monkeypatch):
    seen = []
    picture = torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(works, "photograph", lambda path: seen.append(path) or picture)
    model = Model("t", setting(batch=2))
    assert seen == [None]
    assert torch.equal(model.given(0), picture.expand(2, -1, -1, -1))
    module = randomise(seaformer.seaformer_segmenter("t"))
    assert Model("t", setting(), module).module is module
