"""The caches of a problem, their slots and their scales. Pure."""

from __future__ import annotations

from ..memory import FLOATS, FLOATS_8, ArraySpec
from ..options import Cache, Options
from .arrays import check_dtype, check_written
from .records import MAX_ROWS, MAX_TENSORS, BSHDView, CacheProblem, View


def cache_view(
    name: str, cache: ArraySpec, x: ArraySpec, view: BSHDView, options: Cache
) -> BSHDView:
    """Check a cache; return it seen as (blocks, places in a block, heads, head_dim)."""
    *_, num_heads, head_dim = view.shape
    check_dtype(name, cache, ("uint8", options.dtype) if options.dtype else (x.dtype, *FLOATS_8))
    shape, strides = cache.shape, cache.strides
    if len(shape) == 2:  # (slots, heads * head_dim)
        if shape[1] != num_heads * head_dim:
            raise ValueError(
                f"{name} must have the shape (slots, {num_heads * head_dim}), got {shape}"
            )
        shape = shape[0], num_heads, head_dim
        strides = strides[0], head_dim * strides[1], strides[1]
    heads, place = (-3, -2) if options.layout == "HND" else (-2, -3)
    if len(shape) not in (3, 4) or (shape[heads], shape[-1]) != (num_heads, head_dim):
        wanted = "heads, slots, head_dim" if options.layout == "HND" else "slots, heads, head_dim"
        raise ValueError(
            f"{name} must have the shape ({wanted}) or (blocks, {wanted}), with {num_heads} heads "
            f"and head_dim {head_dim}, got {cache.shape}"
        )
    check_written(name, cache, x)
    block = (shape[0], strides[0]) if len(shape) == 4 else (1, 0)
    return BSHDView(
        (block[0], shape[place], num_heads, head_dim),
        (block[1], strides[place], strides[heads], strides[-1]),
    )


def cache_problem(
    given: dict[str, ArraySpec],
    dtype: str,
    tokens: tuple[int, int],
    outs: tuple[ArraySpec, ...],
    out_views: list[BSHDView],
    options: Options,
) -> CacheProblem | None:
    """Check the slots and the scales of caches; return where and how they are written."""
    if options.cache is None:
        return None
    caches, sizes = outs[1:3], [view.shape[:2] for view in out_views[1:3]]
    if sizes[0] != sizes[1] or caches[0].dtype != caches[1].dtype:
        raise ValueError(
            f"v_cache must have k_cache's blocks, block size and dtype, {sizes[0]} of "
            f"{caches[0].dtype}, got {sizes[1]} of {caches[1].dtype}"
        )
    num_blocks, block_size = sizes[0]
    if num_blocks * block_size > MAX_ROWS:
        raise ValueError(
            f"k_cache must have at most {MAX_ROWS} slots, got {num_blocks * block_size}"
        )
    slots = given["slot_mapping"]
    check_dtype("slot_mapping", slots, ("int32", "int64"))
    batches, num_slots = slots.shape[:-1], slots.shape[-1] if slots.shape else 0
    of_one = tokens[0] == 1 and batches in ((), (1,)) and slots.shape and num_slots <= tokens[1]
    if slots.shape != tokens and not of_one:
        raise ValueError(
            f"slot_mapping must have the shape {tokens}, one for each token, or {tokens[1:]} or "
            f"fewer of one batch, got {slots.shape}"
        )
    token_stride = slots.strides[-1] if num_slots > 1 or num_slots == tokens[1] else 1
    if num_slots < tokens[1] and token_stride < 1:
        raise ValueError(
            f"slot_mapping must have a positive stride with fewer slots than tokens, got "
            f"{token_stride}"
        )
    element = options.cache.dtype or caches[0].dtype
    scales = {name: given[name] for name in ("k_scale", "v_scale") if name in given}
    for name in ("k_scale", "v_scale"):
        if name in scales:
            first = next(iter(scales))
            check_dtype(name, given[name], FLOATS)
            if given[name].dtype != given[first].dtype:
                raise TypeError(
                    f"{name} must have {first}'s dtype {given[first].dtype}, got "
                    f"{given[name].dtype}"
                )
            if given[name].shape not in ((), (1,)):
                raise ValueError(f"{name} must be of one element, got shape {given[name].shape}")
        if element == dtype and (name in given or getattr(options.cache, name) != 1):
            raise ValueError(f"{name} must be None or 1 with a cache of {dtype}, got a scale")
    return CacheProblem(
        dtype=element,
        slot_dtype=slots.dtype,
        slot_strides=(slots.strides[0] if len(slots.shape) == 2 else 0, token_stride),
        num_tokens=num_slots,
        scale_dtype=next((array.dtype for array in scales.values()), "float32"),
        num_blocks=num_blocks,
        block_size=block_size,
        scales=(options.cache.k_scale, options.cache.v_scale),
        k_out=View(out_views[3].strides, outs[3].alignment) if len(outs) > MAX_TENSORS else None,
    )
