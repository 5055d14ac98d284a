"""The peers' rotations by their definition, in float64 with PyTorch: nothing of the library.

`rotate` makes each pair (a, b) of a head (a cos - b sin, b cos + a sin); `elementwise` computes
``x * cos + partners(x) * sin``, where each element has numbers of its own; `eager` does it in the
dtypes that are given, operation by operation, as the peers' references do.
"""

from __future__ import annotations

import inspect

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def values(*shape, dtype=torch.float64, device="cpu", seed=0):
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)


def table(rows, pairs, *, dtype=torch.float64, device="cpu", base=100.0):
    """Cosines and sines (rows, pairs) of positions 0 .. rows - 1."""
    inv_freq = base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), inv_freq)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def double(x):
    return x.detach().double().cpu()


def partners(x, interleaved):
    """The other element of each element's pair, with its sign."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([-b, a], -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def both_elements(part, interleaved):
    return part.repeat_interleave(2, -1) if interleaved else torch.cat([part, part], -1)


def rotate(x, cos, sin, *, interleaved=False, conjugate=False, offset=0):
    """Rotate x (..., heads, d) by cos and sin that broadcast to (..., heads, pairs)."""
    cos, sin = (both_elements(double(part), interleaved) for part in (cos, sin))
    return elementwise(x, cos, -sin if conjugate else sin, interleaved=interleaved, offset=offset)


def elementwise(x, cos, sin, *, interleaved=False, offset=0):
    x, cos, sin = double(x), double(cos), double(sin)
    end = offset + cos.shape[-1]
    rotated = x[..., offset:end] * cos + partners(x[..., offset:end], interleaved) * sin
    return torch.cat([x[..., :offset], rotated, x[..., end:]], -1)


def transposed(x, cos, sin, *, interleaved=False):
    """The gradient of `elementwise`: its matrix's transpose."""
    x, cos, sin = double(x), double(cos), double(sin)
    width = cos.shape[-1]
    rotated = x[..., :width] * cos - partners(x[..., :width] * sin, interleaved)
    return torch.cat([rotated, x[..., width:]], -1)


def eager(x, cos, sin, *, interleaved=False):
    """``x * cos + rotated(x) * sin`` by PyTorch, in the dtypes of x and of the full-width table."""
    width = cos.shape[-1]
    part = x[..., :width]
    rotated = part * cos + partners(part, interleaved) * sin
    return torch.cat([rotated.to(x.dtype), x[..., width:]], -1)


def normalised(x, weight, eps=1e-6, offset=0.0):
    x = double(x)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (double(weight) + offset)


def check(y, exact, *, dtype=None, share=0.999):
    """y is the exact result rounded once to its dtype, but for few elements, which are near it."""
    dtype = dtype or y.dtype
    assert y.dtype == dtype
    assert tuple(y.shape) == tuple(exact.shape)
    y, size = double(y), float(exact.abs().max())
    unit = torch.finfo(dtype).eps / 2
    error = (y - exact).abs()
    assert torch.isfinite(error).all()
    assert float(error.max()) <= (4 * unit + 1e-6) * size
    within = error <= unit * exact.abs() + 4e-7 * size  # float32 arithmetic before the rounding
    assert float(within.double().mean()) >= share


def share_of_equal(y, other):
    return float((y == other).double().mean())


def signature(function):
    """The names, kinds and defaults of a function's parameters, as text."""
    parameters = inspect.signature(function).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(bare))
