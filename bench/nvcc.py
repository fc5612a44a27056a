"""What the kernels of csrc/cuda need on GPUs that are not here, by the report of ptxas.

It fails where a kernel does not compile or keeps anything in local memory.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.static import Binary

SOURCES = {
    path.stem: path
    for path in sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cu"))
}
#: What ``python -m bench static`` calls a target, and nvcc.
ARCHS = {"sm_80": "80", "sm_90": "90a", "sm_100": "100"}
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '\S+'")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled(source: Path, target: str) -> list[Binary]:
    """What each entry of a source needs. ``spill_bytes``: of its stack, where spills lie."""
    arch = ARCHS[target]
    configuration = f"{source.name} for sm_{arch}"
    codes = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", *codes, "-cubin", "-Xptxas", "-v", str(source),
             "-o", f"{folder}/{source.stem}.cubin"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    _, *reports = _ENTRY.split(done.stdout)
    if done.returncode or not reports:
        lines = done.stdout.strip().splitlines() or [f"nvcc exits with {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        wrong = f"does not compile: {first}" if done.returncode else "ptxas reports no entry"
        return [Binary(source.stem, configuration, target, wrong=wrong)]
    rows = []
    for name, report in zip(reports[::2], reports[1::2], strict=True):
        row = Binary(
            name, configuration, target, int(re.search(r"Used (\d+) registers", report)[1])
        )
        stack, stores, loads = (
            sum(map(int, column)) for column in zip(*_LOCAL.findall(report), strict=True)
        )
        row.spill_bytes = stack
        if stack or stores or loads:
            row.wrong = f"spills {stack} bytes of stack, {stores} stored, {loads} loaded"
        rows.append(row)
    return sorted(rows, key=lambda row: row.kernel)


def compile_all(
    targets: Sequence[str], kernels: Sequence[str] | None = None, processes: int | None = None
) -> list[Binary]:
    """Compile the sources that ``kernels`` names, or all, for those of ``targets`` in ARCHS."""
    wanted = [
        (source, target)
        for target in targets
        if target in ARCHS
        for name, source in SOURCES.items()
        if kernels is None or name in kernels
    ]
    if not wanted:
        return []
    if shutil.which("nvcc") is None:
        print("csrc/cuda is not compiled: there is no nvcc")
        return []
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        return [row for rows in pool.map(compiled, *zip(*wanted, strict=True)) for row in rows]
