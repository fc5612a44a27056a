"""Sea_Attention as people have it: upstream's two forms and hand-edited copies, in eager PyTorch.

Written from the formulas for these tests, without anything of the package, so that a process which
does not have it can open them.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Conv2d_BN(nn.Sequential):
    def __init__(self, inputs, outputs, size=1, groups=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.add_module(
            "c", nn.Conv2d(inputs, outputs, size, 1, size // 2, groups=groups, bias=False)
        )
        self.add_module("bn", norm(outputs))


class ConvModule(nn.Module):
    """As detectors have it: named children, an activation that does nothing, its own forward."""

    def __init__(self, inputs, outputs, size=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, 1, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def sync_conv(inputs, outputs, size=1, groups=1):
    return Conv2d_BN(inputs, outputs, size, groups, nn.SyncBatchNorm)


def biased_conv(inputs, outputs, size=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


class h_sigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class SqueezeAxialPositionalEmbedding(nn.Module):
    def __init__(self, channels, length):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, channels, length))

    def forward(self, x):
        table = F.interpolate(self.pos_embed, size=x.shape[2], mode="linear", align_corners=False)
        return x + table


class OtherTable(nn.Module):
    def __init__(self, channels, length):
        super().__init__()
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, channels, length))

    def forward(self, x):
        return F.interpolate(self.pos_emb, size=(x.size(-1),), mode="linear") + x


class Sea_Attention(nn.Module):
    """Upstream's classification form. The variants below change one thing each."""

    conv = staticmethod(Conv2d_BN)
    activation = nn.ReLU6
    gate = h_sigmoid
    table = SqueezeAxialPositionalEmbedding
    column = "column"

    def __init__(self, dim, key_dim=4, num_heads=2, attn_ratio=2):
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.nh_kd = keys = key_dim * num_heads
        self.dh = values = int(attn_ratio * key_dim) * num_heads
        conv, act = self.conv, self.activation
        self.to_q = conv(dim, keys)
        self.to_k = conv(dim, keys)
        self.to_v = conv(dim, values)
        self.proj = nn.Sequential(act(), conv(values, dim))
        self.proj_encode_row = nn.Sequential(act(), conv(values, values))
        self.pos_emb_rowq = self.table(keys, 16)
        self.pos_emb_rowk = self.table(keys, 16)
        self.add_module(f"proj_encode_{self.column}", nn.Sequential(act(), conv(values, values)))
        self.add_module(f"pos_emb_{self.column}q", self.table(keys, 16))
        self.add_module(f"pos_emb_{self.column}k", self.table(keys, 16))
        width = self.width()
        self.dwconv = conv(width, width, 3, width)
        self.act = act()
        self.pwconv = conv(width, dim)
        if self.gate is not None:
            self.sigmoid = self.gate()

    def width(self):
        return 2 * self.nh_kd + self.dh

    def attend(self, q, k, v, encode):
        b, _, n = q.shape
        q, k, v = (t.reshape(b, self.num_heads, -1, n) for t in (q, k, v))
        weights = torch.einsum("bhdi,bhdj->bhij", q, k).mul(self.scale).softmax(-1)
        out = torch.einsum("bhij,bhej->bhei", weights, v)
        return encode(out.reshape(b, self.dh, n, 1)).squeeze(3)

    def gated(self, x):
        return self.sigmoid(x)

    def detail(self, qkv):
        return self.pwconv(self.act(self.dwconv(qkv)))

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        detail = self.detail(torch.cat([q, k, v], dim=1))
        layer = {name: getattr(self, name.format(self.column)) for name in (
            "pos_emb_{}q", "pos_emb_{}k", "proj_encode_{}"
        )}  # fmt: skip
        row = self.attend(
            self.pos_emb_rowq(q.mean(-1)), self.pos_emb_rowk(k.mean(-1)), v.mean(-1),
            self.proj_encode_row,
        )  # fmt: skip
        column = self.attend(
            layer["pos_emb_{}q"](q.mean(-2)), layer["pos_emb_{}k"](k.mean(-2)), v.mean(-2),
            layer["proj_encode_{}"],
        )  # fmt: skip
        return self.gated(self.proj(v + row.unsqueeze(3) + column.unsqueeze(2))) * detail


class Segmentation(Sea_Attention):
    """Upstream's segmentation form, valid where a value has twice the channels of a key."""

    def width(self):
        return 2 * self.dh


class SyncBatchNorm(Sea_Attention):
    conv = staticmethod(sync_conv)


class NoNorm(Sea_Attention):
    conv = staticmethod(biased_conv)


class Detector(Sea_Attention):
    conv = staticmethod(ConvModule)
    activation = nn.SiLU


class ReLU(Sea_Attention):
    @staticmethod
    def activation():
        return nn.ReLU(inplace=True)


class LeakyReLU(Sea_Attention):
    @staticmethod
    def activation():
        return nn.LeakyReLU(0.1)


class TrueSigmoid(Sea_Attention):
    gate = nn.Sigmoid


class Hardsigmoid(Sea_Attention):
    gate = nn.Hardsigmoid


class FunctionalSigmoid(Sea_Attention):
    gate = None

    def gated(self, x):
        return x.sigmoid()


class FunctionalHardsigmoid(Sea_Attention):
    gate = None

    def gated(self, x):
        return F.hardsigmoid(x)


class ShortKeys(Sea_Attention):
    """The shorter names, no norm, ReLU and the true sigmoid, as one copy has them together."""

    column = "col"
    conv = staticmethod(biased_conv)
    activation = nn.ReLU
    gate = nn.Sigmoid


class OtherTables(Sea_Attention):
    table = OtherTable


class WithSoftmaxLayer(Sea_Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.softmax = nn.Softmax(dim=-1)


VARIANTS = (
    Sea_Attention, Segmentation, SyncBatchNorm, NoNorm, Detector, ReLU, LeakyReLU, TrueSigmoid,
    Hardsigmoid, FunctionalSigmoid, FunctionalHardsigmoid, ShortKeys, OtherTables,
    WithSoftmaxLayer,
)  # fmt: skip


# --- copies that compute something else ------------------------------------------------------


class Strided(Sea_Attention):
    """StrideFormer's: half the map, and upsampled at the end."""

    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.stride_conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 2, 1, groups=dim), nn.BatchNorm2d(dim)
        )

    def forward(self, x):
        out = super().forward(self.stride_conv(x))
        return F.interpolate(out, size=x.shape[2:], mode="bilinear")


class Cross(Sea_Attention):
    """Queries from one map, keys and values from another."""

    def forward(self, x, context):
        return super().forward(x + context)


class Dense(Sea_Attention):
    """The detail branch by a full 3x3 convolution."""

    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.dwconv = Conv2d_BN(self.width(), self.width(), 3)


class Residual(Sea_Attention):
    """The same layers, another forward."""

    def forward(self, x):
        return x + super().forward(x)


class Masked(Sea_Attention):
    """Takes more than a map, where it is given more."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class NoScale(Sea_Attention):
    """Scores are not scaled."""

    def attend(self, q, k, v, encode):
        return super().attend(q / self.scale, k, v, encode)


class Dropped(Sea_Attention):
    """A function that acts in training alone."""

    def detail(self, qkv):
        return F.dropout(super().detail(qkv), 0.1, self.training)


class Softplus(nn.Module):
    def forward(self, x):
        return F.softplus(x)


class OtherGate(Sea_Attention):
    gate = Softplus


class Tuple(Sea_Attention):
    def forward(self, x):
        return super().forward(x), x


class SquareOnly(Sea_Attention):
    """Adds rows and columns before it broadcasts them."""

    def forward(self, x):
        if x.shape[2] != x.shape[3]:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return super().forward(x)


class LayerScale(Sea_Attention):
    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x):
        return self.gamma * super().forward(x)


class GELU(Sea_Attention):
    activation = nn.GELU


def group_norm(inputs, outputs, size=1, groups=1):
    return Conv2d_BN(inputs, outputs, size, groups, lambda channels: nn.GroupNorm(2, channels))


class GroupNorm(Sea_Attention):
    conv = staticmethod(group_norm)


class Model(nn.Module):
    """A stem, two blocks with residual connections, a head."""

    def __init__(self, kind, dim=16, classes=5, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.stages = nn.ModuleList([kind(dim, **options) for _ in range(2)])
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = x + stage(x)
        return self.head(x.mean((2, 3)))
