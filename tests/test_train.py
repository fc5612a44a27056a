"""What a training step keeps, and the training run: its verdict, its files, the commands."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import results, saved, train
from seaattn_kernels import SeaAttention

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


def test_a_storage_is_counted_once_and_what_is_given_is_not():
    class Kept(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5))
            self.register_buffer("other", torch.randn(5))

        def forward(self, x):
            y = (x * self.weight * self.other).exp()  # x, weight, other and the result
            return y[:2] * y[2:]  # views of it

    assert saved.saved_bytes(Kept(), torch.randn(4, 5)) == 4 * 5 * 4


def test_the_block_keeps_at_most_two_fifths_of_what_eager_keeps():
    rows = saved.measure(CPU)
    assert len(saved.table(rows).splitlines()) == 1 + len(rows) == 7
    exact = {row["case"]: row for row in rows if row["autocast"] is None}
    for name, floats in (("B1", 4130), ("B2", 6100), ("YOLOv8n-P3", 1900)):
        assert exact[name]["eager_floats_a_pixel"] == pytest.approx(floats, rel=0.03)
        assert exact[name]["of_eager"] <= 0.40
    for row in rows:
        assert 0 < row["bytes"] < row["eager_bytes"]
        if row["autocast"]:
            assert row["autocast"] == "bfloat16"
            assert row["eager_bytes"] < 0.7 * exact[row["case"]]["eager_bytes"]


def _rows(ours=0.0, other=0.1, accuracy=0.97, opened=0.01, backend="cpu"):
    """Runs whose losses lie above eager's by so much."""
    curve = [2.3 * math.exp(-step / 50) for step in range(100)]
    return [
        {
            "run": name, "backend": of, "seed": 0, "ms": 1.0, "saved_bytes": 4, "opened": opened,
            "accuracy": right, "losses": [loss + above for loss in curve],
        }
        for name, of, above, right in (
            ("eager", "eager", 0.0, 0.97), ("ours", backend, ours, accuracy),
            ("other seed", "eager", other, 0.96), ("other seed", "eager", other / 2, 0.965),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        (_rows(), True),
        (_rows(ours=0.09), True),
        (_rows(ours=0.11), False),
        (_rows(ours=-0.11), False),
        (_rows(ours=math.nan), False),
        (_rows(other=0.0), True),
        (_rows(accuracy=0.945), True),
        (_rows(accuracy=0.93), False),
        (_rows(opened=0.0), False),
        (_rows(backend="cpu, own forward"), False),
    ],
)
def test_a_run_is_held_against_the_noise_of_the_seeds(rows, holds):
    found = train.verdict(rows)
    assert found["holds"] is holds
    assert ("DOES NOT LEARN" in train.table(rows, found)) is not holds


def test_losses_are_smoothed_over_a_twentieth():
    assert train.smooth([1.0, 2.0, 4.0]).tolist() == [1.0, 2.0, 4.0]
    assert train.smooth(range(100)) == pytest.approx(range(2, 98))


def test_attention_of_the_small_model_has_maps_of_some_size():
    pytest.importorskip("sklearn")
    seen = []
    for variant in ("t", "l"):
        model = train.Classifier(train.small(variant), 10).eval()
        for block in model.modules():
            if isinstance(block, SeaAttention):
                block.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[2]))
        model(torch.randn(1, 3, train.SIDE, train.SIDE))
    assert seen == [8, 8, 4, 4] + [8] * 6 + [4] * 3


@pytest.mark.slow
def test_the_command_trains_and_draws(tmp_path):
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", "--quick", "--device", "cpu", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "train-t.json"
    assert done.stdout.splitlines()[-2:] == [str(path), str(path.with_suffix(".png"))]
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    document = results.read(path)
    assert document["verdict"]["holds"]
    eager, ours, other, third = document["rows"]
    assert [row["seed"] for row in document["rows"]] == [0, 0, 1, 2]
    assert ours["backend"] not in ("eager", "own forward")
    assert ours["saved_bytes"] < eager["saved_bytes"] == other["saved_bytes"]
    assert ours["losses"][0] == pytest.approx(eager["losses"][0], rel=1e-4), "same weights, batch"
    assert len({row["losses"][0] for row in (eager, other, third)}) == 3
    for row in document["rows"]:
        assert len(row["losses"]) == 6
        assert row["opened"] > 0
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]


def test_a_run_that_parts_is_an_error(tmp_path, monkeypatch, capsys):
    rows = [{**row, "kind": "training"} for row in _rows(ours=0.5)]
    asked = []
    monkeypatch.setattr(train, "measure", lambda *given: asked.append(given) or rows)
    monkeypatch.setattr(train, "refusal", lambda: None)
    fixed = ["train", "--variant", "s", "--seed", "3", "--device", "cpu", "--no-chart"]
    arguments = command._parser().parse_args([*fixed, "--steps", "7", "--out", str(tmp_path)])
    assert command.run_train(arguments) == 1
    assert asked == [("s", 3, 7, CPU)]
    assert [path.name for path in tmp_path.iterdir()] == ["train-s.json"]
    assert "OURS DOES NOT LEARN AS EAGER DOES" in capsys.readouterr().out


def test_without_scikit_learn_there_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert command.run_train(command._parser().parse_args(["train"])) == 1
    assert "scikit-learn" in capsys.readouterr().out


def test_the_command_of_what_is_saved_writes_its_table(tmp_path, monkeypatch, capsys):
    rows = saved.measure(CPU)[:1]
    monkeypatch.setattr(saved, "measure", lambda device: rows)
    out = tmp_path / "saved.json"
    arguments = command._parser().parse_args(["saved", "--device", "cpu", "--out", str(out)])
    assert command.run_saved(arguments) == 0
    assert results.read(out)["rows"] == rows
    assert "B1" in capsys.readouterr().out
