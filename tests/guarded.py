"""Allocations that show what a kernel writes, and what it does not."""

import torch

from seaattn_kernels import reference


class Guarded:
    """Allocations full of NaN between two bands that must stay as they are."""

    BAND = 64

    def __init__(self, monkeypatch):
        self.blocks = []
        empty = torch.empty

        def allocate(size, dtype, device, layout=torch.contiguous_format):
            size = torch.Size(size)
            block = empty(size.numel() + 2 * self.BAND, dtype=dtype, device=device)
            block.fill_(float("nan"))
            block[: self.BAND] = block[-self.BAND :] = 12288.0
            self.blocks.append(block)
            strides = empty(size, device="meta", memory_format=layout).stride()
            return block.as_strided(size, strides, self.BAND)

        def new_empty(self_, *size, dtype=None, **_):
            size = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
            return allocate(size, dtype or self_.dtype, self_.device)

        def guarded(*size, dtype=None, device=None, memory_format=torch.contiguous_format, **_):
            size = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
            if torch.device(device or "cpu").type == "meta":
                return empty(size, device="meta", memory_format=memory_format)
            return allocate(size, dtype or torch.float32, device, memory_format)

        def like(x, **_):
            cl = x.dim() == 4 and reference.is_channels_last(x)
            layout = torch.channels_last if cl else torch.contiguous_format
            return allocate(x.shape, x.dtype, x.device, layout)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        monkeypatch.setattr(torch, "empty", guarded)
        monkeypatch.setattr(torch, "empty_like", like)

    def check(self):
        assert self.blocks
        for block in self.blocks:
            assert (block[: self.BAND] == 12288.0).all(), "written before its begin"
            assert (block[-self.BAND :] == 12288.0).all(), "written past its end"
            assert not block[self.BAND : -self.BAND].isnan().any(), "not all of it written"
