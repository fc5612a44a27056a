"""One line swaps the blocks of a model, one undoes it, and nothing else of the model changes."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import eager_blocks as eager
import pytest
import torch
from torch import nn

from seaattn_kernels import (
    SeaAttention,
    explain,
    native,
    ops,
    patch,
    replace_sea_attention,
    restore_sea_attention,
    training,
    verify,
)

TESTS = Path(__file__).parent
VARIANTS = pytest.mark.parametrize("kind", eager.VARIANTS, ids=lambda kind: kind.__name__)
X = torch.randn(2, 3, 21, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(kind=eager.Sea_Attention, dtype=torch.float64, **options):
    return verify.randomise(eager.Model(kind, **options)).to(dtype)


def results(model, x=X, training=True):
    """Output, gradients of everything, statistics after it."""
    model.train(training)
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    found |= {f"{name} after": b.clone() for name, b in model.named_buffers()}
    model.zero_grad()
    return found


def evaluated(model, x=X):
    model.eval()
    with torch.no_grad():
        return model(x)


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=tolerance * size,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def all_swapped(model):
    return [isinstance(block, patch.Swapped) for block in model.stages] == [True, True]


# --- every variant ---------------------------------------------------------------------------


@VARIANTS
def test_forward_and_backward(kind):
    theirs, ours = make(kind), make(kind)
    report = replace_sea_attention(ours)
    assert all_swapped(ours)
    assert list(report) == ["stages.0", "stages.1"]
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-11)
    # PyTorch's own backward of hardsigmoid is in float32 at best.
    tolerance = 1e-6 if "Hardsigmoid" in kind.__name__ else 1e-11
    for mode in (False, True):
        assert_equal(results(ours, training=mode), results(theirs, training=mode), tolerance)


@VARIANTS
def test_the_operators_run(kind, monkeypatch):
    called = []
    for owner, name in ((ops, "sea_attention"), (training, "forward")):
        function = getattr(owner, name)

        def wrapper(*args, _name=name, _function=function, **kwargs):
            called.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
    model = make(kind)
    replace_sea_attention(model)
    called.clear()
    evaluated(model)
    assert called == ["sea_attention"] * 2
    called.clear()
    model.train()(X)
    assert called == ["forward"] * 2
    restore_sea_attention(model)
    called.clear()
    model(X)
    assert called == []


@VARIANTS
def test_state_dict_and_training_step(kind):
    theirs, ours = make(kind), make(kind)
    before = {name: (id(t), t.clone()) for name, t in ours.state_dict(keep_vars=True).items()}
    replace_sea_attention(ours)
    after = ours.state_dict(keep_vars=True)
    assert list(after) == list(before) == list(theirs.state_dict())
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    parameters = [[name for name, _ in model.named_parameters()] for model in (ours, theirs)]
    assert parameters[0] == parameters[1]
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    tolerance = 1e-6 if "Hardsigmoid" in kind.__name__ else 1e-9
    assert_equal(ours.state_dict(), theirs.state_dict(), tolerance)
    changed = [name for name, (_, value) in before.items() if not torch.equal(after[name], value)]
    assert {name for name, _ in ours.named_parameters()} - set(changed) == set()


@pytest.fixture(scope="module")
def reopened(tmp_path_factory):
    """All variants saved while replaced, and opened in a process without the package."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in eager.VARIANTS:
        model = make(kind)
        replace_sea_attention(model)
        evaluated(model)
        torch.save(model, folder / f"{kind.__name__}.pt")
        (folder / f"{kind.__name__}.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import sys, pickle, pathlib, torch\n"
        "sys.modules['seaattn_kernels'] = None\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "x = torch.load(folder / 'x')\n"
        "for path in folder.glob('*.p*'):\n"
        "    if path.suffix == '.pt':\n"
        "        model = torch.load(path, weights_only=False)\n"
        "    else:\n"
        "        model = pickle.loads(path.read_bytes())\n"
        "    kinds = [type(block) for block in model.stages]\n"
        "    with torch.no_grad():\n"
        "        out = model(x)\n"
        "    extra = [key for block in model.stages for key in vars(block) if 'seaattn' in key]\n"
        "    torch.save((out, [f'{k.__module__}.{k.__name__}' for k in kinds], extra),\n"
        "               path.with_name(path.name + '.out'))\n"
    )
    torch.save(X, folder / "x")
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=folder, timeout=200,
        env={"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return folder


@VARIANTS
@pytest.mark.parametrize("suffix", ["pt", "pickle"])
def test_reopened_without_the_package(kind, suffix, reopened):
    out, kinds, extra = torch.load(reopened / f"{kind.__name__}.{suffix}.out")
    assert kinds == [f"eager_blocks.{kind.__name__}"] * 2
    assert extra == []
    assert torch.equal(out, evaluated(make(kind)))


@VARIANTS
def test_deep_copies_stay_swapped(kind):
    model = make(kind)
    replace_sea_attention(model)
    evaluated(model)
    twin = copy.deepcopy(model)
    assert all_swapped(twin)
    assert [type(block) for block in twin.stages] == [type(block) for block in model.stages]
    expected = evaluated(make(kind))
    torch.testing.assert_close(evaluated(twin), expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=1e-11)
    other = make(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(evaluated(twin), evaluated(other), rtol=0, atol=1e-10)
    assert restore_sea_attention(twin) == ["stages.0", "stages.1"]
    assert all_swapped(model)


@VARIANTS
def test_restore_gives_back_class_and_behaviour(kind):
    model = make(kind).eval()
    before = [(type(m), list(vars(m)), dict(m._modules)) for m in model.modules()]
    expected = evaluated(model)
    replace_sea_attention(model)
    evaluated(model)
    assert restore_sea_attention(model) == ["stages.0", "stages.1"]
    assert [(type(m), list(vars(m)), dict(m._modules)) for m in model.modules()] == before
    assert torch.equal(evaluated(model), expected)
    assert restore_sea_attention(model) == []


@pytest.mark.slow
@VARIANTS
@pytest.mark.parametrize("training", [False, True])
def test_verified_on_real_maps_in_float32(kind, training):
    model = make(kind, torch.float32).train(training)
    report = replace_sea_attention(model, verify=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.set_grad_enabled(training):
            model(X.float())
    assert all_swapped(model)
    for row in report.values():
        assert len(row.verdicts) == 1 + training
        for verdict in row.verdicts.values():
            assert verdict.ok
            assert 0 < verdict.rms < 1e-2


# --- what stays eager ------------------------------------------------------------------------


def _hook(name, method="register_forward_hook"):
    return lambda block: getattr(block.get_submodule(name), method)(lambda *_: None)


def _weight_norm(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(block.to_q.c)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(16, 2, 1, dtype=torch.float64)
        self.up = nn.Conv2d(2, 8, 1, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Gated(nn.Module):
    """A wrapper with the structure of what it wraps and another result."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).tanh()


class Subclassed(torch.Tensor):
    pass


def _set(name, make_value):
    def change(block):
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, make_value(block.get_submodule(name)))

    return change


def _own_forward(block):
    forward = block.forward
    block.forward = lambda x: forward(x) + 1


def _subclassed(block):
    weight = block.to_q.c.weight
    del block.to_q.c.weight
    block.to_q.c.register_buffer("weight", weight.detach().as_subclass(Subclassed))


def _uncopyable(block):
    block.last = block.to_q.c.weight * 2


REFUSED_CLASSES = {
    eager.Strided: "has a layer that Sea_Attention has not: stride_conv",
    eager.Cross: "its forward takes (x, context), not one map",
    eager.Dense: "dwconv is Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
    "bias=False), not depthwise 3x3 of 32 channels",
    eager.Residual: "its forward computes something else",
    eager.NoScale: "its forward computes something else",
    eager.Dropped: "its forward computes something else",
    eager.OtherGate: "its forward computes something else",
    eager.Tuple: "its forward returns tuple, not a map like its input",
    eager.SquareOnly: "its own forward fails on a random map of 2x16x5x19: The size of tensor a",
    eager.LayerScale: "has parameters of its own: gamma",
    eager.GELU: "the activation of act is GELU",
    eager.GroupNorm: "to_q is Conv2d and GroupNorm, not a convolution and a batch norm",
}
REFUSED_CHANGES = {
    "to_q carries a forward hook": _hook("to_q"),
    "proj.1.c carries a forward hook": _hook("proj.1.c", "register_forward_pre_hook"),
    "sigmoid.relu carries a backward hook": _hook("sigmoid.relu", "register_full_backward_hook"),
    "act carries a backward hook": _hook("act", "register_full_backward_pre_hook"),
    "to_q.c carries a forward hook": _weight_norm,
    "pwconv.c carries a parametrization": lambda block: torch.nn.utils.parametrizations.weight_norm(
        block.pwconv.c
    ),
    "has a forward of its own in the instance": _own_forward,
    "to_q is Conv2d and BatchNorm2d and Conv2d and Conv2d, not a convolution": _set("to_q", Lora),
    "its forward computes something else": _set("to_v", Gated),
    "its activations differ": _set("act", lambda _: nn.SiLU()),
    "has no act": lambda block: delattr(block, "act"),
    "num_heads is None": lambda block: delattr(block, "num_heads"),
    "to_q.c.weight is a Subclassed": _subclassed,
    "cannot be copied": _uncopyable,
}
REFUSALS = {
    **{kind.__name__: (lambda _: None, kind, why) for kind, why in REFUSED_CLASSES.items()},
    **{why: (change, eager.Sea_Attention, why) for why, change in REFUSED_CHANGES.items()},
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_blocks_stay_eager_with_the_reason(case):
    change, kind, why = REFUSALS[case]
    model = make()
    model.stages[1] = verify.randomise(kind(16).double())
    change(model.stages[1])
    attributes = list(vars(model.stages[1]))
    report = replace_sea_attention(model)
    assert report["stages.0"].backend == "reference"
    row = report["stages.1"]
    assert row.backend is None
    assert row.reason.startswith(why)
    assert row.error is None
    assert type(model.stages[1]) is kind
    assert list(vars(model.stages[1])) == attributes
    text = " ".join(str(report).split())
    assert "1 of them run on seaattn_kernels" in text
    assert "own forward" in text
    assert restore_sea_attention(model) == ["stages.0"]


def test_torchscript_is_refused():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("to_q", "to_k", "to_v", "proj_encode_row"):
                self.add_module(name, nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.proj_encode_row(self.to_q(x) + self.to_k(x) + self.to_v(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(Scripted(), torch.randn(1, 4, 3, 3))
    assert explain(scripted)[""].reason == "is a TorchScript module"


def test_a_class_that_cannot_have_a_subclass_is_refused():
    class Final(eager.Sea_Attention):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("no more of it")

    block = Final(8)
    row = replace_sea_attention(block)[""]
    assert (row.backend, row.reason) == (None, "Final cannot have a subclass: no more of it")
    assert type(block) is Final


# --- the swap --------------------------------------------------------------------------------


def test_the_class_is_an_importable_subclass():
    model = make()
    replace_sea_attention(model)
    kind = type(model.stages[0])
    assert issubclass(kind, eager.Sea_Attention)
    assert getattr(importlib.import_module(kind.__module__), kind.__qualname__) is kind
    assert "forward" not in vars(model.stages[0])
    assert "backend='auto'" in repr(model)
    assert type(model.stages[1]) is kind


def test_two_classes_of_one_name():
    twin = type("Sea_Attention", (eager.Sea_Attention,), {})
    model = make()
    model.stages[1] = twin(16).double()
    replace_sea_attention(model)
    first, second = map(type, model.stages)
    assert first is not second
    assert (first.__mro__[3], second.__mro__[3]) != (second, first)
    for kind in (first, second):
        assert getattr(patch, kind.__name__) is kind
    restore_sea_attention(model)
    assert [type(block) for block in model.stages] == [eager.Sea_Attention, twin]


def test_swapping_twice_is_swapping_once():
    model = make()
    first = replace_sea_attention(model)
    kinds = [type(block) for block in model.stages]
    second = replace_sea_attention(model, backend="reference")
    assert [type(block) for block in model.stages] == kinds
    assert first.keys() == second.keys()
    assert second["stages.0"].error == first["stages.0"].error
    assert "backend='reference'" in repr(model)
    torch.testing.assert_close(evaluated(model), evaluated(make()), rtol=0, atol=1e-11)
    assert restore_sea_attention(model) == ["stages.0", "stages.1"]
    assert [type(block) for block in model.stages] == [eager.Sea_Attention] * 2


def test_a_class_that_somebody_else_changed_after_the_swap_is_not_undone():
    model = make()
    replace_sea_attention(model)
    block = model.stages[1]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"stages.1 became a Sharded after the swap"):
        restore_sea_attention(model)
    assert all_swapped(model)
    torch.testing.assert_close(evaluated(model), evaluated(make()), rtol=0, atol=1e-11)


def test_a_block_alone_and_a_block_used_twice():
    block = verify.randomise(eager.Sea_Attention(16).double()).eval()
    assert list(replace_sea_attention(block)) == [""]
    assert isinstance(block, patch.Swapped)
    assert restore_sea_attention(block) == [""]
    model = make()
    model.stages[1] = model.stages[0]
    assert list(replace_sea_attention(model)) == ["stages.0"]
    assert all_swapped(model)


def test_modules_of_this_package_are_reported_and_left():
    model = nn.Sequential(SeaAttention(8), eager.Sea_Attention(8))
    report = replace_sea_attention(model)
    assert report["0"].backend in ("cpu", "reference")
    assert "a module of this package" in report["0"].reason
    assert report["0"].variant == "BatchNorm2d, relu6, h_sigmoid"
    assert type(model[0]) is SeaAttention
    assert restore_sea_attention(model) == ["1"]
    row = explain(SeaAttention(8, backend="cuda"))[""]
    assert row.backend is None
    assert "neither in eval mode nor in training" in row.reason


def test_explicit_backends():
    model = make(dtype=torch.float32)
    assert replace_sea_attention(model, backend="reference")["stages.0"].backend == "reference"
    restore_sea_attention(model)
    with pytest.raises(RuntimeError, match=r"'cuda' can run stages.0 neither .* no cuda implement"):
        replace_sea_attention(model, backend="cuda")
    assert not any(isinstance(block, patch.Swapped) for block in model.stages)
    with pytest.raises(ValueError, match=r"backend .*'metal'"):
        replace_sea_attention(model, backend="metal")
    replace_sea_attention(model)
    with pytest.raises(RuntimeError, match=r"'cuda' can run stages.0 neither"):
        replace_sea_attention(model, backend="cuda")
    assert "backend='auto'" in repr(model)


def test_bad_arguments():
    for function in (replace_sea_attention, explain):
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
            function("model.pt")


def test_explain_leaves_everything_as_it_was():
    model = make(eager.Detector).train()
    model.stages[0].to_q.eval()
    calls = []
    model.stages[0].register_forward_hook(lambda *_: calls.append("hook"))
    state = {name: (t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    attributes = [list(vars(m)) for m in model.modules()]
    random_state = torch.random.get_rng_state()
    report = explain(model)
    assert [row.backend for row in report.values()] == ["reference"] * 2
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert modes == [m.training for m in model.modules()]
    assert kinds == [type(m) for m in model.modules()]
    assert attributes == [list(vars(m)) for m in model.modules()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, state[name][0])
        assert tensor._version == state[name][1]
        assert tensor.grad is None
    assert calls == []


def test_explain_is_what_replace_does():
    model = make()
    model.stages[1] = eager.Strided(16)
    before = explain(model)
    swapped = replace_sea_attention(model)
    assert [vars(row) for row in before.values()] == [vars(row) for row in swapped.values()]
    assert [vars(row) for row in explain(model).values()] == [vars(row) for row in swapped.values()]


def test_hooks_of_the_block_itself_stay_and_fire():
    model = make()
    seen = []
    model.stages[0].register_forward_hook(lambda m, i, out: seen.append(out.shape))
    model.stages[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    replace_sea_attention(model, verify=True)
    assert all_swapped(model)
    model(X).sum().backward()
    assert seen == [torch.Size([2, 16, 11, 13]), "backward"]
    seen.clear()
    evaluated(model)
    assert seen == [torch.Size([2, 16, 11, 13])]


def test_a_hook_inside_after_the_swap_fires():
    model = make()
    replace_sea_attention(model)
    evaluated(model)
    seen = []
    handle = model.stages[0].dwconv.bn.register_forward_hook(lambda *_: seen.append("bn"))
    torch.testing.assert_close(evaluated(model), evaluated(make()), rtol=0, atol=1e-11)
    assert seen == ["bn"]
    handle.remove()
    evaluated(model)
    assert seen == ["bn"]


def test_a_layer_of_another_class_after_the_swap_runs_the_own_forward():
    theirs, ours = make(eager.Detector), make(eager.Detector)
    replace_sea_attention(ours)
    evaluated(ours)
    for model in (theirs, ours):
        model.stages[0].to_v = Gated(model.stages[0].to_v)
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-11)
    with pytest.raises(patch.Obstacle, match="to_v is Gated, which nothing is known of"):
        ours.stages[0]._seaattn.folds.anatomy(ours.stages[0])
    theirs.stages[1].sigmoid, ours.stages[1].sigmoid = nn.Sigmoid(), nn.Sigmoid()
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-11)


def test_more_arguments_run_the_own_forward():
    class Optional(eager.Sea_Attention):
        def forward(self, x, factor=1.0):
            return factor * super().forward(x)

    theirs = verify.randomise(Optional(16).double()).eval()
    ours = copy.deepcopy(theirs)
    replace_sea_attention(ours)
    assert isinstance(ours, patch.Swapped)
    x = torch.randn(1, 16, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-11)
        assert torch.equal(ours(x, 2.0), theirs(x, 2.0))
        assert torch.equal(ours(x, factor=3.0), theirs(x, factor=3.0))
        assert torch.equal(ours(x=x), theirs(x))


class Own(eager.Sea_Attention):
    """Reads a number of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = 1.0

    def forward(self, x):
        return self.temperature * super().forward(x)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = 3.0

    def forward(self, x):
        return torch.clamp(x + self.shift, 0, 6) / 6


class OwnGate(eager.Sea_Attention):
    gate = Shift


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _give_class(block):
    block.to_q.c.__class__ = Doubled


CHANGES = {
    "number of the block": (Own, lambda b: setattr(b, "temperature", 0.5)),
    "number of the gate": (OwnGate, lambda b: setattr(b.sigmoid, "shift", 2.0)),
    "padding mode": (Own, lambda b: setattr(b.dwconv.c, "padding_mode", "circular")),
    "class of a layer": (Own, _give_class),
    "scale": (Own, lambda b: setattr(b, "scale", 1.0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_a_change_of_anything_read_is_followed(change, training):
    kind, update = CHANGES[change]
    theirs, ours = make(kind), make(kind)
    assert replace_sea_attention(ours)["stages.0"].backend == "reference"
    before = evaluated(ours)
    results(ours)
    results(theirs)
    for model in (theirs, ours):
        for block in model.stages:
            if change == "padding mode":
                block.dwconv.c._reversed_padding_repeated_twice = [1, 1, 1, 1]
            update(block)
    if training:
        assert_equal(results(ours), results(theirs), 1e-10)
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-10)
    assert not torch.equal(evaluated(ours), before)
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(evaluated(twin), evaluated(theirs), rtol=0, atol=1e-10)


def test_a_forward_that_is_patched_later_is_called(monkeypatch):
    theirs, ours = make(Own), make(Own)
    replace_sea_attention(ours)
    evaluated(ours)
    forward = Own.forward
    monkeypatch.setattr(Own, "forward", lambda self, x: 2 * forward(self, x))
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-11)


def test_a_block_copied_by_its_attributes_has_its_own_weights():
    block = verify.randomise(eager.Sea_Attention(16).double()).eval()
    replace_sea_attention(block)
    x = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    twin = type(block).__new__(type(block))
    with torch.no_grad():
        block(x)
        twin.__dict__.update(block.__dict__)
        twin._modules = copy.deepcopy(block._modules)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        expected = eager.Sea_Attention.forward(twin, x)
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-10)
        block._modules = twin._modules
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-10)


def test_bound_methods_outlive_the_swap():
    model = make().eval()
    block = model.stages[0]
    replace_sea_attention(model)
    forward = block.forward
    restore_sea_attention(model)
    x = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    assert torch.equal(forward(x), block(x))
    replace_sea_attention(model)
    block.forward = lambda x: forward(x)
    restore_sea_attention(model)
    assert torch.equal(block(x), eager.Sea_Attention.forward(block, x))


def test_symbolic_tracing_sees_the_own_forward():
    class Plain(eager.Sea_Attention):
        def attend(self, q, k, v, encode):
            n = q.size(2)
            q, k, v = (t.reshape(-1, self.num_heads, c, n) for t, c in ((q, 4), (k, 4), (v, 8)))
            weights = torch.einsum("bhdi,bhdj->bhij", q, k).mul(self.scale).softmax(-1)
            out = torch.einsum("bhij,bhej->bhei", weights, v)
            return encode(out.reshape(-1, self.dh, n, 1)).squeeze(3)

    model = nn.Sequential(verify.randomise(Plain(16).double())).eval()
    replace_sea_attention(model)
    assert isinstance(model[0], patch.Swapped)
    x = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert any("einsum" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), evaluated(model, x), rtol=0, atol=1e-11)


def test_names_that_mean_something_else():
    class Shadowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("attention", eager.Sea_Attention(8))

        @property
        def first(self):
            return nn.Identity()

        def get_submodule(self, target):
            return nn.Identity()

    model = Shadowed()
    assert list(replace_sea_attention(model)) == ["attention"]
    assert isinstance(model.attention, patch.Swapped)
    assert restore_sea_attention(model) == ["attention"]
    assert type(model.attention) is eager.Sea_Attention


class OwnTrain(eager.Sea_Attention):
    def train(self, mode=True, freeze=False):
        super().train(mode)
        if freeze:
            self.to_q.bn.eval()
        return self


def test_methods_of_the_class_keep_their_arguments():
    block = OwnTrain(8)
    replace_sea_attention(block)
    block.train(True, freeze=True)
    assert not block.to_q.bn.training
    assert block.to_k.bn.training


# --- weights that change ---------------------------------------------------------------------

UPDATES = {
    "step": lambda m: torch.optim.SGD(m.parameters(), 0.1, fused=True).step(),
    "load_state_dict": lambda m: m.load_state_dict(
        {name: 1.1 * t for name, t in m.state_dict().items()}
    ),
    "half": lambda m: m.half().double(),
    "train": lambda m: m.train()(X).sum(),
    "new norm": lambda m: setattr(m.stages[0].to_q, "bn", nn.BatchNorm2d(8).double()),
}


@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_followed(update):
    theirs, ours = make(), make()
    replace_sea_attention(ours)
    before = evaluated(ours)
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        UPDATES[update](model)
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=1e-12, atol=1e-11)
    assert not torch.equal(evaluated(ours), before)


def test_refold_after_a_write_through_data():
    theirs, ours = make(), make()
    replace_sea_attention(ours)
    evaluated(ours)
    for model in (theirs, ours):
        model.stages[0].to_v.c.weight.data.mul_(2)
    ours.stages[0].refold()
    torch.testing.assert_close(evaluated(ours), evaluated(theirs), rtol=0, atol=1e-10)


# --- copies and pickles ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_hold_the_original_class(protocol):
    model = make()
    replace_sea_attention(model)
    data = pickle.dumps(model, protocol)
    assert b"seaattn" not in data
    assert b"Swapped" not in data
    opened = pickle.loads(data)
    assert [type(block) for block in opened.stages] == [eager.Sea_Attention] * 2
    assert torch.equal(evaluated(opened), evaluated(make()))
    assert all_swapped(model)


def test_old_torch_files_hold_the_original_class():
    model, buffer = make(), io.BytesIO()
    replace_sea_attention(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, buffer, _use_new_zipfile_serialization=False)
        buffer.seek(0)
        opened = torch.load(buffer, weights_only=False)
    assert torch.equal(evaluated(opened), evaluated(make()))


class OwnCopies(eager.Sea_Attention):
    """A class that says itself how it is copied and pickled."""

    def __getstate__(self):
        return {**self.__dict__, "pickled": True}

    def __deepcopy__(self, memo):
        twin = type(self)(16).to(self.to_q.c.weight.dtype)
        memo[id(self)] = twin
        twin.load_state_dict(self.state_dict())
        twin.copied = True
        return twin


def test_a_class_with_copies_of_its_own():
    model = make(OwnCopies)
    replace_sea_attention(model)
    twin = copy.deepcopy(model)
    assert all_swapped(twin)
    assert twin.stages[0].copied
    torch.testing.assert_close(evaluated(twin), evaluated(model), rtol=0, atol=1e-11)
    restore_sea_attention(twin)
    assert type(twin.stages[0]) is OwnCopies
    opened = pickle.loads(pickle.dumps(model))
    assert type(opened.stages[0]) is OwnCopies
    assert opened.stages[0].pickled
    assert "_seaattn" not in vars(opened.stages[0])


def test_a_new_instance_of_the_class_runs_its_own_forward_until_it_is_swapped():
    model = make()
    replace_sea_attention(model)
    fresh = verify.randomise(type(model.stages[0])(16).double()).eval()
    plain = verify.randomise(eager.Sea_Attention(16).double()).eval()
    x = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    assert torch.equal(fresh(x), plain(x))
    assert "backend" not in fresh.extra_repr()
    assert explain(fresh)[""].backend == "reference"
    replace_sea_attention(fresh)
    assert type(fresh) is type(model.stages[0])
    torch.testing.assert_close(fresh(x), plain(x), rtol=0, atol=1e-11)
    restore_sea_attention(fresh)
    assert type(fresh) is eager.Sea_Attention


class Listed(eager.Sea_Attention):
    def __getstate__(self):
        return [self.__dict__, {"nested": self.__dict__}]

    def __setstate__(self, state):
        super().__setstate__(state[0])


class NewArguments(eager.Sea_Attention):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (16,)


class Reduced(eager.Sea_Attention):
    def __reduce__(self):
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind, attributes):
    block = kind.__new__(kind)
    block.__dict__.update(attributes)
    return block


@pytest.mark.parametrize("kind", [Listed, NewArguments, Reduced])
def test_classes_with_pickles_of_their_own(kind):
    model = make(kind)
    replace_sea_attention(model)
    assert all_swapped(model)
    data = pickle.dumps(model)
    assert b"seaattn_kernels" not in data
    opened = pickle.loads(data)
    assert type(opened.stages[0]) is kind
    assert torch.equal(evaluated(opened), evaluated(make(kind)))
    twin = copy.deepcopy(model)
    assert all_swapped(twin)
    torch.testing.assert_close(evaluated(twin), evaluated(opened), rtol=0, atol=1e-11)


class OwnCopy(eager.Sea_Attention):
    def __copy__(self):
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.copied = True
        return twin


def test_a_shallow_copy_of_its_own():
    block = OwnCopy(8)
    replace_sea_attention(block)
    twin = copy.copy(block)
    assert twin.copied
    assert twin._seaattn is not block._seaattn


def test_shallow_copy():
    model = make()
    replace_sea_attention(model)
    block = model.stages[0].eval()
    twin = copy.copy(block)
    assert type(twin) is type(block)
    assert twin.to_q is block.to_q
    restore_sea_attention(twin)
    assert type(twin) is eager.Sea_Attention
    assert all_swapped(model)


def test_a_block_that_refers_to_itself_is_copied():
    model = make()
    model.stages[0].me = [model.stages[0]]
    replace_sea_attention(model)
    twin = copy.deepcopy(model)
    assert twin.stages[0].me[0] is twin.stages[0]
    assert isinstance(twin.stages[0], patch.Swapped)


def test_replicas_of_data_parallel():
    model = make().eval()
    replace_sea_attention(model)
    expected = evaluated(model)
    replica = _replicate(model, 1.0)
    assert all_swapped(replica)
    assert replica.stages[0]._seaattn is not model.stages[0]._seaattn
    torch.testing.assert_close(evaluated(replica), expected, rtol=0, atol=1e-11)
    doubled, other = _replicate(model, 2.0), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(evaluated(doubled), evaluated(other), rtol=1e-12, atol=1e-9)
    leaf = X.clone().requires_grad_()
    replica.train()(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0


def _replicate(model, factor):
    """What DataParallel does: parameters of a replica are plain attributes."""
    twins = {layer: layer._replicate_for_data_parallel() for layer in model.modules()}
    for layer, twin in twins.items():
        twin._modules = {name: twins[child] for name, child in layer._modules.items()}
        twin._parameters = {}
        for name, parameter in layer._parameters.items():
            setattr(twin, name, None if parameter is None else factor * parameter)
    return twins[model]


def test_torch_script_compiles_the_original():
    model = make()
    replace_sea_attention(model)
    twin = model.stages[0].__prepare_scriptable__()
    assert type(twin) is eager.Sea_Attention
    assert twin.to_q is model.stages[0].to_q
    assert all_swapped(model)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    theirs, ours = make(), make()
    replace_sea_attention(ours)
    compiled = torch.compile(ours.train(training), fullgraph=True, backend="aot_eager")
    if training:
        compiled.train()
        assert_equal(results(compiled), {
            name if name in ("out", "x") else f"_orig_mod.{name}": value
            for name, value in results(theirs).items()
        }, 1e-11)  # fmt: skip
    else:
        torch.testing.assert_close(evaluated(compiled), evaluated(theirs), rtol=0, atol=1e-11)


def test_transforms_of_torch_func():
    theirs, ours = make().eval(), make().eval()
    replace_sea_attention(ours, verify=True)
    expected = torch.func.grad(lambda x: theirs(x).sum())(X)
    found = torch.func.grad(lambda x: ours(x).sum())(X)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_autocast_and_half_precision():
    theirs, ours = make(dtype=torch.float32), make(dtype=torch.float32)
    report = replace_sea_attention(ours, verify=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = evaluated(ours, X.float()), evaluated(theirs, X.float())
    assert found.dtype is expected.dtype is torch.bfloat16
    evaluated(ours.bfloat16(), X.bfloat16())
    names = [name for row in report.values() for name in row.verdicts]
    assert any("autocast bfloat16" in name for name in names)
    assert all(row.backend for row in report.values())


# --- verify=True -----------------------------------------------------------------------------


class OtherWhenLarge(eager.Sea_Attention):
    """The same on the maps of a probe, something else on a larger one."""

    def forward(self, x):
        return super().forward(x) + (1e-3 if x.shape[2] > 30 else 0)


class OtherGradientWhenLarge(eager.Sea_Attention):
    def forward(self, x):
        if x.shape[2] > 30:
            x = x.detach() + 0.9 * (x - x.detach())
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_on_the_real_map_is_refused(dtype):
    theirs, ours = make(OtherWhenLarge, dtype), make(OtherWhenLarge, dtype)
    report = replace_sea_attention(ours, verify=True)
    small, large = X.to(dtype), torch.randn(1, 3, 70, 20).to(dtype)
    evaluated(ours, small)
    assert all_swapped(ours)
    with pytest.warns(UserWarning, match=r"stages.\d runs its own forward again: the output"):
        found = evaluated(ours, large)
    assert torch.equal(found, evaluated(theirs, large))
    assert [type(block) for block in ours.stages] == [OtherWhenLarge] * 2
    row = report["stages.0"]
    assert row.backend is None
    assert "missed the error budget: rms" in row.reason
    assert "1x16x35x10" in row.reason
    assert any(not verdict.ok for verdict in row.verdicts.values())
    assert "missed the error" in " ".join(str(report).split())


def test_a_difference_of_gradients_is_refused_in_training():
    theirs, ours = make(OtherGradientWhenLarge), make(OtherGradientWhenLarge)
    report = replace_sea_attention(ours, verify=True)
    large = torch.randn(1, 3, 70, 20, dtype=torch.float64)
    evaluated(ours, large)
    assert all_swapped(ours)
    with pytest.warns(UserWarning, match=r"gradients of 1x16x35x10 cpu float64 training"):
        found = results(ours, large)
    assert_equal(found, results(theirs, large), 0)
    assert report["stages.1"].backend is None


def test_verification_happens_once_a_kind_of_call_and_moves_nothing():
    theirs, ours = make(dtype=torch.float32), make(dtype=torch.float32)
    report = replace_sea_attention(ours, verify=True)
    state = torch.random.get_rng_state()
    for model in (theirs, ours):
        model.train()
        for _ in range(2):
            model(X.float())
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert ours.stages[0].to_q.bn.num_batches_tracked == 2
    assert len(report["stages.0"].verdicts) == 2
    evaluated(ours, X.float())
    evaluated(ours, X[:1].float())
    assert len(report["stages.0"].verdicts) == 4
    ours(torch.empty(0, 3, 21, 26))
    assert len(report["stages.0"].verdicts) == 4
    assert "(eager" in str(report)
    twin = copy.deepcopy(ours)
    evaluated(twin, X[:, :, :9].float())
    assert len(report["stages.0"].verdicts) == 4


# --- more of verify=True ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_verified_within_a_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    theirs, ours = make(dtype=torch.float32).train(), make(dtype=torch.float32).train()
    report = replace_sea_attention(ours, verify=True)
    x = torch.randn(2, 16, 7, 9, requires_grad=True)
    for model in (theirs, ours):
        checkpoint(model.stages[0], x, use_reentrant=reentrant).sum().backward()
    assert report["stages.0"].verdicts
    assert ours.stages[0].to_q.c.weight.grad is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_learned_where_eager_is_not_finite(value):
    model = make(dtype=torch.float32)
    report = replace_sea_attention(model, verify=True)
    x = X.float()
    x[0, 0, 3, 3] = value
    assert evaluated(model, x).isnan().any()
    assert all_swapped(model)
    assert report["stages.0"].verdicts == {}


def test_what_cannot_be_compared_runs_its_own_forward():
    theirs, ours = make(), make()
    report = replace_sea_attention(ours, verify=True)
    changed = {name: 1.1 * p for name, p in theirs.named_parameters()}
    found, expected = (
        torch.func.functional_call(model.eval(), changed, X) for model in (ours, theirs)
    )
    assert torch.equal(found, expected)
    row = report["stages.0"]
    assert "2x16x11x13 cpu float64 eval with gradients could not be compared" in row.reason
    assert row.backend == "reference"
    assert all_swapped(ours)


def test_an_explicit_backend_that_cannot_run_raises_while_it_is_verified(monkeypatch):
    model = make(dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    replace_sea_attention(model, backend="triton", verify=True)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="sea_attention: backend 'triton' needs a GPU"):
        evaluated(model, X.float())
    assert all_swapped(model)


def test_a_warning_that_is_an_error_leaves_the_own_forward():
    theirs, ours = make(OtherWhenLarge), make(OtherWhenLarge)
    replace_sea_attention(ours, verify=True)
    large = torch.randn(1, 3, 70, 20, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="runs its own forward again"):
                evaluated(ours, large)
    assert torch.equal(evaluated(ours, large), evaluated(theirs, large))


def test_report_says_why_auto_falls_back(monkeypatch):
    monkeypatch.setattr(ops, "_AUTO", "cuda")
    monkeypatch.setattr(native, "CUDA_REASON", "csrc/cuda is not compiled")
    row = explain(make(dtype=torch.float32))["stages.0"]
    assert row.backend == "reference"
    assert row.reason == "csrc/cuda is not compiled"
