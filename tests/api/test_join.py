"""Several calls written by one launch: joint q, k and v of streams, and k with a table of its own.

Each is held against the same calls one by one, which other tests hold against the reference.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import test_properties
from arrays import (
    EPS,
    FORMS,
    NORM_ERROR,
    WEIGHT_OFFSET,
    Call,
    Held,
    hold,
    in_every_library,
    known,
    place,
    possible,
    small_tiles,
)
from forgetting import forget
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from posing import posing
from reference import FORMATS, check, decode, encode, to_bits, to_float64

import rope_cupy
from rope_cupy import Stream, eager, join_qkv, joined, together

CHUNK = 50
POSITIONS = "none", "none", "int", "int32 s", "int64 bs", "int32 1s"


def pytest_generate_tests(metafunc):
    if "chunk" in metafunc.fixturenames:
        calls = metafunc.config.getoption("random_calls")
        chunks = range(
            -(-calls // (3 * CHUNK))
        )  # of each way a third of what one call is drawn for
        chunks = [pytest.param(i, marks=pytest.mark.long) for i in chunks]
        metafunc.parametrize("chunk", [0, *chunks[1:]])
        metafunc.parametrize("way", test_properties.WAYS)


@st.composite
def cases(draw, few=2, most=3):
    """Cases of calls that can be written together, most of them by one kernel."""
    first = draw(test_properties.calls())
    batch, _, q_heads, k_heads = first.sizes
    first = first._replace(positions=draw(st.sampled_from(POSITIONS)), rounding="once")
    others = []
    differs = st.sampled_from([False, False, False, True])
    for _ in range(draw(st.integers(few, most))):
        case = first._replace(
            sizes=(batch, draw(st.integers(1, 12)), q_heads, max(1, k_heads)),
            style=draw(test_properties.strides()),
            k_style=draw(test_properties.strides()),
        )
        if draw(differs):
            case = case._replace(table_style=draw(test_properties.strides()))
        if draw(differs):
            case = case._replace(
                form=draw(st.sampled_from(FORMS)),
                table_dtype=draw(st.sampled_from([*FORMATS])),
                positions=draw(st.sampled_from(POSITIONS)),
                rows=draw(st.sampled_from(["position", "batch", "head"])),
                weights=draw(st.sampled_from(["none", *FORMATS])),
            )
        others.append(case)
    return others


def possible_together(cases, library):
    """The nearest cases that make sense, of which all have the same norm and heads."""
    cases = [possible(case._replace(library=library)) for case in cases]
    heads = min(case.sizes[2:] for case in cases)
    if any(case.rows == "head" for case in cases):
        heads = heads[0], heads[0]
    norms = {case.norm for case in cases}
    norm = norms.pop() if len(norms) == 1 else "head" if "none" not in norms else "none"
    cases = [case._replace(sizes=(*case.sizes[:2], *heads), norm=norm) for case in cases]
    batch = min(case.sizes[0] for case in cases)
    return [possible(case._replace(sizes=(batch, *case.sizes[1:]))) for case in cases]


def for_all_cases(way, chunk, hold_all, **sizes):
    @seed(chunk)
    @settings(
        max_examples=CHUNK // (10 if way == "host_cuda" else 4),
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(**sizes), st.data())
    def every_case(drawn, data):
        library = drawn[0].library
        on_a_gpu = test_properties.ON_A_GPU
        library = on_a_gpu[library] if way == "gpu" else library
        hold_all(possible_together(drawn, library), data)

    with (
        small_tiles() if chunk % 2 == 0 else nullcontext(),
        posing() if way == "posing" else nullcontext(),
    ):
        every_case()


def options_of(case, call):
    """What all calls of a group are given."""
    norm = {}
    if case.norm != "none":
        norm = {"norm": case.norm, "eps": EPS, "weight_offset": WEIGHT_OFFSET}
        norm |= {"round_norm": case.round_norm, "norm_after": case.norm_after}
    return norm | {
        "interleaved": case.interleaved,
        "layout": call.axes,
        "head_dim": call.split,
        "rotary_offset": case.head[2],
        "conjugate": case.conjugate,
        "out_of_range": "keep" if case.outside == "keep" else "nan",
    }


def one_by_one(call, *xs, options, first=0):
    """The bits that a call on its own gives, with the options of its group."""
    names = ("out_of_range", "interleaved", "conjugate")[: 3 if call.case.rotates else 1]
    common = {name: options[name] for name in names}
    return [to_bits(y) for y in call(*xs, first=first, **common)]


def arrays_of(helds, both=2):
    """The weights or biases of q and k, None where there are none."""
    return [held.array for held in helds] or [None] * both


def agrees(bits, wanted, case):
    """The same numbers; but a norm's sums may be added up in another order."""
    found, wanted = decode(bits, case.dtype), decode(wanted, case.dtype)
    if case.norm == "none" or case.dtype != "float32":
        check(found, wanted, case.dtype)
    else:
        most = np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
        assert np.allclose(found, wanted, rtol=0, atol=4 * NORM_ERROR * most, equal_nan=True)


def test_joint_arrays_hold_what_each_stream_gives(way, chunk):
    def hold_join(cases, data):
        calls, rng = [Call(case) for case in cases], np.random.default_rng(chunk)
        case = next((each for each in cases if each.rotates), cases[0])
        options, axes = options_of(case, calls[0]), calls[0].axes.replace("t", "s")
        if not case.rotates:
            options |= {"interleaved": None, "rotary_offset": 0}
        axis = axes.index("s")
        streams, wanted = [], []
        for one, call in zip(cases, calls, strict=True):
            q, k = call.inputs
            v = hold(rng.standard_normal(k.elements.shape), one.dtype, one.library, "padded")
            of_norm = (*arrays_of(call.weights), *arrays_of(call.biases))
            where = call.where.get("positions")
            streams.append(Stream(q.array, k.array, v.array, call.table, where, *of_norm))
            separate = one_by_one(call, q.array, k.array, options=options)
            wanted.append([*separate, v.elements])
        out, helds = None, []
        if not case.library.startswith("dlpack") and data.draw(st.booleans()):
            styles = [
                known(data.draw(test_properties.strides()), case.library, True) for _ in "qkv"
            ]
            for i, style in enumerate(styles):
                whole = np.concatenate([parts[i] for parts in wanted], axis)
                whole = encode(np.zeros(whole.shape), case.dtype)
                helds.append(Held(whole, case.dtype, case.library, place(whole.shape, style)))
            out = tuple(held.array for held in helds)
        joint = join_qkv(streams, **options, out=out)
        assert out is None or all(y is given for y, given in zip(joint, out, strict=True))
        for held in helds:
            held.assert_guarded()
        again = []
        if out is None:  # as in one layer after the other, until the streams are known
            again = [join_qkv(streams, **options) for _ in range(4)][-1]
        for i, y in enumerate((*joint, *again)):
            whole = np.concatenate([parts[i % 3] for parts in wanted], axis)
            if i % 3 == 2:
                assert np.array_equal(to_bits(y), whole)
            else:
                agrees(to_bits(y), whole, case)
        for call in calls:
            for held in (*call.inputs, *call.held, *call.weights):
                held.assert_unchanged()

    for_all_cases(way, chunk, hold_join)


def test_q_and_k_with_tables_of_their_own_give_what_each_gives(way, chunk):
    def hold_apart(cases, data):
        cases = [
            possible(case._replace(form="half")) if not case.rotates else case for case in cases
        ]
        if cases[1].rows != "position":  # which takes no positions, not those of q either
            cases = [possible(case._replace(positions="none")) for case in cases]
        (q_call, k_call), (case, other) = [Call(case) for case in cases], cases
        q, k = q_call.inputs[0], k_call.inputs[1]
        options = options_of(case, q_call)
        weights, both = [], (q_call, k_call)
        if case.norm != "none":
            weights = [arrays_of(call.weights)[i] for i, call in enumerate(both)]
            biases = [arrays_of(call.biases)[i] for i, call in enumerate(both)]
            options |= dict(zip(("q_bias", "k_bias"), biases, strict=True))
        (q_wanted,) = one_by_one(q_call, q.array, options=options)
        (k_wanted,) = one_by_one(k_call, k.array, options=options, first=1)
        function = rope_cupy.apply_qk_norm_rotary if case.norm != "none" else None
        function = function or rope_cupy.apply_rotary_qk
        where = {"positions": q_call.where.get("positions")}
        k_positions = k_call.where.get("positions", 0 if where["positions"] is not None else None)
        written = data.draw(st.booleans()) and not (
            any(map(test_properties.repeats, (case.style, other.k_style)))
        )
        out = (q.array, k.array) if written and not case.library.startswith("jax") else None
        results = function(
            *(q.array, k.array, *weights, q_call.table),
            **where,
            k_table=k_call.table,
            k_positions=k_positions,
            out=out,
            **options,
        )
        for y, wanted, held in zip(results, (q_wanted, k_wanted), (q, k), strict=True):
            agrees(to_bits(y), wanted, case)
            if out is None:
                held.assert_unchanged()
            else:
                held.assert_guarded()

    for_all_cases(way, chunk, hold_apart, few=2, most=2)


# What is refused, and writes nothing.


def table_of(tokens, pairs=4):
    angle = np.outer(np.arange(tokens), 1.0 / (1 + np.arange(pairs)))
    return np.cos(angle), np.sin(angle)


def qkv_of(tokens, heads=(3, 1, 1), dtype=np.float32, width=8):
    rng = np.random.default_rng(tokens)
    return [rng.standard_normal((1, tokens, n, width)).astype(dtype) for n in heads]


def stream_of(tokens, *more, **fields):
    return Stream(*qkv_of(tokens, *more), table_of(9))._replace(**fields)


TEXT, IMAGE = stream_of(3), stream_of(5)
REFUSED = {
    "a stream alone": (TypeError, "streams must be a list", TEXT),
    "no stream": (ValueError, "streams must be one to 3, got 0", []),
    "four streams": (ValueError, "got 4", [TEXT] * 4),
    "a tuple": (
        TypeError,
        r"streams\[1\] must be a Stream, got a tuple of 9",
        [TEXT, tuple(IMAGE)],
    ),
    "other heads": (
        *(ValueError, r"streams\[1\].q must have the shape of streams\[0\].q"),
        [TEXT, stream_of(5, (2, 1, 1))],
    ),
    "another dtype": (
        *(TypeError, r"streams\[1\].q must have the dtype of streams\[0\].q, float32, got float64"),
        [TEXT, stream_of(5, (3, 1, 1), np.float64)],
    ),
    "v of other tokens": (
        *(ValueError, r"streams\[1\]: v must have q's shape"),
        [TEXT, IMAGE._replace(v=qkv_of(4)[2])],
    ),
    "a short table": (
        *(ValueError, r"streams\[1\]: table must hold the positions 6 to 10"),
        [TEXT, IMAGE._replace(positions=6)],
    ),
    "positions without a table": (
        *(ValueError, r"streams\[0\]: positions must be None without a table"),
        [TEXT._replace(table=None, positions=0), IMAGE],
    ),
    "a weight of another size": (
        *(ValueError, r"streams\[1\]: k_weight must have the shape \(8,\)"),
        [TEXT, IMAGE._replace(k_weight=np.ones(7))],
    ),
    "an axis too few": (
        *(ValueError, r"streams\[0\].q must have the axes of layout"),
        [Stream(*(x[0, 0] for x in TEXT[:3]), TEXT.table)],
    ),
}


@pytest.mark.parametrize(("error", "message", "streams"), REFUSED.values(), ids=REFUSED)
def test_wrong_streams_are_refused(error, message, streams):
    out = tuple(np.full((1, 8, n, 8), 7, np.float32) for n in (3, 1, 1))
    for written in (None, out):
        with pytest.raises(error, match=message):
            join_qkv(streams, out=written)
    assert all((y == 7).all() for y in out)


def test_joint_arrays_that_are_given_must_be_of_all_tokens():
    for out, error in (((), TypeError), (qkv_of(8), TypeError), (tuple(qkv_of(7)), ValueError)):
        with pytest.raises(error, match=r"out must be None or a tuple of three|of all tokens"):
            join_qkv([TEXT, IMAGE], out=out)


def test_what_is_written_may_not_be_read_by_another_stream():
    out = tuple(qkv_of(8))
    before = [y.copy() for y in out]
    own = IMAGE._replace(q=out[0][:, 3:], k=out[1][:, 3:], v=out[2][:, 3:])
    for each in (own._replace(q=out[0][:, :5]), own._replace(k=out[1][:, 2:7])):
        with pytest.raises(ValueError, match="share no memory with"):
            join_qkv([TEXT, each], out=out)
        assert all(np.array_equal(*pair) for pair in zip(out, before, strict=True))
    q, k, v = join_qkv([TEXT, own._replace(q=own.q.copy(), k=own.k.copy(), v=own.v.copy())])
    assert join_qkv([TEXT, own], out=out)[0] is out[0]  # each in its place
    assert all(np.array_equal(*pair) for pair in zip(out, (q, k, v), strict=True))


def test_k_with_a_table_of_its_own_may_not_lie_where_q_is_written():
    both = np.ones((1, 8, 2, 8), np.float32)
    q, k = both[:, :5], both[:, 4:]
    with pytest.raises(ValueError, match=r"q_out must .*share no memory with k"):
        rope_cupy.apply_rotary_qk(q, k, table_of(9), k_positions=2, out=(q, k))
    with pytest.raises(ValueError, match="k: table must hold the positions 6 to 9"):
        k = k.copy()
        rope_cupy.apply_rotary_qk(q, k, table_of(9), k_positions=6, out=(q, k))
    assert (both == 1).all()


@in_every_library
def test_streams_that_are_neither_rotated_nor_normalised_are_copied(library):
    texts = [hold(x, "float32", library, "padded") for x in qkv_of(3)]
    images = [hold(x, "float32", library, "swapped") for x in qkv_of(5)]
    table = tuple(hold(part, "float32", library).array for part in table_of(9))
    streams = [Stream(*(x.array for x in texts)), Stream(*(x.array for x in images), table, 2)]
    q, k, v = map(to_float64, join_qkv(streams))
    for y, text in zip((q, k, v), texts, strict=True):
        assert np.array_equal(y[:, :3], decode(text.elements, "float32"))
    (turned,) = [to_float64(rope_cupy.apply_rotary(images[0].array, table, positions=2))]
    assert np.array_equal(q[:, 3:], turned)


def test_streams_of_one_kernel_take_one_launch_whatever_their_tables():
    half, other = table_of(9), table_of(20)
    kept = {"positions": np.array([0, 3, 2, 99, 1])}
    complex_numbers = rope_cupy.RotaryTable.from_complex(half[0] + 1j * half[1])
    groups = [
        ([TEXT, IMAGE], True),
        ([IMAGE], True),
        ([TEXT, IMAGE._replace(table=other, positions=15), TEXT], True),
        ([TEXT._replace(table=None), IMAGE], True),
        ([TEXT._replace(table=None), IMAGE._replace(**kept), TEXT], False),
        ([TEXT, IMAGE._replace(table=complex_numbers)], False),
    ]
    for streams, is_one in groups:
        with posing():  # where a launch that several calls share is compared with its plan
            join_qkv(streams, interleaved=False)
            (group,) = together._together.values()
            assert (group.launch is not None) == is_one


@pytest.fixture
def known_streams():
    """Streams that were joined until they were known, and what they gave."""
    forget()
    streams = [TEXT, IMAGE]
    joint, *_ = [join_qkv(streams) for _ in range(4)]
    assert joined._joined
    yield streams, joint
    forget()


def counted_joins(monkeypatch):
    """Note whether each call is one of streams that are known."""
    found, join = [], joined.join

    def join_and_note(calls):
        results = join(calls)
        found.append(results is not None)
        return results

    monkeypatch.setattr(joined, "join", join_and_note)
    return found


def test_known_streams_are_joined_from_wherever_they_lie(known_streams, monkeypatch):
    streams, joint = known_streams
    found = counted_joins(monkeypatch)
    moved = [
        stream._replace(**{name: np.copy(getattr(stream, name)) for name in "qkv"})
        for stream in streams
    ]
    for each in streams, moved:
        for y, wanted in zip(join_qkv(each), joint, strict=True):
            assert np.array_equal(y, wanted)
    other = [streams[0], streams[1]._replace(positions=1)]
    turned = rope_cupy.apply_rotary(IMAGE.q, IMAGE.table, positions=1)
    assert np.array_equal(join_qkv(other)[0][:, TEXT.q.shape[1] :], turned)
    assert found == [True, True, True]


def test_known_streams_with_a_difference_are_checked_as_new_ones(known_streams, monkeypatch):
    found = counted_joins(monkeypatch)
    (text, image), _ = known_streams
    rows = len(image.table[0])
    with pytest.raises(ValueError, match=r"streams\[1\]: .*positions"):
        join_qkv([text, image._replace(positions=rows)])
    with pytest.raises(TypeError, match=r"streams\[1\]"):
        join_qkv([text, image._replace(v=image.v.astype(np.float64))])
    with pytest.raises(ValueError, match=r"streams\[0\]"):
        join_qkv([text._replace(v=text.v[:, 1:]), image])
    shorter = [text, image._replace(**{name: getattr(image, name)[:, 1:] for name in "qkv"})]
    assert join_qkv(shorter)[0].shape[1] == text.q.shape[1] + image.q.shape[1] - 1
    shifted = np.empty(image.q.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(image.q.shape)
    shifted[...] = image.q
    assert np.array_equal(
        join_qkv([text, image._replace(q=shifted)])[0], join_qkv([text, image])[0]
    )
    assert found == [False] * 5 + [True]


def test_one_stream_is_known_as_several_are(monkeypatch):
    forget()
    found = counted_joins(monkeypatch)
    joint = [join_qkv([IMAGE._replace(q=IMAGE.q * 2**i)])[0] for i in range(5)]
    assert found[-1] and not found[0]
    for i in range(5):
        assert np.array_equal(joint[i], 2**i * joint[0])
    with pytest.raises(ValueError, match=r"streams\[0\]: .*positions"):
        join_qkv([IMAGE._replace(positions=len(IMAGE.table[0]))])
    forget()


def test_no_more_streams_are_kept_than_are_allowed(known_streams, monkeypatch):
    monkeypatch.setattr(joined, "MAX_JOINED", 2)
    for offset in range(4):
        for _ in range(3):
            join_qkv([TEXT, IMAGE], eps=0.1 * offset, norm="head")
    assert len(joined._joined) == 2
    for tokens in range(1, eager.MAX_RECENT + 2):
        for _ in range(3):
            join_qkv([TEXT, stream_of(tokens)])
    assert max(map(len, joined._joined.values())) <= eager.MAX_RECENT
