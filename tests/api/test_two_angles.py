"""Tables in which each element of a pair has an angle of its own, and matrices of any numbers.

What they mean is known by other code than the reference's: a formula of models, written down here,
or the models' own functions.
"""

import importlib

import numpy as np
import pytest
import torch
from arrays import hold, in_both_pairings, in_every_library
from reference import FORMATS, check, decode, encode, to_float64

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

TOKENS, HEADS, PAIRS = 7, 3, 8
RNG = np.random.default_rng(41)


def rotate_half(x, interleaved):
    """(a, b) becomes (-b, a)."""
    if interleaved:
        return np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    first, second = np.split(x, 2, -1)
    return np.concatenate([-second, first], -1)


def numbers(*shape):
    """Random numbers that are float32 already."""
    return np.float64(np.float32(RNG.standard_normal(shape)))


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rest", [0, 8])
def test_each_element_is_rotated_by_its_own_angle(rest, dtype, interleaved, library):
    if dtype == "bfloat16" and library in ("numpy", "cupy"):
        pytest.importorskip("ml_dtypes")
    x = decode(encode(numbers(TOKENS, HEADS, 2 * PAIRS + rest), dtype), dtype)
    cos, sin = numbers(2, TOKENS, 2 * PAIRS)
    table = RotaryTable.from_elementwise(*(hold(y, "float32", library).array for y in (cos, sin)))
    assert (table.shape, table.rotary_dim) == ((TOKENS, PAIRS), 2 * PAIRS)
    y = apply_rotary(hold(x, dtype, library).array, table, interleaved=interleaved)
    part = x[..., : 2 * PAIRS]
    exact = part * cos[:, None] + rotate_half(part, interleaved) * sin[:, None]
    check(to_float64(y), np.concatenate([exact, x[..., 2 * PAIRS :]], -1), dtype)


def laid_out(matrices, how, module=np):
    """The same numbers with other strides, as NumPy's or CuPy's."""
    matrices = module.asarray(matrices)
    if how == "transposed":
        return matrices.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    if how == "apart":
        wide = module.zeros((*matrices.shape[:-2], 3, 5), matrices.dtype)
        wide[..., :2, 1:5:2] = matrices
        return wide[..., :2, 1:5:2]
    if how == "pairs inside":
        return module.moveaxis(module.moveaxis(matrices, 1, -1).copy(), -1, 1)
    return matrices


@in_every_library
@in_both_pairings
@pytest.mark.parametrize("how", ["dense", "transposed", "apart", "pairs inside"])
@pytest.mark.parametrize("table_dtype", ["float32", "float64"])
def test_all_four_numbers_of_a_matrix_are_used(table_dtype, how, interleaved, library):
    x, matrices = numbers(TOKENS, HEADS, 2 * PAIRS), numbers(TOKENS, PAIRS, 2, 2)
    module = pytest.importorskip("cupy") if library == "cupy" else np
    laid = laid_out(matrices.astype(table_dtype), how, module)
    if library.startswith("torch"):
        laid = torch.from_numpy(laid).to("cuda" if library == "torch-cuda" else "cpu")
    y = apply_rotary(
        hold(x, "float32", library).array, RotaryTable.from_matrices(laid), interleaved=interleaved
    )
    pairs = x.reshape(TOKENS, HEADS, *((PAIRS, 2) if interleaved else (2, PAIRS)))
    pairs = pairs if interleaved else pairs.swapaxes(-1, -2)
    product = np.einsum("spij,shpj->shpi", matrices, pairs)
    exact = (product if interleaved else product.swapaxes(-1, -2)).reshape(x.shape)
    check(to_float64(y), exact, "float32")


@pytest.mark.parametrize("form", ["elementwise", "matrices"])
@in_both_pairings
def test_the_conjugate_is_the_transpose_and_the_gradient(form, interleaved):
    """<A x, y> = <x, A' y> for all x and y, which no other map than the transpose fulfils."""
    if form == "matrices":
        table = RotaryTable.from_matrices(numbers(TOKENS, PAIRS, 2, 2))
    else:
        table = RotaryTable.from_elementwise(*numbers(2, TOKENS, 2 * PAIRS))
    x, y = numbers(2, TOKENS, HEADS, 2 * PAIRS)
    forward = apply_rotary(x, table, interleaved=interleaved)
    back = apply_rotary(y, table, interleaved=interleaved, conjugate=True)
    assert np.vdot(forward, y) == pytest.approx(np.vdot(x, back), rel=1e-12)
    twice = apply_rotary(back, table, interleaved=interleaved)
    assert not np.allclose(twice, y)  # which the inverse would give


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@in_both_pairings
def test_eager_rounding_gives_the_bits_of_pytorchs_operations(interleaved, dtype, device):
    x = torch.randn(TOKENS, HEADS, 64, device=device).to(dtype)
    cos, sin = torch.randn(2, TOKENS, 64, device=device).to(dtype)
    if interleaved:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-x[..., 32:], x[..., :32]], -1)
    theirs = x * cos[:, None] + other * sin[:, None]
    table = RotaryTable.from_elementwise(cos, sin)
    assert torch.equal(apply_rotary(x, table, interleaved=interleaved, rounding="eager"), theirs)


def test_v_jepa_2s_own_function():
    """Halves that repeat, under the pairing of neighbours."""
    name = "transformers.models.vjepa2.modeling_vjepa2"
    theirs = pytest.importorskip(name, reason="transformers is not installed")
    x, positions = torch.randn(2, HEADS, TOKENS, 24), torch.arange(TOKENS)
    wanted = theirs.rotate_queries_or_keys(x, positions.expand(2, HEADS, TOKENS))
    angles = positions[:, None] * 10000 ** -(torch.arange(12) / 12)
    cos, sin = (part.repeat(1, 2) for part in (angles.cos(), angles.sin()))
    table = RotaryTable.from_elementwise(cos, sin)
    y = apply_rotary(x, table, layout="bhsd", interleaved=True)
    assert (y - wanted).abs().max() < 1e-6


def test_ernie_images_own_processor(monkeypatch):
    """Angles that repeat at once, under the pairing of halves."""
    name = "diffusers.models.transformers.transformer_ernie_image"
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = importlib.import_module(name)
    given = []

    def record(query, key, value, **_):
        given.extend([query, key])
        return value

    monkeypatch.setattr(theirs, "dispatch_attention_fn", record)
    attention = theirs.ErnieImageAttention(48, heads=2, dim_head=24, qk_norm="rms_norm")
    ids = torch.stack(torch.meshgrid(*map(torch.arange, (2, 3, 4)), indexing="ij"), -1)
    angles = theirs.ErnieImageEmbedND3(24, 256, (8, 8, 8))(ids.reshape(1, 24, 3).float())
    x = torch.randn(1, 24, 48)
    with torch.no_grad():
        attention(x, image_rotary_emb=angles)
        q, k = (
            norm(project(x).unflatten(-1, (2, 24)))
            for norm, project in (
                (attention.norm_q, attention.to_q),
                (attention.norm_k, attention.to_k),
            )
        )
    table = RotaryTable.from_elementwise(angles.cos(), angles.sin())
    for ours, wanted in zip(apply_rotary_qk(q, k, table), given, strict=True):
        assert (ours - wanted).abs().max() < 1e-6


def test_an_output_that_overlaps_the_second_column_of_matrices_is_refused():
    memory = numbers(TOKENS * PAIRS * 4 + 64)
    matrices = memory[: TOKENS * PAIRS * 4].reshape(TOKENS, PAIRS, 2, 2)
    out = np.lib.stride_tricks.as_strided(memory[1:], (TOKENS, 1, 2), (256, 8, 32))
    table = RotaryTable.from_matrices(matrices[:, :1])
    with pytest.raises(ValueError, match=r"out must .* table, got two arrays that overlap"):
        apply_rotary(np.ones((TOKENS, 1, 2)), table, out=out)


def test_an_output_that_overlaps_the_second_angles_of_elements_is_refused():
    memory = numbers(TOKENS, 3 * PAIRS)
    table = RotaryTable.from_elementwise(memory[:, : 2 * PAIRS], numbers(TOKENS, 2 * PAIRS))
    with pytest.raises(ValueError, match=r"out must .* table, got two arrays that overlap"):
        apply_rotary(np.ones((TOKENS, 1, 2 * PAIRS)), table, out=memory[:, None, PAIRS:])


@pytest.mark.parametrize("shapes", [((4, 7), (4, 7)), ((4, 8), (4, 6)), ((8,), (8,))])
def test_tables_that_are_not_of_elements_are_refused(shapes):
    with pytest.raises(ValueError, match=r"^(cos|sin) must "):
        RotaryTable.from_elementwise(*map(np.ones, shapes))
