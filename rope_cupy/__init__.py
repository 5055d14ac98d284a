"""Rotary position embeddings for CuPy, PyTorch, NumPy and any DLPack array, at memory speed."""

from typing import TYPE_CHECKING, Any

from .rotary import (
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)
from .tables import RotaryTable

if TYPE_CHECKING:
    from . import diffusion, frequencies, positions

__version__ = "0.1.0"
__all__ = [
    "RotaryTable",
    "apply_norm_rotary",
    "apply_qk_norm_rotary",
    "apply_rotary",
    "apply_rotary_kv_cache",
    "apply_rotary_qk",
    "apply_rotary_qkv",
    "diffusion",
    "frequencies",
    "positions",
]


def __getattr__(name: str) -> Any:
    """Import the modules of tables and positions when they are asked for."""
    if name in __all__:  # all others are here
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
