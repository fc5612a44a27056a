"""What is timed: a block, an operator or a whole model at one shape, forward or a training step."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import peers
from bench.cases import ACTIVATION, ATTN_RATIO, Case
from bench.eager import as_eager
from bench.limit import ProductTime, Roofline, products
from bench.picture import photograph
from bench.timing import Result
from seaattn_kernels import SeaAttention, ops, replace_sea_attention, seaformer
from seaattn_kernels.budget import SEEDS
from seaattn_kernels.layers import HSigmoid
from seaattn_kernels.verify import OperatorCase, randomise

OPERATORS = ("axial_squeeze", "axial_attention_pair", "broadcast_add", "gate")
#: torch.compile's modes by provider.
COMPILED = {"compile": None, "autotune": "max-autotune-no-cudagraphs"}
_INFERENCE_ONLY = ("cuda", "freezing", *peers.PACKAGES)
#: What draws in training: no two runs of it are alike, so that none could be judged.
_RANDOM = (nn.Dropout2d, seaformer.DropPath)


@dataclass(frozen=True)
class Setting:
    """How something is run: where, in which dtype, how many maps, ``step``: with a backward."""

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    step: bool = False

    @property
    def mode(self) -> str:
        return "step" if self.step else "forward"


class Step:
    """A candidate that runs forward and backward: outputs, then every gradient.

    The gradients are those of the inputs and of ``parameters``.
    """

    def __init__(self, forward: Callable[..., Result], parameters: Sequence[Tensor]) -> None:
        self._forward, self._parameters = forward, list(parameters)

    def __call__(self, given: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        tensors, upstream = given
        out = self._forward(*tensors)
        outputs = (out,) if isinstance(out, Tensor) else out
        leaves = [*tensors, *self._parameters]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


class _ChannelsLast:
    """A candidate on maps in that layout, brought into it ahead of time."""

    def __init__(self, candidate: Callable) -> None:
        self._candidate = candidate

    def bind(self, given: object) -> object:
        if isinstance(given, Tensor):
            return given.contiguous(memory_format=torch.channels_last)
        tensors, upstream = ([self.bind(t.detach()) for t in side] for side in given)
        return [t.requires_grad_() for t in tensors], upstream

    def __call__(self, given: object) -> Result:
        return self._candidate(given)


class Work(ABC):
    """Something to time, with what is needed to check it.

    A candidate takes what :meth:`given` makes: a map; the tensors of an operator; of a training
    step these, and the gradients of the outputs.
    """

    kind: str
    #: What rows call it: "block", the name of an operator or of a model.
    what: str
    #: The case of the table that it belongs to; of a model its variant.
    case: str
    size: tuple[int, int]
    setting: Setting
    flops: int
    bytes: int

    @abstractmethod
    def given(self, seed: int) -> object:
        """An input of every candidate."""

    @abstractmethod
    def exact(self, given: object) -> Result:
        """The result in float64."""

    def smooth(self) -> "Work":
        """The work that is judged in place of this one.

        A gradient jumps where an activation has a kink, and eager's and ours may lie on either
        side of it. So a step is judged with activations that have none, and timed as it is.
        """
        return self

    @abstractmethod
    def refusal(self, provider: str) -> str | None:
        """Why ``provider`` does not do this, whatever the device; None where it does."""

    @abstractmethod
    def candidate(self, provider: str) -> Callable:
        """What ``provider`` calls."""

    def limit(self) -> Roofline:
        return Roofline(self.flops, self.bytes, self.setting.dtype, self.setting.device)

    def identity(self) -> dict:
        """The entries of a row that say what was timed, but for threads, provider and way."""
        return {
            "kind": self.kind,
            "what": self.what,
            "mode": self.setting.mode,
            "case": self.case,
            "height": self.size[0],
            "width": self.size[1],
            "batch": self.setting.batch,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "device": self.setting.device.type,
        }


class _ModuleWork(Work):
    """Of a module that holds blocks, on one map."""

    module: nn.Module
    _result: Sequence[int]  # the shape

    @abstractmethod
    def _maps(self, seed: int) -> Tensor:
        """The map."""

    @abstractmethod
    def _ours(self, backend: str) -> nn.Module:
        """The module on this package."""

    def given(self, seed: int) -> object:
        x = self._maps(seed)
        if not self.setting.step:
            return x
        return [x.requires_grad_()], [_normal(100 * seed + 50, self._result, self.setting)]

    def exact(self, given: object) -> Result:
        module = as_eager(self.module).double()
        if not self.setting.step:
            return module(given.double())
        tensors, upstream = given
        doubled = [t.detach().double().requires_grad_() for t in tensors]
        return Step(module, module.parameters())((doubled, [t.double() for t in upstream]))

    def refusal(self, provider: str) -> str | None:
        if self.setting.step and provider in _INFERENCE_ONLY:
            return "it runs no backward"
        return None

    def candidate(self, provider: str) -> Callable:
        if provider in COMPILED or provider == "freezing":
            torch.compiler.reset()
        if provider == "onnxruntime":
            return peers.OnnxRuntime(self.module)
        if provider == "openvino":
            return peers.OpenVino(self.module)
        if provider == "freezing":
            return peers.Freezing(as_eager(self.module))
        if provider == "eager" or provider in COMPILED:
            module = as_eager(self.module)
        else:
            module = self._ours("auto" if provider == "channels_last" else provider)
        forward = module
        if provider in COMPILED:
            forward = torch.compile(module, dynamic=False, mode=COMPILED[provider])
        candidate = Step(forward, module.parameters()) if self.setting.step else forward
        return _ChannelsLast(candidate) if provider == "channels_last" else candidate


def block_of(case: Case, smooth: bool = False) -> SeaAttention:
    """The block in eval mode, every parameter and statistic random, on the CPU in float32.

    ``smooth``: with SiLU and the true sigmoid.
    """
    activation = "silu" if smooth else ACTIVATION
    block = SeaAttention(case.channels, case.key_dim, case.heads, ATTN_RATIO, activation)
    if smooth:
        block.sigmoid = nn.Sigmoid()
    return randomise(block).eval()


class Block(_ModuleWork):
    """A block on random maps, in eval mode, of a step in train mode."""

    kind = what = "block"

    def __init__(
        self, case: Case, size: tuple[int, int], setting: Setting, smooth: bool = False
    ) -> None:
        self.case, self.size, self.setting, self._table = case.name, size, setting, case
        self._result = (setting.batch, case.channels, *size)
        block = block_of(case, smooth)
        self.module = block.to(setting.device, setting.dtype).train(setting.step)
        # A backward has two products for one, and reads and writes as much as a forward.
        steps = 3 if setting.step else 1
        self.flops = steps * case.flops(*size, setting.batch)
        moved = case.fewest_bytes(*size, setting.batch, setting.dtype.itemsize)
        self.bytes = 2 * moved if setting.step else moved

    def smooth(self) -> Work:
        return Block(self._table, self.size, self.setting, True) if self.setting.step else self

    def limit(self) -> Roofline:
        if self.setting.device.type == "cuda":
            return super().limit()
        listed = products(self._table, *self.size, self.setting.batch, self.setting.step)
        return ProductTime(listed, self.setting.dtype)

    def _maps(self, seed: int) -> Tensor:
        return _normal(seed, self._result, self.setting)

    def _ours(self, backend: str) -> nn.Module:
        block = copy.deepcopy(self.module)
        block.backend = backend
        return block

    def refusal(self, provider: str) -> str | None:
        if reason := super().refusal(provider):
            return reason
        if provider in ops.BACKENDS[1:]:
            case, setting = self._table, self.setting
            operator = "training" if setting.step else "sea_attention"
            head = case.key_dim, case.values // case.heads
            return ops.refusal(operator, provider, setting.device, setting.dtype, head)
        return None


class Model(_ModuleWork):
    """A SeaFormer segmenter on shifted views of a photograph, eager and replaced.

    A training step has no dropout.
    """

    kind = "model"

    def __init__(
        self,
        variant: str,
        setting: Setting,
        module: nn.Module | None = None,
        picture: Tensor | None = None,
    ) -> None:
        self.what, self.case = f"SeaFormer-{variant.upper()} segmenter", variant.upper()
        self.setting = setting
        module = module or randomise(seaformer.seaformer_segmenter(variant))
        self.module = module.to(setting.device, setting.dtype).train(setting.step)
        for layer in self.module.modules():
            if isinstance(layer, _RANDOM):
                layer.eval()
        picture = photograph(None) if picture is None else picture
        self._picture = picture.expand(setting.batch, -1, -1, -1).to(setting.device, setting.dtype)
        self.size = tuple(picture.shape[2:])
        # On shapes alone: counting runs nothing.
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            out = as_eager(self.module).to("meta")(self._picture.to("meta"))
        self._result = out.shape
        forward = counted.get_total_flops()
        self.flops = 3 * forward if setting.step else forward
        moved = self._picture.numel() + out.numel() + sum(p.numel() for p in module.parameters())
        self.bytes = (2 if setting.step else 1) * moved * setting.dtype.itemsize

    def _maps(self, seed: int) -> Tensor:
        # A deep network magnifies rounding at a few pixels by far: ten samples make a steady error.
        return self._picture.roll(seed * self.size[1] // len(SEEDS), dims=3)

    def smooth(self) -> Work:
        if not self.setting.step:
            return self
        module = copy.deepcopy(self.module)
        for layer in list(module.modules()):
            for name, child in layer.named_children():
                if isinstance(child, (nn.ReLU, nn.ReLU6)):
                    setattr(layer, name, nn.SiLU())
                elif isinstance(child, HSigmoid):
                    setattr(layer, name, nn.Sigmoid())
        return Model(self.case.lower(), self.setting, module, self._picture[:1])

    def _ours(self, backend: str) -> nn.Module:
        model = as_eager(self.module)
        replace_sea_attention(model, backend=backend)
        return model


class Operator(Work):
    """An operator of ``ops`` at the sizes that it has within a block."""

    kind = "operator"

    def __init__(
        self,
        name: str,
        case: Case,
        size: tuple[int, int],
        setting: Setting,
        smooth: bool = False,
    ) -> None:
        self.what, self.case, self.size, self.setting = name, case.name, size, setting
        self._table = case
        (h, w), batch = size, setting.batch
        projected, values, channels = case.projected, case.values, case.channels
        keys = case.heads * case.key_dim
        # Multiplications and additions; activations, exponentials and clamps are not counted.
        self._operator, flops = {
            "axial_squeeze": (
                OperatorCase(name, ((batch, projected, h, w),)),
                2 * batch * projected * h * w,
            ),
            "axial_attention_pair": (
                OperatorCase(
                    name,
                    ((batch, projected, h), (batch, projected, w), *[(1, keys, 16)] * 4),
                    (case.heads, case.key_dim),
                ),
                2 * batch * (keys + values) * (h**2 + w**2),
            ),
            "broadcast_add": (
                OperatorCase(
                    name,
                    ((batch, values, h, w), (batch, values, h), (batch, values, w)),
                    ("silu" if smooth else ACTIVATION, 0.0),
                ),
                2 * batch * values * h * w,
            ),
            "gate": (
                OperatorCase(name, ((batch, channels, h, w),) * 2, (not smooth,)),
                3 * batch * channels * h * w,
            ),
        }[name]
        self.flops = 3 * flops if setting.step else flops
        self._outputs = _results_of(self._operator)
        moved = sum(map(prod, (*self._operator.shapes, *self._outputs))) * setting.dtype.itemsize
        self.bytes = 2 * moved if setting.step else moved

    def smooth(self) -> Work:
        if not self.setting.step:
            return self
        return Operator(self.what, self._table, self.size, self.setting, True)

    def given(self, seed: int) -> object:
        setting = self.setting
        tensors = self._operator.inputs(seed, str(setting.device), setting.dtype)
        if not setting.step:
            return tensors
        upstream = [
            _normal(100 * seed + 50 + index, shape, setting)
            for index, shape in enumerate(self._outputs)
        ]
        return [t.requires_grad_() for t in tensors], upstream

    def exact(self, given: object) -> Result:
        if not self.setting.step:
            return self._forward("reference")(*(t.double() for t in given))
        tensors, upstream = given
        doubled = [t.detach().double().requires_grad_() for t in tensors]
        return Step(self._forward("reference"), [])((doubled, [t.double() for t in upstream]))

    def refusal(self, provider: str) -> str | None:
        if provider in ("reference", "channels_last", *_INFERENCE_ONLY):
            return "it runs whole blocks" if provider != "reference" else "it is eager here"
        if provider in ops.BACKENDS[1:]:
            setting = self.setting
            return ops.refusal(self.what, provider, setting.device, setting.dtype)
        return None

    def candidate(self, provider: str) -> Callable:
        if provider in COMPILED:
            torch.compiler.reset()
            eager = self._forward("reference")
            forward = torch.compile(eager, dynamic=False, mode=COMPILED[provider])
        else:
            forward = self._forward("reference" if provider == "eager" else provider)
        return Step(forward, []) if self.setting.step else lambda tensors: forward(*tensors)

    def _forward(self, backend: str) -> Callable[..., Result]:
        return lambda *tensors: self._operator.run(tensors, backend)


def _results_of(operator: OperatorCase) -> list[torch.Size]:
    with torch.device("meta"):
        tensors = [torch.empty(shape) for shape in operator.shapes]
        return [t.shape for t in operator.run(tensors, "reference")]


def _normal(seed: int, shape: Sequence[int], setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
