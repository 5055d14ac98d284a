"""RowOrder: how the rows of a launch, each a head of a token, are numbered. Pure."""

from __future__ import annotations

from typing import NamedTuple

from .choices import TOKEN_NORM
from .problem import FREQUENCY, ONE_ANGLE, RotaryProblem

BATCH, TOKEN, HEAD = 0, 1, 2  # axes
L2_BYTES = 2**23  # of a table that stays in the L2 while other data passes through
TILE_BYTES = L2_BYTES // 2  # of a table, at most
MIN_TILE = 256  # tokens; with fewer, a head would lie in pieces


class RowOrder(NamedTuple):
    """The order in which rows are numbered: over an outer, a middle and an inner axis."""

    axes: tuple[int, int, int]
    tile: int  # all heads pass this many tokens before the next ones; 0 for all tokens

    def strides(self, strides: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the strides of the three axes from those of batch, tokens and heads."""
        if self.tile:
            return self.tile * strides[TOKEN], strides[HEAD], strides[TOKEN]
        outer, middle, inner = (strides[axis] for axis in self.axes)
        return outer, middle, inner

    def sizes(self, batch: int, num_tokens: int, num_heads: int) -> tuple[int, int, int]:
        """Return the sizes of the three axes."""
        if self.tile:
            return num_tokens // self.tile, batch * num_heads, self.tile
        outer, middle, inner = ((batch, num_tokens, num_heads)[axis] for axis in self.axes)
        return outer, middle, inner


def row_order(problem: RotaryProblem) -> RowOrder:
    """Number rows as they lie in memory, the widest stride first; or by tiles of tokens."""
    strides = problem.tensors[0].x.strides
    sizes = problem.batch, problem.num_tokens, max(t.num_heads for t in problem.tensors)
    outer, middle, inner = sorted(
        range(3), key=lambda axis: (sizes[axis] != 1, -abs(strides[axis]))
    )
    if problem.norm_kind == TOKEN_NORM:
        outer, middle, inner = (*(axis for axis in (outer, middle, inner) if axis != HEAD), HEAD)
    return RowOrder((outer, middle, inner), _tile(problem) if inner == TOKEN else 0)


def _tile(problem: RotaryProblem) -> int:
    """Return how many tokens at a time all heads should pass, 0 for all of them.

    Where a head's tokens lie beside each other, every head reads the whole table: a large one would
    come from memory every time, and a tile of it stays in the L2. Only where a batch's heads follow
    on those of the batch before, and have the same angles, so that both count as heads.
    """
    is_whole = problem.sin_offset or problem.table_form != ONE_ANGLE
    row_bytes = problem.rotary_dim // 2 * problem.pair_bytes * (1 if is_whole else 2)
    is_small = problem.num_tokens < 2 or problem.num_tokens * row_bytes <= L2_BYTES
    if is_small or problem.table_dtype == FREQUENCY:
        return 0
    by_token = _strides_by_token(problem)
    views = [
        (tensor.num_heads, strides)
        for i, tensor in enumerate(problem.tensors)
        for strides in (tensor.x.strides, out_strides(problem, i))
    ]
    if problem.k_out:
        views.append((problem.tensors[1].num_heads, problem.k_out.strides))
    follow_on = problem.batch == 1 or (
        all(strides[BATCH] == num_heads * strides[HEAD] for num_heads, strides in views)
        and not any(strides[BATCH] for strides in by_token)
    )
    if not follow_on or any(each[HEAD] for each in by_token):
        return 0
    widest = max(abs(strides[TOKEN]) for strides in (*by_token, *(each[1] for each in views)))
    in_32_bits = (2**31 - 1) // max(1, widest)  # tokens, so that offsets within a tile fit
    most = min(TILE_BYTES // row_bytes, in_32_bits)
    tiles = range(most, MIN_TILE - 1, -1)
    return next((tile for tile in tiles if problem.num_tokens % tile == 0), 0)


def _strides_by_token(problem: RotaryProblem) -> list[tuple[int, ...]]:
    """Return the strides over batch, token and head of every array but tensors, read by token."""
    pairs = [problem.position_strides, *([problem.cache.slot_strides] if problem.cache else [])]
    return [problem.cos.strides, problem.sin.strides, *((*pair, 0) for pair in pairs)]


def out_strides(problem: RotaryProblem, i: int) -> tuple[int, ...]:
    """Return the strides by which a tensor is written; the kernel finds a slot's place itself."""
    strides = problem.tensors[i].out.strides
    return (0, 0, strides[HEAD]) if problem.cache and i else strides
