"""Models are found in files and by import path, and every failure says what is wrong."""

import eager_blocks as eager
import pytest
import torch
from torch import nn

from seaattn_kernels import replace_sea_attention, seaformer
from seaattn_kernels.locate import describe_weights, locate


def save(path, content):
    torch.save(content, path)
    return str(path)


def test_import_paths():
    for name in ("torch.nn:Identity", "torch.nn.Identity", "torch.nn:Identity()"):
        what, found = locate(name)[0]
        assert (what, type(found)) == (name, nn.Identity)
    found = locate("torch.nn:Linear(3, out_features=4, bias=False)")[0].found
    assert (found.in_features, found.out_features, found.bias) == (3, 4, None)


def test_weights(tmp_path):
    model = eager.Model(eager.ShortKeys)
    replace_sea_attention(model)
    what, weights = locate(save(tmp_path / "a.pt", model.state_dict()))[0]
    assert what == "weights in a.pt"
    text = describe_weights(weights)
    assert "2 blocks have the weights of Sea_Attention" in text
    assert "  stages.1: C=16, 8 channels of queries, no norm, *_col* keys\n" in text
    nested = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    assert describe_weights(locate(save(tmp_path / "b.pt", nested))[0].found) == text
    block = describe_weights(eager.Sea_Attention(16).state_dict())
    assert "  (the model): C=16, 8 channels of queries, BatchNorm\n" in block
    none = describe_weights(nn.Linear(3, 4).state_dict())
    assert none == "none of its 2 tensors looks like one of Sea_Attention"


@pytest.mark.parametrize("variant", ["t", "l"])
def test_official_weights_are_recognised(tmp_path, variant):
    model = seaformer.seaformer_segmenter(variant, 19)
    path = save(tmp_path / "a.pth", {"state_dict": {**model.state_dict(), "more": torch.ones(1)}})
    what = locate(path)[0].what
    call = f"load_checkpoint(seaformer_segmenter('{variant}', 19), '{path}') loads them"
    assert what == f"weights in a.pth: {call}"
    assert seaformer.recognise(seaformer.seaformer("s", 7).state_dict()) == "seaformer('s', 7)"
    assert seaformer.recognise({"linear.weight": torch.ones(3, 4)}) is None


def test_pickled_models_need_trust(tmp_path):
    model = eager.Model(eager.Detector)
    path = save(tmp_path / "a.pt", {"epoch": 1, "model": model, "ema": eager.Model(eager.ReLU)})
    with pytest.raises(ValueError, match="add --trust if you trust it"):
        locate(path)
    found = locate(path, trust=True)
    assert [what for what, _ in found] == [
        "the model under 'model' in a.pt", "the model under 'ema' in a.pt",
    ]  # fmt: skip
    assert type(found[0].found.stages[0]) is eager.Detector
    alone = locate(save(tmp_path / "b.pt", model), trust=True)[0]
    assert alone.what == "the model in b.pt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.at:all", "nothing.at:all is no file, and cannot be imported: No module named"),
        ("torch.nn:Nothing", "cannot be imported: .*has no attribute 'Nothing'"),
        ("torch:float32", "torch:float32 is a dtype, not a model"),
        ("torch.nn:functional", "is a module, not a model"),
        ("torch:ones(3)", "gives a Tensor, not a model"),
        ("torch.nn:Linear", "cannot be called: .*missing 2 required"),
        ("torch.nn:Linear(a, 3)", "are not literals"),
        ("torch.nn:Linear(3", "neither a file nor package.module:attribute"),
        ("torch.nn:Linear(3,))", "are not literals"),
        ("torch.nn:Linear(3)(4)", "are not literals: more than one call"),
        ("./nothing.pt", "nothing.pt is no file"),
        ("a b", "neither a file nor"),
    ],
)
def test_what_is_no_model(name, message):
    with pytest.raises(ValueError, match=message):
        locate(name)


def test_files_without_a_model(tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"is no file of torch\.save"):
        locate(str(text))
    with pytest.raises(ValueError, match="cannot be loaded"):
        locate(str(text), trust=True)
    with pytest.raises(ValueError, match="holds a list"):
        locate(save(tmp_path / "list.pt", [1, 2]))
    with pytest.raises(ValueError, match=r"holds neither a model nor weights, but \['epoch'\]"):
        locate(save(tmp_path / "epoch.pt", {"epoch": 1}))
