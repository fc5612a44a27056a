"""The limit that every time is held against, measured in the run it stands in.

Of a block on a CPU it is the *product time*: the block's own matrix products, each alone by
``torch.mm`` in the better of two layouts. A library with a better kernel for such shapes can beat
it. Of everything else it is the roofline: the larger of FLOP / the rate of a large matrix product
and bytes / the bandwidth of a large copy, on a GPU plus one launch of a kernel that does next to
nothing. Tensors that stay in a cache from call to call can beat that.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from bench.cases import Case
from bench.timing import Timing

#: Large enough for the full rate of a device, and for a copy to leave its caches behind.
_MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}


class Ceilings(NamedTuple):
    """Rates that no kernel exceeds: FLOP/s of a large product, bytes/s of a copy; a launch."""

    flops: float
    bandwidth: float
    launch: float


class Limit(NamedTuple):
    """Seconds of the limit, and the ceilings of the same run."""

    seconds: float
    ceilings: Ceilings


def products(
    case: Case, height: int, width: int, batch: int, step: bool = False
) -> Counter[tuple[int, int, int]]:
    """``(M, K, N)`` of the products ``(M, K) @ (K, N)`` of a block, the batch folded into N.

    A training ``step`` has two more of each: those of the gradients of map and weights.
    """
    c, projected, values = case.channels, case.projected, case.values
    pixels, lines = batch * height * width, batch * (height + width)
    forward = Counter(
        [
            (projected, c, pixels),
            (c, projected, pixels),
            (c, values, pixels),
            (values, values, batch * height),
            (values, values, batch * width),
            (projected, c, lines),
        ]
    )
    if not step:
        return forward
    found = Counter(forward)
    for (m, k, n), count in forward.items():
        found[k, m, n] += count
        found[m, n, k] += count
    return found


class Roofline:
    """``calls`` go into the timing loop, :meth:`read` takes their timings out of it."""

    def __init__(self, flops: int, moved: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flops, self._bytes, self._device = flops, moved, device
        side, size = _MATRIX_SIDE[device.type], _COPY_BYTES[device.type]
        # On a CPU always in float32: half precision has no fast product on most of them.
        square = torch.randn(side, side, device=device)
        square = square.to(dtype if device.type == "cuda" else torch.float32)
        source = torch.empty(size, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        self.calls: dict[str, Callable[[], object]] = {
            "matrix": _as_convolutions(_product(square, square)),
            "copy": lambda: target.copy_(source),
        }
        if device.type == "cuda":
            self.calls["launch"] = torch.empty(1, device=device).zero_

    def read(self, timings: Mapping[str, Timing]) -> Limit:
        ceilings = self._ceilings(timings)
        work = max(self._flops / ceilings.flops, self._bytes / ceilings.bandwidth)
        return Limit(work + ceilings.launch, ceilings)

    def _ceilings(self, timings: Mapping[str, Timing]) -> Ceilings:
        return Ceilings(
            2 * _MATRIX_SIDE[self._device.type] ** 3 / timings["matrix"].median,
            2 * _COPY_BYTES[self._device.type] / timings["copy"].median,
            timings["launch"].median if "launch" in timings else 0.0,
        )


class ProductTime(Roofline):
    """The limit of a block on a CPU."""

    def __init__(self, listed: Counter[tuple[int, int, int]], dtype: torch.dtype) -> None:
        super().__init__(0, 0, dtype, torch.device("cpu"))
        self.products = listed
        for m, k, n in listed:
            weights, maps = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            name = f"{m}x{k}x{n}"
            self.calls[f"{name} weights @ map"] = _product(weights, maps)
            self.calls[f"{name} map^T @ weights^T"] = _product(maps.t().contiguous(), weights.t())

    def read(self, timings: Mapping[str, Timing]) -> Limit:
        layouts = ("weights @ map", "map^T @ weights^T")
        seconds = sum(
            times * min(timings[f"{m}x{k}x{n} {layout}"].median for layout in layouts)
            for (m, k, n), times in self.products.items()
        )
        return Limit(seconds, self._ceilings(timings))


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


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    out = a.new_empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)
