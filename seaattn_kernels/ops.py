"""The operators: public functions, FLOP formulas and the choice of a backend.

Every public function checks its arguments, settles the backend, and calls one registered overload
(:mod:`seaattn_kernels.overloads`).

Common to all: tensors share one device and one dtype out of float16, bfloat16, float32, float64
(``TypeError`` and ``ValueError`` name the argument otherwise); float64 runs on the reference only;
an empty batch gives an empty result; inputs are never modified and never aliased. A result of map
shape is channels_last where the first map is that and not also contiguous, contiguous otherwise.
Under autocast the attentions and the block cast to its dtype, the other operators promote.
"""

import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seaattn_kernels import native, reference
from seaattn_kernels.checks import (
    activation_code,
    autocast_dtype,
    autocast_off,
    check_divides,
    check_input,
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    describe,
    unify,
)
from seaattn_kernels.crossover import EXACT_FLOAT32_FLOPS
from seaattn_kernels.overloads import OPERATORS, OVERLOADS, REFERENCE, STAGES

BACKENDS = ("auto", "reference", "triton", "cpu", "cuda")

#: D and E of the widest heads whose tiles fit into the registers of a GPU.
WIDEST_HEAD = (64, 128)
#: What "auto" stands for; "auto" here means the best backend of the tensor's device.
_AUTO = os.environ.get("SEAATTN_BACKEND") or "auto"

# --- FLOP formulas: two for a multiply-add of a matrix product, the rest is free, as in torch ---


def _flops_free(*args, **kwargs) -> int:
    return 0


def _flops_axial_attention(q, k, v, heads, *args, **kwargs) -> int:
    b, keys, n = q
    return 2 * b * n * n * (keys + v[1])


def _flops_axial_attention_pair(
    row, column, rq, rk, cq, ck, heads, key_dim, *args, **kwargs
) -> int:
    b, projected, h = row
    width = projected - heads * key_dim
    return 2 * b * width * (h * h + column[2] ** 2)


def _flops_axial_attention_pair_backward(row_gradient, column_gradient, *rest, **kwargs) -> int:
    """Five products, as torch counts them: of scores, of dp, and those of dq, dk and dv."""
    b, values, h = row_gradient
    keys = (rest[0][1] - values) // 2
    return 2 * b * (3 * keys + 2 * values) * (h * h + column_gradient[2] ** 2)


def _flops_depthwise(y, *args, **kwargs) -> int:
    return 2 * 9 * math.prod(y)


def _flops_depthwise_backward(gradient, *args, **kwargs) -> int:
    return 2 * _flops_depthwise(gradient)


def _flops_sea_attention(x, weights, heads, key_dim, *args, **kwargs) -> int:
    return _flops_of_block(x, heads * key_dim, weights[6][-2])


def _flops_of_block(x, keys: int, values: int) -> int:
    b, c, h, w = x
    projected = 2 * keys + values
    pixel = c * projected + 9 * projected + projected * c + values * c
    axis = values * values
    if reference.squeeze_first(h, w):
        axis += c * projected
    attention = (keys + values) * (h * h + w * w)
    return 2 * b * (h * w * pixel + (h + w) * axis + attention)


_FLOPS = {
    "axial_squeeze": _flops_free,
    "axial_squeeze_backward": _flops_free,
    "axial_attention": _flops_axial_attention,
    "axial_attention_pair": _flops_axial_attention_pair,
    "axial_attention_pair_backward": _flops_axial_attention_pair_backward,
    "broadcast_add": _flops_free,
    "broadcast_add_backward": _flops_free,
    "gate": _flops_free,
    "gate_backward": _flops_free,
    **dict.fromkeys(STAGES, _flops_free),
    "depthwise": _flops_depthwise,
    "depthwise_backward": _flops_depthwise_backward,
    "sea_attention": _flops_sea_attention,
}


@cache
def _register_flop_formulas() -> None:
    """Give the formulas to ``torch.utils.flop_counter``.

    That module imports triton, so it is not imported here: who counts has imported it, and the
    first call of an operator after that registers.
    """
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FLOPS.items():
        register_flop_formula(getattr(torch.ops.seaattn_kernels, name))(formula)


# --- choice of a backend ---------------------------------------------------------------------

_warned: set[str] = set()
_capabilities: dict[torch.device, tuple[int, int]] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # which does not import it


def refusal(
    operator: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head: tuple[int, int] = (0, 0),
    obstacle: str | None = None,
) -> str | None:
    """Why ``backend`` cannot run ``operator`` on such tensors, or None where it can.

    ``head``: D and E of an attention; ``obstacle``: what of a block csrc/cuda does not take,
    ``fold.cuda_obstacle``.
    """
    if backend == "reference":
        return None
    if operator not in OPERATORS[backend]:
        return f"this version has no {backend} implementation of {operator}"
    if transformed():
        return "torch.func and forward-mode AD need the backend 'reference'"
    if backend == "cpu" and native.REASON is not None:
        return native.REASON
    if backend == "cpu" and device.type != "cpu":
        return f"backend 'cpu' needs CPU tensors, got {device}"
    if backend == "triton" and (reason := _triton_refusal(device, dtype, head)):
        return reason
    if backend == "cuda" and (reason := _cuda_refusal(device, dtype, head) or obstacle):
        return reason
    if dtype is torch.float64:
        return f"backend {backend!r} does not compute in float64; 'reference' does"
    return None


def _triton_refusal(device: torch.device, dtype: torch.dtype, head: tuple[int, int]) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if head[0] > WIDEST_HEAD[0] or head[1] > WIDEST_HEAD[1]:
        return f"backend 'triton' takes heads of at most D, E = {WIDEST_HEAD}, got {head}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "backend 'triton' needs a GPU; TRITON_INTERPRET=1 interprets it on a CPU"
    if device.type != "cuda":
        return f"backend 'triton' needs CUDA tensors, got {device}"
    if dtype is torch.bfloat16 and torch.version.hip is None and _capability(device) < (8, 0):
        return "backend 'triton' needs compute capability 8.0 for bfloat16"
    return None


def _cuda_refusal(device: torch.device, dtype: torch.dtype, head: tuple[int, int]) -> str | None:
    if native.CUDA_REASON is not None:
        return native.CUDA_REASON
    if device.type != "cuda" or torch.version.hip is not None:
        return f"backend 'cuda' needs tensors on an NVIDIA GPU, got {device}"
    if _capability(device) != (9, 0):
        found = "{}.{}".format(*_capability(device))
        return (
            "backend 'cuda' has run on compute capability 9.0 alone and is switched off on "
            f"others, this GPU has {found}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"backend 'cuda' computes in float16 and bfloat16, not in {dtype}"
    return _triton_refusal(device, dtype, head)  # whose kernels come first in the block


def _capability(device: torch.device) -> tuple[int, int]:
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


# What torch.compiler.assume_constant_result does, without the import of the compiler.
_capability._dynamo_marked_constant = True


def _preferred(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    head: tuple[int, int],
    obstacle: str | None,
) -> tuple[str, str | None]:
    """What "auto" takes on a device, and why it is not the best it has."""
    on_cuda = device.type == "cuda"
    if on_cuda and torch.version.hip is None and _capability(device) < (8, 0):
        return "reference", "below compute capability 8.0 plain PyTorch is taken"
    if on_cuda and refusal(operator, "cuda", device, dtype, head, obstacle) is None:
        return "cuda", None
    candidate = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    return (candidate if operator in OPERATORS[candidate] else "reference"), None


def _exact_convolutions() -> bool:
    """Whether PyTorch keeps float32 convolutions off TF32."""
    return torch.backends.cudnn.conv.fp32_precision != "tf32"


_exact_convolutions._dynamo_marked_constant = True


def _folded_is_faster(x: Tensor, folded) -> bool:
    """Whether "auto" leaves a block on a GPU to folded PyTorch, by :mod:`crossover`."""
    if x.dtype is not torch.float32 or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    most = EXACT_FLOAT32_FLOPS.get(_capability(x.device))
    if most is None or not _exact_convolutions():
        return False
    keys, values = folded.heads * folded.key_dim, folded.heads * folded.value_dim
    return _flops_of_block(x.shape, keys, values) > most


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is at work.

    Only plain PyTorch has their rules: "auto" runs it, without the dispatcher in between.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` is one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def settle(
    operator: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head: tuple[int, int] = (0, 0),
    obstacle: str | None = None,
) -> tuple[str, str | None]:
    """The backend that runs, and for "auto" why it is not the one that was preferred.

    Raises ``RuntimeError`` with the reason where an explicit backend cannot run.
    """
    check_backend(backend)
    if backend != "auto":
        if reason := refusal(operator, backend, device, dtype, head, obstacle):
            raise RuntimeError(f"{operator}: {reason}")
        return backend, None
    if _AUTO not in BACKENDS:
        raise ValueError(f"SEAATTN_BACKEND must be one of {BACKENDS}, got {_AUTO!r}")
    preferred, reason = _AUTO, None
    if _AUTO == "auto":
        preferred, reason = _preferred(operator, device, dtype, head, obstacle)
    reason = reason or refusal(operator, preferred, device, dtype, head, obstacle)
    return ("reference" if reason else preferred), reason


def choose(
    operator: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head: tuple[int, int] = (0, 0),
    obstacle: str | None = None,
) -> str:
    """The backend that runs; "auto" warns once a reason where it falls back to the reference."""
    chosen, reason = settle(operator, backend, device, dtype, head, obstacle)
    if reason is not None:
        quiet = dtype is torch.float64 or torch.compiler.is_compiling() or transformed()
        if not quiet and reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"seaattn_kernels uses plain PyTorch: {reason}", stacklevel=4)
    return chosen


def _select(
    operator: str,
    backend: str,
    x: Tensor,
    head: tuple[int, int] = (0, 0),
    obstacle: str | None = None,
) -> tuple[Callable, str]:
    """The overload that runs, and its backend."""
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        _register_flop_formulas()
    chosen = choose(operator, backend, x.device, x.dtype, head, obstacle)
    return REFERENCE[operator] if transformed() else OVERLOADS[operator][chosen], chosen


# --- public functions ------------------------------------------------------------------------


def axial_squeeze(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Row and column means of a map: the squeeze of SeaFormer (arXiv 2301.13156, section 3.2).

    ``row[b,c,i] = mean_j x[b,c,i,j]``, ``column[b,c,j] = mean_i x[b,c,i,j]``.

    Args:
        x: ``(B, C, H, W)``, any strides. Sums run in float32 at least; on ``cpu`` short runs do,
            and their sums in float64.
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, C, H)`` and ``(B, C, W)``, contiguous, of x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank or an empty H, W or C.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """
    check_tensor("x", x, "B, C, H, W")
    overload, _ = _select("axial_squeeze", backend, x)
    return overload(x)


def axial_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, backend: str = "auto"
) -> Tensor:
    """Softmax attention along one squeezed axis (arXiv 2301.13156, section 3.2).

    ``o[:, i] = sum_j softmax_j(scale * q[:, i] . k[:, j]) v[:, j]`` within each head.

    Args:
        q, k: ``(B, heads*D, N)``; position tables already added.
        v: ``(B, heads*E, N)``.
        heads: number of heads; channels of a head are neighbours.
        scale: factor of the scores, ``D**-0.5`` in SeaFormer.
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, heads*E, N)``, contiguous; products accumulate in float32 at least.

    Raises:
        TypeError, ValueError: for wrong or mixed dtypes, devices, shapes.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, "B, channels, N")
    check_shape("k", k, q.shape, "like q")
    check_shape("v", v, (q.shape[0], v.shape[1], q.shape[2]), "in B and N like q")
    check_divides(heads, q=q, v=v)
    check_number("scale", scale)
    q, k, v = unify("q k v", (q, k, v), cast=True)
    overload, _ = _select("axial_attention", backend, q, (q.shape[1] // heads, v.shape[1] // heads))
    with autocast_off(q.device):
        return overload(q, k, v, heads, scale)


def axial_attention_pair(
    row: Tensor,
    column: Tensor,
    tables: Sequence[Tensor],
    heads: int,
    key_dim: int,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Both axial attentions of a block at once (arXiv 2301.13156, section 3.2).

    Splits each axis into q, k, v, adds the position tables, interpolated linearly
    (``align_corners=False``) to the length of the axis, to q and k, and attends within each head.

    Args:
        row: ``(B, NQ, H)``, the squeezed q, k, v channels in this order, ``NQ = heads*(2D + E)``.
        column: ``(B, NQ, W)``.
        tables: four of ``(1, heads*D, P)``: of the row's q and k, of the column's q and k.
        heads: number of heads.
        key_dim: ``D``.
        scale: factor of the scores; ``D**-0.5`` if None.
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, heads*E, H)`` and ``(B, heads*E, W)``; differentiable in all six tensors.

    Raises:
        TypeError, ValueError: for wrong or mixed dtypes, devices, shapes.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """
    check_tensor("row", row, "B, NQ, H")
    check_tensor("column", column, "B, NQ, W")
    check_shape("column", column, (*row.shape[:2], column.shape[2]), "in B and NQ like row")
    check_positive("key_dim", key_dim)
    scale = key_dim**-0.5 if scale is None else scale
    check_number("scale", scale)
    check_divides(heads, row=row)
    if row.shape[1] <= 2 * heads * key_dim:
        raise ValueError(
            f"row must have more than 2*heads*key_dim = {2 * heads * key_dim} channels, "
            f"got {describe(row)}"
        )
    if not isinstance(tables, Sequence) or len(tables) != 4:
        raise ValueError(f"tables must be four tensors, got {describe(tables)}")
    names = "row column tables[0] tables[1] tables[2] tables[3]"
    for name, table in zip(names.split()[2:], tables, strict=True):
        check_tensor(name, table, "1, heads*D, P")
        check_shape(name, table, (1, heads * key_dim, table.shape[2]), "(1, heads*D, P)")
    tensors = unify(names, (row, column, *tables), cast=True)
    head = (key_dim, row.shape[1] // heads - 2 * key_dim)
    overload, _ = _select("axial_attention_pair", backend, tensors[0], head)
    with autocast_off(row.device):
        return overload(*tensors, heads, key_dim, scale)


def broadcast_add(
    v: Tensor,
    row: Tensor,
    column: Tensor,
    activation: str = "identity",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Add a row and a column vector to a map, then activate.

    ``out[b,c,i,j] = act(v[b,c,i,j] + row[b,c,i] + column[b,c,j])``

    Args:
        v: ``(B, C, H, W)``.
        row: ``(B, C, H)``.
        column: ``(B, C, W)``.
        activation: one of ``reference.ACTIVATIONS``.
        negative_slope: of ``leaky_relu``.
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, C, H, W)`` in the layout of v; NaN goes through, gradients at a kink are PyTorch's.

    Raises:
        TypeError, ValueError: for wrong or mixed dtypes, devices, shapes, an unknown activation.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """
    check_tensor("v", v, "B, C, H, W")
    check_tensor("row", row, "B, C, H")
    check_tensor("column", column, "B, C, W")
    b, c, h, w = v.shape
    check_shape("row", row, (b, c, h), "like v without W")
    check_shape("column", column, (b, c, w), "like v without H")
    code = activation_code(activation)
    check_number("negative_slope", negative_slope)
    v, row, column = unify("v row column", (v, row, column), cast=False)
    overload, _ = _select("broadcast_add", backend, v)
    return overload(v, row, column, code, float(negative_slope))


def gate(x: Tensor, y: Tensor, hard: bool = True, backend: str = "auto") -> Tensor:
    """Weigh one map by the sigmoid of another: ``h_sigmoid(x) * y`` (or ``sigmoid(x) * y``).

    ``h_sigmoid(t) = relu6(t + 3) / 6``; its gradient is 0 at the bounds -3 and 3 themselves.

    Args:
        x, y: ``(B, C, H, W)``.
        hard: the piecewise linear sigmoid of upstream; the true one if False.
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, C, H, W)`` in the layout of x.

    Raises:
        TypeError, ValueError: for wrong or mixed dtypes, devices, shapes.
        RuntimeError: where an explicit backend cannot run, with the reason.
    """
    check_tensor("x", x, "B, C, H, W")
    check_tensor("y", y, "B, C, H, W")
    check_shape("y", y, x.shape, "like x")
    x, y = unify("x y", (x, y), cast=False)
    overload, _ = _select("gate", backend, x)
    return overload(x, y, bool(hard))


def sea_attention(x: Tensor, folded, backend: str = "auto") -> Tensor:
    """The whole block in eval mode from folded weights (arXiv 2301.13156, section 3.2).

    ``out = sigmoid(proj(act(v + row + column))) * pwconv(act(dwconv(qkv)))``, the axis vectors
    taken from the means of x, or of the projected map where that is cheaper. Products accumulate in
    float32 at least. No autograd: for gradients call the module.

    On a CPU "auto" is the fused block in C++, in float32 from the map to the result whatever the
    dtype; its bits do not depend on the number of threads.

    On a GPU "auto" is the fused block, three to five launches: of Triton, and in half precision on
    compute capability 9.0 of csrc/cuda behind the projection. It is folded PyTorch where
    :mod:`crossover` expects that to be faster. Products take float32 as convolutions do, by
    ``torch.backends.cudnn.conv.fp32_precision``; along an axis by that of ``cuda.matmul``.

    Args:
        x: ``(B, C, H, W)``, C as the block was made for.
        folded: :class:`seaattn_kernels.fold.FoldedWeights`; weights are cast to x's dtype once,
            biases and position tables stay float32 (float64 for a float64 block).
        backend: see :data:`BACKENDS`.

    Returns:
        ``(B, C, H, W)`` in the layout and dtype of x (under autocast in its dtype).

    Raises:
        TypeError, ValueError: for a wrong dtype, rank or number of channels, or another device.
        RuntimeError: where x needs a gradient, or an explicit backend cannot run, with the reason.
    """
    if not hasattr(folded, "module_dtype"):
        raise TypeError(f"folded must be a fold.FoldedWeights, got {describe(folded)}")
    calls = None if torch.compiler.is_compiling() else folded.calls
    if calls is not None and (out := calls.repeat(x, backend)) is not None:
        return out
    check_input(x, folded.convolutions[0], folded.module_dtype)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sea_attention has no backward: call the module, or use torch.no_grad()")
    target = autocast_dtype(x.device)
    if target is not None and x.dtype is not torch.float64:
        x = x.to(target)
    folded_pytorch = backend == _AUTO == "auto" and _folded_is_faster(x, folded)
    asked = "reference" if folded_pytorch else backend
    head = folded.key_dim, folded.value_dim
    obstacle = folded.cuda_obstacle(*x.shape[2:]) if x.device.type == "cuda" else None
    overload, chosen = _select("sea_attention", asked, x, head, obstacle)
    weights = folded.weights(x.dtype, x.shape[2], x.shape[3], chosen)
    numbers = (
        folded.heads,
        folded.key_dim,
        folded.activation_code,
        folded.negative_slope,
        folded.hard,
    )
    if calls is not None:
        calls.keep(x, backend, chosen, weights, numbers)
    with autocast_off(x.device):
        return overload(x, weights, *numbers)
