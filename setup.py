"""Builds the optional compiled library ``seaattn_kernels._C``; the rest is in pyproject.toml.

SEAATTN_SKIP_BUILD=1   pure Python
SEAATTN_FORCE_BUILD=1  a library, or an error
SEAATTN_CUDA_ARCHS     compute capabilities to compile csrc/cuda for, such as "9.0a"; without it
                       that of this machine's GPU where the kernels are for it and nvcc is here
MAX_JOBS               parallel compilations
"""

import os
import shutil
import subprocess
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
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found"
    return None


def cuda_archs(torch) -> list[str]:
    """What to compile csrc/cuda for, such as ["90a"]."""
    if asked := os.environ.get("SEAATTN_CUDA_ARCHS"):
        if shutil.which("nvcc") is None:
            sys.exit("SEAATTN_CUDA_ARCHS asks for CUDA code, and no nvcc was found")
        asked = [arch.replace(".", "") for arch in asked.replace(";", " ").split()]
        return ["90a" if arch == "90" else arch for arch in asked]  # the products need 9.0a
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["90a"] if hopper and shutil.which("nvcc") else []


def compile_cuda(archs: list[str], folder: Path) -> None:
    """A binary of each kernel of csrc/cuda, side by side; they need nothing of torch."""
    if not archs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    compilers = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        files = [str(source), "-o", str(folder / f"{source.stem}.fatbin")]
        compilers.append(subprocess.Popen(["nvcc", "-std=c++17", "-O3", "-fatbin", *codes, *files]))
    results = [compiler.wait() for compiler in compilers]
    if any(results):
        raise RuntimeError("nvcc failed on csrc/cuda")


def extension() -> dict:
    """The arguments of ``setup`` for the library."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    archs = cuda_archs(torch)

    class BuildLibrary(BuildExtension):
        """A compiler that fails leaves pure Python, unless the build was asked for."""

        def run(self) -> None:
            try:
                super().run()
                in_source = self.inplace or self.editable_mode
                root = Path() if in_source else Path(self.build_lib)
                compile_cuda(archs, root / "seaattn_kernels/cuda")
            except (Exception, SystemExit) as error:
                if forced:
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                print(f"seaattn_kernels: pure Python, compiling failed: {reason}", file=sys.stderr)
                self.extensions.clear()

    flags = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
    # at::parallel_for is a template over OpenMP, serial without the flag. It is not for the linker:
    # the symbols must come from the runtime that torch has loaded, and not from a second one.
    openmp = "parallel backend: OpenMP" in torch.__config__.parallel_info()
    flags.append("-fopenmp" if openmp else "-fopenmp-simd")
    library = CppExtension(
        "seaattn_kernels._C",
        sorted(str(path) for path in Path("csrc").glob("*/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*/*.h")),
        extra_compile_args=flags,
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": BuildLibrary}}


def asked(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


forced = asked("SEAATTN_FORCE_BUILD")
arguments = {}
if asked("SEAATTN_SKIP_BUILD"):
    print("seaattn_kernels: pure Python, SEAATTN_SKIP_BUILD is set", file=sys.stderr)
elif (lack := missing()) is None:
    arguments = extension()
elif forced:
    sys.exit(f"seaattn_kernels: SEAATTN_FORCE_BUILD=1, but {lack}")
else:
    print(f"seaattn_kernels: pure Python, {lack}", file=sys.stderr)
setup(**arguments)
