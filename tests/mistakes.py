"""A right call of every public function, and tables of the mistakes that can be made in it.

A message reads "<argument> must <what was wanted>, got <what came>". A row of a table is the
exception, the argument, patterns of what was wanted and of what came, and the bad value; where it
takes more than one argument to make the mistake, a dict of them.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)

TYPE, VALUE, EITHER = TypeError, ValueError, (TypeError, ValueError)
ARRAY = "(?i:array|tensor|DLPack)"
NUMBERS = "float|complex"
DEVICE = "device|on |CPU|CUDA"
X = T, H, D = 5, 3, 8  # tokens, heads, head_dim
KV = T, 2, D
CACHE = 4, 3, 2, D  # blocks, slots, heads, head_dim
HALF = (6, 4)  # positions, rotary_dim / 2
RNG = np.random.default_rng(20)


def numpy_array(shape, dtype="float32"):
    return RNG.uniform(0.5, 1.5, shape).astype(dtype)


def torch_array(shape, dtype="float32"):
    return torch.from_numpy(RNG.uniform(0.5, 1.5, shape)).to(getattr(torch, dtype))


MAKERS = {"numpy": numpy_array, "torch": torch_array}


def pair_of(make, shape=HALF, dtype="float32"):
    return make(shape, dtype), make(shape, dtype)


def meta(shape, dtype="float32"):
    return torch_array(shape, dtype).to("meta")


def between_bytes(shape):
    """A float32 field of records of five bytes."""
    records = np.zeros(shape, [("x", "f4"), ("flag", "i1")])
    records["x"] = numpy_array(shape)
    return records["x"]


def read_only(shape):
    array = numpy_array(shape)
    array.flags.writeable = False
    return array


def lazily_negated(shape):
    return torch.complex(torch_array(shape), torch_array(shape)).conj().imag


def contents(value):
    """The bytes of every readable array within `value`."""
    if isinstance(value, dict):
        return contents(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [contents(item) for item in value]
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        plain = value.detach().resolve_conj().resolve_neg().flatten()
        return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return value.tobytes() if isinstance(value, np.ndarray) else None


def assert_refused(error, argument, wanted, got, function, *args, **kwargs):
    """The call raises the error with such a message, and no array has changed."""
    before = contents([args, kwargs])
    with pytest.raises(error, match=rf"(?s)^({argument}) must .*({wanted}).*, got .*({got})"):
        function(*args, **kwargs)
    assert contents([args, kwargs]) == before


# Right calls.


def of_rotary(make):
    return {"x": make(X), "table": pair_of(make)}


def of_rotary_qk(make):
    return {"q": make(X), "k": make(X), "table": pair_of(make)}


def of_norm(make):
    return {"x": make(X), "weight": make(D), "table": pair_of(make)}


def of_qk_norm(make):
    weights = {"q_weight": make(D), "k_weight": make(D)}
    return {"q": make(X), "k": make(KV), **weights, "table": pair_of(make)}


def of_qkv(make):
    heads = {"num_heads": H, "num_kv_heads": 2}
    return {"qkv": make((T, H + 4, D)), "table": pair_of(make), **heads, "norm": "head"}


def of_kv_cache(make):
    inputs = {"q": make(X), "k": make(KV), "v": make(KV), "table": pair_of(make), "norm": "head"}
    caches = {"k_cache": make(CACHE), "v_cache": make(CACHE)}
    return inputs | caches | {"slot_mapping": make(T, "int64") * 0 - 1}


FUSED = {
    apply_norm_rotary: of_norm,
    apply_qk_norm_rotary: of_qk_norm,
    apply_rotary_qkv: of_qkv,
    apply_rotary_kv_cache: of_kv_cache,
}
FUNCTIONS = {apply_rotary: of_rotary, apply_rotary_qk: of_rotary_qk} | FUSED
OF_PAIRS = apply_rotary_qk, apply_qk_norm_rotary  # whose out is a tuple
MAY_BE_NONE = "weight", "q_weight", "k_weight"


def of(names):
    return pytest.mark.parametrize("function", names, ids=lambda f: f.__name__)


every_function, every_fused_function = of(FUNCTIONS), of(FUSED)


def without_weights(function, make):
    """A right call whose norm has no weights."""
    arguments = FUNCTIONS[function](make)
    known = inspect.signature(function).parameters
    return arguments | dict.fromkeys(name for name in MAY_BE_NONE if name in known)


def cases_of(table, *arguments):
    """Parametrize `case` by the rows of a table that a maker of arrays fills: their numbers."""
    rows = table(numpy_array, *arguments)
    return pytest.mark.parametrize("case", range(len(rows)), ids=[f"{r[1]} {r[3]}" for r in rows])


def each(error, argument, wanted, *values):
    """A row for each of plain values, which the message shows, or else their type."""
    for bad in values:
        got = re.escape(repr(bad)) + (f"|{type(bad).__name__}" if error is TYPE else "")
        yield error, argument, wanted, got, bad


def sized(error, argument, wanted, make, *shapes, dtype="float32"):
    """A row for an array of each shape, which the message shows."""
    for shape in shapes:
        yield error, argument, wanted, re.escape(str(shape)), make(shape, dtype)


def typed(error, argument, wanted, make, shape, *dtypes):
    """A row for an array of each dtype, which the message shows."""
    for dtype in dtypes:
        yield error, argument, wanted, dtype, make(shape, dtype)


def changed_by(row):
    """What a row expects of the message, and the arguments that it changes."""
    *expected, bad = row
    return expected, bad if isinstance(bad, dict) else {row[1].split("|")[0]: bad}


# An array that is none, or not one that can be rotated, or read as a table.


def not_numbers(make, shape):
    return {
        "None": (TYPE, ARRAY, "None", None),
        "string": (TYPE, ARRAY, "str|abc", "abc"),
        "bytes": (TYPE, ARRAY, "bytes|abc", b"abc"),
        "list": (TYPE, ARRAY, "list", np.ones(shape).tolist()),
        "number": (TYPE, ARRAY, "float|1.0", 1.0),
        "masked": (TYPE, "without a mask", "MaskedArray", np.ma.masked_array(numpy_array(shape))),
        **{n: (TYPE, NUMBERS, n, make(shape, n)) for n in ("bool", "int8", "int64")},
        "big-endian": (TYPE, "byte order|float", ">|big|swap", numpy_array(shape, ">f4")),
        "long double": (TYPE, NUMBERS, "longdouble|128", numpy_array(shape, "longdouble")),
        "objects": (TYPE, NUMBERS, "object", numpy_array(shape, "O")),
        "float8": (TYPE, NUMBERS, "float8", torch_array(shape, "float8_e5m2")),
        "sparse": (EITHER, "dense|strided", "sparse", torch_array(shape).to_sparse()),
    }


def not_plain_floats(make, shape):
    return {
        "complex64": (TYPE, "float", "complex64", make(shape, "complex64")),
        "no whole elements": (VALUE, "stride|element", "", between_bytes(shape)),
        "another device": (VALUE, DEVICE, "meta", meta(shape)),
        "lazily negated": (VALUE, "values|neg", "lazy|neg", lazily_negated(shape)),
    }


def no_table_of_plain_floats(make, shape):
    requires_grad = (VALUE, "grad", "", torch_array(shape).requires_grad_())
    return not_plain_floats(make, shape) | {"requires grad": requires_grad}


def wrong_tables(make):
    """Arrays of numbers that make no table: what is refused, its maker and the arrays."""

    def half(*shapes):
        return (RotaryTable, *map(make, shapes))

    full, cache = RotaryTable.from_full_width, RotaryTable.from_cache
    matrices, cis = RotaryTable.from_matrices, RotaryTable.from_complex
    good, conjugated = make(HALF), torch_array(HALF, "complex64").conj()
    return [
        (VALUE, "sin", "6, 4", "5, 4", *half((6, 4), (5, 4))),
        (VALUE, "sin", "6, 4", "1, 4", *half((6, 4), (1, 4))),
        (VALUE, "sin", "6, 4", "1, 6, 4", *half((6, 4), (1, 6, 4))),
        (TYPE, "sin", "float32", "float64", RotaryTable, good, make(HALF, "float64")),
        (VALUE, "sin|cos", DEVICE, "meta", RotaryTable, good, meta(HALF)),
        (VALUE, "cos", "", r"\(4,\)", *half((4,), (4,))),
        (VALUE, "cos", "", "1, 1, 5, 1, 4", *half(*[(1, 1, 5, 1, 4)] * 2)),
        (VALUE, "cos|table", "", "0", *half((6, 0), (6, 0))),
        (VALUE, "cos", "even", "7", full, make((6, 7)), make((6, 7))),
        (VALUE, "cos_sin", "even", "7", cache, make((6, 7))),
        (VALUE, "cos_sin", "", r"\(8,\)", cache, make((8,))),
        (VALUE, "freqs", "", "4, 2, 2", matrices, make((4, 2, 2))),
        (VALUE, "freqs", "2 x 2", "6, 4, 2", matrices, make((6, 4, 2))),
        (VALUE, "freqs", "2 x 2", "2, 3", matrices, make((6, 4, 2, 3))),
        (VALUE, "freqs", "2 x 2", "2, 2, 4", matrices, make((6, 2, 2, 4))),
        (TYPE, "freqs_cis", "complex", "float32", cis, make(HALF)),
        (VALUE, "freqs_cis", "", "4,", cis, make(4, "complex64")),
        (VALUE, "freqs_cis", "values|conj", "lazy|conj", cis, conjugated),
    ]


# A wrong argument of an otherwise right call of any function.


def wrong_options(make):
    return [
        *each(TYPE, "layout", "str", 3, ("s", "h", "d")),
        *each(VALUE, "layout", "d", "shx", "sdh"),
        *each(VALUE, "layout", "", "bsd", "bhd", "ssd", "sthd", ""),
        (VALUE, "layout|x", "", r"bshd|\(5, \d, 8\)|3", "bshd"),
        *each(TYPE, "head_dim", "int", True, 8.0, "8"),
        *each(VALUE, "head_dim", "", 0, -8),
        (VALUE, "head_dim|x", "divi|multiple", "3|8", 3),
        *each(TYPE, "rotary_offset", "int", True, 2.0, None),
        *each(VALUE, "rotary_offset", "", -2),
        (VALUE, "rotary_offset|rotary_dim", "head_dim", "2", 2),
        *each(TYPE, "interleaved", "bool|True", 1, "yes"),
        *each(TYPE, "conjugate", "bool|True", None, 0),
        *each(EITHER, "out_of_range", "nan", 0),
        *each(VALUE, "out_of_range", "keep", "clip"),
        *each(TYPE, "table", "RotaryTable", "abc", 0),
        *each(VALUE, "rounding", "'eager'", "twice"),
        *each(TYPE, "rounding", "'once'", None, ["once"]),
    ]


def wrong_positions(make):
    dtypes = ("float32", "bool", "int8", "int16", "uint8", "uint32", "uint64", "complex64")
    where, batches, rows = "positions", {"x": make((2, *X))}, make(5, "int64")
    by_batch, by_head = pair_of(make, (1, 5, 4)), pair_of(make, (1, 5, 1, 4))
    return [
        *each(TYPE, where, "int", True, 1.5, "0", [0, 1, 2, 3, 4]),
        *each(VALUE, where, "", -1),
        (VALUE, "positions|table", "", "", 2),
        (VALUE, "positions|table", "", "", 2**70),
        *typed(TYPE, where, "int32", make, 5, *dtypes),
        (TYPE, where, "byte order|int32", ">|big|swap", numpy_array(5, ">i8")),
        *sized(VALUE, where, "5", make, (4,), (5, 1), (1, 1, 5), dtype="int64"),
        (VALUE, where, "2", r"\(3, 5\)", batches | {where: make((3, 5), "int32")}),
        (VALUE, where, DEVICE, "meta", meta(5, "int64")),
        (VALUE, where, "None", "", {"table": by_batch, where: rows}),
        (VALUE, "table", "1 to 5", "5 tokens", {"table": by_batch, where: 1}),
        (VALUE, "table", "1 to 5", "5 tokens", {"table": by_head, where: 1}),
    ]


def wrong_counts(make):
    """Of offsets, packed sequences and positions on three axes."""
    offsets, ends, section = "seqlen_offsets", "cu_seqlens", "mrope_section"
    one_offset, three_ends = {offsets: make(1, "int64")}, {ends: make(3, "int64")}
    three_offsets = {offsets: make(3, "int64")}
    positions, axes = {"positions": make(5, "int64")}, {"positions": make((3, 5), "int64")}
    by_batch, batches = {"table": pair_of(make, (1, 5, 4))}, {"x": make((2, *X))}
    right = {section: (1, 1, 2)}
    return [
        *typed(TYPE, offsets, "int32", make, 1, "float32", "int16"),
        *each(TYPE, offsets, "int", [1], 1.5),
        (VALUE, "positions", "0 or more", "-1", {offsets: -1}),
        (VALUE, "positions", "64", str(2**70), one_offset | {"positions": 2**70}),
        (VALUE, offsets, "2", r"\(3,\)", batches | three_offsets),
        (VALUE, offsets, "1", r"\(1, 5\)", make((1, 5), "int64")),
        (VALUE, offsets, "None", "both", one_offset | positions),
        (VALUE, offsets, DEVICE, "meta", meta(1, "int64")),
        (VALUE, offsets, "None", "", by_batch | one_offset),
        (VALUE, "table", "2 to 6", "5 tokens", by_batch | {offsets: 2}),
        *typed(TYPE, ends, "int32", make, 3, "uint64"),
        *each(TYPE, ends, ARRAY, 5),
        *sized(VALUE, ends, "sequences", make, (0,), (1, 3), dtype="int64"),
        (VALUE, ends, "None", "", batches | three_ends),
        (VALUE, ends, "None", "both", three_ends | positions),
        (VALUE, offsets, "2", r"\(3,\)", three_ends | three_offsets),
        (VALUE, ends, "None", "", by_batch | three_ends),
        (TYPE, section, "three", "2", axes | {section: (2, 2)}),
        (TYPE, section, "three", "'112'", axes | {section: "112"}),
        (TYPE, section, "int", "1.0", axes | {section: (1.0, 1, 2)}),
        (VALUE, section, "0 or more", "-1", axes | {section: (-1, 3, 2)}),
        (VALUE, section, "4", r"\(1, 2, 2\)", axes | {section: (1, 2, 2)}),
        (VALUE, "positions", "three axes", "none", right),
        (VALUE, "positions", r"\(3, 5\)", r"\(5,\)", positions | right),
        (VALUE, "positions", r"\(5,\)", r"\(3, 5\)", axes),
        (TYPE, "mrope_interleaved", "True", "1", axes | right | {"mrope_interleaved": 1}),
        (VALUE, section, "mrope_interleaved", "None", {"mrope_interleaved": True}),
    ]


def wrong_sizes(make):
    """Of x, and of tables for it."""

    def table(*shape):
        return {"table": pair_of(make, shape)}

    split, batches = {"head_dim": 8}, {"x": make((2, *X))}
    elsewhere, three = (meta(HALF), meta(HALF)), (*pair_of(make), None)
    return [
        *sized(VALUE, "x", "", make, (), (8,), (5, 8), (1, 1, *X)),
        (VALUE, "x", "", r"\(24,\)", {"x": make((24,))} | split),
        (VALUE, "x", "", r"\(1, 5, 3, 8\)", {"x": make((1, *X))} | split),
        (VALUE, "layout", "hd", "bhsd", {"x": make((2, 5, 24)), "layout": "bhsd"} | split),
        (VALUE, "rotary_dim|table", "6", "8", {"x": make((5, 3, 6))}),
        (VALUE, "table|positions", "5", "4", table(4, 4)),
        (VALUE, "table", "5 tokens", "6", table(1, 6, 4)),
        (VALUE, "table", "5", "4", table(1, 4, 1, 4)),
        (VALUE, "table", "2", "3", batches | table(3, 5, 4)),
        (VALUE, "table", "1", "2", table(2, 5, 4)),
        (VALUE, "table", "3", "2", table(1, 5, 2, 4)),
        (TYPE, "table", "RotaryTable", ARRAY, make(HALF)),
        (TYPE, "table", "RotaryTable", "list", list(pair_of(make))),
        (EITHER, "table", "cos", "1", (make(HALF),)),
        (EITHER, "table", "cos", "3", {"table": three}),
        (VALUE, "cos|table", DEVICE, "meta", {"table": elsewhere}),
    ]


def wrong_calls(make):
    return [
        *(wrong_options(make) + wrong_positions(make)),
        *(wrong_counts(make) + wrong_sizes(make)),
    ]


def wrong_outs(make, shape=X):
    """An out, or the first of two, for an array of a shape in float32."""
    like, grad = math.prod(shape) * [0.0], torch_array(shape).requires_grad_()
    named = ", ".join(map(str, shape))
    return [
        (TYPE, "out", ARRAY, "str|abc", "abc"),
        (TYPE, "out", ARRAY, "list", like),
        (TYPE, "out", ARRAY, "tuple", (make(shape), make(shape))),
        *sized(VALUE, "out", named, make, (T, 1, D), (T, 2, D)),
        (VALUE, "out", named, rf"\(1, {named}\)", make((1, *shape))),
        (TYPE, "out", "float32", "float64", make(shape, "float64")),
        (VALUE, "out", DEVICE, "meta", meta(shape)),
        (VALUE, "out", "writ", "read-only", read_only(shape)),
        (VALUE, "out", "stride|element", "", between_bytes(shape)),
        (VALUE, "out", "grad", "", grad),
        (VALUE, "out", "values|neg", "lazy|neg", lazily_negated(shape)),
    ]


def wrong_pairs(make):
    """Of apply_rotary_qk: a k or an out that does not suit q."""
    q, k, by_head = make(X), make(X), {"table": pair_of(make, (1, 5, 3, 4))}
    return [
        (TYPE, "k", "float32", "float64", make(X, "float64")),
        (VALUE, "k", "5", "6", make((6, 3, 8))),
        (VALUE, "k", "", r"\(1, 5, 3, 8\)", make((1, *X))),
        (VALUE, "k", "8", "16", make((5, 3, 16))),
        (VALUE, "table", "3 and 2", "3", {"k": make((5, 2, 8))} | by_head),
        (TYPE, "out", "tuple", ARRAY, q),
        (EITHER, "out", "two", "3", {"out": (q, k, k)}),
        (TYPE, "k_out", ARRAY, "None", {"out": (q, None)}),
        (VALUE, "k_out", "5, 1, 8", "5, 3, 8", {"k": make((5, 1, 8)), "out": (q, k)}),
    ]


# A wrong argument of the functions that normalise, of packed arrays, of caches.


def wrong_norms(make):
    return [
        *each(VALUE, "norm", "'head' or 'heads' or 'layer'", "layers"),
        *each(TYPE, "norm", "'head' or 'heads'", True, ["head"]),
        *each(TYPE, "round_norm", "True, False or 'before", 1, None),
        *each(VALUE, "round_norm", "True, False or 'before", "after"),
        *each(TYPE, "norm_after", "True or False", 1, None, "yes"),
        *each(VALUE, "eps", "finite", math.nan, math.inf),
        *each(VALUE, "eps", "at most", 1e39, 3.5e38),
        *each(VALUE, "eps", "0 or more", -1e-6),
        *each(TYPE, "eps", "number", "1e-6", True, None, [1e-6]),
        (VALUE, "eps", "finite", "1000", 10**400),
        (TYPE, "eps", "number", "ndarray|Tensor", make(1)),
        *each(TYPE, "weight_offset", "number", "1", None),
        *each(VALUE, "weight_offset", "finite", math.inf),
        *each(VALUE, "weight_offset", "at most", 1e39, 3.5e38),
        (VALUE, "weight_offset", "finite", "1000", 10**400),
    ]


def wrong_weights(make, name="weight"):
    def normed(norm, size):
        wanted = f"norm='{norm}'"
        return (VALUE, name, wanted, rf"\({size},\)", {name: make(size), "norm": norm})

    return [
        *sized(VALUE, name, r"\(8,\)", make, (1, D), (), (6,)),
        *(normed("head", 24), normed("heads", D), normed("heads", 32), normed("layer", 24)),
        *typed(TYPE, name, "float16", make, D, "int64", "complex64"),
        (TYPE, name, "float16", "float8", torch_array(D, "float8_e5m2")),
        (VALUE, name, "device", "meta", meta(D)),
    ]


def wrong_biases(make, name="bias"):
    layer, suits = {"norm": "layer"}, make(D)
    rows = [
        *sized(VALUE, name, r"\(8,\)", make, (1, D), (), (6,), (24,)),
        *typed(TYPE, name, "float16", make, D, "int64", "complex64"),
        (VALUE, name, "device", "meta", meta(D)),
    ]
    for norm in ("head", "heads"):
        rows.append((VALUE, name, "unless norm='layer'", "array", {name: suits, "norm": norm}))
    return [(*row, layer | (bad if isinstance(bad, dict) else {name: bad})) for *row, bad in rows]


def wrong_without_table(make):
    """Of calls that normalise and do not rotate."""
    rows = [
        ("positions", "2", 2),
        ("positions", r"\(5,\)", make(5, "int64")),
        ("interleaved", "False", False),
        ("interleaved", "True", True),
        ("conjugate", "True", True),
        ("rotary_offset", "2", 2),
        ("cu_seqlens", r"\(3,\)", make(3, "int64")),
        ("seqlen_offsets", r"\(1,\)", make(1, "int64")),
        ("mrope_section", r"\(1, 1, 2\)", (1, 1, 2)),
    ]
    return [(VALUE, name, "without a table", got, {name: bad}) for name, got, bad in rows]


def wrong_packed(make):
    split = {"head_dim": D}
    return [
        *each(VALUE, "num_heads", "1 or more", 0, -1),
        *each(TYPE, "num_heads", "int", True, 3.0, "3", None, [3]),
        *each(VALUE, "num_kv_heads", "1 or more", 0, -2),
        *each(TYPE, "num_kv_heads", "int", True, 2.0),
        (VALUE, "qkv", "= 8 heads", "7", {"num_heads": 4}),
        (VALUE, "qkv", "= 5 heads", "7", {"num_kv_heads": 1}),
        (VALUE, "qkv", "head_dim=8 divides", "41", {"qkv": make((T, 41))} | split),
        (VALUE, "qkv", "= 7 heads", "6", {"qkv": make((T, 48))} | split),
        *each(TYPE, "qkv", "array", [make(X)]),
    ]


def repeating(shape):
    """An array whose slots, or tokens, all lie in one place."""
    strides = *(0 for _ in shape[:-2]), 4 * shape[-1], 4
    return as_strided(numpy_array(shape), shape, strides)


def wrong_caches(make):
    k_cache, v_cache, slots, dtype = "k_cache", "v_cache", "slot_mapping", "cache_dtype"

    def both(*shape, **options):
        return {k_cache: make(shape), v_cache: make(shape)} | options

    def in_bytes(element):
        return {k_cache: make(CACHE, "uint8"), v_cache: make(CACHE, "uint8"), dtype: element}

    def of_one(*names):
        return {"q": make(KV), k_cache: make(KV)} | dict.fromkeys(names, make(KV))

    e5m2, e4m3fn = (torch_array(CACHE, f"float8_{name}") for name in ("e5m2", "e4m3fn"))
    return [
        (VALUE, k_cache, "slots, heads, head_dim", "192", both(192)),
        (VALUE, k_cache, "slots, heads", "1, 4, 3", both(1, *CACHE)),
        (VALUE, k_cache, "with 2 heads", "4, 3, 1, 8", both(4, 3, 1, 8)),
        (VALUE, k_cache, "head_dim 8", "2, 6", both(4, 3, 2, 6)),
        (VALUE, k_cache, r"slots, 16", "12, 8", both(12, 8)),
        (VALUE, k_cache, "slots, heads, head_dim", "4, 2, 3", both(4, 2, 3, 8)),
        (VALUE, k_cache, "heads, slots, head_dim", "4, 3, 2, 8", both(*CACHE, cache_layout="HND")),
        (TYPE, k_cache, "float32, float8_e4m3fn, float8_e5m2", "float64", make(CACHE, "float64")),
        (TYPE, v_cache, "float32", "int64", make(CACHE, "int64")),
        (TYPE, k_cache, "float8", "uint8", in_bytes(None)),
        (VALUE, dtype, "float8_e5m2", "'float16'", in_bytes("float16")),
        (TYPE, dtype, "float8_e5m2", "dtype", in_bytes(e5m2.dtype)),
        (TYPE, dtype, "float8_e5m2", "list", in_bytes([1])),
        (TYPE, k_cache, "uint8, float8_e5m2", "float32", {dtype: "float8_e5m2"}),
        *each(VALUE, "cache_layout", "'NHD' or 'HND'", "NDH"),
        *each(TYPE, "cache_layout", "'NHD'", None, ["NHD"]),
        (VALUE, k_cache, "writable", "read-only", read_only(CACHE)),
        (VALUE, v_cache, "writable", "read-only", read_only(CACHE)),
        (VALUE, v_cache, "overlap itself", "strides", repeating(CACHE)),
        (VALUE, v_cache, r"\(4, 3\)", r"\(5, 3\)", make((5, 3, 2, 8))),
        (VALUE, v_cache, r"\(4, 3\)", r"\(3, 4\)", make((3, 4, 2, 8))),
        (VALUE, v_cache, "float32", "float8_e5m2", e5m2),
        (VALUE, v_cache, "float8_e4m3fn", "float8_e5m2", {k_cache: e4m3fn, v_cache: e5m2}),
        (VALUE, k_cache, "device", "meta", meta(CACHE)),
        (TYPE, "k_out", ARRAY, "str|abc", "abc"),
        (VALUE, "k_out", r"\(5, 2, 8\)", r"\(5, 3, 8\)", make(X)),
        (TYPE, "k_out", "float32", "float64", make(KV, "float64")),
        (TYPE, "k_out", "float32", "uint8", make(KV, "uint8")),
        (VALUE, "k_out", "writ", "read-only", read_only(KV)),
        (VALUE, "k_out", "overlap itself", "strides", repeating(KV)),
        (VALUE, "k_out", "device", "meta", meta(KV)),
        (VALUE, "k_out", "share", "overlap", {v_cache: make(KV)} | of_one("k_out", "v")),
        (VALUE, "k_out", "share", "overlap", {v_cache: make(KV)} | of_one("k_out", "out")),
        (VALUE, "k_out", "share", "overlap", {v_cache: make(KV)} | of_one("k_out", k_cache)),
        *typed(TYPE, slots, "int32, int64", make, T, "float32", "int16", "uint64", "bool"),
        *sized(VALUE, slots, r"\(5,\)", make, (6,), (5, 1), (), dtype="int64"),
        *sized(VALUE, slots, r"\(1, 5\)", make, (1, 1, 5), (2, 5), dtype="int32"),
        (VALUE, slots, "positive stride", "-1", {slots: numpy_array(3, "int64")[::-1]}),
        *each(TYPE, slots, "array", 3),
        (TYPE, slots, "byte order", ">i8", numpy_array(T, ">i8")),
        (VALUE, slots, "device", "meta", meta(T, "int64")),
        (VALUE, "v", r"\(5, 2, 8\)", r"\(5, 1, 8\)", make((5, 1, 8))),
        (VALUE, "v", "8", "6", make((5, 2, 6))),
        (VALUE, "v", "5", "4", make((4, 2, 8))),
        (TYPE, "v", "float32", "float64", make(KV, "float64")),
        (VALUE, "v", "3 axes", "1, 5, 2, 8", make((1, *KV))),
        (VALUE, "k_scale", "None or 1", "scale", 2.0),
        (VALUE, "v_scale", "None or 1", "scale", make(1)),
        *wrong_scales(make, in_bytes("float8_e4m3fn")),
    ]


def wrong_scales(make, in_bytes):
    k_scale, v_scale = "k_scale", "v_scale"
    rows = [
        *each(VALUE, k_scale, r"2\^-126", 0, -0.5, 1e-40),
        *each(VALUE, k_scale, "finite", math.nan),
        *each(VALUE, v_scale, "finite", math.inf),
        *each(VALUE, k_scale, r"2\^126", 1e39),
        (VALUE, k_scale, "finite", "10000", 10**400),
        *each(TYPE, k_scale, "number", "1", [1.0]),
        *each(TYPE, v_scale, "number", True),
        *sized(VALUE, k_scale, "one element", make, (2,), (1, 1)),
        *sized(VALUE, v_scale, "one", make, (0,)),
        *typed(TYPE, k_scale, "float32", make, 1, "int64"),
        (VALUE, k_scale, "device", "meta", meta(1)),
    ]
    two = {k_scale: make(1), v_scale: make(1, "float64")}
    two_dtypes = (TYPE, v_scale, "k_scale's dtype float32", "float64", two | in_bytes)
    return [(*row, in_bytes | {row[1]: bad}) for *row, bad in rows] + [two_dtypes]
