"""Every kernel under NVIDIA's compute-sanitizer, where that is installed.

memcheck    addresses outside of a tensor
racecheck   shared memory that threads read and write in no order
initcheck   reads of what nothing wrote
"""

import os
import shutil
import subprocess
import sys

import torch

from seaattn_kernels import SeaAttention, ops, verify

_OPTIONS = {
    "memcheck": ("--padding", "1024", "--report-api-errors", "no"),
    "racecheck": (),
    "initcheck": (),
}
#: A small map, and one with several tiles of each kernel.
_SHAPES = ((2, 64, 12, 10), (1, 64, 40, 36))


def run(name: str = "cuda") -> None:
    """Operators and a training step of Triton, the block of each backend that runs here."""
    device = torch.device(name)
    for case in verify.OPERATOR_CASES:
        if case.name in ops.OPERATORS["triton"]:
            leaves = [x.requires_grad_() for x in case.inputs(0, name, torch.float16)]
            out = case.run(leaves, "triton")
            torch.autograd.grad(out, leaves, [torch.randn_like(y) for y in out])
    wide = torch.randn(1, 8, 3, 600, dtype=torch.float16, device=device)  # of several strips
    ops.axial_squeeze(wide, backend="triton")
    block = SeaAttention(64, 16, 4, backend="triton").to(device, torch.float16)
    for shape in _SHAPES:
        block(torch.randn(shape, dtype=torch.float16, device=device)).sum().backward()
    for backend in ("triton", "cuda"):
        if reason := ops.refusal("sea_attention", backend, device, torch.float16):
            print(f"{backend} is not run: {reason}")
            continue
        block = SeaAttention(64, 16, 4, backend=backend).to(device, torch.float16).eval()
        for shape in _SHAPES:
            with torch.no_grad():
                block(torch.randn(shape, dtype=torch.float16, device=device))


def main() -> int:
    """Non-zero where a tool finds anything. The tools run side by side."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("the kernels are not checked: there is no compute-sanitizer")
        return 0
    code = "from bench.sanitize import run; run()"
    # Each tensor an allocation of its own, whose end the tools know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, "--error-exitcode", "1", *options,
             sys.executable, "-c", code],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for tool, options in _OPTIONS.items()
    }  # fmt: skip
    status = 0
    for tool, process in running.items():
        lines = process.communicate()[0].strip().splitlines()
        print(f"{tool}: exit {process.returncode}")
        print("\n".join(lines[-60 if process.returncode else -1 :]))
        status |= process.returncode != 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
