"""What leaves PyTorch: ONNX of standard operators, and exported programs that keep ours."""

import io
import logging
import zipfile
from collections import Counter

import eager_blocks
import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, ops, replace_sea_attention, verify

#: Batch and size of a map may change.
FREE = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


def models(backend):
    """The block as a module, and a replaced model."""
    block = verify.randomise(SeaAttention(16, 4, 2, backend=backend)).eval()
    replaced = verify.randomise(eager_blocks.Model(eager_blocks.TrueSigmoid)).eval()
    replace_sea_attention(replaced, backend=backend)
    return {"module": nn.Sequential(nn.Conv2d(3, 16, 1), block).eval(), "replaced": replaced}


@pytest.mark.parametrize("kind", ["module", "replaced"])
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("auto", False),
        pytest.param("auto", True, marks=pytest.mark.slow),
        pytest.param("reference", False, marks=pytest.mark.slow),
        ("cpu", True),
    ],
)
def test_onnx_has_standard_operators_alone(library, kind, backend, dynamic):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = models(backend)[kind]
    example = torch.randn(2, 3, 14, 17)
    program = torch.onnx.export(
        model, (example,), dynamo=True, opset_version=18, verbose=False,
        dynamic_shapes=FREE if dynamic else None,
    )  # fmt: skip
    file = io.BytesIO()
    program.save(file)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert Counter(node.domain for node in graph.node).keys() == {""}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 14, 17), (1, 3, 30, 9), (3, 3, 7, 40))[: 3 if dynamic else 1]:
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_an_exported_program_keeps_the_fused_operator(library):
    model = models("cpu")["module"].requires_grad_(False)
    x = torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert "seaattn_kernels.sea_attention.cpu" in str(program.graph)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["module", "replaced"])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_trace_has_standard_operators_alone(library, kind, backend):
    model = models(backend)[kind]
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 3, 14, 17))
        assert "seaattn_kernels::" not in str(traced.inlined_graph)
        for shape in ((2, 3, 14, 17), (1, 3, 30, 9)):
            x = torch.randn(shape)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "replaced"])
def test_aot_inductor_keeps_the_fused_operator(library, kind, tmp_path):
    model = models("cpu")[kind].requires_grad_(False)
    x = torch.randn(2, 3, 18, 24)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=FREE)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        package = zipfile.ZipFile(path)
        sources = [package.read(name) for name in package.namelist() if name.endswith(".cpp")]
        fused = sum(text.count(b"seaattn_kernels::sea_attention") > 0 for text in sources)
        fused += sum(
            b"seaattn_kernels::sea_attention" in package.read(name)
            for name in package.namelist()
            if name.endswith(".json")
        )
        assert fused
        loaded = torch._inductor.aoti_load_package(path)
        for shape in ((2, 3, 18, 24), (1, 3, 31, 40)):
            x = torch.randn(shape)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_openvino_takes_the_onnx_file(library, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model = models("auto")["replaced"]
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 14, 17),), dynamo=True, opset_version=18, verbose=False,
        dynamic_shapes=FREE,
    )  # fmt: skip
    program.save(str(tmp_path / "model.onnx"))
    converted = openvino.convert_model(tmp_path / "model.onnx")
    openvino.save_model(converted, tmp_path / "model.xml", compress_to_fp16=False)
    # Without the hint it computes in half precision where the machine can.
    compiled = openvino.compile_model(
        tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for shape in ((2, 3, 14, 17), (1, 3, 40, 33)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x)
        found = torch.from_numpy(compiled(x.numpy())[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_after_an_export_the_operators_run_again(library, monkeypatch):
    pytest.importorskip("onnxscript")
    block = verify.randomise(SeaAttention(16, 4, 2)).eval()
    x = torch.randn(1, 16, 8, 8)
    torch.onnx.export(block, (x,), dynamo=True, opset_version=18, verbose=False)
    called = []
    original = ops.sea_attention
    monkeypatch.setattr(ops, "sea_attention", lambda *a: called.append(1) or original(*a))
    with torch.no_grad():
        block(x)
    assert called
