"""What every launcher needs, and all that differs between devices and versions of Triton."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

#: Whether Triton interprets kernels on the CPU; it reads the environment when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Contraction of a*b + c is chosen here: the default differs between versions of Triton.
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` current: Triton launches on the current one, on its stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at the least."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that holds ``n``, between the bounds."""
    return max(least, min(most, triton.next_power_of_2(n)))


def precision(x: Tensor) -> str:
    """The input precision of products: PyTorch's TF32 switch of matmul for float32.

    Values of half precision lose nothing to TF32, which has as many bits as float16.
    """
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    exact = x.dtype is torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"
