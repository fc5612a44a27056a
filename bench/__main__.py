"""Time blocks, operators and models, compare results, draw them; train; compile kernels."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import compare, cpu, peers, report, results, run, saved, train
from bench.cases import CASES
from bench.measure import (
    DTYPES,
    auto_backend,
    busy,
    device_argument,
    measure,
    positive_argument,
    refusal,
)
from bench.plot import plot
from bench.works import Block, Setting
from seaattn_kernels import native, seaformer
from seaattn_kernels.budget import SEEDS

#: Whose stages are listed where several targets are compiled.
STAGES_TARGET = "sm_90"
CPU_LEGEND = (
    "Means over maps are geometric, but for microseconds over the limit. best peer: the fastest of "
    "all\nthat are not ours, at each map; folded is this package's plain PyTorch."
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
        "--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    common.add_argument("--batch", type=positive_argument, default=1, help="default: %(default)s")
    placed = argparse.ArgumentParser(add_help=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed.add_argument(
        "--device", type=device_argument, default=device, help="default: %(default)s"
    )
    each = commands.add_parser(
        "run", parents=[common, placed],
        help="blocks, operators, training steps, models: check, time, write JSON, CSV, pictures",
    )  # fmt: skip
    each.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    each.add_argument("--threads", type=positive_argument, help="torch.set_num_threads")
    run.add_arguments(each)
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
    tiling = commands.add_parser(
        "tiles", help="time the tiles of csrc/cuda on this GPU, and fit what their choice goes by"
    )
    tiling.add_argument(
        "--seconds", type=float, default=0.5, help="of a map (default: %(default)s)"
    )
    tiling.add_argument("--write", action="store_true", help="into kernels/tile_costs.py")
    beside = commands.add_parser(
        "compare", help="two result files: ratios; non-zero where one is slower or errs more"
    )
    beside.add_argument("old", type=Path)
    beside.add_argument("new", type=Path)
    beside.add_argument(
        "--threshold", type=float, default=1.1,
        help="a ratio above it, beyond the noise, is a slowdown (default: %(default)s)",
    )  # fmt: skip
    beside.add_argument(
        "--absolute", action="store_true",
        help="times themselves, on an idle machine; default: as ratios to eager's of the same run",
    )  # fmt: skip
    draw = commands.add_parser("plot", help="draw the pictures of a result file")
    draw.add_argument("results", type=Path)
    draw.add_argument("--out", type=Path, help="PNG (beside the result file)")
    draw.add_argument(
        "--readme", action="store_true", help="put the summary of the file into README too"
    )
    static = commands.add_parser(
        "static", help="compile the Triton and CUDA kernels for GPUs that need not be here"
    )
    static.add_argument("--targets", nargs="+", metavar="TARGET", help="default: all")
    static.add_argument(
        "--kernels", nargs="+", metavar="KERNEL",
        help="of Triton, or sources of csrc/cuda: axis, finish; default: all",
    )  # fmt: skip
    static.add_argument(
        "--all", action="store_true",
        help="every configuration on every target; default: on sm_80 and sm_90, one elsewhere",
    )  # fmt: skip
    static.add_argument("--processes", type=positive_argument, help="default: one a core")
    static.add_argument("--out", type=Path, help="JSON of the table")
    return parser


def run_cpu(arguments: argparse.Namespace) -> int:
    """Measure the C++ block and its peers; non-zero where one is wrong or a key stopped it."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    if auto_backend(device, dtype) != "cpu":
        print(f"there is no C++ block to time: {native.REASON or 'SEAATTN_BACKEND is set'}")
        return 1
    threads = arguments.threads or sorted({1, torch.get_num_threads()})
    shapes = cpu.shapes(arguments.cases or CASES)[:: 8 if arguments.quick else 1]
    wanted = arguments.compiled or ("none" if arguments.quick else "512")
    compiled = {"512": cpu.compiled(shapes), "all": shapes, "none": []}[wanted]
    setting = Setting(device, dtype, arguments.batch)
    first = Block(*shapes[0], setting)
    for name in peers.PACKAGES:
        if reason := refusal(name, first):
            print(f"{name} is not timed: {reason}")
    print(f"torch.compile is timed at {len(compiled)} of {len(shapes)} maps")
    variants = (
        ([] if arguments.quick else ["b", "l"]) if arguments.models is None else arguments.models
    )
    rows: list[dict] = []
    missing: list[str] = []
    status = 0
    try:
        for case, size in tqdm(shapes, "blocks", unit="map", dynamic_ncols=True, disable=None):
            left_out = () if (case, size) in compiled else cpu.COMPILED
            rows += measure(
                Block(case, size, setting),
                [name for name in (*cpu.PEERS, *cpu.OURS) if name not in left_out],
                seconds=0.3 if arguments.quick else 1.5,
                seeds=SEEDS[:3] if arguments.quick else SEEDS,
                log=missing.append,
                threads=threads,
            )  # fmt: skip
        seconds = 0.3 if arguments.quick else 3.0
        rows += cpu.measured_models(variants, threads, seconds, missing.append)
    except KeyboardInterrupt:
        print("stopped: what is done is kept", file=sys.stderr)
        status = 130
    for line in missing:
        print(line)
    if not any((row["kind"], row["provider"]) == ("block", "auto") for row in rows):
        return status or 1
    summary = cpu.summary(rows)
    print(cpu.table(rows))
    print(cpu.summary_table(summary))
    print(CPU_LEGEND)
    print(cpu.other_lines(rows))
    if line := busy(rows):
        print(line)
    name = f"cpu-{arguments.dtype}-batch{arguments.batch}.json"
    _save(arguments, rows, name, summary=summary)
    return status or int(bool(missing))


def _save(arguments: argparse.Namespace, rows: list[dict], name: str, **more: object) -> None:
    """Write a result file and, unless it is not wanted, its chart; print where they are."""
    path = run.folder(arguments) / name
    document = {**results.document(rows, arguments.device), **more}
    results.write(path, document)
    print(path)
    if not arguments.no_chart:
        for picture in plot(document, path.with_suffix(".png")):
            print(picture)


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
    from bench import nvcc, stages, static

    of_triton, of_cuda = static.kernel_names(), tuple(nvcc.SOURCES)
    for given, known in (
        (arguments.targets, tuple(static.TARGETS)), (arguments.kernels, of_triton + of_cuda),
    ):  # fmt: skip
        if unknown := set(given or ()) - set(known):
            sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = arguments.targets or list(static.TARGETS)
    rows: list[static.Binary] = []
    if not arguments.kernels or {*arguments.kernels} & {*of_triton}:
        full = list(static.TARGETS) if arguments.all else static.FULL
        rows += static.compile_all(names, arguments.kernels, full, arguments.processes)
    rows += nvcc.compile_all(names, arguments.kernels, arguments.processes)
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


def run_compare(arguments: argparse.Namespace) -> int:
    """Print the comparison; non-zero where something is slower, or errs more, or nothing pairs."""
    old, new = results.read(arguments.old), results.read(arguments.new)
    if changed := results.differences(old, new):
        print(f"of another {', '.join(changed)}")
    rows = compare.pair(old["rows"], new["rows"], arguments.absolute)
    print(compare.table(rows, arguments.threshold))
    return int(not rows or any(row.slower(arguments.threshold) or row.worse for row in rows))


def run_tiles(arguments: argparse.Namespace) -> int:
    """Triton, which the kernels import, is imported by this command alone."""
    from bench import tiles

    return tiles.run(arguments)


def draw(arguments: argparse.Namespace) -> int:
    document = results.read(arguments.results)
    for picture in plot(document, arguments.out or arguments.results.with_suffix(".png")):
        print(picture)
    if arguments.readme:
        report.into_readme(arguments.results)
    return 0


_COMMANDS = {
    "run": run.run,
    "cpu": run_cpu,
    "saved": run_saved,
    "train": run_train,
    "static": static,
    "tiles": run_tiles,
    "compare": run_compare,
    "plot": draw,
}


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return _COMMANDS[arguments.command](arguments)
    except (OSError, ValueError, KeyError) as error:
        if arguments.command not in ("compare", "plot"):
            raise
        sys.exit(f"these are no results that {arguments.command} can take: {error}")


if __name__ == "__main__":
    sys.exit(main())
