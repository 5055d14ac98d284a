"""The positions of the tokens of one process, where several share a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .checks import choice, index
from .choices import SCHEMES, Scheme


def context_parallel(
    seq_len: int, rank: int, world_size: int, *, scheme: Scheme = "contiguous", like: Any = None
) -> Any:
    """Return the positions of the tokens of one process, where several share a sequence.

    - ``"contiguous"``: the sequence is cut into `world_size` pieces, and process i has piece i. As
      `positions` of `apply_rotary_qk` the int ``rank * seq_len // world_size`` does the same, and
      no array is read.
    - ``"zigzag"``: the sequence is cut into 2 `world_size` pieces, and process i has the pieces i
      and 2 world_size - 1 - i, one after the other. Under a causal mask all processes then have the
      same work. Ring attention in Megatron-LM, TransformerEngine and Llama 3's training does this.

    Where processes share the heads during attention instead (Ulysses), rotate before the exchange
    with the contiguous positions, or after it, when each has all tokens, without positions.

    Args:
        seq_len: the number of tokens of the whole sequence, a multiple of `world_size`, or of twice
            `world_size` for "zigzag".
        rank: the rank of this process, in [0, world_size).
        world_size: the number of processes that share the sequence.
        scheme: "contiguous" or "zigzag".
        like: an array whose library and device the result has; None for NumPy.

    Returns:
        An int64 array of shape (seq_len / world_size,), for the `positions` of `apply_rotary_qk`.

    Raises TypeError or ValueError if a number does not fit the others, or `scheme` is unknown.

    Source of zigzag: Llama Team, "The Llama 3 Herd of Models" (2024), section 3.3.2.

    >>> context_parallel(8, 1, 2)
    array([4, 5, 6, 7])
    >>> context_parallel(8, 1, 2, scheme="zigzag")
    array([2, 3, 4, 5])
    """
    seq_len, rank = index("seq_len", seq_len), index("rank", rank)
    world_size = index("world_size", world_size)
    if world_size <= 0:
        raise ValueError(f"world_size must be positive, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
    is_zigzag = choice("scheme", scheme, SCHEMES) == "zigzag"
    pieces = (rank, 2 * world_size - 1 - rank) if is_zigzag else (rank,)
    size, rest = divmod(seq_len, world_size * len(pieces))
    if seq_len < 0 or rest:
        raise ValueError(
            f"seq_len must be a multiple of {world_size * len(pieces)}, the pieces that "
            f"{world_size} processes have, got {seq_len}"
        )
    mine = np.concatenate([np.arange(i * size, (i + 1) * size) for i in pieces])
    mine = mine.astype(np.int64)
    return mine if like is None else arrays.placed(mine, like)
