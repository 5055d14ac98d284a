"""Positions of the tokens that a process has, and that rotating by them is rotating the whole."""

import numpy as np
import pytest
import torch

from rope_cupy import RotaryTable, apply_rotary_qk
from rope_cupy.frequencies import inverse_frequencies
from rope_cupy.positions import context_parallel

TOKENS, HEADS, DIM = 48, 4, 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", ["contiguous", "zigzag"])
def test_processes_together_have_every_token_once(scheme, world_size):
    mine = [context_parallel(TOKENS, rank, world_size, scheme=scheme) for rank in range(world_size)]
    assert all(each.dtype == np.int64 and each.shape == (TOKENS // world_size,) for each in mine)
    assert sorted(np.concatenate(mine)) == [*range(TOKENS)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_under_a_causal_mask_zigzag_gives_all_the_same_work(world_size):
    # The keys that a token attends to are as many as its position says, and itself.
    work = {
        (context_parallel(TOKENS, rank, world_size, scheme="zigzag") + 1).sum()
        for rank in range(world_size)
    }
    assert len(work) == 1


def test_a_contiguous_piece_is_an_int_of_positions():
    for rank in range(4):
        mine = context_parallel(TOKENS, rank, 4)
        assert [*mine] == [*range(rank * TOKENS // 4, (rank + 1) * TOKENS // 4)]


def whole():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, TOKENS, heads, DIM)) for heads in (HEADS, 2))
    table = RotaryTable.from_inverse_frequencies(inverse_frequencies(DIM), TOKENS, like=q)
    return q, k, table


@pytest.mark.parametrize("scheme", ["contiguous", "zigzag"])
def test_each_process_rotates_its_own_tokens_as_the_whole_is_rotated(scheme):
    q, k, table = whole()
    wanted = apply_rotary_qk(q, k, table)
    for rank in range(2):
        mine = context_parallel(TOKENS, rank, 2, scheme=scheme)
        results = apply_rotary_qk(q[:, mine], k[:, mine], table, positions=mine)
        for y, exact in zip(results, wanted, strict=True):
            assert np.array_equal(y, exact[:, mine])


def test_ulysses_may_rotate_before_or_after_the_exchange_of_tokens_for_heads():
    q, k, table = whole()
    wanted, _ = apply_rotary_qk(q, k, table)
    before = [  # each process has its tokens of all heads
        apply_rotary_qk(q[:, mine], k[:, mine], table, positions=mine)[0]
        for mine in (context_parallel(TOKENS, rank, 2) for rank in range(2))
    ]
    exchanged = np.concatenate(before, axis=1)
    for rank in range(2):  # each process has all tokens of its heads
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        after, _ = apply_rotary_qk(q[:, :, heads], k[:, :, rank : rank + 1], table)
        assert np.array_equal(exchanged[:, :, heads], after)
        assert np.array_equal(after, wanted[:, :, heads])


def test_positions_are_of_the_library_that_is_asked_for():
    mine = context_parallel(TOKENS, 1, 2, scheme="zigzag", like=torch.ones(1))
    assert isinstance(mine, torch.Tensor) and mine.dtype == torch.int64
    assert mine.tolist() == [*context_parallel(TOKENS, 1, 2, scheme="zigzag")]
    jnp = pytest.importorskip("jax.numpy")
    mine = context_parallel(TOKENS, 1, 2, like=jnp.ones(1))
    assert isinstance(mine, type(jnp.ones(1))) and [*mine] == [*range(24, 48)]


@pytest.mark.parametrize(
    ("error", "message", "bad"),
    [
        (TypeError, "seq_len must be an int, got 8.0", {"seq_len": 8.0}),
        (ValueError, "seq_len must be a multiple of 2, .* got 9", {"seq_len": 9}),
        (
            ValueError,
            "seq_len must be a multiple of 4, .* got 6",
            {"seq_len": 6, "scheme": "zigzag"},
        ),
        (ValueError, "seq_len must be a multiple of 2, .* got -2", {"seq_len": -2}),
        (ValueError, "world_size must be positive, got 0", {"world_size": 0}),
        (ValueError, r"rank must be in \[0, world_size=2\), got 2", {"rank": 2}),
        (ValueError, r"rank must be in \[0, world_size=2\), got -1", {"rank": -1}),
        (TypeError, "rank must be an int, got True", {"rank": True}),
        (ValueError, "scheme must be 'contiguous' or 'zigzag', got 'ring'", {"scheme": "ring"}),
        (TypeError, "scheme must be 'contiguous' or 'zigzag', got None", {"scheme": None}),
        (TypeError, "like must be an array", {"like": "cpu"}),
    ],
)
def test_what_gives_no_positions_is_refused(error, message, bad):
    with pytest.raises(error, match="^" + message):
        context_parallel(**{"seq_len": 8, "rank": 0, "world_size": 2} | bad)
