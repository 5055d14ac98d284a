"""The norm of a problem: the checks of its weights and biases. Pure."""

from __future__ import annotations

from ..choices import LAYER_NORM, TOKEN_NORM
from ..memory import ACCESS_BYTES, FLOATS, ArraySpec
from ..options import Options
from .arrays import check_dtype
from .records import MAX_NORM_DIM, OF_BIASES, OF_WEIGHTS, NormProblem


def norm_problem(
    given: dict[str, ArraySpec],
    num_heads: tuple[int, ...],
    head_dim: int,
    options: Options,
    *,
    rotates: bool,
) -> NormProblem | None:
    """Check the weights and biases of a norm; return their dtype and where they lie.

    Where nothing is rotated, a norm after that is one before it.
    """
    norm = options.norm
    if norm is None:
        return None
    if head_dim > MAX_NORM_DIM:
        raise ValueError(f"head_dim must be at most {MAX_NORM_DIM} with a norm, got {head_dim}")
    weights = {name: array for name, array in given.items() if name in OF_WEIGHTS}
    for name, array in weights.items():
        if name in OF_BIASES and norm.kind != LAYER_NORM:
            raise ValueError(f"{name} must be None unless norm='layer', got an array")
        check_dtype(name, array, FLOATS)
        first = next(iter(weights))
        if array.dtype != weights[first].dtype:
            raise TypeError(
                f"{name} must have {first}'s dtype {weights[first].dtype}, got {array.dtype}"
            )
        heads = num_heads[name.startswith("k_")] if norm.kind == TOKEN_NORM else 1
        if array.shape != (heads * head_dim,):
            raise ValueError(
                f"{name} must have the shape {(heads * head_dim,)} with norm={norm.kind!r}, got "
                f"{array.shape}"
            )
    arrays = (
        weights.get("q_weight", weights.get("weight")),
        weights.get("k_weight"),
        weights.get("q_bias", weights.get("bias")),
        weights.get("k_bias"),
    )
    return NormProblem(
        norm=norm._replace(after=norm.after and rotates),
        dtype=next((array.dtype for array in weights.values()), "float32"),
        strides=tuple(array.strides[0] if array else None for array in arrays),  # type: ignore[arg-type]
        alignments=tuple(array.alignment if array else ACCESS_BYTES for array in arrays),  # type: ignore[arg-type]
    )
