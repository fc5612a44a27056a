"""Graphs for inference: what is refused, and what torch is asked for. A GPU shows the rest."""

import pytest
import torch
from torch import nn

from seaattn_kernels import graphed, graphs


@pytest.mark.parametrize("example", [torch.ones(1), [torch.ones(1)], [3], (None,)])
def test_examples_are_cuda_tensors(example):
    with pytest.raises(ValueError, match="graphed needs CUDA tensors as example, got"):
        graphed(nn.Identity(), example)


@pytest.fixture
def asked(monkeypatch):
    """Calls of ``make_graphed_callables`` on a CPU tensor that says it is on a GPU."""
    calls = []

    class OnGPU(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    class Device:
        def __init__(self, device):
            assert device == torch.device("cuda", 0)

        def __enter__(self):
            calls.append("device")

        def __exit__(self, *error):
            calls.append("back")

    def make(function, inputs):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_cache_enabled()
        assert not isinstance(function, nn.Module)
        calls.append(inputs)
        return function

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return calls, torch.randn(2, 3).as_subclass(OnGPU)


def test_captures_a_function_without_gradients(asked):
    calls, x = asked
    model = nn.Linear(3, 4).eval()
    forward = model.forward
    call = graphed(model, x)
    assert [calls[0], calls[2]] == ["device", "back"]
    (static,) = calls[1]
    assert torch.equal(static, x)
    assert static.data_ptr() != x.data_ptr()
    assert model.forward == forward
    out = call(x.detach().requires_grad_())
    assert not out.requires_grad
    torch.testing.assert_close(out.as_subclass(torch.Tensor), model(x).as_subclass(torch.Tensor))
    assert torch.is_autocast_cache_enabled()


def test_other_arguments_are_refused(asked):
    _, x = asked
    call = graphed(nn.Identity().eval(), x)
    for wrong in ((x[:1],), (x.double(),), (x, x), ()):
        with pytest.raises(ValueError, match=r"the graph was made for shape \(2, 3\)"):
            call(*wrong)


def test_training_is_refused(asked):
    _, x = asked
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        graphed(nn.Identity(), x)


def test_the_switch_of_autocast_survives_a_failure(asked, monkeypatch):
    _, x = asked

    def fail(*arguments):
        raise RuntimeError("capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(RuntimeError, match="capture"):
        graphs.graphed(nn.Identity().eval(), x)
    assert torch.is_autocast_cache_enabled()
