"""The table of a problem: checks of its shape, and where its rows lie. Pure."""

from __future__ import annotations

from ..memory import ArraySpec
from .records import MATRICES, NO_TABLE, TableSpec, View


def check_rotary_dim(table: TableSpec, head_dim: int, offset: int) -> int:
    """Return how many elements of a head are rotated; they must fit the head at their offset."""
    if table.form == NO_TABLE:
        if not head_dim:
            raise ValueError("head_dim must be 1 or more without a table, got 0")
        return 0
    rotary_dim = 2 * table.shape[-1]
    if not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"table must have a rotary_dim in (0, head_dim={head_dim}], got {rotary_dim}: if it "
            "holds every angle twice, take RotaryTable.from_full_width, else one made for this "
            "head_dim"
        )
    if not 0 <= offset <= head_dim - rotary_dim:
        raise ValueError(
            f"rotary_offset must be in [0, head_dim - rotary_dim = {head_dim - rotary_dim}], got "
            f"{offset}"
        )
    return rotary_dim


def check_table(
    table: TableSpec,
    batch: int,
    num_tokens: int,
    num_heads: tuple[int, ...],
    positions: dict[str, ArraySpec],
) -> None:
    """Refuse a table by batch and token (and head) that does not match the tensors."""
    shape = table.shape
    if table.form == NO_TABLE:
        for name, array in positions.items():
            raise ValueError(
                f"{name} must be None without a table, got an array of shape {array.shape}"
            )
    if len(shape) == 2:
        return
    for name, array in positions.items():
        raise ValueError(
            f"{name} must be None or an int with a table by batch and token, {shape}, got an array "
            f"of shape {array.shape}: for an array, make a table by position, as of cos[0], sin[0]"
        )
    if shape[0] not in (1, batch) or (shape[1] != 1 and shape[1] < num_tokens):
        raise ValueError(
            f"table must have the shape ({batch} or 1, {num_tokens} or more, or 1, ...) of batch "
            f"and tokens, got {shape}: if its axes are others, name them, such as axes='sh' for "
            "tokens and heads"
        )
    rotated = num_heads[:2]  # v is not
    if len(shape) == 4 and any(shape[2] == 0 or heads % shape[2] for heads in rotated):
        raise ValueError(
            "table must have 1 head, or a number that divides those of every tensor, "
            f"{' and '.join(map(str, rotated))}, got {shape[2]} heads in shape {shape}: "
            "if its tokens are on axis 2, as of EmbedND's (batch, 1, tokens, ...), pass freqs[:, 0]"
        )


def table_view(table: ArraySpec, form: str, by_position: bool) -> View:
    """Return the strides of cosines or sines; a row that is found by its position has none."""
    *rows, pair = table.strides[:-1] if form == MATRICES else table.strides
    strides = (0, 0 if by_position else rows[0], 0) if len(rows) == 1 else (*rows, 0)[:3]
    return View((*strides, pair), table.alignment)  # type: ignore[arg-type]


def needs_start(table: TableSpec, num_tokens: int) -> bool:
    """Return whether a table by batch and token has others than the tokens that there are."""
    return len(table.shape) > 2 and table.shape[1] not in (1, num_tokens)


def implicit_position(positions: int | None, table: TableSpec, num_tokens: int) -> int:
    """Return the position of the first token; refuse positions that the table does not hold."""
    shape = table.shape
    if table.form == NO_TABLE and positions is not None:
        raise ValueError(f"positions must be None without a table, got {positions}")
    by_token = len(shape) > 2
    if by_token and positions is None:
        if needs_start(table, num_tokens):
            raise ValueError(
                f"table must have a row for each of {num_tokens} tokens, or one for all, or an int "
                f"positions must say which row is the first token's, got {shape[1]} rows in "
                f"{shape}: if axis 1 of q is heads, layout='bhsd' says so"
            )
        return 0
    first = positions or 0
    if first < 0:
        raise ValueError(f"positions must be 0 or more where they are an int, got {first}")
    size = shape[1] if by_token else shape[0]
    if by_token and size == 1 and not first:  # which stands for all tokens
        return 0
    if num_tokens and first + num_tokens > size:
        wanted = f"the positions {first} to {first + num_tokens - 1} of the {num_tokens} tokens"
        if num_tokens == 1:
            wanted = f"the position {first} of the token"
        if by_token:
            raise ValueError(f"table must hold {wanted}, got {size} tokens")
        raise ValueError(
            f"table must hold {wanted}, got {size} positions: make a longer one, or one with "
            "precompute=False"
        )
    return first
