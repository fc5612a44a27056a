"""On a CPU: which maps, the targets, the peers, memory, the share of the attention."""

import os
import re
import time
from collections import Counter
from functools import partial

import pytest
import torch
from bench_toys import CPU, GPU, PNG, TOY, block, row
from torch.utils._python_dispatch import TorchDispatchMode

from bench import __main__ as command
from bench import cpu, memory, models, peers, results
from bench.cases import CASES, SWEEP_SIDES
from bench.eager import as_eager
from bench.measure import available, measure, refusal
from bench.timing import with_threads
from bench.works import block_of
from seaattn_kernels import SeaAttention

# --- maps and targets ------------------------------------------------------------------------


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


# --- peers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", peers.PACKAGES)
def test_a_runtime_computes_what_eager_does(runtime):
    if reason := peers.refusal(runtime):
        pytest.skip(reason)
    work = block(batch=2, size=(5, 4))
    inputs = [work.given(seed) for seed in range(2)]
    with torch.inference_mode():
        model = work.candidate(runtime)
        bound = [model.bind(x) for x in inputs]
        outputs = [model(taken) for taken in bound]
        expected = [as_eager(work.module)(x) for x in inputs]
    assert len({out.data_ptr() for out in outputs}) == 2, "a result is not overwritten"
    for out, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, wanted)


def test_runtimes_take_as_many_threads_as_torch():
    module, x = block_of(TOY), torch.randn(1, 8, 3, 4)
    for count in (1, 2):
        with with_threads(count):
            if peers.refusal("onnxruntime") is None:
                runtime = peers.OnnxRuntime(module)
                runtime.bind(x)
                assert runtime._loaded.get_session_options().intra_op_num_threads == count
            if peers.refusal("openvino") is None:
                runtime = peers.OpenVino(module)
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
    assert refusal("openvino", block()) == peers.refusal("openvino")
    assert available(["openvino"], block()) == ["eager"]


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
    work = block()
    x = work.given(0)
    with torch.inference_mode():
        model = work.candidate("freezing")
        assert torch.equal(model(model.bind(x)), as_eager(work.module)(x))
    assert seen == [True, False]


# --- memory ----------------------------------------------------------------------------------


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


def test_memory_is_what_the_allocator_hands_out(library, hasty):
    rows = []
    for case, size in ((CASES["T1"], (32, 32)), (TOY, (3, 4))):
        work = block(batch=2, case=case, size=size)
        found = measure(work, ["auto"], seconds=0, seeds=range(2), threads=[1, 2])
        eager, _, _, _ = found
        x = work.given(0)
        result = x.numel() * 4
        with torch.no_grad(), _ResultBytes() as results_of:
            as_eager(work.module)(x)
        assert eager["allocated_bytes"] >= results_of.bytes - result
        assert eager["allocated_bytes"] > eager["peak_bytes"] > 0
        rows += found
    (eager, one, _, two), small = rows[:4], rows[4:]
    assert [(r["provider"], r["threads"]) for r in rows[:4]] == [
        ("eager", 1), ("auto", 1), ("eager", 2), ("auto", 2),
    ]  # fmt: skip
    assert 0 < one["peak_bytes"] < two["peak_bytes"] < eager["peak_bytes"]
    lines = cpu.other_lines([*rows[:4], *small]).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "scratch of our block, 1 thread", "scratch of our block, 2 threads",
    ]  # fmt: skip


def test_memory_of_a_call_is_beyond_its_result():
    kept = []

    def call():
        if not kept:
            kept.append(torch.empty(5000))  # what the first call keeps is no matter of the others
        scratch = torch.empty(1000)
        more = torch.empty(200)
        del scratch
        return [torch.empty(300), more]

    found = memory.allocated(call, CPU)
    # The scratch and the second; of the third the first is gone again.
    assert found == memory.Allocated(4 * (1200 - 500), 4 * 1000)
    assert memory.allocated(lambda: torch.empty(7), CPU) == memory.Allocated(0, 0)


def test_memory_of_a_step_holds_what_is_kept_for_its_backward():
    found = []
    for work in (block(batch=2, size=(16, 16)), block(step=True, batch=2, size=(16, 16))):
        call, given = work.candidate("eager"), work.given(0)
        with torch.inference_mode(not work.setting.step):
            found.append(memory.allocated(partial(call, given), CPU))
    forward, step = found
    assert step.peak > 2 * forward.peak


def test_extra_memory_is_the_peak_beyond_the_result(monkeypatch):
    allocated, peak, calls = [1000], [5000], []

    def call():
        calls.append(None)
        # The first call also takes what it keeps.
        allocated[0] += 100 if len(calls) == 1 else 0
        peak[0] = max(peak[0], allocated[0] + 300)
        return torch.empty(5, dtype=torch.float16)

    fakes = {
        "synchronize": lambda _: None,
        "reset_peak_memory_stats": lambda _: peak.__setitem__(0, allocated[0]),
        "memory_allocated": lambda _: allocated[0],
        "max_memory_allocated": lambda _: peak[0],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert memory.allocated(call, GPU) == memory.Allocated(300 - 5 * 2, None)
    assert len(calls) == 2


def test_the_profiler_says_nothing(capfd):
    def call():
        os.write(2, b"said by the call\n")
        return torch.empty(3)

    memory.allocated(call, CPU)
    memory.allocated(call, CPU)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == 2 * "said by the call\n", "the warm-ups: not while the profiler is on"


def test_a_call_that_raises_leaves_the_terminal_as_it_was(capfd):
    calls = []

    def broken():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError
        return torch.empty(3)

    with pytest.raises(KeyError):
        memory.allocated(broken, CPU)
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


# --- models ----------------------------------------------------------------------------------


def test_the_share_of_the_attention_is_what_its_blocks_take(monkeypatch):
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    monkeypatch.setattr(models, "_CALLS", 3)
    attention = SeaAttention(8, 4, 1)
    model = torch.nn.Sequential(attention, Slow()).eval()
    assert models.blocks_of(model) == ["0"]
    x = torch.randn(1, 8, 6, 8)
    shares = models.attention_shares(as_eager(model), model, ["0"], x)
    assert len(shares) == 2, "eager's and ours"
    assert all(0 < share < 0.5 for share in shares)
    # Hooks that were there before lie outside, those within are timed with the block.
    attention.act.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    eager, _ = models.attention_shares(as_eager(model), model, ["0"], x)
    assert eager > 0.5
    assert not attention._forward_hooks, "hooks are taken away again"


def test_models_are_measured_with_the_share_of_their_attention(monkeypatch, hasty, library):
    monkeypatch.setattr("bench.works.photograph", lambda path: torch.randn(1, 3, 64, 64))
    monkeypatch.setattr(models, "_CALLS", 1)
    said = []
    rows = cpu.measured_models(["t"], [1], 0, said.append)
    assert not said
    assert [(r["provider"], r["threads"]) for r in rows] == [("eager", 1), ("auto", 1)]
    for found in rows:
        assert (found["kind"], found["height"], found["width"]) == ("model", 64, 64)
        assert ("attention_share" in found) == (found["provider"] == "auto")
    ours = rows[1]
    assert 0 < ours["attention_share"] < 1
    assert 0 < ours["attention_share_eager"] < 1
    ours |= {"ms": 2.0, "speedup": 3.0, "attention_share_eager": 0.5, "attention_share": 0.25}
    assert cpu.other_lines([ours]) == (
        "SeaFormer-T segmenter at 64x64, 1 thread: eager 6.0 ms, of which attention 50 %; "
        "replaced 2.0 ms, 25 %: 3.00x"
    )


def test_answers_are_compared_by_pixel():
    def says(*classes):
        return lambda x: torch.nn.functional.one_hot(torch.tensor([classes])).movedim(-1, 1)

    assert models.same_class(says(0, 1, 2, 1), says(0, 1, 1, 2), torch.empty(0)) == 0.5


# --- bench cpu -------------------------------------------------------------------------------


def test_the_command_of_a_cpu(tmp_path, library, hasty, capsys):
    fixed = ["cpu", "--quick", "--cases", "T1", "--threads", "1", "2", "--out", str(tmp_path)]
    assert command.run_cpu(command._parser().parse_args(fixed)) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "cpu-float32-batch1.json"
    document = results.read(path)
    installed = [name for name in peers.PACKAGES if peers.refusal(name) is None]
    found = Counter((r["threads"], r["provider"]) for r in document["rows"])
    assert found == Counter(
        (threads, name)
        for threads in (1, 2)
        for name in ("eager", "reference", "auto", "channels_last", *installed)
    )
    for name in set(peers.PACKAGES) - set(installed):
        assert f"{name} is not timed: not installed" in printed
    for r in document["rows"]:
        assert (r["peak_bytes"] is None) == (r["provider"] in peers.PACKAGES)
    assert {r["threads"] for r in document["summary"]} == {1, 2}
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    for text in ("1 thread, float32, batch 1", "ours in channels_last, 2 threads", "not met",
                 "scratch of our block, 2 threads"):  # fmt: skip
        assert text in printed


def test_the_command_of_a_cpu_needs_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "auto_backend", lambda *_: "reference")
    arguments = command._parser().parse_args(["cpu", "--out", str(tmp_path)])
    assert command.run_cpu(arguments) == 1
    assert "no C++ block to time" in capsys.readouterr().out


def test_the_command_of_a_cpu_asks_for_what_was_wanted(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(work, providers, *, log, threads, **_):
        asked.append((work.case, work.size, set(providers), work.setting.batch, list(threads)))
        return []

    monkeypatch.setattr(command, "auto_backend", lambda *_: "cpu")
    monkeypatch.setattr(command, "measure", measured)
    timed_models = []
    monkeypatch.setattr(
        cpu, "measured_models", lambda variants, *_: timed_models.append(list(variants)) or []
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


def test_a_key_keeps_what_a_cpu_has_done(tmp_path, monkeypatch, capsys):
    done = []

    def measured(work, providers, **_):
        if done:
            raise KeyboardInterrupt
        done.append(work.size)
        height, width = work.size
        where = {"case": work.case, "height": height, "width": width}
        return [row(name, **where) for name in ("eager", "auto", "channels_last")]

    monkeypatch.setattr(command, "auto_backend", lambda *_: "cpu")
    monkeypatch.setattr(command, "measure", measured)
    fixed = ["cpu", "--cases", "B2", "--no-chart", "--out", str(tmp_path)]
    assert command.run_cpu(command._parser().parse_args(fixed)) == 130
    assert "what is done is kept" in capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    assert len(results.read(path)["rows"]) == 3
