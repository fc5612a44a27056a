"""Whole models under torch.compile: one graph, and no compilation for each size."""

import copy
from functools import partial

import eager_blocks as eager
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from seaattn_kernels import replace_sea_attention, verify
from seaattn_kernels.seaformer import seaformer, seaformer_segmenter

#: The first size is compiled as it is, the second with free sizes, which all others share. An axis
#: of one pixel, 64 of the image, would be a case of its own.
SIZES = ((128, 192), (192, 256), (256, 128), (140, 202), (320, 130))


def replaced(kind, backend):
    model = verify.randomise(eager.Model(kind))
    replace_sea_attention(model, backend)
    return model


MODELS = {
    "classifier": partial(seaformer, "t", 10),
    "segmenter": partial(seaformer_segmenter, "t", 10),
    "replaced": partial(replaced, eager.Segmentation),
    "replaced copy": partial(replaced, eager.ShortKeys),
}


def counted(model, **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)
    return compiled, lambda: sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", MODELS)
def test_sizes_past_the_second_are_not_compiled(library, kind, backend):
    model = verify.randomise(MODELS[kind](backend=backend)).eval()
    compiled, graphs = counted(model)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    assert graphs() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t", "s", "b", "l"])
def test_every_variant_is_one_graph(library, variant):
    model = verify.randomise(seaformer_segmenter(variant, 10)).eval()
    compiled, graphs = counted(model, dynamic=True)
    with torch.no_grad():
        for size in SIZES[:3]:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    assert graphs() == 1


@pytest.mark.slow
def test_training_steps_of_many_sizes(library):
    model = verify.randomise(seaformer_segmenter("t", 10)).train()
    for layer in model.modules():
        if hasattr(layer, "probability"):
            layer.probability = 0.0
    model.decode_head.dropout.p = 0.0
    twin = copy.deepcopy(model)
    compiled, graphs = counted(model)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        found, expected = compiled(x), twin(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        found.square().mean().backward()
        expected.square().mean().backward()
    assert graphs() <= 2
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
        assert error < 1e-2


@pytest.mark.slow
def test_inductor_and_reduce_overhead(library):
    """On a CPU the mode that records CUDA graphs falls back to none; a GPU has its own test."""
    torch._dynamo.reset()
    model = verify.randomise(seaformer("t", 10)).eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
