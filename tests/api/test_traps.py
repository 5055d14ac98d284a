"""What is easily given wrong, without a shape that shows it: refused, read rightly, or said so."""

import numpy as np
import pytest
import torch
from arrays import hold
from reference import check, rotate

from rope_cupy import (
    RotaryTable,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
)
from rope_cupy.arrays.dlpack import Bfloat16

RNG = np.random.default_rng(51)
ANGLES = np.outer(np.arange(6), [1.0, 0.3, 0.1, 0.03])
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
IN_HALVES = [np.tile(part, 2) for part in (COS, SIN)]
IN_TURN = [part.repeat(2, -1) for part in (COS, SIN)]


def matrices(cos, sin):
    return np.stack([cos, -sin, sin, cos], -1).reshape(*cos.shape, 2, 2)


OF_PAIRS = {
    "complex numbers": RotaryTable.from_complex(COS + 1j * SIN),
    "matrices": RotaryTable.from_matrices(matrices(COS, SIN)),
}
OF_OTHERS = {
    "a tuple": (COS, SIN),
    "half width": RotaryTable(COS, SIN),
    "full width": RotaryTable.from_full_width(*IN_HALVES),
    "elements": RotaryTable.from_elementwise(*IN_HALVES),
    "a cache": RotaryTable.from_cache(np.concatenate([COS, SIN], -1)),
}


@pytest.mark.parametrize("interleaved", [None, True, False])
@pytest.mark.parametrize("form", [*OF_PAIRS, *OF_OTHERS])
def test_a_table_has_a_pairing_of_its_own_which_a_call_may_override(form, interleaved):
    x, table = RNG.standard_normal((6, 2, 8)), (OF_PAIRS | OF_OTHERS)[form]
    pairing = form in OF_PAIRS if interleaved is None else interleaved
    if form in ("full width", "elements") and pairing:
        pytest.skip("these halves are for the other pairing")
    exact = rotate(x[None], COS, SIN, interleaved=pairing)[0]
    check(apply_rotary(x, table, interleaved=interleaved), exact, "float64")
    if interleaved is None:
        check(apply_rotary(x, table), exact, "float64")


def test_a_compiled_call_has_the_tables_own_pairing_too():
    freqs = torch.polar(torch.ones(6, 4), torch.from_numpy(ANGLES).float())
    x = torch.randn(1, 6, 2, 8)

    def rotated(x, freqs):
        return apply_rotary(x, RotaryTable.from_complex(freqs))

    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, freqs), rotated(x, freqs))
    check(
        np.float64(rotated(x, freqs)), rotate(np.float64(x), COS, SIN, interleaved=True), "float32"
    )


# head_dim on an array whose heads are an axis already.


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_head_dim_that_splits_nothing_is_refused(library):
    x = hold(RNG.standard_normal((6, 2, 8)), "float64", library).array
    with pytest.raises(ValueError, match=r"^head_dim must be None .* got head_dim=8 for shape"):
        apply_rotary(x, (COS, SIN), head_dim=8)
    with pytest.raises(ValueError, match=r"^head_dim must be None"):
        apply_rotary_qk(x, x[:, :1], (COS, SIN), head_dim=8)


def test_one_head_is_split_off_where_the_call_leaves_no_doubt():
    x = RNG.standard_normal((2, 6, 8))
    exact = rotate(x[:, :, None], COS, SIN)[:, :, 0]
    check(apply_rotary(x, (COS, SIN), head_dim=8, layout="bshd"), exact, "float64")
    check(apply_rotary(x[0], (COS, SIN), head_dim=8), exact[0], "float64")  # of two axes
    q, k = apply_rotary_qk(np.tile(x, 2), x, (COS, SIN), head_dim=8)  # where q has more heads
    check(k, exact, "float64")
    check(q, np.tile(exact, 2), "float64")


# The axes of a table, by name.


@pytest.mark.parametrize(
    ("axes", "shape", "seen"),
    [
        ("p", (6, 4), (6, 4)),
        ("s", (6, 4), (1, 6, 4)),
        ("bs", (2, 6, 4), (2, 6, 4)),
        ("sh", (6, 3, 4), (1, 6, 3, 4)),
        ("bsh", (1, 6, 3, 4), (1, 6, 3, 4)),
    ],
)
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_the_axes_of_a_table_are_named_where_their_number_says_too_little(axes, shape, seen, wrap):
    angles = RNG.uniform(-3, 3, shape)
    cos, sin = np.cos(angles), np.sin(angles)
    tables = [
        RotaryTable(wrap(cos), wrap(sin), axes=axes),
        RotaryTable.from_complex(wrap(cos + 1j * sin), axes=axes),
        RotaryTable.from_matrices(wrap(matrices(cos, sin)), axes=axes),
        RotaryTable.from_full_width(*(wrap(np.tile(x, 2)) for x in (cos, sin)), axes=axes),
        RotaryTable.from_elementwise(*(wrap(np.tile(x, 2)) for x in (cos, sin)), axes=axes),
    ]
    x = RNG.standard_normal((2, 6, 3, 8))
    exact = rotate(x, cos.reshape(seen), sin.reshape(seen))
    for table in tables:
        assert table.shape == seen
        assert table.axes == {2: "p", 3: "bs", 4: "bsh"}[len(seen)]
        assert (f"axes={table.axes!r}" in repr(table)) == (table.axes != "p")
        check(np.asarray(apply_rotary(wrap(x), table, interleaved=False)), exact, "float64")


def test_a_table_by_token_and_head_is_not_taken_for_one_by_batch_and_token():
    angles = RNG.uniform(-3, 3, (6, 3, 4))
    with pytest.raises(ValueError, match=r"^table must .* got \(6, 3, 4\): .* axes='sh'"):
        apply_rotary(np.ones((6, 3, 8)), (np.cos(angles), np.sin(angles)))


@pytest.mark.parametrize(
    ("axes", "error", "got"),
    [
        ("hs", ValueError, "'hs'"),
        ("bsh", ValueError, "'bsh'"),
        (2, TypeError, "2"),
        (["s"], TypeError, "list"),
    ],
)
def test_names_of_other_axes_are_refused(axes, error, got):
    with pytest.raises(error, match=rf"^axes must .*, got {got}"):
        RotaryTable(COS, SIN, axes=axes)


# Positions on three axes.


@pytest.mark.parametrize("section", [(0, 4, 0), (2, 0, 2), (1, 2, 1)])
def test_sections_that_no_turns_of_pairs_give_are_refused(section):
    """Of 4 pairs in turn the second axis has one and the third one."""
    positions = np.zeros((3, 1, 6), np.int64)
    with pytest.raises(ValueError, match=r"^mrope_section must have at most 1 pairs of axis .*got"):
        apply_rotary(
            *(np.ones((1, 6, 2, 8)), (COS, SIN)),
            **{"positions": positions, "mrope_section": section, "mrope_interleaved": True},
        )


@pytest.mark.parametrize("section", [(2, 1, 1), (3, 1, 0), (3, 0, 1), (4, 0, 0)])
def test_sections_that_turns_of_pairs_give_are_as_the_caller_says(section):
    positions = RNG.integers(0, 6, (3, 1, 6))
    x = RNG.standard_normal((1, 6, 2, 8))
    axes = [0, 1 if section[1] else 0, 2 if section[2] else 0, 0]
    assert [axes.count(axis) for axis in range(3)] == list(section)
    options = {"positions": positions, "mrope_section": section, "mrope_interleaved": True}
    cos, sin = (
        np.stack([part[positions[axis, 0], pair] for pair, axis in enumerate(axes)], -1)[None]
        for part in (COS, SIN)
    )
    check(apply_rotary(x, (COS, SIN), **options), rotate(x, cos, sin), "float64")


def test_positions_that_could_be_of_three_axes_or_of_three_batches_are_refused():
    positions = RNG.integers(0, 6, (3, 6))
    x, options = RNG.standard_normal((3, 6, 2, 8)), {"mrope_section": (2, 1, 1)}
    with pytest.raises(ValueError, match=r"^positions must .*\(3, 1, 6\).*got \(3, 6\)"):
        apply_rotary(x, (COS, SIN), positions=positions, **options)
    of_axes = apply_rotary(x, (COS, SIN), positions=positions[:, None], **options)
    of_both = apply_rotary(x, (COS, SIN), positions=positions[:, None].repeat(3, 1), **options)
    assert np.array_equal(of_axes, of_both)
    two = apply_rotary(x[:2], (COS, SIN), positions=positions, **options)  # of two batches: axes
    assert np.array_equal(two, of_axes[:2])


# What the values of a table are.

ELEMENTS = RNG.uniform(-3, 3, (6, 8))
SAID = {
    "one angle a pair, of every position": RotaryTable(COS, SIN),
    "one angle a pair, times 1.2, of every position": RotaryTable(1.2 * COS, 1.2 * SIN),
    "every angle twice, in halves: use RotaryTable.from_full_width": RotaryTable(*IN_HALVES),
    "every angle twice, each beside its copy: use RotaryTable.from_full_width with "
    "interleaved=True": RotaryTable(*IN_TURN),
    "every angle twice, each beside its copy: right with interleaved=True; where the model pairs "
    "halves, use RotaryTable.from_elementwise (ERNIE-Image)": RotaryTable.from_full_width(*IN_TURN),
    "two angles a pair: use RotaryTable(cos, sin) where there is a column for each pair, else "
    "RotaryTable.from_elementwise": RotaryTable.from_full_width(np.cos(ELEMENTS), np.sin(ELEMENTS)),
    "two angles a pair, of every position": (
        RotaryTable.from_elementwise(np.cos(ELEMENTS), np.sin(ELEMENTS))
    ),
    "every angle twice, in halves: two angles a pair with interleaved=True; with "
    "interleaved=False one, and RotaryTable.from_full_width reads half as much": (
        RotaryTable.from_elementwise(*IN_HALVES)
    ),
    "every angle twice, each beside its copy: two angles a pair with interleaved=False; with "
    "interleaved=True one, and RotaryTable.from_full_width reads half as much": (
        RotaryTable.from_elementwise(*IN_TURN)
    ),
    "sines before cosines: use RotaryTable(cos, sin)": (
        RotaryTable.from_cache(np.concatenate([SIN, COS], -1))
    ),
    "sines before cosines: give the cosines first": RotaryTable.from_full_width(*IN_HALVES[::-1]),
    "not a rotation: cos * cos + sin * sin is from 0 to 2": RotaryTable(SIN, SIN[:, ::-1] * 0),
    "not a rotation: not every value is finite": RotaryTable(COS, SIN + np.inf),
    "not a rotation: the two sines of a matrix have one sign": (
        RotaryTable.from_matrices(np.abs(matrices(COS, SIN)) * [[1, 1], [1, 1]])
    ),
    "a matrix a pair that is no rotation, of every position": (
        RotaryTable.from_matrices(RNG.standard_normal((6, 4, 2, 2)))
    ),
    "frequencies, of which the angles of every position are computed": (
        RotaryTable.from_inverse_frequencies([1.0, 0.1], like=COS, precompute=False)
    ),
    "one angle a pair, of every token and head": RotaryTable(COS[:, None], SIN[:, None], axes="sh"),
}


@pytest.mark.parametrize("said", SAID)
def test_a_table_says_what_its_values_are(said):
    if said.startswith("not a rotation: cos"):
        assert SAID[said].check().startswith("not a rotation: cos * cos + sin * sin is from 0 to ")
    elif "two sines" in said:
        table = RotaryTable.from_matrices(matrices(COS, SIN) * [[1, -1], [1, 1]])
        assert table.check() == said
    else:
        assert SAID[said].check() == said


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            RotaryTable.from_cache(np.concatenate(IN_HALVES, -1)),
            "every angle twice, in halves: use",
        ),
        (RotaryTable.from_complex(IN_TURN[0] + 1j * IN_TURN[1]), "every angle twice, each beside"),
        (RotaryTable(SIN, COS), "sines before cosines: use"),
    ],
)
def test_every_form_sees_copies_and_swapped_parts(table, said):
    assert table.check().startswith(said)


@pytest.mark.parametrize("library", ["jax", "Bfloat16"])
def test_tables_of_bfloat16_of_any_library_are_read(library):
    words = [(part.astype("f4").view("u4") >> 16).astype("u2") for part in (COS, SIN)]
    if library == "jax":
        jax = pytest.importorskip("jax")
        parts = [jax.numpy.asarray(part, "bfloat16") for part in (COS, SIN)]
    else:
        parts = list(map(Bfloat16, words))
    assert RotaryTable(*parts).check() == "one angle a pair, of every position"
    frequencies = parts[0][1] if library == "jax" else Bfloat16(words[0][1])
    table = RotaryTable.from_inverse_frequencies(frequencies, 3, like=COS)
    assert table.shape == (3, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tables_of_few_bits_on_every_device_say_it_too(dtype, device):
    parts = [torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in (COS, SIN)]
    assert RotaryTable(*parts).check() == "one angle a pair, of every position"
    halves = [torch.cat([part, part], -1) for part in parts]
    assert RotaryTable(*halves).check().startswith("every angle twice, in halves: use ")
    numbers = torch.complex(*(part.float() for part in parts))
    assert RotaryTable.from_complex(numbers).check() == "one angle a pair, of every position"


def test_a_table_of_glm_says_where_it_is_right():
    said = RotaryTable.from_full_width(*IN_HALVES).check()
    assert said.startswith("every angle twice, in halves: right with interleaved=False; ")
    assert "GLM" in said
    x = RNG.standard_normal((6, 2, 8))
    cos, sin = (part[..., :4] for part in IN_HALVES)  # as the sentence says
    check(
        apply_rotary(x, RotaryTable(cos, sin), interleaved=True),
        rotate(x[None], COS, SIN, interleaved=True)[0],
        "float64",
    )


def test_an_inner_norm_may_be_rounded_before_the_weight_also_where_a_cache_is_written():
    x = np.ones((6, 2, 8))
    table, caches = (COS, SIN), [np.zeros((6, 2, 8)) for _ in range(2)]
    y = apply_rotary_kv_cache(
        *(x, x, x, *caches, table),
        **{"slot_mapping": np.arange(6), "norm": "head", "round_norm": "before_weight"},
    )
    assert np.array_equal(y, caches[0])
