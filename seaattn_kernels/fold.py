"""Convolution + BatchNorm -> the folded weights of a block, and when they are stale.

With ``s = gamma / sqrt(var + eps)``, ``weight' = s * weight`` and ``bias' = beta - s * mean``, in
float64 where the device has it, rounded once to float32 (not for a float64 block). Weights are cast
once more to each dtype that is asked for; biases and position tables are not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from seaattn_kernels import native, reference, watch
from seaattn_kernels.anatomy import OWN, Anatomy, ConvNorm, Obstacle, changed, dissect

#: How many map sizes keep their interpolated position tables.
MAP_SIZES = 64

#: Optimizer steps in this process. Fused optimizers write without moving a version.
_steps = {"count": 0}


def _count_step(*_) -> None:
    _steps["count"] += 1


register_optimizer_step_post_hook(_count_step)


def traced() -> bool:
    """Whether the tensors at hand are not those of an ordinary call, or the call is recorded.

    Then nothing kept from another call may be used, and nothing of this one kept.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


class BlockWeights(NamedTuple):
    """What the block operators take as ``weights``, in this order.

    Letters as in :mod:`seaattn_kernels.reference`; ``position`` holds the tables of q and k
    interpolated to the rows, then to the columns.
    """

    qkv_weight: Tensor  # (NQ, C)
    qkv_bias: Tensor  # (NQ,)
    dw_weight: Tensor  # (NQ, 3, 3)
    dw_bias: Tensor  # (NQ,)
    pw_weight: Tensor  # (C, NQ)
    pw_bias: Tensor  # (C,)
    row_weight: Tensor  # (DH, DH)
    row_bias: Tensor  # (DH,)
    column_weight: Tensor  # (DH, DH)
    column_bias: Tensor  # (DH,)
    proj_weight: Tensor  # (C, DH)
    proj_bias: Tensor  # (C,)
    axis_weight: Tensor  # (NQ, C): qkv_weight in float64, or float32 beside half precision
    position: Tensor  # (2*heads*D, H + W)


class PackedWeights(NamedTuple):
    """What the GPU kernels take as ``weights``: rows begin at multiples of 16 elements.

    ``NQ'`` and so on: rounded up to that, and filled with zeros. Biases, depthwise weights and the
    position tables are float32.
    """

    qkv_weight: Tensor  # (NQ', C')
    qkv_bias: Tensor  # (NQ',)
    dw_weight: Tensor  # (9, NQ')
    dw_bias: Tensor  # (NQ',)
    pw_weight: Tensor  # (C, NQ')
    pw_bias: Tensor  # (C,)
    encode_weight: Tensor  # (2, DH, DH'): of the row, of the column
    encode_bias: Tensor  # (2, DH)
    proj_weight: Tensor  # (C, DH')
    proj_bias: Tensor  # (C,)
    position: Tensor  # (H + W, 2*heads*D)


class ChunkedWeights(NamedTuple):
    """What the block takes as ``weights`` where csrc/cuda finishes it.

    ``chunks``, ``depthwise``: a job of csrc/cuda/finish.cu after the other, each 64 channels of v,
    then of the whole map; what is missing is zero. The pieces of 8 channels of a row lie as in
    shared memory: piece p of row r at place p ^ (r % 8). The others: as in :class:`PackedWeights`.
    """

    qkv_weight: Tensor  # (NQ', C')
    qkv_bias: Tensor  # (NQ',)
    chunks: Tensor  # (jobs, C up to a multiple of 64, 64): Wproj, then Wpw
    depthwise: Tensor  # (jobs, 10, 64), float32: nine taps and their bias
    pw_bias: Tensor  # (C,)
    encode_weight: Tensor  # (2, DH, DH')
    encode_bias: Tensor  # (2, DH)
    proj_bias: Tensor  # (C,)
    position: Tensor  # (H + W, 2*heads*D)


class PanelWeights(NamedTuple):
    """What the C++ kernel takes as ``weights``: outputs in panels of sixteen, float32 throughout.

    ``N''`` is N in panels. Queries and keys are filled up to whole panels with zeros, and so are
    values, before they stand side by side: ``P`` panels.
    """

    qkv_weight: Tensor  # (P, C, 16)
    qkv_bias: Tensor  # (P*16,)
    dw_weight: Tensor  # (P, 9, 16)
    dw_bias: Tensor  # (P*16,)
    pw_weight: Tensor  # (C'', P*16, 16)
    pw_bias: Tensor  # (C''*16,)
    encode_weight: Tensor  # (2, DH'', DH, 16): of the row, of the column
    encode_bias: Tensor  # (2, DH''*16)
    proj_weight: Tensor  # (C'', DH, 16)
    proj_bias: Tensor  # (C''*16,)
    position: Tensor  # (2*heads*D, H''*16 + W''*16)


def _panels(weight: Tensor) -> Tensor:
    """``(N, K) -> (N'', K, 16)``."""
    return _padded(weight, 0).unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def _padded(x: Tensor, *dims: int, multiple: int = 16) -> Tensor:
    """``x`` with zeros up to a multiple along some dimensions."""
    padding = [0, 0] * x.dim()
    for dim in dims:
        padding[2 * (x.dim() - 1 - dim) + 1] = -x.shape[dim] % multiple
    return F.pad(x, padding).contiguous()


#: Channels of a job of csrc/cuda/finish.cu.
_CHUNK = 64


def _jobs(x: Tensor) -> Tensor:
    """``(rows, K) -> (jobs, rows, 64)``."""
    return _padded(x, 1, multiple=_CHUNK).unflatten(1, (-1, _CHUNK)).transpose(0, 1)


def _swizzled(jobs: Tensor) -> Tensor:
    """The pieces of rows as they lie in shared memory."""
    pieces = jobs.unflatten(2, (-1, 8))
    place = torch.arange(8, device=jobs.device)
    row = torch.arange(jobs.shape[1], device=jobs.device) % 8
    from_piece = (place ^ row[:, None])[None, :, :, None].expand(pieces.shape)
    return pieces.gather(2, from_piece).flatten(2).contiguous()


Weights = BlockWeights | PackedWeights | ChunkedWeights | PanelWeights

#: How the kernels of a backend take their weights.
_KINDS = {
    "reference": BlockWeights,
    "triton": PackedWeights,
    "cuda": ChunkedWeights,
    "cpu": PanelWeights,
}

#: What weights are kept for: the dtype and the size of a map, and the backend.
_Key = tuple[torch.dtype, int, int, str]


def _calls() -> object:
    return None if native.LIBRARY is None or traced() else native.LIBRARY.Calls(MAP_SIZES)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """A block in eval mode: twelve folded tensors, four raw position tables, and its constants."""

    convolutions: tuple[Tensor, ...] = field(repr=False)  # BlockWeights but for the last two
    tables: tuple[Tensor, ...] = field(repr=False)  # row q, k, column q, k: (1, heads*D, P)
    heads: int
    key_dim: int
    activation_code: int
    negative_slope: float
    hard: bool
    module_dtype: torch.dtype
    _casts: dict = field(default_factory=dict, init=False, repr=False)
    _ready: dict = field(default_factory=dict, init=False, repr=False)
    #: What was settled for the last :data:`MAP_SIZES` maps; None without the library.
    calls: object = field(default_factory=_calls, init=False, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the folded tensors: float32, or float64."""
        return self.convolutions[0].dtype

    @property
    def device(self) -> torch.device:
        return self.convolutions[0].device

    def cuda_obstacle(self, height: int, width: int) -> str | None:
        """Of a map of this size, see :func:`cuda_obstacle`."""
        if -(-height // 8) * -(-width // 8) > MOST_TILES:
            return f"backend 'cuda' takes maps of up to {MOST_TILES} tiles of 8x8"
        activation = reference.ACTIVATIONS[self.activation_code]
        return cuda_obstacle(activation, self.heads, self.key_dim, self.value_dim)

    @property
    def value_dim(self) -> int:
        """E"""
        return self.convolutions[7].shape[0] // self.heads

    def weights(
        self, dtype: torch.dtype, height: int, width: int, backend: str = "reference"
    ) -> Weights:
        """The tensors for a map of this dtype and size; kept for the last :data:`MAP_SIZES`."""
        key = (dtype, height, width, backend)
        if traced():
            return self._make(key, self._cast(dtype, _KINDS[backend]))
        ready = self._ready.get(key)
        return self._prepare(key) if ready is None else ready

    def _prepare(self, key: _Key) -> Weights:
        # Without a lock, which a fork could leave held: threads at worst do the same work twice.
        dtype, _, _, backend = key
        kind = _KINDS[backend]
        dtype = torch.float32 if kind is PanelWeights else dtype
        with torch.no_grad():
            if (dtype, kind) not in self._casts:
                self._casts[dtype, kind] = self._cast(dtype, kind)
            ready = self._make(key, self._casts[dtype, kind])
        _keep(self._ready, key, ready)
        return ready

    def _make(self, key: _Key, casts: list[Tensor]) -> Weights:
        _, height, width, backend = key
        kind = _KINDS[backend]
        row, column = self._position(height), self._position(width, of_columns=True)
        if kind is PanelWeights:
            position = torch.cat([_padded(row, 1), _padded(column, 1)], dim=1)
        else:
            position = torch.cat([row, column], dim=1)
        if kind in (PackedWeights, ChunkedWeights):
            position = position.t().contiguous()
        return kind(*casts, position)

    def _cast(self, dtype: torch.dtype, kind: type[Weights]) -> list[Tensor]:
        if kind is PackedWeights:
            return self._pack(dtype)
        if kind is ChunkedWeights:
            return self._chunk(dtype)
        if kind is PanelWeights:
            return self._cut()
        tensors = [t if t.dim() == 1 else t.to(dtype) for t in self.convolutions]
        wider = _widest(self.device) if dtype.itemsize >= 4 else self.dtype
        axis_weight = self.convolutions[0].to(wider)
        return [*tensors, axis_weight]

    def _pack(self, dtype: torch.dtype) -> list[Tensor]:
        qkv, qkv_bias, dw, dw_bias, pw, pw_bias, row, row_bias, column, column_bias, proj, bias = (
            self.convolutions
        )
        return [
            _padded(qkv, 0, 1).to(dtype), _padded(qkv_bias, 0), _padded(dw.flatten(1).t(), 1),
            _padded(dw_bias, 0), _padded(pw, 1).to(dtype), pw_bias,
            _padded(torch.stack([row, column]), 2).to(dtype), torch.stack([row_bias, column_bias]),
            _padded(proj, 1).to(dtype), bias,
        ]  # fmt: skip

    def _chunk(self, dtype: torch.dtype) -> list[Tensor]:
        packed = PackedWeights(*self._pack(dtype), position=None)
        _, _, dw, dw_bias, pw, _, row, *_, proj, _ = self.convolutions
        values = row.shape[0]
        taps = torch.cat([dw.flatten(1).t(), dw_bias[None]])
        products = torch.cat([_jobs(_padded(w, 0, multiple=_CHUNK)) for w in (proj, pw)])
        depthwise = torch.cat([_jobs(taps[:, -values:]), _jobs(taps)])
        return [
            packed.qkv_weight, packed.qkv_bias, _swizzled(products.to(dtype)),
            depthwise.contiguous(), packed.pw_bias, packed.encode_weight, packed.encode_bias,
            packed.proj_bias,
        ]  # fmt: skip

    def _cut(self) -> list[Tensor]:
        qkv, qkv_bias, dw, dw_bias, pw, pw_bias, row, row_bias, column, column_bias, proj, bias = (
            self.convolutions
        )
        keys = 2 * self.heads * self.key_dim

        def whole(t: Tensor) -> Tensor:
            return torch.cat([_padded(t[:keys], 0), _padded(t[keys:], 0)])

        return [
            _panels(whole(qkv)), whole(qkv_bias), _panels(whole(dw.flatten(1))), whole(dw_bias),
            _panels(whole(pw.t()).t()), _padded(pw_bias, 0),
            torch.stack([_panels(row), _panels(column)]),
            _padded(torch.stack([row_bias, column_bias]), 1),
            _panels(proj), _padded(bias, 0),
        ]  # fmt: skip

    def _position(self, length: int, of_columns: bool = False) -> Tensor:
        tables = self.tables[2:] if of_columns else self.tables[:2]
        return reference.interpolate(torch.cat(tables, dim=1), length)[0]


def _keep(table: dict, key: tuple, value: tuple) -> None:
    for old in list(table)[: 1 - MAP_SIZES]:
        table.pop(old, None)
    table[key] = value


def _widest(device: torch.device) -> torch.dtype:
    """Not every accelerator has float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _fold_layer(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    conv, norm = layer
    wide = _widest(conv.weight.device)
    weight = conv.weight.to(wide)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.to(wide)
    if norm is not None:
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.to(wide)
        weight = weight * scale[:, None, None, None]
        bias = scale * (bias - norm.running_mean.to(wide))
        if norm.bias is not None:
            bias = bias + norm.bias.to(wide)
    kept = torch.promote_types(conv.weight.dtype, torch.float32)
    return weight.to(kept), bias.to(kept)


def fold(anatomy: Anatomy) -> FoldedWeights:
    """Fold a block that is :func:`foldable`; no gradient, no cache."""
    with torch.no_grad():
        q, k, v, dw, pw, row, column, proj = map(_fold_layer, anatomy.convolutions)
        projected = tuple(torch.cat(parts) for parts in zip(q, k, v, strict=True))
        convolutions = []
        for weight, bias in (projected, dw, pw, row, column, proj):
            kernel = weight[:, 0] if weight.shape[2] == 3 else weight[:, :, 0, 0]
            convolutions += [kernel.contiguous(), bias]
        wide = projected[0].dtype
        return FoldedWeights(
            convolutions=tuple(convolutions),
            tables=tuple(table.detach().to(wide) for table in anatomy.tables),
            heads=anatomy.heads,
            key_dim=anatomy.key_dim,
            activation_code=reference.ACTIVATIONS.index(anatomy.activation),
            negative_slope=anatomy.negative_slope,
            hard=anatomy.hard,
            module_dtype=anatomy.convolutions[0].conv.weight.dtype,
        )


def obstacle(anatomy: Anatomy) -> str | None:
    """Why a block has no folded weights in its present state, or None."""
    for conv, norm in anatomy.convolutions:
        if norm is None:
            continue
        if norm.training:
            return f"the norm of {conv} is in training mode"
        if norm.running_mean is None or norm.running_var is None:
            return f"the norm of {conv} has no running statistics"
    if anatomy.scale != anatomy.key_dim**-0.5:
        return f"scale is {anatomy.scale}"
    return None


#: Of a map; the size of a grid along its second axis.
MOST_TILES = 65535


def cuda_obstacle(activation: str, heads: int, key_dim: int, value_dim: int) -> str | None:
    """What of a block the kernels of csrc/cuda do not take, or None."""
    if activation not in ("relu", "relu6"):
        return f"backend 'cuda' takes relu and relu6, not {activation}"
    keys, values = heads * key_dim, heads * value_dim
    if keys % 8 or values % 16:
        return (
            "backend 'cuda' needs a multiple of 8 for heads*D and one of 16 for heads*E, "
            f"got {keys} and {values}"
        )
    return None


def _sources(anatomy: Anatomy) -> Iterator[Tensor]:
    """Every tensor that a fold reads."""
    for conv, norm in anatomy.convolutions:
        tensors = [conv.weight, conv.bias]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        yield from (tensor for tensor in tensors if tensor is not None)
    yield from anatomy.tables


class FoldCache:
    """The anatomy and the folded weights of one block: made when asked for, dropped when stale.

    A fold is stale when a tensor it came from is another object or has another version, when a
    submodule, ``scale`` or an ``eps`` was replaced, when a hook was added, or when any optimizer
    made a step: fused ones move no version. ``.half()`` and ``.to()`` move none either, therefore
    :meth:`drop` in everything that goes through ``_apply``, in ``train()`` and ``eval()``, and
    :meth:`drop_weights` in a forward with gradients. Tensors made in inference mode have no
    version: a block of them folds in every call. Not seen: writes through ``.data``, collectives of
    ``torch.distributed`` on a parameter, and fused updates outside ``torch.optim``.

    ``trusted`` and ``hard`` are those of :func:`anatomy.dissect`, ``facts`` those of
    :func:`anatomy.facts`, which must hold still: None where there is nothing but the structure. A
    copy starts empty.
    """

    def __init__(
        self,
        trusted: Iterable[type] = OWN,
        hard: bool | None = None,
        facts: dict[str, object] | None = None,
    ) -> None:
        self.trusted = frozenset(trusted)
        self.hard = hard
        self.facts = facts
        # A block that was copied by its attributes, this cache among them, is another one.
        self._anatomy: tuple[nn.Module, watch.Watch, Anatomy] | None = None
        self._record: tuple[watch.Watch, FoldedWeights] | None = None

    def anatomy(self, block: nn.Module) -> Anatomy:
        """The parts of the block as it is now. Raises :class:`Obstacle`."""
        # A compiler that saw the record would compile anew for each one.
        if traced():
            return self._dissect(block)
        known = self._anatomy
        if known is None or known[0] is not block or not known[1].current():
            self._record = None
            seen = watch.structure(block, self.trusted, self.facts is not None)
            known = self._anatomy = block, seen, self._dissect(block)
        return known[2]

    def _dissect(self, block: nn.Module) -> Anatomy:
        anatomy = dissect(block, self.trusted, self.hard)
        if self.facts is not None:
            names = changed(block, self.trusted, self.facts)
            if names:
                raise Obstacle(f"changed after it was compared: {', '.join(names)}")
        return anatomy

    def get(self, block: nn.Module) -> FoldedWeights | None:
        """The folded weights, or None where :func:`obstacle` or a gradient is in the way.

        Raises :class:`Obstacle` where the layers are not those of a block.
        """
        recorded = traced()
        record = self._record
        anatomy = self.anatomy(block)
        if not recorded and record is self._record is not None and record[0].current():
            return record[1]
        if obstacle(anatomy) is not None:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _sources(anatomy)):
            return None
        if recorded:
            return fold(anatomy)
        seen, watched = watch.weights(block, _steps)
        folded = fold(anatomy)
        # Not those of inference mode, nor weights that are plain attributes, as in replicas.
        if all(id(tensor) in watched for tensor in _sources(anatomy)):
            self._record = seen, folded
        return folded

    def repeat(self, block: nn.Module, x: Tensor, backend: str) -> Tensor | None:
        """The block, where nothing but the values of the map differs from a call before.

        Otherwise None, and always without the library. For calls without gradients that are not
        compiled.
        """
        known, record = self._anatomy, self._record
        if known is None or record is None or known[0] is not block:
            return None
        calls = record[1].calls
        if calls is None or not (known[1].current() and record[0].current()):
            return None
        return calls.repeat(x, backend)

    def drop(self) -> None:
        """Forget everything."""
        self._anatomy = self._record = None

    def drop_weights(self) -> None:
        """Forget the folded weights: a forward with gradients announces an update of them."""
        self._record = None

    def __reduce__(self) -> tuple:
        return FoldCache, (self.trusted, self.hard, self.facts)
