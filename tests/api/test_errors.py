"""Every argument check of every function: the exception, its message, and that nothing is written.

The mistakes are rows of the tables in mistakes.py.
"""

import numpy as np
import pytest
from mistakes import (
    CACHE,
    FUNCTIONS,
    FUSED,
    HALF,
    MAKERS,
    MAY_BE_NONE,
    OF_PAIRS,
    D,
    T,
    X,
    assert_refused,
    cases_of,
    changed_by,
    every_function,
    every_fused_function,
    no_table_of_plain_floats,
    not_numbers,
    not_plain_floats,
    numpy_array,
    of,
    of_kv_cache,
    of_qk_norm,
    of_qkv,
    of_rotary_qk,
    pair_of,
    without_weights,
    wrong_biases,
    wrong_caches,
    wrong_calls,
    wrong_norms,
    wrong_outs,
    wrong_packed,
    wrong_pairs,
    wrong_tables,
    wrong_weights,
    wrong_without_table,
)

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@every_function
def test_the_call_that_mistakes_are_made_in_is_right(function, make):
    function(**FUNCTIONS[function](make))


# An array that is none, or not one that can be rotated, or read as a table.

# What is right of an argument, or refused for another reason than what is rotated.
RIGHT = {"slot_mapping": {"int64", "no whole elements"}} | {name: {"None"} for name in MAY_BE_NONE}
RIGHT |= {name: {"float8"} for name in ("k_cache", "v_cache")}


def not_arrays(make, shape):
    return not_numbers(make, shape) | not_plain_floats(make, shape)


ARRAYS = [
    pytest.param(function, name, case, id=f"{case} for {name} of {function.__name__}")
    for function, arguments in FUNCTIONS.items()
    for name, array in arguments(numpy_array).items()
    for case in not_arrays(numpy_array, X)
    if isinstance(array, np.ndarray) and case not in RIGHT.get(name, ())
]
BUILT = {
    "cos": (HALF, RotaryTable),
    "sin": (HALF, lambda bad, good: RotaryTable(good, bad)),
    "full cos": ((6, 8), RotaryTable.from_full_width),
    "full sin": ((6, 8), lambda bad, good: RotaryTable.from_full_width(good, bad)),
    "cos_sin": ((6, 8), lambda bad, good: RotaryTable.from_cache(bad)),
    "freqs": ((6, 4, 2, 2), lambda bad, good: RotaryTable.from_matrices(bad)),
    "freqs_cis": (HALF, lambda bad, good: RotaryTable.from_complex(bad)),
}


@pytest.mark.parametrize(("function", "argument", "case"), ARRAYS)
def test_what_is_no_such_array_is_refused_by_its_name(function, argument, case, make):
    arguments = FUNCTIONS[function](make)
    error, wanted, got, bad = not_arrays(make, tuple(arguments[argument].shape))[case]
    name = "q|q_out" if argument == "q" else argument
    wanted = f"{wanted}|int32" if argument == "slot_mapping" else wanted
    assert_refused(error, name, wanted, got, function, **arguments | {argument: bad})


@pytest.mark.parametrize("form", BUILT)
@pytest.mark.parametrize("case", not_numbers(numpy_array, X))
def test_what_cannot_be_read_as_a_table_is_refused(case, form, make):
    shape, build = BUILT[form]
    error, wanted, got, bad = not_numbers(make, shape)[case]
    assert_refused(error, form.split()[-1], wanted, got, build, bad, make(shape))


@pytest.mark.parametrize("form", [form for form in BUILT if form != "freqs_cis"])
@pytest.mark.parametrize("case", no_table_of_plain_floats(numpy_array, X))
def test_a_table_of_no_plain_floats_is_refused_at_the_latest_when_used(case, form, make):
    shape, build = BUILT[form]
    error, wanted, got, bad = no_table_of_plain_floats(make, shape)[case]
    argument = f"{form.split()[-1]}|table"

    def use(bad, good, x):
        apply_rotary(x, build(bad, good))

    assert_refused(error, argument, wanted, got, use, bad, make(shape), make(X))


@cases_of(wrong_tables)
def test_arrays_that_make_no_table_are_refused(case, make):
    assert_refused(*wrong_tables(make)[case])


# One wrong argument of an otherwise right call.


# What is wrong of x alone is not asked of the fused functions, where other arguments must suit it.
CALLS = [
    pytest.param(function, case, id=f"{row[1]} {row[3]} of {function.__name__}")
    for function in FUNCTIONS
    for case, row in enumerate(wrong_calls(numpy_array))
    if not (function in FUSED and "x" in changed_by(row)[1])
]


@pytest.mark.parametrize(("function", "case"), CALLS)
def test_a_wrong_argument_of_any_function_is_refused(function, case, make):
    (error, argument, wanted, got), changed = changed_by(wrong_calls(make)[case])
    arguments = FUNCTIONS[function](make)
    if function is apply_rotary_qk and "x" in changed:
        changed["q"] = changed["k"] = changed.pop("x")
    argument = "|".join(next(iter(arguments)) if n == "x" else n for n in argument.split("|"))
    assert_refused(error, argument, wanted, got, function, **arguments | changed)


@every_function
@cases_of(wrong_outs)
def test_an_out_that_does_not_suit_is_refused(case, function, make):
    arguments = FUNCTIONS[function](make)
    first, array = next(iter(arguments.items()))
    error, _, wanted, got, out = wrong_outs(make, tuple(array.shape))[case]
    out = (out, arguments["k"] * 1) if function in OF_PAIRS else out
    name = "out|q_out" if first == "q" else "out"
    assert_refused(error, name, wanted, got, function, **arguments | {"out": out})


@cases_of(wrong_pairs)
def test_a_k_or_an_out_that_does_not_suit_q_is_refused(case, make):
    expected, changed = changed_by(wrong_pairs(make)[case])
    assert_refused(*expected, apply_rotary_qk, **of_rotary_qk(make) | changed)


REMEDIES = {  # by the shapes of q and k, and the options of a call
    "if axis 1 is heads, as in (b, h, s, d), pass layout='bhsd'": ((2, 4, 5, 8), (2, 1, 5, 8), {}),
    "if axis 0 is heads, as in (h, s, d), pass layout='hsd'": ((4, 5, 8), (1, 5, 8), {}),
    "if axis 2 is heads, layout must say so, got layout='bhsd'": (
        *((2, 5, 4, 8), (2, 5, 1, 8)),
        {"layout": "bhsd"},
    ),
    "if axis 1 is heads, layout must say so, got layout=None": (
        *((2, 5, 16), (2, 1, 16)),
        {"head_dim": 8},
    ),
    "if the last axis holds all heads, pass head_dim": ((2, 5, 32), (2, 5, 8), {}),
    "": ((2, 5, 4, 8), (1, 5, 4, 8), {}),
    " ": ((2, 5, 4, 8), (1, 4, 4, 8), {}),
    "  ": ((2, 5, 4, 8), (2, 5, 4, 4), {}),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_heads_that_were_taken_for_another_axis_are_told(remedy):
    q, k, options = REMEDIES[remedy]
    table = np.ones((5, 4), np.float32), np.ones((5, 4), np.float32)
    with pytest.raises(ValueError, match="axis") as refused:
        apply_rotary_qk(np.ones(q, np.float32), np.ones(k, np.float32), table, **options)
    *_, said = str(refused.value).rpartition("got (")[2].partition(")")
    assert said.removeprefix(": ") == remedy.strip()


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_each_of_two_outs_is_an_array(weights, make):
    function = apply_qk_norm_rotary
    arguments = of_qk_norm(make) if weights else without_weights(function, make)
    q, k = arguments["q"], arguments["k"]
    for name, out in {"q_out": (None, k), "k_out": (q, None)}.items():
        assert_refused(TypeError, name, "array", "None", function, **arguments, out=out)
    for out in (q, (q,), (q, k, k)):
        assert_refused(TypeError, "out", "tuple of two", "", function, **arguments, out=out)


# A norm's.


@every_fused_function
@cases_of(wrong_norms)
def test_a_norm_that_is_none_is_refused(case, function, make):
    expected, changed = changed_by(wrong_norms(make)[case])
    assert_refused(*expected, function, **FUSED[function](make) | changed)


@of([apply_norm_rotary, apply_qk_norm_rotary])
def test_a_norm_of_none_is_refused_where_there_must_be_one(function, make):
    wanted = "'head' or 'heads'"
    assert_refused(TypeError, "norm", wanted, "None", function, **FUSED[function](make), norm=None)


@of([apply_rotary_qkv, apply_rotary_kv_cache])
@pytest.mark.parametrize(
    "changed",
    [
        *({"eps": 1e-5}, {"eps": "tiny"}, {"weight_offset": 1.0}, {"round_norm": False}),
        {"norm_after": True},
    ],
)
def test_what_belongs_to_a_norm_is_refused_without_one(function, changed, make):
    call = FUSED[function](make) | {"norm": None}
    assert_refused(ValueError, "norm", "be given", "None", function, **call, **changed)


@every_fused_function
@cases_of(wrong_weights)
def test_weights_that_do_not_suit_are_refused(case, function, make):
    for name in ["weight"] if function is apply_norm_rotary else ["q_weight", "k_weight"]:
        expected, changed = changed_by(wrong_weights(make, name)[case])
        arguments = without_weights(function, make) | changed
        assert_refused(*expected, function, **arguments)


@every_fused_function
@cases_of(wrong_biases)
def test_biases_that_do_not_suit_are_refused(case, function, make):
    for name in ["bias"] if function is apply_norm_rotary else ["q_bias", "k_bias"]:
        expected, changed = changed_by(wrong_biases(make, name)[case])
        assert_refused(*expected, function, **without_weights(function, make) | changed)


@every_fused_function
def test_a_bias_has_the_weights_dtype(function, make):
    one = function is apply_norm_rotary
    weight, bias = ("weight", "bias") if one else ("k_weight", "q_bias")
    arguments = without_weights(function, make) | {weight: make(D), bias: make(D, "float64")}
    wanted = f"{weight}'s dtype float32"
    assert_refused(TypeError, bias, wanted, "float64", function, **arguments | {"norm": "layer"})


@every_fused_function
@cases_of(wrong_without_table)
def test_what_a_table_gives_a_meaning_is_refused_without_one(case, function, make):
    expected, changed = changed_by(wrong_without_table(make)[case])
    arguments = FUSED[function](make) | {"table": None}
    function(**arguments)
    for _ in range(2):
        assert_refused(*expected, function, **arguments | changed)


@every_function
def test_no_table_is_refused_where_there_is_no_norm(function, make):
    arguments = FUNCTIONS[function](make) | {"table": None}
    if function in (apply_norm_rotary, apply_qk_norm_rotary):
        function(**arguments)  # which always have one
        return
    changed = {"norm": None} if function in FUSED else {}
    assert_refused(TypeError, "table", "RotaryTable", "None", function, **arguments | changed)


@of(list(FUSED)[1:])
def test_weights_of_two_dtypes_are_refused(function, make):
    arguments = FUSED[function](make) | {"q_weight": make(D), "k_weight": make(D, "float64")}
    wanted = "q_weight's dtype float32"
    assert_refused(TypeError, "k_weight", wanted, "float64", function, **arguments)


@every_fused_function
def test_a_head_too_long_for_a_norm_is_refused_and_without_one_is_not(function, make):
    arguments = without_weights(function, make)
    for name, array in arguments.items():
        if hasattr(array, "shape") and name != "slot_mapping":
            arguments[name] = make((*array.shape[:-1], 520))
    for norm in ("head", "heads", "layer"):
        changed = arguments | {"norm": norm}
        assert_refused(ValueError, "head_dim", "512", "520", function, **changed)
    if function in (apply_rotary_qkv, apply_rotary_kv_cache):
        function(**arguments | {"norm": None})


@every_fused_function
def test_a_token_that_no_block_can_hold_is_refused_on_the_cpu_too(function, make):
    arguments = without_weights(function, make) | {"norm": "heads"}
    first, heads = next(iter(arguments)), 20_000
    arguments[first] = make((T, heads + (4 if first == "qkv" else 0), D))
    if first == "qkv":
        arguments["num_heads"] = heads
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^norm='heads' must have .*block.* got 20000 heads"):
            function(**arguments)


# A packed array's, and a cache's.


@cases_of(wrong_packed)
def test_heads_that_are_not_those_of_a_packed_array_are_refused(case, make):
    expected, changed = changed_by(wrong_packed(make)[case])
    assert_refused(*expected, apply_rotary_qkv, **of_qkv(make) | changed)


@cases_of(wrong_caches)
def test_what_is_no_cache_or_no_slot_or_no_scale_is_refused(case, make):
    expected, changed = changed_by(wrong_caches(make)[case])
    assert_refused(*expected, apply_rotary_kv_cache, **of_kv_cache(make) | changed)


def test_an_immutable_cache_is_refused():
    jax = pytest.importorskip("jax.numpy")
    immutable = jax.zeros(CACHE, jax.float32)
    for name in ("k_cache", "v_cache"):
        changed = of_kv_cache(numpy_array) | {name: immutable}
        assert_refused(ValueError, name, "writable", "read-only", apply_rotary_kv_cache, **changed)
    assert not immutable.any()


# A wrong argument after a call that was right: what is remembered of that is no excuse.

AFTER_AN_EQUAL = {"rotary_offset": (0, False), "interleaved": (True, 1), "positions": (1, True)}


@pytest.mark.parametrize("option", AFTER_AN_EQUAL)
def test_a_wrong_type_is_refused_after_an_equal_value_was_right(option, make):
    x, table, (right, wrong) = make(X), pair_of(make), AFTER_AN_EQUAL[option]
    apply_rotary(x, table, **{option: right})
    assert_refused(TypeError, option, "", str(wrong), apply_rotary, x, table, **{option: wrong})


def test_sections_of_a_wrong_type_are_refused_after_equal_ones_were_right(make):
    call = {"x": make(X), "table": pair_of(make), "positions": make((3, 5), "int64") * 0}
    name = "mrope_section"
    for _ in range(2):
        apply_rotary(**call, mrope_section=(1, 1, 2))
        for wrong in ((1, 1.0, 2), (True, 1, 2)):
            changed = call | {name: wrong}
            assert_refused(TypeError, name, "three ints", "1.0|True", apply_rotary, **changed)


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
        changed = arguments | {first: Bare(arguments[first])}
        with pytest.raises(TypeError, match=r"^out must be an array where .*, got None for Bare"):
            function(**changed)
