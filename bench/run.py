"""``bench run``: which works are timed, the loop over them, and what is kept where it stops."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import report, results
from bench.cases import CASES, LARGE_SIDES, SWEEP_SIDES, Case
from bench.measure import (
    DEFAULT_PROVIDERS,
    DTYPES,
    PROVIDERS,
    auto_backend,
    available,
    busy,
    measure,
    refusal,
)
from bench.works import OPERATORS, Block, Model, Operator, Setting, Work
from seaattn_kernels import seaformer
from seaattn_kernels.budget import SEEDS

SCRATCH = Path("out/bench")
WHAT = ("block", *OPERATORS, "model")
MODES = ("forward", "step")
#: Whose square maps show how cost grows.
SWEPT = "T1"
#: Cases whose training step, and whose operators, are timed where nobody asks for cases.
STEP_CASES = ("B1", "L1", "YOLOv8n-P3")
OPERATOR_CASES = ("B1", "YOLOv8n-P3")
#: Of whole models these take minutes to build: they are timed where they are asked for.
_SLOW_FOR_MODELS = ("compile", "autotune", "freezing")
LEGEND = (
    "interval: 95 % of the median. limit: time over the limit (bench/limit.py): 1 is at it.\n"
    "error: root mean square against float64, eager's in brackets; of a step, of outputs and "
    "gradients in\nunits of the largest value of each. peak: memory beyond the result."
)
GPU_LEGEND = (
    "call: called from Python. graph: replayed from a CUDA graph, beside eager's. cold: with the "
    "L2 cache\noverwritten before each call."
)
BEATEN = (
    "Below 1 the limit is beaten: of a block it is torch.mm's time, and convolutions go through "
    "another library;\nof an operator it counts memory, which small maps never reach."
)

_Size = tuple[int, int]


def size_argument(text: str) -> str | _Size:
    """``table``, or a size as ``HxW``, for argparse."""
    if text == "table":
        return text
    height, _, width = text.partition("x")
    try:
        found = int(height), int(width)
    except ValueError:
        found = (0, 0)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be 'table' or HxW, got {text!r}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``bench run`` has beside those of every timing."""
    parser.add_argument(
        "--what", nargs="+", choices=WHAT, default=list(WHAT), metavar="WHAT",
        help=f"default: all of {', '.join(WHAT)}",
    )  # fmt: skip
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, metavar="MODE",
        help="forward, step (with a backward, in train mode); default: both, of models forward",
    )  # fmt: skip
    parser.add_argument(
        "--maps", nargs="+", type=size_argument, metavar="HxW",
        help="of every case; 'table': all that it has; default: those of an image of 512x512 "
        f"(YOLO: 640x640), and for the block squares from 8 to 512 of {SWEPT}",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", choices=seaformer.CONFIGS, metavar="VARIANT",
        help="segmenters at 512x512; default: t s b l, with --quick none",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
        help=f"timed beside eager, of {', '.join(PROVIDERS)}; default: "
        f"{', '.join(DEFAULT_PROVIDERS)}, with --quick without compile",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, help="for the timing of a work; default: 1.5, with --quick 0.3"
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the result file that a stopped run left, on this machine and commit",
    )  # fmt: skip


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Work]]]:
    """A name that is never used twice, and how to build it, for each work."""
    device, dtype, batch = arguments.device, DTYPES[arguments.dtype], arguments.batch
    models = arguments.models or ([] if arguments.quick else seaformer.CONFIGS)
    for mode in dict.fromkeys(arguments.modes or MODES):
        setting = Setting(device, dtype, batch, step=mode == "step")
        if "block" in arguments.what:
            for case, size in _blocks(arguments, mode):
                yield f"block {mode} {case.name} {size}", partial(Block, case, size, setting)
        for case, size in _operators(arguments):
            for name in OPERATORS:
                if name in arguments.what:
                    build = partial(Operator, name, case, size, setting)
                    yield f"{name} {mode} {case.name} {size}", build
        if "model" in arguments.what and (mode == "forward" or arguments.modes):
            for variant in dict.fromkeys(models):
                yield f"model {mode} {variant}", partial(Model, variant, setting)


def _listed(arguments: argparse.Namespace, names: Iterable[str]) -> list[tuple[Case, _Size]]:
    """The maps of these cases that were asked for, each once."""
    found = []
    for case in map(CASES.get, names):
        usual = [case.maps["640" if case.yolo else "512"]]
        for asked in usual if arguments.maps is None else arguments.maps:
            sizes = case.maps.values() if asked == "table" else [asked]
            found += [(case, size) for size in sizes]
    return list(dict.fromkeys(found))


def _blocks(arguments: argparse.Namespace, mode: str) -> list[tuple[Case, _Size]]:
    names = arguments.cases or (CASES if mode == "forward" else STEP_CASES)
    found = _listed(arguments, names)
    if mode == "forward" and arguments.maps is None and SWEPT in names:
        sides = (*SWEEP_SIDES, *LARGE_SIDES)
        found += [(CASES[SWEPT], (side, side)) for side in sides]
    found = list(dict.fromkeys(found))
    return found[:2] if arguments.quick else found


def _operators(arguments: argparse.Namespace) -> list[tuple[Case, _Size]]:
    found = _listed(arguments, arguments.cases or OPERATOR_CASES)
    return found[:1] if arguments.quick else found


def _wanted(arguments: argparse.Namespace, work: Work) -> list[str]:
    if arguments.peers:
        return arguments.peers
    slow = ("compile",) if arguments.quick else ()
    slow += _SLOW_FOR_MODELS if work.kind == "model" else ()
    return [name for name in DEFAULT_PROVIDERS if name not in slow]


def folder(arguments: argparse.Namespace) -> Path:
    """Where result files go: a quick one is none to keep."""
    if arguments.out:
        return arguments.out
    return SCRATCH if arguments.quick else results.results_dir(arguments.device)


def line(row: dict) -> str:
    """A row for the terminal."""
    speedup, peak, cold = row["speedup"], row["peak_bytes"], row["ms_cold"]
    return (
        f"{row['what']:<21}{row['mode']:<8}{row['case']:<11} {row['height']:>3}x{row['width']:<4} "
        f"{row['provider']:<12}{row['way']:<6}"
        f"{row['ms']:>9.3f} ms [{row['ms_low']:.3f}, {row['ms_high']:.3f}]"
        + (f"  cold {cold:.3f} ms" if cold else "")
        + f"  first {row['ms_first']:.1f} ms"
        + (f"  {speedup:.2f}x eager" if speedup else "  eager is not timed")
        + f"  limit {row['of_limit']:.2f}"
        f"  {row['gflops']:.1f} GFLOP/s  {row['gbytes']:.1f} GB/s"
        f"  error {row['rms_error']:.1e} ({row['rms_error_eager']:.1e})"
        + (f"  peak {peak / 2**20:.2f} MiB" if peak is not None else "")
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for; non-zero where a row is missing or a key stopped it.

    A provider that was asked for by name has to run something, not everything.
    """
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    path = folder(arguments) / f"{arguments.dtype}-batch{arguments.batch}-threads{threads}.json"
    document = {**results.document([], device), "not_timed": [], "done": []}
    if arguments.resume and path.exists():
        found = results.read(path)
        if changed := results.differences(found, document):
            print(f"{path} is not gone on with: other {', '.join(changed)}", file=sys.stderr)
            return 2
        document = found
    print(f"auto is {auto_backend(device, dtype)} for blocks here")
    graphs = device.type == "cuda"
    listed = list(jobs(arguments))
    unknown: dict[str, None] = dict.fromkeys(document["not_timed"])
    status, refused, taken = 0, set(), {row["provider"] for row in document["rows"]}
    try:
        for name, build in tqdm(listed, "works", unit="work", dynamic_ncols=True, disable=None):
            if name in document["done"]:
                continue
            torch.compiler.reset()
            work = build()
            wanted = _wanted(arguments, work)
            for provider in wanted:
                if not (reason := refusal(provider, work)):
                    taken.add(provider)
                else:
                    refused.add(provider)
                    what = "blocks" if work.kind == "block" else work.what
                    said = f"{provider}, {work.setting.mode} of {what}: {reason}"
                    if said not in unknown:
                        tqdm.write(f"not timed: {said}")
                    unknown[said] = None
            said = []
            rows = measure(
                work, wanted,
                seconds=arguments.seconds or (0.3 if arguments.quick else 1.5),
                seeds=SEEDS[:3] if arguments.quick else SEEDS,
                log=said.append,
                graphs=graphs,
            )  # fmt: skip
            status |= len(rows) < len(available(wanted, work)) * (2 if graphs else 1)
            for text in said:
                tqdm.write(text)
            for row in rows:
                tqdm.write(line(row))
            unknown.update(dict.fromkeys(said))
            document["rows"] += rows
            document["done"].append(name)
            document["not_timed"] = list(unknown)
            results.write(path, document)  # what is done outlives whatever stops the rest
    except KeyboardInterrupt:
        print("stopped: what is done is kept, and --resume goes on with it", file=sys.stderr)
        status = 130
    if arguments.peers and refused - taken:
        status = status or 1
    rows = document["rows"]
    if not rows:
        return status or 1
    print(LEGEND)
    if graphs:
        print(GPU_LEGEND)
    if said := busy(rows):
        print(said)
    if device.type == "cpu" and any(row["of_limit"] < 1 for row in rows):
        print(BEATEN)
    print(path)
    for written in () if arguments.no_chart else report.write(document, path):
        print(written)
    return int(status)
