"""The positions of tokens: checks of the arrays that tell them, and where they lie. Pure."""

from __future__ import annotations

from ..memory import ArraySpec
from ..options import NUM_AXES, Options
from .arrays import check_dtype
from .records import GIVEN, IMPLICIT, INTERLEAVED_MROPE, MAX_ROWS, OFFSET, PACKED, SECTIONED_MROPE


def position_kind(
    given: dict[str, ArraySpec],
    batch: int,
    num_tokens: int,
    num_pairs: int,
    options: Options,
) -> str:
    """Check the arrays that tell the positions of tokens; return the kind of positions."""
    for name, array in given.items():
        check_dtype(name, array, ("int32", "int64"))
    sections = options.mrope_section
    if sections is not None:
        if "positions" not in given:
            raise ValueError(
                f"positions must be an array for three axes with mrope_section={sections}, got none"
            )
        if sum(sections) != num_pairs:
            raise ValueError(
                f"mrope_section must add up to the {num_pairs} pairs of the table, got {sections}"
            )
        if options.mrope_interleaved:
            _check_interleaved(sections, num_pairs)
    if "positions" in given:
        _check_positions(given["positions"].shape, batch, num_tokens, sections is not None)
        if sections is None:
            return GIVEN
        return INTERLEAVED_MROPE if options.mrope_interleaved else SECTIONED_MROPE
    offsets = given.get("seqlen_offsets")
    if "cu_seqlens" not in given:
        if offsets is None:
            return IMPLICIT
        if offsets.shape != (batch,):
            raise ValueError(
                f"seqlen_offsets must have the shape {(batch,)}, one for each batch, got "
                f"{offsets.shape}{_of_a_number(offsets.shape)}"
            )
        return OFFSET
    shape = given["cu_seqlens"].shape
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"cu_seqlens must have the shape (sequences + 1,), got {shape}")
    if shape[0] > MAX_ROWS:
        raise ValueError(f"cu_seqlens must be of at most {MAX_ROWS - 1} sequences, got {shape}")
    if batch != 1:
        raise ValueError(f"cu_seqlens must be None with a batch of {batch}, got an array")
    if offsets is not None and offsets.shape != (shape[0] - 1,):
        raise ValueError(
            f"seqlen_offsets must have the shape {(shape[0] - 1,)}, one for each sequence, got "
            f"{offsets.shape}"
        )
    return PACKED


def _of_a_number(shape: tuple[int, ...]) -> str:
    return "" if shape else ": one number for all must be an int"


def _check_interleaved(sections: tuple[int, int, int], num_pairs: int) -> None:
    """Refuse more pairs of an axis than there are: every third pair is of the same axis."""
    for axis, most in ((1, (num_pairs + 1) // 3), (2, num_pairs // 3)):
        if sections[axis] > most:
            raise ValueError(
                f"mrope_section must have at most {most} pairs of axis {axis}, every third one of "
                f"{num_pairs}, with mrope_interleaved=True, got {sections}"
            )


def _check_positions(shape: tuple[int, ...], batch: int, num_tokens: int, of_axes: bool) -> None:
    """Refuse explicit positions of another shape, or of one that has two meanings."""
    axes = (NUM_AXES,) if of_axes else ()
    if of_axes and batch == NUM_AXES and shape == (NUM_AXES, num_tokens):
        raise ValueError(
            f"positions must have the shape {(NUM_AXES, 1, num_tokens)} of three axes or "
            f"{(NUM_AXES, batch, num_tokens)} of axes and batches where there are {batch} batches, "
            f"got {shape}, which could be either's"
        )
    if shape not in (
        (*axes, num_tokens),
        (*axes, 1, num_tokens),
        (*axes, batch, num_tokens),
    ):
        hint = _of_a_number(shape)
        if not of_axes and shape[:1] == (NUM_AXES,):
            hint = ": for positions on three axes (M-RoPE) pass mrope_section"
        raise ValueError(
            f"positions must have the shape {(*axes, num_tokens)}, one for each token"
            f"{' and axis' if of_axes else ''}, or {(*axes, batch, num_tokens)}, got {shape}{hint}"
        )


def position_strides(kind: str, positions: ArraySpec | None) -> tuple[int, int]:
    """Return the strides of positions, or of offsets, over batch and token."""
    if positions is None or kind == PACKED:
        return 0, 0
    if kind == OFFSET:
        return positions.strides[0], 0
    by_batch = len(positions.shape) > (1 if kind == GIVEN else 2)
    return positions.strides[-2] if by_batch else 0, positions.strides[-1]


def section_ends(options: Options) -> tuple[int, int]:
    """Return where the first two sections end, or, interleaved, the second and the third axis."""
    if options.mrope_section is None:
        return 0, 0
    first, second, third = options.mrope_section
    if options.mrope_interleaved:
        return NUM_AXES * second, NUM_AXES * third
    return first, first + second
