"""Inference by replaying a CUDA graph: one launch for a whole model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from seaattn_kernels.checks import describe


def graphed(
    model: nn.Module | Callable[..., object], example: Tensor | Sequence[Tensor]
) -> Callable[..., object]:
    """``model`` in inference as a CUDA graph, for the least latency on maps of one size.

    The model runs three times first, which compiles every kernel and folds the weights, and is then
    captured, by ``torch.cuda.make_graphed_callables``. A call copies its arguments into the graph's
    own and replays it.

    Args:
        model: a module in eval mode, or a function; it must not wait for the GPU.
        example: the arguments of a call, one CUDA tensor or several. Their shapes, strides, dtypes
            and device are those of every call; their values do not matter.

    Returns:
        A function of such arguments. It returns the same tensors every time, which the next call
        overwrites: clone what is to be kept. There are no gradients. The graph holds the weights
        that it was captured with: call ``graphed`` again after an update. Not for several threads
        at once.

    Raises:
        ValueError: where an argument is no CUDA tensor, or not like the example.
        RuntimeError: for a module in training mode, and where the capture fails.
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    for tensor in examples:
        if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
            raise ValueError(f"graphed needs CUDA tensors as example, got {describe(tensor)}")
    if isinstance(model, nn.Module) and model.training:
        raise RuntimeError("graphed is for inference: call model.eval() first")
    # A function, so that torch leaves the module's own forward as it is.
    inputs = tuple(tensor.detach().clone() for tensor in examples)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), torch.cuda.device(inputs[0].device):
            replay = torch.cuda.make_graphed_callables(lambda *tensors: model(*tensors), inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]

    def call(*tensors: Tensor) -> object:
        if [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors] != kinds:
            given, wanted = (", ".join(map(describe, found)) for found in (tensors, inputs))
            raise ValueError(f"the graph was made for {wanted}, got {given}")
        with torch.no_grad():
            return replay(*tensors)

    return call
