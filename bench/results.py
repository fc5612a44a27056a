"""Result files: JSON with the machine, the versions, the commit and flat rows.

They hold no host name and no path, so that they can be published as they are.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

import seaattn_kernels

_CHECKOUT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"
#: Packages beside torch and numpy that results may depend on.
_PROVIDERS = ("triton", "onnxruntime", "openvino", "scikit-learn")


def machine(device: torch.device) -> dict[str, str | int | None]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **{name: _installed(name) for name in _PROVIDERS},
        "seaattn_kernels": seaattn_kernels.__version__,
    }


def commit() -> str | None:
    """The commit of the checkout, "+dirty" where files other than results differ from it.

    Outside git it is what the environment calls COMMIT.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get("COMMIT")
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        # Without the option, status would take the lock of the index.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=_CHECKOUT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line(argv: Sequence[str]) -> str:
    """``sys.argv`` as it would be typed, paths cut down to their last part."""
    program, *arguments = argv
    path = Path(program)
    head = f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name
    return " ".join([head, *(re.sub(r"[^=]*[/\\]", "", argument) for argument in arguments)])


def document(rows: Sequence[dict], device: torch.device) -> dict:
    """What a result file holds."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "rows": list(rows),
    }


def results_dir(device: torch.device) -> Path:
    """``bench/results/<machine>``: the GPU's name, or the CPU's and its number of cores."""
    found = machine(device)
    name = found["gpu"] or f"{found['cpu']} {found['cores']} cores"
    return _RESULTS / re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def differences(old: dict, new: dict) -> list[str]:
    """Which of machine, versions and commit two result files do not share."""
    return [name for name in ("machine", "versions", "commit") if old.get(name) != new.get(name)]
