"""What is made of a result file: pictures, the CSV, the summary and its place in README."""

import csv
import subprocess
import sys
import warnings

import matplotlib.image
import numpy as np
import pytest
from bench_toys import PNG, ROOT, document, row

from bench import __main__ as command
from bench import plot as plotting
from bench import report, results
from bench.measure import PROVIDERS
from bench.plot import _LABELS, _STYLES, plot

COMMITTED = sorted((ROOT / "bench" / "results").glob("**/*.json"))


def _blocks(providers=("eager", "auto", "onnxruntime"), sides=(8, 16, 32, 64, 128)):
    """Times that grow with the number of pixels from 32x32 on."""
    return [
        row(name, ms=side**2 / 1e4, eager=side**2 / 4e3, height=side, width=side, ms_limit=0.1)
        for side in sides
        for name in providers
    ]


def _others():
    kinds = (("operator", "gate"), ("operator", "broadcast_add"), ("block", "block"))
    found = [
        row(name, kind=kind, what=what, mode=mode, case=case, bytes=10**8)
        for kind, what in kinds
        for mode in (("step",) if kind == "block" else ("forward", "step"))
        for case in ("B1", "L1")
        for name in ("eager", "auto", "compile")
    ]
    model = {"kind": "model", "what": "SeaFormer-T segmenter", "case": "T"}
    return found + [row(name, ms=1.5, **model) for name in ("eager", "auto")]


def _training():
    return [
        {
            "kind": "training", "case": "SeaFormer-T, half as wide", "height": 32, "width": 32,
            "batch": 32, "dtype": "float32", "backend": backend, "seed": seed,
            "losses": [2.0 / (1 + step) + 0.01 * seed for step in range(60)],
        }
        for backend, seed in (("eager", 0), ("cpu", 0), ("eager", 1), ("eager", 2))
    ]  # fmt: skip


def _drawn(rows, path):
    """Pictures by what their names end in."""
    paths = plot(document(rows), path)
    for picture in paths:
        assert picture.read_bytes()[:8] == PNG
        assert picture.stat().st_size > 10_000
    return [picture.stem.removeprefix(path.stem) for picture in paths]


# --- pictures --------------------------------------------------------------------------------


def test_every_kind_of_picture_needs_the_file_alone(tmp_path):
    source, chart = tmp_path / "r.json", tmp_path / "c" / "r.png"
    several = _blocks([name for name in PROVIDERS if name != "eager"])
    results.write(source, document([*_blocks(), *several, *_others()]))
    losses = tmp_path / "losses.json"
    results.write(losses, document(_training()))
    code = (
        "import sys; from pathlib import Path; from bench.results import read;"
        "from bench.plot import plot;"
        "[print(p) for a, b in zip(sys.argv[1::2], sys.argv[2::2]) for p in plot(read(Path(a)),"
        " Path(b))]"
    )
    pairs = (source, chart, losses, tmp_path / "c" / "losses.png")
    done = subprocess.run(
        [sys.executable, "-c", code, *pairs], cwd=ROOT, check=True, capture_output=True, text=True
    )
    names = ["r.png", "r-speedups.png", "r-roofline.png", "losses.png"]
    assert done.stdout.split() == [str(chart.with_name(name)) for name in names]
    for name in names:
        assert chart.with_name(name).read_bytes()[:8] == PNG
        assert chart.with_name(name).stat().st_size > 20_000


def test_what_there_is_is_drawn(tmp_path):
    """The first picture has the name of the file, the others say what they show."""
    path = tmp_path / "r.png"
    gates = [found for found in _others() if found["what"] == "gate"]
    steps = [found for found in gates if found["mode"] == "step"]
    models = [found for found in _others() if found["kind"] == "model"]
    assert _drawn(_blocks(), path) == ["", "-roofline"]
    assert _drawn(gates, path) == ["", "-roofline"]
    assert _drawn(steps, path) == _drawn(models, path) == [""]
    assert _drawn([*_blocks(), *steps], path) == ["", "-speedups", "-roofline"]
    assert _drawn(_training(), path) == [""]


def test_eager_alone_is_drawn(tmp_path):
    """As by the command that its row holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = [found for found in [*_blocks(), *_others()] if found["provider"] == "eager"]
        assert _drawn(alone, tmp_path / "r.png") == ["", "-speedups", "-roofline"]


def test_every_provider_has_a_line_of_its_own():
    assert {*PROVIDERS, "limit"} == set(_STYLES) == set(_LABELS)
    for key in ("color", "marker"):
        assert len({style[key] for style in _STYLES.values()}) == len(_STYLES)
    assert len(set(_LABELS.values())) == len(_LABELS)
    assert set(plotting._OURS) < set(PROVIDERS)


def _texts(figure):
    return [
        text.get_text()
        for axes in figure.axes
        if axes.get_legend()
        for text in axes.get_legend().get_texts()
    ]


def test_lines_say_at_which_slope_time_grows():
    figure = plotting._blocks(document([]), _blocks())
    speedups, times = figure.axes
    assert speedups.get_legend() is None, "one legend tells both charts"
    found = [text.get_text() for text in times.get_legend().get_texts()]
    assert "seaattn_kernels, ~ pixels^1.00" in found
    assert "eager PyTorch, ~ pixels^1.00" in found
    assert "limit, ~ pixels^0.00" in found or "limit, ~ pixels^-0.00" in found
    few = plotting._blocks(document([]), _blocks(sides=(8, 16, 32, 64)))
    assert not any("pixels" in text for text in _texts(few)), "two large maps make no slope"


def test_lines_and_slopes_are_of_the_block_with_most_maps():
    others = [row(name, case="L1", height=512, width=512, ms=1e-3) for name in ("eager", "auto")]
    figure = plotting._blocks(document([]), [*_blocks(), *others])
    assert "seaattn_kernels, ~ pixels^1.00" in _texts(figure)
    _, times = figure.axes
    assert times.get_legend().get_title().get_text() == "lines: T1"
    lengths = {
        len(line.get_xdata()) for line in times.get_lines() if line.get_linestyle() != "None"
    }
    assert lengths == {5}
    points = [line for line in times.get_lines() if line.get_linestyle() == "None"]
    assert {len(line.get_xdata()) for line in points} == {6}, "points are of all"


def test_lines_are_of_all_where_no_block_has_most_sizes():
    rows = [
        row(name, case=case, height=side, width=side)
        for case, side in (("B1", 16), ("L1", 32), ("T1", 64))
        for name in ("eager", "auto")
    ]
    figure = plotting._blocks(document([]), rows)
    assert figure.axes[1].get_legend().get_title().get_text() == ""
    assert {len(line.get_xdata()) for line in figure.axes[1].get_lines()} == {3}


def test_the_roofline_holds_what_was_measured():
    rows = [*_blocks(("eager", "auto", "channels_last", "openvino")), *_others()]
    figure = plotting._roofline(document([]), [r for r in rows if r["mode"] == "forward"])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    x, y = lines["roofline"].get_data()
    assert max(y) == pytest.approx(200.0), "GFLOP/s of the large product"
    assert y[0] / x[0] == pytest.approx(10.0), "GB/s of the large copy"
    assert "seaattn_kernels, blocks" in lines
    assert "eager PyTorch, operators" in lines
    assert not any("channels_last" in label or "OpenVINO" in label for label in lines)
    x, y = lines["seaattn_kernels, blocks"].get_data()
    assert set(x) == {100.0}
    assert sorted(y) == sorted(r["gflops"] for r in rows[1:20:4])


def test_bars_are_geometric_means_over_maps():
    rows = [
        row(name, ms=ms, eager=4.0, kind="operator", what="gate", case=case)
        for case, ms in (("B1", 4.0), ("L1", 1.0))
        for name in ("eager", "auto")
    ]
    figure = plotting._speedups(document([]), rows)
    (axes,) = figure.axes
    (bar,) = axes.patches[:1]
    heights = [patch.get_height() for patch in axes.patches if patch.get_width() < 1]
    assert heights == [pytest.approx(2.0)]
    assert bar is not None
    assert [text.get_text() for text in axes.get_xticklabels()] == ["gate"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_are_still_drawn(path, tmp_path):
    for picture in plot(results.read(path), tmp_path / "r.png"):
        assert picture.read_bytes()[:8] == PNG


def test_a_chart_holds_what_is_called(tmp_path):
    """A file without ways is drawn as it is, and replays are left out."""
    old = results.read(ROOT / "bench/results/amd-epyc-2-cores/float32-batch1-threads2.json")
    old["rows"] = [found for found in old["rows"] if found["case"] == "T1"]
    assert old["rows"]
    assert not any("way" in found for found in old["rows"])

    def drawn(rows):
        (picture,) = plot({**old, "rows": rows}, tmp_path / "chart.png")
        return picture.read_bytes()

    picture = drawn(old["rows"])
    assert picture[:8] == PNG
    called = [{**found, "way": "call"} for found in old["rows"]]
    replayed = [{**found, "way": "graph", "ms": 1e-3, "speedup": None} for found in old["rows"]]
    assert drawn([*called, *replayed]) == picture
    assert drawn([{**found, "ms": 2 * found["ms"]} for found in called]) != picture


def test_threads_are_drawn_one_below_the_other(tmp_path):
    rows = _blocks()
    both = [*rows, *({**found, "threads": 1} for found in rows)]
    sizes = []
    for given in (rows, both):
        first, *_ = plot(document(given), tmp_path / "r.png")
        sizes.append(np.asarray(matplotlib.image.imread(first)).shape)
    assert sizes[1][0] == 2 * sizes[0][0]
    assert sizes[1][1] == sizes[0][1]


@pytest.mark.parametrize("rows", [[], [{"kind": "memory", "way": "call"}]])
def test_a_chart_of_nothing_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="no block"):
        plot({"rows": rows}, tmp_path / "nothing.png")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_again(tmp_path, capsys):
    source, other = tmp_path / "r.json", tmp_path / "again.png"
    results.write(source, document(_blocks()))
    arguments = command._parser().parse_args(["plot", str(source), "--out", str(other)])
    assert command.draw(arguments) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(other), str(tmp_path / "again-roofline.png")]
    arguments = command._parser().parse_args(["plot", str(source)])
    assert command.draw(arguments) == 0
    assert capsys.readouterr().out.split()[0] == str(tmp_path / "r.png")


# --- the CSV and the summary -----------------------------------------------------------------


def _whole():
    return document(
        [*_blocks(), *_others(), row(way="graph", speedup=None, ms_cold=0.5)],
        not_timed=["triton, forward of blocks: it needs a GPU", "auto is wrong"],
    )


def test_the_csv_holds_every_row(tmp_path):
    whole = _whole()
    whole["rows"].append({**row(), "more": "of another kind"})
    drawn = report.write(whole, tmp_path / "r.json")
    assert [path.name for path in drawn] == [
        "r.png", "r-speedups.png", "r-roofline.png", "r.csv", "r.md",
    ]  # fmt: skip
    with (tmp_path / "r.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(whole["rows"])
    for line, wanted in zip(found, whole["rows"], strict=True):
        for name, value in wanted.items():
            assert line[name] == ("" if value is None else str(value))
    assert found[-1]["more"] == "of another kind"
    assert found[0]["more"] == ""
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# r\n\n")
    assert text.endswith(report.summary(whole, "r.json", [path.name for path in drawn[:3]]))


def test_the_summary_says_where_it_is_from_and_what_is_missing():
    whole = {
        **_whole(),
        "commit": 40 * "a",
        "command": "python -m bench run",
        "date": "2026-07-01T",
    }
    text = report.summary(whole, "folder/r.json", ["folder/r.png", "folder/r-speedups.png"])
    machine = whole["machine"]
    assert text.startswith(f"{machine['cpu']}, {machine['cores']} cores; 2 threads, float32, ")
    assert f"torch {whole['versions']['torch']}" in text
    assert f"commit {12 * 'a'}, 2026-07-01; `python -m bench run` ([data](folder/r.json))" in text
    assert text.endswith(
        "\n\nNot timed:\n\n- triton, forward of blocks: it needs a GPU\n- auto is wrong\n"
    )
    assert "![Speed-up over eager and time of a call](folder/r.png)" in text
    speedups = "Speed-up of operators, training steps and models"
    assert f"![{speedups}](folder/r-speedups.png)" in text
    assert "Not timed" not in report.summary({**whole, "not_timed": []}, "r.json")
    on_a_gpu = {**whole, "machine": {**machine, "gpu": "some GPU"}, "commit": None}
    text = report.summary(on_a_gpu, "r.json")
    assert text.startswith("some GPU; 2 threads")
    assert "commit unknown" in text


def test_the_summary_holds_means_over_works_and_a_line_for_each():
    rows = [
        row("eager", eager=4.0, height=8), row("auto", 1.0, 4.0, height=8, of_limit=2.0),
        row("openvino", 0.5, 4.0, height=8),
        row("eager", eager=16.0), row("auto", 1.0, 16.0, of_limit=8.0),
        row("openvino", 2.0, 16.0), row("channels_last", 0.1, 16.0),
    ]  # fmt: skip
    text = report.summary(document(rows), "r.json")
    # 4 and 16 times as fast as eager, a half and two times as the best peer.
    assert "| block, forward | 2 | 8.00x | 1.00x | 0.50x | 4.00 |" in text
    lines = [line.split(" | ")[:7] for line in text.splitlines() if line.startswith("| T1")]
    assert lines == [
        ["| T1", "8x16", "4 ms", "1 ms", "0.99 to 1.01", "4.00x", "0.5 ms (openvino)"],
        ["| T1", "16x16", "16 ms", "1 ms", "0.99 to 1.01", "16.00x", "2 ms (openvino)"],
    ]
    assert "| 1.0e-07 (2.0e-07) | 1.50 MiB (1.50 MiB) |" in text


def test_a_work_that_ours_is_missing_of_is_no_line():
    rows = [row("eager"), row("eager", height=8), row("auto", height=8)]
    text = report.summary(document(rows), "r.json")
    assert "| T1 | 8x16 |" in text
    assert text.count("| T1") == 1


def test_ours_on_a_gpu_is_the_kernels():
    rows = [row("eager"), row("reference", 0.5), row("triton", 1.0)]
    assert "| T1 | 16x16 | 2 ms | 1 ms |" in report.summary(document(rows), "r.json")


# --- README ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A README with a place for a summary, a result file below it, and its pictures."""
    folder = tmp_path / "bench" / "results" / "some"
    folder.mkdir(parents=True)
    source = folder / "r.json"
    results.write(source, _whole())
    for name in ("r.png", "r-speedups.png", "r-roofline.png"):
        (folder / name).write_bytes(PNG)
    begin = report.BEGIN.format("bench/results/some/old.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n{begin}\nof old\n{report.END}\nafter\n")
    return source, readme


def test_the_summary_takes_its_place_in_the_readme(checkout):
    source, readme = checkout
    report.into_readme(source, readme)
    text = readme.read_text()
    begin = report.BEGIN.format("bench/results/some/r.json")
    assert text.startswith(f"# Before\n{begin}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "of old" not in text
    body = text[len(f"# Before\n{begin}\n") : -len(f"{report.END}\nafter\n")]
    pictures = ["bench/results/some/r.png", "bench/results/some/r-speedups.png"]
    summary = report.summary(results.read(source), "bench/results/some/r.json", pictures, True)
    assert body == f"{summary}Every work: [r.md](bench/results/some/r.md).\n"
    assert "| T1 |" not in body, "a line for each would be long"
    report.into_readme(source, readme)
    assert readme.read_text() == text


def test_pictures_that_are_not_there_are_not_linked(checkout):
    source, readme = checkout
    (source.parent / "r-speedups.png").unlink()
    report.into_readme(source, readme)
    assert readme.read_text().count("![") == 1


@pytest.mark.parametrize("kept", ["begin", "end", "neither"])
def test_a_readme_without_a_place_is_left_as_it_is(checkout, kept):
    source, readme = checkout
    text = {"begin": report.BEGIN.format("x"), "end": report.END, "neither": ""}[kept] + "\nall\n"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md has no place for a summary"):
        report.into_readme(source, readme)
    assert readme.read_text() == text


def test_the_command_puts_it_into_the_readme(checkout, monkeypatch, capsys):
    source, _ = checkout
    given = []
    monkeypatch.setattr(report, "into_readme", given.append)
    assert command.draw(command._parser().parse_args(["plot", str(source)])) == 0
    assert not given
    assert command.draw(command._parser().parse_args(["plot", str(source), "--readme"])) == 0
    assert given == [source]


def test_the_readme_holds_the_summary_of_the_file_that_it_names(monkeypatch):
    text = (ROOT / "README.md").read_text()
    head = report.BEGIN[: report.BEGIN.index("{")]
    if head not in text:
        pytest.skip("README has no summary")
    named = text.partition(head)[2].partition(report.BEGIN[report.BEGIN.index("}") + 1 :])[0]
    assert (ROOT / named) in COMMITTED
    written = []
    monkeypatch.setattr(type(ROOT), "write_text", lambda self, text: written.append(text))
    report.into_readme(ROOT / named)
    assert written == [text], "python -m bench plot FILE --readme writes it"
