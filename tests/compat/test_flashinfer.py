"""rope_cupy.compat.flashinfer, over the matrix of FlashInfer's own tests in small."""

import math
from types import SimpleNamespace

import pytest
import torch
from compat_reference import DEVICES, check, double, rotate, table, values

from rope_cupy.compat import flashinfer

H, K, D = 4, 2, 64
pytestmark = pytest.mark.parametrize("device", DEVICES)
interleavings = pytest.mark.parametrize("interleave", [False, True])
ids = pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
in_places = pytest.mark.parametrize("inplace", [False, True])
of_llama = pytest.mark.parametrize("llama", [False, True])
LLAMA = {"rope_scale": 8, "rope_theta": 5e5, "low_freq_factor": 1, "high_freq_factor": 4}


def frequencies(rotary_dim, llama, scale, theta):
    """By the formulas of both: Llama 3.1's divides those of long waves, and blends between."""
    freq = theta ** -(torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    if not llama:
        return freq / scale
    turns = 8192 * freq / (2 * math.pi)
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return freq / scale * (1 - blend) + freq * blend


def angles(positions, *about):
    product = torch.outer(positions.double().cpu(), frequencies(*about))
    return product.cos()[:, None], product.sin()[:, None]


def called(name, inplace, q, k, *arguments, **options):
    function = getattr(flashinfer, f"{name}_inplace" if inplace else name)
    result = function(q, k, *arguments, **options)
    assert (result is None) == inplace
    return (q, k) if inplace else result


@interleavings
@ids
@in_places
@of_llama
@pytest.mark.parametrize("rotary_dim", [None, D // 4, D // 2])
@pytest.mark.parametrize("offset", [0, 15, 99])
def test_packed_sequences(offset, rotary_dim, llama, inplace, dtype, interleave, device):
    lengths = [7, 1, 12]
    indptr = torch.tensor([0, 7, 8, 20], dtype=dtype, device=device)
    offsets = torch.full((3,), offset, dtype=dtype, device=device)
    packed = values(20, (H + 2 * K) * D, dtype=torch.float16, device=device)
    q = packed[:, : H * D].unflatten(1, (H, D))  # views of one projection
    k = packed[:, H * D : (H + K) * D].unflatten(1, (K, D))
    before = q.clone(), k.clone()
    name = "apply_llama31_rope" if llama else "apply_rope"
    options = {"rotary_dim": rotary_dim, "interleave": interleave}
    results = called(name, inplace, q, k, indptr, offsets, **options)
    positions = torch.cat([torch.arange(n) + offset for n in lengths])
    about = (rotary_dim or D, llama, *((8, 5e5) if llama else (1, 1e4)))
    for y, x in zip(results, before, strict=True):
        check(y, rotate(x, *angles(positions, *about), interleaved=interleave))


@interleavings
@ids
@in_places
@of_llama
@pytest.mark.parametrize("rotary_dim", [None, D // 2])
def test_positions(rotary_dim, llama, inplace, dtype, interleave, device):
    positions = torch.tensor([0, 5, 3, 3, 4000], dtype=dtype, device=device)
    q = values(5, H, D, dtype=torch.bfloat16, device=device)
    k = values(5, K, D, dtype=torch.bfloat16, device=device)
    before = q.clone(), k.clone()
    name = "apply_llama31_rope_pos_ids" if llama else "apply_rope_pos_ids"
    results = called(
        name, inplace, q, k, positions, rotary_dim, interleave, rope_scale=4, rope_theta=1e6
    )
    for y, x in zip(results, before, strict=True):
        tables = angles(positions, rotary_dim or D, llama, 4, 1e6)
        check(y, rotate(x, *tables, interleaved=interleave))


def test_angles_are_right_at_any_position(device):
    positions = torch.tensor([1_000_000, 131_071, 2**24 + 1], device=device)
    q = values(3, H, D, dtype=torch.float32, device=device)
    k = values(3, K, D, dtype=torch.float32, device=device)
    y, _ = flashinfer.apply_rope_pos_ids(q, k, positions)
    check(y, rotate(q, *angles(positions, D, False, 1, 1e4)))


def test_one_table_serves_all_calls_of_its_parameters(device):
    q = values(3, H, D, dtype=torch.float32, device=device)
    flashinfer._tables.clear()
    positions = torch.arange(3, device=device)
    for theta in (1e4, 1e4, 5e5, 1e4):
        flashinfer.apply_rope_pos_ids(q, q.clone(), positions, rope_theta=theta)
    assert len(flashinfer._tables) == 2
    for theta in range(2, 100):
        flashinfer.apply_rope_pos_ids(q, q.clone(), positions, rope_theta=float(theta))
    assert len(flashinfer._tables) <= flashinfer.MAX_TABLES


def test_tables_are_kept_by_device_of_cupy_too(device, monkeypatch):
    cupy = pytest.importorskip("cupy")
    made = []

    def make(*_, like, precompute):
        made.append((like, precompute))
        return len(made)

    monkeypatch.setattr(flashinfer.rope_cupy.RotaryTable, "from_inverse_frequencies", make)
    monkeypatch.setattr(flashinfer, "_tables", {})
    arrays = [SimpleNamespace(shape=(1, 1, D), device=cupy.cuda.Device(i)) for i in (0, 0, 1)]
    assert [flashinfer._table(q, None, 1, 1e4) for q in arrays] == [1, 1, 2]
    assert made == [(arrays[0], False), (arrays[2], False)]


@pytest.mark.parametrize("is_neox", [True, False])
@ids
@in_places
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
def test_a_cache(rotary_dim, by_head, inplace, dtype, is_neox, device):
    cos, sin = table(40, rotary_dim // 2, dtype=torch.float32, device=device)
    positions = torch.tensor([0, 39, 3, 3, 4], dtype=dtype, device=device)
    q = values(5, H, D, dtype=torch.bfloat16, device=device)
    k = values(5, K, D, dtype=torch.bfloat16, device=device)
    before = q.clone(), k.clone()
    given = (q, k) if by_head else (q.flatten(1), k.flatten(1))
    name = "apply_rope_with_cos_sin_cache" + ("_inplace" if inplace else "")
    result = getattr(flashinfer, name)(positions, *given, D, torch.cat([cos, sin], -1), is_neox)
    assert (result is None) == inplace
    for y, x, one in zip(given if inplace else result, before, given, strict=True):
        assert y.shape == one.shape
        rows = (double(part)[positions.cpu().long()][:, None] for part in (cos, sin))
        check(y.reshape(x.shape), rotate(x, *rows, interleaved=not is_neox))


def test_a_cache_of_another_dtype_is_refused(device):
    q = values(5, H * D, dtype=torch.float16, device=device)
    positions = torch.arange(5, device=device)
    cache = values(8, D, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="cos_sin_cache should be float32"):
        flashinfer.apply_rope_with_cos_sin_cache(positions, q, q, D, cache)
