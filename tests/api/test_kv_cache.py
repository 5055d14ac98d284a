"""k rotated into its cache and v copied into its own: which bytes are written, and what they say.

A cache is a view of a buffer of random bytes. What the slot of each token is to hold is known by
the definition, and all else keeps its bytes: after each call the whole buffer is compared.
"""

import math
import time
from functools import cache

import numpy as np
import pytest
import torch
from arrays import ON_THE_HOST, Held, hold, in_every_library, on_every, place, small_tiles
from reference import (
    FORMATS,
    arranged,
    canonical,
    check,
    decode,
    encode,
    layer_normalised,
    normalised,
    rotate,
    rounded,
    sequence_places,
    to_bits,
    to_float64,
)

from rope_cupy import RotaryTable, apply_rotary_kv_cache

H, D = 2, 16  # heads of k and v
BLOCKS, SIZE, SLOTS = 3, 7, 21  # of caches
EIGHT_BITS = "float8_e4m3fn", "float8_e5m2"
GUARD = 64
RNG = np.random.default_rng(31)
ANGLE = RNG.uniform(-np.pi, np.pi, (40, D // 2))
COS, SIN = (rounded(part, "float32") for part in (np.cos(ANGLE), np.sin(ANGLE)))

in_both_formats = pytest.mark.parametrize("element", EIGHT_BITS)


def part(flat, *shape):
    return flat[GUARD : GUARD + math.prod(shape)].reshape(shape)


# What makes k's cache (0) or v's (1) of a flat array, by cache_layout.
NHD = {
    "blocks": lambda flat, i: part(flat, 2, BLOCKS, SIZE, H, D)[i],
    "blocks of 1": lambda flat, i: part(flat, 2, SLOTS, 1, H, D)[i],
    "blocks of 16": lambda flat, i: part(flat, 2, 2, 16, H, D)[i],
    "slots": lambda flat, i: part(flat, 2, SLOTS, H, D)[i],
    "slots of one axis": lambda flat, i: part(flat, 2, SLOTS, H * D)[i],
    "k beside v in a block": lambda flat, i: part(flat, BLOCKS, 2, SIZE, H, D)[:, i],
    "k beside v in a slot": lambda flat, i: part(flat, BLOCKS, SIZE, 2, H, D)[:, :, i],
    "k beside v in a head": lambda flat, i: part(flat, BLOCKS, SIZE, H, 2, D)[:, :, :, i],
    "k beside v in an element": lambda flat, i: part(flat, BLOCKS, SIZE, H, D, 2)[..., i],
    "k beside v in a row": lambda flat, i: part(flat, SLOTS, 2, H * D)[:, i],
    "gaps between slots": lambda flat, i: part(flat, 2, BLOCKS, 9, H, D)[i, :, :SIZE],
    "every other slot": lambda flat, i: part(flat, 2, BLOCKS, 2 * SIZE, H, D)[i, :, ::2],
    "other heads beside": lambda flat, i: part(flat, 2, BLOCKS, SIZE, 5, D)[i, :, :, 1 : 1 + H],
    "wide gaps between heads": lambda flat, i: part(flat, 2, BLOCKS, SIZE, H, 32)[i, ..., :D],
    "odd gaps between heads": lambda flat, i: part(flat, 2, BLOCKS, SIZE, H, 19)[i, ..., 1:17],
    "elements apart": lambda flat, i: part(flat, 2, BLOCKS, SIZE, H, 2 * D)[i, ..., ::2],
    "transposed": lambda flat, i: (
        part(flat, 2, D, H, SIZE, BLOCKS)[i].swapaxes(0, 3).swapaxes(1, 2)
    ),
}
HND = {
    "heads of slots": lambda flat, i: part(flat, 2, H, SLOTS, D)[i],
    "blocks of heads": lambda flat, i: part(flat, 2, BLOCKS, H, SIZE, D)[i],
    "heads of k beside v in a block": lambda flat, i: part(flat, BLOCKS, 2, H, SIZE, D)[:, i],
    "k beside v in a place": lambda flat, i: part(flat, BLOCKS, H, SIZE, 2, D)[:, :, :, i],
    "slots before heads": lambda flat, i: part(flat, 2, BLOCKS, SIZE, H, D)[i].swapaxes(1, 2),
}
WAYS = {name: ("NHD", view, view) for name, view in NHD.items()}
WAYS |= {name: ("HND", view, view) for name, view in HND.items()}
WAYS["k in another way than v"] = (
    "NHD",
    NHD["transposed"],
    lambda flat, i: NHD["odd gaps between heads"](flat[2000:], i),
)


def beside(heads, head_dim):
    """The way of vLLM's caches, whose blocks have k's slots and then v's."""

    def view(flat, i):
        return part(flat, BLOCKS, 2, SIZE, heads, head_dim)[:, i]

    return "NHD", view, view


class Caches:
    """Those of k and v in a buffer of a library, and what it held before."""

    def __init__(self, library, element, way, as_words=False):
        self.layout, *self.views = WAYS[way] if isinstance(way, str) else way
        bits = np.dtype(FORMATS[element].bits if element in FORMATS else np.uint8)
        self.before = RNG.integers(0, 256, 6000 * bits.itemsize, np.uint8).view(bits)
        self.buffer = in_library(self.before, library, "uint8" if as_words else element)
        self.arrays = self.of(self.buffer)

    def of(self, flat):
        return [view(flat, i) for i, view in enumerate(self.views)]

    def blocks(self, flat):
        """k's and v's of a flat NumPy array as (blocks, slots of each, heads, head_dim)."""
        for view in self.of(flat):
            if view.ndim == 2:
                view = view.reshape(len(view), H, -1)
                assert np.shares_memory(view, flat)
            view = view if view.ndim == 4 else view[None]
            yield view.swapaxes(1, 2) if self.layout == "HND" else view


def in_library(bits, library, dtype):
    """A flat array of a library that holds these bits."""
    if library.startswith("torch"):
        held = torch.from_numpy(bits.view(np.uint8).copy())
        return held.to("cuda" if library == "torch-cuda" else "cpu").view(getattr(torch, dtype))
    native = dtype.startswith(("float8", "bfloat16"))
    kind = getattr(pytest.importorskip("ml_dtypes"), dtype) if native else dtype
    module = pytest.importorskip("cupy") if library == "cupy" else np
    return module.asarray(bits.copy()).view(kind)


def table_of(library, cos=COS, sin=SIN):
    return RotaryTable(*(hold(half, "float32", library).array for half in (cos, sin)))


@cache
def numbers_of(element):
    """The finite numbers of an 8-bit format that are not negative, each where its code says."""
    codes = torch.arange(0x7F if element == "float8_e4m3fn" else 0x7C).to(torch.uint8)
    return codes.view(getattr(torch, element)).double().numpy()


def code_of(values, element):
    """Round to 8 bits once, to nearest even, and what is too large to the largest number."""
    numbers, magnitude = numbers_of(element), np.abs(values)
    middles = (numbers[1:] + numbers[:-1]) / 2
    low, high = (np.searchsorted(middles, magnitude, side) for side in ("left", "right"))
    code = np.where(low % 2 == 0, low, high) | np.where(np.signbit(values), 0x80, 0)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def assert_codes(codes, quotients, element, slack):
    """What is written is right, or the neighbour where a relative error of `slack` leads there."""
    near = [code_of(quotients * (1 + error), element) for error in (0, -slack, slack)]
    wrong = ~np.logical_or.reduce([codes == code for code in near])
    told = codes[wrong][:5], near[0][wrong][:5], quotients[wrong][:5]
    assert not wrong.any(), f"{wrong.sum()} codes of {element}: {told[0]}, not {told[1]}, {told[2]}"


def slots_for(tokens, outside=()):
    """A slot for each token, and some that the caches do not hold in the midst."""
    count = math.prod(tokens)
    slots = RNG.permutation(SLOTS)[:count]
    for slot in outside:
        slots[RNG.integers(count)] = slot
    return slots.reshape(tokens)


OF_REFERENCE = {"interleaved", "rotary_offset", "conjugate", "out_of_range"}


def verify(
    library,
    dtype="float32",
    element=None,
    way="blocks",
    *,
    tokens=(6,),
    heads=(4, H),
    head_dim=D,
    slots=None,
    slot_dtype="int64",
    slot_style="dense",
    style="dense",
    write="new",
    kept=None,
    scales=(None, None),
    as_words=False,
    weights=(),
    of_norm=None,  # eps and weight_offset
    rotates=True,
    where=(),
    positions=None,
    values=None,
    k_slack=2.0**-20,
    **options,
):
    """Write caches and hold every byte against the definition.

    `kept` says where k is written beside its cache: "in place" or "out", or to a cache alone.
    `positions` are the rows of the table that `where`, the arguments which say them, stand for.
    """
    element = element or dtype
    as_words = as_words or (library == "cupy" and element in EIGHT_BITS)  # CuPy has no such dtypes
    q_heads, kv_heads = heads
    shapes = [(*tokens, n, head_dim) for n in (q_heads, kv_heads, kv_heads)]
    drawn = [3 * RNG.standard_normal(shape) for shape in shapes]
    if values is not None:
        drawn[1:] = np.broadcast_to(values, shapes[1]), np.broadcast_to(values, shapes[1])
    q, k, v = held = [hold(x, dtype, library, style) for x in drawn]
    exact = [decode(h.elements, dtype).reshape(-1, *h.elements.shape[-3:]) for h in held]
    slots = slots_for(tokens) if slots is None else slots
    given = hold(slots, slot_dtype, library, slot_style)
    out = {"new": None, "in place": q, "out": hold(drawn[0], dtype, library, "packed")}[write]
    k_out = {None: None, "in place": k, "out": hold(drawn[1], dtype, library, "ragged")}[kept]
    caches = Caches(library, element, way, as_words)
    arguments = dict(where)
    if of_norm:
        arguments |= dict(zip(("eps", "weight_offset"), of_norm, strict=True))

    result = apply_rotary_kv_cache(
        *(h.array for h in held),
        *caches.arrays,
        table_of(library) if rotates else None,
        slot_mapping=given.array,
        cache_layout=caches.layout,
        cache_dtype=element if as_words else None,
        k_scale=scales[0] and scales[0].of(library),
        v_scale=scales[1] and scales[1].of(library),
        **{name: hold(x, "float32", library).array for name, x in dict(weights).items()},
        out=out and out.array,
        **({"k_out": k_out.array} if k_out else {}),
        **arguments,
        **options,
    )

    def turned(x):
        of_reference = {name: options[name] for name in OF_REFERENCE & {*options}}
        return rotate(x, COS, SIN, positions=positions, **of_reference) if rotates else x

    def of_layer(x, weight, bias):
        x = layer_normalised(x, of_norm[0])
        x = x if weight is None else x * (weight + of_norm[1])
        return x if bias is None else x + bias

    def rotated(x, name):
        weight, bias = (dict(weights).get(f"{name}_{kind}") for kind in ("weight", "bias"))
        x = turned(x) if options.get("norm_after") or not of_norm else x
        if of_norm and options["norm"] == "layer":
            x = of_layer(x, weight, bias)
        elif of_norm:
            x = normalised(x, weight, *of_norm, of_token=options["norm"] == "heads")
        return x if options.get("norm_after") or not of_norm else turned(x)

    q_exact, k_exact = map(rotated, exact[:2], "qk")
    check(to_float64(result).reshape(q_exact.shape), q_exact, dtype)
    assert (result is out.array) if out else (type(result) is type(q.array))
    if k_out:
        check(to_float64(k_out.array).reshape(k_exact.shape), k_exact, dtype)
    for unwritten in {q, k, v, given} - {out, k_out}:
        unwritten.assert_unchanged()
    for written in {out, k_out} - {None}:
        written.assert_guarded()

    expected, actual = caches.before.copy(), to_bits(caches.buffer)
    of_k, of_v = zip(caches.blocks(expected), caches.blocks(actual), strict=True)
    for (to_be, found), values, scale, slack in (
        (of_k, k_exact, scales[0], k_slack),
        (of_v, exact[2], scales[1], 2.0**-24),  # a quotient is rounded to float32 before
    ):
        places = [  # token, block, place in it
            (token, *divmod(slot, to_be.shape[1]))
            for token, slot in enumerate(slots.ravel().tolist())
            if 0 <= slot < to_be.shape[0] * to_be.shape[1]
        ]
        if not places:
            continue
        token, block, slot = map(np.array, zip(*places, strict=True))
        numbers = values.reshape(-1, *values.shape[2:])[token]
        codes = to_be[block, slot] = found[block, slot]
        if element in EIGHT_BITS:
            assert_codes(codes, numbers / (1 if scale is None else scale.divisor), element, slack)
        elif values is k_exact:
            check(decode(codes, dtype), numbers, dtype)
        else:
            assert np.array_equal(codes, encode(numbers, dtype))
    assert np.array_equal(actual, expected), "no other byte of the buffer may change"


class Scale:
    """A number, and what is given for it."""

    def __init__(self, value, kind="float"):
        self.value, self.kind = value, kind

    def of(self, library):
        if self.kind == "float":
            return float(self.value)
        if self.kind == "NumPy's":
            return np.float32(self.value)
        array = hold([self.value], "float32", library).array
        return array.reshape(()) if self.kind == "()" else array

    @property
    def divisor(self):
        return np.float64(np.float32(self.value))

    def __repr__(self):
        return f"{self.value} {self.kind}"


# Where rows go.


@in_every_library
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_written_to_the_slots_of_their_tokens_and_nothing_else_is(library, way):
    verify(library, "float16", way=way)
    verify(library, "float16", way=way, kept="in place")


@on_every("numpy", "torch", "torch-cuda")
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_8_bits_are_written_to_caches_of_any_strides(library, way):
    for kept in (None, "out"):
        verify(library, "bfloat16", "float8_e4m3fn", way, style="packed", kept=kept)


OUTSIDE = {  # which no cache here holds; some would be slots if they lost their upper half
    "int32": [-1, SLOTS, SLOTS + 1, 2**31 - 1, -(2**31)],
    "int64": [-1, SLOTS, 2**31, 2**32 + 5, -(2**32) + 5, 2**63 - 1, -(2**63), 2**63 - 2**32],
}


@in_every_library
@pytest.mark.parametrize("element", ["float16", "float8_e5m2"])
@pytest.mark.parametrize("slot_dtype", OUTSIDE)
def test_a_token_whose_slot_the_cache_does_not_hold_is_left_out(library, element, slot_dtype):
    outside = np.array(OUTSIDE[slot_dtype])
    for slots in (np.r_[outside, 0, SLOTS - 1], np.r_[outside[::-1], outside[:2]]):
        where = {"tokens": (len(slots),), "slots": slots, "slot_dtype": slot_dtype}
        for kept in (None, "in place"):
            verify(library, "float16", element, **where, kept=kept)


@in_every_library
@pytest.mark.parametrize("tokens", [(6,), (2, 3), (1, 6), (3, 1)], ids=str)
@pytest.mark.parametrize("slot_dtype", OUTSIDE)
def test_slots_are_of_tokens_or_of_batches_of_them(library, tokens, slot_dtype):
    for slot_style in ("dense", "stepped", "transposed"):
        slots = slots_for(tokens, outside=[-1])
        verify(library, tokens=tokens, slots=slots, slot_dtype=slot_dtype, slot_style=slot_style)


@in_every_library
def test_slots_of_tokens_suit_one_batch(library):
    verify(library, tokens=(1, 6), slots=slots_for((6,)))


@in_every_library
@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (1, 4), (5,)], ids=str)
@pytest.mark.parametrize("tokens", [(6,), (1, 6)], ids=str)
@pytest.mark.parametrize("write", ["new", "in place"])
def test_tokens_behind_the_last_slot_are_not_stored(write, tokens, shape, library):
    verify(library, tokens=tokens, slots=slots_for(shape, outside=[-1] * (shape == (5,))))
    slots = slots_for(shape)
    for kept in (None, "in place"):
        how = {"slot_style": "stepped", "write": write, "kept": kept}
        verify(library, "bfloat16", tokens=tokens, slots=slots, **how)


def test_fewer_slots_with_a_norm_positions_and_8_bits():
    how = {"norm": "head", "of_norm": (1e-6, 0.0), "positions": np.arange(6)[None] + 3}
    weights = {"q_weight": RNG.standard_normal(D), "k_weight": RNG.standard_normal(D)}
    how |= {"weights": weights.items(), "where": [("positions", 3)], "k_slack": 2.0**-18}
    verify("numpy", element="float8_e4m3fn", slots=slots_for((4,)), as_words=True, **how)


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_tokens_may_share_a_slot_that_the_cache_does_not_hold(slot):
    verify("numpy", slots=np.full(6, slot), slot_style="repeated")


@in_every_library
@pytest.mark.parametrize("write", ["new", "in place", "out"])
@pytest.mark.parametrize("kept", [None, "in place", "out"])
@pytest.mark.parametrize("style", ["dense", "packed", "ragged"])
def test_q_and_k_are_written_where_they_are_wanted_and_v_stays(library, write, kept, style):
    verify(library, "bfloat16", style=style, write=write, kept=kept)


REAL = 20_000, 16, 8, 128  # blocks, slots, heads, head_dim


@pytest.mark.parametrize("axis", range(5))
def test_caches_side_by_side_at_their_real_size_do_not_overlap_nor_take_long_to_tell(axis):
    whole = np.zeros((*REAL[:axis], 2, *REAL[axis:]), np.float16)  # untouched, it takes no memory
    k_cache, v_cache = np.moveaxis(whole, axis, 0)
    q, x = (RNG.standard_normal((2, heads, 128)).astype(np.float16) for heads in (32, 8))
    table, slots = (np.ones((2, 64)), np.zeros((2, 64))), np.array([319_999, 160_007])
    start = time.perf_counter()
    apply_rotary_kv_cache(q, x, x, k_cache, v_cache, table, slot_mapping=slots)
    assert time.perf_counter() - start < 2
    for written in (k_cache, v_cache):
        assert np.array_equal(written[slots // 16, slots % 16], x)
    written[slots // 16, slots % 16] = 0
    assert not v_cache[[0, 1, -1]].any()


# What is written.


@in_every_library
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("heads", [(8, 2), (4, 1), (2, 4)], ids=str)
def test_heads_of_any_number_are_written_in_every_dtype(library, dtype, heads):
    for kept in (None, "in place"):
        verify(library, dtype, heads=heads, way=beside(heads[1], D), kept=kept)


@in_every_library
@pytest.mark.parametrize("element", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "offset"), [(24, 0), (24, 8), (21, 3)])
def test_elements_that_are_not_rotated_are_written_too(
    library, element, interleaved, head_dim, offset
):
    options = {"interleaved": interleaved, "rotary_offset": offset, "head_dim": head_dim}
    for kept in (None, "in place", "out"):
        verify(library, "float16", element, beside(H, head_dim), kept=kept, **options)


ROWS = [5, 0, -1, 40, 39, 2**31 - 1]
COUNTED = np.array([[3, 4, 5], [38, 39, 40]])
POSITIONS = {  # the tokens, the rows of a table of 40, and the arguments that say so
    "none": ((1, 6), None, {}),
    "a start": ((2, 3), 5, {"positions": 5}),
    "an offset": ((2, 3), 7, {"seqlen_offsets": 7}),
    "offsets": ((2, 3), COUNTED, {"seqlen_offsets": [3, 38]}),
    "sequences": ((6,), sequence_places([0, 2, 2, 5], [0] * 3, 6), {"cu_seqlens": [0, 2, 2, 5]}),
    "an array": ((6,), np.array(ROWS), {"positions": ROWS}),
}


@in_every_library
@pytest.mark.parametrize("out_of_range", ["nan", "keep"])
@pytest.mark.parametrize("element", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_say_by_what_k_is_rotated(library, kind, element, out_of_range):
    tokens, rows, where = POSITIONS[kind]
    where = {
        name: hold(value, "int32", library).array if isinstance(value, list) else value
        for name, value in where.items()
    }
    options = {"layout": "thd"} if kind == "sequences" else {}
    options |= {"out_of_range": out_of_range}
    options |= {"tokens": tokens, "positions": rows, "where": where}
    for kept in (None, "in place"):
        verify(library, "float16", element, kept=kept, **options)


@in_every_library
@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "hsd"])
def test_tokens_come_in_any_order_of_axes(library, layout):
    rng, tokens = np.random.default_rng(2), (2, 3) if "b" in layout else (1, 6)
    q, k, v = (rng.standard_normal((*tokens, heads, D)) for heads in (4, H, H))
    given = [hold(arranged(x, layout), "float64", library).array for x in (q, k, v)]
    caches = Caches(library, "float64", "blocks")
    slots = np.array([[20, 3, 7], [0, 5, 11]]) if "b" in layout else np.arange(6)
    y = apply_rotary_kv_cache(
        *(*given, *caches.arrays, table_of(library)),
        slot_mapping=hold(slots, "int64", library).array,
        layout=layout,
    )
    check(canonical(to_float64(y), layout), rotate(q, COS, SIN), "float64")
    k_found, v_found = caches.blocks(to_bits(caches.buffer))
    at = divmod(slots.reshape(tokens), SIZE)
    check(decode(k_found[at], "float64"), rotate(k, COS, SIN), "float64")
    assert np.array_equal(decode(v_found[at], "float64"), v)


OF_LAYERS = {name: (D,) for name in ("q_weight", "k_weight", "q_bias", "k_bias")}
AFTER = {"norm_after": True}
NORMS = {
    "head": ({"q_weight": (D,), "k_weight": (D,)}, "head", 0.0),
    "heads": ({"q_weight": (4 * D,), "k_weight": (H * D,)}, "heads", 0.0),
    "head with an offset": ({"q_weight": (D,), "k_weight": (D,)}, "head", 1.0),
    "head, of k alone": ({"k_weight": (D,)}, "head", 0.0),
    "heads, of q alone": ({"q_weight": (4 * D,)}, "heads", 1.0),
    "head of no weights": ({}, "head", 0.0),
    "layer": (OF_LAYERS, "layer", 0.5),
    "layer, of a bias alone": ({"k_bias": (D,)}, "layer", 0.0, AFTER),
    "layer without a table": (OF_LAYERS, "layer", 0.0, {"rotates": False}),
    "heads, after": ({"q_weight": (4 * D,), "k_weight": (H * D,)}, "heads", 0.0, AFTER),
}


@in_every_library
@pytest.mark.parametrize("element", [None, "float8_e5m2"])
@pytest.mark.parametrize("name", NORMS)
def test_q_and_k_are_normalised_and_v_is_not(library, name, element):
    shapes, kind, offset, *options = NORMS[name]
    for kept in (None, "in place"):
        verify(
            *(library, "float32", element),
            of_norm=(1e-5, offset),
            weights={each: RNG.uniform(0.5, 2, shape) for each, shape in shapes.items()},
            k_slack=2.0**-18,
            norm=kind,
            round_norm=False,
            kept=kept,
            **(options[0] if options else {}),
        )


# 8 bits.

SCALES = [
    (Scale(0.25), Scale(8.0)),
    (Scale(3.7), Scale(0.3)),
    (Scale(3.7), None),
    (None, Scale(2.0**-126)),
    (Scale(1e-30), Scale(1e30)),
    (Scale(3, "NumPy's"), Scale(0.7, "NumPy's")),
    (Scale(3.7, "()"), Scale(0.3, "(1,)")),
    (Scale(0.3, "(1,)"), Scale(5.0)),
    (None, Scale(1e-30, "()")),
]


@in_both_formats
@pytest.mark.parametrize("scales", SCALES, ids=str)
@in_every_library
def test_numbers_are_divided_by_a_scale_and_rounded_once(library, scales, element):
    for dtype in ("float16", "float32"):
        verify(library, dtype, element, tokens=(20,), scales=scales)


@in_both_formats
@pytest.mark.parametrize("dtype", FORMATS)
@in_every_library
def test_numbers_of_every_dtype_become_8_bits(library, dtype, element):
    for as_words in (True, False)[: 1 if library == "cupy" else 2]:
        verify(library, dtype, element, scales=(Scale(0.1), Scale(0.1)), as_words=as_words)


LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344}
ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 6e4, -6e4, 448, 464, 480, -500, 57344, 61440, -65504]
ODD += [2.0**-9, 2.0**-10, -(2.0**-10), 3 * 2.0**-11, 2.0**-16, -(2.0**-17), 2.0**-18, 2.0**-24]


@in_both_formats
@pytest.mark.parametrize("scale", [1.0, 0.01, 7.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@in_every_library
def test_what_is_no_plain_number_or_too_large_or_small_is_8_bits_too(
    library, dtype, element, scale
):
    values = np.resize(ODD, (SLOTS, H, D))
    x, zeros = (hold(each, dtype, library).array for each in (values, np.zeros((SLOTS, 1, D))))
    caches = Caches(library, element, "slots", library == "cupy")
    apply_rotary_kv_cache(
        *(zeros, x, x, *caches.arrays, table_of(library)),
        slot_mapping=hold(np.arange(SLOTS), "int32", library).array,
        cache_dtype=element if library == "cupy" else None,
        v_scale=scale,
    )
    _, found = caches.blocks(to_bits(caches.buffer))
    with np.errstate(over="ignore"):
        quotients = rounded(values, dtype) / np.float64(np.float32(scale))
    assert_codes(found[0], quotients, element, 2.0**-24)
    of_infinity = len(numbers_of(element)) - 1
    assert numbers_of(element)[of_infinity] == LARGEST[element]
    assert found[0].flat[3] == of_infinity and found[0].flat[4] == of_infinity | 0x80


@in_both_formats
@pytest.mark.parametrize("dtype", FORMATS)
@in_every_library
def test_a_quotient_next_to_a_tie_becomes_one_of_its_neighbours(library, dtype, element):
    """A scale such that quotients are as near to a tie as can be, without being one."""
    numbers = numbers_of(element)
    middles = (numbers[1:] + numbers[:-1]) / 2
    middles = np.resize(middles[(middles > 1) & (middles < 400)], H * D)
    for value in (1.75, 2.9375):
        scale = Scale(np.float32(value / 1.4140625))
        values = rounded(middles * np.float64(scale.value), dtype)
        values = values.reshape(H, D)
        verify(library, dtype, element, "slots", values=values, scales=(None, scale))


@in_both_formats
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@in_every_library
def test_every_number_of_16_bits_becomes_what_pytorch_makes_of_it(library, dtype, element):
    codes = np.arange(2**16, dtype=np.uint16).reshape(64, 8, 128)
    numbers = torch.from_numpy(codes.view(np.int16)).view(getattr(torch, dtype))
    expected = numbers.to(getattr(torch, element)).view(torch.uint8).numpy()
    largest = len(numbers_of(element)) - 1
    expected = np.where((expected & 0x7F) > largest, largest | expected & 0x80, expected)
    expected = np.where(np.isnan(numbers.float().numpy()), 0x7F, expected)

    v = Held(codes, dtype, library, place(codes.shape, "dense")).array
    zeros, q = (hold(np.zeros((64, n, 128)), dtype, library).array for n in (8, 1))
    cache = in_library(np.zeros(2 * 2**16, np.uint8), library, "uint8").reshape(2, 64, 8, 128)
    apply_rotary_kv_cache(
        *(q, zeros, v, cache[0], cache[1], table_of(library, *np.zeros((2, 64, 64)))),
        slot_mapping=hold(np.arange(64), "int32", library).array,
        cache_dtype=element,
    )
    found = to_bits(cache)[1]
    wrong = np.flatnonzero(found != expected)
    assert not len(wrong), f"{len(wrong)} of {dtype}: {[*map(hex, wrong[:9])]}"


@on_every("numpy", "cupy", "torch-cuda", ON_THE_HOST)
@pytest.mark.parametrize("block_size", [4, 1])
def test_every_batch_writes_to_its_own_slots_where_tokens_are_numbered_by_tiles(
    library, block_size
):
    """Heads before tokens and a table that is large: a tile must fit the array of slots too."""
    shape = (2, H, 8, D)  # batch, heads, tokens, head_dim
    q, k, v = np.float32(RNG.standard_normal((3, *shape)))
    blocks = 16 // block_size
    slots = RNG.permutation(16).reshape(2, 8)
    caches = [hold(np.zeros((blocks, H, block_size, D)), "float32", library) for _ in range(2)]
    with small_tiles():
        apply_rotary_kv_cache(
            *(hold(x, "float32", library).array for x in (q, k, v)),
            *(*(cache.array for cache in caches), table_of(library)),
            slot_mapping=hold(slots, "int64", library).array,
            **{"layout": "bhsd", "cache_layout": "HND"},
        )
    rotated = arranged(rotate(np.float64(canonical(k, "bhsd")), COS, SIN), "bhsd")
    for held, wanted in zip(caches, (rotated, v), strict=True):
        by_slot = to_float64(held.array).swapaxes(1, 2).reshape(16, H, D)
        check(by_slot[slots], np.moveaxis(np.float64(wanted), 2, 1), "float32")


@on_every("numpy", "torch", "cupy", "torch-cuda", ON_THE_HOST)
@pytest.mark.parametrize("dtype", FORMATS)
@in_both_formats
def test_scales_in_memory_have_any_dtype(library, dtype, element):
    if dtype == "bfloat16" and library in ("numpy", "cupy"):
        pytest.importorskip("ml_dtypes")
    x = np.float32(RNG.standard_normal((3, 5, H, D)))

    def written(k_scale, v_scale):
        caches = in_library(np.zeros(2 * 5 * H * D, np.uint8), library, "uint8")
        caches = caches.reshape(2, 5, H, D)
        apply_rotary_kv_cache(
            *(hold(part, "float32", library).array for part in x),
            *(caches[0], caches[1], table_of(library)),
            slot_mapping=hold(np.arange(5), "int32", library).array,
            **{"cache_dtype": element, "k_scale": k_scale, "v_scale": v_scale},
        )
        return to_bits(caches)

    scales = [hold([scale], dtype, library).array for scale in (0.375, 2.0)]
    assert np.array_equal(written(*scales), written(0.375, 2.0))
