"""The mutants fit the source as it is, and the runner can tell a fault from none."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_applies(mutant):
    text = (mutants.ROOT / mutant.file).read_text()
    assert mutants.mutated(mutant, text) != text


def test_there_are_enough_of_every_kind():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 24
    for backend in ("python", "triton", "cpu"):
        assert sum(mutant.backend == backend for mutant in mutants.MUTANTS) >= 8
    assert len({mutant.file for mutant in mutants.PYTHON}) >= 7


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    mutants.make_copy(folder)
    return folder


def _tried(folder, old, new):
    mutant = mutants.Mutant(
        "", "seaattn_kernels/reference.py", old, new, "", "float64 and square16"
    )
    before = (folder / mutant.file).read_text()
    found = mutants.try_mutant(folder, mutant, all_tests=False)
    assert (folder / mutant.file).read_text() == before
    return found


def test_a_fault_is_noticed(checkout):
    found = _tried(checkout, "k) * scale).softmax(dim=-1)", "k) * scale).softmax(dim=-2)")
    assert found == mutants.Run("test_golden.py::test_float64[square16]")


def test_no_fault_is_not_noticed(checkout):
    assert _tried(checkout, "align_corners=False)", "align_corners = False)") == mutants.Run(None)


@pytest.mark.parametrize("new", ["align_corners=False))", "align_corners=missing)"])
def test_what_is_no_program_is_not_noticed_but_broken(checkout, new):
    assert _tried(checkout, "align_corners=False)", new).broken
