"""Fused kernels for squeeze-enhanced axial attention, SeaFormer's ``Sea_Attention``.

Importing compiles nothing and touches no device.
"""

from seaattn_kernels import ops
from seaattn_kernels.module import Sea_Attention, SeaAttention

__version__ = "0.1.0"
__all__ = ["SeaAttention", "Sea_Attention", "ops"]
