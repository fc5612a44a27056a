"""The report reads as a table and is data."""

import eager_blocks as eager
from torch import nn

from seaattn_kernels import explain
from seaattn_kernels.budget import Verdict
from seaattn_kernels.report import Report, Row


def make(kind=eager.Sea_Attention):
    return eager.Model(kind)


def test_report_is_a_table_and_data():
    model = make(eager.ShortKeys)
    model.stages[1] = eager.Strided(16)
    report = explain(model)
    text = str(report)
    assert text == repr(report)
    lines = text.splitlines()
    assert lines[0] == (
        "Model: 2 of its 66 modules look like Sea_Attention, 1 of them can run on seaattn_kernels"
    )
    assert lines[2].split() == ["module", "variant", "shape", "runs", "on", "error"]
    assert max(map(len, lines)) <= 130
    row = report["stages.0"]
    assert (row.kind, row.variant) == ("ShortKeys", "no norm, relu, sigmoid, *_col* keys")
    assert row.shape == "C=16 heads=2 D=4 E=8"
    assert 0 < row.error < 1e-9
    assert row.reason is None
    assert report["stages.1"].reason == "has a layer that Sea_Attention has not: stride_conv"


def test_report_of_a_model_without_blocks():
    text = str(explain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())))
    assert text.startswith("Sequential: none of its 3 modules looks like Sea_Attention")
    assert "nothing to replace" in text


def test_report_of_blocks_that_share_their_cells():
    text = str(explain(make()))
    assert text.count("BatchNorm2d") == 1
    assert "stages.0" in text
    assert "stages.1" in text


def test_the_worst_of_what_was_compared_is_shown():
    report = Report("Model", 3)
    for name, error in (("a", 1e-7), ("b", 3e-7)):
        report[name] = Row(name, "Block", "v", "s", "reference", error=1e-15)
        report[name].verdicts = {"output of x": Verdict(True, error, 2e-7, 1.0, 1.0)}
    text = str(report)
    assert "3e-07 (eager 2e-07)" in text
    assert "1e-07" not in text
    assert "the maps of real calls" in text
