"""Joining several streams of tokens, such as text and image, into one q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import dispatch
from .checks import described
from .choices import Layout, NormKind, OutOfRange, Rounding, RoundNorm
from .fused import norm_arrays, norm_of
from .options import QKV, WITHOUT_TABLE, Options

MAX_STREAMS = 3
NORM_ARRAYS = 5  # where a Stream's weights and biases begin


class Stream(NamedTuple):
    """The q, k and v of some tokens, and the arrays that normalise and rotate them.

    Attributes:
        q, k, v: arrays as for `apply_rotary_qk`, of the same tokens.
        table: a `RotaryTable`, a tuple (cos, sin), or None for a stream that is not rotated.
        positions, q_weight, k_weight, q_bias, k_bias: as for `apply_qk_norm_rotary`.
    """

    q: Any
    k: Any
    v: Any
    table: Any = None
    positions: Any = None
    q_weight: Any = None
    k_weight: Any = None
    q_bias: Any = None
    k_bias: Any = None


def join_qkv(
    streams: Sequence[Stream],
    *,
    norm: NormKind | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_norm: RoundNorm = True,
    norm_after: bool = False,
    interleaved: bool | None = None,
    layout: Layout | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Any, Any, Any] | None = None,
    out_of_range: OutOfRange = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: Rounding = "once",
) -> tuple[Any, Any, Any]:
    """Rotate up to three streams of tokens and concatenate them, in one launch.

    The heads of q and k of each stream are normalised and rotated, and v is copied. Models with a
    joint attention over text and image do this by norms, rotations and `torch.cat`.

    Args:
        streams: one to three `Stream`, in the order of their tokens in the results. They share a
            dtype and all sizes but the number of tokens.
        norm, eps, weight_offset, round_norm, norm_after: as for `apply_qk_norm_rotary`, for all
            streams. Where `norm` is None, "head" normalises the streams that have weights.
        out: None for new arrays, or a tuple of three arrays (q, k, v) to write, of all tokens.
        all others: as for `apply_rotary_qk`, for all streams.

    Returns:
        (q, k, v): new dense arrays of the libraries of the first stream's, with its axes and the
        tokens of all streams; or `out`.

    Errors are as for `apply_rotary_qk`, and messages name the stream. PyTorch records gradients of
    q, k, v, weights and biases for new arrays, and compiles a call as one operator.

    Streams take a launch each if their tables differ in form or dtype, or their positions in kind.

    >>> import numpy as np
    >>> text, image = (np.ones((3, 1, tokens, 8, 64), np.float32) for tokens in (7, 16))
    >>> angles = np.outer(np.arange(23), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> table = np.cos(angles), np.sin(angles)
    >>> q, k, v = join_qkv([Stream(*text, table), Stream(*image, table, positions=7)])
    >>> q.shape, v.shape
    ((1, 23, 8, 64), (1, 23, 8, 64))
    """
    _check(streams, out)
    options = (
        interleaved,
        layout,
        head_dim,
        rotary_offset,
        conjugate,
        out_of_range,
        mrope_section,
        mrope_interleaved,
        rounding,
    )
    named = zip(Options._fields, options, strict=False)
    without_table = tuple([WITHOUT_TABLE.get(name, option) for name, option in named])
    of_norms = [norm_arrays(*stream[NORM_ARRAYS:]) for stream in streams]
    has_norm = norm is not None or any([names for names, _ in of_norms])
    calls = []
    for (q, k, v, table, positions, *_), extra in zip(streams, of_norms, strict=True):
        of_norm = None
        if norm is not None or extra[0] or not has_norm:
            of_norm = norm_of(norm, eps, weight_offset, round_norm, norm_after, extra)
        parts = of_norm, None, None
        rows, own = (positions, None, None), without_table if table is None else options
        calls.append((QKV, (q, k, v), table, rows, own, None, extra, parts))
    q_joint, k_joint, v_joint = dispatch.join(tuple(calls), out)
    return q_joint, k_joint, v_joint


def _check(streams: Any, out: Any) -> None:
    if not isinstance(streams, tuple | list) or isinstance(streams, Stream):
        raise TypeError(f"streams must be a list or a tuple of Stream, got {described(streams)}")
    if not 1 <= len(streams) <= MAX_STREAMS:
        raise ValueError(f"streams must be one to {MAX_STREAMS}, got {len(streams)}")
    for i, stream in enumerate(streams):
        if not isinstance(stream, Stream):
            raise TypeError(f"streams[{i}] must be a Stream, got {described(stream)}")
    if out is not None and not (isinstance(out, tuple) and len(out) == len(QKV)):
        raise TypeError(f"out must be None or a tuple of three arrays, got {described(out)}")
