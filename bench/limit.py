"""The limit that every time is held against, measured in the run it stands in.

On a CPU it is the *product time*: the block's own matrix products, each alone by ``torch.mm`` in
the better of two layouts. On a GPU it is the larger of FLOP / matrix rate and bytes / copy
bandwidth, plus one launch of a kernel that does next to nothing. A library with a better kernel for
such shapes than ``torch.mm`` can beat the product time.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from bench.cases import Case
from bench.timing import Timing

SGEMM_SIDE = 1024
#: Large enough for the full rate of a GPU, and for a copy to leave its caches behind.
GPU_MATRIX_SIDE = 8192
GPU_COPY_BYTES = 2**30


class Limit(NamedTuple):
    """Seconds of the limit; the GFLOP/s it means, and of a large matrix product beside it."""

    seconds: float
    gflops: float
    matrix_gflops: float


def products(case: Case, height: int, width: int, batch: int) -> Counter[tuple[int, int, int]]:
    """``(M, K, N)`` of the products ``(M, K) @ (K, N)`` of a block, the batch folded into N."""
    c, projected, values = case.channels, case.projected, case.values
    pixels, lines = batch * height * width, batch * (height + width)
    return Counter(
        [
            (projected, c, pixels),
            (c, projected, pixels),
            (c, values, pixels),
            (values, values, batch * height),
            (values, values, batch * width),
            (projected, c, lines),
        ]
    )


class ProductTime:
    """The limit on a CPU: ``calls`` go into the timing loop, :meth:`read` takes its timings."""

    def __init__(self, case: Case, height: int, width: int, batch: int, dtype: torch.dtype) -> None:
        self.products = products(case, height, width, batch)
        self.calls: dict[str, Callable[[], object]] = {}
        for m, k, n in self.products:
            weights, maps = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            name = f"{m}x{k}x{n}"
            self.calls[f"{name} weights @ map"] = _product(weights, maps)
            self.calls[f"{name} map^T @ weights^T"] = _product(maps.t().contiguous(), weights.t())
        square = torch.randn(SGEMM_SIDE, SGEMM_SIDE)
        self.calls["sgemm"] = _product(square, square)

    def read(self, timings: Mapping[str, Timing]) -> Limit:
        seconds = flops = 0.0
        for (m, k, n), times in self.products.items():
            name = f"{m}x{k}x{n}"
            layouts = ("weights @ map", "map^T @ weights^T")
            seconds += times * min(timings[f"{name} {layout}"].median for layout in layouts)
            flops += times * 2 * m * k * n
        sgemm = 2 * SGEMM_SIDE**3 / timings["sgemm"].median
        return Limit(seconds, flops / seconds / 1e9, sgemm / 1e9)


class Roofline:
    """The limit on a GPU, with the two methods of :class:`ProductTime`."""

    def __init__(
        self,
        case: Case,
        height: int,
        width: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.flops = case.flops(height, width, batch)
        self.bytes = case.fewest_bytes(height, width, batch, dtype.itemsize)
        side = GPU_MATRIX_SIDE
        square = torch.randn(side, side, device=device, dtype=dtype)
        source = torch.empty(GPU_COPY_BYTES, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        one = torch.empty(1, device=device)
        self.calls: dict[str, Callable[[], object]] = {
            "matrix": _as_convolutions(_product(square, square)),
            "copy": lambda: target.copy_(source),
            "launch": one.zero_,
        }

    def read(self, timings: Mapping[str, Timing]) -> Limit:
        rate = 2 * GPU_MATRIX_SIDE**3 / timings["matrix"].median
        bandwidth = 2 * GPU_COPY_BYTES / timings["copy"].median
        work = max(self.flops / rate, self.bytes / bandwidth)
        seconds = work + timings["launch"].median
        return Limit(seconds, self.flops / seconds / 1e9, rate / 1e9)


def _as_convolutions(product: Callable[[], object]) -> Callable[[], object]:
    """In the precision that convolutions have: TF32 of float32, unless its switch is off."""

    def call() -> object:
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
        matmul.fp32_precision = "tf32" if allowed else "ieee"
        try:
            return product()
        finally:
            matmul.fp32_precision = before

    return call


def limit_of(
    case: Case, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
) -> ProductTime | Roofline:
    if device.type == "cuda":
        return Roofline(case, height, width, batch, dtype, device)
    return ProductTime(case, height, width, batch, dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    out = a.new_empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)
