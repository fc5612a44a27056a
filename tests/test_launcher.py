"""The launches of the block, recorded in Python and repeated by the library.

Without a GPU a stand-in for the driver calls back, and the interpreter runs what was launched.
"""

import ctypes
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seaattn_kernels import SeaAttention, verify
from seaattn_kernels.kernels import block, launch, squeeze

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is real")

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)
LOW = (torch.float16, torch.bfloat16, torch.float32)
WAYS = ("direct", "squeezed", "projected")
KERNELS = {
    block: ("project_kernel", "attend_kernel", "encode_kernel", "finish_kernel"),
    squeeze: ("squeeze_kernel",),
}
_NO_NEEDS = dict.fromkeys(launch._NEEDS, 0)


class Described:
    """An interpreted kernel that is described as a compiled one would be."""

    def __init__(self, kernel, driver):
        self.kernel, self.driver = kernel, driver

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            kinds = [self.kind(argument) for argument in arguments]
            count = sum(kind != "constexpr" for kind in kinds) + 2
            launched = SimpleNamespace(
                run=self.kernel, kinds=kinds, arguments=arguments, constants=constants
            )
            self.driver.kernels.append(launched)
            signature = {str(at): kind for at, kind in enumerate(kinds)} | {"BLOCK": "constexpr"}
            return SimpleNamespace(
                function=len(self.driver.kernels),
                metadata=SimpleNamespace(
                    num_ctas=1,
                    num_warps=constants["num_warps"],
                    shared=1000 + len(self.driver.kernels),
                    **{**_NO_NEEDS, **self.driver.needs},
                ),
                src=SimpleNamespace(signature=signature),
                asm={"ptx": f"// .param\n.entry kernel({'.param .b64 p,' * count}) {{.param}}"},
            )

        return run

    @staticmethod
    def kind(argument):
        if isinstance(argument, Tensor):
            return "*"
        if isinstance(argument, float):
            return "fp32"
        return "constexpr" if argument == 1 else "i64" if argument >= 2**31 else "i32"


class Driver:
    """What was launched in Python (``kernels``) and by the library (``launched``)."""

    def __init__(self, path):
        self.kernels = []
        self.launched = []
        self.needs = {}
        self.answer = 0
        self.answers = []
        self.callback = _LAUNCH(self.launch)
        ctypes.CDLL(path).set_launch(self.callback)

    def launch(self, function, programs, threads, shared, stream, parameters):
        kernel = self.kernels[function - 1]
        assert shared == 1000 + function
        self.launched.append((function, programs, threads, stream))
        arguments, at = [], 0
        for kind, recorded in zip(kernel.kinds, kernel.arguments, strict=True):
            if kind == "constexpr":
                arguments.append(recorded)
                continue
            if kind == "*":
                pointer = ctypes.c_void_p.from_address(parameters[at]).value
                bytes_ = (ctypes.c_char * 64).from_address(pointer)
                arguments.append(torch.frombuffer(bytes_, dtype=recorded.dtype))
            else:
                type_ = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind]
                arguments.append(type_.from_address(parameters[at]).value)
                assert arguments[-1] == type_(recorded).value
            at += 1
        for scratch in (at, at + 1):
            assert ctypes.c_int64.from_address(parameters[scratch]).value == 0
        kernel.run[(programs,)](*arguments, **kernel.constants)
        return self.answers.pop(0) if self.answers else 0


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).parent / "driver.cpp"
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", source, "-o", path]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture(scope="session")
def _schema():
    library = torch.library.Library("seaattn_kernels", "FRAGMENT")
    schema = str(torch.ops.seaattn_kernels.sea_attention.triton._schema).partition("(")[2]
    library.define(f"sea_attention.launched({schema}")
    yield
    library._destroy()


@pytest.fixture
def driver(library, stand_in, _schema, monkeypatch):
    driver = Driver(str(stand_in))
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Described(getattr(module, name), driver))
    return driver


@pytest.fixture
def plans(monkeypatch):
    """The plans that Python made."""
    found = []
    plan = launch.plan
    monkeypatch.setattr(launch, "plan", lambda *a: found.append(plan(*a)) or found[-1])
    return found


def arguments_of(x, **options):
    """The weights and numbers of a random block for a map."""
    channels, _, height, width = *x.shape[1:2], None, *x.shape[2:]
    module = verify.randomise(SeaAttention(channels, 4, 2, **options)).to(x.dtype).eval()
    with torch.no_grad():
        folded = module._folds.get(module)
    return (
        list(folded.weights(x.dtype, height, width, "triton")),
        folded.heads,
        folded.key_dim,
        folded.activation_code,
        folded.negative_slope,
        folded.hard,
    )


def launched(x, *arguments):
    return torch.ops.seaattn_kernels.sea_attention.launched(x, *arguments)


def in_python(x, *arguments):
    return torch.ops.seaattn_kernels.sea_attention.triton(x, *arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_repeated_launches_give_the_same_bits(way, dtype, channels_last, driver, plans, monkeypatch):
    monkeypatch.setattr(block, "plan", lambda *arguments: way)
    shape = (2, 16, 5, 6 + WAYS.index(way))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    count = 4 if way == "direct" else 5
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(shape).to(dtype, memory_format=layout)
        arguments = arguments_of(x)
        expected = in_python(x, *arguments)
        driver.kernels.clear() if seed == 0 else None
        out = launched(x, *arguments)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        assert len(plans) == 1, "only the first call is Python's"
        assert len(driver.launched) == count * seed
    for function, programs, threads, stream in driver.launched:
        assert programs > 0
        assert threads == 32 * driver.kernels[function - 1].constants["num_warps"]
        assert stream is None
