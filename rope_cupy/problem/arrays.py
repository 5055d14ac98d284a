"""Checks that arrays of every kind have in common, and what outputs are called. Pure."""

from __future__ import annotations

from ..memory import ITEMSIZE, ArraySpec, may_overlap_itself
from ..options import Options

OF_CACHES = "q_out", "k_cache", "v_cache", "k_out"  # outputs beside caches, the last one if asked


def check_dtype(name: str, x: ArraySpec, dtypes: tuple[str, ...]) -> None:
    """Refuse an array of another dtype."""
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(dtypes)}, got {x.dtype}")


def check_alignment(name: str, array: ArraySpec) -> None:
    """Refuse an address between two elements, which a GPU cannot read."""
    itemsize = ITEMSIZE[array.dtype]
    if array.device != "cpu" and array.alignment < itemsize:
        raise ValueError(
            f"{name} must begin at a multiple of its {itemsize} bytes an element on a GPU, got one "
            f"of {array.alignment}"
        )


def check_device(name: str, array: ArraySpec, x_name: str, x: ArraySpec) -> None:
    """Refuse an array that is not where the input is."""
    if array.device != x.device:
        raise ValueError(f"{name} must be on {x_name}'s device {x.device}, got {array.device}")


def check_out(name: str, out: ArraySpec, x: ArraySpec) -> None:
    """Refuse an output that does not match its input."""
    if out.dtype != x.dtype:
        raise TypeError(f"{name} must have its input's dtype {x.dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"{name} must have its input's shape {x.shape}, got {out.shape}")
    check_written(name, out, x)


def check_written(name: str, out: ArraySpec, x: ArraySpec) -> None:
    """Refuse an array that cannot be written, or would be written twice in one place."""
    if out.device != x.device:
        raise ValueError(f"{name} must be on its input's device {x.device}, got {out.device}")
    if not out.writable:
        raise ValueError(
            f"{name} must be writable, or left out, got an array that is read-only or does not say"
        )
    if may_overlap_itself(out):
        raise ValueError(
            f"{name} must not overlap itself, got strides {out.strides} for shape {out.shape}"
        )


def out_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of tensors' outputs in messages."""
    if len(names) == 1 and names[0] not in ("q", "k"):  # which may be called one by one
        return ("out",)
    return tuple(f"{name}_out" for name in names)


def output_names(names: tuple[str, ...], options: Options, num_outs: int) -> tuple[str, ...]:
    """Return the names of all outputs, caches among them, in messages."""
    return OF_CACHES[:num_outs] if options.cache else out_names(names)
