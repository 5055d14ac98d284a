"""Rotary position embeddings (RoPE) for CuPy, PyTorch, NumPy and any DLPack array, at memory speed.

Functions, each of which is one launch on a GPU:

    apply_rotary           rotate one array
    apply_rotary_qk        rotate q and k
    apply_norm_rotary      normalise, then rotate one array
    apply_qk_norm_rotary   normalise, then rotate q and k
    apply_rotary_qkv       rotate q and k within a packed projection
    apply_rotary_kv_cache  rotate q and k, and write k and v into their caches
    join_qkv               rotate up to three streams of tokens into joint q, k and v
    Stream                 the arrays of one such stream

Tables of cosines and sines:

    RotaryTable            a table in the form that a model has, or one that is computed
    frequencies            inverse frequencies, by rule or by the config of a language model
    diffusion              tables of image and video models, by the names of the models
    positions              positions of the tokens of one process, where several share a sequence

Modules that are imported when they are asked for:

    torch                          RotaryEmbedding, a module of PyTorch
    integrations.diffusers         enable(pipeline) and disable(pipeline)
    integrations.transformers      enable(model) and disable(model)
    compat                         functions of other libraries, by their names

`python -m rope_cupy` says what the machine has, and checks and times two rotations on it.
"""

from typing import TYPE_CHECKING, Any

from .fused import (
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qkv,
)
from .join import Stream, join_qkv
from .rotary import apply_rotary, apply_rotary_qk
from .tables import RotaryTable

if TYPE_CHECKING:
    from . import diffusion, frequencies, positions
    from . import torch as torch

__version__ = "0.1.0"
__all__ = [
    "RotaryTable",
    "Stream",
    "apply_norm_rotary",
    "apply_qk_norm_rotary",
    "apply_rotary",
    "apply_rotary_kv_cache",
    "apply_rotary_qk",
    "apply_rotary_qkv",
    "diffusion",
    "frequencies",
    "join_qkv",
    "positions",
]


# `torch` is not in __all__: a star import must not hide PyTorch behind it, nor need it.
_MODULES = "diffusion", "frequencies", "positions", "torch"


def __getattr__(name: str) -> Any:
    """Import a module when it is first named."""
    if name in _MODULES:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
