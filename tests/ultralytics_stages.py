"""What a user of Ultralytics does with a model that has attention, a process for each stage.

    python tests/ultralytics_stages.py STAGE FOLDER

Beside a torch without CUDA, torchvision's own operators are missing: their schemas stand in for
them, and Ultralytics uses its own suppression of boxes.
"""
# ruff: noqa: E402
# Settings and schemas must be there before the imports.

import copy
import os
import runpy
import shutil
import sys
import types
from pathlib import Path

os.environ |= {"YOLO_AUTOINSTALL": "False", "YOLO_OFFLINE": "True"}

import numpy as np
import pytest
import torch

_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision
import yaml
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import ASSETS, dist
from ultralytics.utils.nms import TorchNMS

from seaattn_kernels import SeaAttention, explain, replace_sea_attention, verify
from seaattn_kernels.integrations import ultralytics as integration

torchvision.ops.nms = TorchNMS.nms
SIZE = 64


def _data(folder: Path) -> Path:
    """The photographs that come with the package, with boxes somewhere."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for picture in ASSETS.glob("*.jpg"):
        shutil.copy(picture, folder / "images")
        (folder / "labels" / f"{picture.stem}.txt").write_text(
            "0 0.5 0.5 0.4 0.6\n1 0.3 0.4 0.2 0.3\n"
        )
    path = folder / "data.yaml"
    content = {"path": str(folder), "train": "images", "val": "images", "names": ["bus", "person"]}
    path.write_text(yaml.safe_dump(content))
    return path


def _model(folder: Path) -> Path:
    config = integration.with_attention("yolov8n.yaml", ("P4", "P5"), [512, 16, 4, 2, "relu"])
    path = folder / "yolov8n-attention.yaml"
    path.write_text(yaml.safe_dump({**config, "nc": 2, "yaml_file": path.name}))
    return path


def _train(folder: Path, **more: object) -> YOLO:
    model = YOLO(_model(folder))
    model.train(
        data=_data(folder), imgsz=SIZE, batch=2, device="cpu", workers=0, plots=False,
        project=str(folder / "runs"), name="run", exist_ok=True, verbose=False, **more,
    )  # fmt: skip
    return model


def _boxes(model: YOLO) -> np.ndarray:
    (found,) = model.predict(ASSETS / "bus.jpg", imgsz=SIZE, conf=1e-3, device="cpu", verbose=False)
    return found.boxes.data.numpy()


def _attention(model: YOLO) -> list[SeaAttention]:
    return [layer for layer in model.model.modules() if isinstance(layer, SeaAttention)]


def register(folder: Path) -> None:
    before = tasks.parse_model, dist.generate_ddp_file
    integration.register()
    integration.register()
    assert tasks.parse_model is not before[0]
    for name in integration.NAMES:
        config = integration.with_attention("yolov8s.yaml", ("P3", "P4", "P5"))
        for row in (*config["backbone"], *config["head"]):
            row[2] = name if row[2] in integration.NAMES else row[2]
        model = tasks.DetectionModel(config, verbose=False)
        blocks = [layer for layer in model.modules() if isinstance(layer, SeaAttention)]
        # The real channels of a width of one half.
        assert [block.to_q.c.in_channels for block in blocks] == [128, 256, 512]
        assert model.stride.tolist() == [8, 16, 32]
    plain = tasks.DetectionModel("yolov8s.yaml", verbose=False)
    x = torch.randn(1, 3, SIZE, SIZE)
    for layer in blocks:
        assert layer(torch.randn(1, layer.to_q.c.in_channels, 4, 4)).shape[2:] == (4, 4)
    assert [t.shape for t in model.train()(x)["feats"]] == [
        t.shape for t in plain.train()(x)["feats"]
    ]
    with torch.no_grad():
        average = copy.deepcopy(verify.randomise(model)).eval()
        expected = average(x)[0]
        torch.testing.assert_close(model.eval()(x)[0], expected)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)[0]
    error = (mixed - expected).norm() / expected.norm()
    assert error < 0.05, error
    with pytest.raises(ValueError, match="has no P6, but P3, P4, P5"):
        integration.with_attention("yolov8n.yaml", ("P6",))
    with pytest.raises(ValueError, match="no head that reads several maps"):
        integration.with_attention("yolov8n-cls.yaml")
    for name, level, channels, stride in (
        ("yolov8n-p2.yaml", "P5", 256, 32), ("yolov3-tiny.yaml", "P4", 256, 16),
        ("yolov8n-seg.yaml", "P3", 64, 8),
    ):  # fmt: skip
        config = integration.with_attention(name, (level,))
        whole = tasks.DetectionModel(config, verbose=False)
        (block,) = (layer for layer in whole.modules() if isinstance(layer, SeaAttention))
        seen = []
        block.register_forward_hook(lambda block, x, out, seen=seen: seen.append(out.shape[1:3]))
        whole(x)
        assert seen == [(channels, SIZE // stride)], (name, seen)
    integration.unregister()
    integration.unregister()
    assert (tasks.parse_model, dist.generate_ddp_file) == before
    assert not hasattr(tasks, "SeaAttention")
    assert explain(model)


def train(folder: Path) -> None:
    integration.register()
    model = _train(folder, epochs=2)
    assert len(_attention(model)) == 2
    np.save(folder / "boxes.npy", _boxes(model))


def reopen(folder: Path) -> None:
    """In a process that only registers."""
    integration.register()
    weights = folder / "runs" / "run" / "weights" / "best.pt"
    model = YOLO(weights)
    blocks = _attention(model)
    assert len(blocks) == 2
    assert blocks[0].to_q.bn.eps == 1e-3, "Ultralytics has an eps of its own"
    report = replace_sea_attention(model.model)
    assert all("seaattn_kernels" in str(report) for _ in report)
    boxes = _boxes(model)
    np.testing.assert_allclose(boxes, np.load(folder / "boxes.npy"), rtol=1e-4, atol=1e-3)
    fused = YOLO(weights)
    verify.randomise(fused.model)
    x = torch.rand(1, 3, SIZE, SIZE)
    plain = YOLO(weights)
    plain.model.load_state_dict(fused.model.state_dict())
    with torch.no_grad():
        expected = plain.model.eval()(x)[0]
        found = fused.model.eval().fuse(verbose=False)(x)[0]
    assert all(hasattr(block.to_q, "bn") for block in _attention(fused)), "ours fold themselves"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def export(folder: Path) -> None:
    import onnx
    import onnxruntime

    integration.register()
    weights = folder / "runs" / "run" / "weights" / "best.pt"
    path = YOLO(weights).export(
        format="onnx", imgsz=SIZE, opset=18, simplify=False, device="cpu", verbose=False
    )
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert sum(node.op_type == "Softmax" for node in nodes) >= 4
    model, x = YOLO(weights).model.eval().fuse(verbose=False), torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(x)[0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-2)
    path = YOLO(weights).export(format="torchscript", imgsz=SIZE, device="cpu", verbose=False)
    traced = torch.jit.load(path)
    assert "seaattn_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected, rtol=1e-3, atol=1e-2)
    folder = YOLO(weights).export(format="openvino", imgsz=SIZE, device="cpu", verbose=False)
    openvino = pytest.importorskip("openvino")
    (file,) = Path(folder).glob("*.xml")
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(x.numpy())[0])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)


def stop(folder: Path) -> None:
    """A training run that is stopped after its first epoch."""
    integration.register()
    model = YOLO(_model(folder))

    def end(trainer) -> None:
        trainer.save_model()
        os._exit(0)

    model.add_callback("on_fit_epoch_end", end)
    model.train(
        data=_data(folder), imgsz=SIZE, batch=2, device="cpu", workers=0, plots=False, epochs=2,
        project=str(folder / "runs"), name="run", exist_ok=True, verbose=False,
    )  # fmt: skip


def resume(folder: Path) -> None:
    integration.register()
    model = YOLO(folder / "runs" / "run" / "weights" / "last.pt")
    seen = []
    model.add_callback("on_train_epoch_end", lambda trainer: seen.append(trainer.epoch))
    model.train(resume=True)
    assert seen == [1], seen
    assert len(_attention(model)) == 2


def ddp(folder: Path) -> None:
    """The file that a process of DDP runs builds the model by name."""
    from types import SimpleNamespace

    text = 'state = 1\nif __name__ == "__main__":\n    from ultralytics.nn import tasks\n'
    text += "    assert tasks.SeaAttention\n    print('registered')\n"
    path = folder / "process.py"

    def generate(trainer) -> str:
        path.write_text(text)
        return str(path)

    dist.generate_ddp_file = generate
    integration.register()
    assert dist.generate_ddp_file(SimpleNamespace()) == str(path)
    assert dist.generate_ddp_file is not generate


def script(folder: Path) -> None:
    """A file of a user's, ``script.py``."""
    runpy.run_path(str(folder / "script.py"), run_name="__main__")


def example(folder: Path) -> None:
    """The example, on the photographs."""
    sys.argv = [
        "yolo.py", "--data", str(_data(folder)), "--levels", "P4", "P5", "--epochs", "1",
        "--imgsz", str(SIZE), "--device", "cpu", "--out", str(folder / "out"),
    ]  # fmt: skip
    path = Path(__file__).parents[1] / "examples" / "yolo.py"
    runpy.run_path(str(path), run_name="__main__")
    (table,) = (folder / "out" / "train").glob("results.csv")
    assert len(table.read_text().splitlines()) == 2


def edited(folder: Path) -> None:
    """A checkpoint of a hand-edited copy: the class was in a file of Ultralytics."""
    import eager_blocks
    import ultralytics.nn.modules as modules

    from seaattn_kernels.migrate import migrate

    class Edited(eager_blocks.Sea_Attention):
        def __init__(self, channels, source, dim=None, *arguments):
            super().__init__(channels[source], *arguments[:3])

    copies = types.ModuleType("ultralytics.nn.modules.sea")
    names = {"Conv2d_BN": eager_blocks.Conv2d_BN, "h_sigmoid": eager_blocks.h_sigmoid}
    names |= {"SqueezeAxialPositionalEmbedding": eager_blocks.SqueezeAxialPositionalEmbedding}
    for name, kind in {**names, "Sea_Attention": Edited}.items():
        kind.__module__, kind.__qualname__ = copies.__name__, name
        setattr(copies, name, kind)
    sys.modules[copies.__name__] = modules.sea = copies
    # A parser that knows the class, as the edited one did.
    integration.register()
    tasks.Sea_Attention = tasks.SeaAttention = Edited
    model = YOLO(_model(folder))
    blocks = [layer for layer in model.model.modules() if type(layer) is Edited]
    assert len(blocks) == 2
    verify.randomise(model.model).eval()
    x = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model.model(x)[0]
    torch.save({"model": model.model, "ema": None, "train_args": {}}, folder / "edited.pt")
    integration.unregister()
    del sys.modules[copies.__name__], modules.sea
    opened = migrate(folder / "edited.pt", folder / "migrated.pt")
    assert [block.reason for block in opened.blocks] == [None, None]
    integration.register()
    model = YOLO(folder / "migrated.pt")
    assert len(_attention(model)) == 2
    with torch.no_grad():
        torch.testing.assert_close(model.model.eval()(x)[0], expected, rtol=1e-3, atol=1e-2)
    _boxes(model)


def compiled(folder: Path) -> None:
    """One graph up to their decoding of boxes, which is many for each size, as without us."""
    from torch._dynamo.testing import CompileCounterWithBackend

    integration.register()
    attended = integration.with_attention("yolov8n.yaml", ("P4", "P5"))

    def graphs(config: dict | str, decode: bool) -> list[int]:
        """So many there are after each size."""
        model = verify.randomise(tasks.DetectionModel(config, verbose=False)).eval()
        model.model[-1].training = not decode  # the head's: maps come out
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        found = torch.compile(model, fullgraph=not decode, backend=counter)
        counts = []
        for size in ((64, 96), (96, 128), (128, 64), (160, 192)):
            x = torch.rand(2, 3, *size)
            with torch.no_grad():
                ours, theirs = found(x), model(x)
            key = 0 if decode else "boxes"
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-2)
            counts.append(len(counter.graphs))
        return counts

    assert graphs(attended, decode=False) == [1, 2, 2, 2]
    found, plain = (np.diff(graphs(config, decode=True)) for config in (attended, "yolov8n.yaml"))
    # From the second size on both go by sizes of their own.
    assert found[1:].tolist() == plain[1:].tolist(), (found, plain)


def explained(folder: Path) -> None:
    """The tables of a model that has blocks, of models that have none, and of unknown copies."""
    import eager_blocks

    integration.register()
    config = integration.with_attention("yolov8n.yaml", ("P3", "P5"))
    print(explain(tasks.DetectionModel(config, verbose=False)))
    print(explain(tasks.DetectionModel("yolov8n.yaml", verbose=False)))
    print(explain(torchvision.models.resnet18(weights=None)))
    print(explain(eager_blocks.Model(eager_blocks.Strided)))


if __name__ == "__main__":
    stages = {
        f.__name__: f
        for f in (
            register, train, reopen, export, stop, resume, ddp, script, example, edited, compiled,
            explained,
        )
    }  # fmt: skip
    stages[sys.argv[1]](Path(sys.argv[2]))
