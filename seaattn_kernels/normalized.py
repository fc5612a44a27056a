"""Operators on maps whose BatchNorm is pending, forward and backward, in plain PyTorch.

A training step keeps what a convolution put out, never its normalised copy: who reads a map
normalises what it loads,

    n(y) = (y - mean) * scale + shift            scale = gamma / sqrt(var + eps), shift = beta

by an ``affine`` of shape (3, C): mean, scale, shift, in float32 at least
(:func:`normalize_affine`). Maps are (B, C, H, W) in any float dtype and layout; sums and statistics
come in the dtype of the affine. A gradient goes through a BatchNorm in two steps, for in between
processes may add up: the sums of ``g = dL/dn``,

    sums = (sum g, sum g * (y - mean))                                                     (2, C)

then, with m the number of elements of a channel,

    dy = scale * (g - terms[0] - (y - mean) * terms[1])
    terms = (sums[0] / m, sums[1] / (var + eps) / m)                     :func:`normalize_terms`

zeros where statistics are constants

(Ioffe and Szegedy, arXiv 1502.03167, section 3). These are the specification of the compiled
operators of the same names, and run where a backend has none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seaattn_kernels import reference
from seaattn_kernels.reference import activate

_MAP = (0, 2, 3)


def layout_of(y: Tensor) -> torch.memory_format:
    """Of what is made of a map: channels_last where the channels of ``y``, whole or a slice of a
    channels_last map, lie beside another; contiguous otherwise."""
    pixels = y.stride(1) == 1 and not y.is_contiguous()
    return torch.channels_last if pixels else torch.contiguous_format


def _like(out: Tensor, y: Tensor) -> Tensor:
    return out.contiguous(memory_format=layout_of(y))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, sums and affines beside maps of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def axial_moments(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel, mean deviations along W and along H.

    -> ``(C,), (C,), (B, C, H), (B, C, W)``. Deviations are from the mean itself: one pass over
    squares would cancel where the mean is large, and so would an axial mean less the mean.
    """
    mean = _mean(y)
    deviation = y.to(mean.dtype) - mean[:, None, None]
    return mean, deviation.square().sum(_MAP), deviation.mean(3), deviation.mean(2)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of :func:`axial_moments`."""
    mean = _mean(y)
    return mean, (y.to(mean.dtype) - mean[:, None, None]).square().sum(_MAP)


def _mean(y: Tensor) -> Tensor:
    """Of each channel, to the last bit: the sum of a map rounds at its own size."""
    mean = y.mean(_MAP, dtype=wide(y.dtype))
    return mean + (y.to(mean.dtype) - mean[:, None, None]).mean(_MAP)


def normalize_affine(
    mean: Tensor,
    deviations: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The affine of a BatchNorm from the moments of ``count`` values a channel.

    -> ``(3, C), (C,), (C,)``: mean, scale, shift; ``1/sqrt(var + eps)``; the unbiased variance.
    """
    inverse = (deviations / count + eps).rsqrt()
    scale = inverse if weight is None else inverse * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return torch.stack([mean, scale, shift]), inverse, deviations / (count - 1)


def normalize_terms(sums: Tensor, inverse: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """The terms of a BatchNorm by the statistics of ``count`` values, and gamma's gradient.

    ``inverse``: of :func:`normalize_affine`; -> ``(2, C), (C,)``.
    """
    factor = sums[1] * inverse
    return (torch.stack([sums[0], factor * inverse]) / count).to(sums.dtype), factor


def normalize(
    y: Tensor,
    affine: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """``act(n(y) + row[..., :, None] + column[..., None, :])``; row and column both or neither."""
    mean, scale, shift = affine[..., None, None]
    n = ((y.to(affine.dtype) - mean) * scale + shift).to(y.dtype)
    if row is not None and column is not None:
        n = n + (row[..., :, None] + column[..., None, :]).to(n.dtype)
    return _like(activate(n, activation, negative_slope), y)


def _through_activation(gradient: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """``gradient * act'(z)``, by PyTorch's own backwards: zero at a bound of ReLU and ReLU6."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, z, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(gradient, z, 0.0, 6.0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(gradient, z, slope, False)
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, z)
    return gradient


def _before_activation(
    gradient: Tensor, y: Tensor, affine: Tensor, activation: str, negative_slope: float
) -> Tensor:
    if activation == "identity":
        return gradient
    n = normalize(y, affine, None, None, "identity", 0.0)
    return _through_activation(gradient, n, activation, negative_slope)


def _add_axes(g: Tensor, affine: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    if row is None or column is None:
        return g
    return g.to(affine.dtype) + (row[..., :, None] + column[..., None, :])


def _sums(g: Tensor, y: Tensor, affine: Tensor) -> Tensor:
    g = g.to(affine.dtype)
    deviation = y.to(affine.dtype) - affine[0, :, None, None]
    return torch.stack([g.sum(_MAP), (g * deviation).sum(_MAP)])


def _to_raw(g: Tensor, y: Tensor, affine: Tensor, terms: Tensor) -> Tensor:
    """``dy`` from ``g``."""
    mean, scale = (t[:, None, None] for t in affine[:2])
    offset, factor = (t[:, None, None] for t in terms)
    dy = scale * (g.to(affine.dtype) - offset - (y.to(affine.dtype) - mean) * factor)
    return _like(dy.to(y.dtype), y)


def normalize_sums(
    gradient: Tensor,
    y: Tensor,
    affine: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The sums of ``g = gradient * act'(n(y)) + row[..., :, None] + column[..., None, :]``.

    ``(2, C)``; row and column, both or neither and only beside "identity", in the dtype of the
    affine.
    """
    g = _before_activation(gradient, y, affine, activation, negative_slope)
    return _sums(_add_axes(g, affine, row, column), y, affine)


def normalize_backward(
    gradient: Tensor,
    y: Tensor,
    affine: Tensor,
    terms: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """``dy`` of the ``g`` of :func:`normalize_sums`."""
    g = _before_activation(gradient, y, affine, activation, negative_slope)
    return _to_raw(_add_axes(g, affine, row, column), y, affine, terms)


def normalize_add_backward(
    gradient: Tensor,
    y: Tensor,
    affine: Tensor,
    row: Tensor,
    column: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`normalize` with a row and a column: gradients of ``n(y)``, row and column.

    The latter two in the dtype of the affine.
    """
    z = normalize(y, affine, row, column, "identity", 0.0)
    g = _like(_through_activation(gradient, z, activation, negative_slope), y)
    return g, g.sum(3, dtype=affine.dtype), g.sum(2, dtype=affine.dtype)


def normalize_gate(x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor, hard: bool) -> Tensor:
    """``h_sigmoid(n(x)) * n(y)``, or the true sigmoid; in the layout of x."""
    return _like(reference.gate(*_both(x, y, x_affine, y_affine), hard), x)


def _both(x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor) -> tuple[Tensor, Tensor]:
    return (
        normalize(x, x_affine, None, None, "identity", 0.0),
        normalize(y, y_affine, None, None, "identity", 0.0),
    )


def _through_gate(
    gradient: Tensor, x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of ``n(x)`` and of ``n(y)``."""
    x, y = _both(x, y, x_affine, y_affine)
    if hard:
        inner = torch.ops.aten.hardtanh_backward(gradient * y, x, -3.0, 3.0) / 6
        return inner, gradient * (F.relu6(x + 3) / 6)
    weight = x.sigmoid()
    return torch.ops.aten.sigmoid_backward(gradient * y, weight), gradient * weight


def normalize_gate_sums(
    gradient: Tensor, x: Tensor, y: Tensor, x_affine: Tensor, y_affine: Tensor, hard: bool
) -> tuple[Tensor, Tensor]:
    """The sums of the gradients of ``n(x)`` and of ``n(y)``: ``(2, C)`` each."""
    gx, gy = _through_gate(gradient, x, y, x_affine, y_affine, hard)
    return _sums(gx, x, x_affine), _sums(gy, y, y_affine)


def normalize_gate_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    x_affine: Tensor,
    y_affine: Tensor,
    x_terms: Tensor,
    y_terms: Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dy``."""
    gx, gy = _through_gate(gradient, x, y, x_affine, y_affine, hard)
    return _to_raw(gx, x, x_affine, x_terms), _to_raw(gy, y, y_affine, y_terms)


def depthwise(y: Tensor, affine: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of each channel of ``n(y)``, which is 0 outside of the map.

    ``weight: (C, 1, 3, 3)``.
    """
    n = normalize(y, affine, None, None, "identity", 0.0)
    return _like(F.conv2d(n, weight, bias, padding=1, groups=weight.shape[0]), y)


def depthwise_backward(
    gradient: Tensor, y: Tensor, affine: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``n(y)`` and of the weight."""
    n = normalize(y, affine, None, None, "identity", 0.0)
    channels = weight.shape[0]
    dn, dweight, _ = torch.ops.aten.convolution_backward(
        gradient, n, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], channels,
        [True, True, False],
    )  # fmt: skip
    return _like(dn, y), dweight
