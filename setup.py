"""Builds the optional compiled library ``seaattn_kernels._C``; the rest is in pyproject.toml.

SEAATTN_SKIP_BUILD=1   pure Python
SEAATTN_FORCE_BUILD=1  a library, or an error
SEAATTN_CUDA_ARCHS     compute capabilities to compile csrc/cuda for, such as "8.0;9.0a"
MAX_JOBS               parallel compilations
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup


def missing() -> str | None:
    """What a build lacks on this machine."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch is not importable here (install it first, then pip install --no-build-isolation)"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}) was found"
    return None


def extension() -> dict:
    """The arguments of ``setup`` for the library."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if os.environ.get("SEAATTN_CUDA_ARCHS"):
        sys.exit("SEAATTN_CUDA_ARCHS asks for CUDA code, and this version has no csrc/cuda")
    flags = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
    # at::parallel_for is a template over OpenMP, serial without the flag. It is not for the linker:
    # the symbols must come from the runtime that torch has loaded, and not from a second one.
    openmp = "parallel backend: OpenMP" in torch.__config__.parallel_info()
    flags.append("-fopenmp" if openmp else "-fopenmp-simd")
    library = CppExtension(
        "seaattn_kernels._C",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        extra_compile_args=flags,
        # Without the build being asked for, a compiler that fails leaves pure Python.
        optional=not forced,
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": BuildExtension}}


forced = os.environ.get("SEAATTN_FORCE_BUILD") == "1"
arguments = {}
if os.environ.get("SEAATTN_SKIP_BUILD") == "1":
    print("seaattn_kernels: pure Python, SEAATTN_SKIP_BUILD=1", file=sys.stderr)
elif (lack := missing()) is None:
    arguments = extension()
elif forced:
    sys.exit(f"seaattn_kernels: SEAATTN_FORCE_BUILD=1, but {lack}")
else:
    print(f"seaattn_kernels: pure Python, {lack}", file=sys.stderr)
setup(**arguments)
