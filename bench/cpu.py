"""The speed of the block on a CPU: which maps, the table, and what it comes to beside the targets.

Ours is the block by its C++ kernel, as "auto" takes it, on maps in NCHW and in channels_last. Its
peers have theirs in NCHW.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import geometric_mean, mean
from typing import NamedTuple

import torch

from bench.cases import CASES, SWEEP_SIDES, Case
from bench.measure import measure
from bench.models import attention_shares, blocks_of
from bench.timing import with_threads
from bench.works import Model, Setting

LARGEST_PIXELS = 128 * 128
#: The block of which square maps are added.
_SWEPT = "B1"
#: Blocks at whose maps of a 512x512 image torch.compile is timed, unless more is asked for: a
#: compilation takes seconds, and there are two for each map and number of threads.
_COMPILED_CASES = ("B1", "B2", "L1", "L2", "L3")
COMPILED = ("compile", "freezing")
#: The block in the two layouts, and what it is held against.
OURS = {"auto": "NCHW", "channels_last": "channels_last"}
PEERS = ("eager", "reference", *COMPILED, "onnxruntime", "openvino")
#: As the table heads them, where that is not the provider's name.
_HEADS = {"reference": "folded", "auto": "ours"}

_MEDIUM, _LARGE = 14 * 14, 64 * 64

Shape = tuple[Case, tuple[int, int]]
#: What was measured of a map with a number of threads, by provider.
Found = dict[str, dict]


def shapes(names: Iterable[str]) -> list[Shape]:
    """The maps of these blocks, each once: where two blocks have the same sizes, under the first.

    With square maps of B1 beside those it has, and without any above 128x128.
    """
    listed: dict[tuple, Shape] = {}
    for name in names:
        case = CASES[name]
        sizes = set(case.maps.values())
        if name == _SWEPT:
            sizes |= {(side, side) for side in SWEEP_SIDES}
        for height, width in sorted(sizes, key=lambda size: (size[0] * size[1], size)):
            if height * width <= LARGEST_PIXELS:
                shape = (case, (height, width))
                listed.setdefault(_sizes(shape), shape)
    return list(listed.values())


def compiled(listed: Iterable[Shape]) -> list[Shape]:
    """Those of the maps that SeaFormer-B and -L have at 512x512."""
    wanted = {_sizes((CASES[name], CASES[name].maps["512"])) for name in _COMPILED_CASES}
    return [shape for shape in listed if _sizes(shape) in wanted]


def _sizes(shape: Shape) -> tuple:
    case, size = shape
    return case.channels, case.key_dim, case.heads, *size


def by_map(rows: Iterable[Mapping]) -> dict[int, list[Found]]:
    """The rows of blocks by number of threads, then by map. Maps without ours are left out."""
    found: dict[int, dict[tuple, Found]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["kind"] == "block":
            where = (row["case"], row["height"], row["width"])
            found[row["threads"]][where][row["provider"]] = dict(row)
    return {
        threads: [providers for providers in maps.values() if "auto" in providers]
        for threads, maps in found.items()
    }


def best_peer(found: Found) -> dict:
    """The row of the fastest that is not ours."""
    return min((found[name] for name in PEERS if name in found), key=lambda row: row["ms"])


def table(rows: Sequence[Mapping]) -> str:
    """Microseconds and, in brackets, times the limit; how much faster ours is than which peer."""
    lines = []
    for threads, maps in by_map(rows).items():
        listed = [name for name in (*PEERS, *OURS) if any(name in found for found in maps)]
        first = next(iter(maps[0].values()))
        lines.append(
            f"\n{_threads(threads)}, {first['dtype']}, batch {first['batch']}: us (of the limit)"
        )
        heads = "".join(f"{_head(name):>16}" for name in listed)
        lines.append(f"{'block':<11}{'map':>8}{'limit':>9}{heads}   ours over the best peer, eager")
        for found in maps:
            ours, eager, best = found["auto"], found["eager"], best_peer(found)
            cells = "".join(f"{_cell(found.get(name)):>16}" for name in listed)
            lines.append(
                f"{ours['case']:<11}{_size(ours):>8}{ours['ms_limit'] * 1e3:>9.1f}{cells}"
                f"   {best['ms'] / ours['ms']:.2f}x {_head(best['provider'])}"
                f", {eager['ms'] / ours['ms']:.2f}x"
            )
    return "\n".join(lines)


def _head(provider: str) -> str:
    return _HEADS.get(provider, provider)


def _cell(row: Mapping | None) -> str:
    return f"{row['ms'] * 1e3:.1f} ({row['of_limit']:.2f})" if row else "-"


def _size(row: Mapping) -> str:
    return f"{row['height']}x{row['width']}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def measured_models(
    variants: Iterable[str], threads: Sequence[int], seconds: float, log: Callable[[str], None]
) -> list[dict]:
    """Rows of SeaFormer segmenters, eager and ours, with the share that the attention has."""
    rows = []
    for variant in variants:
        work = Model(variant, Setting(torch.device("cpu"), torch.float32))
        found = measure(work, ["auto"], seconds, log=log, threads=threads)
        models, x = [work.candidate(name) for name in ("eager", "auto")], work.given(0)
        for row in found:
            if row["provider"] == "auto":
                with with_threads(row["threads"]):
                    shares = attention_shares(*models, blocks_of(work.module), x)
                row["attention_share_eager"], row["attention_share"] = shares
        rows += found
    return rows


class Target(NamedTuple):
    """A bound on a figure, and whether figures are to lie below it or above."""

    bound: float
    sign: str

    def met(self, value: float) -> bool:
        return _COMPARE[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


_COMPARE = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
#: By number of threads.
_BEST_PEER = {1: Target(1.2, ">="), 2: Target(1.5, ">=")}
_EAGER = {1: Target(2.3, ">="), 2: Target(3.3, ">=")}


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """What the rows come to, for each number of threads and layout: geometric means over maps.

    Microseconds over the limit are an ordinary mean, for some are below it.
    """
    return [
        {
            "threads": threads,
            "layout": OURS[layout],
            "figure": figure,
            "maps": count,
            "value": value,
            "note": note,
            "target": str(target) if target else None,
            "met": target.met(value) if target else None,
        }
        for threads, maps in by_map(rows).items()
        for layout in OURS
        for figure, count, value, note, target in _figures(threads, maps, layout)
    ]


def _figures(
    threads: int, maps: Sequence[Found], layout: str
) -> Iterator[tuple[str, int, float, str, Target | None]]:
    """Name, number of maps, value, what else there is to say, and target of each figure."""
    maps = [found for found in maps if layout in found]

    def where(holds: Callable[[int], bool]) -> list[dict]:
        rows = [found[layout] for found in maps]
        return [row for row in rows if holds(row["height"] * row["width"])]

    for name, rows, target in (
        ("of the limit, maps from 14x14", where(lambda n: n >= _MEDIUM), Target(1.15, "<=")),
        ("of the limit, maps from 64x64", where(lambda n: n >= _LARGE), Target(1, "<")),
        ("of the limit, smaller maps", where(lambda n: n < _MEDIUM), None),
    ):
        if rows:
            yield name, len(rows), geometric_mean(row["of_limit"] for row in rows), "", target
    if rows:  # the smaller maps
        extra = [(row["ms"] - row["ms_limit"]) * 1e3 for row in rows]
        most = max(extra)
        note = f"at most {most:.1f}, {_where(rows[extra.index(most)])}"
        yield "us over the limit, smaller maps", len(rows), mean(extra), note, Target(40, "<=")
    if maps:
        peers = [best_peer(found) for found in maps]
        ratios = [peer["ms"] / found[layout]["ms"] for peer, found in zip(peers, maps, strict=True)]
        fastest = Counter(peer["provider"] for peer in peers).most_common()
        note = ", ".join(f"{_head(name)} at {count}" for name, count in fastest)
        target = _BEST_PEER.get(threads)
        yield "best peer over ours", len(maps), geometric_mean(ratios), note, target
        worst = ratios.index(min(ratios))
        note = f"{_where(peers[worst])}, {_head(peers[worst]['provider'])}"
        yield "the same, worst map", 1, ratios[worst], note, Target(1, ">=")
        eager = geometric_mean(found["eager"]["ms"] / found[layout]["ms"] for found in maps)
        yield "eager over ours", len(maps), eager, "", _EAGER.get(threads)


def _where(row: Mapping) -> str:
    return f"{row['case']} {_size(row)}"


def summary_table(found: Sequence[Mapping]) -> str:
    lines = []
    for group in dict.fromkeys((row["threads"], row["layout"]) for row in found):
        threads, layout = group
        lines.append(f"\n{f'ours in {layout}, {_threads(threads)}':<36}maps    mean")
        for row in found:
            if (row["threads"], row["layout"]) != group:
                continue
            target = ""
            if row["target"]:
                target = f"target {row['target']:<8}{'met' if row['met'] else 'not met'}"
            lines.append(
                f"{row['figure']:<36}{row['maps']:>4}{row['value']:>8.2f}"
                f"   {target:<22}  {row['note']}".rstrip()
            )
    return "\n".join(lines)


def other_lines(rows: Sequence[Mapping]) -> str:
    """What is to be said of memory, for each number of threads, and of each whole model."""
    lines = []
    for threads, maps in by_map(rows).items():
        chosen = [
            (found["auto"]["peak_bytes"] / found["eager"]["allocated_bytes"], found)
            for found in maps
            if "eager" in found
        ]
        most, where = max(chosen, key=lambda pair: pair[0])
        share = _mean(share for share, _ in chosen)
        at_once = _mean(
            found["auto"]["peak_bytes"] / found["eager"]["peak_bytes"] for _, found in chosen
        )
        lines.append(
            f"scratch of our block, {_threads(threads)}: {100 * share:.1f} % of what eager "
            f"allocates (geometric mean; most {100 * most:.0f} %, {_where(where['auto'])}), "
            f"{100 * at_once:.0f} % of what eager holds at once"
        )
    lines += [
        f"{row['what']} at {_size(row)}, {_threads(row['threads'])}: "
        f"eager {row['ms'] * row['speedup']:.1f} ms, of which attention "
        f"{100 * row['attention_share_eager']:.0f} %; replaced {row['ms']:.1f} ms, "
        f"{100 * row['attention_share']:.0f} %: {row['speedup']:.2f}x"
        for row in rows
        if row["kind"] == "model" and row["provider"] == "auto"
    ]
    return "\n".join(lines)


def _mean(shares: Iterable[float]) -> float:
    """Geometric, where nothing counts as a thousandth."""
    return geometric_mean(max(share, 1e-3) for share in shares)
