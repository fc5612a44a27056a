"""What the regression suite calls, and how: operators, stages of a training step, whole blocks.

A call takes tensors of one dtype and gives named groups of tensors. In float64 on the reference the
same call is the truth.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from seaattn_kernels import SeaAttention, normalized, overloads, reference, verify

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Of tensors by the name of their group.
Groups = dict[str, list[Tensor]]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- layouts ---------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(x: Tensor) -> Tensor:
    """Every other element of a larger tensor that is NaN elsewhere."""
    *front, last = x.shape
    wide = x.new_full((*front[:-1], front[-1] + 3, 2 * last + 2), float("nan"))
    view = wide[..., 2 : front[-1] + 2, 1 : 2 * last + 1 : 2]
    view.copy_(x)
    return view


def _slice_of_channels(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 5, *x.shape[2:]), float("nan"))
    wide = _channels_last(wide)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def _expanded(x: Tensor) -> Tensor:
    """By strides of 0: the first pixel of a map everywhere, the first image of axis vectors."""
    first = x[:, :, :1, :1] if x.dim() == 4 else x[:1]
    return first.expand(x.shape)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "slice of channels": _slice_of_channels,
    "expanded": _expanded,
}


# --- operators -------------------------------------------------------------------------------


def operator_groups(
    case: verify.OperatorCase,
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    backend: str,
) -> Groups:
    """Results and gradients of a public operator."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = case.run(leaves, backend)
    gradients = torch.autograd.grad(
        out, leaves, [g.to(t.dtype) for g, t in zip(upstream, out, strict=True)]
    )
    return {"forward": [t.detach() for t in out], "gradient": list(gradients)}


def upstreams(case: verify.OperatorCase, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    with torch.no_grad():
        out = case.run([t.float() for t in tensors], "reference")
    return [normal(seed + index, *t.shape, dtype=tensors[0].dtype) for index, t in enumerate(out)]


def pair(b: int, heads: int, d: int, e: int, h: int, w: int, points: int) -> verify.OperatorCase:
    projected, keys = heads * (2 * d + e), heads * d
    shapes = ((b, projected, h), (b, projected, w), *[(1, keys, points)] * 4)
    return verify.OperatorCase("axial_attention_pair", shapes, (heads, d))


def one_axis(b: int, heads: int, d: int, e: int, n: int) -> verify.OperatorCase:
    shapes = ((b, heads * d, n), (b, heads * d, n), (b, heads * e, n))
    return verify.OperatorCase("axial_attention", shapes, (heads, d**-0.5))


def of_a_map(name: str, shape: Sequence[int], *arguments) -> verify.OperatorCase:
    b, c, h, w = shape
    shapes = {
        "axial_squeeze": ((b, c, h, w),),
        "gate": ((b, c, h, w),) * 2,
        "broadcast_add": ((b, c, h, w), (b, c, h), (b, c, w)),
    }
    return verify.OperatorCase(name, shapes[name], arguments)


# --- stages: the operators of a training step ------------------------------------------------


def stage_inputs(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    seed: int,
    layout: str = "contiguous",
    axes: bool = False,
    activation: str = "silu",
    hard: bool = True,
    offset: float = 0.0,
) -> tuple:
    """Random arguments of a stage; ``axes``: with a row and a column where it may have them."""
    b, c, h, w = shape
    count = max(2, b * h * w)
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(next(seeds), *sizes, dtype=dtype)

    def a_map(offset: float = 0.0) -> Tensor:
        return LAYOUTS[layout](random(*shape) + offset).to(dtype)

    def affine(offset: float = 0.0) -> Tensor:
        return torch.stack([random(c) + offset, random(c).abs() + 0.3, random(c)])

    if name in ("moments", "axial_moments"):
        return (a_map(offset),)
    if name == "normalize_affine":
        return random(c) + offset, count * random(c).abs(), random(c), random(c), count, 1e-5
    if name == "normalize_terms":
        return random(2, c), random(c).abs() + 0.3, count
    if name.startswith("normalize_gate"):
        gradient = () if name == "normalize_gate" else (a_map(),)
        terms = (random(2, c), random(2, c)) if name == "normalize_gate_backward" else ()
        return *gradient, a_map(), a_map(), affine(), affine(), *terms, hard
    if name == "depthwise":
        bias = random(c, dtype=dtype) if axes else None
        return a_map(), affine(), random(c, 1, 3, 3, dtype=dtype), bias
    if name == "depthwise_backward":
        return a_map(), a_map(), affine(), random(c, 1, 3, 3, dtype=dtype)
    gradient = () if name == "normalize" else (a_map(),)
    of_sums = name in ("normalize_sums", "normalize_backward")
    terms = (random(2, c),) if name == "normalize_backward" else ()
    row = column = None
    if axes or name == "normalize_add_backward":
        kind = torch.float32 if of_sums else dtype
        row, column = random(b, c, h, dtype=kind), random(b, c, w, dtype=kind)
        activation = "identity" if of_sums else activation
    code = reference.ACTIVATIONS.index(activation)
    return *gradient, a_map(offset), affine(offset), *terms, row, column, code, 0.2


def run_stage(name: str, arguments: Sequence, backend: str) -> list[Tensor]:
    out = overloads.OVERLOADS[name][backend](*arguments)
    return list(out) if isinstance(out, tuple) else [out]


def stage_truth(name: str, arguments: Sequence) -> list[Tensor]:
    """The plain function in float64."""
    exact = [t.double() if isinstance(t, Tensor) else t for t in arguments]
    if name in ("normalize", "normalize_sums", "normalize_backward", "normalize_add_backward"):
        exact[-2] = reference.ACTIVATIONS[exact[-2]]
    out = getattr(normalized, name)(*exact)
    return list(out) if isinstance(out, tuple) else [out]


# --- blocks ----------------------------------------------------------------------------------


def make_block(
    case: verify.BlockCase, backend: str, dtype: torch.dtype = torch.float32
) -> SeaAttention:
    """A block with random weights and statistics."""
    block = SeaAttention(
        case.channels, case.key_dim, case.heads, case.attn_ratio, case.activation, backend=backend
    )
    if not case.hard:
        block.sigmoid = nn.Sigmoid()
    return verify.randomise(block).to(dtype)


def block_input(case: verify.BlockCase, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(seed, case.batch, case.channels, case.height, case.width, dtype=dtype)


def away_from_kinks(block: SeaAttention) -> SeaAttention:
    """The gate held inside of (-3, 3): a rounding that crosses a kink is no error."""
    with torch.no_grad():
        block.proj[1].bn.weight.mul_(0.3)
    return block


_TABLES, _NORMS = "pos_emb", ".bn."


def step_groups(block: nn.Module, x: Tensor, upstream: Tensor, plain: bool = False) -> Groups:
    """A forward and backward, ``plain``: by the layers. The block is left as it was."""
    block = copy.deepcopy(block)
    leaf = x.detach().requires_grad_()
    out = reference.sea_attention(block, leaf) if plain else block(leaf)
    names = [name for name, _ in block.named_parameters()]
    of_x, *found = torch.autograd.grad(
        out, [leaf, *block.parameters()], upstream.to(out.dtype), materialize_grads=True
    )
    gradients = dict(zip(names, found, strict=True))

    def of(which: Iterable[str]) -> list[Tensor]:
        return [gradients[name] for name in which]

    return {
        "forward": [out.detach()],
        "gradient of x": [of_x],
        "gradients of tables": of(n for n in names if _TABLES in n),
        "gradients of norms": of(n for n in names if _NORMS in n),
        "gradients of weights": of(n for n in names if _TABLES not in n and _NORMS not in n),
        "statistics": [b for name, b in block.named_buffers() if "running" in name],
    }


def exact_copy(block: SeaAttention) -> SeaAttention:
    return copy.deepcopy(block).double()
