"""Fused kernels for squeeze-enhanced axial attention, SeaFormer's ``Sea_Attention``.

Importing compiles nothing and touches no device.
"""

from seaattn_kernels import ops
from seaattn_kernels.graphs import graphed
from seaattn_kernels.module import Sea_Attention, SeaAttention
from seaattn_kernels.patch import explain, replace_sea_attention, restore_sea_attention

__version__ = "0.1.0"
__all__ = [
    "SeaAttention",
    "Sea_Attention",
    "explain",
    "graphed",
    "ops",
    "replace_sea_attention",
    "restore_sea_attention",
]
