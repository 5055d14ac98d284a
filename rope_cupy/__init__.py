"""Rotary position embeddings for CuPy, PyTorch, NumPy and any DLPack array, at memory speed."""

from . import frequencies, positions
from .rotary import apply_rotary, apply_rotary_qk
from .tables import RotaryTable

__version__ = "0.1.0"
__all__ = ["RotaryTable", "apply_rotary", "apply_rotary_qk", "frequencies", "positions"]
