"""SeaFormer T, S, B and L: backbone, classifier and Light Head segmenter, without mmcv or timm.

Names and shapes of the state_dict are upstream's (fudan-zvg/SeaFormer), so its checkpoints load.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seaattn_kernels.layers import Conv2d_BN, HSigmoid, upstream_keys
from seaattn_kernels.module import SeaAttention


@dataclass(frozen=True)
class Config:
    """One variant.

    ``stages`` lists ``(kernel, expansion, channels, stride)`` per MobileNetV2 block; the last
    ``len(depths)`` stages are followed by transformer blocks.
    """

    stages: tuple[tuple[tuple[int, int, int, int], ...], ...]
    stem: int
    key_dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int
    mlp_ratios: tuple[int, ...]
    head_dims: tuple[int, ...]


CONFIGS = {
    "t": Config(
        stages=(
            ((3, 1, 16, 1), (3, 4, 16, 2), (3, 3, 16, 1)),
            ((5, 3, 32, 2), (5, 3, 32, 1)),
            ((3, 3, 64, 2), (3, 3, 64, 1)),
            ((5, 3, 128, 2),),
            ((3, 6, 160, 2),),
        ),
        stem=16, key_dims=(16, 24), depths=(2, 2), heads=4, mlp_ratios=(2, 4), head_dims=(64, 96),
    ),
    "s": Config(
        stages=(
            ((3, 1, 16, 1), (3, 4, 24, 2), (3, 3, 24, 1)),
            ((5, 3, 48, 2), (5, 3, 48, 1)),
            ((3, 3, 96, 2), (3, 3, 96, 1)),
            ((5, 4, 160, 2),),
            ((3, 6, 192, 2),),
        ),
        stem=16, key_dims=(16, 24), depths=(3, 3), heads=6, mlp_ratios=(2, 4), head_dims=(96, 128),
    ),
    "b": Config(
        stages=(
            ((3, 1, 16, 1), (3, 4, 32, 2), (3, 3, 32, 1)),
            ((5, 3, 64, 2), (5, 3, 64, 1)),
            ((3, 3, 128, 2), (3, 3, 128, 1)),
            ((5, 4, 192, 2),),
            ((3, 6, 256, 2),),
        ),
        stem=16, key_dims=(16, 24), depths=(4, 4), heads=8, mlp_ratios=(2, 4), head_dims=(128, 160),
    ),
    "l": Config(
        stages=(
            ((3, 3, 32, 1), (3, 4, 64, 2), (3, 4, 64, 1)),
            ((5, 4, 128, 2), (5, 4, 128, 1)),
            ((3, 4, 192, 2), (3, 4, 192, 1)),
            ((5, 4, 256, 2),),
            ((3, 6, 320, 2),),
        ),
        stem=32, key_dims=(16, 20, 24), depths=(3, 3, 3), heads=8, mlp_ratios=(2, 4, 6),
        head_dims=(128, 160, 192),
    ),
}  # fmt: skip

_DROP_PATH = 0.1
_CHECKPOINT_KEYS = ("state_dict_ema", "state_dict", "model")


class InvertedResidual(nn.Module):
    """MobileNetV2 block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [Conv2d_BN(inputs, hidden), nn.ReLU()] if expansion != 1 else []
        depthwise = Conv2d_BN(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.ReLU(), Conv2d_BN(hidden, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class StackedMV2Block(nn.Module):
    """A stage of inverted residuals, the first stage behind a strided 3x3 stem."""

    def __init__(
        self, inputs: int, stage: tuple[tuple[int, int, int, int], ...], stem: bool
    ) -> None:
        super().__init__()
        if stem:
            self.stem_block = nn.Sequential(Conv2d_BN(3, inputs, 3, 2, 1), nn.ReLU())
        for index, (kernel, expansion, outputs, stride) in enumerate(stage, start=1):
            block = InvertedResidual(inputs, outputs, kernel, stride, expansion)
            self.add_module(f"layer{index}", block)
            inputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the branch of a sample with this probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class Mlp(nn.Module):
    """1x1 expansion, depthwise 3x3 with bias, activation, 1x1 projection."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Conv2d_BN(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, bias=True, groups=hidden)
        self.act = nn.ReLU6()
        self.fc2 = Conv2d_BN(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """Transformer block: attention and MLP, each with a residual connection."""

    def __init__(
        self,
        channels: int,
        key_dim: int,
        heads: int,
        mlp_ratio: int,
        drop_path: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.attn = SeaAttention(channels, key_dim, heads, activation=nn.ReLU6, backend=backend)
        self.drop_path = DropPath(drop_path)
        self.mlp = Mlp(channels, channels * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class BasicLayer(nn.Module):
    """The transformer blocks of a stage."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


class Backbone(nn.Module):
    """``(B, 3, H, W)`` -> the map at stride 8, then the output of each transformer stage."""

    def __init__(self, config: Config, backend: str = "auto") -> None:
        super().__init__()
        first = len(config.stages) - len(config.depths)
        self.channels: list[int] = []
        self._stages: list[tuple[str, str | None]] = []
        channels = config.stem
        for index, stage in enumerate(config.stages):
            name, trans = f"smb{index + 1}", None
            self.add_module(name, StackedMV2Block(channels, stage, stem=index == 0))
            channels = stage[-1][2]
            if index == 1:
                self.channels.append(channels)
            if index >= first:
                at = index - first
                rates = torch.linspace(0, _DROP_PATH, config.depths[at], device="cpu").tolist()
                mlp_ratio, key_dim = config.mlp_ratios[at], config.key_dims[at]
                blocks = [
                    Block(channels, key_dim, config.heads, mlp_ratio, rate, backend)
                    for rate in rates
                ]
                trans = f"trans{at + 1}"
                self.add_module(trans, BasicLayer(blocks))
                self.channels.append(channels)
            self._stages.append((name, trans))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for index, (name, trans) in enumerate(self._stages):
            x = getattr(self, name)(x)
            if index == 1:
                outputs.append(x)
            if trans is not None:
                x = getattr(self, trans)(x)
                outputs.append(x)
        return outputs


class Classifier(Backbone):
    """Backbone, global average and a linear layer: ``(B, 3, H, W) -> (B, num_classes)``."""

    def __init__(self, config: Config, num_classes: int, backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.linear = nn.Linear(self.channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(super().forward(x)[-1].mean((2, 3)))


class ConvModule(nn.Module):
    """1x1 convolution and BatchNorm under the names ``conv`` and ``bn``."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class FusionBlock(nn.Module):
    """Weighs a fine map by the upsampled h_sigmoid of a coarse one."""

    def __init__(self, fine: int, coarse: int, outputs: int) -> None:
        super().__init__()
        self.local_embedding = ConvModule(fine, outputs)
        self.global_act = ConvModule(coarse, outputs)
        self.act = HSigmoid()

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        weight = self.act(self.global_act(coarse))
        weight = F.interpolate(weight, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.local_embedding(fine) * weight


class LightHead(nn.Module):
    """Fuses the backbone's maps at stride 8 and classifies each pixel."""

    def __init__(self, inputs: list[int], dims: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        width = dims[-1]
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)
        self.dropout = nn.Dropout2d(0.1)
        self.linear_fuse = ConvModule(width, width, groups=width)
        fine = inputs[0]
        for index, (coarse, dim) in enumerate(zip(inputs[1:], dims, strict=True), start=1):
            self.add_module(f"fuse{index}", FusionBlock(fine, coarse, dim))
            fine = dim

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[0]
        for index, coarse in enumerate(maps[1:], start=1):
            x = getattr(self, f"fuse{index}")(x, coarse)
        return self.conv_seg(self.dropout(F.relu(self.linear_fuse(x))))


class Segmenter(nn.Module):
    """Backbone and Light Head: ``(B, 3, H, W) -> (B, num_classes, H/8, W/8)`` logits."""

    def __init__(self, config: Config, num_classes: int, backend: str = "auto") -> None:
        super().__init__()
        self.backbone = Backbone(config, backend)
        self.decode_head = LightHead(self.backbone.channels, config.head_dims, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


def _config(variant: str) -> Config:
    if variant not in CONFIGS:
        raise ValueError(f"variant must be one of {tuple(CONFIGS)}, got {variant!r}")
    return CONFIGS[variant]


def seaformer(variant: str, num_classes: int = 1000, backend: str = "auto") -> Classifier:
    """The SeaFormer classifier ``"t"``, ``"s"``, ``"b"`` or ``"l"``, randomly initialised.

    ``(B, 3, H, W) -> (B, num_classes)``. Raises ValueError for another variant or backend.
    """
    return Classifier(_config(variant), num_classes, backend)


def seaformer_segmenter(variant: str, num_classes: int = 150, backend: str = "auto") -> Segmenter:
    """The SeaFormer backbone with its Light Head, randomly initialised.

    ``(B, 3, H, W) -> (B, num_classes, ceil(H/8), ceil(W/8))`` logits, not upsampled. Raises
    ValueError for another variant or backend.
    """
    return Segmenter(_config(variant), num_classes, backend)


class _Keys(NamedTuple):
    missing: list[str]
    unexpected: list[str]


class LoadReport(_Keys):
    """Keys of the model that a checkpoint lacks, and keys of the checkpoint the model lacks.

    ``renamed``: what a copy of the block calls otherwise, and under which key it was loaded.
    """

    renamed: Mapping[str, str]


def checkpoint_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights in the content of a checkpoint.

    Those under ``state_dict_ema``, ``state_dict`` or ``model`` if there are any, without the
    ``module.`` prefix of ``DataParallel``.
    """
    for key in _CHECKPOINT_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {
        key.removeprefix("module."): value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor)
    }


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """The call that makes the model of these weights, such as ``seaformer('b', 1000)``, or None."""
    for build, head in (
        (seaformer, "linear.weight"),
        (seaformer_segmenter, "decode_head.conv_seg.weight"),
    ):
        if head not in weights:
            continue
        classes = weights[head].shape[0]
        for variant in CONFIGS:
            with torch.device("meta"):
                own = build(variant, classes).state_dict()
            if all(key in weights and weights[key].shape == t.shape for key, t in own.items()):
                return f"{build.__name__}({variant!r}, {classes})"
    return None


def load_checkpoint(model: nn.Module, checkpoint: str | Path | Mapping) -> LoadReport:
    """Load a checkpoint into a model, or into its ``backbone``.

    Takes the weights under ``state_dict_ema``, ``state_dict`` or ``model`` if there are any, strips
    a ``module.`` prefix, copies every key that the model has, and reports the others. Blocks may
    have the keys of the known copies (:func:`layers.upstream_keys`). Tensors only are unpickled
    from a file.

    Raises:
        ValueError: if no key of the checkpoint belongs to the model, or a shape differs.
    """
    source = checkpoint
    if not isinstance(checkpoint, Mapping):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = checkpoint_weights(checkpoint)
    own = model.state_dict()
    upstream = upstream_keys(weights)
    # Only what the model lacks: a model may have layers under the names of a copy.
    twice = Counter(upstream.values())
    renamed = {
        key: to
        for key, to in upstream.items()
        if key not in own and to in own and to not in weights and twice[to] == 1
    }
    weights = {renamed.get(key, key): value for key, value in weights.items()}
    if not weights.keys() & own.keys():
        name = source if isinstance(source, (str, Path)) else "the checkpoint"
        raise ValueError(f"no key of {name} belongs to {type(model).__name__}: {list(weights)[:3]}")
    for key in weights.keys() & own.keys():
        if weights[key].shape != own[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(weights[key].shape)} in the checkpoint, "
                f"{tuple(own[key].shape)} in the model"
            )
    report = LoadReport(*model.load_state_dict(weights, strict=False))
    report.renamed = renamed
    return report
