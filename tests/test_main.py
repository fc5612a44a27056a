"""``python -m seaattn_kernels``: what it prints and how it exits."""

import json
import shutil
from importlib import metadata

import eager_blocks
import pytest
import torch

from seaattn_kernels import __main__ as command
from seaattn_kernels import native, ops, verify


def test_info_names_versions_and_every_backend(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", metadata.version("torch"), "triton", *ops.BACKENDS[1:], "sea_attention"):
        assert word in text


def test_info_is_data_too(capsys, library, monkeypatch):
    monkeypatch.setattr(native, "CUDA_REASON", "not compiled")
    assert command.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["library"] == library.BUILD
    assert report["backends"]["reference"]["operators"] == list(ops.OPERATORS["reference"])
    assert report["backends"]["cpu"]["operators"] == list(ops.OPERATORS["cpu"])
    assert report["backends"]["cuda"] == {"operators": [], "reason": "not compiled"}


def test_info_says_where_triton_runs(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["triton"]["operators"] == list(ops.OPERATORS["triton"])
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        assert command.main(["info"]) == 0
        assert "unavailable: backend 'triton' needs a GPU" in capsys.readouterr().out


def test_info_says_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(native, "REASON", "the library is broken")
    assert command.main(["info"]) == 0
    assert capsys.readouterr().out.count("the library is broken") == 2


def test_explain(capsys, tmp_path):
    assert command.main(["explain", "seaattn_kernels.seaformer:seaformer('t')"]) == 0
    text = capsys.readouterr().out
    assert "4 of them can run on seaattn_kernels" in text
    assert "SeaAttention:" in text
    assert "(already," in text
    assert command.main(["explain", "torch.nn:Identity"]) == 0
    assert "nothing to replace" in capsys.readouterr().out
    model = eager_blocks.Model(eager_blocks.TrueSigmoid)
    model.stages[1] = eager_blocks.Strided(16)
    torch.save({"model": model, "ema": model}, tmp_path / "model.pt")
    assert command.main(["explain", str(tmp_path / "model.pt"), "--trust"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the model under 'model' in model.pt\n\nModel: 2 of its")
    assert text.count("stride_conv") == 2
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert command.main(["explain", str(tmp_path / "weights.pt")]) == 0
    assert "2 blocks have the weights" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no file"):
        command.main(["explain", str(tmp_path / "nothing.pt")])


@pytest.fixture
def quick(monkeypatch):
    """One block, one operator of each kind, one golden file."""
    monkeypatch.setattr(verify, "BLOCK_CASES", verify.BLOCK_CASES[:1])
    monkeypatch.setattr(verify, "OPERATOR_CASES", verify.OPERATOR_CASES[:1])


def test_verify_passes(quick, capsys, tmp_path):
    shutil.copy(verify.GOLDEN / "tiny_kd2.npz", tmp_path)
    assert command.main(["verify", "--golden", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    golden tiny_kd2")
    assert lines[-1].endswith(" passed, 0 failed")
    assert any("block" in line and "eager" in line for line in lines)


def test_verify_fails_on_a_wrong_result(quick, capsys, tmp_path, monkeypatch):
    shutil.copy(verify.GOLDEN / "tiny_kd2.npz", tmp_path)
    original = ops.axial_attention_pair

    def wrong(*args, **kwargs):
        row, column = original(*args, **kwargs)
        return row + 1e-6, column

    monkeypatch.setattr(ops, "axial_attention_pair", wrong)
    assert command.main(["verify", "--golden", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAIL  golden tiny_kd2" in text
    assert "1 failed" in text


def test_verify_without_golden_files_says_so(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "GOLDEN", tmp_path)
    assert command.main(["verify"]) == 0
    assert "no golden files" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no golden files in"):
        command.main(["verify", "--golden", str(tmp_path)])


def test_info_says_that_the_environment_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("SEAATTN_BACKEND", "metal")
    assert command.main(["info"]) == 0
    assert "'metal' is none of" in capsys.readouterr().out


def test_demo_outside_a_checkout_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bench", None)
    with pytest.raises(SystemExit, match="source checkout"):
        command.main(["demo"])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["verify", "--nothing"]])
def test_bad_arguments_exit_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err
