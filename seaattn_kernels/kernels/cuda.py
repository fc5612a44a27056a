"""The kernels of csrc/cuda, compiled by nvcc ahead of time, for compute capability 9.0.

    axis     attend and encode of the block in one launch, a cluster of thread blocks an image
    finish   its last launch: the depthwise stage from shared memory, the products on the matrix
             units meanwhile

For float16 and bfloat16 alone, and activations that clamp. Sizes of tiles are chosen by what a tile
took on an H200.
"""

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from seaattn_kernels.kernels.launch import Handle, cdiv, multiprocessors, note
from seaattn_kernels.kernels.tile_costs import FIXED_US, JOB_US

_BINARIES = Path(__file__).parent.parent / "cuda"
_KIND = {torch.float16: "f16", torch.bfloat16: "bf16"}
#: What ``min(max(z, 0), most)`` is, by the codes of ``reference.ACTIVATIONS``: relu and relu6.
_MOST = {1: float("inf"), 2: 6.0}
_TYPES = {
    "*": ctypes.c_void_p,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}


@cache
def _function(binary: str, name: str, device: int) -> int:
    """The handle of an entry, with as much shared memory as the device gives. ``device``: it is
    current, and functions belong to it."""
    image = (_BINARIES / f"{binary}.fatbin").read_bytes()
    # Above 48 KiB the loader raises the bound to what the device has.
    return driver.active.utils.load_binary(name, image, 1 << 16, device)[1]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch(
    binary: str, name: str, grid: tuple[int, int, int], threads: int, shared: int, kinds: str,
    *arguments: Tensor | float,
) -> None:  # fmt: skip
    """Run an entry on the device of the first argument, on its current stream.

    ``kinds``: of each argument, as Triton names them; ``shared``: bytes of shared memory.
    """
    device = arguments[0].device
    if any(isinstance(given, Tensor) and given.data_ptr() % 16 for given in arguments):
        raise RuntimeError(f"{name} needs memory that begins at multiples of 16 bytes")
    with torch.cuda.device(device):
        function = _function(binary, name, device.index)
        handle = Handle(function, threads, shared, tuple(kinds.split()))
        values = [
            _TYPES[kind](argument.data_ptr() if kind == "*" else argument)
            for argument, kind in zip(arguments, handle.kinds, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = _driver().cuLaunchKernel(
            ctypes.c_void_p(function), *grid, threads, 1, 1, shared, stream, pointers, None
        )
    if code:
        raise RuntimeError(f"{name} did not launch: CUDA error {code}")
    note(handle, grid, arguments)


# --- axis ------------------------------------------------------------------------------------

#: D, E and heads of the entries, and the longest axis that they take. They win at that length too:
#: 25 us for a map of 64x64 of B1, where squeeze, attend and encode took 32.
_HEADS = {(16, 32): (4, 6, 8), (24, 48): (4, 6, 8), (20, 40): (8,)}
LONGEST_AXIS = 64


def has_axis(heads: int, key_dim: int, value_dim: int) -> bool:
    """Whether :func:`axis` has an entry for such heads."""
    return heads in _HEADS.get((key_dim, value_dim), ())


def axis_shared(h: int, w: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Bytes of shared memory: ``Layout`` of csrc/cuda/axis.cu."""

    def up(n: int, size: int) -> int:
        return cdiv(n, size) * size

    channels = 2 * key_dim + value_dim
    groups = {(16, 32): 1, (24, 48): 2, (20, 40): 3}[key_dim, value_dim]
    blocks = 0 if w <= 16 else 1 if w <= 32 else 2
    bands = max(0, 4 - groups - blocks)
    pitch = up(heads * value_dim, 32)
    pitch += 0 if pitch // 32 % 2 else 32
    vectors = (up(h, 4) + up(w, 4)) * (channels + 4)
    scores = 64 * (up(max(h, w), 4) + 4)
    sums = ((h << blocks) + (w << bands)) * channels
    return max(4 * (vectors + scores + sums), 2 * (h + up(w, 16)) * pitch)


def axis(
    qkv: Tensor, size: tuple[int, int, int], position: Tensor, encode_weight: Tensor,
    encode_bias: Tensor, heads: int, key_dim: int, activation: int, attended: Tensor,
    encoded: Tensor,
) -> None:  # fmt: skip
    """``encoded`` from the projected map, both as in ``block``; ``size``: B, H, W."""
    b, h, w = size
    value_dim = encode_weight.shape[1] // heads
    name = f"axis_{_KIND[qkv.dtype]}_{key_dim}_{value_dim}_{heads}"
    launch(
        "axis", name, (b * heads, 1, 1), 256, axis_shared(h, w, heads, key_dim, value_dim),
        "* * * * * * i32 i32 i32 fp32",
        qkv, position, encode_weight, encode_bias, attended, encoded, b, h, w, _MOST[activation],
    )  # fmt: skip


# --- finish ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows of 8 pixels and columns that a thread block owns, and the blocks that share its jobs.

    ``resident``: blocks that a multiprocessor holds.
    """

    rows: int
    columns: int
    parts: int
    resident: int

    def jobs(self, projected: int, values: int) -> int:
        """Of a block: chunks of 64 channels."""
        return cdiv(cdiv(projected, 64) + cdiv(values, 64), self.parts)

    def blocks(self, b: int, h: int, w: int, c: int) -> int:
        return b * cdiv(h, self.rows) * cdiv(w, 8) * cdiv(c, self.columns) * self.parts

    @property
    def shared(self) -> int:
        """Bytes of shared memory: ``Layout`` of csrc/cuda/finish.cu."""
        stages, pixels = 2 if self.parts > 1 else 3, 8 * self.rows
        stage = 128 * (16 * (self.rows + 2) + self.columns) + 2560
        sums = 8 * self.columns * (pixels + 4) if self.parts > 1 else 0
        return stages * stage + 256 * pixels + 8 * self.columns + 128 + sums + 1024


TILES = (
    Tile(8, 64, 8, 2), Tile(8, 64, 4, 2), Tile(8, 64, 1, 2), Tile(8, 128, 1, 1),
    Tile(8, 192, 1, 1), Tile(8, 256, 1, 1), Tile(16, 128, 1, 1), Tile(16, 192, 1, 1),
)  # fmt: skip


def tiles(projected: int) -> list[Tile]:
    """Those of which every part has a job of the whole map."""
    return [tile for tile in TILES if cdiv(projected, 64) >= tile.parts]


@lru_cache(1024)
def finish_tile(
    b: int, h: int, w: int, c: int, projected: int, values: int, processors: int
) -> Tile:
    """The tile that is predicted to take the least time."""

    def microseconds(tile: Tile) -> float:
        blocks = tile.blocks(b, h, w, c)
        # Two on a multiprocessor take half as long again as one.
        waves = cdiv(blocks, tile.resident * processors)
        waves *= 1.5 if tile.resident > 1 and blocks > processors else 1
        return waves * (FIXED_US + tile.jobs(projected, values) * JOB_US[tile[:2]])

    return min(tiles(projected), key=microseconds)


def finish(
    qkv: Tensor, encoded: Tensor, weight: Tensor, depthwise: Tensor, pw_bias: Tensor,
    proj_bias: Tensor, values: int, activation: int, hard: bool, out: Tensor,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """The result from the projected map and the encoded axes, both as in ``block``.

    ``weight``, ``depthwise``: of ``fold.ChunkedWeights``.
    """
    b, c, h, w = out.shape
    projected = qkv.numel() // (b * h * w)
    tile = tile or finish_tile(b, h, w, c, projected, values, multiprocessors(qkv.device))
    if tile not in tiles(projected):
        raise ValueError(f"{tile} has more parts than {projected} channels have chunks")
    name = f"finish_{_KIND[qkv.dtype]}_{tile.rows}_{tile.columns}_{tile.parts}"
    grid = (b, cdiv(h, tile.rows) * cdiv(w, 8), cdiv(c, tile.columns) * tile.parts)
    pixel = out.stride(3) if w > 1 else out.stride(2)
    launch(
        "finish", name, grid, 384, tile.shared,
        "* * * * * * * i32 i32 i32 i32 i32 i32 i64 i64 i64 fp32 i32",
        qkv, encoded, weight, depthwise, pw_bias, proj_bias, out,
        h, w, c, projected, values, b * h, out.stride(0), out.stride(1), pixel,
        _MOST[activation], int(hard),
    )  # fmt: skip
