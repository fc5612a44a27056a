"""csrc/cuda on a CPU: the same sources, compiled by a C++ compiler for the machine of machine.h."""

import ctypes
import os
import subprocess
from itertools import count
from pathlib import Path

from torch import Tensor

from seaattn_kernels.kernels import cuda

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
HOPPER = ("-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL")
_FLAGS = ["-std=c++20", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
_FLAGS += ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native"]


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def library(folder: Path, source: str, sources: Path = SOURCES, flags=HOPPER) -> ctypes.PyDLL:
    """Of a source, such as "finish"; compiled where the folder has none."""
    path = folder / f"{source}.so"
    if not path.exists():
        include = [f"-I{HERE}", f"-I{sources}"]
        files = [str(HERE / f"{source}.cpp"), str(HERE / "machine.cpp")]
        command = [*compiler(), *_FLAGS, *flags, *include, *files, "-o", str(path)]
        subprocess.run(command, check=True, timeout=300)
    found = ctypes.PyDLL(str(path))  # one launch at a time
    found.launch.restype = ctypes.c_char_p
    return found


class Emulator:
    """Takes the place of ``cuda.launch``. Each launch has another seed, from ``seeds`` on."""

    def __init__(self, libraries: dict[str, ctypes.PyDLL], seeds: int = 0):
        self.libraries, self.seeds = libraries, count(seeds)

    def launch(self, binary, name, grid, threads, shared, kinds, *arguments):
        values = [
            cuda._TYPES[kind](argument.data_ptr() if kind == "*" else argument)
            for argument, kind in zip(arguments, kinds.split(), strict=True)
        ]
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        tensors = [given for given in arguments if isinstance(given, Tensor)]
        spans = [(given.data_ptr(), given.numel() * given.element_size()) for given in tensors]
        numbers = [number for span in spans for number in span]
        wrong = self.libraries[binary].launch(
            name.encode(), (ctypes.c_uint * 3)(*grid), threads, shared, parameters,
            (ctypes.c_size_t * len(numbers))(*numbers), len(spans),
            ctypes.c_uint64(next(self.seeds)),
        )  # fmt: skip
        if wrong:
            raise RuntimeError(f"{name}: {wrong.decode()}")
