"""The door to the compiled library ``seaattn_kernels._C``: loads it, or says why it is missing."""

import re
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

_MARK = re.compile(rb"seaattn_kernels build: ([^\0]*)\0")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def read_build(path: Path) -> dict[str, str]:
    """What a library says of its build, without loading it (another torch could not load it)."""
    match = _MARK.search(path.read_bytes())
    if match is None:
        return {}
    return dict(field.split("=", 1) for field in match[1].decode().split("; "))


def mismatch(build: dict[str, str], torch_version: str) -> str | None:
    """Why a library of this build does not fit that torch: the ABI holds within a minor version."""
    built = build.get("torch", "unknown")
    if _minor(built) == _minor(torch_version):
        return None
    return (
        f"the compiled library was built against torch {built}, torch {torch_version} is installed:"
        " install seaattn_kernels again"
    )


def _load() -> tuple[ModuleType | None, dict[str, str], str | None]:
    folder = Path(__file__).parent
    path = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_C{s}").exists()), None)
    if path is None:
        return None, {}, (
            f"the compiled library is not built in {folder}"
            " (installing with a C++ compiler and torch present builds it)"
        )  # fmt: skip
    build = read_build(path)
    reason = mismatch(build, torch.__version__)
    if reason is not None:
        return None, build, reason
    try:
        spec = spec_from_file_location("seaattn_kernels._C", path)
        return module_from_spec(spec), build, None
    except ImportError as error:
        return None, build, f"the compiled library does not load: {error}"


#: The library as a module, how it was built (empty without one), and why it cannot be used. Without
#: a reason there is a module.
LIBRARY, BUILD, REASON = _load()


def _cuda_reason() -> str | None:
    binaries = [Path(__file__).parent / "cuda" / f"{name}.fatbin" for name in ("axis", "finish")]
    if REASON is not None or all(path.exists() for path in binaries):
        return REASON
    return (
        "the kernels of csrc/cuda are not compiled (building with nvcc present does that, on a GPU "
        "of compute capability 9.0 or with SEAATTN_CUDA_ARCHS=9.0a)"
    )


#: Why the kernels of csrc/cuda cannot be used (None where they can).
CUDA_REASON = _cuda_reason()
