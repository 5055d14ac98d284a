"""The fused functions beside the plain ones: what they refuse, what they share, what they repeat.

A row of a table of mistakes is the exception, the argument, patterns of what was wanted and of what
came, and the arguments that are changed in a call which is right.
"""

import inspect

import numpy as np
import pytest
import torch
from arrays import Held, Producer, hold, place
from numpy.lib.stride_tricks import as_strided
from reference import encode, to_bits
from test_errors import (
    HALF,
    MAKERS,
    X,
    assert_refused,
    between_bytes,
    numpy_array,
    pair_of,
    read_only,
    torch_array,
    wrong_calls,
)
from test_rotary import ON_THE_HOST, on_every

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)

T, H, D = X
KV = T, 2, D
CACHE = 4, 3, 2, D  # blocks, slots, heads, head_dim
RNG = np.random.default_rng(40)

CACHED = "q", "k", "v", "k_cache", "v_cache"
in_numpy_and_torch = pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
in_every_library = on_every("numpy", "torch", "cupy", "torch-cuda", ON_THE_HOST)


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


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
every_function = pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)


@every_function
def test_every_option_of_the_plain_function_is_one_of_the_fused(function):
    plain, fused = (inspect.signature(f).parameters for f in (apply_rotary_qk, function))
    options = [p for p in plain.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert len(options) == 13
    for option in options:
        assert fused[option.name].kind is option.kind
        assert fused[option.name].default == option.default
    assert list(fused)[-len(options) :] == [option.name for option in options]


@every_function
def test_the_call_that_mistakes_are_made_in_is_right(function, make):
    function(**FUSED[function](make))


# The mistakes of the plain functions.

SHARED = [
    name
    for name, (*_, changed) in wrong_calls(numpy_array).items()
    if not {"x", "out"} & {*changed}
]


@every_function
@pytest.mark.parametrize("case", SHARED)
def test_a_wrong_argument_of_the_plain_functions_is_refused(case, function, make):
    error, argument, wanted, got, changed = wrong_calls(make)[case]
    arguments = FUSED[function](make)
    argument = argument.replace("x", next(iter(arguments)))
    wanted = wanted.replace(r"\(5, 3, 8\)", "")
    got = r"\(5, \d, 8\)" if case == "layout of another rank" else got
    assert_refused(error, argument, wanted, got, function, **arguments | changed)


@every_function
@pytest.mark.parametrize("kind", ["another shape", "another dtype", "read-only", "elsewhere"])
def test_an_out_that_does_not_suit_is_refused(kind, function, make):
    arguments = FUSED[function](make)
    first = next(iter(arguments))
    shape = tuple(arguments[first].shape)
    out, *expected = {
        "another shape": (make((T, 1, D)), ValueError, "shape", r"\(5, 1, 8\)"),
        "another dtype": (make(shape, "float64"), TypeError, "float32", "float64"),
        "read-only": (read_only(shape), ValueError, "writ", "read-only"),
        "elsewhere": (torch_array(shape).to("meta"), ValueError, "device|on |CPU", "meta"),
    }[kind]
    name = "q_out" if first == "q" else "out"
    out = (out, make(KV)) if function is apply_qk_norm_rotary else out
    error, *patterns = expected
    assert_refused(error, name, *patterns, function, **arguments | {"out": out})


ARRAYS = {
    "masked": (TypeError, "without a mask", "MaskedArray", lambda a: np.ma.masked_array(a)),
    "a list": (TypeError, "array", "list", lambda a: a.tolist()),
    "None": (TypeError, "array", "None", lambda a: None),
    "int8": (TypeError, "dtype", "int8", lambda a: a.astype(np.int8)),
    "big-endian": (TypeError, "byte order", ">", lambda a: a.astype(a.dtype.newbyteorder(">"))),
    "between bytes": (ValueError, "whole elements", "", lambda a: between_bytes(a.shape)),
    "elsewhere": (ValueError, "device|on ", "meta", lambda a: torch.from_numpy(a).to("meta")),
}
MAY_BE_NONE = "weight", "q_weight", "k_weight"


@every_function
@pytest.mark.parametrize("kind", ARRAYS)
def test_any_array_that_is_none_or_of_a_wrong_kind_is_refused_by_its_name(kind, function):
    error, wanted, got, of = ARRAYS[kind]
    arguments = FUSED[function](numpy_array)
    for name, array in arguments.items():
        if isinstance(array, np.ndarray) and not (kind == "None" and name in MAY_BE_NONE):
            changed = arguments | {name: of(array)}
            if kind == "between bytes" and name == "slot_mapping":
                continue
            name = "q|q_out" if name == "q" else name
            assert_refused((error, TypeError), name, f"{wanted}|dtype", got, function, **changed)


@pytest.mark.parametrize("weights", [("q_weight", "k_weight"), ()], ids=["weights", "no weights"])
def test_each_of_two_outs_is_an_array(weights, make):
    arguments = of_qk_norm(make)
    arguments |= dict.fromkeys({"q_weight", "k_weight"} - {*weights})
    q, k, call = arguments["q"], arguments["k"], apply_qk_norm_rotary
    for name, out in {"q_out": (None, k), "k_out": (q, None)}.items():
        assert_refused(TypeError, name, "array", "None", call, **arguments, out=out)
    for out in (q, (q,), (q, k, k)):
        assert_refused(TypeError, "out", "tuple of two", "", call, **arguments, out=out)


# A norm's.


def wrong_norms(make):
    return {
        "norm 'layer'": (ValueError, "norm", "'head' or 'heads'", "'layer'", {"norm": "layer"}),
        "norm True": (TypeError, "norm", "'head' or 'heads'", "True", {"norm": True}),
        "norm a list": (TypeError, "norm", "'head' or 'heads'", "list", {"norm": ["head"]}),
        "round_norm 1": (TypeError, "round_norm", "True, False or 'before", "1", {"round_norm": 1}),
        "round_norm None": (TypeError, "round_norm", "True", "None", {"round_norm": None}),
        "eps nan": (ValueError, "eps", "finite", "nan", {"eps": float("nan")}),
        "eps inf": (ValueError, "eps", "finite", "inf", {"eps": float("inf")}),
        "eps below 0": (ValueError, "eps", "0 or more", "-1e-06", {"eps": -1e-6}),
        "eps a string": (TypeError, "eps", "number", "'1e-6'", {"eps": "1e-6"}),
        "eps of 400 digits": (ValueError, "eps", "finite", "1000", {"eps": 10**400}),
        "eps True": (TypeError, "eps", "number", "True", {"eps": True}),
        "eps None": (TypeError, "eps", "number", "None", {"eps": None}),
        "eps a list": (TypeError, "eps", "number", "list", {"eps": [1e-6]}),
        "eps an array": (TypeError, "eps", "number", "ndarray|Tensor", {"eps": make(1)}),
        "offset '1'": (TypeError, "weight_offset", "number", "'1'", {"weight_offset": "1"}),
        "offset inf": (ValueError, "weight_offset", "finite", "inf", {"weight_offset": np.inf}),
        "offset None": (TypeError, "weight_offset", "number", "None", {"weight_offset": None}),
        "rounding 'twice'": (ValueError, "rounding", "'eager'", "'twice'", {"rounding": "twice"}),
        "rounding None": (TypeError, "rounding", "'once'", "None", {"rounding": None}),
        "rounding a list": (TypeError, "rounding", "'once'", "list", {"rounding": ["once"]}),
    }


@every_function
@pytest.mark.parametrize("case", wrong_norms(numpy_array))
def test_a_norm_that_is_none_is_refused(case, function, make):
    *expected, changed = wrong_norms(make)[case]
    assert_refused(*expected, function, **FUSED[function](make) | changed)


@pytest.mark.parametrize("function", [apply_norm_rotary, apply_qk_norm_rotary])
def test_a_norm_of_none_is_refused_where_there_must_be_one(function, make):
    wanted = "'head' or 'heads'"
    assert_refused(TypeError, "norm", wanted, "None", function, **FUSED[function](make), norm=None)


@pytest.mark.parametrize("function", [apply_rotary_qkv, apply_rotary_kv_cache])
@pytest.mark.parametrize(
    "changed", [{"eps": 1e-5}, {"eps": "tiny"}, {"weight_offset": 1.0}, {"round_norm": False}]
)
def test_what_belongs_to_a_norm_is_refused_without_one(function, changed, make):
    call = FUSED[function](make) | {"norm": None}
    assert_refused(ValueError, "norm", "be given", "None", function, **call, **changed)


def wrong_weights(make, name):
    whole = {"norm": "heads"}
    return {
        "of two axes": (ValueError, r"\(8,\)", r"\(1, 8\)", {name: make((1, D))}),
        "of no axes": (ValueError, r"\(8,\)", r"\(\)", {name: make(())}),
        "of a part of a head": (ValueError, r"\(8,\)", r"\(6,\)", {name: make(6)}),
        "of all heads": (ValueError, "norm='head'", r"\(24,\)", {name: make(24), "norm": "head"}),
        "of one head": (ValueError, "norm='heads'", r"\(8,\)", {name: make(D)} | whole),
        "of other heads": (ValueError, "norm='heads'", r"\(32,\)", {name: make(32)} | whole),
        "of int64": (TypeError, "float16", "int64", {name: make(D, "int64")}),
        "of complex64": (TypeError, "float16", "complex64", {name: make(D, "complex64")}),
        "of float8": (TypeError, "float16", "float8", {name: torch_array(D, "float8_e5m2")}),
        "elsewhere": (ValueError, "device", "meta", {name: torch_array(D).to("meta")}),
    }


@every_function
@pytest.mark.parametrize("case", wrong_weights(numpy_array, "weight"))
def test_weights_that_do_not_suit_are_refused(case, function, make):
    for name in ["weight"] if function is apply_norm_rotary else ["q_weight", "k_weight"]:
        arguments = FUSED[function](make)
        others = dict.fromkeys({"q_weight", "k_weight"} & {*arguments})
        *expected, changed = wrong_weights(make, name)[case]
        error, *patterns = expected
        assert_refused(error, name, *patterns, function, **arguments | others | changed)


@pytest.mark.parametrize("function", list(FUSED)[1:], ids=lambda f: f.__name__)
def test_weights_of_two_dtypes_are_refused(function, make):
    weights = {"q_weight": make(D), "k_weight": make(D, "float64")}
    wanted = "q_weight's dtype float32"
    arguments = FUSED[function](make) | weights
    assert_refused(TypeError, "k_weight", wanted, "float64", function, **arguments)


@every_function
def test_a_head_too_long_for_a_norm_is_refused_and_without_one_is_not(function, make):
    arguments = longer(FUSED[function](make), 520)
    for norm in ("head", "heads"):
        changed = arguments | {"norm": norm}
        assert_refused(ValueError, "head_dim", "512", "520", function, **changed)
    if function in (apply_rotary_qkv, apply_rotary_kv_cache):
        function(**arguments | {"norm": None})


def longer(arguments, head_dim):
    """The arguments with heads of another size, of NumPy's or PyTorch's arrays, and no weights."""

    def of(name, array):
        if name in MAY_BE_NONE:
            return None
        if name in ("table", "slot_mapping") or not hasattr(array, "shape"):
            return array
        if isinstance(array, np.ndarray):
            return np.resize(array, (*array.shape[:-1], head_dim))
        return array.new_zeros((*array.shape[:-1], head_dim))

    return {name: of(name, array) for name, array in arguments.items()}


@every_function
def test_a_token_that_no_block_can_hold_is_refused_on_the_cpu_too(function, make):
    arguments = FUSED[function](make) | dict.fromkeys(MAY_BE_NONE) | {"norm": "heads"}
    arguments = {k: v for k, v in arguments.items() if k in inspect.signature(function).parameters}
    first = next(iter(arguments))
    heads = 20_000
    arguments[first] = make((T, heads + (4 if first == "qkv" else 0), D))
    if first == "qkv":
        arguments["num_heads"] = heads
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^norm='heads' must have .*block.* got 20000 heads"):
            function(**arguments)


# A packed array's.


def wrong_packed(make):
    return {
        "no heads": (ValueError, "num_heads", "1 or more", "0", {"num_heads": 0}),
        "fewer": (ValueError, "num_heads", "1 or more", "-1", {"num_heads": -1}),
        "True": (TypeError, "num_heads", "int", "True", {"num_heads": True}),
        "3.0": (TypeError, "num_heads", "int", "3.0", {"num_heads": 3.0}),
        "'3'": (TypeError, "num_heads", "int", "'3'", {"num_heads": "3"}),
        "None": (TypeError, "num_heads", "int", "None", {"num_heads": None}),
        "a list": (TypeError, "num_heads", "int", "list", {"num_heads": [3]}),
        "no heads of k": (ValueError, "num_kv_heads", "1 or more", "0", {"num_kv_heads": 0}),
        "fewer of k": (ValueError, "num_kv_heads", "1 or more", "-2", {"num_kv_heads": -2}),
        "True of k": (TypeError, "num_kv_heads", "int", "True", {"num_kv_heads": True}),
        "2.0 of k": (TypeError, "num_kv_heads", "int", "2.0", {"num_kv_heads": 2.0}),
        "too many": (ValueError, "qkv", "= 8 heads", "7", {"num_heads": 4}),
        "too few of k": (ValueError, "qkv", "= 5 heads", "7", {"num_kv_heads": 1}),
        "no whole heads": (
            *(ValueError, "qkv", "head_dim=8 divides", "41"),
            {"qkv": make((T, 41)), "head_dim": D},
        ),
        "heads in a row": (
            *(ValueError, "qkv", "= 7 heads", "6"),
            {"qkv": make((T, 48)), "head_dim": D},
        ),
        "a list of arrays": (TypeError, "qkv", "array", "list", {"qkv": [make(X)]}),
        "a tuple of outs": (TypeError, "out", "array", "tuple", {"out": (make(X), make(X))}),
    }


@pytest.mark.parametrize("case", wrong_packed(numpy_array))
def test_heads_that_are_not_those_of_a_packed_array_are_refused(case, make):
    *expected, changed = wrong_packed(make)[case]
    assert_refused(*expected, apply_rotary_qkv, **of_qkv(make) | changed)


# A cache's.


def repeating(shape):
    """An array whose slots all lie in one place."""
    return as_strided(numpy_array(shape), shape, (0, 0, 4 * shape[-1], 4))


def wrong_caches(make):
    def each(shape, **options):
        return {"k_cache": make(shape), "v_cache": make(shape)} | options

    def bytes_(dtype="float8_e4m3fn", **options):
        return each(CACHE) | {
            "k_cache": make(CACHE, "uint8"),
            "v_cache": make(CACHE, "uint8"),
            "cache_dtype": dtype,
            **options,
        }

    e5m2 = torch_array(CACHE, "float8_e5m2")
    slots, k_cache, scale = "slot_mapping", "k_cache", "k_scale"
    return {
        "cache of 1 axis": (ValueError, k_cache, "slots, heads, head_dim", "192", each((192,))),
        "cache of 5 axes": (ValueError, k_cache, "slots, heads", "1, 4, 3", each((1, *CACHE))),
        "cache of 1 head": (ValueError, k_cache, "with 2 heads", "4, 3, 1, 8", each((4, 3, 1, 8))),
        "cache of 6 elements": (ValueError, k_cache, "head_dim 8", "2, 6", each((4, 3, 2, 6))),
        "cache of flat heads": (ValueError, k_cache, r"slots, 16", "12, 8", each((12, 8))),
        "cache of HND": (
            ValueError,
            k_cache,
            "slots, heads, head_dim",
            "4, 2, 3",
            each((4, 2, 3, 8)),
        ),
        "cache of NHD": (
            *(ValueError, k_cache, "heads, slots, head_dim", "4, 3, 2, 8"),
            each(CACHE, cache_layout="HND"),
        ),
        "k_cache of float64": (
            *(TypeError, k_cache, "float32, float8_e4m3fn, float8_e5m2", "float64"),
            {"k_cache": make(CACHE, "float64")},
        ),
        "v_cache of int64": (
            *(TypeError, "v_cache", "float32", "int64"),
            {"v_cache": make(CACHE, "int64")},
        ),
        "bytes of no dtype": (TypeError, k_cache, "float8", "uint8", bytes_(None)),
        "bytes of float16": (
            ValueError,
            "cache_dtype",
            "float8_e5m2",
            "'float16'",
            bytes_("float16"),
        ),
        "bytes of a dtype": (TypeError, "cache_dtype", "float8_e5m2", "dtype", bytes_(e5m2.dtype)),
        "bytes of a list": (TypeError, "cache_dtype", "float8_e5m2", "list", bytes_([1])),
        "a dtype of floats": (
            *(TypeError, k_cache, "uint8, float8_e5m2", "float32"),
            {"cache_dtype": "float8_e5m2"},
        ),
        "layout 'NDH'": (
            ValueError,
            "cache_layout",
            "'NHD' or 'HND'",
            "'NDH'",
            {"cache_layout": "NDH"},
        ),
        "layout None": (TypeError, "cache_layout", "'NHD'", "None", {"cache_layout": None}),
        "layout a list": (TypeError, "cache_layout", "'NHD'", "list", {"cache_layout": ["NHD"]}),
        "a read-only k_cache": (
            ValueError,
            k_cache,
            "writable",
            "read-only",
            {k_cache: read_only(CACHE)},
        ),
        "a read-only v_cache": (
            *(ValueError, "v_cache", "writable", "read-only"),
            {"v_cache": read_only(CACHE)},
        ),
        "slots in one place": (
            *(ValueError, "v_cache", "overlap itself", "strides"),
            {"v_cache": repeating(CACHE)},
        ),
        "v_cache of 5 blocks": (
            *(ValueError, "v_cache", r"\(4, 3\)", r"\(5, 3\)"),
            {"v_cache": make((5, 3, 2, 8))},
        ),
        "v_cache of other blocks": (
            *(ValueError, "v_cache", r"\(4, 3\)", r"\(3, 4\)"),
            {"v_cache": make((3, 4, 2, 8))},
        ),
        "v_cache of 8 bits": (ValueError, "v_cache", "float32", "float8_e5m2", {"v_cache": e5m2}),
        "two formats": (
            *(ValueError, "v_cache", "float8_e4m3fn", "float8_e5m2"),
            {"k_cache": torch_array(CACHE, "float8_e4m3fn"), "v_cache": e5m2},
        ),
        "a cache elsewhere": (
            *(ValueError, k_cache, "device", "meta"),
            {k_cache: torch_array(CACHE).to("meta")},
        ),
        "slots of float32": (TypeError, slots, "int32, int64", "float32", {slots: make(T)}),
        "slots of int16": (TypeError, slots, "int32", "int16", {slots: make(T, "int16")}),
        "slots of uint64": (TypeError, slots, "int32", "uint64", {slots: make(T, "uint64")}),
        "slots of bool": (TypeError, slots, "int32", "bool", {slots: make(T, "bool")}),
        "slots of 4 tokens": (ValueError, slots, r"\(5,\)", r"\(4,\)", {slots: make(4, "int64")}),
        "a column of slots": (
            ValueError,
            slots,
            r"\(5,\)",
            r"5, 1",
            {slots: make((5, 1), "int64")},
        ),
        "slots of 3 axes": (
            ValueError,
            slots,
            r"\(1, 5\)",
            "1, 1, 5",
            {slots: make((1, 1, 5), "int32")},
        ),
        "slots of other batches": (
            *(ValueError, slots, r"\(1, 5\)", r"\(2, 5\)"),
            {slots: make((2, 5), "int64")},
        ),
        "slots an int": (TypeError, slots, "array", "int", {slots: 3}),
        "slots elsewhere": (
            *(ValueError, slots, "device", "meta"),
            {slots: torch_array(T, "int64").to("meta")},
        ),
        "scale 0": (ValueError, scale, r"2\^-126", "0", bytes_(k_scale=0)),
        "scale below 0": (ValueError, scale, r"2\^-126", "-0.5", bytes_(k_scale=-0.5)),
        "scale nan": (ValueError, scale, "finite", "nan", bytes_(k_scale=float("nan"))),
        "scale inf": (ValueError, "v_scale", "finite", "inf", bytes_(v_scale=float("inf"))),
        "scale 1e-40": (ValueError, scale, r"2\^-126", "1e-40", bytes_(k_scale=1e-40)),
        "scale 1e39": (ValueError, scale, r"2\^126", "1e\\+39", bytes_(k_scale=1e39)),
        "scale of 400 digits": (ValueError, scale, "finite", "10000", bytes_(k_scale=10**400)),
        "scale a string": (TypeError, scale, "number", "'1'", bytes_(k_scale="1")),
        "scale True": (TypeError, "v_scale", "number", "True", bytes_(v_scale=True)),
        "scale a list": (TypeError, scale, "number", r"list|\[1.0\]", bytes_(k_scale=[1.0])),
        "scale of 2": (ValueError, scale, "one element", r"\(2,\)", bytes_(k_scale=make(2))),
        "scale of 2 axes": (ValueError, scale, "one", r"\(1, 1\)", bytes_(k_scale=make((1, 1)))),
        "scale of none": (ValueError, "v_scale", "one", r"\(0,\)", bytes_(v_scale=make(0))),
        "scales of two dtypes": (
            *(TypeError, "v_scale", "k_scale's dtype float32", "float64"),
            bytes_(k_scale=make(1), v_scale=make(1, "float64")),
        ),
        "scale of int64": (TypeError, scale, "float32", "int64", bytes_(k_scale=make(1, "int64"))),
        "scale elsewhere": (
            *(ValueError, scale, "device", "meta"),
            bytes_(k_scale=torch_array(1).to("meta")),
        ),
        "scale of floats": (ValueError, scale, "None or 1", "scale", {"k_scale": 2.0}),
        "scale in memory of floats": (
            *(ValueError, "v_scale", "None or 1", "scale"),
            {"v_scale": make(1)},
        ),
        "v of 1 head": (ValueError, "v", r"\(5, 2, 8\)", r"\(5, 1, 8\)", {"v": make((5, 1, 8))}),
        "v of 6 elements": (ValueError, "v", "8", "6", {"v": make((5, 2, 6))}),
        "v of 4 tokens": (ValueError, "v", "5", "4", {"v": make((4, 2, 8))}),
        "v of float64": (TypeError, "v", "float32", "float64", {"v": make(KV, "float64")}),
        "v of 4 axes": (ValueError, "v", "3 axes", "1, 5, 2, 8", {"v": make((1, *KV))}),
        "a tuple of outs": (TypeError, "q_out", "array", "tuple", {"out": (make(X), make(KV))}),
    }


@pytest.mark.parametrize("case", wrong_caches(numpy_array))
def test_what_is_no_cache_or_no_slot_or_no_scale_is_refused(case, make):
    *expected, changed = wrong_caches(make)[case]
    assert_refused(*expected, apply_rotary_kv_cache, **of_kv_cache(make) | changed)


def test_an_immutable_cache_is_refused():
    jax = pytest.importorskip("jax.numpy")
    immutable = jax.zeros(CACHE, jax.float32)
    for name in ("k_cache", "v_cache"):
        changed = of_kv_cache(numpy_array) | {name: immutable}
        assert_refused(ValueError, name, "writable", "read-only", apply_rotary_kv_cache, **changed)
    assert not immutable.any()


# Shared memory.


def overlapping(wrap):
    """What is written, by which names, over what else of a buffer."""
    buffer = numpy_array((40, 2, D))
    words = buffer.view(np.int32)

    def at(start, tokens=T):
        return wrap(buffer[start : start + tokens])

    return buffer, {
        "both in one": {"k_cache": at(0), "v_cache": at(0)},
        "both a slot apart": {"k_cache": at(0), "v_cache": at(1)},
        "k's in k": {"k": at(0), "k_cache": at(4, 9)},
        "k's is k": {"k": at(0), "k_cache": at(0)},
        "v's is v": {"v": at(0), "v_cache": at(0)},
        "each is its input": {"k": at(0), "k_cache": at(0), "v": at(9), "v_cache": at(9)},
        "v's is k": {"k": at(0), "v_cache": at(0)},
        "k's in q": {"q": at(0), "k_cache": at(3)},
        "k's in out": {"out": at(0), "k_cache": at(3)},
        "v's is out": {"out": at(0), "v_cache": at(0)},
        "out in k": {"out": at(0), "k": at(2)},
        "k's in the slots": {"slot_mapping": wrap(words[:T, 0, 0]), "k_cache": at(0, 9)},
        "k's in a table": {
            "table": (wrap(buffer[:6, 1, :4]), at(20).reshape(-1, D)[:6, :4]),
            "k_cache": at(0),
        },
        "v's in weights": {"q_weight": wrap(buffer[2, 1]), "v_cache": at(0)},
        "v's in positions": {"positions": wrap(words[:T, 1, 7]), "v_cache": at(0)},
    }


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", overlapping(np.asarray)[1])
@in_numpy_and_torch
def test_a_cache_that_shares_memory_with_any_other_array_is_refused(case, wrap, in_place):
    buffer, cases = overlapping(wrap)
    changed = cases[case]
    given = [changed[name] for name in ("k_cache", "v_cache") if name in changed]
    sizes = dict.fromkeys(("k_cache", "v_cache"), max(map(len, given), default=T))
    arguments = {name: wrap(numpy_array((sizes.get(name, T), 2, D))) for name in CACHED}
    arguments |= {"table": (wrap(numpy_array(HALF)), wrap(numpy_array(HALF)))}
    arguments |= {"slot_mapping": wrap(np.arange(T))} | changed
    if in_place:
        arguments = {"out": arguments["q"]} | arguments
    before = buffer.tobytes()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"must .*share no memory with .*, got two arrays that"
        ):
            apply_rotary_kv_cache(**arguments)
    assert buffer.tobytes() == before


@in_numpy_and_torch
def test_a_packed_array_may_be_written_in_place_or_apart_and_not_in_part(wrap):
    values = numpy_array((T, H + 4, D))
    table = wrap(numpy_array(HALF)), wrap(numpy_array(HALF))
    options = {"table": table, "num_heads": H, "num_kv_heads": 2}
    expected = np.asarray(apply_rotary_qkv(wrap(values), **options))
    assert np.array_equal(expected[:, -2:], values[:, -2:])

    def views(x_at, out_at):
        buffer = np.full((2 * T + 2, H + 6, D), np.nan, np.float32)
        x = buffer[x_at]
        x[...] = values
        return buffer, wrap(x), wrap(buffer[out_at])

    first, later, next_head = np.s_[:T, :7], np.s_[T + 1 : -1, :7], np.s_[:T, 1:8]
    for out_at in (first, later, np.s_[T + 2 :, 2:]):
        buffer, x, out = views(first, out_at)
        before = buffer.copy()
        assert apply_rotary_qkv(x, **options, out=out) is out
        before[out_at] = expected
        assert np.array_equal(buffer, before, equal_nan=True)
    for out_at in (
        np.s_[1 : T + 1, :7],
        next_head,
        np.s_[T - 1 : -3, :7],
        np.s_[T - 1 : 2 * T - 1, 2:],
    ):
        buffer, x, out = views(first, out_at)
        before = buffer.tobytes()
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"^out must be its input or share no memory with qkv"
            ):
                apply_rotary_qkv(x, **options, out=out)
        assert buffer.tobytes() == before


# What there is nothing of.


def empty(make):
    x, kv, table = make(X), make(KV), pair_of(make)
    slots, caches = make(T, "int64") * 0, (make(CACHE), make(CACHE))
    heads = {"num_heads": H, "num_kv_heads": 2}

    def cached(q, k, caches, **options):
        return lambda **norm: apply_rotary_kv_cache(
            q, k, k, *caches, table, slot_mapping=slots[: len(q)], **options, **norm
        )

    return {
        "tokens": lambda **norm: apply_norm_rotary(x[:0], None, table, **norm),
        "heads": lambda **norm: apply_norm_rotary(x[:, :0], None, table, **norm),
        "batches": lambda **norm: apply_norm_rotary(x[None][:0], None, table, **norm),
        "tokens of q and k": lambda **norm: apply_qk_norm_rotary(
            x[:0], x[:0], None, None, table, **norm
        ),
        "heads of k": lambda **norm: apply_qk_norm_rotary(x, x[:, :0], None, None, table, **norm),
        "packed tokens": lambda **norm: apply_rotary_qkv(make((0, 7, D)), table, **heads, **norm),
        "cached tokens": cached(x[:0], kv[:0], caches),
        "cached heads": cached(x, kv[:, :0], [cache[:, :, :0] for cache in caches]),
        "slots": cached(x, kv, [cache[0, :0] for cache in caches]),
        "blocks": cached(x, kv, [cache[:0] for cache in caches]),
        "slots in blocks": cached(x, kv, [cache[:, :0] for cache in caches]),
        "tokens, of 8 bits": cached(
            *(x[:0], kv[:0], [make(CACHE, "uint8") for _ in range(2)]),
            cache_dtype="float8_e5m2",
            k_scale=2.0,
        ),
    }


@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize("case", empty(numpy_array))
def test_where_there_is_nothing_of_something_nothing_is_done_about_it(case, norm, make):
    for _ in range(2):
        empty(make)[case](norm=norm)


@pytest.mark.host_cuda
@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize(
    "case", ["heads of k", "cached heads", "slots", "blocks", "slots in blocks"]
)
def test_kernels_do_nothing_about_it_either(case, norm):
    empty(numpy_array)[case](norm=norm)


# Arrays that are nothing but DLPack.


def test_the_kind_of_q_comes_back_where_a_cache_is_written():
    jax = pytest.importorskip("jax.numpy")
    for kind in (jax.asarray, lambda array: Producer(torch.from_numpy(array))):
        arguments = of_kv_cache(numpy_array)
        expected = apply_rotary_kv_cache(**arguments)
        q, k, v = (kind(arguments.pop(name)) for name in "qkv")
        y = apply_rotary_kv_cache(q, k, v, **arguments)
        assert type(y) is type(q)
        assert np.array_equal(np.asarray(getattr(y, "array", y)), expected)


def test_the_kind_of_any_other_input_comes_back():
    for function in (apply_norm_rotary, apply_qk_norm_rotary, apply_rotary_qkv):
        arguments = FUSED[function](numpy_array)
        expected = function(**arguments)
        names = [name for name in ("x", "q", "k", "qkv") if name in arguments]
        changed = {name: Producer(torch.from_numpy(arguments[name])) for name in names}
        results = [function(**arguments | changed), expected]
        results = [each if type(each) is tuple else (each,) for each in results]
        for y, wanted in zip(*results, strict=True):
            assert type(y) is Producer
            assert np.array_equal(y.array.numpy(), wanted)


def test_an_array_that_no_library_can_make_is_refused_without_out():
    class Bare:
        def __init__(self, array):
            self.__dlpack__, self.array = array.__dlpack__, array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    for function, make_arguments in FUSED.items():
        arguments = make_arguments(numpy_array)
        first = next(iter(arguments))
        bare = Bare(arguments[first])
        with pytest.raises(TypeError, match=r"^out must be an array where .*, got None for Bare"):
            function(**arguments | {first: bare})


# One result, whichever function is called.

OPTIONS = {
    "plain": {},
    "interleaved": {"interleaved": True, "positions": 3},
    "a slice": {"rotary_offset": 4, "conjugate": True},
    "eager": {"rounding": "eager"},
}
NORMS = {
    "no norm": {},
    "of heads": {"norm": "head"},
    "of tokens": {"norm": "heads", "round_norm": False},
}


class Packed:
    """q, k and v side by side in random bits or in numbers, a table, and weights."""

    def __init__(self, library, dtype="float16", head_dim=24):
        self.library, self.head_dim = library, head_dim
        rng = np.random.default_rng(7)
        self.values = 2 * rng.standard_normal((2, T, H + 4, head_dim))
        self.bits = encode(self.values, dtype)
        noise = rng.integers(0, 2**16, self.bits[:, :, -2:].shape, np.uint16)
        self.bits[:, :, -2:] = noise  # of v, NaNs of any payload too
        self.held = Held(self.bits, dtype, library, place(self.bits.shape, "dense"))
        angle = rng.uniform(-3, 3, (20, 8))
        self.table = RotaryTable(*(self.array(f(angle), dtype) for f in (np.cos, np.sin)))

    def array(self, values, dtype):
        return hold(values, dtype, self.library).array

    def parts(self):
        qkv = self.held.array
        return qkv[:, :, :H], qkv[:, :, H : H + 2], qkv[:, :, H + 2 :]

    def weights(self, norm):
        rng, each = np.random.default_rng(8), norm.get("norm") == "heads"
        if not norm:
            return {}
        sizes = {"q_weight": (H if each else 1), "k_weight": (2 if each else 1)}
        return {
            name: self.array(rng.uniform(0.5, 2, n * self.head_dim), "float32")
            for name, n in sizes.items()
        }


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("norm", NORMS)
@in_every_library
def test_packed_or_apart_or_into_a_cache_the_bits_are_the_same(library, options, norm):
    packed = Packed(library)
    options, norm = OPTIONS[options], NORMS[norm]
    weights = packed.weights(norm)
    q, k, v = packed.parts()
    if norm:
        expected = apply_qk_norm_rotary(q, k, *weights.values(), packed.table, **options, **norm)
        alone = apply_norm_rotary(q, weights["q_weight"], packed.table, **options, **norm)
    else:
        expected = apply_rotary_qk(q, k, packed.table, **options)
        alone = apply_rotary(q, packed.table, **options)
    q_bits, k_bits = map(to_bits, expected)
    assert np.array_equal(to_bits(alone), q_bits)

    call = {"num_heads": H, "num_kv_heads": 2, **weights, **options, **norm}
    whole = np.concatenate([q_bits, k_bits, packed.bits[:, :, -2:]], 2)
    apart = hold(packed.values, "float16", library)
    assert np.array_equal(to_bits(apply_rotary_qkv(packed.held.array, packed.table, **call)), whole)
    apply_rotary_qkv(packed.held.array, packed.table, **call, out=apart.array)
    assert np.array_equal(to_bits(apart.array), whole)
    packed.held.assert_unchanged()

    caches = [hold(np.zeros((3, 7, 2, packed.head_dim)), "float16", library) for _ in range(2)]
    slots = np.random.default_rng(9).permutation(21)[: 2 * T].reshape(2, T)
    slot_mapping = packed.array(slots, "int64")
    call = {"slot_mapping": slot_mapping, **weights, **options, **norm}
    y = apply_rotary_kv_cache(q, k, v, *(held.array for held in caches), packed.table, **call)
    assert np.array_equal(to_bits(y), q_bits)
    for held, bits in zip(caches, (k_bits, packed.bits[:, :, -2:]), strict=True):
        assert np.array_equal(to_bits(held.array)[np.divmod(slots, 7)], bits)

    call = {"num_heads": H, "num_kv_heads": 2, **weights, **options, **norm}
    apply_rotary_qkv(packed.held.array, packed.table, **call, out=packed.held.array)
    assert np.array_equal(to_bits(packed.held.array), whole)
    packed.held.assert_guarded()


# What is repeated.


@in_every_library
@pytest.mark.parametrize("name", ["weights", "slots", "scales", "inputs"])
def test_what_has_changed_in_memory_is_read_anew(library, name):
    """The same arrays, called again and again, give what new ones of the same values do."""
    rng = np.random.default_rng(3)
    dtype = "float32"

    def drawn():
        return {
            "inputs": [rng.standard_normal((T, n, D)) for n in (H, 2, 2)],
            "weights": [rng.uniform(0.5, 2, D) for _ in range(2)],
            "slots": [rng.permutation(12)[:T]],
            "scales": [rng.uniform(0.5, 2, 1) for _ in range(2)],
        }

    def arrays(values):
        dtypes = {"slots": "int64"}
        return {
            kind: [hold(x, dtypes.get(kind, dtype), library).array for x in each]
            for kind, each in values.items()
        }

    def call(given):
        caches = [hold(np.zeros(3 * 4 * 2 * D // 4), "float32", library).array for _ in range(2)]
        caches = [words(cache, library).reshape(3, 4, 2, D) for cache in caches]
        q_weight, k_weight = given["weights"]
        k_scale, v_scale = given["scales"]
        y = apply_rotary_kv_cache(
            *(*given["inputs"], *caches, table),
            slot_mapping=given["slots"][0],
            cache_dtype="float8_e4m3fn",
            q_weight=q_weight,
            k_weight=k_weight,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return [to_bits(each) for each in (y, *caches)]

    table = RotaryTable(*(hold(rng.uniform(-1, 1, (9, 4)), dtype, library).array for _ in range(2)))
    given = arrays(drawn())
    seen = [call(given)]
    for _ in range(3):
        for array, other in zip(given[name], arrays(drawn())[name], strict=True):
            array[...] = other
        copies = {kind: [each + 0 for each in of_kind] for kind, of_kind in given.items()}
        results = call(given)
        for result, expected in zip(results, call(copies), strict=True):
            assert np.array_equal(result, expected)
        assert not all(map(np.array_equal, results, seen[-1]))
        seen.append(results)


def words(array, library):
    """The memory of an array as bytes."""
    return array.view(torch.uint8) if library.startswith("torch") else array.view("uint8")


@in_every_library
def test_an_option_is_not_taken_for_another_that_was_seen(library):
    """One after another, twice: each gives what it gave, and others give other numbers."""
    rng = np.random.default_rng(4)
    x, weight = (hold(rng.standard_normal(shape), "float64", library).array for shape in (X, D))
    out = hold(np.zeros(X), "float64", library).array
    tables = [hold(rng.uniform(-1, 1, (9, 4)), "float64", library).array for _ in range(2)]
    table = RotaryTable(*tables)
    options = [
        {"eps": 0.0},
        {"eps": 1.0},
        {"eps": 0.5},
        {"weight_offset": 1.0},
        {"norm": "heads"},
        {"eps": 1.0, "weight_offset": 1.0},
        {"conjugate": True},
        {"interleaved": True},
    ]

    def call(option):
        given = None if option.get("norm") else weight
        return to_bits(apply_norm_rotary(x, given, table, **option, out=out)).copy()

    first = [call(option) for option in options]
    assert all(
        np.array_equal(call(option), bits) for option, bits in zip(options, first, strict=True)
    )
    assert len({bits.tobytes() for bits in first}) == len(options)
    for option, equal in (({"eps": 0}, 0), ({"eps": np.float32(1)}, 1), ({"eps": 1}, 1)):
        assert np.array_equal(call(option), first[equal])
    for wrong in ({"eps": True}, {"eps": False}, {"weight_offset": True}, {"round_norm": 1}):
        with pytest.raises(
            TypeError, match=r"must be (a number|True, False or 'before_weight'), got"
        ):
            call(wrong)


def test_a_count_of_heads_of_a_wrong_type_is_refused_after_its_equal(make):
    arguments = of_qkv(make) | {"num_heads": 3, "num_kv_heads": 1}
    arguments["qkv"] = make((T, 5, D))
    apply_rotary_qkv(**arguments)
    for name, wrong in (("num_heads", 3.0), ("num_kv_heads", True), ("num_kv_heads", 1.0)):
        changed = arguments | {name: wrong}
        assert_refused(TypeError, name, "an int", str(wrong), apply_rotary_qkv, **changed)


def test_a_scale_of_a_wrong_type_is_refused_after_its_equal(make):
    caches = {name: make(CACHE, "uint8") for name in ("k_cache", "v_cache")}
    arguments = of_kv_cache(make) | caches | {"cache_dtype": "float8_e5m2"}
    for right in (1, 1.0):
        apply_rotary_kv_cache(**arguments, k_scale=right)
    changed = arguments | {"k_scale": True}
    assert_refused(TypeError, "k_scale", "number", "True", apply_rotary_kv_cache, **changed)


@pytest.mark.parametrize("name", ["q_weight", "slot_mapping", "v", "k_cache", "v_cache"])
@in_every_library
def test_an_array_in_another_place_is_another_array(library, name):
    """Where all but its address is as before."""
    rng = np.random.default_rng(5)
    shapes = {"q": X, "k": KV, "v": KV, "k_cache": CACHE, "v_cache": CACHE, "q_weight": (D,)}
    table = [hold(rng.uniform(-1, 1, HALF), "float32", library).array for _ in range(2)]

    def fresh():
        values = {each: rng.standard_normal(shape) for each, shape in shapes.items()}
        arrays = {each: hold(x, "float32", library).array for each, x in values.items()}
        slots = hold(rng.permutation(12)[:T], "int64", library).array
        return arrays | {"slot_mapping": slots, "table": tuple(table)}

    arguments, kept = fresh(), []
    for _ in range(3):
        arguments[name] = fresh()[name]
        kept.append(arguments[name])  # so that the next one lies elsewhere
        copies = {each: x if each == "table" else x + 0 for each, x in arguments.items()}
        results = [
            [to_bits(apply_rotary_kv_cache(**given)), *(to_bits(given[x]) for x in CACHED[3:])]
            for given in (arguments, copies)
        ]
        assert all(map(np.array_equal, *results))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_has_become_read_only_or_overlaps_is_refused_after_it_was_right(name):
    arguments = of_kv_cache(numpy_array)
    arguments["slot_mapping"] = np.arange(T)
    apply_rotary_kv_cache(**arguments)
    arguments[name].flags.writeable = False
    assert_refused(ValueError, name, "writable", "read-only", apply_rotary_kv_cache, **arguments)
    arguments[name].flags.writeable = True
    apply_rotary_kv_cache(**arguments)
    other = {"k_cache": "v_cache", "v_cache": "k_cache"}[name]
    arguments[name] = arguments[other]
    assert_refused(ValueError, "v_cache", "share", "overlap", apply_rotary_kv_cache, **arguments)
