"""What runs here, whether it is right, and a demonstration."""

import argparse
import json
import os
import pickle
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


def _backend(name: str, devices: list[torch.device]) -> dict:
    """The operators that a backend can run here, and why it runs no others."""
    dtype = torch.float16 if name == "cuda" else torch.float32
    reasons = {}
    for operator in ops.OPERATORS[name]:
        refused = [ops.refusal(operator, name, device, dtype) for device in devices]
        reasons[operator] = None if None in refused else refused[0]
    able = [operator for operator, reason in reasons.items() if reason is None]
    state = {"operators": able}
    if not reasons:
        state["reason"] = "not in this version"
    elif not able:
        state["reason"] = next(iter(reasons.values()))
    return state


def collect() -> dict:
    """Versions, devices, the compiled library, and what each backend can run here."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    simd = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()}, {cores}, {simd}"}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    versions = {name: _version(name) for name in ("torch", "numpy", "triton")}
    return {
        "versions": {
            "seaattn_kernels": seaattn_kernels.__version__,
            "python": platform.python_version(),
            **versions,
        },
        "devices": devices,
        "library": native.BUILD if native.REASON is None else {"missing": native.REASON},
        "auto": os.environ.get("SEAATTN_BACKEND") or "auto",
        "backends": {
            name: _backend(name, [torch.device(device) for device in devices])
            for name in ops.BACKENDS[1:]
        },
    }


def info(as_json: bool) -> int:
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    for section in ("versions", "devices", "library"):
        print(section)
        for name, value in report[section].items():
            print(f"  {name:<16} {value or 'not installed'}")
    meaning = f"SEAATTN_BACKEND={report['auto']}"
    if report["auto"] == "auto":
        meaning = "the best for the device"
    elif report["auto"] not in ops.BACKENDS:
        meaning = f"SEAATTN_BACKEND={report['auto']!r} is none of {', '.join(ops.BACKENDS)}"
    print(f"backends (auto: {meaning})")
    for name, state in report["backends"].items():
        able = ", ".join(state["operators"])
        print(f"  {name:<16} {able or 'unavailable: ' + state['reason']}")
    return 0


def explain(source: str, trust: bool) -> int:
    from seaattn_kernels import locate, patch

    try:
        located = locate.locate(source, trust)
    except ValueError as error:
        sys.exit(str(error))
    for index, (what, found) in enumerate(located):
        weights = not isinstance(found, torch.nn.Module)
        report = locate.describe_weights(found) if weights else patch.explain(found)
        print("\n" * bool(index) + what, report, sep="\n\n")
    return 0


def migrate(source: Path, target: Path, trust: bool) -> int:
    from seaattn_kernels import migrate as migration

    if not trust:
        sys.exit(f"opening {source} runs code of the file: add --trust if you trust it")
    try:
        print(migration.migrate(source, target))
    except (ValueError, OSError, RuntimeError, pickle.PickleError) as error:
        sys.exit(str(error))
    return 0


def verify(golden: Path | None) -> int:
    from seaattn_kernels import verify as judge

    try:
        return 0 if judge.run(golden) else 1
    except FileNotFoundError as error:
        sys.exit(str(error))


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
    command.add_argument("--json", action="store_true", dest="as_json")
    command.set_defaults(function=info)

    command = commands.add_parser(
        "explain", help="which blocks of a model can run on this package, and why not the others"
    )
    command.add_argument(
        "source", help="a file of torch.save, or an import path: package.module:model('s')"
    )
    command.add_argument("--trust", action="store_true", help="unpickle models: runs their code")
    command.set_defaults(function=explain)

    command = commands.add_parser(
        "migrate", help="a pickled model with copies of the block: written with this package's"
    )
    command.add_argument("source", type=Path, help="a file of torch.save")
    command.add_argument("target", type=Path, help="where the new file goes")
    command.add_argument("--trust", action="store_true", help="unpickle models: runs their code")
    command.set_defaults(function=migrate)

    command = commands.add_parser("verify", help="golden files and odd shapes on every backend")
    command.add_argument("--golden", type=Path, help="folder of the golden .npz files")
    command.set_defaults(function=verify)

    command = commands.add_parser("demo", help="SeaFormer on a photograph: eager against this")
    if argv[:1] == ["demo"]:
        demo = _demo()
        demo.add_arguments(command)
        command.set_defaults(function=demo.run)

    arguments = vars(parser.parse_args(argv))
    return arguments.pop("function")(**arguments)


if __name__ == "__main__":
    sys.exit(main())
