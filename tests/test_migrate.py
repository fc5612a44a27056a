"""Files of models with hand-edited sources open without those sources, and say what was mapped."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import eager_blocks as eager
import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, explain, verify
from seaattn_kernels.__main__ import main
from seaattn_kernels.layers import Conv2d_BN, HSigmoid, upstream_keys
from seaattn_kernels.locate import locate
from seaattn_kernels.migrate import migrate, open_checkpoint
from seaattn_kernels.seaformer import load_checkpoint

#: Whose gate a file does not tell.
SILENT = (eager.FunctionalSigmoid, eager.FunctionalHardsigmoid)


@pytest.fixture
def copied(monkeypatch):
    """The blocks in a module that can be imported until ``forget`` is called."""
    name = "somebodys_sea"
    spec = importlib.util.spec_from_file_location(name, eager.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    module.forget = lambda: monkeypatch.delitem(sys.modules, name)
    return module


def saved(kind, path, **content):
    """A model of the blocks in float64, in a file; a map, and what it makes of it."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), kind(16), nn.ModuleDict({"a": kind(16)})["a"])
    model = verify.randomise(model.double()).eval()
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    torch.save({"model": model, **content}, path)
    return model, x, expected


@pytest.mark.parametrize("kind", eager.VARIANTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("there", [False, True], ids=["missing", "importable"])
def test_blocks_become_this_packages(copied, tmp_path, kind, there):
    own, x, expected = saved(getattr(copied, kind.__name__), tmp_path / "a.pt", epoch=3)
    if not there:
        copied.forget()
        with pytest.raises(ModuleNotFoundError):
            torch.load(tmp_path / "a.pt", weights_only=False)
    opened = migrate(tmp_path / "a.pt", tmp_path / "b.pt")
    content = torch.load(tmp_path / "b.pt", weights_only=False)
    assert content["epoch"] == 3
    model = content["model"]
    assert [block.name for block in opened.blocks] == ["model.1", "model.2"]
    for block in opened.blocks:
        assert block.was == f"somebodys_sea.{kind.__name__}"
        assert (block.error is None) == (not there)
        told = "nothing tells its gate: taken for h_sigmoid" in str(opened)
        assert told == (not there and kind in SILENT)
    assert {type(layer).__module__.split(".")[0] for layer in model.modules()} <= {
        "torch", "seaattn_kernels",
    }  # fmt: skip
    if there or kind is not eager.FunctionalSigmoid:
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for old, new in zip(own.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new), "in another order"
    if kind not in (eager.NoNorm, eager.ShortKeys):
        keys = SeaAttention(16, 4, 2).state_dict().keys()
        assert model[1].state_dict().keys() == keys
    assert all(row.kind == "SeaAttention" and row.backend for row in explain(model).values())


def test_what_a_block_carried_stays(copied, tmp_path):
    block = copied.Sea_Attention(16).train()
    block.i, block.f, block.type = 7, -1, "somebodys_sea.Sea_Attention"
    block.to_q[0].weight.requires_grad = False
    torch.save(nn.ModuleList([block]), tmp_path / "a.pt")
    copied.forget()
    opened = open_checkpoint(tmp_path / "a.pt")
    (found,) = opened.content
    assert isinstance(found, SeaAttention)
    assert (found.i, found.f, found.type, found.training) == (7, -1, block.type, True)
    assert not found.to_q.c.weight.requires_grad
    assert (found.dim, found.key_dim, found.num_heads, found.d) == (16, 4, 2, 8)
    assert str(opened).startswith("0: somebodys_sea.Sea_Attention -> SeaAttention; its class")


def test_gradients_and_statistics_are_the_copys(copied, tmp_path):
    own, x, _ = saved(copied.Sea_Attention, tmp_path / "a.pt")
    copied.forget()
    model = open_checkpoint(tmp_path / "a.pt").content["model"]
    for one in (own, model):
        one.train()(x).square().mean().backward()
    for old, new in zip(own.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-8, atol=1e-10)
    for old, new in zip(own.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(new, old)


def test_layers_of_upstream_outside_a_block(copied, tmp_path):
    torch.save(nn.Sequential(copied.Conv2d_BN(3, 4), copied.h_sigmoid()), tmp_path / "a.pt")
    copied.forget()
    opened = open_checkpoint(tmp_path / "a.pt")
    assert [type(layer) for layer in opened.content] == [Conv2d_BN, HSigmoid]
    assert opened.content(torch.ones(1, 3, 2, 2)).shape == (1, 4, 2, 2)
    assert str(opened) == "no model in it has a copy of Sea_Attention: nothing to map"


def test_another_order_of_the_parameters_is_told(copied, tmp_path):
    block = copied.Sea_Attention(16)
    block._modules = dict(reversed(block._modules.items()))
    torch.save(block, tmp_path / "a.pt")
    copied.forget()
    opened = open_checkpoint(tmp_path / "a.pt")
    assert "the model: " in str(opened)
    assert "in another order: start without the optimizer's state" in str(opened)


def test_a_copy_that_computes_something_else_stays(tmp_path):
    torch.save(eager.Model(eager.Residual), tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    assert {type(block) for block in opened.content.stages} == {eager.Residual}
    assert "stages.0: stays eager_blocks.Residual: its forward computes something else" in str(
        opened
    )


class Handed(nn.Module):
    """A gate of a class of its own that looks like nothing."""

    def forward(self, x):
        return x.sigmoid()


def test_modes_and_hooks_of_a_block_stay(copied, tmp_path):
    block = copied.Sea_Attention(16).train()
    block.to_q[1].eval()
    block.register_forward_pre_hook(_with_keywords, with_kwargs=True)
    torch.save(block, tmp_path / "a.pt")
    copied.forget()
    found = open_checkpoint(tmp_path / "a.pt").content
    assert (found.training, found.to_q.bn.training, found.to_k.bn.training) == (True, False, True)
    with pytest.raises(LookupError, match="called"):
        found(torch.ones(1, 16, 4, 4))


def _with_keywords(block, arguments, keywords):
    raise LookupError("called")


def test_models_deep_in_a_file(copied, tmp_path):
    torch.save({"a": [{"b": (copied.Sea_Attention(16),)}]}, tmp_path / "a.pt")
    copied.forget()
    opened = open_checkpoint(tmp_path / "a.pt")
    assert type(opened.content["a"][0]["b"][0]) is SeaAttention
    assert [block.name for block in opened.blocks] == ["a.0.b.0"]


@pytest.mark.parametrize("where", ["attribute", "entry", "reduced"])
def test_other_missing_classes_are_named(copied, tmp_path, where):
    """Wherever they are: nothing stands in for what is no module."""

    class Arguments:
        __module__, __qualname__ = copied.__name__, "Arguments"

        def __reduce__(self):
            return (Arguments, (1,)) if where == "reduced" else super().__reduce__()

    copied.Arguments = Arguments
    block = copied.Sea_Attention(16)
    content = {"model": block, "arguments": Arguments()}
    if where == "attribute":
        block.arguments = content.pop("arguments")
    torch.save(content, tmp_path / "a.pt")
    copied.forget()
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(ValueError, match=r"not here: .*somebodys_sea\.Arguments"):
        migrate(tmp_path / "a.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_file_is_written_whole_or_not_at_all(copied, tmp_path, monkeypatch):
    saved(copied.Sea_Attention, tmp_path / "a.pt")

    def broken(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch, "save", broken)
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(RuntimeError, match="full"):
        migrate(tmp_path / "a.pt", tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_no_classes(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is TorchScript"):
        open_checkpoint(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(tmp_path / "b.pt")


def test_forwards_that_a_class_does_not_tell(copied, tmp_path):
    block = eager.Sea_Attention(16)
    block.forward = block.gated
    torch.save(block, tmp_path / "a.pt")
    assert "has a forward of its own in the instance" in str(open_checkpoint(tmp_path / "a.pt"))
    torch.save(eager.Masked(16), tmp_path / "b.pt")
    assert "its forward takes (x, mask), not one map" in str(open_checkpoint(tmp_path / "b.pt"))
    block = copied.Sea_Attention(16)
    block.sigmoid = Handed()
    block.sigmoid.__class__.__module__ = copied.__name__
    copied.Handed = Handed
    torch.save(block, tmp_path / "c.pt")
    copied.forget()
    assert "nothing tells its gate" in str(open_checkpoint(tmp_path / "c.pt"))


def test_missing_classes_that_are_no_block_are_named(copied, tmp_path):
    torch.save(copied.Model(copied.Strided), tmp_path / "a.pt")
    copied.forget()
    with pytest.raises(ValueError, match=r"not here: somebodys_sea\.Model, .*\.Strided"):
        open_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="has a layer that Sea_Attention has not: stride_conv"):
        open_checkpoint(tmp_path / "a.pt")


def test_the_command(copied, tmp_path, capsys):
    saved(copied.Sea_Attention, tmp_path / "old.pt")
    copied.forget()
    old, new = str(tmp_path / "old.pt"), str(tmp_path / "new.pt")
    with pytest.raises(ValueError, match="seaattn_kernels migrate writes a file that does without"):
        locate(old, trust=True)
    with pytest.raises(SystemExit, match="add --trust"):
        main(["migrate", old, new])
    assert not Path(new).exists()
    assert main(["migrate", old, new, "--trust"]) == 0
    assert "model.1: somebodys_sea.Sea_Attention -> SeaAttention" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing"):
        main(["migrate", str(tmp_path / "nothing.pt"), new, "--trust"])
    done = subprocess.run(
        [sys.executable, "-m", "seaattn_kernels", "explain", new, "--trust"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of its 76 modules look like Sea_Attention, 2 of them can run" in done.stdout


@pytest.mark.parametrize(
    "kind", [eager.Sea_Attention, eager.ShortKeys, eager.Detector, eager.OtherTables]
)
def test_weights_of_the_known_copies_load(kind):
    own = verify.randomise(eager.Model(kind))
    model = eager.Model(lambda dim: SeaAttention(dim, 4, 2))
    missing, unexpected = report = load_checkpoint(model, own.state_dict())
    biased = kind is eager.ShortKeys
    assert {key.rpartition(".")[2] for key in unexpected} == ({"bias"} if biased else set())
    assert {key.split(".")[-2] for key in missing} == ({"bn"} if biased else set())
    assert bool(report.renamed) == (kind is not eager.Sea_Attention)
    for (name, old), new in zip(
        own.stages[0].named_parameters(), model.stages[0].parameters(), strict=False
    ):
        if not biased:
            assert torch.equal(old, new), name
    assert torch.equal(
        own.state_dict()["stages.1.pos_emb_rowq.pos_emb"]
        if kind is eager.OtherTables
        else own.stages[1].pos_emb_rowq.pos_embed,
        model.stages[1].pos_emb_rowq.pos_embed,
    )


def test_keys_that_would_collide_stay(tmp_path):
    block = SeaAttention(16, 4, 2)
    weights = {
        **block.state_dict(),
        "pos_emb_rowq.gain": torch.ones(1),
        "to_q.0.weight": torch.ones(1),
    }
    report = load_checkpoint(block, weights)
    assert set(report.unexpected) == {"pos_emb_rowq.gain", "to_q.0.weight"}
    assert not report.renamed
    flat = {
        key.replace(".1.c.", ".1.").replace(".1.bn.", ".2."): value
        for key, value in verify.randomise(SeaAttention(16, 4, 2)).state_dict().items()
    }
    report = load_checkpoint(block, flat)
    assert not report.missing
    assert not report.unexpected
    assert report.renamed["proj.2.running_var"] == "proj.1.bn.running_var"


def test_keys_outside_a_block_stay():
    keys = ["mlp.dwconv.weight", "attn.proj.weight", "a.to_q.0.weight", "b.pos_emb_colq.t"]
    assert upstream_keys(keys) == {key: key for key in keys}
    block = ["a.to_q.0.weight", "a.to_q.1.bias", "a.pos_emb_colq.t", "a.proj.1.conv.weight",
             "a.proj_encode_col.1.weight", "a.dwconv.weight", "a.mlp.dwconv.weight"]  # fmt: skip
    assert list(upstream_keys(block).values()) == [
        "a.to_q.c.weight", "a.to_q.bn.bias", "a.pos_emb_columnq.pos_embed", "a.proj.1.c.weight",
        "a.proj_encode_column.1.c.weight", "a.dwconv.c.weight", "a.mlp.dwconv.weight",
    ]  # fmt: skip
