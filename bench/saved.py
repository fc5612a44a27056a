"""What autograd keeps of a forward in train mode until the backward has run."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bench.cases import CASES
from bench.eager import as_eager
from bench.works import block_of

NAMES = ("B1", "B2", "YOLOv8n-P3")
BATCH, SIZE = 2, (32, 32)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that are kept of ``model(x)``, each storage once, parameters, buffers and x left out.

    The forward runs as it is: in train mode it moves running averages.
    """
    given = {t.untyped_storage().data_ptr() for t in (x, *_tensors(model))}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(x)
    del out  # which held the graph, and so every storage, until all are counted
    return sum(size for pointer, size in kept.items() if pointer not in given)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def measure(device: torch.device) -> list[dict]:
    """A row for each block in float32, and in bfloat16 under autocast."""
    rows = []
    for case in map(CASES.get, NAMES):
        block = block_of(case).train().to(device)
        # As within a model: of a leaf autocast would keep one copy for all products.
        x = torch.randn(BATCH, case.channels, *SIZE, device=device, requires_grad=True).clone()
        for autocast in (None, torch.bfloat16):
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                eager, ours = saved_bytes(as_eager(block), x), saved_bytes(block, x)
            pixels = BATCH * SIZE[0] * SIZE[1]
            rows.append(
                {
                    "kind": "saved",
                    "case": case.name,
                    "height": SIZE[0],
                    "width": SIZE[1],
                    "batch": BATCH,
                    "dtype": "float32",
                    "autocast": str(autocast).removeprefix("torch.") if autocast else None,
                    "device": device.type,
                    "eager_bytes": eager,
                    "bytes": ours,
                    "eager_floats_a_pixel": eager / 4 / pixels,
                    "floats_a_pixel": ours / 4 / pixels,
                    "of_eager": ours / eager,
                }
            )
    return rows


def table(rows: Iterable[dict]) -> str:
    """MiB kept and, in brackets, floats a pixel."""
    lines = [f"{'block':<12}{'map':>9}  {'products in':<11}{'eager':>14}{'ours':>14}{'ratio':>8}"]
    for row in rows:
        cells = "".join(
            f"{row[of + 'bytes'] / 2**20:>8.1f}{'({:.0f})'.format(row[of + 'floats_a_pixel']):>7}"
            for of in ("eager_", "")
        )
        shape = f"{row['batch']}x{row['height']}x{row['width']}"
        lines.append(
            f"{row['case']:<12}{shape:>9}  {row['autocast'] or row['dtype']:<11}{cells}"
            f"{row['of_eager']:>8.3f}"
        )
    return "\n".join(lines)
