"""A chart from a result file alone: speed-up and time by the size of the map, or losses."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.train import smooth

# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes for print in grey.
_STYLES = {
    "eager": {"color": "#56B4E9", "marker": "s", "linestyle": ":"},
    "reference": {"color": "#E69F00", "marker": "o", "linestyle": "-."},
    "triton": {"color": "#009E73", "marker": "v", "linestyle": "-"},
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


def plot(results: Mapping, path: Path) -> Path:
    """Draw the blocks of a result file into a PNG, called and not replayed, or its operators.

    Points are cases; a line, or a bar, is their geometric mean. Of training runs it draws the
    losses.

    Raises:
        ValueError: if there is nothing of these.
    """
    # Older files have no ways: every block in them is called.
    rows = [
        row
        for row in results["rows"]
        if row["kind"] == "block" and row.get("way", "call") == "call"
    ]
    operators = [row for row in results["rows"] if row["kind"] == "operator"]
    training = [row for row in results["rows"] if row["kind"] == "training"]
    if not rows and not operators and not training:
        raise ValueError("nothing to draw: the results hold no block, operator or training run")
    if training:
        figure = _training(results, training)
    else:
        figure = _blocks(results, rows) if rows else _operators(results, operators)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


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
    _draw(left, speedups)
    left.set_yscale("log", base=2)
    values = [value for name in speedups for y in speedups[name].values() for value in y]
    low, high = min(0.7, *values) / 1.1, max(1.4, *values) * 1.2
    left.set_ylim(low, high)
    left.axhspan(low, 1, color="0.88", zorder=0)
    left.text(0.99, 0.01, "slower than eager", transform=left.transAxes, ha="right", va="bottom")
    left.set_ylabel("speed-up over eager PyTorch")
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))

    _draw(right, times)
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
        axes.legend(fontsize="small" if len(times) > 6 else None)


def _operators(results: Mapping, rows: Sequence[Mapping]) -> Figure:
    """Speed-up by operator: forward and step, called and replayed from a graph."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    names = list(dict.fromkeys(row["operator"] for row in rows))
    providers = [
        name for name in ("compile", "triton") if name in {row["provider"] for row in rows}
    ]
    figure = Figure(figsize=(5.5 * len(ways), 7), layout="constrained")
    for axes, (mode, way) in zip(
        figure.subplots(2, len(ways), squeeze=False, sharey=True).flat,
        [(mode, way) for mode in ("forward", "step") for way in ways],
        strict=True,
    ):
        for shift, provider in enumerate(providers):
            points = [
                [
                    row["speedup"]
                    for row in rows
                    if (row["mode"], row["way"], row["provider"], row["operator"])
                    == (mode, way, provider, name)
                ]
                for name in names
            ]
            at = [index + 0.4 * shift - 0.2 for index in range(len(names))]
            color, label = _STYLES[provider]["color"], _LABELS[provider]
            means = [geometric_mean(values) if values else 0 for values in points]
            axes.bar(at, means, 0.38, color=color, label=label)
            for x, values in zip(at, points, strict=True):
                axes.plot([x] * len(values), values, "k.", markersize=3)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.set_title(f"{mode}, {way}", fontsize=10)
        axes.grid(axis="y", color="0.8", linewidth=0.5)
    figure.axes[0].set_ylabel("speed-up over eager PyTorch")
    figure.axes[0].legend()
    kinds = ", ".join(dict.fromkeys(_what(row) for row in rows))
    figure.suptitle(f"Operators of {_cases(rows)}, {kinds}\n{_where(results)}", fontsize=10)
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


def _draw(axes: Axes, lines: _Points) -> None:
    for name, style in _STYLES.items():
        if name not in lines:
            continue
        points = sorted(lines[name].items())
        mean = [geometric_mean(values) for _, values in points]
        several = any(len(values) > 1 for _, values in points)
        if several and style["marker"]:
            flat = [(x, y) for x, values in points for y in values]
            axes.plot(
                *zip(*flat, strict=True),
                color=style["color"], marker=style["marker"], linestyle="", markersize=3, alpha=0.5,
            )  # fmt: skip
            style = {**style, "marker": ""}
        axes.plot([x for x, _ in points], mean, label=_LABELS[name], **style)


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
