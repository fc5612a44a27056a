"""The timing loop: fair turns, honest intervals, and nothing timed that is wrong."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

from bench import timing
from bench.timing import check, interleave, median_interval, started, with_threads

CPU = torch.device("cpu")


def test_candidates_take_turns_in_blocks(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MOST_REPETITIONS", 2)
    order = []
    names = "abc"
    timings = interleave({name: lambda name=name: order.append(name) for name in names}, seconds=0)
    assert order[:6] == [*"abc", *"abc"], "first calls, then an estimate of each"
    blocks = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    # A warm-up call and two repetitions each; another candidate opens each round.
    assert blocks[:9] == [3 * name for name in "abcbcacab"]
    assert [timing.blocks for timing in timings.values()] == [len(blocks) // 3] * 3


def test_medians_survive_an_outlier_and_first_calls_stand_apart(monkeypatch):
    monkeypatch.setattr(timing, "MOST_REPETITIONS", 1)
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
    assert fast.cold is slow.cold is None, "a CPU has no cache that is overwritten"


def test_the_first_call_is_the_one_that_was_made_before(monkeypatch):
    monkeypatch.setattr(timing, "MOST_REPETITIONS", 1)
    calls = Counter()
    timings = interleave({"a": lambda: calls.update("a")}, seconds=0, first={"a": 7.0})
    assert timings["a"].first == 7.0
    assert calls["a"] == 1 + 2 * timing.FEWEST_ROUNDS, "an estimate, and two calls a round"


def test_interval_holds_the_median_as_often_as_it_says():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval(range(6)) == (0, 5), "1/64 on each side"
    assert median_interval(range(20)) == (5, 14), "the textbook's ranks 6 and 15"
    samples = np.random.default_rng(0).exponential(size=(2000, 25))
    hits = [low <= np.log(2) <= high for low, high in map(median_interval, samples)]
    assert 0.95 <= np.mean(hits) < 0.98


def test_a_cold_call_follows_an_overwritten_cache(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            said.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: said.append("end"))
    found = timing._cold(lambda: said.append("call"), lambda: said.append("flush"))
    assert said == timing.COLD_CALLS * ["flush", "event", "call", "event"] + ["end"]
    assert found == [2e-3] * timing.COLD_CALLS


def test_cold_calls_are_kept_apart_from_warm_ones(monkeypatch):
    monkeypatch.setattr(timing, "MOST_REPETITIONS", 1)
    monkeypatch.setattr(timing, "_flush", lambda device: "flush")
    monkeypatch.setattr(timing, "_cold", lambda call, flush: [7.0, 9.0, 8.0])
    found = interleave({"a": lambda: None}, seconds=0)["a"]
    assert found.cold == 8.0
    assert found.high < 1.0


def test_the_cache_is_overwritten_twice_over(monkeypatch):
    size = 2**20
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("", (), {"L2_cache_size": size})
    )
    made = []
    empty = torch.empty

    def on_a_cpu(count, dtype, device):
        made.append(empty(count, dtype=dtype).fill_(1))
        return made[-1]

    monkeypatch.setattr(torch, "empty", on_a_cpu)
    timing._flush(torch.device("cuda"))()
    (written,) = made
    assert written.nbytes == 2 * size
    assert not written.any()
    assert timing._flush(CPU) is None


# --- check, then time ------------------------------------------------------------------------


def _inputs(count=3):
    return [torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_a_wrong_candidate_is_refused_before_it_is_timed():
    calls = Counter()

    def candidate(name, function):
        def call(x):
            calls[name] += 1
            return function(x)

        return call

    def broken(x):
        raise RuntimeError("no kernel\nfor this device")

    inputs = _inputs()
    candidates = {
        "right": candidate("right", torch.exp),
        "planted": candidate("planted", lambda x: torch.exp(x) * (1 + 1e-5)),
        "nan": candidate("nan", lambda x: torch.exp(x).log() * float("nan")),
        "broken": candidate("broken", broken),
        "eager": candidate("eager", torch.exp),
    }
    truth = [torch.exp(x.double()) for x in inputs]
    checked = check(candidates, inputs, truth, torch.float32)
    timings = interleave({**checked.calls, "other": lambda: None}, CPU, 0.05, checked.first)
    assert set(timings) == {"eager", "right", "other"}
    assert set(checked.refused) == {"planted", "nan", "broken"}
    assert checked.verdicts["right"].ok
    assert not checked.verdicts["planted"].ok
    assert checked.refused["planted"].startswith("wrong: rms")
    assert checked.refused["broken"] == "raises RuntimeError: no kernel"
    assert calls["planted"] == calls["nan"] == 3, "once an input, never in the loop"
    assert calls["right"] > 3


def test_what_eager_raises_is_not_swallowed():
    def broken(x):
        raise RuntimeError("nothing to compare with")

    with pytest.raises(RuntimeError, match="nothing to compare"):
        check({"other": torch.exp, "eager": broken}, _inputs(), _inputs(), torch.float32)


def test_what_a_candidate_binds_is_bound_ahead_and_timed_in_its_form():
    class Doubled:
        bound, taken = 0, set()

        def bind(self, x):
            self.bound += 1
            return [x]

        def __call__(self, given):
            self.taken.add(type(given))
            return torch.exp(given[0])

    inputs = _inputs()
    doubled = Doubled()
    truth = [torch.exp(x.double()) for x in inputs]
    checked = check({"eager": torch.exp, "bound": doubled}, inputs, truth, torch.float32)
    timings = interleave(checked.calls, CPU, 0.05, checked.first)
    assert timings["bound"].blocks >= 5
    assert doubled.bound == len(inputs), "never in the loop"
    assert doubled.taken == {list}


def test_calls_are_those_on_the_first_input():
    inputs = _inputs()
    checked = check({"eager": torch.exp}, inputs, [x.double().exp() for x in inputs], torch.float32)
    assert torch.equal(checked.calls["eager"](), torch.exp(inputs[0]))
    call, seconds, out = started(torch.exp, inputs[1], CPU)
    assert torch.equal(call(), out)
    assert torch.equal(out, torch.exp(inputs[1]))
    assert seconds > 0


def _gradients(candidate):
    """Judged among results of 1e4, 1 and 0 with a little noise, as eager has it."""
    truth = [torch.tensor([1e4, 5e3, 1.0]).double(), torch.linspace(0.1, 1, 50).double()]
    truth.append(torch.zeros(5).double())
    noise = [1e-3 * torch.ones(3), 1e-7 * torch.ones(50), 1e-5 * torch.ones(5)]
    eager = [(t + n).float() for t, n in zip(truth, noise, strict=True)]
    candidates = {"eager": lambda _: eager, "other": lambda _: candidate(eager)}
    return check(candidates, [None], [truth], torch.float32, gradients=True)


def test_each_gradient_is_measured_by_its_own_size():
    assert not _gradients(lambda eager: eager).refused
    wrong = _gradients(lambda eager: [eager[0], eager[1] * (1 + 1e-5), eager[2]])
    assert set(wrong.refused) == {"other"}, "next to nothing beside the 1e4 of another gradient"


def test_rounding_of_a_gradient_that_is_zero_hides_no_other():
    right = _gradients(lambda eager: [*eager[:2], -0.9 * eager[2]])
    assert not right.refused
    assert right.verdicts["eager"].rms < 1e-3
    assert set(_gradients(lambda eager: [*eager[:2], eager[2] + 0.01]).refused) == {"other"}


def test_threads_are_set_for_a_while():
    before = torch.get_num_threads()

    def fail():
        with with_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
