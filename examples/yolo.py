"""A YOLO detector with Sea_Attention before its head: build, train, validate, export, compare.

    pip install ultralytics onnx onnxruntime
    python examples/yolo.py --data coco8.yaml

No source file of Ultralytics is edited. The model is one of theirs, read from the installed
package, with attention between its neck and its head.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import yaml
from ultralytics import YOLO

from seaattn_kernels import explain
from seaattn_kernels.integrations.ultralytics import register, with_attention


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="coco8.yaml", help="default: %(default)s")
    parser.add_argument("--model", default="yolov8n.yaml", help="default: %(default)s")
    parser.add_argument("--levels", nargs="+", default=["P5"], help="default: P5")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--imgsz", type=int, default=640, help="default: %(default)s")
    parser.add_argument("--device", help="as Ultralytics has it: cpu, 0, 0,1")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/attention"), help="default: %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)

    # After this a YAML may say [-1, 1, SeaAttention, []].
    register()
    config = with_attention(args.model, args.levels)
    path = args.out / f"{Path(args.model).stem}-attention.yaml"
    path.write_text(yaml.safe_dump({**config, "yaml_file": path.name}))
    model = YOLO(path)
    print(explain(model.model))

    model.train(
        data=args.data, epochs=args.epochs, imgsz=args.imgsz, device=args.device,
        project=str(args.out.resolve()), name="train", exist_ok=True,
    )  # fmt: skip

    # The checkpoint opens wherever this package is installed; training on from it needs register().
    model = YOLO(model.trainer.best)
    print(model.val(data=args.data, imgsz=args.imgsz, device=args.device).results_dict)

    # To ONNX go the layers of the blocks: standard operators, for any runtime.
    exported = model.export(format="onnx", imgsz=args.imgsz, opset=18, simplify=False)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, args.imgsz, args.imgsz)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model.model.cpu().float().eval()(x)[0].numpy()
    print(f"ONNX Runtime differs by {np.abs(found - expected).max():.1e} of {expected.max():.0f}")


if __name__ == "__main__":
    main()
