"""The registered overloads ``torch.ops.seaattn_kernels.<operator>.<backend>``.

Schemas are defined here, once; the compiled library adds kernels to them. The ``reference``
overloads are composite: autograd, ``torch.compile`` and exporters see the plain PyTorch they are
made of. The others are opaque, and bring a fake and a backward operator; gradients of that come
from the reference. Arguments have been checked.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from seaattn_kernels import native, normalized, reference
from seaattn_kernels.reference import ACTIVATIONS

_LIBRARY = torch.library.Library("seaattn_kernels", "DEF")
_TABLES = "Tensor row_q, Tensor row_k, Tensor column_q, Tensor column_k"
_AXES = "Tensor? row, Tensor? column"
_ACTIVATION = "int activation, float negative_slope"
_BLOCK = (
    "(Tensor x, Tensor[] weights, int heads, int key_dim, int activation, float negative_slope, "
    "bool hard)"
)
_GATED = "Tensor x, Tensor y, Tensor x_affine, Tensor y_affine"
SCHEMAS = {
    "axial_squeeze": "(Tensor x) -> (Tensor, Tensor)",
    "axial_squeeze_backward": "(Tensor row, Tensor column, bool channels_last) -> Tensor",
    "axial_attention": "(Tensor q, Tensor k, Tensor v, int heads, float scale) -> Tensor",
    "axial_attention_pair": (
        f"(Tensor row, Tensor column, {_TABLES}, int heads, int key_dim, float scale) "
        "-> (Tensor, Tensor)"
    ),
    "axial_attention_pair_backward": (
        "(Tensor row_gradient, Tensor column_gradient, Tensor row, Tensor column, "
        f"{_TABLES}, int heads, int key_dim, float scale) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "broadcast_add": (
        "(Tensor v, Tensor row, Tensor column, int activation, float negative_slope) -> Tensor"
    ),
    "broadcast_add_backward": (
        "(Tensor gradient, Tensor v, Tensor row, Tensor column, int activation, "
        "float negative_slope) -> (Tensor, Tensor, Tensor)"
    ),
    "gate": "(Tensor x, Tensor y, bool hard) -> Tensor",
    "gate_backward": "(Tensor gradient, Tensor x, Tensor y, bool hard) -> (Tensor, Tensor)",
    "moments": "(Tensor y) -> (Tensor, Tensor)",
    "axial_moments": "(Tensor y) -> (Tensor, Tensor, Tensor, Tensor)",
    "normalize_affine": (
        "(Tensor mean, Tensor deviations, Tensor? weight, Tensor? bias, SymInt count, float eps) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "normalize_terms": "(Tensor sums, Tensor inverse, SymInt count) -> (Tensor, Tensor)",
    "normalize": f"(Tensor y, Tensor affine, {_AXES}, {_ACTIVATION}) -> Tensor",
    "normalize_sums": (
        f"(Tensor gradient, Tensor y, Tensor affine, {_AXES}, {_ACTIVATION}) -> Tensor"
    ),
    "normalize_backward": (
        f"(Tensor gradient, Tensor y, Tensor affine, Tensor terms, {_AXES}, {_ACTIVATION}) "
        "-> Tensor"
    ),
    "normalize_add_backward": (
        "(Tensor gradient, Tensor y, Tensor affine, Tensor row, Tensor column, "
        f"{_ACTIVATION}) -> (Tensor, Tensor, Tensor)"
    ),
    "normalize_gate": f"({_GATED}, bool hard) -> Tensor",
    "normalize_gate_sums": f"(Tensor gradient, {_GATED}, bool hard) -> (Tensor, Tensor)",
    "normalize_gate_backward": (
        f"(Tensor gradient, {_GATED}, Tensor x_terms, Tensor y_terms, bool hard) "
        "-> (Tensor, Tensor)"
    ),
    "depthwise": "(Tensor y, Tensor affine, Tensor weight, Tensor? bias) -> Tensor",
    "depthwise_backward": (
        "(Tensor gradient, Tensor y, Tensor affine, Tensor weight) -> (Tensor, Tensor)"
    ),
    "sea_attention": f"{_BLOCK} -> Tensor",
}
#: The operators between the products of a training pass (:mod:`normalized`), without gradients of
#: their own. "training" among the operators of a backend stands for all of them.
STAGES = (
    "moments",
    "axial_moments",
    "normalize_affine",
    "normalize_terms",
    "normalize",
    "normalize_sums",
    "normalize_backward",
    "normalize_add_backward",
    "normalize_gate",
    "normalize_gate_sums",
    "normalize_gate_backward",
    "depthwise",
    "depthwise_backward",
)
_PUBLIC = (
    "axial_squeeze",
    "axial_attention",
    "axial_attention_pair",
    "broadcast_add",
    "gate",
    "sea_attention",
    "training",
)
#: The operators that each backend has in this version.
OPERATORS = {"reference": _PUBLIC, "cpu": _PUBLIC, "triton": _PUBLIC, "cuda": ("sea_attention",)}


# --- reference -------------------------------------------------------------------------------


def _broadcast_add(v, row, column, activation, negative_slope):
    return reference.broadcast_add(v, row, column, ACTIVATIONS[activation], negative_slope)


def _sea_attention(x, weights, heads, key_dim, activation, negative_slope, hard):
    name = ACTIVATIONS[activation]
    return reference.sea_attention_folded(x, weights, heads, key_dim, name, negative_slope, hard)


def _by_name(function: Callable) -> Callable:
    """A stage whose activation is a number here."""

    def stage(*arguments):
        *tensors, activation, negative_slope = arguments
        return function(*tensors, ACTIVATIONS[activation], negative_slope)

    return stage


def _stages() -> dict[str, Callable]:
    return {
        name: _by_name(function) if _ACTIVATION in SCHEMAS[name] else function
        for name in STAGES
        for function in [getattr(normalized, name)]
    }


REFERENCE = {
    "axial_squeeze": reference.axial_squeeze,
    "axial_attention": reference.axial_attention,
    "axial_attention_pair": reference.axial_attention_pair,
    "broadcast_add": _broadcast_add,
    "gate": reference.gate,
    "sea_attention": _sea_attention,
    **_stages(),
}


# --- one axis, of every backend --------------------------------------------------------------


def _one_axis(backend: str) -> Callable:
    """The pair with a column of one element and tables of zero; gradients are the pair's."""

    def axial_attention(q, k, v, heads, scale):
        row = torch.cat([q, k, v], dim=1)
        column = row.new_zeros(*row.shape[:2], 1)
        tables = [q.new_zeros(1, q.shape[1], 1)] * 4
        pair = _overload("axial_attention_pair", backend)
        return pair(row, column, *tables, heads, q.shape[1] // heads, scale)[0]

    return axial_attention


# --- Triton, imported at the first call ------------------------------------------------------


def _triton_axial_squeeze(x):
    from seaattn_kernels.kernels import squeeze

    return squeeze.axial_squeeze(x)


def _triton_axial_squeeze_backward(row, column, channels_last):
    from seaattn_kernels.kernels import squeeze

    return squeeze.axial_squeeze_backward(row, column, channels_last)


def _triton_axial_attention_pair(row, column, *rest):
    from seaattn_kernels.kernels import axial_attention

    *tables, heads, key_dim, scale = rest
    row, column, *tables = (t.contiguous() for t in (row, column, *tables))
    return axial_attention.axial_attention_pair(row, column, tables, heads, key_dim, scale)


def _triton_axial_attention_pair_backward(*arguments):
    from seaattn_kernels.kernels import axial_attention

    *tensors, heads, key_dim, scale = arguments
    row_gradient, column_gradient, row, column, *tables = (t.contiguous() for t in tensors)
    return axial_attention.axial_attention_pair_backward(
        row_gradient, column_gradient, row, column, tables, heads, key_dim, scale
    )


def _triton_broadcast_add(v, row, column, activation, negative_slope):
    from seaattn_kernels.kernels import broadcast_add

    out = _like_map(v)
    return broadcast_add.broadcast_add(v, row, column, activation, negative_slope, out)


def _triton_broadcast_add_backward(gradient, v, row, column, activation, negative_slope):
    from seaattn_kernels.kernels import broadcast_add

    return broadcast_add.broadcast_add_backward(
        gradient, v, row, column, activation, negative_slope, _like_map(v)
    )


def _triton_gate(x, y, hard):
    from seaattn_kernels.kernels import gate

    return gate.gate(*(reference.follow_layout(t, x) for t in (x, y)), hard)


def _triton_gate_backward(gradient, x, y, hard):
    from seaattn_kernels.kernels import gate

    return gate.gate_backward(*(reference.follow_layout(t, x) for t in (gradient, x, y)), hard)


def _triton_sea_attention(x, weights, *rest, chunked=False):
    from seaattn_kernels.kernels import block

    out = _like_map(x)
    if x.shape[0] == 0:
        return out
    h, w = x.shape[2:]
    if h > 1 and w > 1 and x.stride(2) != w * x.stride(3):
        x = reference.follow_layout(x, x)
    return block.sea_attention(x, weights, *rest, out, chunked)


def _planned(sea_attention: Callable) -> Callable:
    """The result, and its launches as numbers, which the library repeats in the next calls."""

    def plan(x, weights, *rest):
        from seaattn_kernels.kernels import launch

        with launch.recording() as launches:
            out = sea_attention(x, weights, *rest)
        return out, launch.plan(launches, [x, *weights, out])

    return plan


#: The block on a GPU: the first launches are Triton's, the last may be those of csrc/cuda.
_BLOCK_ON_GPU = {
    "triton": _triton_sea_attention,
    "cuda": partial(_triton_sea_attention, chunked=True),
}


def _triton_moments(y):
    from seaattn_kernels.kernels import normalize

    return normalize.moments(y)


def _triton_axial_moments(y):
    from seaattn_kernels.kernels import normalize

    return normalize.axial_moments(y)


def _triton_normalize_affine(*arguments):
    from seaattn_kernels.kernels import normalize

    tensors = [t if t is None else t.contiguous() for t in arguments[:4]]
    return normalize.normalize_affine(*tensors, *arguments[4:])


def _triton_normalize_terms(sums, inverse, count):
    from seaattn_kernels.kernels import normalize

    return normalize.normalize_terms(sums.contiguous(), inverse.contiguous(), count)


def _triton_normalize(y, affine, *rest):
    from seaattn_kernels.kernels import normalize

    return normalize.normalize(y, affine.contiguous(), *rest, _like_pixels(y))


def _triton_normalize_sums(gradient, y, affine, *rest):
    from seaattn_kernels.kernels import normalize

    return normalize.normalize_sums(gradient, y, affine.contiguous(), *rest)


def _triton_normalize_backward(gradient, y, affine, terms, *rest):
    from seaattn_kernels.kernels import normalize

    affine, terms = affine.contiguous(), terms.contiguous()
    return normalize.normalize_backward(gradient, y, affine, terms, *rest, _like_pixels(y))


def _triton_normalize_add_backward(gradient, y, affine, *rest):
    from seaattn_kernels.kernels import normalize

    out = _like_pixels(y)
    return normalize.normalize_add_backward(gradient, y, affine.contiguous(), *rest, out)


def _triton_normalize_gate(x, y, x_affine, y_affine, hard):
    from seaattn_kernels.kernels import normalize

    affines = x_affine.contiguous(), y_affine.contiguous()
    return normalize.normalize_gate(x, y, *affines, hard, _like_pixels(x))


def _triton_normalize_gate_sums(gradient, x, y, x_affine, y_affine, hard):
    from seaattn_kernels.kernels import normalize

    affines = x_affine.contiguous(), y_affine.contiguous()
    return normalize.normalize_gate_sums(gradient, x, y, *affines, hard)


def _triton_normalize_gate_backward(gradient, x, y, *rest):
    from seaattn_kernels.kernels import normalize

    *vectors, hard = rest
    vectors = [t.contiguous() for t in vectors]
    out = _like_pixels(x), _like_pixels(y)
    return normalize.normalize_gate_backward(gradient, x, y, *vectors, hard, *out)


def _triton_depthwise(y, affine, weight, bias):
    from seaattn_kernels.kernels import depthwise

    affine, weight = affine.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return depthwise.depthwise(y, affine, weight, bias, _like_pixels(y))


def _triton_depthwise_backward(gradient, y, affine, weight):
    from seaattn_kernels.kernels import depthwise

    affine, weight = affine.contiguous(), weight.contiguous()
    return depthwise.depthwise_backward(gradient, y, affine, weight, _like_pixels(y))


_TRITON = {
    "axial_squeeze": _triton_axial_squeeze,
    "axial_squeeze_backward": _triton_axial_squeeze_backward,
    "axial_attention_pair": _triton_axial_attention_pair,
    "axial_attention_pair_backward": _triton_axial_attention_pair_backward,
    "broadcast_add": _triton_broadcast_add,
    "broadcast_add_backward": _triton_broadcast_add_backward,
    "gate": _triton_gate,
    "gate_backward": _triton_gate_backward,
    "sea_attention": _triton_sea_attention,
    "moments": _triton_moments,
    "axial_moments": _triton_axial_moments,
    "normalize_affine": _triton_normalize_affine,
    "normalize_terms": _triton_normalize_terms,
    "normalize": _triton_normalize,
    "normalize_sums": _triton_normalize_sums,
    "normalize_backward": _triton_normalize_backward,
    "normalize_add_backward": _triton_normalize_add_backward,
    "normalize_gate": _triton_normalize_gate,
    "normalize_gate_sums": _triton_normalize_gate_sums,
    "normalize_gate_backward": _triton_normalize_gate_backward,
    "depthwise": _triton_depthwise,
    "depthwise_backward": _triton_depthwise_backward,
}


# --- fakes -----------------------------------------------------------------------------------


def _like_map(v, *rest):
    """An empty map in the layout that an operator gives to one of this layout."""
    layout = torch.channels_last if reference.is_channels_last(v) else torch.contiguous_format
    return torch.empty(v.shape, dtype=v.dtype, device=v.device, memory_format=layout)


def _like_pixels(y, *rest):
    """As :func:`_like_map` for a stage, which takes slices of channels_last maps for such maps."""
    layout = normalized.layout_of(y)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=layout)


def _fake_axial_squeeze(x):
    b, c, h, w = x.shape
    return x.new_empty(b, c, h), x.new_empty(b, c, w)


def _fake_axial_squeeze_backward(row, column, channels_last):
    b, c, h = row.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (b, c, h, column.shape[2]), dtype=row.dtype, device=row.device, memory_format=layout
    )


def _fake_axial_attention_pair(row, column, row_q, row_k, column_q, column_k, heads, key_dim, s):
    b, projected, h = row.shape
    values = projected - 2 * heads * key_dim
    return row.new_empty(b, values, h), column.new_empty(b, values, column.shape[2])


def _fake_axial_attention_pair_backward(row_gradient, column_gradient, *rest):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rest[:6])


def _fake_broadcast_add_backward(gradient, v, row, column, activation, negative_slope):
    return (_like_map(v), row.new_empty(row.shape), column.new_empty(column.shape))


def _fake_gate_backward(gradient, x, y, hard):
    return _like_map(x), _like_map(x)


def _fake_moments(y):
    dtype = normalized.wide(y.dtype)
    return tuple(torch.empty(y.shape[1], dtype=dtype, device=y.device) for _ in range(2))


def _fake_axial_moments(y):
    b, c, h, w = y.shape
    mean, deviations = _fake_moments(y)
    return mean, deviations, mean.new_empty(b, c, h), mean.new_empty(b, c, w)


def _fake_normalize_affine(mean, *rest):
    return mean.new_empty(3, mean.shape[0]), torch.empty_like(mean), torch.empty_like(mean)


def _fake_sums(affine):
    return affine.new_empty(2, affine.shape[1])


def _fake_normalize_add_backward(gradient, y, affine, row, column, *rest):
    return _like_pixels(y), affine.new_empty(row.shape), affine.new_empty(column.shape)


def _fake_depthwise_backward(gradient, y, affine, weight):
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return _like_pixels(y), dweight


_FAKES = {
    "axial_squeeze": _fake_axial_squeeze,
    "axial_squeeze_backward": _fake_axial_squeeze_backward,
    "axial_attention_pair": _fake_axial_attention_pair,
    "axial_attention_pair_backward": _fake_axial_attention_pair_backward,
    "broadcast_add": _like_map,
    "broadcast_add_backward": _fake_broadcast_add_backward,
    "gate": _like_map,
    "gate_backward": _fake_gate_backward,
    "sea_attention": _like_map,
    "moments": _fake_moments,
    "axial_moments": _fake_axial_moments,
    "normalize_affine": _fake_normalize_affine,
    "normalize_terms": lambda sums, inverse, count: (_fake_sums(sums), torch.empty_like(inverse)),
    "normalize": _like_pixels,
    "normalize_sums": lambda gradient, y, affine, *rest: _fake_sums(affine),
    "normalize_backward": lambda gradient, y, *rest: _like_pixels(y),
    "normalize_add_backward": _fake_normalize_add_backward,
    "normalize_gate": _like_pixels,
    "normalize_gate_sums": lambda gradient, x, y, *rest: tuple(map(_fake_sums, rest[:2])),
    "normalize_gate_backward": lambda gradient, x, y, *rest: (_like_pixels(x), _like_pixels(y)),
    "depthwise": _like_pixels,
    "depthwise_backward": _fake_depthwise_backward,
}


# --- autograd --------------------------------------------------------------------------------


def _setup_axial_squeeze(ctx, inputs, output):
    ctx.channels_last = reference.is_channels_last(inputs[0])


def _setup_nothing(ctx, inputs, output):
    """torch.func asks for one."""


def _register_axial_squeeze(backend: str) -> None:
    squeeze = _overload("axial_squeeze", backend)
    spread = _overload("axial_squeeze_backward", backend)

    def backward(ctx, grad_row, grad_column):
        return spread(grad_row, grad_column, ctx.channels_last)

    _register_autograd(squeeze, backward, _setup_axial_squeeze)


def _register_adjoint_of_spread(backend: str) -> None:
    """The adjoint of the squeeze is linear, and its own adjoint the squeeze."""
    squeeze = _overload("axial_squeeze", backend)

    def backward(ctx, grad):
        return *squeeze(grad), None

    _register_autograd(_overload("axial_squeeze_backward", backend), backward, _setup_nothing)


def _register_training(name: str, backend: str) -> None:
    """An operator whose backward operator takes the gradients, then its tensors and numbers."""
    forward_op, backward_op = _overload(name, backend), _overload(f"{name}_backward", backend)

    def backward(ctx, *gradients):
        found = backward_op(*gradients, *ctx.saved_tensors, *ctx.numbers)
        return *found, *[None] * len(ctx.numbers)

    _register_autograd(forward_op, backward, _save_all)


def _save_all(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.numbers = [value for value in inputs if not isinstance(value, Tensor)]


def _register_double_backward(name: str, backend: str) -> None:
    def double_backward(ctx, *gradients):
        found = _gradients_of_gradients(name, ctx.saved_tensors, ctx.numbers, gradients)
        return *found, *[None] * len(ctx.numbers)

    _register_autograd(_overload(f"{name}_backward", backend), double_backward, _save_all)


def _gradients_of_gradients(
    name: str, tensors: Sequence[Tensor], numbers: Sequence, gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of a backward operator, by the reference: ``tensors`` are the gradients it took, then the
    forward's inputs."""
    outputs = 2 if name == "axial_attention_pair" else 1
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = REFERENCE[name](*leaves[outputs:], *numbers)
        found = torch.autograd.grad(
            out, leaves[outputs:], leaves[:outputs], create_graph=True, materialize_grads=True
        )
        return list(
            torch.autograd.grad(found, leaves, gradients, allow_unused=True, materialize_grads=True)
        )


def _register_autograd(overload, backward: Callable, setup: Callable) -> None:
    torch.library.register_autograd(overload._name, backward, setup_context=setup, lib=_LIBRARY)


# --- registration ----------------------------------------------------------------------------


def _overload(name: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.seaattn_kernels, name), backend)


def _in_library(name: str, device: str) -> bool:
    """Whether the compiled library brings a kernel: it does for the block on a GPU, csrc/triton."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return native.REASON is None and has_kernel(f"seaattn_kernels::{name}", device)


def _define() -> dict[str, dict[str, torch._ops.OpOverload]]:
    overloads: dict[str, dict[str, torch._ops.OpOverload]] = {name: {} for name in SCHEMAS}
    for backend, operators in OPERATORS.items():
        for name in operators:
            schemas = STAGES if name == "training" else (name,)
            if backend != "reference" and f"{name}_backward" in SCHEMAS:
                schemas = (name, f"{name}_backward")
            for schema in schemas:
                _LIBRARY.define(f"{schema}.{backend}{SCHEMAS[schema]}")
                overloads[schema][backend] = _overload(schema, backend)
    for name, function in REFERENCE.items():
        _LIBRARY.impl(f"{name}.reference", function, "CompositeImplicitAutograd")
    for backend in ("cpu", "triton"):
        name = f"axial_attention.{backend}"
        _LIBRARY.impl(name, _one_axis(backend), "CompositeImplicitAutograd")
    for name, function in _TRITON.items():
        for device in ("CUDA", "CPU"):  # on the CPU Triton interprets
            if not _in_library(f"{name}.triton", device):
                _LIBRARY.impl(f"{name}.triton", function, device)
    for backend, function in _BLOCK_ON_GPU.items():
        _LIBRARY.define(f"sea_attention_plan.{backend}{_BLOCK} -> (Tensor, int[])")
        for device in ("CUDA", "CPU") if backend == "triton" else ("CUDA",):
            _LIBRARY.impl(f"sea_attention_plan.{backend}", _planned(function), device)
    if not _in_library("sea_attention.cuda", "CUDA"):
        _LIBRARY.impl("sea_attention.cuda", _BLOCK_ON_GPU["cuda"], "CUDA")
    for name, fake in _FAKES.items():
        for backend, overload in overloads[name].items():
            if backend != "reference":
                torch.library.register_fake(overload._name, fake, lib=_LIBRARY)
    # First derivatives on a CPU are the library's own, csrc/cpu/autograd.cpp.
    training = ("axial_attention_pair", "broadcast_add", "gate")
    _register_axial_squeeze("triton")
    for name in training:
        _register_training(name, "triton")
    for backend in ("cpu", "triton"):
        _register_adjoint_of_spread(backend)
        for name in training:
            _register_double_backward(name, backend)
    return overloads


OVERLOADS = _define()
