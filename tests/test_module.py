"""The drop-in module: upstream's parameters, and its forward and backward in every mode."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import seaattn_kernels
from seaattn_kernels import SeaAttention, budget, ops, overloads, reference, verify
from seaattn_kernels.layers import make_activation, make_norm


def make(channels=16, dtype=torch.float32, **options):
    block = SeaAttention(channels, 4, 2, **options)
    return verify.randomise(block).to(dtype)


def test_two_names_for_one_class():
    assert seaattn_kernels.Sea_Attention is seaattn_kernels.SeaAttention


# --- parameters ------------------------------------------------------------------------------


def test_state_dict_is_upstreams():
    block = SeaAttention(24, key_dim=6, num_heads=3, attn_ratio=1.5)
    shapes = {name: tuple(t.shape) for name, t in block.state_dict().items()}
    assert len(shapes) == 52
    keys, values, projected = 18, 27, 63
    for name, shape in {
        "to_q.c.weight": (keys, 24, 1, 1),
        "to_k.c.weight": (keys, 24, 1, 1),
        "to_v.c.weight": (values, 24, 1, 1),
        "proj.1.c.weight": (24, values, 1, 1),
        "proj_encode_row.1.c.weight": (values, values, 1, 1),
        "proj_encode_column.1.c.weight": (values, values, 1, 1),
        "dwconv.c.weight": (projected, 1, 3, 3),
        "pwconv.c.weight": (24, projected, 1, 1),
    }.items():
        assert shapes.pop(name) == shape
        for entry in ("weight", "bias", "running_mean", "running_var"):
            assert shapes.pop(name.replace("c.weight", f"bn.{entry}")) == shape[:1]
        assert shapes.pop(name.replace("c.weight", "bn.num_batches_tracked")) == ()
    tables = {f"pos_emb_{axis}{part}.pos_embed" for axis in ("row", "column") for part in "qk"}
    assert shapes == dict.fromkeys(tables, (1, keys, 16))


def test_initialisation_is_upstreams():
    """Zero scale after proj and the encodes, so a fresh block is half of its detail branch."""
    block = SeaAttention(16).eval()
    for layer in (block.proj[1], block.proj_encode_row[1], block.proj_encode_column[1]):
        assert layer.bn.weight.abs().max() == 0
    for layer in (block.to_q, block.to_k, block.to_v, block.dwconv, block.pwconv):
        assert torch.equal(layer.bn.weight, torch.ones_like(layer.bn.weight))
    x = torch.randn(2, 16, 5, 6)
    with torch.no_grad():
        qkv = torch.cat([block.to_q(x), block.to_k(x), block.to_v(x)], 1)
        half = 0.5 * block.pwconv(block.act(block.dwconv(qkv)))
        torch.testing.assert_close(block(x), half)
    torch.manual_seed(3)
    first = SeaAttention(16)
    torch.manual_seed(3)
    expected = nn.Conv2d(16, 64, 1, bias=False).weight
    assert torch.equal(first.to_q.c.weight, expected)


def test_defaults_are_the_contract():
    block = SeaAttention(32)
    assert (block.key_dim, block.num_heads, block.attn_ratio, block.backend) == (16, 4, 2, "auto")
    assert type(block.act) is nn.ReLU6
    assert block.scale == 0.25


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (None, nn.ReLU6),
        ("relu", nn.ReLU),
        ("relu6", nn.ReLU6),
        ("silu", nn.SiLU),
        ("leaky_relu", nn.LeakyReLU),
        ("identity", nn.Identity),
        (nn.ReLU, nn.ReLU),
        (nn.LeakyReLU(0.3), nn.LeakyReLU),
    ],
)
def test_activations(activation, kind):
    block = make(activation=activation).double().eval()
    layers = [block.act, block.proj[0], block.proj_encode_row[0], block.proj_encode_column[0]]
    assert all(type(layer) is kind for layer in layers)
    assert len(set(map(id, layers))) == 4
    if kind is nn.LeakyReLU and not isinstance(activation, str):
        assert block.act.negative_slope == 0.3
    x = torch.randn(2, 16, 5, 9, dtype=torch.float64)
    expected = reference.sea_attention(block, x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "dim .*got 0", {"dim": 0}),
        (ValueError, "dim .*got 1.5", {"dim": 1.5}),
        (ValueError, "key_dim .*got -1", {"key_dim": -1}),
        (ValueError, "num_heads .*got True", {"num_heads": True}),
        (ValueError, "attn_ratio .*0.01", {"attn_ratio": 0.01}),
        (ValueError, "attn_ratio .*'2'", {"attn_ratio": "2"}),
        (ValueError, "attn_ratio .*None", {"attn_ratio": None}),
        (ValueError, "attn_ratio .*nan", {"attn_ratio": float("nan")}),
        (TypeError, "norm_cfg .*'BN'", {"norm_cfg": "BN"}),
        (ValueError, r"norm_cfg.*\[\]", {"norm_cfg": {"type": []}}),
        (TypeError, "norm_cfg .*'size': 3", {"norm_cfg": {"size": 3}}),
        (ValueError, "activation .*'gelu'", {"activation": "gelu"}),
        (ValueError, "activation .*GELU", {"activation": nn.GELU}),
        (TypeError, "activation .*7", {"activation": 7}),
        (ValueError, "norm_cfg.*'LN'", {"norm_cfg": {"type": "LN"}}),
        (ValueError, "backend .*'metal'", {"backend": "metal"}),
    ],
)
def test_bad_arguments(error, message, options):
    with pytest.raises(error, match=message):
        SeaAttention(**{"dim": 16, **options})


def test_norm_cfg():
    block = SeaAttention(8, norm_cfg={"type": "BN2d", "eps": 1e-3, "requires_grad": False})
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all(m.eps == 1e-3 and not m.weight.requires_grad for m in norms)
    assert type(make_norm({"type": "SyncBN", "momentum": 0.03}, 4)) is nn.SyncBatchNorm
    assert make_norm({"type": "SyncBN", "momentum": 0.03}, 4).momentum == 0.03


def test_make_activation_copies_an_instance():
    layer = nn.LeakyReLU(0.2)
    assert make_activation(layer) is not layer


# --- forward and backward --------------------------------------------------------------------


def run(block, x, upstream, forward=None):
    """Output, gradient of x, and gradients and buffers by name."""
    x = x.detach().clone().requires_grad_()
    out = block(x) if forward is None else forward(x)
    out.backward(upstream.to(out.dtype))
    return {
        "out": out.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in block.named_parameters()},
        **{name: b.clone() for name, b in block.named_buffers()},
    }


def ten_steps(prepare, dtype):
    """A step by the module, by eager in the same precision, and by eager in float64, ten times.

    ``prepare`` makes a block; a dtype other than float32 is autocast's.
    """
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)
    results = ([], [], [])
    for seed in budget.SEEDS:
        torch.manual_seed(seed)
        x, upstream = torch.randn(2, 2, 16, 9, 7)
        block = prepare()
        twin, exact = copy.deepcopy(block), copy.deepcopy(block).double()
        for result, model, function in zip(
            results,
            (block, twin, exact),
            (
                block,
                partial(reference.sea_attention, twin),
                partial(reference.sea_attention, exact),
            ),
            strict=True,
        ):
            if model is exact:
                result.append(run(exact, x.double(), upstream.double(), function))
            else:
                result.append(run(model, x, upstream, autocast(function)))
    return results


def assert_all_in_budget(results, dtype, names=None):
    for name in names or results[0][0]:
        verdict = budget.judge(
            *([result[name] for result in steps] for steps in results),
            dtype,
            gradient=name != "out",
        )
        assert verdict.ok, (name, str(verdict))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32_keeps_the_budget(mode, backend):
    """Outputs, all gradients and running statistics."""
    prepare = lambda: make(backend=backend).train(mode == "train")  # noqa: E731
    assert_all_in_budget(ten_steps(prepare, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_under_autocast_keep_the_budget(dtype, mode):
    results = ten_steps(lambda: make().train(mode == "train"), dtype)
    assert results[0][0]["out"].dtype is dtype
    assert_all_in_budget(results, dtype, ["out"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_outputs_under_autocast_keep_the_budget(dtype):
    results = ([], [], [])
    for seed in budget.SEEDS:
        torch.manual_seed(seed)
        x = torch.randn(2, 16, 9, 7)
        block = make().eval()
        with torch.no_grad():
            with torch.autocast("cpu", dtype=dtype):
                results[0].append(block(x))
                results[1].append(reference.sea_attention(block, x))
            results[2].append(reference.sea_attention(block.double(), x.double()))
    assert results[0][0].dtype is dtype
    verdict = budget.judge(*results, dtype)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_keep_the_budget(dtype):
    """Away from the kinks: a rounding that crosses one flips a gradient, for eager and for us.

    Such flips outweigh all other errors and fall on either side by chance; the gradients at the
    kinks themselves are tested exactly.
    """

    def smooth():
        block = make(activation="silu")
        with torch.no_grad():
            block.proj[1].bn.weight.mul_(0.3)
            block.proj[1].bn.bias.mul_(0.3)
        return block

    assert_all_in_budget(ten_steps(smooth, dtype), dtype)


@pytest.mark.parametrize("kind", ["channels_last", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("gradients", [False, True])
def test_layouts(kind, gradients):
    block = make(dtype=torch.float64).eval()
    x = torch.randn(2, 16, 6, 8, dtype=torch.float64)
    views = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(3, 32, 6, 16, dtype=torch.float64)[1:, ::2, :, ::2],
        "expanded": x[:1].expand(2, 16, 6, 8),
        "transposed": torch.randn(2, 16, 8, 6, dtype=torch.float64).transpose(2, 3),
    }
    x = views[kind]
    before = x.clone()
    with torch.set_grad_enabled(gradients):
        out = block(x)
        torch.testing.assert_close(
            out, reference.sea_attention(block, x.contiguous()), rtol=0, atol=1e-12
        )
    assert torch.equal(x, before)
    expected = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    assert out.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module_trains(dtype):
    block = make(dtype=dtype)
    x = torch.randn(2, 16, 5, 6, dtype=dtype, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.dtype is dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_empty_batch():
    block = make().eval()
    with torch.no_grad():
        assert block(torch.empty(0, 16, 4, 5)).shape == (0, 16, 4, 5)
    out = block(torch.empty(0, 16, 4, 5, requires_grad=True))
    assert out.shape == (0, 16, 4, 5)


def test_one_pixel_in_training_raises_as_eager_does():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make().train()(torch.randn(1, 16, 1, 1))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("error", "message", "make_input"),
    [
        (TypeError, "x must be a tensor", lambda x: x.numpy()),
        (ValueError, r"x .*\(B, C, H, W\), got shape \(16, 5, 6\)", lambda x: x[0]),
        (ValueError, "C=16 channels", lambda x: x[:, :3]),
        (ValueError, "empty in B only", lambda x: x[:, :, :0]),
        (TypeError, "torch.int32", lambda x: x.int()),
        (TypeError, "torch.complex64", lambda x: x.cfloat()),
        (TypeError, "x is torch.float64, the weights are torch.float32", lambda x: x.double()),
        (TypeError, "x is torch.float16, the weights are torch.float32", lambda x: x.half()),
        (ValueError, "x is on meta", lambda x: x.to("meta")),
    ],
)
def test_bad_input(gradients, error, message, make_input):
    block = make().eval()
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        block(make_input(torch.randn(2, 16, 5, 6)))


def test_explicit_backend_never_falls_back(library, monkeypatch):
    lacking = dict.fromkeys(("triton", "cuda", "cpu"), ("axial_squeeze",))
    monkeypatch.setattr(ops, "OPERATORS", {**ops.OPERATORS, **lacking})
    for backend in ("triton", "cuda", "cpu"):
        block = make(backend=backend).eval()
        with pytest.raises(RuntimeError, match=f"no {backend} implementation"), torch.no_grad():
            block(torch.randn(1, 16, 4, 4))
        with pytest.raises(RuntimeError, match=f"no {backend} implementation"):
            block(torch.randn(1, 16, 4, 4))


HOOKED = ["to_q", "dwconv.bn", "act", "proj", "proj.0", "proj.1", "sigmoid", "pos_emb_rowq"]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("gradients", [False, True])
def test_hooks_on_submodules_fire(name, gradients):
    block = make().eval()
    x = torch.randn(1, 16, 4, 5)
    with torch.no_grad():
        block(x)
    seen = []
    handle = block.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with torch.set_grad_enabled(gradients):
        block(x)
        assert seen == [name]
        handle.remove()
        block(x)
    assert seen == [name]


def test_backward_hooks_fire():
    block = make()
    seen = []
    block.sigmoid.register_full_backward_hook(lambda *_: seen.append("sigmoid"))
    block(torch.randn(2, 16, 4, 5)).sum().backward()
    assert seen == ["sigmoid"]


def test_a_hook_and_an_explicit_backend_exclude_each_other():
    block = make(backend="cpu")
    block.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="proj carries a forward hook"):
        block(torch.randn(2, 16, 4, 5))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_trains_compiled_without_a_graph_break(mode):
    torch._dynamo.reset()
    block = make(dtype=torch.float64).train(mode == "train")
    x, upstream = torch.randn(2, 2, 16, 6, 5, dtype=torch.float64)
    expected = run(copy.deepcopy(block), x, upstream)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = run(block, x, upstream, compiled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11)


def test_trains_compiled_on_the_operators_of_a_cpu(library):
    """In float32 the graph holds the compiled operators; a step of every size, in one graph."""
    torch._dynamo.reset()
    block = make(backend="cpu")
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((7, 9), (12, 17)):
        x, upstream = torch.randn(2, 2, 16, *size)
        expected, found = run(twin, x, upstream), run(block, x, upstream, compiled)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_second_derivative_is_the_references():
    block = make(activation="silu", dtype=torch.float64)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (block, partial(reference.sea_attention, block)):
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_compiled_block_of_any_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    block = make(dtype=torch.float64).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in ((20, 24), (32, 27), (41, 37)):
            x = torch.randn(3, 16, *size, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=1e-11)
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


def test_inference_mode_and_gradients_agree():
    block = make(dtype=torch.float64).eval()
    x = torch.randn(2, 16, 18, 17, dtype=torch.float64)
    with torch.inference_mode():
        folded = block(x)
    torch.testing.assert_close(folded, block(x).detach(), rtol=0, atol=1e-12)


def test_accumulates_gradients_and_freezes_parameters():
    block = make(dtype=torch.float64).eval()
    block.to_q.requires_grad_(False)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    block(x).sum().backward()
    once = block.to_v.c.weight.grad.clone()
    block(x).sum().backward()
    torch.testing.assert_close(block.to_v.c.weight.grad, 2 * once)
    assert block.to_q.c.weight.grad is None


def test_global_random_state_is_untouched():
    block = make()
    state = torch.random.get_rng_state()
    block(torch.zeros(2, 16, 4, 4)).sum().backward()
    with torch.no_grad():
        block.eval()(torch.zeros(2, 16, 4, 4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    block = make(dtype=torch.float64).eval()
    x, upstream = torch.randn(2, 2, 16, 5, 4, dtype=torch.float64)
    expected = run(copy.deepcopy(block), x, upstream)
    found = run(block, x, upstream, lambda x: checkpoint(block, x, use_reentrant=False))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_auto_uses_the_operators_in_training(library, monkeypatch):
    called = []

    def counted(name, overload):
        def call(*arguments):
            called.append(name)
            return overload(*arguments)

        return call

    for name in ("axial_attention_pair", *overloads.STAGES):
        own = counted(name, ops.OVERLOADS[name]["cpu"])
        monkeypatch.setitem(ops.OVERLOADS, name, {**ops.OVERLOADS[name], "cpu": own})
    x = torch.randn(2, 16, 4, 5, requires_grad=True)
    out = make()(x)
    assert called == [
        "axial_moments", "normalize_affine", "axial_attention_pair",
        "depthwise", "moments", "normalize_affine", "normalize", "moments", "normalize_affine",
        "normalize", "moments", "normalize_affine", "normalize_gate",
    ]  # fmt: skip
    called.clear()
    out.sum().backward()
    assert called == [
        "normalize_gate_sums", "normalize_terms", "normalize_terms", "normalize_gate_backward",
        "normalize", "normalize_sums", "normalize_terms", "normalize_backward",
        "depthwise_backward", "normalize", "normalize_add_backward",
        "normalize_sums", "normalize_terms", "normalize_backward",
    ]  # fmt: skip
