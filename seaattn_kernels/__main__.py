"""``python -m seaattn_kernels info | verify | demo``"""

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

import seaattn_kernels
from seaattn_kernels import native, ops


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict:
    """Versions, devices, the compiled library, and what each backend can run here in float32."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    backends = {}
    for backend in ops.BACKENDS[1:]:
        backends[backend] = {
            operator: min(
                (ops.refusal(operator, backend, device, torch.float32) or "" for device in devices),
                key=len,
            )
            or "available"
            for operator in ops.OPERATORS["reference"]
        }
    return {
        "versions": {
            "seaattn_kernels": seaattn_kernels.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "triton")},
        },
        "devices": {
            str(device): torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}"
            for device in devices
        },
        "library": native.BUILD if native.REASON is None else {"missing": native.REASON},
        "auto": os.environ.get("SEAATTN_BACKEND") or "auto",
        "backends": backends,
    }


def info(arguments: argparse.Namespace) -> int:
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    for section in ("versions", "devices", "library"):
        print(section)
        for name, value in report[section].items():
            print(f"  {name:<16} {value or 'not installed'}")
    print(f"backends (auto means {report['auto']})")
    for backend, operators in report["backends"].items():
        able = [name for name, state in operators.items() if state == "available"]
        reasons = {state for state in operators.values() if state != "available"}
        print(f"  {backend:<16} {', '.join(able) or 'unavailable: ' + min(reasons, key=len)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from seaattn_kernels import verify as judge

    return 0 if judge.run(arguments.golden) else 1


def demo(arguments: argparse.Namespace) -> int:
    return _demo().run_arguments(arguments)


def _demo():
    """The demo belongs to the benchmarks, which come with the source checkout alone."""
    try:
        from bench import demo
    except ImportError as error:
        sys.exit(f"the demo runs in a source checkout with the bench extra installed: {error}")
    return demo


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m seaattn_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("info", help="versions, devices, and what each backend can run")
    command.add_argument("--json", action="store_true")
    command.set_defaults(function=info)

    command = commands.add_parser("verify", help="golden files and odd shapes on every backend")
    command.add_argument("--golden", type=Path, help="folder of the golden .npz files")
    command.set_defaults(function=verify)

    command = commands.add_parser("demo", help="SeaFormer on a photograph: eager against this")
    if argv[:1] == ["demo"]:
        _demo().add_arguments(command)
    command.set_defaults(function=demo)

    arguments = parser.parse_args(argv)
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
