"""Pictures from a result file alone: speed-up, time, roofline, losses."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.train import smooth

# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes for print in grey.
_STYLES = {
    "eager": {"color": "#56B4E9", "marker": "s", "linestyle": ":"},
    "reference": {"color": "#E69F00", "marker": "o", "linestyle": "-."},
    "triton": {"color": "#009E73", "marker": "v", "linestyle": "-"},
    "cuda": {"color": "#661100", "marker": "*", "linestyle": "-"},
    "cpu": {"color": "#117733", "marker": "h", "linestyle": "-"},
    "auto": {"color": "#0072B2", "marker": "D", "linestyle": "-"},
    "compile": {"color": "#CC79A7", "marker": "^", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "autotune": {"color": "#D55E00", "marker": "P", "linestyle": (0, (1, 1))},
    "channels_last": {"color": "#332288", "marker": "d", "linestyle": "-"},
    "freezing": {"color": "#882255", "marker": "X", "linestyle": (0, (5, 1, 1, 1))},
    "onnxruntime": {"color": "#999933", "marker": "<", "linestyle": "--"},
    "openvino": {"color": "#AA4499", "marker": ">", "linestyle": "--"},
    "limit": {"color": "black", "marker": "", "linestyle": "--"},
}
_LABELS = {
    "eager": "eager PyTorch",
    "reference": "reference (folded PyTorch)",
    "triton": "seaattn_kernels (Triton)",
    "cuda": "seaattn_kernels (CUDA)",
    "cpu": "seaattn_kernels (C++)",
    "auto": "seaattn_kernels",
    "compile": "torch.compile",
    "autotune": "torch.compile, max-autotune",
    "channels_last": "seaattn_kernels, channels_last",
    "freezing": "torch.compile, freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "limit": "limit",
}

_Points = Mapping[str, Mapping[int, Sequence[float]]]
#: Providers that are this package, the one that stands for it first.
_OURS = ("auto", "cpu", "cuda", "triton", "reference", "channels_last")


def plot(results: Mapping, path: Path) -> list[Path]:
    """Draw the pictures of a result file, called and not replayed, beside ``path``, a PNG.

    Blocks: speed-up and time by the size of the map, with the slope at which time grows; points are
    cases and lines their geometric mean. Roofline: FLOP/s by FLOP a byte. Operators, training steps
    and models: speed-up. Training runs: losses. The first picture is at ``path``, the others have
    what they show at the end of its name.

    Raises:
        ValueError: if there is nothing of these.
    """
    rows = results["rows"]
    called = [row for row in rows if row.get("way", "call") == "call"]
    # Older files have no modes: every row in them is a forward.
    forward = [row for row in called if row.get("mode", "forward") == "forward"]
    blocks = [row for row in forward if row["kind"] == "block"]
    training = [row for row in rows if row["kind"] == "training"]
    compared = [
        row for row in called
        if row["kind"] in ("operator", "model") or row.get("mode") == "step"
    ]  # fmt: skip
    # Files of before the roofline do not have what it needs.
    placed = [row for row in forward if row["kind"] != "model" and "copy_gbytes" in row]
    figures = {
        "": _blocks(results, blocks) if blocks else None,
        "losses": _training(results, training) if training else None,
        "speedups": _speedups(results, compared) if any("what" in r for r in compared) else None,
        "roofline": _roofline(results, placed) if placed else None,
    }
    found = [(name, figure) for name, figure in figures.items() if figure]
    if not found:
        raise ValueError("nothing to draw: the results hold no block, operator or training run")
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (name, figure) in enumerate(found):
        paths.append(path.with_stem(f"{path.stem}-{name}") if index else path)
        figure.savefig(paths[-1], dpi=150)
    return paths


def _blocks(results: Mapping, rows: Sequence[Mapping]) -> Figure:
    """Speed-up and time by the size of the map, a line of charts for each number of threads."""
    # Older files have no threads in their rows: there is one number of them.
    groups = list(dict.fromkeys(row.get("threads") for row in rows))
    # Figure without pyplot: no backend is chosen, no display is touched.
    figure = Figure(figsize=(11, 4.8 * len(groups)), layout="constrained")
    for threads, (left, right) in zip(
        groups, figure.subplots(len(groups), 2, squeeze=False), strict=True
    ):
        _chart(left, right, [row for row in rows if row.get("threads") == threads])
        if len(groups) > 1:
            left.set_title(f"threads: {threads}", fontsize=10)
    title = f"Sea attention block ({_cases(rows)}), inference, {_what(rows[0])}"
    figure.suptitle(f"{title}\n{_where(results, groups)}", fontsize=10)
    return figure


def _chart(left: Axes, right: Axes, rows: Sequence[Mapping]) -> None:
    speedups, times = _collect(rows)
    # One block alone shows how its time grows; where none has most of the sizes, all do together.
    swept = [row for row in rows if row["case"] == _swept(rows)]
    alone = 3 * len(_pixels(swept)) >= 2 * len(_pixels(rows))
    lines = _collect(swept) if alone else (speedups, times)
    _draw(left, speedups, lines[0])
    left.set_yscale("log", base=2)
    values = [value for name in speedups for y in speedups[name].values() for value in y]
    low, high = min(0.7, *values) / 1.1, max(1.4, *values) * 1.2
    left.set_ylim(low, high)
    left.axhspan(low, 1, color="0.88", zorder=0)
    left.text(0.99, 0.01, "slower than eager", transform=left.transAxes, ha="right", va="bottom")
    left.set_ylabel("speed-up over eager PyTorch")
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))

    _draw(right, times, lines[1], _slopes(_collect(swept)[1]))
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    right.set_ylabel("time of one call (ms)")

    sizes = sorted({(row["height"] * row["width"], _name(row)) for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        ticks = dict(reversed(sizes))
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=60 if len(ticks) > 8 else 0)
        axes.minorticks_off()
        axes.set_xlabel("map, H x W (axis: pixels)")
        axes.grid(color="0.8", linewidth=0.5)
    # One legend, where no line ends: in the upper left of what grows.
    title = f"lines: {swept[0]['case']}" if alone and len(swept) < len(rows) else None
    right.legend(fontsize="small" if len(times) > 6 else None, title=title, loc="upper left")


def _pixels(rows: Sequence[Mapping]) -> set[int]:
    return {row["height"] * row["width"] for row in rows}


def _swept(rows: Sequence[Mapping]) -> str:
    """The case with most maps."""
    maps = {(row["case"], row["height"], row["width"]) for row in rows}
    return Counter(case for case, _, _ in maps).most_common(1)[0][0]


def _slopes(times: _Points) -> dict[str, str]:
    """``time ~ pixels^k`` by least squares over maps from 32x32, where work outweighs calls."""
    found = {}
    for name, points in times.items():
        large = [(x, geometric_mean(y)) for x, y in points.items() if x >= 32 * 32]
        if len(large) >= 3:
            slope, _ = np.polyfit(*np.log2(np.array(large)).T, 1)
            found[name] = f", ~ pixels^{slope:.2f}"
    return found


def _speedups(results: Mapping, rows: Sequence[Mapping]) -> Figure:
    """Of operators, steps and models over eager, a chart for each mode; points are maps."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    rows = [row for row in rows if row["provider"] != "eager" and row["speedup"]]
    providers = [name for name in _STYLES if name in {row["provider"] for row in rows}]
    figure = Figure(figsize=(11, 4.2 * len(modes)), layout="constrained")
    wide = 0.8 / max(1, len(providers))
    for axes, mode in zip(figure.subplots(len(modes), 1, squeeze=False).flat, modes, strict=True):
        highest = 1.0
        names = list(dict.fromkeys(_subject(row) for row in rows if row["mode"] == mode))
        for shift, provider in enumerate(providers):
            style = _STYLES[provider]
            color, label = style["color"], _LABELS[provider]
            for x, name in enumerate(names):
                found = [
                    row["speedup"]
                    for row in rows
                    if (row["mode"], row["provider"], _subject(row)) == (mode, provider, name)
                ]
                if not found:
                    continue
                at = x + wide * (shift + 0.5) - 0.4
                axes.bar(at, geometric_mean(found), 0.9 * wide, color=color, label=label)
                axes.plot([at] * len(found), found, "k.", markersize=3)
                label, highest = None, max(highest, *found)
        axes.set_ylim(0, 1.15 * highest)
        axes.axhspan(0, 1, color="0.88", zorder=0)
        axes.set_xticks(range(len(names)), names, rotation=12)
        axes.set_title(f"{mode} (grey: slower than eager)", fontsize=10)
        axes.set_ylabel("speed-up over eager PyTorch")
        axes.grid(axis="y", color="0.8", linewidth=0.5)
        if providers:
            axes.legend(fontsize="small")
    kinds = ", ".join(dict.fromkeys(_what(row) for row in rows))
    figure.suptitle(f"Operators, training steps, models, {kinds}\n{_where(results)}", fontsize=10)
    return figure


def _subject(row: Mapping) -> str:
    return f"SeaFormer-{row['case']}" if row["kind"] == "model" else row["what"]


def _roofline(results: Mapping, rows: Sequence[Mapping]) -> Figure:
    """FLOP/s by FLOP a byte, of ours and eager, beneath what the machine can do."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    # The ceilings are measured beside every work: their medians hold for all.
    matrix = float(np.median([row["matrix_gflops"] for row in rows]))
    copy = float(np.median([row["copy_gbytes"] for row in rows]))
    ours = [name for name in _OURS if name in {row["provider"] for row in rows}][:1]
    intensities = []
    for name in ("eager", *ours):
        style = {**_STYLES[name], "linestyle": ""}
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = [row for row in rows if (row["provider"], row["kind"]) == (name, kind)]
            x = [row["flops"] / row["bytes"] for row in found]
            intensities += x
            full = "full" if kind == "block" else "none"
            axes.plot(
                x, [row["gflops"] for row in found],
                **style, fillstyle=full, markersize=5, label=f"{_LABELS[name]}, {kind}s",
            )  # fmt: skip
    low, high = min(intensities) / 2, max(*intensities, matrix / copy) * 2
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(matrix, copy * x), color="black", label="roofline")
    axes.annotate(f"{matrix:.0f} GFLOP/s, large product", (high, matrix), ha="right", va="bottom")
    axes.annotate(f"{copy:.0f} GB/s, large copy", (low, copy * low), ha="left", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte: each input read once, each output written once")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color="0.8", linewidth=0.5)
    axes.legend(fontsize="small")
    figure.suptitle(f"Roofline, forward, {_what(rows[0])}\n{_where(results)}", fontsize=10)
    return figure


def _training(results: Mapping, rows: Sequence[Mapping]) -> Figure:
    """Smoothed losses of the runs, and how far they are from those of the first, eager's."""
    labels = [
        f"{_LABELS['eager' if row['backend'] == 'eager' else 'auto']}, seed {row['seed']}"
        for row in rows
    ]
    curves = [smooth(row["losses"]) for row in rows]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (label, curve, name) in enumerate(
        zip(labels, curves, ("eager", "auto", "compile", "reference"), strict=True)
    ):
        every = max(1, len(curve) // 8)
        # Markers take turns, so that one curve on another is seen.
        style = {**_STYLES[name], "markevery": (index * every // 4, every), "label": label}
        steps = range(len(rows[0]["losses"]) - len(curve) + 1, len(rows[0]["losses"]) + 1)
        left.plot(steps, curve, **style)
        if index:
            right.plot(steps, abs(curve - curves[0]), **style)
    for axes, what in ((left, "training loss"), (right, f"its difference from {labels[0]}")):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{what} (running mean)")
        axes.grid(color="0.8", linewidth=0.5)
        axes.legend()
    title = f"Training {rows[0]['case']}, on digits, {_what(rows[0])}"
    figure.suptitle(f"{title}\n{_where(results)}", fontsize=10)
    return figure


def _collect(rows: Sequence[Mapping]) -> tuple[_Points, _Points]:
    speedups: dict = defaultdict(lambda: defaultdict(list))
    times: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        pixels = row["height"] * row["width"]
        times[row["provider"]][pixels].append(row["ms"])
        if row["provider"] == "eager":
            times["limit"][pixels].append(row["ms_limit"])
            speedups["limit"][pixels].append(row["ms"] / row["ms_limit"])
        else:
            speedups[row["provider"]][pixels].append(row["speedup"])
    return speedups, times


def _draw(
    axes: Axes, every: _Points, lines: _Points, more: Mapping[str, str] | None = None
) -> None:
    """Points of ``every`` map, ``lines`` through means; ``more``: what their labels end with."""
    for name, style in _STYLES.items():
        if name not in every:
            continue
        points = sorted(lines.get(name, {}).items())
        label = _LABELS[name] + (more or {}).get(name, "")
        mean = [geometric_mean(values) for _, values in points]
        flat = [(x, y) for x, values in sorted(every[name].items()) for y in values]
        if len(flat) > len(points) and style["marker"]:
            axes.plot(
                *zip(*flat, strict=True),
                color=style["color"], marker=style["marker"], linestyle="", markersize=3, alpha=0.5,
                label=None if points else label,
            )  # fmt: skip
            style = {**style, "marker": ""}
        if points:
            axes.plot([x for x, _ in points], mean, label=label, **style)


def _name(row: Mapping) -> str:
    height, width = row["height"], row["width"]
    side = math.isqrt(height * width)
    return f"{side}²" if height == width else f"{height}x{width}"


def _where(results: Mapping, threads: Sequence[int | None] = (None,)) -> str:
    machine, versions = results["machine"], results["versions"]
    counts = " and ".join(str(count or machine["torch_threads"]) for count in threads)
    where = machine["gpu"] or f"{machine['cpu']}, {counts} threads"
    return (
        f"{where}, torch {versions['torch']}, "
        f"seaattn_kernels {versions['seaattn_kernels']}, {results['date'][:10]}"
    )


def _what(row: Mapping) -> str:
    return f"{row['dtype']}, batch {row['batch']}"


def _cases(rows: Sequence[Mapping]) -> str:
    names = list(dict.fromkeys(row["case"] for row in rows))
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} of SeaFormer and YOLOv8"
