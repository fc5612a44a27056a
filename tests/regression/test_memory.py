"""A process that sees a thousand shapes grows no further: neither its memory nor its caches."""

import functools
import gc
import importlib
import pkgutil
import random
import resource
from pathlib import Path

import cases
import pytest
import torch

import seaattn_kernels
from seaattn_kernels import fold, ops, verify

SHAPES = 1000
#: What has been allocated once by then, by allocators that keep some of it.
WARM = 400
MOST = 24 << 20


def resident():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _caches():
    """Everything in the package that functools caches."""
    for module in pkgutil.walk_packages(seaattn_kernels.__path__, "seaattn_kernels."):
        if "__main__" in module.name or "._C" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, functools._lru_cache_wrapper):
                yield value


def _call(block, h, w, seed):
    batch = 1 + seed % 3
    x = cases.normal(seed, batch, 12, h, w)
    if seed % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    row, column = ops.axial_squeeze(x)
    ops.gate(ops.broadcast_add(x, row, column, "relu6"), x)
    with torch.no_grad():
        block(x)
    if batch * min(h, w) > 1:
        leaf = x.requires_grad_()
        block.train()
        block(leaf).sum().backward()
        block.eval()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_shapes():
    case = verify.BlockCase(1, 12, 5, 6, 4, 2, 2, "relu6")
    block = cases.make_block(case, "auto").eval()
    still = cases.make_block(case, "auto").eval()
    numbers = random.Random(0)
    for seed in range(SHAPES):
        h, w = numbers.randint(1, 40), numbers.randint(1, 40)
        _call(block, h, w, seed)
        # Its weights stay, so that what is kept for each size of map adds up.
        with torch.no_grad():
            still(cases.normal(seed, 1, 12, h, w))
        if seed == WARM:
            before = resident()
    grown = resident() - before
    assert grown < MOST, f"{grown / 2**20:.1f} MiB more after {SHAPES - WARM} shapes"
    folded = still._folds.get(still)
    assert 0 < len(folded._ready) <= fold.MAP_SIZES
    assert 0 < len(folded.calls) <= fold.MAP_SIZES
    assert len(folded._casts) <= 1


def test_caches_are_bounded():
    caches = list(_caches())
    assert caches
    for function in caches:
        info = function.cache_info()
        # Those without a bound are of devices, and of nothing.
        assert info.maxsize is not None or info.currsize <= 4, function
