"""What holds for every call: hypothesis draws calls of all kinds, and makes a failing one small.

Each property is held on three ways to a result: NumPy's, the kernels' sources run on the CPU, and
the kernels on a GPU. `pytest --random-calls N` draws N calls for each way, the same ones every
time, in chunks that pytest-xdist shares out.
"""

from contextlib import nullcontext

import numpy as np
import pytest
from arrays import (
    GUARD,
    OPTIONS,
    TWO_ANGLES,
    Call,
    Case,
    Held,
    Placement,
    Strides,
    hold,
    possible,
    repeats,
    small_tiles,
    verify,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from posing import posing
from reference import FORMATS, decode, pair_norms, to_bits

import rope_cupy

CHUNK = 50
MOST_ON_THE_CPU = 16384  # elements of a call whose kernel a CPU runs, one thread after the other
STYLES = "style", "k_style", "table_style"
ON_A_GPU = {"numpy": "cupy", "torch": "torch-cuda", "dlpack": "dlpack-cuda"}
WAYS = [
    "numpy",
    "posing",  # as on a GPU, down to what the driver is handed
    *(pytest.param(way, marks=getattr(pytest.mark, way)) for way in ("host_cuda", "gpu")),
]


def pytest_generate_tests(metafunc):
    if "chunk" in metafunc.fixturenames:
        calls = metafunc.config.getoption("random_calls")
        chunks = [pytest.param(i, marks=pytest.mark.long) for i in range(-(-calls // CHUNK))]
        metafunc.parametrize("chunk", [0, *chunks[1:]])
        metafunc.parametrize("way", WAYS)


@st.composite
def strides(draw):
    """Of any kind, but each oddity seldom: one alone is what finds a mistake."""
    gaps = st.sampled_from([0, 0, 0, 0, 1, 2, 3, 8])
    seldom = st.sampled_from([False, False, False, False, True])
    return Strides(
        order=draw(st.just((0, 1, 2, 3)) | st.permutations((0, 1, 2, 3)).map(tuple)),
        gaps=draw(st.tuples(gaps, gaps, gaps, gaps)),
        backward=draw(st.tuples(seldom, seldom, seldom, seldom)),
        repeated=draw(st.tuples(seldom, seldom, seldom, seldom)),
        offset=draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 8])),
    )


@st.composite
def layouts(draw):
    """The axes in any order, with or without a batch, the last one with or without all heads."""
    axes = "".join(draw(st.permutations(draw(st.sampled_from(["bsh", "sh", "bth", "th"])))))
    return axes + "d" if not axes.endswith("h") or draw(st.booleans()) else f"{axes[:-1]}(hd)"


@st.composite
def calls(draw):
    head_dim = draw(st.sampled_from([64, 72, 80, 96, 128, 256, 512]) | st.integers(2, 512))
    pairs = draw(st.just(head_dim // 2) | st.integers(1, head_dim // 2))
    rest = head_dim - 2 * pairs
    offset = draw(st.just(0) | st.just(rest) | st.integers(0, rest))
    heads = st.integers(1, 6)
    of_q, style = draw(heads), draw(strides())
    drawn = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    drawn |= {
        "library": draw(st.sampled_from(list(ON_A_GPU))),
        "head": (head_dim, 2 * pairs, offset),
        "sizes": (
            draw(st.integers(1, 3)),
            draw(st.integers(1, 12)),
            of_q,
            draw(st.sampled_from([0, of_q]) | heads),
        ),
        "layout": draw(layouts()),
        "style": style,
        "k_style": draw(st.just(style) | strides()),
        "table_style": draw(strides()),
    }
    return Case(**drawn)


def short(case):
    """A call with so few tokens that a CPU runs its kernel in a moment."""
    batch, tokens, *heads = case.sizes
    most = MOST_ON_THE_CPU // (batch * sum(heads) * case.head[0])
    return case._replace(sizes=(batch, max(1, min(tokens, most)), *heads))


def for_every_call(way, chunk, hold, share=1):
    """Hold `hold(case)` for a chunk of calls, or for a share of them where each takes long.

    In half of the chunks a table of a few rows is taken for one that does not stay in a cache, so
    that tokens are numbered by tiles wherever they can be.
    """

    @seed(chunk)
    @settings(
        max_examples=CHUNK // share,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def every_call(case):
        library = ON_A_GPU[case.library] if way == "gpu" else case.library
        case = short(case) if way == "host_cuda" else case
        hold(possible(case._replace(library=library)))

    with (
        small_tiles() if chunk % 2 == 0 else nullcontext(),
        posing() if way == "posing" else nullcontext(),
    ):
        every_call()


def test_a_call_agrees_with_the_reference_and_changes_nothing_else(way, chunk, record):
    share = 2 if way == "host_cuda" else 1
    for_every_call(way, chunk, lambda case: record(case.kind, *verify(case)), share)


def rotates_back(case):
    """The conjugate after the forward rotation returns the input, but for the roundings."""
    case = case._replace(outside=case.outside.replace("nan", "keep"), write="new")
    case = case.without_norm()._replace(rounding="once")
    if repeats(case.table_style):  # cosines and sines that are of no angle
        case = case._replace(table_style="dense")
    if case.form in TWO_ANGLES:  # which rotate nothing
        case = case._replace(form="full")
    kind, call = case.table_dtype, Call(case)
    there = call(*(held.array for held in call.inputs))
    back = call(*there, conjugate=not case.conjugate)
    for held, y in zip(call.inputs, back, strict=True):
        x, y = (call.canonical(bits) for bits in (held.elements, to_bits(y)))
        assert np.array_equal(x[..., ~call.rotated], y[..., ~call.rotated])
        x, y = (decode(bits[..., call.rotated], case.dtype) for bits in (x, y))
        norms = pair_norms(x, case.interleaved)
        roundings = sum(2.0 ** -FORMATS[each].mantissa_bits for each in (case.dtype, kind))
        exponent_bits, mantissa_bits, *_ = FORMATS[case.dtype]
        least = np.ldexp(1.0, 2 - 2 ** (exponent_bits - 1) - mantissa_bits)  # subnormal number
        assert (np.abs(y - x) <= 3 * roundings * norms + 3 * least).all()


def test_the_conjugate_after_the_rotation_returns_the_input(way, chunk):
    for_every_call(way, chunk, rotates_back, share=5)


def is_as_each_alone(case):
    """q and k rotated together equal q and k rotated apart, bit by bit."""
    *sizes, q_heads, k_heads = case.sizes
    case = case._replace(sizes=(*sizes, q_heads, k_heads or q_heads), write="new")
    # The squares of a norm are added up in an order that depends on both tensors.
    call = Call(case.without_norm())
    q, k = (held.array for held in call.inputs)
    for i, (x, together) in enumerate(zip((q, k), call(q, k), strict=True)):
        (alone,) = call(x, first=i)
        assert np.array_equal(to_bits(together), to_bits(alone))


def test_q_and_k_together_equal_q_and_k_apart(way, chunk):
    for_every_call(way, chunk, is_as_each_alone, share=5)


def fused(case):
    """A call of the case's options on dense q, k and v that share a library, and these as NumPy's.

    A norm's squares are added up in an order that depends on strides, so there is none. Heads lie
    before tokens where they do in the case's layout.
    """
    by_head = case.layout.index("h") < case.layout.replace("t", "s").index("s")
    if by_head and "b" in case.layout and case.sizes[1] % 2:
        # Batches and heads can be numbered as one, where no array but the slots is by batch.
        batch, *rest = case.sizes
        case = case._replace(sizes=(max(batch, 2), *rest), rows="position")
        if "s" not in case.positions.split() and case.positions != "int":
            case = case._replace(positions="none")
    *sizes, q_heads, k_heads = case.sizes
    case = case._replace(
        sizes=(*sizes, q_heads, k_heads or 1),
        rows="position" if case.rows == "head" else case.rows,
        library=case.library.replace("dlpack", "torch"),
        **{"style": "dense", "k_style": "dense", "write": "new"},
        layout="bhsd" if by_head else "bshd",
    )
    call = Call(possible(case.without_norm()))
    q, k = (held.elements for held in call.inputs)
    v = np.random.default_rng(1).permuted(k)
    return call, (q, k, v)


def held_as(case, elements):
    """Elements in a dense array of the case's library."""
    size = elements.size
    placement = Placement(np.empty(elements.shape, "V1").strides, GUARD, size + 2 * GUARD)
    return Held(elements, case.dtype, case.library, placement).array


def is_as_its_parts(case):
    """A packed array rotated at once equals q and k rotated, and v as it is, bit by bit."""
    call, parts = fused(case)
    axis = call.axes.index("h")
    q, k = call(*(held_as(call.case, part) for part in parts[:2]))
    wanted = np.concatenate([to_bits(q), to_bits(k), parts[2]], axis)
    for in_place in (False, True):
        packed = held_as(call.case, np.concatenate(parts, axis))
        result = rope_cupy.apply_rotary_qkv(
            packed,
            call.table,
            num_heads=parts[0].shape[axis],
            num_kv_heads=parts[1].shape[axis],
            layout=call.axes,
            out=packed if in_place else None,
            **call.where,
            **call.options,
        )
        assert np.array_equal(to_bits(result), wanted)


def test_a_packed_array_is_rotated_as_its_parts_are(way, chunk):
    for_every_call(way, chunk, is_as_its_parts, share=5)


def fills_a_cache(case):
    """A cache holds what k becomes, and v, at every token's slot, and nothing else has changed."""
    call, (q, k, v) = fused(case)
    case, (batch, tokens, heads, head_dim) = call.case, call.canonical(k).shape
    q_alone, k_alone = call(*(held_as(case, part) for part in (q, k)))
    block_size = 1 + tokens % 4
    blocks = -(-(batch * tokens + 3) // block_size)
    rng = np.random.default_rng([2, tokens])
    slots = rng.permutation(blocks * block_size + 2)[: batch * tokens].reshape(batch, tokens) - 1
    by_head = tokens % 2 == 1
    shape = (
        (blocks, heads, block_size, head_dim) if by_head else (blocks, block_size, heads, head_dim)
    )
    before = rng.integers(0, 200, (2, *shape)).astype(k.dtype)
    caches = [held_as(case, each) for each in before]
    place = "numpy" if case.library in ("numpy", "torch") else case.library
    k_in, k_new = (held_as(case, each) for each in (k, np.zeros_like(k)))
    k_out = (None, k_in, k_new)[tokens % 3]
    q_out = rope_cupy.apply_rotary_kv_cache(
        *(held_as(case, q), k_in, held_as(case, v)),
        *caches,
        call.table,
        slot_mapping=hold(slots, "int64", place).array,
        cache_layout="HND" if by_head else "NHD",
        layout=call.axes,
        k_out=k_out,
        **call.where,
        **call.options,
    )
    assert np.array_equal(to_bits(q_out), to_bits(q_alone))
    assert k_out is None or np.array_equal(to_bits(k_out), to_bits(k_alone))
    assert k_out is k_in or np.array_equal(to_bits(k_in), k.view(to_bits(k_in).dtype))
    inside = (slots >= 0) & (slots < blocks * block_size)
    for cache, old, new in zip(caches, before, (to_bits(k_alone), v), strict=True):
        new = call.canonical(new)
        wanted = np.swapaxes(old, 1, 2).copy() if by_head else old.copy()
        wanted[np.divmod(slots[inside], block_size)] = new[inside]
        assert np.array_equal(to_bits(cache), np.swapaxes(wanted, 1, 2) if by_head else wanted)


def test_a_cache_is_filled_with_what_k_becomes(way, chunk):
    for_every_call(way, chunk, fills_a_cache, share=5)


def test_the_calls_drawn_are_of_every_kind():
    drawn = []
    for chunk in range(12):
        for_every_call("numpy", chunk, drawn.append)
    for name, values in OPTIONS.items():
        if name not in ("library", "table_library", "head", "sizes", "layout", *STYLES):
            assert {getattr(case, name) for case in drawn} == set(values), name
    assert {len(case.layout) for case in drawn} == {3, 4, 5, 6}
    styles = [style for case in drawn for style in (case.style, case.k_style, case.table_style)]
    styles = [style for style in styles if isinstance(style, Strides)]  # frequencies have none
    kinds = {
        "backward": lambda style: any(style.backward),
        "repeated": repeats,
        "out of order": lambda style: style.order != (0, 1, 2, 3),
        "apart": lambda style: any(style.gaps),
        "off alignment": lambda style: style.offset % 8,
        "dense": lambda style: not (repeats(style) or any(style.gaps + style.backward)),
    }
    for kind, holds in kinds.items():
        assert sum(map(bool, map(holds, styles))) > 20, kind
