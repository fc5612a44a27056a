"""What the block is held against on a CPU beside plain PyTorch: compilers and other runtimes.

Candidates of :func:`bench.timing.check`. Each is made for maps of one shape by its first
``bind``, with as many threads as torch has then, and given its memory ahead of time.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from bench.eager import as_eager

_OPSET = 18
#: What each runtime needs.
PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}

_Bound = tuple[Tensor, Tensor, Callable[[], object]]


def refusal(runtime: str) -> str | None:
    """The packages that ``runtime`` lacks, or None."""
    missing = [name for name in PACKAGES[runtime] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Freezing:
    """The eager block under torch.compile, its weights constants."""

    def __init__(self, model: nn.Module) -> None:
        # A function of its own: the compiled code of a module serves every module of its class.
        def frozen(x: Tensor) -> Tensor:
            return model(x)

        self._call = torch.compile(frozen, dynamic=False)

    def bind(self, x: Tensor) -> Tensor:
        import torch._inductor.config as inductor

        # Tracing reads the switch too, so it cannot be an option of torch.compile.
        with inductor.patch(freezing=True):
            self._call(x)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)


@lru_cache(maxsize=1)  # the block that is being measured, for each runtime and number of threads
def exported(block: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The eager block as ONNX, for float32 maps of one shape."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file = io.BytesIO()
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own calls
        program = torch.onnx.export(
            as_eager(block), (torch.zeros(shape),),
            dynamo=True, opset_version=_OPSET, verbose=False,
        )  # fmt: skip
        program.save(file)
    return file.getvalue()


class _Exported:
    """The eager block in another runtime."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._loaded = None

    def bind(self, x: Tensor) -> _Bound:
        if self._loaded is None:
            self._loaded = self._load(exported(self._block, tuple(x.shape)))
            self._shape = as_eager(self._block).to("meta")(x.to("meta")).shape
        out = x.new_empty(self._shape)
        return x, out, self._connect(x, out)

    def __call__(self, bound: _Bound) -> Tensor:
        _, out, run = bound
        run()
        return out


class OnnxRuntime(_Exported):
    def _load(self, model: bytes):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _connect(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        session, binding = self._loaded, self._loaded.io_binding()
        for bind, (value,), tensor in (
            (binding.bind_input, session.get_inputs(), x),
            (binding.bind_output, session.get_outputs(), out),
        ):
            bind(value.name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        return lambda: session.run_with_iobinding(binding)


class OpenVino(_Exported):
    def _load(self, model: bytes):
        import openvino

        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Processors with bfloat16 products would take those.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return core.compile_model(core.read_model(model), "CPU", settings)

    def _connect(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        import openvino

        request = self._loaded.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))
        return request.infer
