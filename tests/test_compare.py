"""Two result files beside each other: a slowdown and a grown error are found, noise is not."""

import time
from math import sqrt

import pytest
import torch
from bench_toys import CPU, row, setting

from bench import __main__ as command
from bench import compare, results
from bench.cases import CASES
from bench.measure import measure
from bench.works import Operator
from seaattn_kernels import ops


@pytest.fixture
def compared(tmp_path, capsys):
    """Exit status and lines of ``bench compare``."""

    def run(old, new, *more):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, rows in zip(paths, (old, new), strict=True):
            results.write(path, results.document(rows, CPU))
        arguments = command._parser().parse_args(["compare", *map(str, paths), *more])
        status = command.run_compare(arguments)
        return status, capsys.readouterr().out.splitlines()

    return run


def _rows(ours=1.0, eager=2.0, **more):
    return [row("eager", eager=eager, **more), row("auto", ours, eager, **more)]


def test_equal_files_are_equal(compared):
    rows = [*_rows(), *_rows(case="B1"), row("auto", way="graph"), row("eager", way="graph")]
    status, lines = compared(rows, rows)
    assert status == 0
    assert lines[-1] == "3 pairs: 0 slower by over 10 % and beyond the noise, 0 with a larger error"
    assert len(lines) == 4
    for line in lines[:-1]:
        assert " auto " in line
        assert "  1.000 [" in line
        assert "SLOWER" not in line


def test_times_are_ratios_to_those_of_eager_in_the_same_run(compared):
    status, (line, _) = compared(_rows(1.0, 2.0), _rows(3.0, 6.0))
    assert (status, "1.000 [" in line) == (0, True), "the machine is three times as slow"
    status, (line, _) = compared(_rows(1.0, 2.0), _rows(1.0, 1.0))
    assert (status, "2.000 [" in line, line.endswith("SLOWER")) == (1, True, True)
    assert compared(_rows(1.0, 1.0), _rows(1.0, 2.0))[0] == 0, "faster"


def test_times_themselves_are_compared_on_an_idle_machine(compared):
    status, lines = compared(_rows(1.0, 2.0), _rows(3.0, 6.0), "--absolute")
    assert status == 1
    assert [(line.endswith("SLOWER"), "3.000 [" in line) for line in lines[:-1]] == 2 * [
        (True, True)
    ]
    assert lines[-1].startswith("2 pairs: 2 slower"), "eager's too"
    status, _ = compared(_rows(1.0, 2.0), _rows(1.0, 1.0), "--absolute")
    assert status == 0


@pytest.mark.parametrize(("threshold", "status"), [("1.3", 1), ("1.5", 0)])
def test_a_slowdown_is_one_above_the_threshold(threshold, status, compared):
    found, lines = compared(_rows(1.0), _rows(1.4), "--threshold", threshold)
    assert found == status
    assert ("SLOWER" in lines[0]) == bool(status)
    assert f"slower by over {100 * (float(threshold) - 1):g} %" in lines[-1]


def test_a_slowdown_within_the_noise_is_none(compared):
    new = _rows(1.4)
    new[1] |= {"ms_low": 0.8, "ms_high": 2.0}
    assert compared(_rows(1.0), new)[0] == 0
    new[1] |= {"ms_low": 1.3, "ms_high": 1.5}
    assert compared(_rows(1.0), new)[0] == 1


def test_the_interval_of_a_ratio_has_the_widths_of_all_its_times():
    old, new = _rows(1.0), _rows(1.5)
    (found,) = compare.pair(old, new)
    assert found.ratio == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5 * (1 - sqrt(4 * 0.01**2)))
    assert found.high == pytest.approx(1.5 * (1 + sqrt(4 * 0.01**2)))
    ours = next(pair for pair in compare.pair(old, new, absolute=True) if "auto" in pair.key)
    assert ours.low == pytest.approx(1.5 * (1 - sqrt(2 * 0.01**2)))


@pytest.mark.parametrize(
    ("error", "status"), [(1e-7, 0), (1.05e-7, 0), (1.2e-7, 1), (float("nan"), 1), (0.0, 0)]
)
def test_an_error_that_grew_is_found(error, status, compared):
    found, lines = compared(_rows(rms_error=1e-7), _rows(rms_error=error))
    assert found == status
    assert lines[0].endswith("ERROR GREW") == bool(status)
    assert f"error 1.00e-07 -> {error:.2e}" in lines[0]


def test_rows_that_one_file_alone_has_are_not_paired(compared):
    other = {
        "kind": "operator", "what": "gate", "mode": "step", "case": "B1", "height": 8, "batch": 2,
        "dtype": "float16", "device": "cuda", "threads": 1, "way": "graph",
    }  # fmt: skip
    for name, value in other.items():
        old = [*_rows(), *_rows(**{name: value})]
        status, lines = compared(old, _rows())
        assert status == 0
        assert lines[-1].startswith("1 pairs: "), name
    status, lines = compared([*_rows(), row("cpu")], [*_rows(), row("openvino")])
    assert (status, len(lines)) == (0, 2)


def test_without_eager_there_is_no_ratio(compared):
    status, lines = compared(_rows(), [row("auto")])
    assert (status, lines[-1][:8]) == (1, "0 pairs:"), "nothing was compared"
    assert compared(_rows(), [row("auto")], "--absolute")[0] == 0


def test_files_of_before_the_modes_are_compared(compared):
    rows = _rows()
    old = [
        {name: entry for name, entry in found.items() if name not in ("what", "mode", "way")}
        for found in rows
    ]
    status, lines = compared(old, rows)
    assert (status, len(lines)) == (0, 2)


def test_another_machine_is_named(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    document = results.document(_rows(), CPU)
    results.write(tmp_path / "old.json", {**document, "commit": "abc"})
    results.write(tmp_path / "new.json", {**document, "machine": {}, "commit": "def"})
    assert command.run_compare(command._parser().parse_args(["compare", *paths])) == 0
    assert capsys.readouterr().out.startswith("of another machine, commit\n")


def test_a_slowed_operator_is_caught_and_honest_runs_are_not(compared, monkeypatch, library):
    """Measured: the gate of B1, thrice, once with its kernel made to take many times as long."""
    work = Operator("gate", CASES["B1"], (16, 16), setting(device=CPU, dtype=torch.float32))

    def measured():
        found = measure(work, ["cpu"], seconds=0.2, seeds=range(2))
        assert [r["provider"] for r in found] == ["eager", "cpu"]
        return found

    honest, again = measured(), measured()
    right = ops.gate

    def slowed(x, y, hard=True, backend="auto"):
        end = time.perf_counter() + 2e-3
        out = right(x, y, hard, backend)
        while backend == "cpu" and time.perf_counter() < end:
            pass
        return out

    monkeypatch.setattr(ops, "gate", slowed)
    slow = measured()
    # Twice as slow by chance alone is far off, and the planted delay is many times the duration.
    assert compared(honest, again, "--threshold", "3")[0] == 0
    assert compared(again, honest, "--threshold", "3")[0] == 0
    status, lines = compared(honest, slow, "--threshold", "3")
    assert status == 1
    assert lines[0].startswith("gate ")
    assert lines[0].endswith("SLOWER")
    assert lines[-1].startswith("1 pairs: 1 slower")
    assert compared(slow, honest, "--threshold", "3")[0] == 0
    assert compared(honest, slow, "--threshold", "3", "--absolute")[0] == 1
