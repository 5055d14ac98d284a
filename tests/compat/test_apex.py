"""rope_cupy.compat.apex, over the matrix of apex's own tests in small."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    check,
    double,
    eager,
    elementwise,
    share_of_equal,
    transposed,
    values,
)

from rope_cupy.compat import apex

B, S, H, D = 2, 9, 3, 32
pytestmark = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
widths = pytest.mark.parametrize("width", [D, D // 2])
outputs = pytest.mark.parametrize("transpose_output", [False, True])


def angles(rows, width, device):
    """Angles (rows, 1, 1, width) in float32, of which each element has its own."""
    frequencies = 50.0 ** -(torch.arange(width).double() / width)
    product = torch.outer(torch.arange(rows).double(), frequencies)
    return product.float()[:, None, None].to(device)


def agree(y, x, cos, sin, dtype, of=elementwise):
    """Every operation is rounded to x's dtype, cosines and sines too."""
    cos, sin = cos.to(dtype).cpu(), sin.to(dtype).cpu()
    check(y, of(x, cos, sin), share=0.6)
    if of is elementwise:
        least = 0.999 if dtype != torch.float32 else 0.9
        assert share_of_equal(y.cpu(), eager(x.cpu(), cos, sin)) > least


@dtypes
@widths
@outputs
@pytest.mark.parametrize("transpose", [None, (0, 1), (2, 3)])
@pytest.mark.parametrize("cached", ["no", "float32", "own"])
def test_sequences_first(cached, transpose, transpose_output, width, dtype, device):
    x = values(S, B, H, D, dtype=dtype, device=device)
    if transpose:
        x = x.transpose(*transpose).contiguous().transpose(*transpose)
    freqs = angles(S, width, device)
    cos, sin = freqs.cos(), freqs.sin()
    if cached == "no":
        tables, names = (freqs,), ("forward", "backward")
    else:
        table_dtype = torch.float32 if cached == "float32" else dtype
        tables = cos.to(table_dtype), sin.to(table_dtype)
        names = "forward_cached", "backward_cached"
    for name, of in zip(names, (elementwise, transposed), strict=True):
        y = getattr(apex, name)(x, *tables, transpose_output)
        dense = y.transpose(0, 1) if transpose_output else y
        assert y.shape == x.shape and dense.is_contiguous()
        agree(y, x, cos, sin, dtype, of)


@dtypes
@widths
def test_packed_sequences(width, dtype, device):
    lengths = [4, 1, 9]
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32, device=device)
    x = values(14, H, D, dtype=dtype, device=device).transpose(1, 2).contiguous().transpose(1, 2)
    freqs = angles(12, width, device)
    rows = torch.cat([torch.arange(n) for n in lengths]).to(device)
    cos, sin = freqs.cos()[rows][:, 0], freqs.sin()[rows][:, 0]
    for name, of in (("forward_thd", elementwise), ("backward_thd", transposed)):
        y = getattr(apex, name)(x, cu_seqlens, freqs)
        assert y.is_contiguous()
        agree(y, x, cos, sin, dtype, of)


@dtypes
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_images(contiguous, table_dtype, dtype, device):
    height, width, half = 4, 5, D // 2
    x = values(B, height, width, H, D, dtype=dtype, device=device)
    if not contiguous:
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    tables = []
    for rows in (height + 2, width + 1):
        freqs = angles(rows, half, device).transpose(0, 1)
        tables += [part.to(table_dtype or dtype) for part in (freqs.cos(), freqs.sin())]
    cos_h, sin_h, cos_w, sin_w = tables
    of_rows = [part[0, :height, 0][None, :, None, None] for part in (cos_h, sin_h)]
    of_columns = [part[0, :width, 0][None, None, :, None] for part in (cos_w, sin_w)]
    for name, of in (("forward_2d", elementwise), ("backward_2d", transposed)):
        before = x.clone()
        y = getattr(apex, name)(x, *tables)
        assert torch.equal(x, before)
        assert y.shape == (B, height * width, H, D) and y.is_contiguous()
        y = y.unflatten(1, (height, width))
        agree(y[..., :half], x[..., :half], *of_rows, dtype, of)
        agree(y[..., half:], x[..., half:], *of_columns, dtype, of)


@dtypes
@outputs
@pytest.mark.parametrize("cached", [True, False])
def test_the_functions_of_older_versions_have_gradients(cached, transpose_output, dtype, device):
    x = values(S, B, H, D, dtype=dtype, device=device).requires_grad_()
    freqs = angles(S, D // 2, device)
    cos, sin = freqs.cos(), freqs.sin()
    if cached:
        y = apex.fused_apply_rotary_pos_emb_cached(x, cos, sin, transpose_output)
    else:
        y = apex.fused_apply_rotary_pos_emb(x, freqs, transpose_output_memory=transpose_output)
    dy = values(S, B, H, D, dtype=dtype, device=device, seed=1)
    y.backward(dy)
    assert y.transpose(0, 1).is_contiguous() == transpose_output
    agree(y, x, cos, sin, dtype)
    agree(x.grad, dy, cos, sin, dtype, transposed)


@dtypes
def test_older_functions_of_packed_sequences_and_images_have_gradients(dtype, device):
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32, device=device)
    freqs = angles(12, D, device)
    rows = torch.cat([torch.arange(n) for n in (4, 1, 9)]).to(device)
    x = values(14, H, D, dtype=dtype, device=device).requires_grad_()
    dy = values(14, H, D, dtype=dtype, device=device, seed=1)
    y = apex.fused_apply_rotary_pos_emb_thd(x, cu_seqlens, freqs)
    y.backward(dy)
    of_token = freqs.cos()[rows][:, 0], freqs.sin()[rows][:, 0]
    agree(y, x, *of_token, dtype)
    agree(x.grad, dy, *of_token, dtype, transposed)

    height, width, half = 4, 5, D // 2
    image = values(B, height * width, H, D, dtype=dtype, device=device).requires_grad_()
    tables = []
    for count in (height + 2, width + 1):
        freqs = angles(count, half, device).transpose(0, 1)
        tables += [freqs.cos().to(dtype), freqs.sin().to(dtype)]
    of_rows = [part[0, :height, 0][None, :, None, None] for part in tables[:2]]
    of_columns = [part[0, :width, 0][None, None, :, None] for part in tables[2:]]
    y = apex.fused_apply_rotary_pos_emb_2d(image, height, width, *tables)
    dy = values(*y.shape, dtype=dtype, device=device, seed=1)
    y.backward(dy)
    for result, given, of in ((y, image, elementwise), (image.grad, dy, transposed)):
        result, given = (part.unflatten(1, (height, width)) for part in (result, given))
        agree(result[..., :half], given[..., :half], *of_rows, dtype, of)
        agree(result[..., half:], given[..., half:], *of_columns, dtype, of)


def test_no_gradient_is_recorded(device):
    x = values(S, B, H, D, dtype=torch.float32, device=device).requires_grad_()
    y = apex.forward(x, angles(S, D, device), False)
    assert not y.requires_grad
    check(y, elementwise(x, *(double(f(angles(S, D, device))) for f in (torch.cos, torch.sin))))
