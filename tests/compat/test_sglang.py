"""rope_cupy.compat.sglang, over the matrix of SGLang's own tests in small."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    check,
    double,
    eager,
    elementwise,
    normalised,
    rotate,
    share_of_equal,
    table,
    values,
)

from rope_cupy.compat import sglang

H, K = 4, 2
T = 6
pytestmark = pytest.mark.parametrize("device", DEVICES)
styles = pytest.mark.parametrize("is_neox", [True, False])
flags = pytest.mark.parametrize("flag", ["interleaved", "is_neox"])
forms = pytest.mark.parametrize("form", ["flat", "heads", "batch"])
sizes = pytest.mark.parametrize("head_size", [64, 80, 96, 256])


def given(x, form):
    """x (tokens, heads, d) as SGLang takes it: views of the same memory."""
    return {"flat": x.flatten(1), "heads": x, "batch": x.unflatten(0, (2, -1))}[form]


def heads(head_size, dtype, device):
    q = values(T, H, head_size, dtype=dtype, device=device)
    k = values(T, K, head_size, dtype=dtype, device=device)
    return q, k, q.clone(), k.clone()


def own_angles(rows, width, dtype, device):
    """A full-width table whose second half is no copy of the first."""
    return table(rows, width, dtype=dtype, device=device)


@flags
@forms
@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_key", [True, False])
def test_cos_sin_true_means_neighbours(with_key, dtype, head_size, form, flag, device):
    q, k, q_before, k_before = heads(head_size, dtype, device)
    cos, sin = table(T, head_size // 2, dtype=dtype, device=device)
    key = given(k, form) if with_key else None
    size = head_size if form == "flat" else 0
    query = given(q, form)
    result = sglang.rotary_embedding_cos_sin(cos, sin, query, key, size, **{flag: True})
    assert result is None
    check(q, rotate(q_before, cos[:, None], sin[:, None], interleaved=True))
    if with_key:
        check(k, rotate(k_before, cos[:, None], sin[:, None], interleaved=True))
    else:
        assert torch.equal(k, k_before)


@flags
@forms
@sizes
def test_cos_sin_false_reads_each_half_by_its_own(head_size, form, flag, device):
    q, k, q_before, k_before = heads(head_size, torch.float32, device)
    cos, sin = own_angles(T, head_size, torch.float32, device)
    size = head_size if form == "flat" else 0
    sglang.rotary_embedding_cos_sin(cos, sin, given(q, form), given(k, form), size, **{flag: False})
    for y, x in ((q, q_before), (k, k_before)):
        check(y, elementwise(x, cos[:, None], sin[:, None]))


def test_a_full_width_table_of_neighbours_gives_cos_of_the_first_and_sin_of_the_second(device):
    q, _, before, _ = heads(64, torch.float32, device)
    cos, sin = own_angles(T, 64, torch.float32, device)
    sglang.rotary_embedding_cos_sin(cos, sin, q)  # the default is neighbours
    check(q, rotate(before, cos[:, None, 0::2], sin[:, None, 1::2], interleaved=True))


@pytest.mark.parametrize("flag", [True, False])
@forms
def test_cos_sin_with_positions(form, flag, device):
    q, _, before, _ = heads(64, torch.float32, device)
    cos, sin = table(40, 32 if flag else 64, dtype=torch.float32, device=device)
    positions = torch.tensor([39, 0, 3, 3, 4, 17], device=device)
    sglang.rotary_embedding_cos_sin(cos, sin, given(q, form), None, 64, flag, positions)
    cos, sin = (double(part)[positions.cpu()][:, None] for part in (cos, sin))
    check(q, (rotate if flag else elementwise)(before, cos, sin, interleaved=flag))


@flags
@forms
@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize("with_key", [True, False])
def test_positions_true_means_halves(with_key, rotary_dim, value, form, flag, device):
    q, k, q_before, k_before = heads(64, torch.bfloat16, device)
    parts = table(40, rotary_dim // 2, dtype=torch.bfloat16, device=device)
    positions = torch.tensor([39, 0, 3, 3, 4, 17], device=device)
    key = given(k, form) if with_key else None
    sglang.rotary_embedding(
        positions,
        given(q, form),
        key,
        64 if form == "flat" else 0,
        cos_sin_cache=torch.cat(parts, -1),
        **{flag: value},
    )
    cos, sin = (double(part)[positions.cpu()][:, None] for part in parts)
    check(q, rotate(q_before, cos, sin, interleaved=value is False))  # the default is halves
    if with_key:
        check(k, rotate(k_before, cos, sin, interleaved=value is False))


@forms
@pytest.mark.parametrize("is_neox", [(), (True,), (False,)])
@pytest.mark.parametrize("with_key", [True, False])
def test_positions_as_in_releases_where_the_cache_is_the_fifth(with_key, is_neox, form, device):
    q, k, q_before, k_before = heads(64, torch.bfloat16, device)
    parts = table(40, 32, dtype=torch.bfloat16, device=device)
    positions, cache = torch.tensor([39, 0, 3, 3, 4, 17], device=device), torch.cat(parts, -1)
    query, key = given(q, form), given(k, form) if with_key else None
    results = sglang.rotary_embedding(positions, query, key, 64, cache, *is_neox)
    assert results[0] is query and results[1] is key
    cos, sin = (double(part)[positions.cpu()][:, None] for part in parts)
    check(q, rotate(q_before, cos, sin, interleaved=is_neox == (False,)))
    if with_key:
        check(k, rotate(k_before, cos, sin, interleaved=is_neox == (False,)))


def test_one_function_for_both_modes(device):
    q, k, q_before, _ = heads(64, torch.float32, device)
    cos, sin = table(T, 32, dtype=torch.float32, device=device)
    sglang.apply_rotary_embedding(query=q, key=k, is_neox=True, cos=cos, sin=sin)
    check(q, rotate(q_before, cos[:, None], sin[:, None], interleaved=True))
    q, k, q_before, _ = heads(64, torch.float32, device)
    sglang.apply_rotary_embedding(
        mode="positions",
        query=q,
        is_neox=True,
        positions=torch.arange(T, device=device),
        cos_sin_cache=torch.cat([cos, sin], -1),
    )
    check(q, rotate(q_before, cos[:, None], sin[:, None], interleaved=False))


def test_wrong_arguments_are_refused(device):
    q, _, before, _ = heads(64, torch.float32, device)
    cos, sin = table(T, 32, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="interleaved and is_neox must be equal"):
        sglang.rotary_embedding_cos_sin(cos, sin, q, interleaved=True, is_neox=False)
    with pytest.raises(ValueError, match="head_size must be given"):
        sglang.rotary_embedding_cos_sin(cos, sin, q.flatten(1))
    for flag in (None, True):
        with pytest.raises(ValueError, match="cos_sin_cache must be a tensor, got None"):
            sglang.rotary_embedding(torch.arange(T, device=device), q, None, 64, flag)
    with pytest.raises(ValueError, match="cos and sin must be given"):
        sglang.apply_rotary_embedding(query=q)
    with pytest.raises(ValueError, match="positions and cos_sin_cache must be given"):
        sglang.apply_rotary_embedding(mode="positions", query=q)
    with pytest.raises(ValueError, match="mode must be"):
        sglang.apply_rotary_embedding(mode="both", query=q)
    positions = torch.arange(T, device=device)
    with pytest.raises(ValueError, match="rope_dim must be 0 or that of cos_sin_cache"):
        sglang.apply_rope_inplace(
            q, q.clone(), torch.cat([cos, sin], -1), positions, is_neox=True, rope_dim=32
        )
    assert torch.equal(q, before)
    assert sglang.can_use_rotary_embedding_cos_sin(80)
    assert not sglang.can_use_rotary_embedding_cos_sin(0)


@styles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rope_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("head_counts", [(4, 1), (8, 2), (2, 2)])
def test_rope_in_place_of_strided_views(
    head_counts, rope_dim, position_dtype, dtype, is_neox, device
):
    n_q, n_k = head_counts
    packed = values(T, n_q + n_k, rope_dim, dtype=dtype, device=device)
    before = packed.clone()
    q, k = packed[:, :n_q], packed[:, n_q:]
    parts = table(40, rope_dim // 2, dtype=torch.float32, device=device)
    positions = torch.tensor([39, 0, 3, 3, 4, 17], device=device, dtype=position_dtype)
    call = sglang.apply_rope_inplace
    if rope_dim == 64:  # the older name without a cache
        call = sglang.apply_rope_with_cos_sin_cache_inplace
    assert call(q, k, torch.cat(parts, -1), positions, is_neox=is_neox) is None
    cos, sin = (double(part)[positions.cpu().long()][:, None] for part in parts)
    check(packed, rotate(before, cos, sin, interleaved=not is_neox))


@styles
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("flat_v", [True, False])
@pytest.mark.parametrize("by_old_name", [True, False])
def test_rope_in_place_and_into_the_cache(by_old_name, flat_v, position_dtype, is_neox, device):
    q, k, q_before, k_before = heads(64, torch.bfloat16, device)
    v = values(T, K, 64, dtype=torch.bfloat16, device=device, seed=3)
    k_cache, v_cache = torch.full((2, 20, K * 64), 7.0, dtype=torch.bfloat16, device=device)
    parts = table(40, 32, dtype=torch.float32, device=device)
    positions = torch.tensor([39, 0, 3, 3, 4, 17], device=device, dtype=position_dtype)
    slots = torch.tensor([19, 0, 4, 5, 6, 2], device=device, dtype=position_dtype)
    value, cos_sin, how = v.flatten(1) if flat_v else v, torch.cat(parts, -1), {"is_neox": is_neox}
    if by_old_name:
        arguments = sglang.FusedSetKVBufferArg(value, k_cache, v_cache, slots)
        result = sglang.apply_rope_with_cos_sin_cache_inplace(
            q, k, cos_sin, positions, fused_args=arguments, **how
        )
    else:
        result = sglang.apply_rope_inplace_with_kvcache(
            q, k, value, k_cache, v_cache, cos_sin, positions, slots, rope_dim=64, **how
        )
    assert result is None
    cos, sin = (double(part)[positions.cpu().long()][:, None] for part in parts)
    check(q, rotate(q_before, cos, sin, interleaved=not is_neox))
    check(k, rotate(k_before, cos, sin, interleaved=not is_neox))
    rows = slots.long()
    assert torch.equal(k_cache[rows], k.flatten(1))
    assert torch.equal(v_cache[rows], v.flatten(1))
    rest = [i for i in range(20) if i not in slots.tolist()]
    assert (k_cache[rest] == 7).all() and (v_cache[rest] == 7).all()


def normed(x, weight, eps, rounded):
    exact = normalised(x, weight, eps)
    return exact.to(x.dtype) if rounded else exact


@styles
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope_dim", [64, 32])
@pytest.mark.parametrize("in_place", [True, False])
def test_norm_and_rotation(in_place, rope_dim, cache_dtype, full_width, rounded, is_neox, device):
    tokens, dtype = 200, torch.bfloat16
    q = values(tokens, H, 64, dtype=dtype, device=device)
    k = values(tokens, K, 64, dtype=dtype, device=device)
    if not in_place:  # any strides there
        q, k = torch.cat([q, k], 1).split([H, K], 1)
    before = q.clone(), k.clone()
    weights = [
        torch.nn.Parameter(values(64, dtype=dtype, device=device, seed=i) + 1) for i in range(2)
    ]
    width = rope_dim if full_width else rope_dim // 2
    parts = own_angles(40, width, cache_dtype, device)
    positions = torch.arange(tokens, device=device) % 40
    options = {
        "is_neox": is_neox,
        "eps": 1e-5,
        "rope_dim": 0 if in_place else rope_dim,
        "round_norm_before_rope": rounded,
        "cache_has_full_width": full_width,
    }
    outs = (q, k) if in_place else (torch.empty_like(before[0]), torch.empty_like(before[1]))
    cos_sin = torch.cat(parts, -1)
    if in_place:
        result = sglang.fused_inplace_qknorm_rope(q, k, *weights, cos_sin, positions, **options)
    else:
        result = sglang.fused_qknorm_rope_out_of_place(
            q, k, *outs, *weights, cos_sin, positions, **options
        )
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert result is None
    rows = [part.cpu()[positions.cpu()][:, None] for part in parts]
    if not full_width:
        rows = [
            torch.cat([part, part], -1) if is_neox else part.repeat_interleave(2, -1)
            for part in rows
        ]
    for y, x, weight in zip(outs, before, weights, strict=True):
        if not rounded:  # once
            exact = elementwise(normed(x, weight, 1e-5, False), *rows, interleaved=not is_neox)
            check(y, exact)
            twice = elementwise(normed(x, weight, 1e-5, True), *rows, interleaved=not is_neox)
            assert share_of_equal(twice.to(dtype), exact.to(dtype)) < 0.95
            continue
        expected = eager(normed(x, weight, 1e-5, True).cpu(), *rows, interleaved=not is_neox)
        assert share_of_equal(y.cpu(), expected) > 0.995


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("full_width", "interleaved"),
    [(False, True), (False, False), (True, True)],  # the flag alone says that a table is wide
)
def test_the_triton_files_function_always_rotates_neighbours(
    full_width, interleaved, batched, dtype, device
):
    x = values(*([2] if batched else []), T, H, 64, dtype=dtype, device=device)
    before = x.clone()
    parts = table(T, 32, dtype=torch.float32, device=device)
    tables = [part.repeat_interleave(2, -1) for part in parts] if full_width else parts
    y = sglang.apply_rotary_embedding_triton(x, *tables, interleaved)
    check(y, rotate(before, *(part[:, None] for part in parts), interleaved=True))
    assert torch.equal(x, before)


@styles
@pytest.mark.parametrize("form", ["flat", "heads"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_function_of_sgl_kernel_takes_a_head_size(fused, form, is_neox, device):
    q, k, q_before, k_before = heads(64, torch.bfloat16, device)
    v = values(T, K, 64, dtype=torch.bfloat16, device=device, seed=1)
    cos, sin = table(20, 16, dtype=torch.float32, device=device)
    positions = torch.tensor([3, 0, 19, 4, 4, 7], device=device)
    slots = torch.tensor([9, 0, 3, 2, 7, 1], device=device)
    caches = [torch.zeros(10, K * 64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    args = sglang.FusedSetKVBufferArg(
        value=v, k_buffer=caches[0], v_buffer=caches[1], k_scale=None, v_scale=None, cache_loc=slots
    )
    result = sglang.apply_rope_with_cos_sin_cache_inplace_by_head_size(
        positions,
        given(q, form),
        given(k, form),
        64,
        torch.cat([cos, sin], -1),
        is_neox,
        args if fused else None,
        enable_pdl=True,
    )
    assert result is None
    of_token = cos[positions][:, None], sin[positions][:, None]
    for y, x in ((q, q_before), (k, k_before)):
        check(y, rotate(x, *of_token, interleaved=not is_neox))
    expected = (k.flatten(1), v.flatten(1)) if fused else (caches[0] * 0, caches[1] * 0)
    for cache, rows in zip(caches, expected, strict=True):
        assert torch.equal(cache[slots] if fused else cache, rows)


def test_scales_of_the_caches_are_refused(device):
    q, k, _, _ = heads(64, torch.bfloat16, device)
    before = q.clone()
    cos, sin = table(20, 16, dtype=torch.float32, device=device)
    caches = [torch.zeros(10, K * 64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    slots = torch.arange(T, device=device)
    args = sglang.FusedSetKVBufferArg(k.clone(), *caches, slots, k_scale=0.5)
    with pytest.raises(ValueError, match=r"k_scale must be None, got 0\.5"):
        sglang.apply_rope_with_cos_sin_cache_inplace(
            q, k, torch.cat([cos, sin], -1), slots, is_neox=True, fused_args=args
        )
    assert torch.equal(q, before)
