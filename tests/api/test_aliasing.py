"""Shared memory: what may be rotated in place, and what is refused before a byte is written.

Every array is a NumPy view of one buffer; as torch tensors the same views share the same buffer.
"""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from reference import check, rotate

from rope_cupy import apply_rotary, apply_rotary_qk

WRAP = {"numpy": lambda array: array, "torch": torch.from_numpy}
B, S, H, D = 2, 5, 3, 8
RNG = np.random.default_rng(21)
ANGLES = RNG.uniform(0, 7, (S, D // 2)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)


@pytest.fixture(params=WRAP)
def wrap(request):
    return WRAP[request.param]


def fresh(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def exact(x, cos=COS, sin=SIN):
    x, cos, sin = (np.asarray(array, np.float64) for array in (x, cos, sin))
    return rotate(x.reshape(-1, *x.shape[-3:]), cos, sin).reshape(x.shape)


def tables(wrap, cos=COS, sin=SIN):
    return wrap(cos), wrap(sin)


def assert_refused(buffer, outputs, function, *args, **kwargs):
    before = buffer.tobytes()
    with pytest.raises(ValueError, match=rf"^({outputs}) must .*(overlap|share|alias).*, got "):
        function(*args, **kwargs)
    assert buffer.tobytes() == before


# What is accepted.

PACKED = {
    "q, k, v side by side": ((B, S, 3, H, D), lambda qkv, part: qkv[:, :, part]),
    "q, k, v of each head": ((B, S, H, 3, D), lambda qkv, part: qkv[..., part, :]),
    "q, k, v of each element": ((B, S, H, D, 3), lambda qkv, part: qkv[..., part]),
    "q, k, v one after another": ((3, B, S, H, D), lambda qkv, part: qkv[part]),
    "q, k, v of each token": ((B, 3 * S, H, D), lambda qkv, part: qkv[:, part::3]),
    "more heads of q": (
        (B, S, 4 * H, D),
        lambda qkv, part: qkv[:, :, slice(part and (part + 1) * H, (part + 2) * H)],
    ),
    "elements apart": ((B, S, H, 3 * D), lambda qkv, part: qkv[..., part::3]),
}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_qkv_is_rotated_in_place_and_v_is_left_alone(packing, wrap):
    shape, part_of = PACKED[packing]
    buffer = fresh(*shape)
    before = buffer.copy()
    q, k = wrap(part_of(buffer, 0)), wrap(part_of(buffer, 1))
    results = apply_rotary_qk(q, k, tables(wrap), out=(q, k))
    assert results[0] is q and results[1] is k
    for part in (0, 1):
        check(np.float64(part_of(buffer, part)), exact(part_of(before, part)), "float32")
    assert part_of(buffer, 2).tobytes() == part_of(before, 2).tobytes()


def test_packed_qkv_with_the_heads_in_one_axis_is_rotated_in_place(wrap):
    buffer = fresh(B, S, (H + 2 * 1) * D)
    before = buffer.copy()
    widths = slice(0, H * D), slice(H * D, (H + 1) * D)
    q, k = (wrap(buffer[..., width]) for width in widths)
    apply_rotary_qk(q, k, tables(wrap), head_dim=D, out=(q, k))
    for width in widths:
        heads = exact(before[..., width].reshape(B, S, -1, D))
        check(np.float64(buffer[..., width]), heads.reshape(B, S, -1), "float32")
    assert buffer[..., -D:].tobytes() == before[..., -D:].tobytes()


def test_another_view_of_exactly_x_is_in_place(wrap):
    buffer = fresh(S, 2 * H, D)
    expected, untouched = exact(buffer[:, ::2]), buffer[:, 1::2].copy()
    out = wrap(buffer[:, ::2])
    assert apply_rotary(wrap(buffer[:, ::2]), tables(wrap), out=out) is out
    check(np.float64(buffer[:, ::2]), expected, "float32")
    assert np.array_equal(buffer[:, 1::2], untouched)


def test_q_and_k_may_be_one_array_out_of_place(wrap):
    x = fresh(S, H, D)
    for rotated in apply_rotary_qk(wrap(x), wrap(x), tables(wrap)):
        check(np.float64(rotated), exact(x), "float32")


def test_one_of_q_and_k_may_be_in_place(wrap):
    q, k, k_out = fresh(S, H, D), fresh(S, 1, D), fresh(S, 1, D)
    expected = exact(q), exact(k)
    apply_rotary_qk(wrap(q), wrap(k), tables(wrap), out=(wrap(q), wrap(k_out)))
    check(np.float64(q), expected[0], "float32")
    check(np.float64(k_out), expected[1], "float32")


DISJOINT = {
    "heads": lambda buffer: (buffer[:S, :H, :D], buffer[:S, H:, :D]),
    "every other head": lambda buffer: (buffer[:S, ::2, :D], buffer[:S, 1::2, :D]),
    "tokens": lambda buffer: (buffer[:S, :H, :D], buffer[S:, :H, :D]),
    "every other token": lambda buffer: (buffer[::2, :H, :D], buffer[1::2, H:, D:]),
    "halves of the head": lambda buffer: (buffer[:S, :H, :D], buffer[:S, :H, D:]),
    "every other element": lambda buffer: (buffer[:S, :H, 1::2], buffer[:S, :H, ::2]),
    "a staircase": lambda buffer: (buffer[:S, :H, :D], buffer[1 : S + 1, H:, :D]),
}


@pytest.mark.parametrize("views", DISJOINT)
def test_an_output_between_the_elements_of_x_is_written(views, wrap):
    buffer = fresh(2 * S, 2 * H, 2 * D)
    x, out = DISJOINT[views](buffer)
    before = buffer.copy()
    apply_rotary(wrap(x), tables(wrap), out=wrap(out))
    check(np.float64(out), exact(DISJOINT[views](before)[0]), "float32")
    out[:] = DISJOINT[views](before)[1]
    assert np.array_equal(buffer, before)


def test_a_table_and_positions_within_the_rows_of_x_do_not_overlap_it(wrap):
    fields = [("x", "f4", (H, D)), ("cos", "f4", D // 2), ("sin", "f4", D // 2), ("row", "i4")]
    records = np.zeros(S, fields)
    records["x"], records["cos"], records["sin"] = fresh(S, H, D), COS, SIN
    records["row"] = order = RNG.permutation(S)
    before = records.copy()
    x, cos, sin, row = (wrap(records[name]) for name in ("x", "cos", "sin", "row"))
    apply_rotary(x, (cos, sin), positions=row, out=x)
    check(np.float64(records["x"]), exact(before["x"], COS[order], SIN[order]), "float32")
    assert all(np.array_equal(records[name], before[name]) for name in ("cos", "sin", "row"))


@pytest.mark.parametrize("axis", range(3))
def test_an_input_may_repeat_itself(axis, wrap):
    row = fresh(*(1 if index == axis else size for index, size in enumerate((S, H, D))))
    strides = [0 if index == axis else stride for index, stride in enumerate(row.strides)]
    x = as_strided(row, (S, H, D), strides)
    check(np.float64(apply_rotary(wrap(x), tables(wrap))), exact(x), "float32")


@pytest.mark.parametrize("shape", [(0, H, D), (S, 0, D), (S, 0, 0, D)], ids=str)
def test_an_empty_array_overlaps_nothing(shape, wrap):
    buffer = wrap(fresh(S, H, D))
    x = buffer.reshape(-1)[:0].reshape(shape)
    assert apply_rotary(x, tables(wrap)).shape == shape
    assert apply_rotary(x, tables(wrap), out=x) is x
    assert apply_rotary_qk(x, x, tables(wrap), out=(x, x))[1] is x


# What is refused.

OVERLAPS = {
    "a token later": lambda buffer: (buffer[:S, :H, :D], buffer[1 : S + 1, :H, :D]),
    "a token earlier": lambda buffer: (buffer[1 : S + 1, :H, :D], buffer[:S, :H, :D]),
    "a head later": lambda buffer: (buffer[:S, :H, :D], buffer[:S, 1 : H + 1, :D]),
    "an element later": lambda buffer: (buffer[:S, :H, :D], buffer[:S, :H, 1 : D + 1]),
    "every other token": lambda buffer: (buffer[:S, :H, :D], buffer[::2, :H, :D]),
    "one element": lambda buffer: (buffer[:S, :H, :D], buffer[S - 1 : -1, H - 1 : -1, D - 1 : -1]),
    "tokens and heads exchanged": lambda buffer: (
        buffer[:S, :S, :D],
        buffer[:S, :S, :D].swapaxes(0, 1),
    ),
    "heads and elements exchanged": lambda buffer: (
        buffer[:S, : 2 * H, : 2 * H],
        buffer[:S, : 2 * H, : 2 * H].swapaxes(1, 2),
    ),
}


@pytest.mark.parametrize("views", OVERLAPS)
def test_an_output_over_a_part_of_x_is_refused(views, wrap):
    buffer = fresh(2 * S, 2 * H, 2 * D)
    x, out = (wrap(view) for view in OVERLAPS[views](buffer))
    table = tables(wrap, COS[:, :3], SIN[:, :3])
    assert_refused(buffer, "out", apply_rotary, x, table, out=out)
    k = wrap(fresh(*x.shape))
    assert_refused(buffer, "q_out", apply_rotary_qk, x, k, table, out=(out, k))
    assert_refused(buffer, "k_out", apply_rotary_qk, k, x, table, out=(k, out))


@pytest.mark.parametrize("axis", range(3))
def test_a_reversed_view_of_x_is_refused_as_out(axis):
    x = fresh(S, H, D)
    assert_refused(x, "out", apply_rotary, x, (COS, SIN), out=np.flip(x, axis))


@pytest.mark.parametrize(
    "strides",
    [(0, D, 1), (H * D, 0, 1), (H * D, D, 0), (H * D - 1, D, 1), (H * D, D - 1, 1), (1, 1, 1)],
)
def test_an_output_that_overlaps_itself_is_refused(strides, wrap):
    buffer, x = fresh(S, H, D), wrap(fresh(S, H, D))
    out = wrap(as_strided(buffer, (S, H, D), [4 * stride for stride in strides]))
    for source in (x, out):
        assert_refused(buffer, "out", apply_rotary, source, tables(wrap), out=out)
    outs = wrap(fresh(S, H, D)), out
    assert_refused(buffer, "k_out", apply_rotary_qk, x, x, tables(wrap), out=outs)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("part", ["cos", "sin", "positions"])
def test_an_output_over_the_table_or_the_positions_is_refused(part, in_place, wrap):
    buffer = np.zeros((S, H, D), np.float32)
    shared = buffer[:, 1, 2 : 2 + D // 2]
    cos, sin = wrap(shared if part == "cos" else COS), wrap(shared if part == "sin" else SIN)
    rows = buffer.view(np.int32)[:, 2, 5] if part == "positions" else np.arange(S)
    out = wrap(buffer)
    x = out if in_place else wrap(fresh(S, H, D))
    call = {"table": (cos, sin), "positions": wrap(rows)}
    assert_refused(buffer, "out", apply_rotary, x, out=out, **call)
    other = wrap(fresh(S, H, D))
    assert_refused(buffer, "k_out", apply_rotary_qk, other, x, out=(other, out), **call)


@pytest.mark.parametrize("name", ["seqlen_offsets", "cu_seqlens"])
def test_an_output_over_what_counts_tokens_is_refused(name, wrap):
    buffer = np.zeros((1, S, H, D), np.float32)
    out, memory = wrap(buffer), buffer.view(np.int32)
    rows = memory[0, :2, 0, 0] if name == "cu_seqlens" else memory[:, 1, 0, 0]
    call = {"table": tables(wrap), name: wrap(rows)}
    assert_refused(buffer, "out", apply_rotary, out, out=out, **call)
    assert_refused(buffer, "out", apply_rotary, wrap(fresh(1, S, H, D)), out=out, **call)


def test_outputs_over_the_other_input_or_the_other_output_are_refused(wrap):
    buffer = fresh(3, S, H, D)
    q, k, other = (wrap(part) for part in buffer)
    table = tables(wrap)
    for q_in, k_in, *out in [
        (q, k, k, q),
        (q, k, k, other),
        (q, k, other, q),
        (q, k, other, other),
        (q, q, q, q),
        (q, q, q, other),
        (q, q, other, q),
    ]:
        outputs = "q_out|k_out"
        assert_refused(buffer, outputs, apply_rotary_qk, q_in, k_in, table, out=tuple(out))


def views_at_random(buffer, count):
    """Views of a buffer of (10, 6, 16), each (5, 3, 8), whose steps and starts are drawn."""
    for _ in range(count):
        steps = RNG.integers(1, 3, 3)
        room = np.array(buffer.shape) - (np.array((S, H, D)) - 1) * steps
        yield buffer[
            tuple(
                slice(start, start + step * size, step)
                for start, step, size in zip(RNG.integers(0, room), steps, (S, H, D), strict=True)
            )
        ]


def test_an_output_is_refused_where_it_shares_an_element_and_only_there(wrap):
    buffer = fresh(2 * S, 2 * H, 2 * D)
    outcomes = set()
    for x, out in zip(views_at_random(buffer, 300), views_at_random(buffer, 300), strict=True):
        same = (x.ctypes.data, x.strides) == (out.ctypes.data, out.strides)
        outcomes.add(outcome := "same" if same else np.shares_memory(x, out))
        if outcome is True:
            assert_refused(buffer, "out", apply_rotary, wrap(x), tables(wrap), out=wrap(out))
        else:
            expected = exact(x)
            apply_rotary(wrap(x), tables(wrap), out=wrap(out))
            check(np.float64(out), expected, "float32")
    assert outcomes == {True, False, "same"}
