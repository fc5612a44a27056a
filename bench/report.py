"""What is made of a result file beside its pictures: a CSV, and a summary in Markdown."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from bench import results
from bench.plot import plot

_README = Path(__file__).parents[1] / "README.md"
#: Between these lines README holds the summary of a result file.
BEGIN, END = "<!-- begin of the summary of {} -->", "<!-- end of the summary -->"
_OURS = ("auto", "cpu", "cuda", "triton", "reference")
_CAPTIONS = {
    "": "Speed-up over eager and time of a call",
    "speedups": "Speed-up of operators, training steps and models",
    "roofline": "Roofline",
    "losses": "Training losses",
}


def write(document: Mapping, path: Path) -> list[Path]:
    """Write pictures, CSV and summary beside the result file ``path``; return where they are."""
    drawn = plot(document, path.with_suffix(".png"))
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in document["rows"] for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(document["rows"])
    text = path.with_suffix(".md")
    pictures = [picture.name for picture in drawn]
    text.write_text(f"# {path.stem}\n\n{summary(document, path.name, pictures)}")
    return [*drawn, table, text]


def into_readme(path: Path, readme: Path = _README) -> None:
    """Put the summary of the result file ``path`` in its place in README.

    Raises:
        ValueError: if README has no place for a summary.
    """
    folder = path.resolve().parent.relative_to(readme.resolve().parent).as_posix()
    pictures = [
        f"{folder}/{name}"
        for name in (f"{path.stem}.png", f"{path.stem}-speedups.png")
        if (path.parent / name).exists()
    ]
    text = readme.read_text()
    head, found, rest = text.partition(BEGIN[: BEGIN.index("{")])
    _, end, tail = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{readme.name} has no place for a summary")
    every = f"Every work: [{path.stem}.md]({folder}/{path.stem}.md).\n"
    body = summary(results.read(path), f"{folder}/{path.name}", pictures, brief=True) + every
    readme.write_text(f"{head}{BEGIN.format(f'{folder}/{path.name}')}\n{body}{END}{tail}")


def summary(document: Mapping, data: str, pictures: Sequence[str] = (), brief: bool = False) -> str:
    """Markdown: the machine, geometric means and, unless ``brief``, a line for each work.

    ``data``: the link to the result file.
    """
    machine, versions = document["machine"], document["versions"]
    rows = [row for row in document["rows"] if row["way"] == "call"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "onnxruntime", "openvino")
        if versions.get(name)
    )
    first = rows[0]
    parts = [
        f"{where}; {first['threads']} threads, {first['dtype']}, batch {first['batch']}; "
        f"{packages}; commit {(document['commit'] or 'unknown')[:12]}, {document['date'][:10]}; "
        f"`{document['command']}` ([data]({data})).",
        *(f"![{_caption(name)}]({name})" for name in pictures),
        _means(rows),
    ]
    if brief:
        return "\n\n".join(parts) + "\n\n"
    blocks = [row for row in rows if row["kind"] == "block" and row["mode"] == "forward"]
    if blocks:
        parts.append(_lines("Block, forward", blocks))
    if others := [row for row in rows if row not in blocks]:
        parts.append(_lines("Operators, training steps, models", others))
    if document.get("not_timed"):
        listed = "\n".join(f"- {reason}" for reason in document["not_timed"])
        parts.append(f"Not timed:\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def _caption(picture: str) -> str:
    return next(
        caption for ending, caption in reversed(_CAPTIONS.items()) if picture[:-4].endswith(ending)
    )


def _works(rows: Iterable[Mapping]) -> list[dict[str, Mapping]]:
    """The rows of each work by provider."""
    names = ("kind", "what", "mode", "case", "height", "width", "batch", "threads")
    found: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = row
    return list(found.values())


def _ours(found: Mapping[str, Mapping]) -> Mapping | None:
    return next((found[name] for name in _OURS if name in found), None)


def _means(rows: Sequence[Mapping]) -> str:
    """Geometric means over the works of a kind and mode."""
    lines = [
        "| geometric means | works | ours over eager | over the best peer | worst | time over the "
        "limit |",
        "|---|---|---|---|---|---|",
    ]
    for kind, mode in dict.fromkeys((row["kind"], row["mode"]) for row in rows):
        works = [
            found
            for found in _works(row for row in rows if (row["kind"], row["mode"]) == (kind, mode))
            if _ours(found) and "eager" in found
        ]
        if not works:
            continue
        speedups = [_ours(found)["speedup"] for found in works]
        peers = [_best(found)["ms"] / _ours(found)["ms"] for found in works]
        limit = [_ours(found)["of_limit"] for found in works]
        lines.append(
            f"| {kind}, {mode} | {len(works)} | {geometric_mean(speedups):.2f}x "
            f"| {geometric_mean(peers):.2f}x | {min(peers):.2f}x | {geometric_mean(limit):.2f} |"
        )
    return "\n".join(lines)


def _best(found: Mapping[str, Mapping]) -> Mapping:
    """The fastest that is not ours."""
    others = [row for name, row in found.items() if name not in (*_OURS, "channels_last")]
    return min(others, key=lambda row: row["ms"])


def _lines(title: str, rows: Sequence[Mapping]) -> str:
    lines = [
        f"| {title} | map | eager | ours | 95 % | over eager | best peer | over the limit | error "
        "(eager's) | peak memory (eager's) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in _works(rows):
        ours, eager = _ours(found), found.get("eager")
        if ours is None or eager is None:
            continue
        best = _best(found)
        what = "" if ours["what"] == "block" else f" {ours['what']}"
        name = f"{ours['case']}{what}{' step' * (ours['mode'] == 'step')}"
        lines.append(
            f"| {name} | {ours['height']}x{ours['width']} | {eager['ms']:.3g} ms "
            f"| {ours['ms']:.3g} ms | {ours['ms_low']:.3g} to {ours['ms_high']:.3g} "
            f"| {ours['speedup']:.2f}x | {best['ms']:.3g} ms ({best['provider']}) "
            f"| {ours['of_limit']:.2f} | {ours['rms_error']:.1e} ({ours['rms_error_eager']:.1e}) "
            f"| {_mebibytes(ours)} ({_mebibytes(eager)}) |"
        )
    return "\n".join(lines)


def _mebibytes(row: Mapping) -> str:
    size = row["peak_bytes"]
    return "-" if size is None else f"{size / 2**20:.2f} MiB"
