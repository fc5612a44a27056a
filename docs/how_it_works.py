"""Draws how-it-works.png: the block as eager PyTorch runs it, and as four Triton kernels.

python docs/how_it_works.py [FILE]
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

#: The kernels, each with a colour of Okabe and Ito and the steps of the block that it runs.
KERNELS = {
    "project": ("#56B4E9", ("qkv",)),
    "attend": ("#E69F00", ("mean row", "mean column", "attend row", "attend column")),
    "encode": ("#F0E442", ("encode row", "encode column")),
    "finish": ("#009E73", ("depthwise", "pointwise", "add", "proj", "gate")),
}
#: Where each step stands, and what it says.
STEPS = {
    "qkv": (2.0, 3.0, "q, k, v\n1x1 + BN"),
    "mean row": (4.6, 4.2, "mean of rows\n+ position"),
    "mean column": (4.6, 1.8, "mean of cols\n+ position"),
    "attend row": (6.8, 4.2, "softmax\nattention"),
    "attend column": (6.8, 1.8, "softmax\nattention"),
    "encode row": (9.0, 4.2, "act, 1x1\n+ BN"),
    "encode column": (9.0, 1.8, "act, 1x1\n+ BN"),
    "add": (11.4, 3.0, "v + row\n+ column"),
    "proj": (13.4, 3.0, "act, 1x1\n+ BN"),
    "gate": (15.4, 3.0, "h_sigmoid\n* detail"),
    "depthwise": (11.4, 0.3, "dw 3x3\n+ BN"),
    "pointwise": (13.4, 0.3, "act, 1x1\n+ BN"),
}
ARROWS = (
    ("qkv", "mean row"), ("qkv", "mean column"), ("mean row", "attend row"),
    ("mean column", "attend column"), ("attend row", "encode row"),
    ("attend column", "encode column"), ("encode row", "add"), ("encode column", "add"),
    ("qkv", "add"), ("add", "proj"), ("proj", "gate"), ("qkv", "depthwise"),
    ("depthwise", "pointwise"), ("pointwise", "gate"),
)  # fmt: skip
WIDTH, HEIGHT = 1.6, 0.9
#: Launches of eager PyTorch for one block in eval mode.
EAGER = 51


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], way: str = "arc3"
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color="#444444", linewidth=1.1,
            shrinkA=0, shrinkB=0, connectionstyle=way, zorder=1,
        )
    )  # fmt: skip


def box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    corner = x - WIDTH / 2, y - HEIGHT / 2
    axes.add_patch(
        FancyBboxPatch(
            corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour, edgecolor="black", linewidth=0.8, zorder=2,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3)


def draw() -> Figure:
    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    colours = {step: colour for colour, steps in KERNELS.values() for step in steps}
    for first, second in ARROWS:
        (x, y, _), (to_x, to_y, _) = STEPS[first], STEPS[second]
        if second == "depthwise":  # below what lies between
            arrow(axes, (x, y - HEIGHT / 2), (to_x - WIDTH / 2, to_y), "angle,angleA=-90,angleB=0")
        elif second == "gate" and first == "pointwise":
            arrow(axes, (x + WIDTH / 2, y), (to_x, to_y - HEIGHT / 2), "angle,angleA=0,angleB=90")
        else:
            arrow(axes, (x + WIDTH / 2, y), (to_x - WIDTH / 2, to_y))
    for step, (x, y, text) in STEPS.items():
        box(axes, x, y, text, colours[step])
    arrow(axes, (0.3, 3.0), (2.0 - WIDTH / 2, 3.0))
    axes.text(0.2, 3.0, "x", ha="right", va="center", fontsize=11)
    arrow(axes, (15.4 + WIDTH / 2, 3.0), (16.9, 3.0))
    axes.text(17.0, 3.0, "out", ha="left", va="center", fontsize=11)
    axes.text(6.8, 5.1, "vectors along the axes: H + W of them", ha="center", fontsize=9)

    side, y = 0.27, -1.5
    axes.text(0.2, y, f"eager PyTorch: {EAGER} launches", va="center", fontsize=10)
    for index in range(EAGER):
        axes.add_patch(
            FancyBboxPatch(
                (4.1 + index * 0.25, y - side / 2), 0.17, side, boxstyle="square,pad=0",
                facecolor="#BBBBBB", edgecolor="black", linewidth=0.5,
            )
        )  # fmt: skip
    y = -2.3
    axes.text(0.2, y, f"this package: {len(KERNELS)} launches", va="center", fontsize=10)
    for index, (name, (colour, _)) in enumerate(KERNELS.items()):
        box(axes, 5.0 + index * 1.9, y, name, colour)
    told = "one colour, one kernel: nothing between its\nsteps is written to memory"
    axes.text(12.2, y, told, fontsize=9, va="center")
    axes.set(xlim=(-0.2, 17.8), ylim=(-2.9, 5.5), aspect="equal")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("how-it-works.png")
    draw().savefig(target, dpi=110)
    print(target)
