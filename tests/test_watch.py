"""Whether objects are as they were: in Python and in the library, by the same tests."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, native, verify, watch

WATCHES = [watch.PythonWatch] + ([native.LIBRARY.Watch] if native.LIBRARY else [])
KINDS = [f"{kind.__module__.partition('.')[2]}.{kind.__name__}" for kind in WATCHES]
pytestmark = pytest.mark.parametrize("kind", WATCHES, ids=KINDS)


def everything(kind):
    """A watch of one thing of every sort, and these things."""

    class Thing:
        def forward(self):
            pass

    seen = {
        "thing": Thing(),
        "table": OrderedDict(a=object(), b=None),
        "attributes": {"scale": 0.1234, "stride": (1, 2)},
        "tensor": torch.ones(3),
    }
    attributes = seen["attributes"]
    seen["watch"] = kind(
        ((seen["thing"], Thing),),
        ((seen["table"], tuple(seen["table"].values())), ({}, ())),
        (
            (attributes, "scale", attributes["scale"]),
            (attributes, "forward", None),
            (Thing, "forward", Thing.forward),
            (Thing, "missing", None),
        ),
        (seen["tensor"],),
    )
    return seen


def _derive(thing):
    thing.__class__ = type("Other", (type(thing),), {})


def _swap(table):
    table["a"], table["b"] = table["b"], table["a"]


def _insert_first(table):
    first = table.pop("a")
    table["a"] = first


def _replace_by_an_equal(attributes):
    attributes["scale"] = float(repr(attributes["scale"]))


CHANGES = {
    "class": lambda seen: _derive(seen["thing"]),
    "value of a table": lambda seen: seen["table"].update(a=object()),
    "new value of a table": lambda seen: seen["table"].update(c=1),
    "value of a table gone": lambda seen: seen["table"].pop("b"),
    "values of a table exchanged": lambda seen: _swap(seen["table"]),
    "order of a table": lambda seen: _insert_first(seen["table"]),
    "attribute": lambda seen: seen["attributes"].update(scale=0.5),
    "attribute gone": lambda seen: seen["attributes"].pop("scale"),
    "attribute by an equal one": lambda seen: _replace_by_an_equal(seen["attributes"]),
    "attribute that was missing": lambda seen: seen["attributes"].update(forward=print),
    "tensor in place": lambda seen: seen["tensor"].add_(1),
    "attribute of a class": lambda seen: setattr(type(seen["thing"]), "forward", print),
    "attribute of a class that was missing": lambda seen: setattr(
        type(seen["thing"]), "missing", 1
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(kind, change):
    seen = everything(kind)
    assert seen["watch"].current() is True
    CHANGES[change](seen)
    assert seen["watch"].current() is False


def test_what_is_not_watched_may_change(kind):
    seen = everything(kind)
    seen["attributes"]["stride"] = (3, 4)
    seen["thing"].name = "other"
    seen["tensor"].grad = torch.ones(3)
    assert seen["watch"].current() is True


def test_of_nothing(kind):
    assert kind((), (), (), ()).current() is True


def test_watches_and_what_they_watch_are_collected(kind):
    class Owner:
        pass

    owner = Owner()
    owner.watch = kind(((owner, Owner),), (), ((owner.__dict__, "watch", None),), ())
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_of_a_block(kind, monkeypatch):
    monkeypatch.setattr(watch, "Watch", kind)
    block = verify.randomise(SeaAttention(12, 4, 2)).eval()
    x = torch.randn(1, 12, 5, 6)
    with torch.no_grad():
        block(x)
        folded = block._folds.get(block)
        assert type(block._folds._record[0]) is kind
        assert block._folds.get(block) is folded
        block.to_q.bn.eps = 0.5
        assert block._folds.get(block) is not folded
        block.act = nn.ReLU6()
        block._folds.anatomy(block)
        assert block._folds._record is None


@pytest.mark.parametrize(
    "arguments",
    [
        ((), (), ()),
        ([], (), (), ()),
        (((1,),), (), (), ()),
        ((), (([], ()),), (), ()),
        ((), (({}, []),), (), ()),
        ((), (), (({}, "a"),), ()),
        ((), (), (), (1,)),
    ],
    ids=str,
)
def test_bad_arguments_of_the_library(kind, arguments):
    if kind is watch.PythonWatch:
        kind = watch.Watch  # Python's takes what it is given
    if kind is watch.PythonWatch:
        pytest.skip("no library")
    with pytest.raises(TypeError):
        kind(*arguments)
