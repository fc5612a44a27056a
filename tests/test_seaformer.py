"""SeaFormer models: official outputs, official checkpoints, sizes."""

import copy

import pytest
import torch

from seaattn_kernels import SeaAttention, seaformer, verify
from seaattn_kernels.seaformer import DropPath, load_checkpoint, seaformer_segmenter

MODELS = sorted(verify.GOLDEN.glob("seaformer*.npz"))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_official_outputs(path, backend):
    errors = verify.golden_errors(verify.load_golden(path), backend)
    assert "logits" in errors
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_official_outputs_with_gradients(path):
    """The same through the submodules and the differentiable operators."""
    golden = verify.load_golden(path)
    logits = golden.model().eval()(golden.random("x"))
    assert logits.requires_grad
    assert golden.error("logits", logits) <= 1


@pytest.mark.parametrize(
    ("variant", "millions", "blocks"), [("t", 1.8, 4), ("s", 4.1, 6), ("b", 8.7, 8), ("l", 14.0, 9)]
)
def test_sizes(variant, millions, blocks):
    model = seaformer.seaformer(variant)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert sum(isinstance(m, SeaAttention) for m in model.modules()) == blocks


@pytest.mark.parametrize("variant", seaformer.CONFIGS)
def test_any_image_size_and_number_of_classes(variant):
    x = torch.randn(2, 3, 65, 70)
    with torch.no_grad():
        assert seaformer.seaformer(variant, 7).eval()(x).shape == (2, 7)
        assert seaformer_segmenter(variant, 5).eval()(x).shape == (2, 5, 9, 9)


def test_backend_reaches_every_block():
    model = seaformer_segmenter("t", backend="reference")
    assert {m.backend for m in model.modules() if isinstance(m, SeaAttention)} == {"reference"}


@pytest.mark.parametrize("make", [seaformer.seaformer, seaformer_segmenter])
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"variant .*'xl'"):
        make("xl")
    with pytest.raises(ValueError, match=r"backend .*'metal'"):
        make("t", backend="metal")


def test_trains():
    model = seaformer_segmenter("t", 4)
    out = model(torch.randn(2, 3, 64, 64))
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path():
    x = torch.ones(4000, 1, 1, 1)
    drop = DropPath(0.25)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean() == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


# --- checkpoints -----------------------------------------------------------------------------


@pytest.fixture
def source():
    return verify.randomise(seaformer.seaformer("t", 10))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"state_dict_ema": state, "state_dict": {}, "arch": "SeaFormer_T"},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
    ],
)
def test_checkpoint_forms(tmp_path, source, wrap):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(wrap(source.state_dict()), path)
    model = seaformer.seaformer("t", 10)
    assert load_checkpoint(model, path) == ([], [])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_missing_and_unexpected_keys_are_reported(source):
    state = source.state_dict()
    state["extra.weight"] = torch.ones(1)
    del state["trans1.transformer_blocks.0.attn.to_q.c.weight"]
    missing, unexpected = load_checkpoint(copy.deepcopy(source), state)
    assert missing == ["trans1.transformer_blocks.0.attn.to_q.c.weight"]
    assert unexpected == ["extra.weight"]


def test_a_classifier_checkpoint_fills_the_backbone_of_a_segmenter(source):
    model = seaformer_segmenter("t")
    report = load_checkpoint(model.backbone, source.state_dict())
    assert report.missing == []
    assert report.unexpected == ["linear.weight", "linear.bias"]


def test_a_foreign_checkpoint_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"no key .*Classifier.*foreign"):
        load_checkpoint(source, {"foreign": torch.ones(1)})
    state = {**source.state_dict(), "linear.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"linear.bias has shape \(3,\).*\(10,\)"):
        load_checkpoint(source, state)


def test_code_in_a_checkpoint_is_not_run(tmp_path, source):
    path = tmp_path / "pickled.pth"
    torch.save(source, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_checkpoint(source, path)


def test_load_follows_into_the_folds(source):
    model = seaformer.seaformer("t", 10).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        load_checkpoint(model, source.state_dict())
        torch.testing.assert_close(model(x), source.eval()(x))
        assert not torch.allclose(before, model(x))
