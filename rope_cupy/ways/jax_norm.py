"""Norms by JAX's own functions, through which gradients are computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..choices import LAYER_NORM, TOKEN_NORM
from ..options import Norm, Options, axis_names


def normalised(x: Any, weights: dict[str, Any], options: Options, norm: Norm) -> Any:
    """Return x with its heads normalised."""
    heads = x if options.head_dim is None else x.reshape(*x.shape[:-1], -1, options.head_dim)
    at = axis_names(x.ndim, options).index("h")
    if options.packed is None:
        own = {name.rpartition("_")[2]: each for name, each in weights.items()}
        return _norm_of(heads, own.get("weight"), own.get("bias"), at, norm).reshape(x.shape)
    num_heads, num_kv_heads = options.packed
    q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), at)
    q = _norm_of(q, weights.get("q_weight"), weights.get("q_bias"), at, norm)
    k = _norm_of(k, weights.get("k_weight"), weights.get("k_bias"), at, norm)
    return jnp.concatenate((q, k, v), at).reshape(x.shape)


def _norm_of(heads: Any, weight: Any, bias: Any, at: int, norm: Norm) -> Any:
    """Normalise in float32, or in float64 where an array is of that; round once, to x's dtype."""
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    by_token = jnp.moveaxis(heads, at, -2).astype(wide)
    flat = by_token
    if norm.kind == TOKEN_NORM:
        flat = by_token.reshape(*by_token.shape[:-2], -1)
    if norm.kind == LAYER_NORM:
        flat = flat - flat.mean(-1, keepdims=True)
    flat = flat * jax.lax.rsqrt((flat * flat).mean(-1, keepdims=True) + norm.eps)
    if weight is not None:
        flat = flat * (weight.astype(wide) + norm.weight_offset)
    if bias is not None:
        flat = flat + bias.astype(wide)
    return jnp.moveaxis(flat.reshape(by_token.shape), -2, at).astype(heads.dtype)
