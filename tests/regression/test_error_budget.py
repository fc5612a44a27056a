"""No error is larger than error_budget.json has it; the command that renews it: error_budget.py."""

import error_budget
import pytest
from cases import BACKENDS, DTYPES

MACHINE, STORED = error_budget.load()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", error_budget.SAMPLES)
def test_no_error_has_grown(name, backend, dtype, request):
    if backend == "cpu":
        request.getfixturevalue("library")
    sample = error_budget.SAMPLES[name]
    found = dict(error_budget.measure(name, sample, backend, dtype))
    start, end = f"{name}, ", f", {backend}, {str(dtype).removeprefix('torch.')}"
    groups = {key for key in STORED if key.endswith(end) and _is_of(key, start, end)}
    assert found.keys() == groups, "missing or stale: python tests/regression/error_budget.py"
    for key, error in found.items():
        assert not error_budget.grown(error, STORED[key], MACHINE), (key, error, STORED[key])


def _is_of(key, start, end):
    """Whether an entry is of this sample, with a group or without one."""
    middle = key.removesuffix(end)
    return middle == start.removesuffix(", ") or middle.startswith(start)


def test_every_entry_is_of_a_sample():
    names = {key.split(", ")[0] for key in STORED}
    assert names == error_budget.SAMPLES.keys()
    assert {key.split(", ")[-2] for key in STORED} == set(BACKENDS)


@pytest.mark.parametrize("on", [error_budget.machine(), "another"])
def test_the_comparison_can_say_no(on):
    stored = error_budget.Error(1.0, 3.0)
    factor = 1 if on == "another" else 0.5
    for rms, maximum, expected in (
        (1.0, 3.0, False),
        (0.5, 0.5, False),
        (1 + 1.5 * factor, 3.0, True),
        (1.0, 13.0 * factor, True),
        (float("nan"), 3.0, True),
    ):
        assert error_budget.grown(error_budget.Error(rms, maximum), stored, on) == expected
