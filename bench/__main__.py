"""Time blocks and operators, draw a result file, compile the Triton kernels without a GPU."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import operators, results
from bench.cases import CASES
from bench.measure import (
    DEFAULT_PROVIDERS,
    DTYPES,
    PROVIDERS,
    auto_backend,
    available,
    busy,
    device_argument,
    measure,
    positive_argument,
    refusal,
)
from bench.plot import plot
from seaattn_kernels.budget import SEEDS

SCRATCH = Path("out/bench")
#: Whose stages are listed where several targets are compiled.
STAGES_TARGET = "sm_90"
LEGEND = (
    "interval: 95 % of the median. limit: time over the limit (bench/limit.py): 1 is at it.\n"
    "error: root mean square against float64, eager's in brackets."
)
GPU_LEGEND = (
    "call: called from Python. graph: replayed from a CUDA graph, beside eager's.\n"
    "extra: memory of a call at its peak, beyond its input and result."
)
BEATEN = (
    "Below 1 the limit is beaten: it is torch.mm's time, and the convolutions of torch go through "
    "another library."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = argparse.ArgumentParser(add_help=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timed.add_argument(
        "--device", type=device_argument, default=device, help="default: %(default)s"
    )
    timed.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"default: all of {', '.join(CASES)}",
    )  # fmt: skip
    timed.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    timed.add_argument("--batch", type=positive_argument, default=1, help="default: %(default)s")
    timed.add_argument("--quick", action="store_true", help="fewer maps, less time on each")
    timed.add_argument(
        "--out", type=Path, help="folder (bench/results/<machine>; quick: out/bench)"
    )
    timed.add_argument("--no-chart", action="store_true", help="the result file alone")
    run = commands.add_parser(
        "run", parents=[timed], help="whole blocks in eval mode: check, time, write JSON and chart"
    )
    run.add_argument("--threads", type=positive_argument, help="torch.set_num_threads")
    run.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
        help=f"of {', '.join(PROVIDERS)}; default: {', '.join(DEFAULT_PROVIDERS)}, "
        "with --quick without compile",
    )  # fmt: skip
    each = commands.add_parser(
        "operators", parents=[timed],
        help="the Triton operators and a training step of the block, the same way",
    )  # fmt: skip
    each.add_argument(
        "--providers", nargs="+", choices=operators.PROVIDERS, metavar="PROVIDER",
        default=list(operators.PROVIDERS), help="default: all of " + ", ".join(operators.PROVIDERS),
    )  # fmt: skip
    draw = commands.add_parser("plot", help="draw the chart of a result file")
    draw.add_argument("results", type=Path)
    draw.add_argument("--out", type=Path, help="PNG (beside the result file)")
    static = commands.add_parser(
        "static", help="compile the Triton kernels for GPUs that need not be here"
    )
    static.add_argument("--targets", nargs="+", metavar="TARGET", help="default: all")
    static.add_argument("--kernels", nargs="+", metavar="KERNEL", help="default: all")
    static.add_argument(
        "--all", action="store_true",
        help="every configuration on every target; default: on sm_80 and sm_90, one elsewhere",
    )  # fmt: skip
    static.add_argument("--processes", type=positive_argument, help="default: one a core")
    static.add_argument("--out", type=Path, help="JSON of the table")
    return parser


def _line(row: dict) -> str:
    speedup, extra = row["speedup"], row["extra_bytes"]
    return (
        f"{row['case']:<11} {row['height']:>3}x{row['width']:<4} "
        f"{row['provider']:<10}{row['way']:<6}"
        f"{row['ms']:>9.3f} ms [{row['ms_low']:.3f}, {row['ms_high']:.3f}]"
        f"  first {row['ms_first']:.1f} ms"
        + (f"  {speedup:.2f}x eager" if speedup else "  eager is not timed")
        + f"  limit {row['of_limit']:.2f}"
        f"  error {row['rms_error']:.1e} ({row['rms_error_eager']:.1e})"
        + (f"  extra {extra / 2**20:.2f} MiB" if extra is not None else "")
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for; non-zero where a provider was refused or a key stopped it."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Compiling takes longer than a quick run.
    wanted = arguments.providers or DEFAULT_PROVIDERS[: -1 if arguments.quick else None]
    listed = {name: available(wanted, CASES[name], device, dtype) for name in arguments.cases}
    if "auto" in wanted and not any("auto" in providers for providers in listed.values()):
        print(f"auto is {auto_backend(device, dtype)} here: listed once")
    refused = {
        name: reason
        for case in arguments.cases
        for name in arguments.providers or ()
        if (reason := refusal(name, CASES[case], device, dtype))
    }
    for name, reason in refused.items():
        print(f"{name} is not timed: {reason}")
    graphs = device.type == "cuda"
    jobs = [
        (CASES[name], size)
        for name in arguments.cases
        for size in list(CASES[name].maps.values())[: 2 if arguments.quick else None]
    ]
    rows: list[dict] = []
    status = int(bool(refused))
    try:
        for case, size in tqdm(jobs, desc="blocks", unit="map", dynamic_ncols=True, disable=None):
            found = measure(
                case, size, listed[case.name], device, dtype, arguments.batch,
                seconds=0.3 if arguments.quick else 2.0,
                seeds=SEEDS[:3] if arguments.quick else SEEDS,
                log=tqdm.write,
                graphs=graphs,
            )  # fmt: skip
            status |= len(found) < len(listed[case.name]) * (2 if graphs else 1)
            for row in found:
                tqdm.write(_line(row))
            rows += found
    except KeyboardInterrupt:
        print("stopped: what is done is kept", file=sys.stderr)
        status = 130
    if not rows:
        return status or 1
    print(LEGEND)
    if graphs:
        print(GPU_LEGEND)
    if line := busy(rows):
        print(line)
    if device.type == "cpu" and any(row["of_limit"] < 1 for row in rows):
        print(BEATEN)
    first = rows[0]
    print(
        f"torch.mm at {first['case']} {first['height']}x{first['width']}: "
        f"{first['limit_gflops']:.0f} GFLOP/s, large matrices {first['matrix_gflops']:.0f} GFLOP/s"
    )
    name = f"{arguments.dtype}-batch{arguments.batch}-threads{torch.get_num_threads()}.json"
    _save(arguments, rows, name)
    return status


def _save(arguments: argparse.Namespace, rows: list[dict], name: str) -> None:
    """Write a result file and, unless it is not wanted, its chart; print where they are."""
    device = arguments.device
    folder = arguments.out or (SCRATCH if arguments.quick else results.results_dir(device))
    document = results.document(rows, device)
    results.write(folder / name, document)
    print(folder / name)
    if not arguments.no_chart:
        print(plot(document, (folder / name).with_suffix(".png")))


def run_operators(arguments: argparse.Namespace) -> int:
    """Measure operators; non-zero where a provider is refused."""
    device = arguments.device
    dtype = DTYPES[arguments.dtype]
    jobs = [
        (CASES[name], size)
        for name in arguments.cases
        for size in list(CASES[name].maps.values())[-1 if arguments.quick else 0 :]
    ]
    rows: list[dict] = []
    refused: list[str] = []
    status = 0
    try:
        for case, size in tqdm(jobs, "maps", dynamic_ncols=True, disable=None):
            found = operators.measure(
                case, size, arguments.batch, arguments.providers, device, dtype,
                seconds=0.3 if arguments.quick else 1.0,
                seeds=SEEDS[:3] if arguments.quick else SEEDS,
                log=refused.append,
            )  # fmt: skip
            tqdm.write(operators.table(found))
            rows += found
    except KeyboardInterrupt:
        print("stopped: what is done is kept", file=sys.stderr)
        status = 130
    for line in refused:
        print(line)
    if not rows:
        return status or 1
    _save(arguments, rows, f"operators-{arguments.dtype}-batch{arguments.batch}.json")
    return status or int(bool(refused))


def static(arguments: argparse.Namespace) -> int:
    """Print the table; non-zero where a kernel does not compile, spills or needs too much."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 interprets kernels: unset it to compile them")
    from bench import stages, static

    for given, known in (
        (arguments.targets, tuple(static.TARGETS)), (arguments.kernels, static.kernel_names()),
    ):  # fmt: skip
        if unknown := set(given or ()) - set(known):
            sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = arguments.targets or list(static.TARGETS)
    rows = static.compile_all(
        names,
        arguments.kernels,
        list(static.TARGETS) if arguments.all else static.FULL,
        arguments.processes,
    )
    print(static.table(rows))
    document = results.document(map(asdict, rows), torch.device("cpu"))
    if not arguments.kernels:
        target = static.TARGETS[STAGES_TARGET if STAGES_TARGET in names else names[0]]
        found = stages.stages(target)
        document["stages"] = stages.as_data(found)
        print(stages.table(found))
        print(
            f"{target.name} ({target.card}): in exact float32 folded PyTorch is the faster from "
            f"{stages.crossover_flops(target) / 1e9:.1f} GFLOP on, by the model"
        )
    if arguments.out:
        results.write(arguments.out, document)
        print(arguments.out)
    return int(any(row.wrong for row in rows) or not rows)


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.command == "run":
        return run(arguments)
    if arguments.command == "operators":
        return run_operators(arguments)
    if arguments.command == "static":
        return static(arguments)
    chart = arguments.out or arguments.results.with_suffix(".png")
    try:
        print(plot(results.read(arguments.results), chart))
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.results.name} cannot be drawn: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
