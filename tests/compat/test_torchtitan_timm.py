"""rope_cupy.compat.torchtitan and rope_cupy.compat.timm against their definitions."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    both_elements,
    check,
    eager,
    elementwise,
    rotate,
    share_of_equal,
    table,
    transposed,
    values,
)

from rope_cupy.compat import timm, torchtitan

B, S, H, K, D = 2, 9, 4, 2, 32
pytestmark = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("form", ["complex", "cos and sin"])
@pytest.mark.parametrize("batches", ["1", "B", "whole cache"])
@pytest.mark.parametrize("by_class", [True, False])
def test_torchtitan_takes_both_caches(by_class, batches, form, dtype, device):
    q, k = (values(B, S, n, D, dtype=dtype, device=device).requires_grad_() for n in (H, K))
    cos, sin = table(B * S, D // 2, dtype=torch.float32, device=device)
    cache = torch.complex(cos, sin) if form == "complex" else torch.cat([cos, cos, sin, sin], -1)
    tables = cos[:S, None], sin[:S, None]
    if batches == "B":
        cache = cache.unflatten(0, (B, S))[:, :, None]
        tables = [part.unflatten(0, (B, S))[:, :, None] for part in (cos, sin)]
    elif batches == "1":
        cache = cache[None, :S, None]
    function = torchtitan.apply_rotary_emb
    if by_class:
        owner = torchtitan.ComplexRoPE if form == "complex" else torchtitan.CosSinRoPE
        function = owner.apply_rotary_emb
    results = function(q, k, cache)
    gradients = [values(*y.shape, dtype=dtype, device=device, seed=4) for y in results]
    torch.autograd.backward(results, gradients)
    for y, x, gradient in zip(results, (q, k), gradients, strict=True):
        how = {"interleaved": form == "complex"}
        check(y, rotate(x, *tables, **how))
        check(x.grad, rotate(gradient, *tables, conjugate=True, **how))


def embeddings(rows, width, dtype, device):
    """Sines and cosines of full width, of which each element has its own."""
    cos, sin = table(rows, width, dtype=dtype, device=device)
    return sin, cos


@pytest.mark.parametrize("half", [False, True])
@dtypes
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "table_shape"),
    [
        ((B, H, S, D), (S,)),
        ((B, H, S, D), (1, 1, S)),
        ((B, H, S, D), (B, 1, S)),
        ((B, H, S, D), (H, S)),  # learned frequencies of each head
        ((B, H, S, D), (B, H, S)),
        ((B, S, D), (S,)),
        ((S, D), (S,)),
    ],
)
def test_timm_reads_sines_before_cosines(table_shape, shape, table_dtype, dtype, half, device):
    count = int(torch.tensor(table_shape).prod())
    sin, cos = (part.reshape(*table_shape, D) for part in embeddings(count, D, table_dtype, device))
    x = values(*shape, dtype=dtype, device=device).requires_grad_()
    before = x.detach().clone()
    cat = timm.apply_rot_embed_cat(x, torch.cat([sin, cos], -1), half)
    apart = timm.apply_rot_embed(x, sin, cos, half)
    both = timm.apply_rot_embed_list([x, x * 2], sin, cos, half)
    (alone,) = timm.apply_rot_embed_list(x, sin, cos, half)
    exact = elementwise(before, cos, sin, interleaved=not half)
    expected = eager(before.cpu(), cos.cpu(), sin.cpu(), interleaved=not half)
    # Swapped, as `cos | sin` would be read, nothing would be right.
    assert float((exact - elementwise(before, sin, cos, interleaved=not half)).abs().max()) > 0.1
    for y in (cat, apart, alone, both[0]):
        check(y, exact, share=0.6)
        assert share_of_equal(y.detach().cpu(), expected) > (
            0.9 if torch.float32 == dtype else 0.999
        )
    check(both[1], 2 * exact, share=0.6)
    gradient = values(*shape, dtype=dtype, device=device, seed=4)
    cat.backward(gradient)
    check(x.grad, transposed(gradient, cos, sin, interleaved=not half), share=0.6)


def test_timm_rotates_a_view_behind_prefix_tokens(device):
    x = values(B, H, S + 1, D, dtype=torch.bfloat16, device=device)
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    emb = torch.cat([both_elements(part, True) for part in (sin, cos)], -1)
    y = timm.apply_rot_embed_cat(x[:, :, 1:], emb)
    check(y, rotate(x[:, :, 1:], cos, sin, interleaved=True))


def test_timm_refuses_more_axes_and_other_lengths(device):
    sin, cos = embeddings(S, D, torch.float32, device)
    x = values(1, 1, 1, S, D, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="x must have at most 4 axes"):
        timm.apply_rot_embed(x, sin, cos)
    with pytest.raises(ValueError, match="the table must broadcast"):
        timm.apply_rot_embed(x[0], sin[1:], cos[1:])
