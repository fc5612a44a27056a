"""The benchmark: its cases, its loop, its files, and the commands end to end."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bench_toys import CPU, GPU, IDENTITY, PNG, ROOT, TOY, block, operator, row, setting
from torch.utils._python_dispatch import TorchDispatchMode

from bench import __main__ as command
from bench import demo, peers, picture, results, run, sanitize, works
from bench import measure as measuring
from bench.cases import CASES, LARGE_SIDES, SWEEP_SIDES, Case
from bench.eager import EagerSeaAttention, as_eager
from bench.measure import PROVIDERS, available, measure, refusal
from bench.works import OPERATORS, Block, Operator, block_of
from seaattn_kernels import SeaAttention, native
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.kernels import launch
from seaattn_kernels.patch import Swapped

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


# --- the loop --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.timing.FEWEST_ROUNDS", 2)
        for name, size in (("T1", (4, 4)), ("T2", (4, 4)), ("T2", (4, 8))):
            work = Block(CASES[name], size, setting(batch=2))
            found += measure(work, ["reference"], seconds=0, seeds=SEEDS[:4])
    return found


def test_a_row_says_everything(rows):
    assert [(r["case"], r["width"], r["provider"]) for r in rows] == [
        (case, width, provider)
        for case, width in (("T1", 4), ("T2", 4), ("T2", 8))
        for provider in ("eager", "reference")
    ]
    for found in rows:
        assert list(found) == list(row()), "the rows of tests are of this kind"
        assert (found["kind"], found["what"], found["mode"]) == ("block", "block", "forward")
        assert (found["batch"], found["dtype"], found["device"]) == (2, "float32", "cpu")
        assert found["threads"] == torch.get_num_threads()
        assert (found["way"], found["ms_cold"]) == ("call", None)
        assert 0 < found["ms_low"] <= found["ms"] <= found["ms_high"]
        assert found["ms_first"] > 0
        assert found["of_limit"] == pytest.approx(found["ms"] / found["ms_limit"])
        assert 0 < found["rms_error"] <= found["max_error"] < 1e-3
        assert found["backend"] == found["provider"]
        assert 0 < found["peak_bytes"] <= found["allocated_bytes"]
    eager, reference = rows[:2]
    assert eager["speedup"] == 1
    assert reference["speedup"] == pytest.approx(eager["ms"] / reference["ms"])
    assert reference["rms_error_eager"] == eager["rms_error"]


def test_rows_come_with_each_number_of_threads(hasty):
    before = torch.get_num_threads()
    found = measure(block(), ["reference"], seconds=0, seeds=SEEDS[:1], threads=[1, 2])
    assert [(r["threads"], r["provider"]) for r in found] == [
        (count, provider) for count in (1, 2) for provider in ("eager", "reference")
    ]
    assert [re.search(r"--threads (\d)", r["command"])[1] for r in found] == [*"1122"]
    assert torch.get_num_threads() == before


def test_a_large_work_is_judged_on_as_many_maps_as_hold_enough(monkeypatch):
    work = block(batch=2)
    assert len(measuring._inputs(work, SEEDS)[0]) == 5, "two seeds a map"
    monkeypatch.setattr(measuring, "_ENOUGH", 2 * 2 * 8 * 3 * 4)
    assert len(measuring._inputs(work, SEEDS)[0]) == 2


def test_auto_is_listed_only_where_it_is_another_backend(monkeypatch):
    def listed(best, providers, device):
        monkeypatch.setattr(measuring, "auto_backend", lambda *_: best)
        return available(providers, _on(device))

    everything = ("auto", "reference", "triton", "eager")
    assert listed("reference", everything, CPU) == ["eager", "reference"]
    assert listed("cpu", everything, CPU) == ["eager", "reference", "auto"]
    assert listed("triton", everything, GPU) == ["eager", "reference", "triton"]
    assert listed("cuda", everything, GPU) == ["eager", "reference", "triton", "auto"]
    assert listed("triton", ["auto", "reference"], GPU) == ["eager", "reference", "auto"]
    assert listed("reference", ["auto"], CPU) == ["eager", "auto"]


def test_auto_may_be_another_backend_for_each_operator(monkeypatch):
    asked = []
    listed = (operator("gate"), operator("gate", step=True), block(), block(step=True))
    monkeypatch.setattr(
        measuring.ops, "choose", lambda what, *_: asked.append(what) or f"best of {what}"
    )
    for work in listed:
        assert measuring.backend_of("auto", work) == f"best of {asked[-1]}"
        assert measuring.backend_of("reference", work) == "reference"
    assert asked == ["gate", "gate", "sea_attention", "training"]


def _on(device, case=CASES["B1"], dtype=torch.float16, step=False):
    """A block that says what runs it, without weights on a device that may not be here."""
    work = Block.__new__(Block)
    work.setting, work._table, work.case = setting(device, dtype, step=step), case, case.name
    return work


def test_a_provider_is_listed_only_where_it_runs(monkeypatch, library):
    wide = Case("wide", 8, 128, 1, stride=4)
    monkeypatch.setattr(native, "CUDA_REASON", "not compiled")
    assert "GPU" in refusal("triton", _on(CPU))
    assert "GPU" in refusal("cuda", _on(CPU))
    assert refusal("cuda", _on(GPU)) == "not compiled"
    assert "GPU" in refusal("autotune", _on(CPU))
    assert "(128, 256)" in refusal("triton", _on(GPU, wide))
    for name in PROVIDERS:
        if name == "cuda":
            continue
        on_a_gpu = refusal(name, _on(GPU))
        assert ("CPU" in on_a_gpu) if name in measuring._NEED_A_CPU else on_a_gpu is None
        if name in peers.PACKAGES:
            assert "float32" in refusal(name, _on(CPU, wide))
        elif name not in ("triton", "autotune"):
            assert refusal(name, _on(CPU, wide)) is None
    monkeypatch.setattr(measuring, "auto_backend", lambda *_: "triton")
    listed = available(PROVIDERS, _on(GPU, wide))
    assert listed == ["eager", "reference", "auto", "compile", "autotune"]
    listed = available(PROVIDERS, _on(CPU, dtype=torch.float32, step=True))
    assert listed == ["eager", "reference", "cpu", "auto", "channels_last", "compile"]


def test_the_compiled_block_is_a_provider_by_name(hasty, library):
    found = measure(block(), ["cpu", "auto"], seconds=0, seeds=SEEDS[:2])
    assert [(r["provider"], r["backend"]) for r in found] == [("eager", "eager"), ("cpu", "cpu")]


# --- graphs ----------------------------------------------------------------------------------


class _FakeGraphs:
    """Stands in for ``capture``: every replay overwrites the one result that a graph has."""

    def __init__(self, broken=()):
        self.broken, self.made, self.replays = broken, 0, 0

    def __call__(self, call):
        self.made += 1
        if self.made in self.broken:
            raise ValueError("it waits for the GPU\nsomewhere")
        result = call().clone()
        assert result.is_inference()

        def replay():
            self.replays += 1
            result.copy_(call())

        return replay, result


@pytest.fixture
def measure_graphs(monkeypatch, hasty):
    def measured(fake, providers=("reference",), seeds=SEEDS[:3]):
        said = []
        monkeypatch.setattr(measuring, "capture", fake)
        found = measure(block(), providers, 0, seeds, said.append, graphs=True)
        return said, {(r["provider"], r["way"]): r for r in found}

    return measured


def test_every_provider_is_measured_as_a_graph_too(measure_graphs):
    fake = _FakeGraphs()
    said, rows = measure_graphs(fake)
    assert not said, "a result that the next call overwrites is not judged"
    assert fake.made == 2 * 3, "once a map: the memory of a graph is its own"
    assert list(rows) == [
        (provider, way) for provider in ("eager", "reference") for way in ("call", "graph")
    ]
    for (provider, way), found in rows.items():
        assert found["speedup"] == pytest.approx(rows["eager", way]["ms"] / found["ms"])
        assert (found["peak_bytes"] is None) == (found["allocated_bytes"] is None)
        assert (found["peak_bytes"] is None) == (way == "graph")
        assert found["rms_error"] == rows[provider, "call"]["rms_error"]
        assert found["backend"] == provider


def test_a_timed_call_replays_and_captures_nothing(monkeypatch):
    fake = _FakeGraphs()
    monkeypatch.setattr(measuring, "capture", fake)
    with torch.inference_mode():
        maps = [torch.randn(1, 8, 3, 4) for _ in range(3)]
        module = block_of(TOY)
        replayed = measuring._Replayed(module)
        bound = [replayed.bind(x) for x in maps]
        results = [replayed(captured) for captured in bound]
        expected = [module(x) for x in maps]
        for out, wanted in zip(results, expected, strict=True):
            assert torch.equal(out, wanted), "a graph has a result of its own"
        made, before = fake.made, fake.replays
        assert replayed(bound[0]) is results[0]
    assert (fake.made, fake.replays) == (made, before + 1) == (3, 4)


def test_a_graph_is_of_what_a_candidate_binds(monkeypatch):
    class Bound:
        def bind(self, given):
            return f"bound {given}"

        def __call__(self, given):
            return given

    monkeypatch.setattr(measuring, "capture", lambda call: call())
    assert measuring._Replayed(Bound()).bind("map") == "bound map"


def test_a_graph_that_cannot_be_captured_stops_no_other(measure_graphs):
    # Maps are captured in the order of candidates, eager's call and graph first.
    said, rows = measure_graphs(_FakeGraphs(broken=[4]))
    assert list(rows) == [("eager", "call"), ("eager", "graph"), ("reference", "call")]
    (line,) = said
    assert line.startswith("toy 3x4 block forward reference graph is not timed, it is raises ")
    assert line.endswith("RuntimeError: no capture: ValueError: it waits for the GPU")

    said, rows = measure_graphs(_FakeGraphs(broken=[1]))
    assert list(rows) == [("eager", "call"), ("reference", "call"), ("reference", "graph")]
    assert len(said) == 1
    assert rows["reference", "graph"]["speedup"] is None
    assert rows["reference", "call"]["speedup"] > 0
    assert "eager is not timed" in run.line(rows["reference", "graph"])


def test_a_wrong_graph_is_not_timed(measure_graphs):
    held = []

    def stale(call):
        held.append(call())
        return (lambda: None), held[0]

    said, rows = measure_graphs(stale, [], SEEDS[:2])
    assert [way for _, way in rows] == ["call"]
    assert said[0].startswith("toy 3x4 block forward eager graph is not timed, it is wrong: rms")


# --- files -----------------------------------------------------------------------------------


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


# --- bench run -------------------------------------------------------------------------------


def _arguments(tmp_path, *more):
    fixed = ("run", "--device", "cpu", "--quick", "--cases", "T1", "--out", str(tmp_path))
    return command._parser().parse_args([*fixed, *more])


def _jobs(*arguments):
    parsed = command._parser().parse_args(["run", "--device", "cpu", *arguments])
    return [name for name, _ in run.jobs(parsed)]


def test_everything_is_timed_where_nobody_asks():
    listed = _jobs()
    assert len(set(listed)) == len(listed)
    forward = [name for name in listed if name.startswith("block forward")]
    at_512 = {f"block forward {name} {case.maps['512']}" for name, case in CASES.items()
              if not case.yolo}  # fmt: skip
    at_640 = {f"block forward {name} {case.maps['640']}" for name, case in CASES.items()
              if case.yolo}  # fmt: skip
    swept = {f"block forward T1 {side, side}" for side in (*SWEEP_SIDES, *LARGE_SIDES)}
    assert set(forward) == at_512 | at_640 | swept
    assert len(at_512 | at_640 | swept) == len(CASES) + len(SWEEP_SIDES) + len(LARGE_SIDES) - 1
    assert [name for name in listed if name.startswith("block step")] == [
        "block step B1 (16, 16)", "block step L1 (32, 32)", "block step YOLOv8n-P3 (80, 80)",
    ]  # fmt: skip
    assert {name for name in listed if name.split()[0] in OPERATORS} == {
        f"{name} {mode} {where}"
        for name in OPERATORS
        for mode in ("forward", "step")
        for where in ("B1 (16, 16)", "YOLOv8n-P3 (80, 80)")
    }
    models = [name for name in listed if name.startswith("model")]
    assert models == [f"model forward {variant}" for variant in "tsbl"], "no steps unless asked for"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--what model --modes step forward --models t s", [
            "model step t", "model step s", "model forward t", "model forward s",
        ]),
        ("--what gate --cases T1 T1 B1 --modes forward forward", [
            "gate forward T1 (16, 16)", "gate forward B1 (16, 16)",
        ]),
        ("--what block gate --cases B2 --maps 3x5 7x7 3x5", [
            "block forward B2 (3, 5)", "block forward B2 (7, 7)",
            "gate forward B2 (3, 5)", "gate forward B2 (7, 7)",
            "block step B2 (3, 5)", "block step B2 (7, 7)",
            "gate step B2 (3, 5)", "gate step B2 (7, 7)",
        ]),
        ("--what block --modes forward --cases T1 --maps 3x3", ["block forward T1 (3, 3)"]),
        ("--what block --modes forward --cases B2 YOLOv8n-P5 --maps table 8x8", [
            "block forward B2 (4, 4)", "block forward B2 (8, 8)", "block forward B2 (8, 16)",
            "block forward B2 (16, 16)", "block forward B2 (16, 32)",
            "block forward YOLOv8n-P5 (20, 20)", "block forward YOLOv8n-P5 (8, 8)",
        ]),
        ("--quick --what block model gate", [
            "block forward T1 (16, 16)", "block forward T2 (8, 8)", "gate forward B1 (16, 16)",
            "block step B1 (16, 16)", "block step L1 (32, 32)", "gate step B1 (16, 16)",
        ]),
        ("--quick --what model --models b b", ["model forward b"]),
    ],
)  # fmt: skip
def test_what_is_timed_is_what_was_asked_for(arguments, wanted):
    assert _jobs(*arguments.split()) == wanted


def test_a_job_builds_what_its_name_says():
    parsed = _arguments("/", "--what", "block", "gate", "--batch", "2", "--dtype", "float16")
    found = [(name, build()) for name, build in run.jobs(parsed)]
    for name, work in found:
        row = work.identity()
        size = (row["height"], row["width"])
        assert name == f"{row['what']} {row['mode']} {row['case']} {size}"
        assert (row["batch"], row["dtype"], row["device"]) == (2, "float16", "cpu")


def test_the_command_measures_and_draws(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "run", "--quick", "--cases", "T1", "--maps", "7x7"),
            *("--what", "block", "gate", "--peers", "reference", "auto", "--seconds", "0.05"),
            *("--device", "cpu", "--modes", "forward", "--out", tmp_path),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    source, chart, *others = (Path(line) for line in done.stdout.splitlines()[-6:])
    document = json.loads(source.read_text())
    found = Counter((r["what"], r["mode"], r["case"], r["height"]) for r in document["rows"])
    assert set(found) == {("block", "forward", "T1", 7), ("gate", "forward", "T1", 7)}
    assert {"eager", "reference"} <= {r["provider"] for r in document["rows"]}
    assert [path.name.removeprefix(source.stem) for path in (chart, *others)] == [
        ".png", "-speedups.png", "-roofline.png", ".csv", ".md",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (source, chart, *others)
    }
    for path in (chart, *others[:2]):
        assert path.read_bytes()[:8] == PNG
    assert document["command"].startswith("python -m bench run --quick --cases T1 --maps 7x7")
    assert document["done"] == ["block forward T1 (7, 7)", "gate forward T1 (7, 7)"]
    assert document["not_timed"] == ["reference, forward of gate: it is eager here"]


def test_operators_and_blocks_are_timed_in_both_modes(tmp_path, monkeypatch, hasty, capsys):
    """By eager alone: nothing but it is compared."""
    monkeypatch.setattr(results, "commit", lambda: "abc")
    given = (
        "--what",
        "block",
        *OPERATORS,
        "--maps",
        "3x4",
        "--peers",
        "eager",
        "--seconds",
        "0.01",
    )
    assert run.run(_arguments(tmp_path, *given)) == 0
    (source,) = tmp_path.glob("*.json")
    found = Counter((r["what"], r["mode"], r["provider"]) for r in results.read(source)["rows"])
    assert found == Counter(
        (what, mode, "eager") for what in ("block", *OPERATORS) for mode in ("forward", "step")
    )
    assert source.with_suffix(".png").read_bytes()[:8] == PNG
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " eager " in line]
    assert ["block", "step", "T1", "3x4", "eager", "call"] in [line[:6] for line in lines]
    assert len(lines) == 10


class _Measured:
    """Stands in for ``measure``: rows of every provider that runs, and none is timed."""

    def __init__(self, monkeypatch, missing=(), stop_at=None):
        self.asked, self.missing, self.stop_at = [], missing, stop_at
        monkeypatch.setattr(run, "measure", self)
        monkeypatch.setattr(results, "commit", lambda: "abc")

    def __call__(self, work, providers, *, graphs, log, **more):
        if len(self.asked) + 1 == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((work.identity(), list(providers), graphs, more))
        found = [
            {**row(provider), **work.identity(), "way": way, "peak_bytes": peak}
            for provider in available(providers, work)
            for way, peak in (("call", 3 * 2**19), ("graph", None))[: 2 if graphs else 1]
            if (provider, way) not in self.missing
        ]
        for provider, way in self.missing:
            log(f"{provider} {way} is wrong")
        return found


def test_the_command_on_a_gpu_asks_for_graphs_and_shows_them(tmp_path, monkeypatch, capsys):
    def on_a_gpu(case, size, given):
        work = _on(GPU, case, given.dtype, given.step)
        work.size = size
        return work

    monkeypatch.setattr(run, "Block", on_a_gpu)
    monkeypatch.setattr(run, "auto_backend", lambda *_: "triton")
    monkeypatch.setattr(measuring, "auto_backend", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr(native, "CUDA_REASON", "not compiled")
    measured = _Measured(monkeypatch)
    given = ("--no-chart", "--what", "block", "--modes", "forward", "--dtype", "float16")
    arguments = _arguments(tmp_path, *given)
    arguments.device = GPU
    assert run.run(arguments) == 0
    wanted = ["reference", "triton", "cuda", "auto", *peers.PACKAGES]
    assert [(a["height"], p, graphs) for a, p, graphs, _ in measured.asked] == [
        (16, ["eager", *wanted], True), (8, ["eager", *wanted], True),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "auto is triton for blocks here" in printed
    assert "graph: replayed" in printed
    lines = [line for line in printed.splitlines() if line.startswith("block  ")]
    assert [line.split()[4:6] for line in lines] == 2 * [
        [provider, way]
        for provider in ("eager", "reference", "triton")
        for way in ("call", "graph")
    ]
    for line in lines:
        assert line.endswith("peak 1.50 MiB") == (" call " in line)
        assert ("peak" in line) == (" call " in line)
    (saved,) = tmp_path.iterdir()
    assert saved.suffix == ".json", "no chart"

    _Measured(monkeypatch, missing=[("triton", "graph")])
    assert run.run(arguments) == 1
    assert "triton graph is wrong" in results.read(saved)["not_timed"]
    assert "triton graph is wrong" in capsys.readouterr().out


def test_a_cold_time_is_shown_beside_the_warm_one():
    assert "  cold 0.250 ms" in run.line(row(ms_cold=0.25))
    assert "cold" not in run.line(row())


def test_the_command_says_which_provider_it_cannot_time(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    measured = _Measured(monkeypatch)
    given = ("--what", "block", "gate", "--no-chart", "--modes", "forward")
    arguments = _arguments(tmp_path, *given, "--peers", "reference", "triton", "autotune")
    assert run.run(arguments) == 1
    assert [(p, graphs) for _, p, graphs, _ in measured.asked] == 3 * [
        (["reference", "triton", "autotune"], False)
    ]
    printed = capsys.readouterr().out
    assert printed.count("not timed: triton, forward of blocks: it needs a GPU, got cpu") == 1
    assert "not timed: autotune, forward of blocks: it needs a GPU, got cpu" in printed
    assert "not timed: reference, forward of gate: it is eager here" in printed
    assert "graph" not in printed
    (path,) = tmp_path.iterdir()
    assert len(results.read(path)["not_timed"]) == 2 + 3

    arguments = _arguments(tmp_path, *given, "--peers", "reference")
    assert run.run(arguments) == 0, "blocks have it"
    arguments = _arguments(tmp_path, *given, "--peers", "reference", "--what", "gate")
    assert run.run(arguments) == 1, "nothing has it"

    measured.asked.clear()
    capsys.readouterr()
    assert run.run(_arguments(tmp_path, *given)) == 0, "nobody asked for them"
    assert "not timed: triton, forward of blocks" in capsys.readouterr().out
    assert not {"compile", "autotune"} & set(measured.asked[0][1])


def test_slow_providers_are_timed_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Model", lambda variant, given: _named(given))
    given = ("--what", "block", "model", "--no-chart", "--modes", "forward")

    def _named(setting):
        work = _on(CPU, dtype=setting.dtype)
        work.kind, work.what, work.size = "model", "SeaFormer-T segmenter", (8, 8)
        return work

    def asked(*more):
        measured = _Measured(monkeypatch)
        run.run(command._parser().parse_args(
            ["run", "--device", "cpu", "--cases", "T1", "--maps", "7x7", "--models", "t",
             "--out", str(tmp_path), *given, *more]
        ))  # fmt: skip
        return {a["kind"]: set(providers) for a, providers, *_ in measured.asked}

    assert asked()["block"] == set(measuring.DEFAULT_PROVIDERS)
    assert asked()["model"] == set(measuring.DEFAULT_PROVIDERS) - {"compile"}
    assert asked("--quick")["block"] == set(measuring.DEFAULT_PROVIDERS) - {"compile"}
    assert asked("--peers", "compile")["model"] == {"compile"}


def test_a_provider_that_is_wrong_fails_the_command(tmp_path, monkeypatch, capsys):
    given = ("--no-chart", "--what", "gate", "--modes", "forward", "--peers", "cpu")
    _Measured(monkeypatch, missing=[("cpu", "call")])
    assert run.run(_arguments(tmp_path, *given)) == 1
    (path,) = tmp_path.iterdir()
    assert results.read(path)["not_timed"] == ["cpu call is wrong"]
    assert results.read(path)["done"] == ["gate forward T1 (16, 16)"]


def test_what_is_done_outlives_a_key_and_is_gone_on_with(tmp_path, monkeypatch, capsys):
    given = ("--what", "block", "gate", "--modes", "forward", "--no-chart", "--peers", "reference")
    _Measured(monkeypatch, stop_at=2)
    assert run.run(_arguments(tmp_path, *given)) == 130
    assert "--resume goes on" in capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    first = results.read(path)
    assert first["done"] == ["block forward T1 (16, 16)"]
    assert [r["provider"] for r in first["rows"]] == ["eager", "reference"]

    measured = _Measured(monkeypatch)
    assert run.run(_arguments(tmp_path, *given, "--resume")) == 0
    assert [a["what"] for a, *_ in measured.asked] == ["block", "gate"]
    assert [a["height"] for a, *_ in measured.asked] == [8, 16], "the first map is not timed again"
    whole = results.read(path)
    assert whole["rows"][:2] == first["rows"]
    assert whole["done"] == [name for name, _ in run.jobs(_arguments(tmp_path, *given))]
    assert (whole["date"], whole["command"]) == (first["date"], first["command"])

    measured = _Measured(monkeypatch)
    assert run.run(_arguments(tmp_path, *given, "--resume")) == 0
    assert not measured.asked, "everything is done"
    assert results.read(path) == whole
    assert run.run(_arguments(tmp_path, *given)) == 0
    assert len(measured.asked) == 3, "without --resume all of it is timed again"


@pytest.mark.parametrize("part", ["commit", "machine", "versions"])
def test_a_file_of_another_place_is_not_gone_on_with(part, tmp_path, monkeypatch, capsys):
    given = ("--what", "gate", "--modes", "forward", "--no-chart", "--peers", "eager")
    measured = _Measured(monkeypatch)
    assert run.run(_arguments(tmp_path, *given)) == 0
    (path,) = tmp_path.iterdir()
    document = results.read(path)
    document[part] = "another" if part == "commit" else {**document[part], "torch": "another"}
    results.write(path, document)
    measured.asked.clear()
    assert run.run(_arguments(tmp_path, *given, "--resume")) == 2
    assert f"is not gone on with: other {part}" in capsys.readouterr().err
    assert not measured.asked
    assert results.read(path) == document, "it is left as it was"


def test_a_stopped_run_without_rows_leaves_nothing(tmp_path, monkeypatch):
    _Measured(monkeypatch, stop_at=1)
    assert run.run(_arguments(tmp_path, "--no-chart")) == 130
    assert not list(tmp_path.iterdir())


def test_how_long_a_work_is_timed(tmp_path, monkeypatch):
    given = ("--what", "gate", "--modes", "forward", "--no-chart", "--peers", "eager")
    measured = _Measured(monkeypatch)
    run.run(_arguments(tmp_path, *given))
    run.run(_arguments(tmp_path, *given, "--seconds", "7"))
    whole = ("run", "--device", "cpu", "--cases", "T1", "--out", str(tmp_path), *given)
    run.run(command._parser().parse_args(whole))
    found = [(more["seconds"], len(more["seeds"])) for *_, more in measured.asked]
    assert found == [(0.3, 3), (7.0, 3), (1.5, 10)]


@pytest.mark.parametrize(
    ("kind", "step"),
    [("block", False), ("block", True), ("gate", False), ("gate", True), ("model", False)],
)
def test_the_command_of_a_row_measures_it_again(kind, step, tmp_path, monkeypatch, hasty, library):
    """By the parser and the command itself, shortened where it does not say what is timed."""
    monkeypatch.setattr(works, "photograph", lambda path: torch.randn(1, 3, 64, 64))
    shortened = {"seconds": 0, "seeds": SEEDS[:1]}
    given = setting(batch=2, step=step)
    case = CASES["T1"]
    work = (
        works.Model("t", given)
        if kind == "model"
        else Block(case, (3, 4), given)
        if kind == "block"
        else Operator(kind, case, (3, 4), given)
    )
    rows = measure(work, ["auto"], **shortened)
    assert [r["provider"] for r in rows] == ["eager", "auto"]
    monkeypatch.setattr(
        run, "measure", lambda *given, **more: measure(*given, **{**more, **shortened})
    )
    monkeypatch.setattr(results, "commit", lambda: "abc")
    before = torch.get_num_threads()
    for index, wanted in enumerate(rows):
        head, said = wanted["command"].split(" run ")
        assert head == "python -m bench"
        out = tmp_path / str(index)
        arguments = command._parser().parse_args(["run", *said.split(), "--out", str(out)])
        arguments.no_chart = True
        assert run.run(arguments) == 0
        (path,) = out.iterdir()
        found = [{name: r[name] for name in IDENTITY} for r in results.read(path)["rows"]]
        assert {name: wanted[name] for name in IDENTITY} in found
        assert wanted["command"] in [r["command"] for r in results.read(path)["rows"]]
    assert torch.get_num_threads() == before


# --- the demonstration -----------------------------------------------------------------------


def _shortened(monkeypatch, seeds=SEEDS):
    short = {"seeds": seeds}
    monkeypatch.setattr(
        demo,
        "measure",
        lambda work, names, _, **more: measure(work, names, 0.1, **{**more, **short}),
    )


@pytest.mark.slow
def test_the_demo_verifies_times_and_ends_with_its_chart(tmp_path, capsys):
    assert demo.run(variant="t", device="cpu", out=tmp_path, quick=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("random weights" in line for line in lines)
    assert "everything verified" in lines
    assert lines[-1] == str(tmp_path / "demo.png")
    assert Path(lines[-1]).read_bytes()[:8] == PNG
    document = results.read(tmp_path / "demo.json")
    kinds = [row["kind"] for row in document["rows"]]
    assert kinds == ["model"] * 2 + ["block"] * 6
    assert {row["height"] for row in document["rows"][2:]} == {8, 16, 32}


def test_the_demo_fails_where_the_model_is_wrong(tmp_path, capsys, monkeypatch):
    right = demo.seaformer.seaformer_segmenter

    def wrong(variant):
        model = right(variant)
        for layer in model.modules():
            if isinstance(layer, SeaAttention):
                layer.register_forward_hook(
                    lambda module, _, out: 1.001 * out if isinstance(module, Swapped) else out
                )
        return model

    _shortened(monkeypatch, SEEDS[:2])
    monkeypatch.setattr(demo.seaformer, "seaformer_segmenter", wrong)
    monkeypatch.setattr(demo, "photograph", lambda path: picture.photograph(path)[..., :128, :128])
    monkeypatch.setattr(demo, "replace_sea_attention", lambda model: "the report")
    monkeypatch.setattr(demo, "SWEEP_SIDES", (8,))
    assert demo.run(variant="t", device="cpu", out=tmp_path, quick=True) == 1
    printed = capsys.readouterr().out
    assert "segmenter forward auto is not timed, it is wrong" in printed
    assert "VERIFICATION FAILED" in printed


def test_the_demo_takes_a_checkpoint_and_a_photograph(tmp_path, capsys, monkeypatch):
    from PIL import Image

    from seaattn_kernels import seaformer, verify

    _shortened(monkeypatch, SEEDS[:1])  # views of one colour are all alike
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
    assert "everything verified" in text
    assert text.splitlines()[-1] == str(tmp_path / "demo.png")
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
        ["run", "--what", "bogus"],
        ["run", "--maps", "7"],
        ["run", "--maps", "0x3"],
        ["run", "--maps", "3xy"],
        ["run", "--models", "x"],
        ["run", "--peers", "bogus"],
        ["cpu", "--threads", "1", "0"],
        ["cpu", "--models", "x"],
        ["plot", "nowhere.json"],
        ["plot", "README.md"],
        ["compare", "nowhere.json", "README.md"],
        ["compare", "README.md", "README.md"],
    ],
)
def test_wrong_arguments_are_a_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as raised:
        command.main()
    assert raised.value.code != 0


# --- the run on a GPU ------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["check", "time", None])
def test_gpu_script_runs_every_part_and_reports(half, tmp_path):
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
        ["bash", script, "--out", out, *([half] if half else [])],
        env={**os.environ, "PYTHON": str(stub)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    summary = done.stdout[done.stdout.index("== some-gpu, sm_90") :]
    parts = {line.split()[0]: int(line.split()[2]) for line in summary.splitlines()[1:]}
    check = ["library", "kernels", "tests", "sanitizer", "demo"]
    time = [
        "library", "all", "float32", "bfloat16", "batch-16", "batch-64", "compiled", "autotune",
        "tiles",
    ]  # fmt: skip
    assert list(parts) == {"check": check, "time": time, None: check + time[1:]}[half]
    # In this folder there is nothing to make.
    made = parts.keys() & {"library", "demo"}
    assert all(parts[name] > 0 for name in made)
    assert all(parts[name] == 3 * (name == "tests") for name in parts.keys() - made)
    asked = (tmp_path / "asked").read_text()
    assert "--device cpu" not in asked
    if half != "time":
        assert "static --targets sm_90 --all" in asked
        (tests,) = re.findall(r"pytest -q -m gpu .*", asked)
        for name in ("triton", "block", "gpu", "cuda"):
            assert f"tests/test_{name}.py" in tests.split()
        assert "-m bench.sanitize" in asked
    limits = dict(re.findall(r"(?:part|timed) (\S+) (\d+) ", script.read_text()))
    assert sum(int(limits[name]) for name in parts) < 8 * 60 * (1 if half else 2)
    if half == "check":
        return
    timed = [
        command._parser().parse_args([*line.replace("--device cuda", "--device cpu").split()])
        for line in re.findall(r"-m bench (run .*)", asked)
    ]
    everything, *blocks = timed
    assert set(everything.what) == set(run.WHAT)
    assert everything.modes is everything.cases is everything.maps is None
    assert all(given.what == ["block"] for given in blocks)
    assert [(given.dtype, given.batch, given.peers) for given in timed] == [
        ("float16", 1, ["reference", "triton", "cuda"]),
        ("float32", 1, ["reference", "triton"]),
        ("bfloat16", 1, ["triton", "cuda"]),
        ("float16", 16, ["reference", "triton", "cuda"]),
        ("float16", 64, ["triton", "cuda"]),
        ("float16", 1, ["triton", "cuda", "compile"]),
        ("float16", 1, ["triton", "cuda", "autotune"]),
    ]
    assert "-m bench tiles" in asked
    files = [f"{out}/tiles.txt"]
    for given in timed:
        assert given.no_chart
        files.append(f"{given.out}/{given.dtype}-batch{given.batch}.json")
    assert len(set(files)) == len(files), "a part writes over the file of another"
    assert len(files) <= 8


@pytest.mark.parametrize("broken", [None, "racecheck"])
def test_every_tool_of_the_sanitizer_runs(broken, tmp_path, monkeypatch, capsys):
    """With a compute-sanitizer that notes what it is asked for, and one that finds something."""
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\necho "found by $2"\n[ "$2" != {broken} ]\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitize.main() == (broken is not None)
    tools = ["memcheck", "racecheck", "initcheck"]
    assert capsys.readouterr().out.splitlines() == [
        line
        for tool in tools
        for line in (f"{tool}: exit {int(tool == broken)}", f"found by {tool}")
    ]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(line.split()[1] for line in asked) == sorted(tools)
    assert all("--error-exitcode 1" in line and sys.executable in line for line in asked)


@pytest.mark.slow
def test_what_is_run_under_the_sanitizer_is_every_kernel(monkeypatch, capsys):
    """The kernels of Triton are interpreted here; those of csrc/cuda are not run."""
    monkeypatch.setattr(sanitize, "_SHAPES", ((1, 64, 3, 5), (1, 64, 18, 17)))
    modules = [
        import_module(f"seaattn_kernels.kernels.{path.stem}")
        for path in (ROOT / "seaattn_kernels/kernels").glob("[!_]*.py")
    ]
    kernels = {
        kernel: name
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    launched = set()

    def note(kernel, *arguments, **constants):
        launched.add(kernels[kernel])
        launch.launch(kernel, *arguments, **constants)

    for module in modules:
        if vars(module).get("launch") is launch.launch and module is not launch:
            monkeypatch.setattr(module, "launch", note)
    sanitize.run("cpu")
    assert launched == set(kernels.values())
    assert "cuda is not run" in capsys.readouterr().out


def test_sanitizer_may_be_missing(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize.main() == 0
    assert capsys.readouterr().out == "the kernels are not checked: there is no compute-sanitizer\n"


def test_gpu_script_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", "--out", tmp_path],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
