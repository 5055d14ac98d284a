"""What is private to PyTorch may be missing in another version: every part of it is taken away."""

import pytest
import torch
from forgetting import forget
from reference import check, rotate, to_float64

from rope_cupy import RotaryTable, apply_rotary, private_torch
from rope_cupy.arrays import torch as of_torch

PARTS = [
    ("_C", "_len_torch_dispatch_stack"),
    ("autograd", "forward_ad", "_current_level"),
    ("_C", "_get_tracing_state"),
    ("_C", "_get_dispatch_mode"),
    ("_C", "_dispatch_keys"),
    ("_C", "_dynamo", "guards", "TensorGuards"),
    ("_C", "_increment_version"),
    ("_C", "_functorch", "is_gradtrackingtensor"),
    ("_C", "_functorch", "is_functorch_wrapped_tensor"),
    ("_C", "_autograd", "CreationMeta"),
    ("_C", "_dynamo", "eval_frame"),
    ("_C", "parse_schema"),
]


@pytest.fixture(params=[*PARTS, "none of them"], ids=lambda part: part[-1])
def taken(request, monkeypatch):
    """A PyTorch that lacks one private part, or all."""
    found, missing = private_torch.found, request.param

    def found_without(*path):
        return None if missing in ("none of them", path) else found(*path)

    monkeypatch.setattr(private_torch, "found", found_without)
    monkeypatch.setattr(of_torch, "_modes_or_tangents", private_torch.modes_and_tangents())
    counter = staticmethod(private_torch.version_counter())
    monkeypatch.setattr(of_torch.Torch, "mark_written", counter)
    forget()
    yield
    forget()


def test_every_part_is_found_in_this_pytorch():
    for path in PARTS:
        assert private_torch.found(*path) is not None, path
    tensors = torch.ones(2), torch.ones(3)
    assert private_torch.matcher(tensors)(*tensors)
    assert private_torch.version_counter() is torch._C._increment_version


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_without_a_private_part_of_pytorch_nothing_is_wrong(taken):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 6, 3, 8, generator=generator, dtype=torch.float64)
    angles = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    table = RotaryTable(angles.cos(), angles.sin())
    exact = rotate(to_float64(x), *map(to_float64, table._source.arrays))
    for _ in range(4):
        check(to_float64(apply_rotary(x, table)), exact, "float64")
        y, version = x.clone(), None
        version = y._version
        assert apply_rotary(y, table, out=y) is y and y._version > version
        check(to_float64(y), exact, "float64")
        with torch.inference_mode():
            check(to_float64(apply_rotary(x, table)), exact, "float64")
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(apply_rotary(leaf, table).sum(), leaf)
        assert torch.equal(grad, apply_rotary(torch.ones_like(x), table, conjugate=True))
        copy = leaf * 1
        apply_rotary(copy, table, out=copy)
        assert torch.equal(torch.autograd.grad(copy.sum(), leaf)[0], grad)
        numbers = torch.view_as_complex(torch.randn(1, 6, 3, 8, 2, dtype=torch.float64))
        with pytest.raises(ValueError, match="must hold its own values"):
            apply_rotary(numbers.conj().imag, table)
        with pytest.raises(TypeError, match="must be a strided tensor"):
            apply_rotary(torch.nested.nested_tensor([x, x]), table)
        with pytest.raises((TypeError, RuntimeError)):
            torch.func.vmap(lambda x: apply_rotary(x, table))(x[None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(ValueError, match="must not carry a forward-mode tangent"):
                apply_rotary(dual, table)
    compiled = torch.compile(lambda x: apply_rotary(x, table), backend="aot_eager", fullgraph=True)
    check(to_float64(compiled(x)), exact, "float64")
