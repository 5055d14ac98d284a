"""Every argument check: the exception, what its message says, and that no array has changed.

A message reads "<argument> must <what was wanted>, got <what came>". A row of a table below is the
exception, the argument, patterns of what was wanted and of what came, and the bad value.
"""

import numpy as np
import pytest
import torch

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

EITHER = (TypeError, ValueError)
ARRAY = "(?i:array|tensor|DLPack)"
NUMBERS = "float|complex"
DEVICE = "device|on |CPU|CUDA"
X = (5, 3, 8)  # tokens, heads, head_dim
HALF = (6, 4)  # positions, rotary_dim / 2
RNG = np.random.default_rng(20)


def numpy_array(shape, dtype="float32"):
    return RNG.uniform(0.5, 1.5, shape).astype(dtype)


def torch_array(shape, dtype="float32"):
    return torch.from_numpy(RNG.uniform(0.5, 1.5, shape)).to(getattr(torch, dtype))


MAKERS = {"numpy": numpy_array, "torch": torch_array}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def pair_of(make, shape=HALF, dtype="float32"):
    return make(shape, dtype), make(shape, dtype)


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
    before = contents([args, kwargs])
    with pytest.raises(error, match=rf"(?s)^({argument}) must .*({wanted}).*, got .*({got})"):
        function(*args, **kwargs)
    assert contents([args, kwargs]) == before


# One array that is none, or not one that can be rotated, or read as a table.


def not_numbers(make, shape):
    return {
        "None": (TypeError, ARRAY, "None", None),
        "string": (TypeError, ARRAY, "str|abc", "abc"),
        "bytes": (TypeError, ARRAY, "bytes|abc", b"abc"),
        "list": (TypeError, ARRAY, "list", np.ones(shape).tolist()),
        "number": (TypeError, ARRAY, "float|1.0", 1.0),
        "bool": (TypeError, NUMBERS, "bool", make(shape, "bool")),
        "int8": (TypeError, NUMBERS, "int8", make(shape, "int8")),
        "int64": (TypeError, NUMBERS, "int64", make(shape, "int64")),
        "big-endian": (TypeError, "byte order|float", ">|big|swap", numpy_array(shape, ">f4")),
        "long double": (TypeError, NUMBERS, "longdouble|128", numpy_array(shape, "longdouble")),
        "objects": (TypeError, NUMBERS, "object", numpy_array(shape, "O")),
        "float8": (TypeError, NUMBERS, "float8", torch_array(shape, "float8_e5m2")),
        "sparse": (EITHER, "dense|strided", "sparse", torch_array(shape).to_sparse()),
    }


def not_plain_floats(make, shape):
    return {
        "complex64": (TypeError, "float", "complex64", make(shape, "complex64")),
        "no whole elements": (ValueError, "stride|element", "", between_bytes(shape)),
        "another device": (ValueError, DEVICE, "meta", torch_array(shape).to("meta")),
        "lazily negated": (ValueError, "values|neg", "lazy|neg", lazily_negated(shape)),
    }


def no_table_of_plain_floats(make, shape):
    requires_grad = (ValueError, "grad", "", torch_array(shape).requires_grad_())
    return not_plain_floats(make, shape) | {"requires grad": requires_grad}


NOT_NUMBERS = list(not_numbers(numpy_array, X))
NOT_PLAIN = list(not_plain_floats(numpy_array, X))
NO_TABLE = list(no_table_of_plain_floats(numpy_array, X))
ROTATED = {
    "x": lambda bad, good, table: apply_rotary(bad, table),
    "q": lambda bad, good, table: apply_rotary_qk(bad, good, table),
    "k": lambda bad, good, table: apply_rotary_qk(good, bad, table),
}
BUILT = {
    "cos": (HALF, RotaryTable),
    "sin": (HALF, lambda bad, good: RotaryTable(good, bad)),
    "full cos": ((6, 8), RotaryTable.from_full_width),
    "full sin": ((6, 8), lambda bad, good: RotaryTable.from_full_width(good, bad)),
    "cos_sin": ((6, 8), lambda bad, good: RotaryTable.from_cache(bad)),
    "freqs": ((6, 4, 2, 2), lambda bad, good: RotaryTable.from_matrices(bad)),
    "freqs_cis": (HALF, lambda bad, good: RotaryTable.from_complex(bad)),
}


@pytest.mark.parametrize("argument", ROTATED)
@pytest.mark.parametrize("case", NOT_NUMBERS + NOT_PLAIN)
def test_what_cannot_be_rotated_is_refused(case, argument, make):
    error, wanted, got, bad = (not_numbers(make, X) | not_plain_floats(make, X))[case]
    good, table = make(X), pair_of(make)
    assert_refused(error, argument, wanted, got, ROTATED[argument], bad, good, table)


@pytest.mark.parametrize("form", BUILT)
@pytest.mark.parametrize("case", NOT_NUMBERS)
def test_what_cannot_be_read_as_a_table_is_refused(case, form, make):
    shape, build = BUILT[form]
    error, wanted, got, bad = not_numbers(make, shape)[case]
    assert_refused(error, form.split()[-1], wanted, got, build, bad, make(shape))


@pytest.mark.parametrize("form", [form for form in BUILT if form != "freqs_cis"])
@pytest.mark.parametrize("case", NO_TABLE)
def test_a_table_of_no_plain_floats_is_refused_at_the_latest_when_used(case, form, make):
    shape, build = BUILT[form]
    error, wanted, got, bad = no_table_of_plain_floats(make, shape)[case]
    argument = f"{form.split()[-1]}|table"

    def use(bad, good, x):
        apply_rotary(x, build(bad, good))

    assert_refused(error, argument, wanted, got, use, bad, make(shape), make(X))


# One wrong argument of an otherwise right call.


def wrong_options():
    return {
        "layout 3": (TypeError, "layout", "str", "int|3", 3),
        "layout tuple": (TypeError, "layout", "str", "tuple|'s'", ("s", "h", "d")),
        "layout 'shx'": (ValueError, "layout", "d", "shx", "shx"),
        "layout without d last": (ValueError, "layout", "d", "sdh", "sdh"),
        "layout without h": (ValueError, "layout", "h", "bsd", "bsd"),
        "layout without tokens": (ValueError, "layout", "s", "bhd", "bhd"),
        "layout with an axis twice": (ValueError, "layout", "", "ssd", "ssd"),
        "layout with s and t": (ValueError, "layout", "", "sthd", "sthd"),
        "layout empty": (ValueError, "layout", "", "", ""),
        "layout of another rank": (ValueError, "layout|x", "", r"bshd|\(5, 3, 8\)|3", "bshd"),
        "head_dim True": (TypeError, "head_dim", "int", "True|bool", True),
        "head_dim 8.0": (TypeError, "head_dim", "int", "float|8.0", 8.0),
        "head_dim '8'": (TypeError, "head_dim", "int", "str|'8'", "8"),
        "head_dim 0": (ValueError, "head_dim", "", "0", 0),
        "head_dim -8": (ValueError, "head_dim", "", "-8", -8),
        "head_dim 3 of 8": (ValueError, "head_dim|x", "divi|multiple", "3|8", 3),
        "rotary_offset True": (TypeError, "rotary_offset", "int", "True|bool", True),
        "rotary_offset 2.0": (TypeError, "rotary_offset", "int", "float|2.0", 2.0),
        "rotary_offset None": (TypeError, "rotary_offset", "int", "None", None),
        "rotary_offset -2": (ValueError, "rotary_offset", "", "-2", -2),
        "rotary_offset past the head": (ValueError, "rotary_offset|rotary_dim", "head_dim", "2", 2),
        "interleaved 1": (TypeError, "interleaved", "bool|True", "int|1", 1),
        "interleaved 'yes'": (TypeError, "interleaved", "bool|True", "str|yes", "yes"),
        "conjugate None": (TypeError, "conjugate", "bool|True", "None", None),
        "conjugate 0": (TypeError, "conjugate", "bool|True", "int|0", 0),
        "out_of_range 0": (EITHER, "out_of_range", "nan", "int|0", 0),
        "out_of_range 'clip'": (ValueError, "out_of_range", "keep", "clip", "clip"),
        "positions True": (TypeError, "positions", "int", "True|bool", True),
        "positions 1.5": (TypeError, "positions", "int", "float|1.5", 1.5),
        "positions '0'": (TypeError, "positions", "int", "str|'0'", "0"),
        "positions a list": (TypeError, "positions", "int", "list", [0, 1, 2, 3, 4]),
        "positions -1": (ValueError, "positions", "", "-1", -1),
        "positions from 2": (ValueError, "positions|table", "", "", 2),
        "positions from 2**70": (ValueError, "positions|table", "", "", 2**70),
        "table None": (TypeError, "table", "RotaryTable", "None", None),
        "table 'abc'": (TypeError, "table", "RotaryTable", "str|abc", "abc"),
    }


def wrong_x(make):
    return {
        "x of no axes": ("x", "", r"\(\)", {"x": make(())}),
        "x of one axis": ("x", "", r"\(8,\)", {"x": make((8,))}),
        "x of two axes": ("x", "", r"\(5, 8\)", {"x": make((5, 8))}),
        "x of five axes": ("x", "", r"\(1, 1, 5, 3, 8\)", {"x": make((1, 1, *X))}),
        "one axis to split": ("x", "", r"\(24,\)", {"x": make((24,)), "head_dim": 8}),
        "four axes to split": ("x", "", r"\(1, 5, 3, 8\)", {"x": make((1, *X)), "head_dim": 8}),
        "a split before tokens": (
            "layout",
            "hd",
            "bhsd",
            {"x": make((2, 5, 24)), "head_dim": 8, "layout": "bhsd"},
        ),
        "rotary_dim past the head": ("rotary_dim|table", "6", "8", {"x": make((5, 3, 6))}),
    }


def wrong_positions(make):
    def of(shape, dtype="int64"):
        return {"positions": make(shape, dtype)}

    dtypes = ("float32", "bool", "int8", "int16", "uint8", "uint32", "uint64", "complex64")
    return {
        f"positions of {dtype}": (TypeError, "int32", dtype, of(5, dtype)) for dtype in dtypes
    } | {
        "big-endian positions": (
            TypeError,
            "byte order|int32",
            ">|big|swap",
            {"positions": numpy_array(5, ">i8")},
        ),
        "positions of four tokens": (ValueError, "5", r"\(4,\)", of(4)),
        "positions by column": (ValueError, "5", r"\(5, 1\)", of((5, 1))),
        "positions of three axes": (ValueError, "5", r"\(1, 1, 5\)", of((1, 1, 5))),
        "positions of another batch": (
            ValueError,
            "2",
            r"\(3, 5\)",
            {"x": make((2, *X))} | of((3, 5), "int32"),
        ),
        "positions elsewhere": (
            ValueError,
            DEVICE,
            "meta",
            {"positions": torch_array(5, "int64").to("meta")},
        ),
        "positions into a table by batch": (
            ValueError,
            "None",
            "",
            {"table": pair_of(make, (1, 5, 4))} | of(5),
        ),
        "a start into a table by batch": (
            ValueError,
            "None",
            "0",
            {"table": pair_of(make, (1, 5, 4)), "positions": 0},
        ),
        "a start into a table by head": (
            ValueError,
            "None",
            "1",
            {"table": pair_of(make, (1, 5, 1, 4)), "positions": 1},
        ),
    }


def wrong_counts(make):
    """Of offsets, packed sequences and positions on three axes."""

    def offsets(shape, dtype="int64"):
        return {"seqlen_offsets": make(shape, dtype)}

    def ends(shape, dtype="int64"):
        return {"cu_seqlens": make(shape, dtype)}

    positions, axes = {"positions": make(5, "int64")}, {"positions": make((3, 5), "int64")}
    by_batch = {"table": pair_of(make, (1, 5, 4))}
    both = {"x": make((2, *X))}
    return {
        "offsets of float32": (
            TypeError,
            "seqlen_offsets",
            "int32",
            "float32",
            offsets(1, "float32"),
        ),
        "offsets of int16": (TypeError, "seqlen_offsets", "int32", "int16", offsets(1, "int16")),
        "offsets in a list": (TypeError, "seqlen_offsets", "int", "list", {"seqlen_offsets": [1]}),
        "offsets 1.5": (TypeError, "seqlen_offsets", "int", "1.5", {"seqlen_offsets": 1.5}),
        "an offset below 0": (ValueError, "positions", "0 or more", "-1", {"seqlen_offsets": -1}),
        "offsets of 70 bits": (
            ValueError,
            "positions",
            "64",
            str(2**70),
            offsets(1) | {"positions": 2**70},
        ),
        "offsets of 3 batches": (ValueError, "seqlen_offsets", "2", r"\(3,\)", both | offsets(3)),
        "offsets by tokens": (ValueError, "seqlen_offsets", "1", r"\(1, 5\)", offsets((1, 5))),
        "offsets and positions": (
            ValueError,
            "seqlen_offsets",
            "None",
            "both",
            offsets(1) | positions,
        ),
        "offsets elsewhere": (
            *(ValueError, "seqlen_offsets", DEVICE, "meta"),
            {"seqlen_offsets": torch_array(1, "int64").to("meta")},
        ),
        "offsets into a table by batch": (
            ValueError,
            "seqlen_offsets",
            "None",
            "",
            by_batch | offsets(1),
        ),
        "an offset into a table by batch": (
            *(ValueError, "positions", "None", "2"),
            by_batch | {"seqlen_offsets": 2},
        ),
        "ends of uint64": (TypeError, "cu_seqlens", "int32", "uint64", ends(3, "uint64")),
        "ends an int": (TypeError, "cu_seqlens", ARRAY, "5", {"cu_seqlens": 5}),
        "no ends": (ValueError, "cu_seqlens", "sequences", r"\(0,\)", ends(0)),
        "ends of two axes": (ValueError, "cu_seqlens", "sequences", r"\(1, 3\)", ends((1, 3))),
        "ends of batches": (ValueError, "cu_seqlens", "None", "", both | ends(3)),
        "ends and positions": (ValueError, "cu_seqlens", "None", "both", ends(3) | positions),
        "offsets of other sequences": (
            ValueError,
            "seqlen_offsets",
            "2",
            r"\(3,\)",
            ends(3) | offsets(3),
        ),
        "ends into a table by batch": (ValueError, "cu_seqlens", "None", "", by_batch | ends(3)),
        "sections of two": (
            TypeError,
            "mrope_section",
            "three",
            "2",
            axes | {"mrope_section": (2, 2)},
        ),
        "sections a string": (
            TypeError,
            "mrope_section",
            "three",
            "'112'",
            axes | {"mrope_section": "112"},
        ),
        "sections of floats": (
            *(TypeError, "mrope_section", "int", "1.0"),
            axes | {"mrope_section": (1.0, 1, 2)},
        ),
        "sections below 0": (
            *(ValueError, "mrope_section", "0 or more", "-1"),
            axes | {"mrope_section": (-1, 3, 2)},
        ),
        "sections of 5 pairs": (
            *(ValueError, "mrope_section", "4", r"\(1, 2, 2\)"),
            axes | {"mrope_section": (1, 2, 2)},
        ),
        "sections of no positions": (
            *(ValueError, "positions", "three axes", "none"),
            {"mrope_section": (1, 1, 2)},
        ),
        "sections of one axis": (
            *(ValueError, "positions", r"\(3, 5\)", r"\(5,\)"),
            positions | {"mrope_section": (1, 1, 2)},
        ),
        "three axes of no sections": (ValueError, "positions", r"\(5,\)", r"\(3, 5\)", axes),
        "in turn 1": (
            *(TypeError, "mrope_interleaved", "True", "1"),
            axes | {"mrope_section": (1, 1, 2), "mrope_interleaved": 1},
        ),
        "in turn of no sections": (
            *(ValueError, "mrope_section", "mrope_interleaved", "None"),
            {"mrope_interleaved": True},
        ),
    }


def wrong_table(make):
    def of(shape):
        return {"table": pair_of(make, shape)}

    meta = {"table": tuple(part.to("meta") for part in pair_of(torch_array))}
    return {
        "a table too short": (ValueError, "table|positions", "5", "4", of((4, 4))),
        "a table of more tokens": (ValueError, "table", "5", "6", of((1, 6, 4))),
        "a table of fewer tokens": (ValueError, "table", "5", "4", of((1, 4, 1, 4))),
        "a table of another batch": (
            ValueError,
            "table",
            "2",
            "3",
            {"x": make((2, *X))} | of((3, 5, 4)),
        ),
        "a table of a batch": (ValueError, "table", "1", "2", of((2, 5, 4))),
        "a table of other heads": (ValueError, "table", "3", "2", of((1, 5, 2, 4))),
        "a table of one array": (TypeError, "table", "RotaryTable", ARRAY, {"table": make(HALF)}),
        "a table in a list": (
            TypeError,
            "table",
            "RotaryTable",
            "list",
            {"table": list(pair_of(make))},
        ),
        "a tuple of one": (EITHER, "table", "cos", "1", {"table": (make(HALF),)}),
        "a tuple of three": (EITHER, "table", "cos", "3", {"table": (*pair_of(make), None)}),
        "a table elsewhere": (ValueError, "cos|table", DEVICE, "meta", meta),
    }


def wrong_out(make):
    return {
        "out a string": (TypeError, ARRAY, "str|abc", "abc"),
        "out a list": (TypeError, ARRAY, "list", [0.0] * 120),
        "out a tuple": (TypeError, ARRAY, "tuple", (make(X), make(X))),
        "out of another shape": (ValueError, r"\(5, 3, 8\)", r"\(5, 2, 8\)", make((5, 2, 8))),
        "out of another rank": (ValueError, r"\(5, 3, 8\)", r"\(1, 5, 3, 8\)", make((1, *X))),
        "out of another dtype": (TypeError, "float32", "float64", make(X, "float64")),
        "out elsewhere": (ValueError, DEVICE, "meta", torch_array(X).to("meta")),
        "out read-only": (ValueError, "writ", "read-only", read_only(X)),
        "out of no whole elements": (ValueError, "stride|element", "", between_bytes(X)),
        "out requires grad": (ValueError, "grad", "", torch_array(X).requires_grad_()),
        "out lazily negated": (ValueError, "values|neg", "lazy|neg", lazily_negated(X)),
    }


def wrong_calls(make):
    """{what is wrong: (exception, argument, wanted, got, {changed arguments})}"""
    calls = {
        name: (error, argument, wanted, got, {argument.split("|")[0]: value})
        for name, (error, argument, wanted, got, value) in wrong_options().items()
    }
    calls |= {name: (ValueError, *row) for name, row in wrong_x(make).items()}
    calls |= {
        name: (error, "positions", wanted, got, changed)
        for name, (error, wanted, got, changed) in wrong_positions(make).items()
    }
    calls |= wrong_table(make) | wrong_counts(make)
    calls |= {
        name: (error, "out", wanted, got, {"out": out})
        for name, (error, wanted, got, out) in wrong_out(make).items()
    }
    return calls


CASES = list(wrong_calls(numpy_array))


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_of_apply_rotary_is_refused(case, make):
    *expected, changed = wrong_calls(make)[case]
    call = {"x": make(X), "table": pair_of(make)} | changed
    assert_refused(*expected, apply_rotary, **call)


RIGHT_AND_WRONG = {"rotary_offset": (0, False), "interleaved": (True, 1), "positions": (1, True)}


def test_sections_of_a_wrong_type_are_refused_after_equal_ones_were_right(make):
    x, table, positions = make(X), pair_of(make), make((3, 5), "int64") * 0
    for _ in range(2):
        apply_rotary(x, table, positions=positions, mrope_section=(1, 1, 2))
        for wrong in ((1, 1.0, 2), (True, 1, 2)):
            with pytest.raises(
                TypeError, match=r"^mrope_section must be three ints, got (1.0|True)"
            ):
                apply_rotary(x, table, positions=positions, mrope_section=wrong)


@pytest.mark.parametrize("option", RIGHT_AND_WRONG)
def test_a_wrong_type_is_refused_after_an_equal_value_was_right(option, make):
    x, table, (right, wrong) = make(X), pair_of(make), RIGHT_AND_WRONG[option]
    apply_rotary(x, table, **{option: right})
    assert_refused(TypeError, option, "", str(wrong), apply_rotary, x, table, **{option: wrong})


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_of_apply_rotary_qk_is_refused(case, make):
    error, argument, wanted, got, changed = wrong_calls(make)[case]
    argument = "|".join("q" if name == "x" else name for name in argument.split("|"))
    call = {"x": make(X), "table": pair_of(make)} | changed
    x = call.pop("x")
    if "out" in call:
        argument, call["out"] = "q_out", (call["out"], make(X))
    assert_refused(error, argument, wanted, got, apply_rotary_qk, x, x, **call)


def wrong_pairs(make):
    q, k, table = make(X), make(X), pair_of(make)
    by_head = pair_of(make, (1, 5, 3, 4))
    return {
        "k of another dtype": (TypeError, "k", "float32", "float64", make(X, "float64"), table, {}),
        "k of more tokens": (ValueError, "k", "5", "6", make((6, 3, 8)), table, {}),
        "k of another rank": (ValueError, "k", "", r"\(1, 5, 3, 8\)", make((1, *X)), table, {}),
        "k of another head_dim": (ValueError, "k", "8", "16", make((5, 3, 16)), table, {}),
        "k of other heads": (ValueError, "table", "3 and 2", "3", make((5, 2, 8)), by_head, {}),
        "one out": (TypeError, "out", "tuple", ARRAY, k, table, {"out": q}),
        "three outs": (EITHER, "out", "two", "3", k, table, {"out": (q, k, k)}),
        "out of None": (TypeError, "k_out", ARRAY, "None", k, table, {"out": (q, None)}),
        "k_out of q's heads": (
            ValueError,
            "k_out",
            "5, 1, 8",
            "5, 3, 8",
            make((5, 1, 8)),
            table,
            {"out": (q, k)},
        ),
    }


@pytest.mark.parametrize("case", wrong_pairs(numpy_array))
def test_a_k_or_an_out_that_does_not_suit_q_is_refused(case, make):
    *expected, k, table, changed = wrong_pairs(make)[case]
    assert_refused(*expected, apply_rotary_qk, make(X), k, table, **changed)


# Arrays of numbers that make no table.


def wrong_tables(make):
    def half(*shapes):
        return (RotaryTable, *map(make, shapes))

    full, cache = RotaryTable.from_full_width, RotaryTable.from_cache
    matrices, cis = RotaryTable.from_matrices, RotaryTable.from_complex
    elsewhere, conjugated = torch_array(HALF).to("meta"), torch_array(HALF, "complex64").conj()
    return {
        "sin of other positions": (ValueError, "sin", "6, 4", "5, 4", *half((6, 4), (5, 4))),
        "sin that broadcasts": (ValueError, "sin", "6, 4", "1, 4", *half((6, 4), (1, 4))),
        "sin of another rank": (ValueError, "sin", "6, 4", "1, 6, 4", *half((6, 4), (1, 6, 4))),
        "sin of another dtype": (
            TypeError,
            "sin",
            "float32",
            "float64",
            RotaryTable,
            make(HALF),
            make(HALF, "float64"),
        ),
        "sin elsewhere": (
            ValueError,
            "sin|cos",
            DEVICE,
            "meta",
            RotaryTable,
            make(HALF),
            elsewhere,
        ),
        "one axis": (ValueError, "cos", "", r"\(4,\)", *half((4,), (4,))),
        "five axes": (ValueError, "cos", "", "1, 1, 5, 1, 4", *half(*[(1, 1, 5, 1, 4)] * 2)),
        "no pairs": (ValueError, "cos|table", "", "0", *half((6, 0), (6, 0))),
        "full width odd": (ValueError, "cos", "even", "7", full, make((6, 7)), make((6, 7))),
        "cache odd": (ValueError, "cos_sin", "even", "7", cache, make((6, 7))),
        "cache of one axis": (ValueError, "cos_sin", "", r"\(8,\)", cache, make((8,))),
        "matrices of no positions": (ValueError, "freqs", "", "4, 2, 2", matrices, make((4, 2, 2))),
        "matrices of a row": (ValueError, "freqs", "2 x 2", "6, 4, 2", matrices, make((6, 4, 2))),
        "matrices of 2 by 3": (ValueError, "freqs", "2 x 2", "2, 3", matrices, make((6, 4, 2, 3))),
        "matrices first": (ValueError, "freqs", "2 x 2", "2, 2, 4", matrices, make((6, 2, 2, 4))),
        "real numbers": (TypeError, "freqs_cis", "complex", "float32", cis, make(HALF)),
        "complex of one axis": (ValueError, "freqs_cis", "", "4,", cis, make(4, "complex64")),
        "lazily conjugated": (ValueError, "freqs_cis", "values|conj", "lazy|conj", cis, conjugated),
    }


@pytest.mark.parametrize("case", wrong_tables(numpy_array))
def test_arrays_that_make_no_table_are_refused(case, make):
    assert_refused(*wrong_tables(make)[case])
