"""rounding="eager" gives the bits of transformers' and diffusers' functions, of each in its form.

Two of their functions have other bits: diffusers' `apply_split_rotary_emb` of LTX-2, which adds by
`addcmul`, and on a GPU so rounds once where products are rounded here; and those of transformers
that compute in float32 with a 16-bit table, which is to be given here as float32.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, apply_rotary_qkv

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCH, TOKENS, HEADS, KV_HEADS = 2, 24, 4, 2
PAIRS = 32  # whole vectors: PyTorch may multiply the complex numbers behind them in another way
ROWS = 50  # of the tables that positions choose from


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(7)
    return request.param


def of_transformers(model):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def of_diffusers(name):
    return pytest.importorskip(f"diffusers.models.{name}")


def twice(*parts):
    """Tables of full width whose halves repeat."""
    return [torch.cat([part, part], -1) for part in parts]


def each_twice(*parts):
    """Tables of full width in which every angle repeats at once."""
    return [part.repeat_interleave(2, -1) for part in parts]


# What models do. x comes in the layout of the form, cos and sin as (batch or 1, tokens, pairs).


def llama(x, cos, sin):
    return of_transformers("llama").apply_rotary_pos_emb(x, x, *twice(cos, sin))[0]


def llama_tokens_first(x, cos, sin):
    apply = of_transformers("llama").apply_rotary_pos_emb
    return apply(x, x, *twice(cos, sin), unsqueeze_dim=2)[1]


def glm(x, cos, sin):
    return of_transformers("glm").apply_rotary_pos_emb(x, x, *twice(cos, sin))[0]


def gpt_oss(x, cos, sin):
    return of_transformers("gpt_oss").apply_rotary_pos_emb(x, x, cos, sin)[0]


def cohere(x, cos, sin):
    return of_transformers("cohere").apply_rotary_pos_emb(x, x, *each_twice(cos, sin))[0]


def qwen2_vl_vision(x, cos, sin):
    (x,), cos, sin = x, *twice(cos[0], sin[0])
    return of_transformers("qwen2_vl").apply_rotary_pos_emb_vision(x, x, cos, sin)[0][None]


def diffusers_interleaved(x, cos, sin):
    freqs = each_twice(cos[0], sin[0])
    return of_diffusers("embeddings").apply_rotary_emb(x, freqs, use_real_unbind_dim=-1)


def diffusers_halves(x, cos, sin):
    apply, freqs = of_diffusers("embeddings").apply_rotary_emb, twice(cos[0], sin[0])
    return apply(x, freqs, use_real_unbind_dim=-2, sequence_dim=1)


def diffusers_complex(x, cos, sin):
    apply = of_diffusers("embeddings").apply_rotary_emb
    return apply(x, torch.complex(cos, sin), use_real=False)


def qwen_image(x, cos, sin):
    apply = of_diffusers("transformers.transformer_qwenimage").apply_rotary_emb_qwen
    return apply(x, torch.complex(cos[0], sin[0]), use_real=False)


def qwen_image_interleaved(x, cos, sin):
    apply = of_diffusers("transformers.transformer_qwenimage").apply_rotary_emb_qwen
    return apply(x, each_twice(cos[0], sin[0]), use_real_unbind_dim=-1)


def qwen_image_halves(x, cos, sin):
    apply = of_diffusers("transformers.transformer_qwenimage").apply_rotary_emb_qwen
    return apply(x, twice(cos[0], sin[0]), use_real_unbind_dim=-2)


def ltx(x, cos, sin):
    apply = of_diffusers("transformers.transformer_ltx").apply_rotary_emb
    freqs = [part.flatten(2) for part in each_twice(cos, sin)]
    return apply(x.flatten(2), freqs).unflatten(2, x.shape[2:])


def wan(x, cos, sin):
    """The function within WanAttnProcessor, whose tables are (1, tokens, 1, head_dim)."""
    cos, sin = (part[:, :, None] for part in each_twice(cos, sin))
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def z_image(x_in, cos, sin):
    """The function within ZSingleStreamAttnProcessor."""
    freqs_cis = torch.complex(cos, sin).unsqueeze(2)
    x = torch.view_as_complex(x_in.float().reshape(*x_in.shape[:-1], -1, 2))
    return torch.view_as_real(x * freqs_cis).flatten(3).type_as(x_in)


def kandinsky(x, cos, sin):
    """The function within Kandinsky5AttnProcessor, but for its bfloat16 whatever the input's is."""
    rope = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)).unsqueeze(-4)
    x_ = x.reshape(*x.shape[:-1], -1, 1, 2).to(torch.float32)
    return (rope * x_).sum(dim=-1).reshape(x.shape).to(x.dtype)


def full_width_halves(cos, sin):
    return RotaryTable.from_full_width(*twice(cos, sin))


def full_width_interleaved(cos, sin):
    return RotaryTable.from_full_width(*each_twice(cos, sin))


def of_complex(cos, sin):
    return RotaryTable.from_complex(torch.complex(cos, sin))


def of_matrices(cos, sin):
    return RotaryTable.from_matrices(torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)))


class Form(NamedTuple):
    """How a model rotates x, and the table that it does it by."""

    theirs: Callable[..., Any]
    table: Callable[..., Any]
    interleaved: bool
    layout: str = "bshd"
    own_dtype: bool = False  # cosines and sines are in x's dtype, else float32
    rows: str = "s"  # whose own a table's rows are: of tokens, batches or heads
    passing: int = 0  # elements of a head that are not rotated


FORMS = [
    Form(llama, full_width_halves, False, "bhsd", own_dtype=True, rows="bs"),
    Form(llama_tokens_first, full_width_halves, False, own_dtype=True, rows="bs"),
    Form(glm, RotaryTable, True, "bhsd", own_dtype=True, rows="bs", passing=16),
    Form(gpt_oss, RotaryTable, False, "bhsd", own_dtype=True, rows="bs"),
    Form(cohere, full_width_interleaved, True, "bhsd", rows="bs"),
    Form(qwen2_vl_vision, full_width_halves, False),
    Form(diffusers_interleaved, full_width_interleaved, True, "bhsd"),
    Form(diffusers_halves, full_width_halves, False),
    Form(diffusers_complex, of_complex, True, rows="bs"),
    Form(qwen_image, of_complex, True),
    Form(qwen_image_interleaved, full_width_interleaved, True, "bhsd"),
    Form(qwen_image_halves, full_width_halves, False, "bhsd"),
    Form(ltx, full_width_interleaved, True, rows="bsh"),
    Form(wan, full_width_interleaved, True),
    Form(z_image, of_complex, True, rows="bs"),
    Form(kandinsky, of_matrices, True),
]
BY_TOKEN = [form for form in FORMS if form.rows != "bsh"]


def of_each(forms):
    return pytest.mark.parametrize("form", forms, ids=lambda form: form.theirs.__name__)


of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pair_places(form, pair):
    return (2 * pair, 2 * pair + 1) if form.interleaved else (pair, pair + PAIRS)


def make_x(form, dtype, device, heads=HEADS):
    """Random numbers, and a last pair whose products' difference shows how they were rounded."""
    batch = 1 if form.theirs is qwen2_vl_vision else BATCH
    sizes = {"b": batch, "s": TOKENS, "h": heads, "d": 2 * PAIRS + form.passing}
    x = torch.randn([sizes[axis] for axis in form.layout], device=device).to(dtype)
    first, second = pair_places(form, PAIRS - 1)
    x[..., first], x[..., second] = 2**12, 2**12 * (1 + torch.finfo(dtype).eps)
    return x


def make_parts(form, dtype, device, *leading):
    """Cosines and sines of random angles, but for the last pair: see `make_x`."""
    angles = torch.rand(*leading, PAIRS, device=device, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    cos[..., -1], sin[..., -1] = 1 + torch.finfo(dtype).eps, 1 + 2**-23
    return cos, sin


def leading_axes(form):
    sizes = {"s": (1, TOKENS), "bs": (BATCH, TOKENS), "bsh": (BATCH, TOKENS, HEADS)}
    return sizes[form.rows]


def bits(x):
    return x.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


def options_of(form, rounding="eager"):
    return {"interleaved": form.interleaved, "layout": form.layout, "rounding": rounding}


def inputs(form, dtype, device):
    table_dtype = dtype if form.own_dtype else torch.float32
    parts = make_parts(form, dtype, device, *leading_axes(form))
    return make_x(form, dtype, device), *(part.to(table_dtype) for part in parts)


@of_each(FORMS)
@of_each_dtype
def test_a_result_has_the_bits_of_the_model_and_rounded_once_has_not(form, dtype, device):
    """New, in place, and by the conjugate of a table whose sines have the other sign."""
    x, cos, sin = inputs(form, dtype, device)
    theirs, table, y = form.theirs(x, cos, sin), form.table(cos, sin), x.clone()
    assert_same_bits(apply_rotary(x, table, **options_of(form)), theirs)
    back = apply_rotary(x, form.table(cos, -sin), conjugate=True, **options_of(form))
    assert_same_bits(back, theirs)
    assert apply_rotary(y, table, out=y, **options_of(form)) is y
    assert_same_bits(y, theirs)
    for others in (options_of(form, "once"), options_of(form) | {"conjugate": True}):
        assert not torch.equal(bits(apply_rotary(x, table, **others)), bits(theirs))


@of_each(FORMS)
@of_each_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_q_and_k_have_the_bits_of_the_model(form, dtype, in_place, device):
    q, cos, sin = inputs(form, dtype, device)
    k = make_x(form, dtype, device, heads=HEADS if form.rows == "bsh" else KV_HEADS)
    theirs = [form.theirs(x, cos, sin) for x in (q, k)]
    out = (q, k) if in_place else None
    results = apply_rotary_qk(q, k, form.table(cos, sin), out=out, **options_of(form))
    for ours, each in zip(results, theirs, strict=True):
        assert_same_bits(ours, each)


@of_each(BY_TOKEN)
@of_each_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_a_packed_projection_has_the_bits_of_the_model(form, dtype, in_place, device):
    _, cos, sin = inputs(form, dtype, device)
    at, sizes = form.layout.index("h"), (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (make_x(form, dtype, device, heads) for heads in sizes)
    qkv = torch.cat([q, k, v], at)
    options = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, **options_of(form)}
    out = qkv if in_place else None
    results = apply_rotary_qkv(qkv, form.table(cos, sin), out=out, **options).split(sizes, at)
    for ours, theirs in zip(results, (*(form.theirs(x, cos, sin) for x in (q, k)), v), strict=True):
        assert_same_bits(ours, theirs)


@of_each(BY_TOKEN)
@of_each_dtype
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_that_positions_choose_give_the_bits_of_the_model(form, dtype, kind, device):
    table_dtype = dtype if form.own_dtype else torch.float32
    cos, sin = (part.to(table_dtype) for part in make_parts(form, dtype, device, ROWS))
    x, table = make_x(form, dtype, device), form.table(cos, sin)
    positions = torch.randint(ROWS, leading_axes(form), device=device)
    theirs = form.theirs(x, cos[positions], sin[positions])
    rows = positions.squeeze(0).to(kind)
    assert_same_bits(apply_rotary(x, table, positions=rows, **options_of(form)), theirs)


def by_hand(x, cos, sin, interleaved):
    """x cos + rotated sin in the wider of two dtypes, and x's in the end."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    cos, sin = (each_twice if interleaved else twice)(cos, sin)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack([-second, first], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        rotated = torch.cat([-second, first], -1)
    total = x.to(wide) * cos[:, None] + rotated.to(wide) * sin[:, None]
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
def test_a_float64_table_gives_products_in_float64_and_two_roundings(
    dtype, interleaved, conjugate, device
):
    x = torch.randn(BATCH, TOKENS, HEADS, 2 * PAIRS, device=device).to(dtype)
    angles = torch.rand(TOKENS, PAIRS, device=device, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    # Halfway between two numbers of 16 bits, but for what float32 does not hold.
    x[..., 0], cos[:, 0], sin[:, 0] = 1, 1 + torch.finfo(dtype).eps / 2 + 2**-40, 0
    theirs = by_hand(x, cos, -sin if conjugate else sin, interleaved)
    options = {"interleaved": interleaved, "conjugate": conjugate}
    assert_same_bits(apply_rotary(x, (cos, sin), rounding="eager", **options), theirs)
    if dtype.itemsize == 2:
        once = apply_rotary(x, (cos, sin), **options)
        assert not torch.equal(bits(once), bits(theirs))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_two_dtypes_give_the_bits_of_operations_in_the_wider(
    dtype, table_dtype, interleaved, device
):
    x = torch.randn(BATCH, TOKENS, HEADS, 2 * PAIRS, device=device).to(dtype)
    angles = torch.rand(TOKENS, PAIRS, device=device, dtype=torch.float64) * 6
    cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    ours = apply_rotary(x, (cos, sin), interleaved=interleaved, rounding="eager")
    assert_same_bits(ours, by_hand(x, cos, sin, interleaved))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_model_that_widens_a_16_bit_table_wants_it_as_float32(dtype, device):
    form = next(form for form in FORMS if form.theirs is cohere)
    x, cos, sin = inputs(form, dtype, device)
    cos, sin = cos.to(dtype), sin.to(dtype)
    theirs = cohere(x, cos, sin)
    ours = apply_rotary(x, form.table(cos, sin), **options_of(form))
    assert not torch.equal(bits(ours), bits(theirs))
    ours = apply_rotary(x, form.table(cos.float(), sin.float()), **options_of(form))
    assert_same_bits(ours, theirs)
