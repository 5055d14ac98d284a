"""rope_cupy.compat.comfy_kitchen, over the matrix of comfy-kitchen's own tests in small."""

import pytest
import torch
from compat_reference import DEVICES, DTYPES, check, normalised, share_of_equal, values

from rope_cupy.compat import comfy_kitchen

B, S, H, K, D = 2, 12, 4, 2, 32
pytestmark = pytest.mark.parametrize("device", DEVICES)
pairings = pytest.mark.parametrize("split_half", [False, True])
layouts = pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
in_places = pytest.mark.parametrize("in_place", [False, True])
table_dtypes = pytest.mark.parametrize("table_dtype", DTYPES, ids=str)


def function(name, one, split_half, in_place):
    middle = "_split_half" if split_half else ""
    return getattr(comfy_kitchen, f"{name}{middle}{'1' if one else ''}{'_' if in_place else ''}")


def matrices(rows, pairs, dtype, device):
    """2 x 2 matrices (rows, pairs, 2, 2): rotations, but not quite."""
    frequencies = 50.0 ** -(torch.arange(pairs).double() / pairs)
    angles = torch.outer(torch.arange(rows).double(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    flat = torch.stack([cos, -sin, sin * 1.5, cos * 0.5], -1)
    return flat.unflatten(-1, (2, 2)).to(device, dtype)


def multiplied(x, freqs, split_half):
    """By the definition: each pair, as a vector, times its matrix, in float64."""
    pairs = freqs.shape[-3]
    part = x[..., : 2 * pairs].double()
    pair = (
        part.unflatten(-1, (2, pairs)).transpose(-1, -2)
        if split_half
        else part.unflatten(-1, (pairs, 2))
    )
    y = (freqs.double() @ pair[..., None])[..., 0]
    y = y.transpose(-1, -2) if split_half else y
    return torch.cat([y.flatten(-2), x[..., 2 * pairs :].double()], -1)


def operations(x, freqs, split_half):
    """As PyTorch's operations give it in the table's dtype, rounded one by one."""
    pairs, x = freqs.shape[-3], x.to(freqs.dtype)
    pair = (
        x.unflatten(-1, (2, pairs)).transpose(-1, -2) if split_half else x.unflatten(-1, (pairs, 2))
    )
    y = torch.stack(
        [freqs[..., i, 0] * pair[..., 0] + freqs[..., i, 1] * pair[..., 1] for i in (0, 1)], -1
    )
    return (y.transpose(-1, -2) if split_half else y).flatten(-2)


def arrays(layout, dtype, device, counts=(H, H), dim=D):
    shapes = [(B, n, S, dim) if layout == "bhnd" else (B, S, n, dim) for n in counts]
    return [values(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]


def table(layout, dtype, device, pairs=D // 2, rows=S):
    freqs = matrices(rows, pairs, dtype, device)
    return freqs[None, None] if layout == "bhnd" else freqs[None, :, None]


def agree(y, x, freqs, split_half):
    x, freqs = x.detach().cpu(), freqs.cpu()
    if freqs.dtype.itemsize == 4:
        if x.dtype.itemsize > 4:  # which the table's dtype rounds, and what comes of it
            assert torch.equal(y, y.float().double())
            x, y = x.float(), y.float()
        check(y, multiplied(x, freqs, split_half))
        return
    expected = operations(x, freqs, split_half).to(x.dtype)
    assert share_of_equal(y.detach().cpu(), expected) > 0.999


@pairings
@layouts
@in_places
@table_dtypes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(H, H), (H, K)])
def test_both_in_the_tables_dtype(counts, dtype, table_dtype, in_place, layout, split_half, device):
    xs = arrays(layout, dtype, device, counts)
    before = [x.clone() for x in xs]
    freqs = table(layout, table_dtype, device)
    results = function("apply_rope", False, split_half, in_place)(*xs, freqs)
    for y, x, old in zip(results, xs, before, strict=True):
        agree(y, old, freqs, split_half)
        assert (y is x) == in_place
        assert in_place or torch.equal(x, old)


@pairings
@layouts
@in_places
@pytest.mark.parametrize("strided", [False, True])
def test_one_alone(strided, in_place, layout, split_half, device):
    if strided:  # q of a packed projection
        shape = (B, S, 3, H, D)
        x = values(*shape, dtype=torch.bfloat16, device=device)[:, :, 0]
        x = x.transpose(1, 2) if layout == "bhnd" else x
    else:
        x = arrays(layout, torch.bfloat16, device)[0]
    before, freqs = x.clone(), table(layout, torch.float32, device)
    y = function("apply_rope", True, split_half, in_place)(x, freqs)
    agree(y, before, freqs, split_half)
    assert (y is x) == in_place


@pairings
@pytest.mark.parametrize(
    ("shape", "table_shape"),
    [
        ((B, H, S, D), (B, 1, S)),  # a table of each batch
        ((B, H, S, D), (1, H, S)),  # and of each head
        ((B, S, H, D), (B, S, H)),
        ((B, S, H, D), (1, 1, 1)),  # one row for all
        ((S, H, D), (S, 1)),
        ((H, S, D), (1, S)),
        ((S, D), (S,)),
        ((B, H, S, D), (S,)),
    ],
)
def test_tables_that_broadcast(table_shape, shape, split_half, device):
    x = values(*shape, dtype=torch.float32, device=device)
    count = int(torch.tensor(table_shape).prod())
    freqs = matrices(count, D // 2, torch.float32, device).reshape(*table_shape, D // 2, 2, 2)
    y = function("apply_rope", True, split_half, False)(x, freqs)
    agree(y, x, freqs, split_half)


@in_places
def test_q_and_k_of_other_lengths(in_place, device):
    q = values(B, H, S, D, dtype=torch.float32, device=device)
    k = values(B, H, 1, D, dtype=torch.float32, device=device)
    before = q.clone(), k.clone()
    freqs = matrices(1, D // 2, torch.float32, device)[None, None]
    results = function("apply_rope", False, False, in_place)(q, k, freqs)
    for y, x in zip(results, before, strict=True):
        agree(y, x, freqs, False)


@pairings
@in_places
def test_a_longer_table_is_cut(in_place, split_half, device):
    x = values(B, H, S, D, dtype=torch.bfloat16, device=device)
    before, freqs = x.clone(), table("bhnd", torch.float32, device, rows=S + 5)
    y = function("apply_rope", True, split_half, in_place)(x, freqs)
    agree(y, before, freqs[:, :, :S], split_half)


def test_a_table_that_does_not_broadcast_is_refused(device):
    x = values(B, H, S, D, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="the table must broadcast"):
        comfy_kitchen.apply_rope1(x, table("bhnd", torch.float32, device, rows=S - 1))
    with pytest.raises(ValueError, match="x must have at most 4 axes"):
        comfy_kitchen.apply_rope1(x[None], table("bhnd", torch.float32, device))


@pairings
@layouts
@in_places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k_has_own", [True, False])
@pytest.mark.parametrize("counts", [(H, H), (H, K)])
@pytest.mark.parametrize("dim", [64, 72])
def test_norm_and_rotation(dim, counts, k_has_own, dtype, in_place, layout, split_half, device):
    xs = arrays(layout, dtype, device, counts, dim)
    before = [x.clone() for x in xs]
    scales = [
        torch.nn.Parameter(values(dim, dtype=dtype, device=device, seed=i) + 1) for i in range(2)
    ]
    freqs = table(layout, torch.float32, device, dim // 2)
    both = function("rms_rope", False, split_half, in_place)
    results = both(*xs, freqs, scales[0], scales[1] if k_has_own else None, 1e-5)
    one = function("rms_rope", True, split_half, False)(before[0], freqs, scales[0], 1e-5)
    assert torch.equal(one, results[0])
    for i, (y, x, old) in enumerate(zip(results, xs, before, strict=True)):
        normed = normalised(old, scales[i if k_has_own else 0].cpu(), 1e-5).to(dtype)
        check(y, multiplied(normed, freqs.cpu(), split_half), share=0.997)
        assert (y is x) == in_place


@pairings
def test_one_alone_with_its_norm_in_place(split_half, device):
    x = arrays("bhnd", torch.bfloat16, device)[0]
    before, scale = x.clone(), values(D, dtype=torch.bfloat16, device=device)
    freqs = table("bhnd", torch.float32, device)
    y = function("rms_rope", True, split_half, True)(x, freqs, torch.nn.Parameter(scale))
    assert y is x
    normed = normalised(before, scale.cpu()).bfloat16()
    check(y, multiplied(normed, freqs.cpu(), split_half), share=0.997)


@in_places
@pytest.mark.parametrize("rot_dim", [0, D // 2])
def test_part_of_a_head(rot_dim, in_place, device):
    xs = arrays("bhnd", torch.bfloat16, device, (H, K))
    before, scale = [x.clone() for x in xs], values(D, dtype=torch.bfloat16, device=device)
    freqs = table("bhnd", torch.float32, device, (rot_dim or D) // 2)
    call = function("rms_rope", False, True, in_place)
    results = call(*xs, freqs, scale, None, 1e-6, rot_dim)
    for y, old in zip(results, before, strict=True):
        normed = normalised(old, scale.cpu()).bfloat16()
        check(y, multiplied(normed, freqs.cpu(), True), share=0.997)
        if rot_dim:  # what is not rotated is normalised
            assert share_of_equal(y[..., rot_dim:].cpu(), normed[..., rot_dim:]) > 0.997
    with pytest.raises(ValueError, match="rot_dim must be 0 or"):
        call(*xs, freqs, scale, None, 1e-6, 6)


def test_in_place_is_for_inference(device):
    freqs = table("bhnd", torch.float32, device)
    for one in (True, False):
        xs = arrays("bhnd", torch.float32, device)[: 1 if one else 2]
        xs[-1].requires_grad_()
        before = [x.detach().clone() for x in xs]
        with pytest.raises(RuntimeError, match="in-place functions are inference-only"):
            function("apply_rope", one, False, True)(*xs, freqs)
        assert all(map(torch.equal, xs, before))
    x = arrays("bhnd", torch.float32, device)[0]
    with pytest.raises(ValueError, match="share"):
        comfy_kitchen.apply_rope_(x, x, freqs)


@pairings
def test_new_tensors_have_gradients(split_half, device):
    x = values(1, 1, 3, 4, device=device).requires_grad_()
    freqs = matrices(3, 2, torch.float64, device)[None, None]
    call = function("apply_rope", True, split_half, False)
    assert torch.autograd.gradcheck(lambda x: call(x, freqs), x)
