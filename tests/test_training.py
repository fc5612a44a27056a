"""The training pass: what it keeps, its gradients, its norms, and what is built around a step."""

import copy
from functools import partial
from pathlib import Path

import eager_blocks
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from seaattn_kernels import SeaAttention, budget, ops, reference, replace_sea_attention, verify

GOLDEN = sorted(Path(verify.GOLDEN).glob("*.npz"))
GPU = torch.cuda.is_available()
BACKENDS = [
    "reference",
    "cpu",
    # Without a GPU it is interpreted.
    pytest.param("triton", marks=[pytest.mark.gpu] if GPU else []),
]
#: An interpreted step takes a second.
SEEDS_OF_STEPS = {"reference": 3, "cpu": 3, "triton": 1}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("library")
    return request.param


def device_of(backend):
    return torch.device("cuda" if GPU and backend == "triton" else "cpu")


def make(dtype=torch.float64, **options):
    """A block in training mode with random weights and statistics."""
    block = verify.randomise(SeaAttention(16, 4, 2, **options))
    return block.to(device_of(options.get("backend")), dtype)


def step(model, x, upstream, forward=None):
    """Output, gradients and buffers of one forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad(set_to_none=True)
    out = (forward or model)(x)
    out.backward(upstream.to(out.dtype))
    return {
        "out": out.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        **{name: b.clone() for name, b in model.named_buffers()},
    }


def _param(backend):
    return backend if not isinstance(backend, str) else pytest.param(backend)


def eager(block):
    return partial(reference.sea_attention, block)


def assert_same(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- golden files, on every backend ----------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        pytest.param(
            mode,
            *backend.values,
            marks=[*backend.marks, *[pytest.mark.slow] * (backend.values == ("triton",))],
        )
        for mode in ("train", "eval")
        for backend in map(_param, BACKENDS)
        if mode == "train" or GPU or backend.values != ("triton",)
    ],
    indirect=["backend"],
)
def test_golden_files_in_float32(mode, backend):
    """Output, all gradients and running statistics; tests/test_verify.py has them in float64.

    A file is one sample, which is no statistic: errors are pooled over all of them.
    """
    pooled = {kind: ([], [], []) for kind in ("out", "grad", "buffer")}
    for path in GOLDEN:
        golden = verify.load_golden(path)
        if golden.meta["kind"] != "sea_attention":
            continue
        device = device_of(backend)
        block = golden.model(backend).to(device, torch.float32).train(mode == "train")
        twin = copy.deepcopy(block)
        x, upstream = (golden.random(name).to(device, torch.float32) for name in ("x", "dout"))
        ours, theirs = step(block, x, upstream), step(twin, x, upstream, eager(twin))
        for name, truth in golden.arrays.items():
            of_mode, kind, *rest = name.split("/")
            if of_mode == mode and not name.endswith("num_batches_tracked"):
                key = rest[0] if rest else kind
                for found, value in zip(pooled[kind], (ours[key], theirs[key], truth), strict=True):
                    found.append(value)
    assert all(kind == "buffer" or found[0] for kind, found in pooled.items())
    for kind, found in pooled.items():
        if found[0]:
            verdict = budget.judge(*found, torch.float32, gradient=kind == "grad")
            assert verdict.ok, (kind, str(verdict))


def test_ten_optimizer_steps_agree(backend):
    """Parameters and statistics after ten steps of SGD with momentum, against float64."""
    results = ([], [], [])
    for seed in budget.SEEDS[: SEEDS_OF_STEPS[backend]]:
        torch.manual_seed(seed)
        batches, upstream = torch.randn(10, 2, 16, 7, 6), torch.randn(2, 16, 7, 6)
        batches, upstream = (t.to(device_of(backend)) for t in (batches, upstream))
        start = make(torch.float32, backend=backend, activation="silu")
        for result, double in zip(results, (False, False, True), strict=True):
            block = copy.deepcopy(start)
            block = block.double() if double else block
            forward = block if result is results[0] else eager(block)
            optimizer = torch.optim.SGD(block.parameters(), lr=0.02, momentum=0.9)
            for x in batches.to(torch.float64 if double else torch.float32):
                optimizer.zero_grad()
                (forward(x) * upstream.to(x.dtype)).mean().backward()
                optimizer.step()
            state = block.state_dict()
            result.append(torch.cat([t.flatten() for t in state.values() if t.is_floating_point()]))
    verdict = budget.judge(*results, torch.float32, gradient=True)
    assert verdict.ok, str(verdict)


# --- BatchNorm -------------------------------------------------------------------------------


def _norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def _cumulative(block):
    for norm in _norms(block):
        norm.momentum = None


def _other_numbers(block):
    for index, norm in enumerate(_norms(block)):
        norm.momentum = 0.01 + 0.02 * index
    for norm in _norms(block):
        norm.eps = 1e-3


def _untracked(block):
    for norm in _norms(block):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _plain(block):
    for norm in _norms(block):
        norm.affine = False
        norm.weight = norm.bias = None


def _one_plain(block):
    block.to_k.bn.weight = block.to_k.bn.bias = None


def _frozen(block):
    for norm in _norms(block):
        norm.eval()


def _frozen_parts(block):
    for layer in (block.dwconv, block.proj, block.proj_encode_row):
        layer.eval()


def _frozen_queries(block):
    block.to_q.bn.eval()


def _other_eps(block):
    block.to_v.bn.eps = 0.1


def _one_of_two(block):
    """One layer for two maps: both count, one after the other."""
    block.to_k.bn = block.to_q.bn
    _cumulative(block)


def _no_gradients(block):
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("bn" not in name and "to_q" not in name)


CHANGES = [
    _cumulative, _other_numbers, _untracked, _plain, _one_plain, _frozen, _frozen_parts,
    _frozen_queries, _other_eps, _one_of_two, _no_gradients,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_norms_do_what_the_layers_do(change):
    """Three steps, in float64, parameters and statistics included."""
    block = make()
    change(block)
    twin = copy.deepcopy(block)
    for seed in range(3):
        torch.manual_seed(seed)
        x, upstream = torch.randn(2, 3, 16, 5, 4, dtype=torch.float64)
        assert_same(step(block, x, upstream), step(twin, x, upstream, eager(twin)))


def test_untracked_norms_take_the_batch_in_eval_mode_too():
    block = make()
    _untracked(block)
    block.eval()
    x, upstream = torch.randn(2, 3, 16, 5, 4, dtype=torch.float64)
    assert_same(step(block, x, upstream), step(block, x, upstream, eager(block)))


def test_an_explicit_backend_says_which_norms_it_cannot_join(library):
    block = make(torch.float32, backend="cpu")
    _frozen_queries(block)
    with pytest.raises(RuntimeError, match="norms of q, k and v differ in mode"):
        block(torch.randn(2, 16, 5, 4))


@pytest.mark.parametrize("variant", ["NoNorm", "Detector", "SyncBatchNorm", "TrueSigmoid"])
def test_copies_train_as_they_did(variant):
    """Convolutions with a bias and no norm, another eps, SyncBatchNorm in one process."""
    kind = getattr(eager_blocks, variant)
    model = verify.randomise(eager_blocks.Model(kind)).double().train()
    twin = copy.deepcopy(model)
    report = replace_sea_attention(model)
    assert all(report[f"stages.{index}"].backend for index in range(2)), str(report)
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, 3, 20, 18, dtype=torch.float64)
        upstream = torch.randn(3, 5, dtype=torch.float64)
        assert_same(step(model, x, upstream), step(twin, x, upstream))


@pytest.mark.parametrize(
    ("offset", "backend"),
    [
        pytest.param(offset, *backend.values, marks=backend.marks)
        for offset in (1e3, -1e3)
        for backend in map(_param, BACKENDS)
        if offset > 0 or GPU or backend.values != ("triton",)
    ],
    indirect=["backend"],
)
def test_means_a_thousand_times_the_deviation(backend, offset):
    """A variance from sums of squares would have no digit left."""
    results = ([], [], [])
    for seed in budget.SEEDS:
        torch.manual_seed(seed)
        block = make(torch.float32, backend=backend)
        with torch.no_grad():  # each output sums the channels up, so its mean grows with theirs
            for layer in (block.to_q, block.to_k, block.to_v):
                layer.c.weight.abs_()
        x = 1 + torch.randn(2, 16, 6, 5) / abs(offset)
        x = (x if offset > 0 else -x).to(device_of(backend))
        exact = copy.deepcopy(block).double()
        twin = copy.deepcopy(block)
        upstream = torch.randn(2, 16, 6, 5).to(x.device)
        results[0].append(step(block, x, upstream))
        results[1].append(step(twin, x, upstream, eager(twin)))
        results[2].append(step(exact, x.double(), upstream.double(), eager(exact)))
    for name in ("out", "to_v.bn.running_var", "to_v.bn.weight", "to_q.bn.running_mean"):
        verdict = budget.judge(
            *([r[name] for r in result] for result in results), torch.float32, gradient=True
        )
        assert verdict.ok, (name, str(verdict))


def test_an_empty_batch_in_eval_mode(backend):
    block = make(torch.float32, backend=backend).eval()
    x = torch.empty(0, 16, 4, 5, requires_grad=True, device=device_of(backend))
    out = block(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())


# --- a step and what is around it ------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(library, layout, dtype):
    x, upstream = (
        torch.randn(3, 16, 30, 34, dtype=dtype).contiguous(memory_format=layout) for _ in "xg"
    )
    stages = {}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = []

            # The products are PyTorch's, whose bits may depend on the threads.
            y, affine = torch.cat([x, upstream], 1), torch.linspace(0.5, 1.5, 96).view(3, 32)
            for name, arguments in (
                ("axial_moments", (y,)),
                ("normalize_sums", (y, y, affine, None, None, 2, 0.0)),
                ("normalize_gate_sums", (y, y, y, affine, affine, True)),
                ("depthwise_backward", (y, y, affine, y[0, :1, :3, :3].expand(32, 1, 3, 3))),
            ):
                found.append(ops.OVERLOADS[name]["cpu"](*arguments))
            stages[count] = found
    finally:
        torch.set_num_threads(threads)
    for count in (2, 3):
        for one, other in zip(stages[1], stages[count], strict=True):
            one = one if isinstance(one, tuple) else (one,)
            other = other if isinstance(other, tuple) else (other,)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_nothing_and_gives_the_same(reentrant):
    block = make()
    twin = copy.deepcopy(block)
    x, upstream = torch.randn(2, 3, 16, 5, 4, dtype=torch.float64)
    found = step(block, x, upstream, lambda x: checkpoint(block, x, use_reentrant=reentrant))
    expected = step(
        twin, x, upstream, lambda x: checkpoint(eager(twin), x, use_reentrant=reentrant)
    )
    assert_same(found, expected)  # statistics move twice, as they do in eager


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(dtype, backend):
    """Float32 parameters and gradients, a step by GradScaler, finite and near eager's."""
    block = make(torch.float32, backend=backend, activation="silu")
    twin = copy.deepcopy(block)
    device = device_of(backend)
    losses = []
    for model, forward in ((block, block), (twin, eager(twin))):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        found = []
        for _ in range(3):
            x = torch.randn(4, 16, 6, 5).to(device)
            with torch.autocast(device.type, dtype=dtype):
                out = forward(x)
                loss = out.float().square().mean()
            assert out.dtype is dtype
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            assert all(p.grad.dtype is torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        assert scaler.get_scale() == 256.0
        losses.append(found)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0.0)


def test_gradients_accumulate():
    block = make()
    twin = copy.deepcopy(block)
    for model, forward in ((block, block), (twin, eager(twin))):
        torch.manual_seed(0)
        for _ in range(3):
            forward(torch.randn(2, 16, 4, 5, dtype=torch.float64)).sum().backward()
        del model
    for (name, ours), theirs in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


def test_only_the_input_needs_a_gradient(backend):
    block = make(torch.float32, backend=backend).requires_grad_(False)
    x, upstream = torch.randn(2, 2, 16, 5, 4).to(device_of(backend))
    found = step(block, x, upstream)
    twin = copy.deepcopy(block)
    assert set(found) == set(step(twin, x, upstream, eager(twin)))
    assert all(p.grad is None for p in block.parameters())


def test_statistics_move_without_gradients():
    """A pass over data in training mode, as for recalibration."""
    block = make()
    twin = copy.deepcopy(block)
    x = torch.randn(3, 16, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference.sea_attention(twin, x))
    for name, value in twin.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), value, msg=name)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_second_derivatives(mode):
    """Of every parameter, by a gradient penalty."""
    block = make(activation="silu").train(mode == "train")
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for forward in (block, eager(block)):
        (first,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        block.zero_grad()
        first.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in block.named_parameters()})
    assert_same(*found, tolerance=1e-9)


def test_a_compiled_step_takes_maps_of_any_size():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(make(torch.float32), fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for size in ((5, 4), (7, 9), (16, 3)):
        compiled(torch.randn(2, 16, *size)).sum().backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_a_compiled_step_in_half_precision():
    torch._dynamo.reset()
    block = make(torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(torch.randn(2, 16, 5, 4))
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
