"""The benchmark: its facts, its fairness, its files, and the commands end to end."""

import getpass
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import __main__ as command
from bench import cpu, demo, memory, models, operators, peers, picture, results, timing
from bench import measure as measuring
from bench.cases import CASES, SWEEP_SIDES, Case
from bench.eager import EagerSeaAttention, as_eager
from bench.limit import ProductTime, products
from bench.measure import PROVIDERS, available, block_of, extra_bytes, measure, refusal
from bench.plot import _LABELS, _STYLES, plot
from bench.timing import Timing, check_then_time, interleave, median_interval, with_threads
from seaattn_kernels import SeaAttention, ops
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.patch import Swapped

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GPU = torch.device("cuda")
TOY = Case("toy", 8, 4, 1, stride=4)
PNG = b"\x89PNG\r\n\x1a\n"

# --- cases -----------------------------------------------------------------------------------

COLUMNS = ("224", "512", "512x1024", "1024", "1024x2048")
STRIDE_16 = ((14, 14), (32, 32), (32, 64), (64, 64), (64, 128))
STRIDE_32 = ((7, 7), (16, 16), (16, 32), (32, 32), (32, 64))
STRIDE_64 = ((4, 4), (8, 8), (8, 16), (16, 16), (16, 32))
SEAFORMER = {
    # name: C, D, heads, NQ, DH, blocks, maps
    "T1": (128, 16, 4, 256, 128, 2, STRIDE_32),
    "T2": (160, 24, 4, 384, 192, 2, STRIDE_64),
    "S1": (160, 16, 6, 384, 192, 3, STRIDE_32),
    "S2": (192, 24, 6, 576, 288, 3, STRIDE_64),
    "B1": (192, 16, 8, 512, 256, 4, STRIDE_32),
    "B2": (256, 24, 8, 768, 384, 4, STRIDE_64),
    "L1": (192, 16, 8, 512, 256, 3, STRIDE_16),
    "L2": (256, 20, 8, 640, 320, 3, STRIDE_32),
    "L3": (320, 24, 8, 768, 384, 3, STRIDE_64),
}
YOLO = {
    "YOLOv8n-P3": (64, 80),
    "YOLOv8n-P4": (128, 40),
    "YOLOv8n-P5": (256, 20),
    "YOLOv8s-P3": (128, 80),
    "YOLOv8s-P4": (256, 40),
    "YOLOv8s-P5": (512, 20),
}


def test_the_table_of_cases_is_complete():
    assert set(CASES) == set(SEAFORMER) | set(YOLO)
    assert SWEEP_SIDES == (8, 16, 32, 64, 128)


@pytest.mark.parametrize("name", SEAFORMER)
def test_seaformer_case(name):
    case = CASES[name]
    sizes = (case.channels, case.key_dim, case.heads, case.projected, case.values, case.blocks)
    assert (*sizes, tuple(case.maps.values())) == SEAFORMER[name]
    assert tuple(case.maps) == COLUMNS


@pytest.mark.parametrize("name", YOLO)
def test_yolo_case(name):
    channels, side = YOLO[name]
    case = CASES[name]
    assert (case.channels, case.key_dim, case.heads) == (channels, 16, 4)
    assert (case.projected, case.values) == (256, 128)
    assert case.maps == {"640": (side, side)}


def test_flops_and_bytes_are_those_of_the_formula():
    # B1: 2*(C*NQ + 9*NQ + NQ*C + DH*C) a pixel, and what the two axes add.
    pixel = 2 * (192 * 512 + 9 * 512 + 512 * 192 + 256 * 192)
    axes = 2 * (7 + 9) * (192 * 512 + 256 * 256) + 2 * (128 + 256) * (7 * 7 + 9 * 9)
    assert CASES["B1"].flops(7, 9) == 63 * pixel + axes
    assert CASES["B1"].flops(7, 9, batch=3) == 3 * CASES["B1"].flops(7, 9)
    assert CASES["B1"].fewest_bytes(7, 9, 2, 4) == 2 * (2 * 192 * 7 * 9) * 4


# --- eager -----------------------------------------------------------------------------------


class _ComputeOps(TorchDispatchMode):
    """Counts operators that compute: not those that return a view of an argument by their schema,
    nor ``_unsafe_view``, a view whose schema does not say so, nor bare allocations."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        if not is_view and name not in ("_unsafe_view", "empty"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def test_eager_dispatches_every_op_of_upstream():
    # 8 convolutions and BatchNorms, 6 means, 4 interpolations; 7 additions (4 tables, row + column,
    # v, h_sigmoid's 3), 5 clamps (4 activations, h_sigmoid), 4 products of the two attentions with
    # 2 scales, 2 softmax and 2 copies, the division by 6, the gate, and one cat.
    block, x = as_eager(block_of(CASES["B1"])), torch.randn(1, 192, 8, 8)
    with torch.no_grad(), _ComputeOps() as counted:
        block(x)
    assert counted.names.total() == 51, counted.names
    assert counted.names["convolution"] == counted.names["native_batch_norm"] == 8


def test_eager_and_the_module_give_the_same_output():
    block = block_of(CASES["T2"]).double()
    x = torch.randn(2, 160, 8, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(as_eager(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_as_eager_copies_and_converts_every_block():
    model = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Sequential(SeaAttention(16, 4, 2)), SeaAttention(16, 4, 2)
    )
    eager = as_eager(model)
    assert [type(m) for m in (eager[1][0], eager[2])] == [EagerSeaAttention] * 2
    assert [type(m) for m in (model[1][0], model[2])] == [SeaAttention] * 2
    assert all(
        a is not b and torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), eager.state_dict().values(), strict=True)
    )


# --- timing ----------------------------------------------------------------------------------


def test_candidates_take_turns_in_blocks(monkeypatch):
    monkeypatch.setattr("bench.timing.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("bench.timing.MOST_REPETITIONS", 2)
    order = []
    names = "abc"
    timings = interleave({name: lambda name=name: order.append(name) for name in names}, seconds=0)
    assert order[:6] == [*"abc", *"abc"], "first calls, then an estimate of each"
    blocks = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    # A warm-up call and two repetitions each; another candidate opens each round.
    assert blocks[:9] == [3 * name for name in "abcbcacab"]
    assert [timing.blocks for timing in timings.values()] == [len(blocks) // 3] * 3


def test_medians_survive_an_outlier_and_first_calls_stand_apart(monkeypatch):
    monkeypatch.setattr("bench.timing.MOST_REPETITIONS", 1)
    calls = Counter()

    def sleeper(name, seconds):
        def call():
            calls[name] += 1
            # The first call, and one timed call, take ten times as long.
            time.sleep(seconds * (10 if calls[name] in (1, 6) else 1))

        return call

    timings = interleave({"fast": sleeper("fast", 0.002), "slow": sleeper("slow", 0.006)})
    fast, slow = timings["fast"], timings["slow"]
    assert 0.002 <= fast.low <= fast.median <= fast.high
    assert fast.first >= 0.02
    assert slow.first >= 0.06
    assert 0.006 <= slow.median < 0.04
    assert fast.median < slow.median


def test_interval_holds_the_median_as_often_as_it_says():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval(range(6)) == (0, 5), "1/64 on each side"
    assert median_interval(range(20)) == (5, 14), "the textbook's ranks 6 and 15"
    samples = np.random.default_rng(0).exponential(size=(2000, 25))
    hits = [low <= np.log(2) <= high for low, high in map(median_interval, samples)]
    assert 0.95 <= np.mean(hits) < 0.98


def test_a_wrong_candidate_is_refused_before_it_is_timed():
    calls = Counter()

    def candidate(name, function):
        def call(x):
            calls[name] += 1
            return function(x)

        return call

    def broken(x):
        raise RuntimeError("no kernel\nfor this device")

    inputs = [torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    candidates = {
        "right": candidate("right", torch.exp),
        "planted": candidate("planted", lambda x: torch.exp(x) * (1 + 1e-5)),
        "nan": candidate("nan", lambda x: torch.exp(x).log() * float("nan")),
        "broken": candidate("broken", broken),
        "eager": candidate("eager", torch.exp),
    }
    alongside = {"other": lambda: None}
    truth = [torch.exp(x.double()) for x in inputs]
    measured = check_then_time(candidates, inputs, truth, 0.05, alongside)
    assert set(measured.timings) == {"eager", "right", "other"}
    assert set(measured.refused) == {"planted", "nan", "broken"}
    assert measured.verdicts["right"].ok
    assert not measured.verdicts["planted"].ok
    assert measured.refused["planted"].startswith("wrong: rms")
    assert measured.refused["broken"] == "raises RuntimeError: no kernel"
    assert calls["planted"] == calls["nan"] == 3, "once an input, never in the loop"
    assert calls["right"] > 3


def test_what_a_candidate_binds_is_bound_ahead_and_timed_in_its_form():
    class Doubled:
        bound, taken = 0, set()

        def bind(self, x):
            self.bound += 1
            return [x]

        def __call__(self, given):
            self.taken.add(type(given))
            return torch.exp(given[0])

    inputs = [torch.randn(64) for _ in range(3)]
    doubled = Doubled()
    truth = [torch.exp(x.double()) for x in inputs]
    measured = check_then_time({"eager": torch.exp, "bound": doubled}, inputs, truth, 0.05)
    assert measured.timings["bound"].blocks >= 5
    assert doubled.bound == len(inputs), "never in the loop"
    assert doubled.taken == {list}


def test_threads_are_set_for_a_while():
    before = torch.get_num_threads()

    def fail():
        with with_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


def test_a_planted_error_in_the_attention_leaves_no_row(monkeypatch):
    class Planted(SeaAttention):
        def forward(self, x):
            out = super().forward(x)
            return out + 1e-4 * out.abs().max()

    original = measuring._provide

    def provide(name, block):
        provided = original(name, block)
        if name == "reference":
            provided.__class__ = Planted
        return provided

    monkeypatch.setattr(measuring, "_provide", provide)
    said = []
    rows = measure(
        CASES["T2"], (4, 4), ["reference"], CPU, torch.float32, seconds=0, log=said.append
    )
    assert [row["provider"] for row in rows] == ["eager"]
    assert len(said) == 1
    assert said[0].startswith("T2 4x4 reference is not timed, it is wrong: rms")


def test_auto_is_listed_only_where_it_is_another_backend(monkeypatch):
    def listed(best, providers, device):
        monkeypatch.setattr(measuring, "auto_backend", lambda *_: best)
        return available(providers, CASES["B1"], device, torch.float32)

    everything = ("auto", "reference", "triton", "eager")
    assert listed("reference", everything, CPU) == ["eager", "reference"]
    assert listed("cpu", everything, CPU) == ["eager", "reference", "auto"]
    assert listed("triton", everything, GPU) == ["eager", "reference", "triton"]
    assert listed("cuda", everything, GPU) == ["eager", "reference", "triton", "auto"]
    assert listed("triton", ["auto", "reference"], GPU) == ["eager", "reference", "auto"]
    assert listed("reference", ["auto"], CPU) == ["eager", "auto"]


def test_a_provider_is_listed_only_where_it_runs(monkeypatch):
    wide = Case("wide", 8, 128, 1, stride=4)
    assert "GPU" in refusal("triton", CASES["B1"], CPU, torch.float16)
    assert "GPU" in refusal("autotune", CASES["B1"], CPU, torch.float16)
    assert "(128, 256)" in refusal("triton", wide, GPU, torch.float16)
    for name in PROVIDERS:
        on_a_gpu = refusal(name, CASES["B1"], GPU, torch.float16)
        assert ("CPU" in on_a_gpu) if name in measuring._NEED_A_CPU else on_a_gpu is None
        if name in peers.PACKAGES:
            assert "float32" in refusal(name, wide, CPU, torch.float16)
        elif name not in ("triton", "autotune"):
            assert refusal(name, wide, CPU, torch.float16) is None
    monkeypatch.setattr(measuring, "auto_backend", lambda *_: "triton")
    listed = available(PROVIDERS, wide, GPU, torch.float16)
    assert listed == ["eager", "reference", "auto", "compile", "autotune"]


def test_the_block_is_compiled_in_the_mode_of_the_provider(monkeypatch):
    asked = []
    original = torch.compile

    def compiled(model, **options):
        asked.append(options)
        return original(model, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("compile", "autotune"):
        model = measuring._provide(name, block_of(TOY))
        assert isinstance(model._orig_mod, EagerSeaAttention)
    assert asked == [
        {"dynamic": False, "mode": None},
        {"dynamic": False, "mode": "max-autotune-no-cudagraphs"},
    ]


class _FakeGraphs:
    """Stands in for ``graphed``: every call of a graph overwrites the one result that it has."""

    def __init__(self, broken=()):
        self.broken, self.made, self.results = broken, [], {}

    def __call__(self, model, example):
        name = model.backend if isinstance(model, SeaAttention) else "eager"
        assert example.is_inference()
        if name in self.broken:
            raise ValueError("it waits for the GPU\nsomewhere")
        self.made.append(name)
        result = self.results[name] = model(example).clone()
        return lambda x: result.copy_(model(x))


def _measure_graphs(monkeypatch, broken=()):
    fake, said = _FakeGraphs(broken), []
    monkeypatch.setattr(measuring, "graphed", fake)
    monkeypatch.setattr(measuring, "extra_bytes", lambda call, x: 7)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    rows = measure(
        TOY, (3, 4), ["reference"], CPU, torch.float32,
        seconds=0, seeds=SEEDS[:3], log=said.append, graphs=True,
    )  # fmt: skip
    return fake, said, {(row["provider"], row["way"]): row for row in rows}


def test_every_provider_is_measured_as_a_graph_too(monkeypatch):
    fake, said, rows = _measure_graphs(monkeypatch)
    assert not said, "a result that the next call overwrites is not judged"
    assert fake.made == ["eager", "reference"]
    assert list(rows) == [
        (provider, way) for provider in ("eager", "reference") for way in ("call", "graph")
    ]
    for (provider, way), row in rows.items():
        assert row["speedup"] == pytest.approx(rows["eager", way]["ms"] / row["ms"])
        assert row["extra_bytes"] == (7 if way == "call" else None)
        assert row["rms_error"] == rows[provider, "call"]["rms_error"]


def test_only_judged_results_of_a_graph_are_copied(monkeypatch):
    fake = _FakeGraphs()
    monkeypatch.setattr(measuring, "graphed", fake)
    with torch.inference_mode():
        maps = [torch.randn(1, 8, 3, 4) for _ in range(4)]
        block = block_of(TOY)
        call = measuring._replay(block, 2)
        results = [call(x) for x in maps]
        expected = [block(x) for x in maps]
    assert fake.made == ["auto"], "captured once"
    static = fake.results["auto"]
    assert [out is static for out in results] == [False, False, True, True]
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    assert torch.equal(static, expected[3])


def test_a_graph_that_cannot_be_captured_stops_no_other(monkeypatch):
    _, said, rows = _measure_graphs(monkeypatch, ["reference"])
    assert list(rows) == [("eager", "call"), ("eager", "graph"), ("reference", "call")]
    (line,) = said
    assert line.startswith("toy 3x4 reference graph is not timed, it is raises RuntimeError: no")
    assert line.endswith("ValueError: it waits for the GPU")

    _, said, rows = _measure_graphs(monkeypatch, ["eager"])
    assert list(rows) == [("eager", "call"), ("reference", "call"), ("reference", "graph")]
    assert len(said) == 1
    assert rows["reference", "graph"]["speedup"] is None
    assert rows["reference", "call"]["speedup"] > 0
    assert "eager is not timed" in command._line(rows["reference", "graph"])


def test_a_wrong_graph_is_not_timed(monkeypatch):
    def stale(model, example):
        result = model(example)
        return lambda x: result

    monkeypatch.setattr(measuring, "graphed", stale)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    said = []
    rows = measure(
        TOY, (3, 4), [], CPU, torch.float32,
        seconds=0, seeds=SEEDS[:2], log=said.append, graphs=True,
    )  # fmt: skip
    assert [row["way"] for row in rows] == ["call"]
    assert said[0].startswith("toy 3x4 eager graph is not timed, it is wrong: rms")


def test_extra_memory_is_the_peak_beyond_the_result(monkeypatch):
    allocated, peak = [1000], [5000]

    def call(x):
        calls.append(x)
        # The first call also takes what it keeps.
        allocated[0] += 100 if len(calls) == 1 else 0
        peak[0] = max(peak[0], allocated[0] + 300)
        return torch.empty(5, dtype=torch.float16)

    calls: list = []
    fakes = {
        "synchronize": lambda _: None,
        "reset_peak_memory_stats": lambda _: peak.__setitem__(0, allocated[0]),
        "memory_allocated": lambda _: allocated[0],
        "max_memory_allocated": lambda _: peak[0],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    on_a_gpu = SimpleNamespace(device=GPU)
    assert extra_bytes(call, on_a_gpu) == 300 - 5 * 2
    assert len(calls) == 2
    assert extra_bytes(call, torch.empty(1)) is None
    assert len(calls) == 2


# --- the limit -------------------------------------------------------------------------------


def test_the_limit_adds_up_the_better_layout_of_each_product():
    case = CASES["T1"]
    assert products(case, 8, 8, 2) == {
        (256, 128, 128): 1, (128, 256, 128): 1, (128, 128, 128): 1,
        (128, 128, 16): 2, (256, 128, 32): 1,
    }  # fmt: skip
    limit = ProductTime(case, 8, 8, 2, torch.float32)
    assert len(limit.calls) == 2 * 5 + 1
    for name, call in limit.calls.items():
        if name != "sgemm":
            m, _, n = map(int, name.split()[0].split("x"))
            assert call().shape in ((m, n), (n, m))
    seconds = {
        name: 1.0 if "weights @ map" in name else 0.5 if "128x128x16" in name else 3.0
        for name in limit.calls
    }
    read = limit.read({name: Timing(t, t, t, t, 1) for name, t in seconds.items()})
    assert read.seconds == 4 * 1.0 + 2 * 0.5
    flops = sum(count * 2 * m * k * n for (m, k, n), count in limit.products.items())
    assert read.gflops == pytest.approx(flops / 5 / 1e9)
    assert read.matrix_gflops == pytest.approx(2 * 1024**3 / 3 / 1e9)


# --- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    found = []
    for name, size in (("T1", (4, 4)), ("T2", (4, 4)), ("T2", (4, 8))):
        found += measure(
            CASES[name], size, ["reference"], CPU, torch.float32, 2, seconds=0, seeds=SEEDS[:4]
        )
    return found


def test_a_row_says_everything(rows):
    assert [(r["case"], r["width"], r["provider"]) for r in rows] == [
        (case, width, provider)
        for case, width in (("T1", 4), ("T2", 4), ("T2", 8))
        for provider in ("eager", "reference")
    ]
    for row in rows:
        assert (row["batch"], row["dtype"], row["device"]) == (2, "float32", "cpu")
        assert row["threads"] == torch.get_num_threads()
        assert (row["way"], row["extra_bytes"]) == ("call", None)
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["ms_first"] > 0
        assert row["of_limit"] == pytest.approx(row["ms"] / row["ms_limit"])
        assert 0 < row["rms_error"] <= row["max_error"] < 1e-3
    eager, reference = rows[:2]
    assert eager["speedup"] == 1
    assert reference["speedup"] == pytest.approx(eager["ms"] / reference["ms"])


def test_results_are_read_as_written_and_name_no_one(rows, tmp_path, monkeypatch):
    home = str(Path.home())
    monkeypatch.setattr(
        sys, "argv", [f"{home}/x/bench/__main__.py", "run", "--out", f"{home}/a", f"--b={home}/c"]
    )
    document = results.document(rows, CPU)
    path = tmp_path / "new" / "r.json"
    results.write(path, document)
    assert results.read(path) == document
    assert document["rows"] == rows
    assert document["command"] == "python -m bench run --out a --b=c"
    assert document["versions"]["torch"] == torch.__version__
    named = {"python", "torch", "numpy", "triton", "onnxruntime", "openvino", "seaattn_kernels"}
    assert set(document["versions"]) >= named
    machine = document["machine"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["torch_threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", document["commit"])
    text = path.read_text()
    assert home not in text
    assert str(ROOT) not in text
    host = socket.gethostname()
    assert not re.search(rf"\b{re.escape(host)}\b", text) or host == "localhost"
    user = getpass.getuser()
    assert f"/{user}" not in text


def test_outside_git_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_CHECKOUT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert results.commit() is None
    monkeypatch.setenv("COMMIT", "abc")
    assert results.commit() == "abc"


def test_a_results_folder_is_named_after_the_machine():
    folder = results.results_dir(CPU)
    assert folder.parent == ROOT / "bench" / "results"
    assert re.fullmatch(r"[a-z0-9-]+-cores", folder.name)


def test_a_chart_needs_the_file_alone(rows, tmp_path):
    source, chart = tmp_path / "r.json", tmp_path / "c" / "r.png"
    extra = [{**row, "provider": name} for row in rows for name in PROVIDERS[2:]]
    results.write(source, results.document([*rows, *extra], CPU))
    code = (
        "import sys; from pathlib import Path; from bench.results import read;"
        "from bench.plot import plot; plot(read(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, source, chart], cwd=ROOT, check=True)
    assert chart.read_bytes()[:8] == PNG
    assert chart.stat().st_size > 20_000


def test_every_provider_has_a_line_of_its_own():
    assert set(PROVIDERS) <= set(_STYLES) == set(_LABELS)
    for key in ("color", "marker"):
        assert len({style[key] for style in _STYLES.values()}) == len(_STYLES)


def test_a_chart_holds_what_is_called(tmp_path):
    """A file without ways is drawn as it is, and replays are left out."""
    folder = ROOT / "bench" / "results" / "amd-epyc-2-cores"
    old = results.read(folder / "float32-batch1-threads2.json")
    old["rows"] = [row for row in old["rows"] if row["case"] == "T1"]
    assert old["rows"]
    assert not any("way" in row for row in old["rows"])

    def drawn(rows):
        return plot({**old, "rows": rows}, tmp_path / "chart.png").read_bytes()

    picture = drawn(old["rows"])
    assert picture[:8] == PNG
    called = [{**row, "way": "call"} for row in old["rows"]]
    replayed = [{**row, "way": "graph", "ms": 1e-3, "speedup": None} for row in old["rows"]]
    assert drawn([*called, *replayed]) == picture
    assert drawn([{**row, "ms": 2 * row["ms"]} for row in called]) != picture


def test_a_chart_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no block"):
        plot({"rows": []}, tmp_path / "nothing.png")


# --- commands --------------------------------------------------------------------------------


def test_the_command_measures_and_draws(tmp_path):
    def bench(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "bench", *arguments],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    printed = bench("run", "--quick", "--cases", "T1", "--device", "cpu", "--out", str(tmp_path))
    source, chart = (Path(line) for line in printed.splitlines()[-2:])
    document = json.loads(source.read_text())
    assert {(r["case"], r["height"]) for r in document["rows"]} == {("T1", 7), ("T1", 16)}
    assert {"eager", "reference"} <= {row["provider"] for row in document["rows"]}
    assert chart.read_bytes()[:8] == PNG
    other = tmp_path / "again.png"
    assert bench("plot", str(source), "--out", str(other)).strip() == str(other)
    assert other.read_bytes()[:8] == PNG


def _arguments(tmp_path, *more):
    fixed = ("run", "--device", "cpu", "--quick", "--cases", "T1", "--out", str(tmp_path))
    return command._parser().parse_args([*fixed, *more])


def test_the_command_on_a_gpu_asks_for_graphs_and_shows_them(rows, tmp_path, monkeypatch, capsys):
    asked, missing = [], []

    def measured(case, size, providers, *_, graphs, **__):
        asked.append((size, providers, graphs))
        return [
            {**rows[0], "provider": provider, "way": way, "extra_bytes": extra}
            for provider in providers
            for way, extra in (("call", 3 * 2**19), ("graph", None))
            if (provider, way) not in missing
        ]

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(command, "auto_backend", lambda *_: "triton")
    monkeypatch.setattr(measuring, "auto_backend", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    arguments = _arguments(tmp_path, "--no-chart")
    arguments.device = GPU
    assert command.run(arguments) == 0
    listed = ["eager", "reference", "triton"]
    assert asked == [((7, 7), listed, True), ((16, 16), listed, True)]
    printed = capsys.readouterr().out
    assert "auto is triton here: listed once" in printed
    assert "graph: replayed" in printed
    lines = [line for line in printed.splitlines() if line.startswith("T1 ")]
    assert [line.split()[2:4] for line in lines] == 2 * [
        [provider, way] for provider in listed for way in ("call", "graph")
    ]
    for line in lines:
        assert line.endswith("extra 1.50 MiB") == (" call " in line)
        assert ("extra" in line) == (" call " in line)
    (saved,) = tmp_path.iterdir()
    assert saved.suffix == ".json", "no chart"

    missing.append(("triton", "graph"))
    assert command.run(arguments) == 1


def test_the_command_says_which_provider_it_cannot_time(rows, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case, size, providers, *_, graphs, **__):
        asked.append((providers, graphs))
        return [{**rows[0], "provider": provider} for provider in providers]

    monkeypatch.setattr(command, "measure", measured)
    assert command.run(_arguments(tmp_path, "--providers", "reference", "triton", "autotune")) == 1
    assert asked == 2 * [(["eager", "reference"], False)]
    printed = capsys.readouterr().out
    assert "triton is not timed: it needs a GPU, got cpu" in printed
    assert "autotune is not timed: it needs a GPU, got cpu" in printed
    assert "graph" not in printed
    assert "extra" not in printed

    asked.clear()
    assert command.run(_arguments(tmp_path)) == 0, "nobody asked for them"
    assert "is not timed" not in capsys.readouterr().out
    assert not {"triton", "compile", "autotune"} & set(asked[0][0])


def test_the_demo_verifies_times_and_ends_with_its_chart(tmp_path, capsys):
    assert demo.run(variant="t", device="cpu", out=tmp_path, quick=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("random weights" in line for line in lines)
    assert "everything verified" in lines
    assert lines[-1] == str(tmp_path / "demo.png")
    assert Path(lines[-1]).read_bytes()[:8] == PNG
    document = results.read(tmp_path / "demo.json")
    kinds = [row["kind"] for row in document["rows"]]
    assert kinds == ["model"] + ["block"] * (len(kinds) - 1)
    assert {row["height"] for row in document["rows"][1:]} == {8, 16, 32}


def test_the_demo_fails_where_the_model_is_wrong(tmp_path, capsys, monkeypatch):
    right = demo.seaformer.seaformer_segmenter

    def wrong(variant):
        model = right(variant)
        for block in model.modules():
            if isinstance(block, SeaAttention):
                block.register_forward_hook(
                    lambda module, _, out: 1.001 * out if isinstance(module, Swapped) else out
                )
        return model

    monkeypatch.setattr(demo.seaformer, "seaformer_segmenter", wrong)
    monkeypatch.setattr(demo, "SWEEP_SIDES", (8,))
    assert demo.run(variant="t", device="cpu", out=tmp_path, quick=True) == 1
    printed = capsys.readouterr().out
    assert "ours is not timed, it is wrong" in printed
    assert "VERIFICATION FAILED" in printed


def test_the_demo_takes_a_checkpoint_and_a_photograph(tmp_path, capsys, monkeypatch):
    from PIL import Image

    from seaattn_kernels import seaformer, verify

    Image.new("RGB", (90, 60), (200, 30, 90)).save(tmp_path / "picture.png")
    model = verify.randomise(seaformer.seaformer_segmenter("t"))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    x = demo.photograph(tmp_path / "picture.png")
    assert x.shape == (1, 3, 512, 512)
    colour = (torch.tensor([200, 30, 90]) / 255 - torch.tensor(picture.MEAN)) / torch.tensor(
        picture.STD
    )
    torch.testing.assert_close(x[0, :, 100, 100], colour)
    monkeypatch.setattr(demo, "SWEEP_SIDES", (8,))
    arguments = (tmp_path / "weights.pth", tmp_path / "picture.png", "t", CPU, "float32")
    assert demo.run(*arguments, out=tmp_path, quick=True) == 0
    text = capsys.readouterr().out
    assert "weights of weights.pth (0 keys missing, 0 unexpected), picture.png at 512x512" in text
    assert "random weights" not in text
    assert "4 of them run on seaattn_kernels" in text


@pytest.mark.parametrize("argument", ["checkpoint", "image"])
def test_the_demo_says_in_a_line_what_it_cannot_load(argument, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no weights, no picture")
    for name in ("notes.txt", "missing.txt"):
        assert demo.run(**{argument: tmp_path / name}, out=tmp_path) == 1
        assert capsys.readouterr().err.startswith("cannot be loaded: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--device", "bogus"],
        ["run", "--batch", "0"],
        ["run", "--threads", "0"],
        ["cpu", "--threads", "1", "0"],
        ["cpu", "--models", "x"],
        ["plot", "nowhere.json"],
        ["plot", "README.md"],
    ],
)
def test_wrong_arguments_are_a_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert raised.value.code != 0


# --- operators -------------------------------------------------------------------------------


def _measure_operators(log, providers=("triton",)):
    return operators.measure(
        TOY, (3, 4), 1, providers, CPU, torch.float32, seconds=0.0, seeds=SEEDS[:2], log=log
    )


def test_operators_are_measured_in_both_modes(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    log = []
    rows = _measure_operators(log.append)
    assert not log
    names = ["axial_squeeze", "axial_attention_pair", "broadcast_add", "gate", "block"]
    found = Counter((row["operator"], row["mode"], row["way"], row["provider"]) for row in rows)
    assert found == Counter(
        (name, mode, "call", provider)
        for name in names
        for mode in ("forward", "step")
        for provider in ("eager", "triton")
    )
    for row in rows:
        assert row["ms"] > 0
        assert row["ms_limit"] is None  # a limit needs a GPU
        if row["provider"] == "eager":
            assert row["speedup"] == 1
    # x once, a row and a column: float32, 12 elements in each of 8 + 8 channels of q, k, v.
    squeeze = next(row for row in rows if row["operator"] == "axial_squeeze")
    assert squeeze["bytes"] == 4 * TOY.projected * (12 + 3 + 4)
    assert len(operators.table(rows).splitlines()) == 10
    document = results.document(rows, CPU)
    assert plot(document, tmp_path / "operators.png").read_bytes().startswith(PNG)


def test_a_wrong_operator_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    right = ops.gate

    def wrong(x, y, hard=True, backend="auto"):
        return right(x, y, hard, backend) * (1.001 if backend == "triton" else 1)

    monkeypatch.setattr(ops, "gate", wrong)
    stages = ops.OVERLOADS["normalize_gate"]  # the gate of a block in training
    stage = lambda *arguments: stages["triton"](*arguments) * 1.001  # noqa: E731
    monkeypatch.setitem(ops.OVERLOADS, "normalize_gate", {**stages, "triton": stage})
    log = []
    rows = _measure_operators(log.append)
    assert [line.split(" is not timed")[0] for line in log] == [
        "toy 3x4 gate triton", "toy 3x4 block triton",
    ]  # fmt: skip
    timed = {row["operator"] for row in rows if row["provider"] == "triton"}
    assert timed == {"axial_squeeze", "axial_attention_pair", "broadcast_add"}


def test_the_command_of_the_operators(tmp_path):
    command = ["-m", "bench", "operators", "--device", "cpu", "--cases", "T1", "--quick"]
    done = subprocess.run(
        [sys.executable, *command, "--providers", "eager", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "operators-float32-batch1.json"
    assert len(results.read(path)["rows"]) == 10
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    assert "1x T1 32x64 float32 block step, call: eager" in done.stdout


# --- on a CPU --------------------------------------------------------------------------------


def test_every_map_of_a_cpu_is_listed_once():
    listed = cpu.shapes(CASES)
    sizes = {(case.channels, case.key_dim, case.heads, *size) for case, size in listed}
    assert len(listed) == len(sizes)
    wanted = {
        (case.channels, case.key_dim, case.heads, *size)
        for case in CASES.values()
        for size in case.maps.values()
    }
    assert sizes == wanted | {(192, 16, 8, side, side) for side in SWEEP_SIDES}
    assert max(height * width for *_, height, width in sizes) == 128 * 128
    # L1 has the sizes of B1: what is listed there is not repeated.
    assert [size for case, size in listed if case.name == "L1"] == [(14, 14), (64, 128)]
    compiled = [(case.name, size) for case, size in cpu.compiled(listed)]
    assert compiled == [
        ("B1", (16, 16)), ("B1", (32, 32)), ("B2", (8, 8)), ("L2", (16, 16)), ("L3", (8, 8)),
    ]  # fmt: skip


def _cpu_rows(**microseconds):
    """Rows of two maps, one large, with a limit of 100 us and 10 ms; times by provider."""
    return [
        {
            "kind": "block", "case": "B1", "height": side, "width": side, "batch": 1,
            "dtype": "float32", "device": "cpu", "threads": threads, "provider": name,
            "ms": us / 1e3, "ms_limit": limit / 1e3, "of_limit": us / limit,
        }
        for threads in (1, 2)
        for index, (side, limit) in enumerate(((8, 100.0), (64, 10000.0)))
        for name, us in ((name, times[index]) for name, times in microseconds.items())
    ]  # fmt: skip


def test_the_summary_holds_geometric_means_against_the_targets():
    rows = _cpu_rows(
        eager=(600, 20000), reference=(700, 19000), openvino=(130, 16000),
        onnxruntime=(150, 14400), auto=(150, 9000), channels_last=(120, 12000),
    )  # fmt: skip
    found = {
        (row["threads"], row["layout"], row["figure"]): row for row in cpu.summary(rows)
    }  # fmt: skip
    assert len(found) == 2 * 2 * 7

    def holds(threads, layout, figure, value, met):
        row = found[threads, layout, figure]
        assert row["value"] == pytest.approx(value)
        assert row["met"] is met
        return row

    holds(1, "NCHW", "of the limit, maps from 14x14", 0.9, True)
    holds(1, "NCHW", "of the limit, maps from 64x64", 0.9, True)
    holds(1, "channels_last", "of the limit, maps from 14x14", 1.2, False)
    holds(1, "channels_last", "of the limit, maps from 64x64", 1.2, False)
    holds(1, "NCHW", "of the limit, smaller maps", 1.5, None)
    holds(1, "NCHW", "us over the limit, smaller maps", 50, False)
    row = holds(1, "channels_last", "us over the limit, smaller maps", 20, True)
    assert row["note"] == "at most 20.0, B1 8x8"
    over_peers = (130 / 150 * 14400 / 9000) ** 0.5
    row = holds(1, "NCHW", "best peer over ours", over_peers, False)
    assert row["note"] == "openvino at 1, onnxruntime at 1"
    assert (row["maps"], row["target"]) == (2, ">= 1.2")
    assert found[2, "NCHW", "best peer over ours"]["target"] == ">= 1.5"
    row = holds(2, "NCHW", "the same, worst map", 130 / 150, False)
    assert row["note"] == "B1 8x8, openvino"
    over_eager = (600 / 150 * 20000 / 9000) ** 0.5
    holds(1, "NCHW", "eager over ours", over_eager, True)
    holds(2, "NCHW", "eager over ours", over_eager, False)
    printed = cpu.summary_table(list(found.values()))
    assert printed.count("not met") == sum(row["met"] is False for row in found.values())
    assert len(re.findall("ours in NCHW, 1 thread ", printed)) == 1


def test_the_table_of_a_cpu_shows_times_and_ratios():
    rows = _cpu_rows(eager=(600, 20000), openvino=(130, 16000), auto=(100, 9000))
    # A map at which ours is refused has no line, and a peer that is refused no time.
    rows = [
        row
        for row in rows
        if (row["threads"], row["height"], row["provider"])
        not in ((1, 8, "auto"), (2, 64, "openvino"))
    ]
    lines = cpu.table(rows).splitlines()
    assert [" ".join(line.split()) for line in lines if line.startswith("B1")] == [
        "B1 64x64 10000.0 20000.0 (2.00) 16000.0 (1.60) 9000.0 (0.90) 1.78x openvino, 2.22x",
        "B1 8x8 100.0 600.0 (6.00) 130.0 (1.30) 100.0 (1.00) 1.30x openvino, 6.00x",
        "B1 64x64 10000.0 20000.0 (2.00) - 9000.0 (0.90) 2.22x eager, 2.22x",
    ]
    assert [line for line in lines if "thread" in line] == [
        "1 thread, float32, batch 1: us (of the limit)",
        "2 threads, float32, batch 1: us (of the limit)",
    ]


def test_the_targets_are_bounds():
    assert [cpu.Target(1, "<").met(x) for x in (0.9, 1)] == [True, False]
    assert [cpu.Target(1, "<=").met(x) for x in (1, 1.1)] == [True, False]
    assert [cpu.Target(1, ">=").met(x) for x in (1, 0.9)] == [True, False]


@pytest.mark.parametrize("runtime", peers.PACKAGES)
def test_a_runtime_computes_what_eager_does(runtime):
    if reason := peers.refusal(runtime):
        pytest.skip(reason)
    block = block_of(TOY)
    inputs = [torch.randn(2, 8, 5, 4) for _ in range(2)]
    with torch.inference_mode():
        model = measuring._provide(runtime, block)
        bound = [model.bind(x) for x in inputs]
        outputs = [model(taken) for taken in bound]
        expected = [as_eager(block)(x) for x in inputs]
    assert len({out.data_ptr() for out in outputs}) == 2, "a result is not overwritten"
    for out, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, wanted)


def test_runtimes_take_as_many_threads_as_torch():
    block, x = block_of(TOY), torch.randn(1, 8, 3, 4)
    for count in (1, 2):
        with with_threads(count):
            if peers.refusal("onnxruntime") is None:
                runtime = peers.OnnxRuntime(block)
                runtime.bind(x)
                assert runtime._loaded.get_session_options().intra_op_num_threads == count
            if peers.refusal("openvino") is None:
                runtime = peers.OpenVino(block)
                runtime.bind(x)
                assert runtime._loaded.get_property("INFERENCE_NUM_THREADS") == count
    reasons = list(filter(None, map(peers.refusal, peers.PACKAGES)))
    if reasons:
        pytest.skip("; ".join(reasons))
    assert peers.exported.cache_info().hits >= 3, "one export serves both, and all threads"


def test_a_missing_package_is_named(monkeypatch):
    there = {"onnx", "onnxruntime"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name in there or None)
    assert peers.refusal("onnxruntime") == "not installed: onnxscript"
    assert peers.refusal("openvino") == "not installed: onnxscript, openvino"
    assert refusal("openvino", CASES["B1"], CPU, torch.float32) == peers.refusal("openvino")
    assert available(["openvino"], CASES["B1"], CPU, torch.float32) == ["eager"]


def test_freezing_is_switched_on_while_it_compiles(monkeypatch):
    import torch._inductor.config as inductor

    seen = []

    def compiled(function, dynamic):
        assert not isinstance(function, torch.nn.Module), "code that no other block shares"

        def call(x):
            seen.append(inductor.freezing)
            return function(x)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    block, x = block_of(TOY), torch.randn(1, 8, 3, 4)
    with torch.inference_mode():
        model = measuring._provide("freezing", block)
        assert torch.equal(model(model.bind(x)), as_eager(block)(x))
    assert seen == [True, False]


def test_channels_last_maps_are_made_ahead():
    block, x = block_of(TOY), torch.randn(2, 8, 3, 4)
    model = measuring._provide("channels_last", block)
    taken = model.bind(x)
    assert taken.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        out = model(taken)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, as_eager(block)(x))


class _ResultBytes(TorchDispatchMode):
    """Adds up the results of operators that compute."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        if not is_view and func.overloadpacket.__name__ not in ("_unsafe_view", "empty"):
            first = out[0] if isinstance(out, (tuple, list)) else out
            self.bytes += first.numel() * first.element_size()
        return out


def test_memory_is_what_the_allocator_hands_out(library):
    rows = memory.measure([(CASES["T1"], (32, 32)), (TOY, (3, 4))], 2, [1, 2])
    assert [(row["case"], row["threads"]) for row in rows] == [
        ("T1", 1), ("toy", 1), ("T1", 2), ("toy", 2),
    ]  # fmt: skip
    for row in rows:
        case = CASES.get(row["case"], TOY)
        x = torch.randn(2, case.channels, row["height"], row["width"])
        assert row["result_bytes"] == x.numel() * 4
        block = as_eager(block_of(case))
        with torch.no_grad(), _ResultBytes() as results_of:
            block(x)
        assert row["eager_bytes"] >= results_of.bytes - row["result_bytes"]
        assert row["eager_bytes"] > row["eager_peak_bytes"] > 0
        assert row["of_eager"] == row["scratch_bytes"] / row["eager_bytes"]
    one, _, two, _ = rows
    assert 0 < one["scratch_bytes"] < two["scratch_bytes"] < one["eager_peak_bytes"]
    lines = cpu.other_lines(rows).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "scratch of our block, 1 thread", "scratch of our block, 2 threads",
    ]  # fmt: skip


def test_the_share_of_the_attention_is_what_its_blocks_take(monkeypatch):
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    monkeypatch.setattr(models, "_SHARE_CALLS", 3)
    attention = SeaAttention(8, 4, 1)
    slow = models.Segmenter(
        torch.nn.Sequential(attention, Slow()).eval(), torch.randn(1, 8, 6, 8), "slow rest"
    )
    shares = slow.attention_shares()
    assert set(shares) == {"eager", "ours"}
    assert all(0 < share < 0.5 for share in shares.values())
    attention.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    # Hooks of the block are timed with it: those that were there before lie outside.
    fast = models.Segmenter(torch.nn.Sequential(attention).eval(), torch.randn(1, 8, 6, 8), "all")
    measured = fast.measure(0)
    row = {**fast.row(measured), "attention_share_eager": 0.5, "attention_share": 0.25}
    assert (row["height"], row["width"], row["threads"]) == (6, 8, torch.get_num_threads())
    assert row["speedup"] == pytest.approx(row["ms_eager"] / row["ms"])
    assert "of which attention 50 %; replaced" in cpu.other_lines([row])


def test_the_command_of_a_cpu(tmp_path, library):
    command_line = ["-m", "bench", "cpu", "--quick", "--cases", "T1", "--threads", "1", "2"]
    done = subprocess.run(
        [sys.executable, *command_line, "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "cpu-float32-batch1.json"
    document = results.read(path)
    installed = [name for name in peers.PACKAGES if peers.refusal(name) is None]
    found = Counter(
        (row["threads"], row["provider"]) for row in document["rows"] if row["kind"] == "block"
    )
    assert found == Counter(
        (threads, name)
        for threads in (1, 2)
        for name in ("eager", "reference", "auto", "channels_last", *installed)
    )
    for name in set(peers.PACKAGES) - set(installed):
        assert f"{name} is not timed: not installed" in done.stdout
    assert Counter(row["kind"] for row in document["rows"])["memory"] == 2
    assert {row["threads"] for row in document["summary"]} == {1, 2}
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    for text in ("1 thread, float32, batch 1", "ours in channels_last, 2 threads", "not met"):
        assert text in done.stdout


def test_the_command_of_a_cpu_needs_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "auto_backend", lambda *_: "reference")
    arguments = command._parser().parse_args(["cpu", "--out", str(tmp_path)])
    assert command.run_cpu(arguments) == 1
    assert "no C++ block to time" in capsys.readouterr().out


def test_the_command_of_a_cpu_asks_for_what_was_wanted(rows, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case, size, providers, device, dtype, batch, *, log, threads, **_):
        asked.append((case.name, size, set(providers), batch, list(threads)))
        return []

    monkeypatch.setattr(command, "auto_backend", lambda *_: "cpu")
    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(memory, "measure", lambda *_: [])
    timed_models = []
    monkeypatch.setattr(
        models, "measure", lambda variants, *_: timed_models.append(list(variants)) or []
    )
    fixed = ["cpu", "--cases", "B2", "--out", str(tmp_path)]
    everything = {*cpu.PEERS, *cpu.OURS}
    for more, compiled, batch, threads, variants in (
        ([], 1, 1, sorted({1, torch.get_num_threads()}), ["b", "l"]),
        (["--compiled", "all", "--batch", "16", "--threads", "2"], 5, 16, [2], ["b", "l"]),
        (["--compiled", "none", "--models"], 0, 1, sorted({1, torch.get_num_threads()}), []),
    ):
        asked.clear()
        assert command.run_cpu(command._parser().parse_args([*fixed, *more])) == 1, "no rows"
        assert len(asked) == 5
        assert sum(providers == everything for _, _, providers, *_ in asked) == compiled
        assert {(given, tuple(counts)) for *_, given, counts in asked} == {(batch, tuple(threads))}
        assert timed_models.pop() == variants
        assert f"torch.compile is timed at {compiled} of 5 maps" in capsys.readouterr().out


# --- the run on a GPU ------------------------------------------------------------------------


def test_gpu_script_runs_every_part_and_reports(tmp_path):
    """With a Python that notes what it is asked for: no part stops the others."""
    (tmp_path / "bench").mkdir()
    script = tmp_path / "bench" / "gpu.sh"
    script.write_text((ROOT / "bench" / "gpu.sh").read_text())
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n'
        'case "$*" in -) echo some-gpu sm_90 ;; *-m?pytest*) exit 3 ;; esac\n'
    )
    stub.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", script, "--out", out],
        env={**os.environ, "PYTHON": str(stub)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    summary = done.stdout[done.stdout.index("== some-gpu, sm_90") :]
    parts = {line.split()[0]: int(line.split()[2]) for line in summary.splitlines()[1:]}
    assert list(parts) == [
        "library", "kernels", "tests", "latency", "blocks", "blocks-64", "autotune", "operators",
    ]  # fmt: skip
    assert parts["tests"] == 3
    assert parts["kernels"] == parts["operators"] == 0
    asked = (tmp_path / "asked").read_text()
    assert "static --targets sm_90 --all" in asked
    (tests,) = re.findall(r"pytest -q -m gpu .*", asked)
    assert {"tests/test_triton.py", "tests/test_block.py", "tests/test_gpu.py"} <= {*tests.split()}
    compared = "reference triton compile"
    for batch, providers in ((1, compared), (64, compared), (1, "triton autotune")):
        wanted = rf"bench run .* --dtype float16 --batch {batch} --providers {providers}$"
        assert re.search(wanted, asked, re.MULTILINE), wanted
    files = ["static.json", "tests.txt"]
    for line in re.findall(r"bench (?:run|operators) .*", asked):
        folder, kind, batch = re.search(r"--out (\S+).*--dtype (\S+) --batch (\d+)", line).groups()
        name = f"{folder}/{'operators-' * ('operators' in line)}{kind}-batch{batch}"
        files += [f"{name}.json"] + [f"{name}.png"] * ("--no-chart" not in line)
    assert len(set(files)) == len(files), "a part writes over the file of another"
    assert len(files) <= 8
    limits = re.findall(r"^part \S+ (\d+)", script.read_text(), re.MULTILINE)
    assert sum(map(int, limits)) < 8 * 60


def test_gpu_script_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", "--out", tmp_path],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
