"""What the Triton kernels need on GPUs that are not here: compiled for each, read from the binary.

The launchers run on tensors without memory, before a driver that names the target and launches
nothing, so that what is compiled is what they choose there: block sizes, warps, precision of
products, alignment. Triton's cache on disk keeps the binaries by their content.

    resident    programs that a multiprocessor holds, bound by registers, shared memory, warps
    occupancy   their warps over the most that it holds
    bytes       every tensor of the launch once
    predicted   the larger of FLOP / rate and bytes / bandwidth, by the data sheet of one card of
                the target; a launch comes on top

It fails where a kernel does not compile, needs more shared memory than the target has, or spills
registers on compute capability 8.0 and later.
"""

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from bench.cases import CASES
from seaattn_kernels.kernels import (
    axial_attention,
    block,
    broadcast_add,
    depthwise,
    gate,
    launch,
    normalize,
    squeeze,
)
from seaattn_kernels.reference import ACTIVATIONS, is_channels_last

_MODULES = (squeeze, axial_attention, broadcast_add, gate, normalize, depthwise, block)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_KIB = 1024


@dataclass(frozen=True)
class Target:
    """What a program may use on a multiprocessor, and the data sheet of one card."""

    name: str
    card: str
    triton: GPUTarget
    processors: int  # of the card
    warps: int  # resident at most
    programs: int  # resident at most
    shared: int  # bytes, of all resident programs
    shared_program: int  # bytes, of one
    gbytes: float  # GB/s of memory
    tflops: float  # outside the matrix units, float32
    tf32: float  # TFLOP/s of dense TF32 products; without such units the same as tflops
    half: float  # TFLOP/s of dense float16 products

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.triton.arch, 10) if self.triton.backend == "cuda" else (0, 0)

    @property
    def strict(self) -> bool:
        """Whether a spill is a failure."""
        return self.capability >= (8, 0)


def _nvidia(arch: int, card: str, *limits: float) -> Target:
    return Target(f"sm_{arch}", card, GPUTarget("cuda", arch, 32), *limits)


# Resident warps, programs and shared memory: CUDA C++ Programming Guide, "Technical specifications
# per compute capability"; CDNA 3 ISA. Rates and bandwidth: the cards' data sheets.
TARGETS = {
    target.name: target
    for target in (
        _nvidia(75, "T4", 40, 32, 16, 64 * _KIB, 64 * _KIB, 320, 8.1, 8.1, 65),
        _nvidia(80, "A100 40GB", 108, 64, 32, 164 * _KIB, 163 * _KIB, 1555, 19.5, 156, 312),
        _nvidia(89, "L4", 58, 48, 24, 100 * _KIB, 99 * _KIB, 300, 30.3, 60, 121),
        _nvidia(90, "H200", 132, 64, 32, 228 * _KIB, 227 * _KIB, 4800, 67, 494, 989),
        _nvidia(100, "B200", 148, 64, 32, 228 * _KIB, 227 * _KIB, 8000, 75, 1125, 2250),
        _nvidia(120, "RTX 5090", 170, 48, 24, 100 * _KIB, 99 * _KIB, 1792, 104.8, 104.8, 209.5),
        Target(
            "gfx942", "MI300X", GPUTarget("hip", "gfx942", 64),
            304, 32, 32, 64 * _KIB, 64 * _KIB, 5300, 163.4, 653.7, 1307.4,
        ),
    )
}  # fmt: skip
FULL = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher called it: ``data`` is Triton's own description of it."""

    kernel: str
    target: str
    data: str
    configuration: str
    example: str
    flops: int
    bytes: int
    programs: int
    rate: str  # what of a target its products run at


@dataclass
class Binary:
    """A kernel compiled: what the binary needs, and what is wrong with it."""

    kernel: str
    configuration: str
    target: str
    registers: int = 0
    spill_bytes: int = 0
    wrong: str = ""


@dataclass
class Row(Binary):
    """A launch compiled: with what comes of its size."""

    shared: int = 0
    resident: int = 0
    occupancy: float = 0.0
    example: str = ""
    flops: int = 0
    bytes: int = 0
    predicted_us: float = 0.0


# --- the launches ----------------------------------------------------------------------------


class _Driver:
    """As much of Triton's driver as choosing and compiling a kernel takes."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> int:
        # Triton keeps what belongs to a target under the number of the device.
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.triton


def _kernels() -> Iterator[JITFunction]:
    for module in _MODULES:
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.module == module.__name__:
                yield value


@contextmanager
def recorded(target: Target, found: Callable[[Launch], None], example: list[str]) -> Iterator[None]:
    """Launches within are given to ``found`` and neither compiled nor run."""
    arguments: list = []
    programs = [0]

    def before(*values, **_) -> None:
        arguments[:] = values

    def counted(kernel: JITFunction, count: int, *values, **constants) -> None:
        programs[0] = count
        launch.launch(kernel, count, *values, **constants)

    def compiling(*, fn, compile, **_) -> bool:
        data = compile["specialization_data"]
        kernel = fn.jit_function
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {kernel.arg_names[at]: value for (at,), value in compile["constants"].items()}
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        launched = Launch(
            kernel=fn.name,
            target=target.name,
            data=data,
            configuration=_configuration(kernel, compile),
            example=example[0],
            flops=_FLOPS[fn.name](values) if fn.name in _FLOPS else 0,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            programs=programs[0],
            rate=_rate(fn.name, values, tensors[0].dtype),
        )
        found(launched)
        return True  # compiled already, as far as this call goes

    driver.set_active(_Driver(target))
    for kernel in _kernels():
        kernel.pre_run_hooks.append(before)
    knobs.runtime.jit_cache_hook = compiling
    try:
        with ExitStack() as stack:
            patch = partial(mock.patch.object, return_value=target.capability)
            stack.enter_context(patch(launch, "capability"))
            patch = partial(mock.patch.object, return_value=target.processors)
            for module in (squeeze, normalize, depthwise, block):
                stack.enter_context(patch(module, "multiprocessors"))
            for module in _MODULES:
                stack.enter_context(mock.patch.object(module, "launch", counted))
            yield
    finally:
        knobs.runtime.jit_cache_hook = None
        for kernel in _kernels():
            kernel.pre_run_hooks.remove(before)


def _configuration(kernel: JITFunction, compile: dict) -> str:
    """Everything that is compiled in: the type, the constants (strides of 1 too), how many
    arguments are multiples of 16."""
    types = [str(kind) for kind in compile["signature"].values()]
    words = [next(kind[1:] for kind in types if kind.startswith("*"))]
    words += [f"{kernel.arg_names[at]}={value}" for (at,), value in compile["constants"].items()]
    aligned = sum(bool(attributes) for attributes in compile["configs"][0].values())
    return " ".join([*words, f"{compile['num_warps']} warps", f"{aligned} aligned"])


def _rate(kernel: str, values: dict, dtype: torch.dtype) -> str:
    """The field of :class:`Target` that bounds the products of a launch."""
    precision = values.get("PRECISION", "ieee")
    if kernel in _OF_MAPS and dtype.itemsize == 2:
        return "half"
    return {"tf32": "tf32", "tf32x3": "tf32x3"}.get(precision, "tflops")


def _pairs(values: dict) -> int:
    """Pairs of a query and a key of all images and heads, on both axes."""
    return values["row_ptr"].shape[0] * values["heads"] * (values["H"] ** 2 + values["W"] ** 2)


def _table_flops(values: dict) -> int:
    lengths = (values["row_q_len"] + values["row_k_len"]) * values["H"]
    lengths += (values["column_q_len"] + values["column_k_len"]) * values["W"]
    return values["width"] * (2 * lengths + values["B"] * 2 * (values["H"] + values["W"]))


def _attend_flops(values: dict) -> int:
    d, e, h, w = (values[name] for name in ("D", "E", "H", "W"))
    images = values["rows"] // h
    return 2 * images * values["heads"] * (d + e) * (h * h + w * w)


def _finish_flops(values: dict) -> int:
    """The depthwise stage once for each block of channels of the result."""
    c, n = values["C"], values["N"]
    again = triton.cdiv(c, values["BLOCK_N"])
    return 2 * values["B"] * values["image"] * (9 * n * again + n * c + values["VALUES"] * c)


#: The products of maps, whose factors are in the dtype of the map.
_OF_MAPS = ("project_kernel", "encode_kernel", "finish_kernel")
#: Two for a multiply-add of the products; the rest is far below the bytes.
_FLOPS: dict[str, Callable[[dict], int]] = {
    "attention_kernel": lambda v: 2 * _pairs(v) * (v["D"] + v["E"]),
    "statistics_kernel": lambda v: 2 * _pairs(v) * (v["D"] + v["E"]),
    "attention_backward_kernel": lambda v: 2 * _pairs(v) * (4 * v["D"] + 3 * v["E"]),
    "tables_kernel": _table_flops,
    "project_kernel": lambda v: 2 * v["B"] * v["image"] * v["C"] * v["N"],
    "attend_kernel": _attend_flops,
    "encode_kernel": lambda v: 2 * (v["rows"] + v["columns"]) * v["N"] ** 2,
    "finish_kernel": _finish_flops,
}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_B1, _YOLO = CASES["B1"], CASES["YOLOv8s-P3"]


def _layouts(b: int, c: int, h: int, w: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A map as models hold it, and a view into a larger one that is aligned to nothing."""
    return {
        "NCHW": _empty(b, c, h, w, dtype=dtype),
        "NHWC": _empty(b, h, w, c, dtype=dtype).permute(0, 3, 1, 2),
        "view": _empty(b, c + 1, h + 1, w + 1, dtype=dtype)[:, 1:, 1:, 1:],
    }


def _operators_of_a_map(x: Tensor, activations: Iterable[int]) -> None:
    row, column = squeeze.axial_squeeze(x)
    channels_last = x.stride(1) == 1
    squeeze.axial_squeeze_backward(row, column, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=layout)
    for activation in activations:
        broadcast_add.broadcast_add(x, row, column, activation, 0.1, out)
        broadcast_add.broadcast_add_backward(x, x, row, column, activation, 0.1, out)
    for hard in (True, False):
        gate.gate(out, out, hard)
        gate.gate_backward(out, out, out, hard)


def _stages_of_a_map(y: Tensor, activations: Iterable[int]) -> None:
    """What a training pass does to a raw map, with gradients in its layout."""
    b, c, h, w = y.shape
    affine, terms, weight = _empty(3, c), _empty(2, c), _empty(c, 1, 3, 3, dtype=y.dtype)
    layout = torch.channels_last if y.stride(1) == 1 else torch.contiguous_format
    out = torch.empty(y.shape, dtype=y.dtype, device="meta", memory_format=layout)
    row, column = _empty(b, c, h, dtype=y.dtype), _empty(b, c, w, dtype=y.dtype)
    sums = _empty(b, c, h), _empty(b, c, w)
    normalize.moments(y)
    normalize.axial_moments(y)
    vector = _empty(c)
    for of_norm in (None, vector):
        normalize.normalize_affine(vector, vector, of_norm, of_norm, b * h * w, 1e-5)
    normalize.normalize_terms(terms, vector, b * h * w)
    for activation in activations:
        normalize.normalize(y, affine, None, None, activation, 0.1, out)
        normalize.normalize(y, affine, row, column, activation, 0.1, out)
        normalize.normalize_sums(out, y, affine, None, None, activation, 0.1)
        normalize.normalize_backward(out, y, affine, terms, None, None, activation, 0.1, out)
        normalize.normalize_add_backward(out, y, affine, row, column, activation, 0.1, out)
    normalize.normalize_sums(out, y, affine, *sums, _IDENTITY, 0.0)
    normalize.normalize_backward(out, y, affine, terms, *sums, _IDENTITY, 0.0, out)
    for hard in (True, False):
        normalize.normalize_gate(y, y, affine, affine, hard, out)
        normalize.normalize_gate_sums(out, y, y, affine, affine, hard)
        normalize.normalize_gate_backward(out, y, y, affine, affine, terms, terms, hard, out, out)
    for bias in (None, _empty(c, dtype=y.dtype)):
        depthwise.depthwise(y, affine, weight, bias, out)
    depthwise.depthwise_backward(out, y, affine, weight, out)


def _operators_of_an_axis(
    b: int, heads: int, d: int, e: int, h: int, w: int, dtype: torch.dtype
) -> None:
    row, column = (_empty(b, heads * (2 * d + e), n, dtype=dtype) for n in (h, w))
    tables = [_empty(1, heads * d, 16, dtype=dtype)] * 4
    out = axial_attention.axial_attention_pair(row, column, tables, heads, d, d**-0.5)
    axial_attention.axial_attention_pair_backward(*out, row, column, tables, heads, d, d**-0.5)


def packed_weights(
    c: int, heads: int, d: int, e: int, h: int, w: int, dtype: torch.dtype
) -> list[Tensor]:
    """The fields of ``fold.PackedWeights``, without memory."""
    keys, values = heads * d, heads * e
    projected, channels, pitch = (-(-n // 16) * 16 for n in (2 * keys + values, c, values))
    return [
        _empty(projected, channels, dtype=dtype), _empty(projected),
        _empty(9, projected), _empty(projected),
        _empty(c, projected, dtype=dtype), _empty(c),
        _empty(2, values, pitch, dtype=dtype), _empty(2, values),
        _empty(c, pitch, dtype=dtype), _empty(c),
        _empty(h + w, 2 * keys),
    ]  # fmt: skip


def whole_block(
    x: Tensor, heads: int, d: int, e: int, activation: int = 2, hard: bool = True
) -> None:
    """The launches of a block of this map."""
    (_, c, h, w), dtype = x.shape, x.dtype
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    out = torch.empty(x.shape, dtype=dtype, device="meta", memory_format=layout)
    weights = packed_weights(c, heads, d, e, h, w, dtype)
    block.sea_attention(x, weights, heads, d, activation, 0.1, hard, out)


#: Sides that reach every tile of a map, and the heads that were seen in models.
_SIDES = (1, 7, 8, 14, 16, 20, 32, 40, 64, 80, 128, 256, 300)
_HEADS = ((16, 32), (2, 4), (10, 20), (16, 16), (16, 64), (20, 40), (24, 48), (32, 64), (64, 128))
_IDENTITY, _RELU6 = (ACTIVATIONS.index(name) for name in ("identity", "relu6"))
#: Maps that take each way to the axis vectors, with each block of an axis, and maps of odd sizes.
_MAPS = ((1, 16, 16), (1, 32, 32), (16, 40, 40), (1, 7, 7), (1, 20, 20), (1, 100, 3), (1, 1, 1))
_MAPS += ((1, 300, 300), (2, 1024, 1024), (1, 64, 128))
#: Of latency and of throughput.
BATCHES = (1, 64)


def _examples(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launchers, the usual ones first."""
    b1, yolo = (_B1.projected, 32, 32), (_YOLO.values, 80, 80)
    for dtype, (c, h, w) in itertools.product(dtypes, (b1, yolo)):
        for layout, x in _layouts(16, c, h, w, dtype).items():
            yield f"16x{c}x{h}x{w} {layout}", partial(_operators_of_a_map, x, [_RELU6])
            yield f"16x{c}x{h}x{w} {layout}", partial(_stages_of_a_map, x, [_RELU6])
    for dtype, (d, e) in itertools.product(dtypes, _HEADS):
        yield (
            "16 images, 8 heads, 32x32",
            partial(_operators_of_an_axis, 16, 8, d, e, 32, 32, dtype),
        )
    yield from _examples_of_blocks(dtypes)
    for dtype, h, w in itertools.product(dtypes, _SIDES, _SIDES):
        for layout, x in _layouts(16, 128, h, w, dtype).items():
            # These sides reach each tile once.
            every = h in (8, 16, 32) and w in (8, 16, 32, 64, 128, 256) and layout != "view"
            activations = range(len(ACTIVATIONS)) if every else [_RELU6]
            yield f"16x128x{h}x{w} {layout}", partial(_operators_of_a_map, x, activations)
    # Sizes of 1 are compiled in; two images of few channels are cut into bands.
    few = ((1, 1, 1, 1), (2, 1, 5, 7), (1, 3, 1, 1), (2, 2, 600, 20), (2, 2, 1024, 1024))
    for dtype, (b, c, h, w) in itertools.product(dtypes, few):
        for layout, x in _layouts(b, c, h, w, dtype).items():
            yield f"{b}x{c}x{h}x{w} {layout}", partial(_operators_of_a_map, x, [_RELU6])
    yield from _examples_of_stages(dtypes)
    huge = _empty(1, 2, 40000, 40000, dtype=torch.float16)
    yield "1x2x40000x40000 NCHW", partial(_operators_of_a_map, huge, [_RELU6])
    yield "1x2x40000x40000 NCHW", partial(_stages_of_a_map, huge, [_RELU6])


def _examples_of_stages(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each width of a tile and each activation once, and maps of odd sizes."""
    sizes = [(16, 128, h, w) for h, w in ((8, 8), (16, 16), (32, 64), (16, 128), (8, 256))]
    sizes += [(128, 512, 7, 7), (1, 3, 1, 1), (2, 33, 100, 3), (2, 2, 600, 20)]
    for dtype, (b, c, h, w) in itertools.product(dtypes, sizes):
        for layout, y in _layouts(b, c, h, w, dtype).items():
            activations = range(len(ACTIVATIONS)) if (h, w) == (16, 16) else [_RELU6]
            yield f"{b}x{c}x{h}x{w} {layout}", partial(_stages_of_a_map, y, activations)


def _examples_of_blocks(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every stage in float16 on maps as models hold them, then what differs from that."""
    half = [dtype for dtype in dtypes if dtype.itemsize == 2]
    cases = itertools.product(half, CASES.values(), BATCHES)
    for dtype, case, batch in cases:
        for h, w in case.maps.values():
            x = _empty(batch, case.channels, h, w, dtype=dtype)
            call = partial(whole_block, x, case.heads, case.key_dim, 2 * case.key_dim)
            yield f"{case.name} {batch}x{h}x{w} NCHW", call
    for dtype, (b, h, w) in itertools.product(dtypes, _MAPS):
        for c in (192, 33):
            for layout, x in list(_layouts(b, c, h, w, dtype).items())[:2]:
                yield f"{b}x{c}x{h}x{w} {layout}", partial(whole_block, x, 8, 16, 32)
    for dtype, (d, e), (b, h, w) in itertools.product(dtypes, _HEADS, _MAPS[:3]):
        x = _empty(b, 128, h, w, dtype=dtype)
        yield f"{b}x128x{h}x{w} NCHW", partial(whole_block, x, 4, d, e)
    for dtype, activation, hard in itertools.product(
        dtypes, range(len(ACTIVATIONS)), (True, False)
    ):
        x = _empty(1, 192, 32, 32, dtype=dtype)
        call = partial(whole_block, x, 8, 16, 32, activation, hard)
        yield "1x192x32x32 NCHW", call


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """``"ieee"`` or ``"tf32"``, for matrix products and convolutions."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old


def launches(target: Target, brief: bool = False) -> list[Launch]:
    """What the launchers choose on a target; ``brief``: the first configuration of each kernel."""
    found: dict[str, Launch] = {}
    example = [""]
    dtypes = DTYPES if target.capability != (7, 5) else DTYPES[:2]
    with recorded(target, lambda one: found.setdefault(one.kernel + one.data, one), example):
        for name, call in _examples(dtypes):
            example[0] = name
            for precision in ("ieee", "tf32"):
                with float32_products(precision):
                    call()
    if not brief:
        return list(found.values())
    first: dict[str, Launch] = {}
    for launched in found.values():
        first.setdefault(launched.kernel, launched)
    return list(first.values())


def bounds_us(launched: Launch) -> tuple[float, float]:
    """The time of the products and that of the bytes, at the rates of the card."""
    target = TARGETS[launched.target]
    rate = target.tf32 / 3 if launched.rate == "tf32x3" else getattr(target, launched.rate)
    return launched.flops / (rate * 1e6), launched.bytes / (target.gbytes * 1e3)


# --- the binaries ----------------------------------------------------------------------------


def binary(launched: Launch) -> CompiledKernel:
    """Compile a launch, or take it from Triton's cache on disk."""
    kernel = next(kernel for kernel in _kernels() if kernel.__name__ == launched.kernel)
    driver.set_active(_Driver(TARGETS[launched.target]))
    return kernel.preload(launched.data)


def compiled(launched: Launch) -> Row:
    """What the binary of a launch needs."""
    target = TARGETS[launched.target]
    row = Row(
        launched.kernel, launched.configuration, target.name,
        example=launched.example, flops=launched.flops, bytes=launched.bytes,
    )  # fmt: skip
    try:
        found = binary(launched)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        row.wrong = f"does not compile: {lines[-1]}"
        return row
    row.shared = found.metadata.shared
    warps = found.metadata.num_warps
    if target.triton.backend == "cuda":
        row.registers, row.spill_bytes = _nvidia_resources(found.asm["cubin"])
    else:
        row.registers, row.spill_bytes = _amd_resources(found.asm["amdgcn"])
    row.resident = resident(target, row.registers, row.shared, warps)
    row.occupancy = row.resident * warps / target.warps
    row.predicted_us = max(bounds_us(launched))
    if row.shared > target.shared_program:
        row.wrong = f"needs {row.shared} bytes of shared memory of {target.shared_program}"
    elif row.spill_bytes and target.strict:
        row.wrong = f"spills {row.spill_bytes} bytes"
    return row


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers of a lane, accumulation registers among them, and bytes of its scratch."""

    def read(name: str) -> int:
        return int(re.search(rf"^\s*\.?{name}:?\s+(\d+)", assembly, re.MULTILINE)[1])

    return read("vgpr_count"), read("private_segment_fixed_size")


def resident(target: Target, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor (of AMD: a compute unit) holds."""
    if target.triton.backend == "cuda":
        # 65536 registers, given to warps by 256; the system takes 1 KiB of shared memory a program.
        fit = 65536 // (-(-registers * 32 // 256) * 256) // warps
        reserved = _KIB if target.strict else 0
    else:
        # Four SIMDs of 512 registers a lane, given by 8, and eight wavefronts at most.
        fit = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // warps
        reserved = 0
    if shared:
        fit = min(fit, target.shared // (shared + reserved))
    return min(fit, target.programs, target.warps // warps)


# --- the table -------------------------------------------------------------------------------


def _line(row: Binary) -> str:
    needs = f"{row.kernel:<30} {row.target:<7} {row.registers:>4} {row.spill_bytes:>5} "
    if not isinstance(row, Row):
        return f"{needs}{'':>40}  {row.configuration}"
    return (
        f"{needs}{row.shared:>7} {row.occupancy:>5.0%} {row.flops / 1e6:>8.1f} "
        f"{row.bytes / 1e6:>7.2f} {row.predicted_us:>9.2f}  {row.configuration}; {row.example}"
    )


def table(rows: Sequence[Binary]) -> str:
    """A line for each row, what is wrong last, and a summary."""
    lines = [
        f"{'kernel':<30} {'target':<7} {'regs':>4} {'spill':>5} {'shared':>7} {'occ.':>5} "
        f"{'MFLOP':>8} {'MB':>7} {'pred. us':>9}  configuration; example"
    ]
    lines += map(_line, rows)
    wrong = [row for row in rows if row.wrong]
    lines += [f"WRONG {row.kernel} {row.target} {row.configuration}: {row.wrong}" for row in wrong]
    for name in dict.fromkeys(row.target for row in rows):
        found = [row for row in rows if row.target == name]
        spilling = sum(row.spill_bytes > 0 for row in found)
        lines.append(
            f"{name} ({TARGETS[name].card}): {len(found)} compiled, {spilling} spill, "
            f"{sum(bool(row.wrong) for row in found)} wrong"
        )
    return "\n".join(lines)


def compile_all(
    targets: Sequence[str],
    kernels: Sequence[str] | None = None,
    full: Sequence[str] = FULL,
    processes: int | None = None,
) -> list[Row]:
    """Compile for ``targets``: all that the launchers choose on those in ``full``, the first
    configuration of each kernel on the others."""
    wanted = [
        launched
        for name in targets
        for launched in launches(TARGETS[name], brief=name not in full)
        if kernels is None or launched.kernel in kernels
    ]
    return compiled_in_parallel(wanted, processes)


def compiled_in_parallel(wanted: Sequence[Launch], processes: int | None = None) -> list[Row]:
    """:func:`compiled` of each, in processes of their own: this one goes on to record."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), context) as pool:
        rows = pool.map(compiled, wanted, chunksize=4)
        return list(tqdm(rows, "kernels", len(wanted), dynamic_ncols=True, disable=None))


def kernel_names() -> tuple[str, ...]:
    return tuple(kernel.__name__ for kernel in _kernels() if kernel.__name__.endswith("_kernel"))
