"""Time blocks and operators, count what a training step keeps, train, draw, compile kernels."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import cpu, memory, models, operators, results, saved, train
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
from seaattn_kernels import native, seaformer
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
CPU_LEGEND = (
    "Means over maps are geometric, but for microseconds over the limit. best peer: the fastest of "
    "all\nthat are not ours, at each map; folded is this package's plain PyTorch."
)
BEATEN = (
    "Below 1 the limit is beaten: it is torch.mm's time, and the convolutions of torch go through "
    "another library."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--quick", action="store_true", help="less of everything: a trial")
    written.add_argument(
        "--out", type=Path, help="folder (bench/results/<machine>; quick: out/bench)"
    )
    written.add_argument("--no-chart", action="store_true", help="the result file alone")
    common = argparse.ArgumentParser(add_help=False, parents=[written])
    common.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"default: all of {', '.join(CASES)}",
    )  # fmt: skip
    common.add_argument("--batch", type=positive_argument, default=1, help="default: %(default)s")
    placed = argparse.ArgumentParser(add_help=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed.add_argument(
        "--device", type=device_argument, default=device, help="default: %(default)s"
    )
    timed = argparse.ArgumentParser(add_help=False, parents=[common, placed])
    timed.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    run = commands.add_parser(
        "run", parents=[timed], help="whole blocks in eval mode: check, time, write JSON and chart"
    )
    run.add_argument("--threads", type=positive_argument, help="torch.set_num_threads")
    run.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
        help=f"of {', '.join(PROVIDERS)}; default: {', '.join(DEFAULT_PROVIDERS)}, "
        "with --quick without compile",
    )  # fmt: skip
    on_cpu = commands.add_parser(
        "cpu", parents=[common],
        help="the C++ block in float32 beside every peer on a CPU, with the targets",
    )  # fmt: skip
    on_cpu.set_defaults(device=torch.device("cpu"), dtype="float32")
    on_cpu.add_argument(
        "--threads", type=positive_argument, nargs="+", metavar="N", help="default: 1 and all cores"
    )
    on_cpu.add_argument(
        "--compiled", choices=("512", "all", "none"),
        help="maps that torch.compile is timed at: those of SeaFormer-B and -L at 512x512, the "
        "default; all; none, the default with --quick",
    )  # fmt: skip
    on_cpu.add_argument(
        "--models", nargs="*", choices=seaformer.CONFIGS, metavar="VARIANT",
        help="segmenters that are timed too: t, s, b, l; default: b l, with --quick none",
    )  # fmt: skip
    each = commands.add_parser(
        "operators", parents=[timed],
        help="the Triton operators and a training step of the block, the same way",
    )  # fmt: skip
    each.add_argument(
        "--providers", nargs="+", choices=operators.PROVIDERS, metavar="PROVIDER",
        default=list(operators.PROVIDERS), help="default: all of " + ", ".join(operators.PROVIDERS),
    )  # fmt: skip
    kept = commands.add_parser(
        "saved", parents=[placed],
        help="bytes that the block keeps of a forward for its backward, beside eager's",
    )  # fmt: skip
    kept.add_argument("--out", type=Path, help="JSON of the table")
    learn = commands.add_parser(
        "train", parents=[placed, written],
        help="train a small SeaFormer on digits: eager, replaced, and eager with other seeds",
    )  # fmt: skip
    learn.add_argument(
        "--variant", choices=seaformer.CONFIGS, default="t", help="default: %(default)s"
    )
    learn.add_argument("--steps", type=positive_argument, help="default: 300, with --quick 6")
    learn.add_argument("--seed", type=int, default=0, help="default: %(default)s")
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


def run_cpu(arguments: argparse.Namespace) -> int:
    """Measure the C++ block and its peers; non-zero where one is wrong or a key stopped it."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    if auto_backend(device, dtype) != "cpu":
        print(f"there is no C++ block to time: {native.REASON or 'SEAATTN_BACKEND is set'}")
        return 1
    threads = arguments.threads or sorted({1, torch.get_num_threads()})
    shapes = cpu.shapes(arguments.cases)[:: 8 if arguments.quick else 1]
    wanted = arguments.compiled or ("none" if arguments.quick else "512")
    compiled = {"512": cpu.compiled(shapes), "all": shapes, "none": []}[wanted]
    for name in cpu.PEERS:
        if reason := refusal(name, CASES["B1"], device, dtype):
            print(f"{name} is not timed: {reason}")
    print(f"torch.compile is timed at {len(compiled)} of {len(shapes)} maps")
    variants = (
        ([] if arguments.quick else ["b", "l"]) if arguments.models is None else arguments.models
    )
    rows: list[dict] = []
    others: list[dict] = []
    missing: list[str] = []
    status = 0
    try:
        for case, size in tqdm(shapes, "blocks", unit="map", dynamic_ncols=True, disable=None):
            left_out = () if (case, size) in compiled else cpu.COMPILED
            rows += measure(
                case, size, [name for name in (*cpu.PEERS, *cpu.OURS) if name not in left_out],
                device, dtype, arguments.batch,
                seconds=0.3 if arguments.quick else 1.5,
                seeds=SEEDS[:3] if arguments.quick else SEEDS,
                log=missing.append,
                threads=threads,
            )  # fmt: skip
        others += memory.measure(shapes, arguments.batch, threads)
        others += models.measure(variants, threads, 0.3 if arguments.quick else 3.0, missing.append)
    except KeyboardInterrupt:
        print("stopped: what is done is kept", file=sys.stderr)
        status = 130
    for line in missing:
        print(line)
    if not any(row["provider"] == "auto" for row in rows):
        return status or 1
    summary = cpu.summary(rows)
    print(cpu.table(rows))
    print(cpu.summary_table(summary))
    print(CPU_LEGEND)
    print(cpu.other_lines(others))
    if line := busy(rows):
        print(line)
    name = f"cpu-{arguments.dtype}-batch{arguments.batch}.json"
    _save(arguments, [*rows, *others], name, summary=summary)
    return status or int(bool(missing))


def _save(arguments: argparse.Namespace, rows: list[dict], name: str, **more: object) -> None:
    """Write a result file and, unless it is not wanted, its chart; print where they are."""
    device = arguments.device
    folder = arguments.out or (SCRATCH if arguments.quick else results.results_dir(device))
    document = {**results.document(rows, device), **more}
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


def run_saved(arguments: argparse.Namespace) -> int:
    """Print the table of what is kept; write it where that is asked for."""
    rows = saved.measure(arguments.device)
    print(saved.table(rows))
    if arguments.out:
        results.write(arguments.out, results.document(rows, arguments.device))
        print(arguments.out)
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    """Train; non-zero where the replaced model does not learn as the eager one does."""
    if reason := train.refusal():
        print(f"there is nothing to train on: {reason}")
        return 1
    steps = arguments.steps or (6 if arguments.quick else 300)
    try:
        rows = train.measure(arguments.variant, arguments.seed, steps, arguments.device)
    except KeyboardInterrupt:
        print("stopped: nothing is kept of a run that has not ended", file=sys.stderr)
        return 130
    verdict = train.verdict(rows)
    print(train.table(rows, verdict))
    _save(arguments, rows, f"train-{arguments.variant}.json", verdict=verdict)
    return int(not verdict["holds"])


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
    if arguments.command == "cpu":
        return run_cpu(arguments)
    if arguments.command == "operators":
        return run_operators(arguments)
    if arguments.command == "saved":
        return run_saved(arguments)
    if arguments.command == "train":
        return run_train(arguments)
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
