"""rope_cupy.torch.RotaryEmbedding: its table survives what is done to modules."""

import copy

import numpy as np
import pytest
import torch
from reference import rotate

from rope_cupy import apply_rotary_qk
from rope_cupy.torch import RotaryEmbedding

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def exact_table(head_dim=64, base=10000.0, positions=32):
    angles = np.outer(np.arange(positions), base ** -(np.arange(0, head_dim, 2) / head_dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def assert_table(module, device="cpu", **about):
    for name, part in zip(("cos", "sin"), exact_table(**about), strict=True):
        buffer = getattr(module, name)
        assert (buffer.dtype, buffer.device.type) == (torch.float32, device)
        assert np.array_equal(buffer.cpu().numpy(), part)


def make(**options):
    return RotaryEmbedding(64, **{"max_position": 32} | options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, 5, "array"])
@pytest.mark.parametrize("device", DEVICES)
def test_it_rotates_by_its_table(interleaved, positions, device):
    module = make(base=500.0, interleaved=interleaved, device=device)
    assert_table(module, device, base=500.0)
    q, k = torch.randn(2, 9, 4, 64, device=device), torch.randn(2, 9, 2, 64, device=device)
    rows = np.arange(9) + (positions if isinstance(positions, int) else 0)
    if positions == "array":
        rows = np.random.default_rng(1).integers(0, 32, 9)
        positions = torch.tensor(rows, device=device)
    cos, sin = (part[rows][None] for part in exact_table(base=500.0))
    for before, after in zip((q, k), module(q, k, positions), strict=True):
        exact = rotate(before.double().cpu().numpy(), cos, sin, interleaved=interleaved)
        np.testing.assert_allclose(after.cpu().numpy(), exact, rtol=1e-6, atol=1e-6)


def made_on(device):
    with torch.device(device):
        module = make()
    assert module.cos.device.type == module.sin.device.type == device
    return module


CHANGES = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "half and back": lambda module: module.half().float(),
    "deepcopy": lambda module: copy.deepcopy(module),
    "from meta": lambda module: make(device="meta").to_empty(device="cpu"),
    "to meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
    "made on meta": lambda module: made_on("meta").to_empty(device="cpu"),
    "in a model": lambda module: torch.nn.Sequential(module).to(torch.float16)[0],
}


@pytest.mark.parametrize("change", CHANGES)
def test_its_table_survives(change):
    module = CHANGES[change](make())
    assert_table(module)
    q, k = torch.randn(1, 9, 4, 64).half(), torch.randn(1, 9, 2, 64).half()
    for mine, wanted in zip(module(q, k), make()(q, k), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.gpu
def test_its_table_follows_it_to_a_gpu_and_back():
    module = make().half().cuda()
    assert_table(module, "cuda")
    assert_table(made_on("cuda"), "cuda")
    assert_table(module.cpu())


def test_its_table_is_in_no_state():
    module = make()
    assert not module.state_dict() and not list(module.parameters())
    assert [(name, buffer.numel()) for name, buffer in module.named_buffers()] == [("place", 0)]
    module.load_state_dict({})


def test_it_compiles_into_one_graph_with_gradients():
    module = make(layout="bhsd")
    q, k = (torch.randn(1, heads, 9, 64, requires_grad=True) for heads in (4, 2))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results, wanted = compiled(q, k), module(q, k)
    for mine, other in zip(results, wanted, strict=True):
        assert torch.equal(mine, other)
    gradients = [torch.autograd.grad(sum(y.sum() for y in ys), (q, k)) for ys in (results, wanted)]
    assert all(map(torch.equal, *gradients))


def test_it_says_what_it_is():
    expected = "RotaryEmbedding(64, base=10000.0, interleaved=False, max_position=32)"
    assert repr(make()) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 63}, ValueError, "rotary_dim must be positive and even"),
        ({"head_dim": 6.0}, TypeError, "head_dim must be an int"),
        ({"head_dim": 64, "base": -1}, ValueError, "base must be positive"),
        ({"head_dim": 64, "max_position": -1}, ValueError, "max_position must be 0 or more"),
        ({"head_dim": 64, "max_position": 1.5}, TypeError, "max_position must be an int"),
        ({"head_dim": 64, "interleaved": 1}, TypeError, "interleaved must be None, True or False"),
        ({"head_dim": 64, "layout": "bsdh"}, ValueError, "layout must name the axes"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RotaryEmbedding(**arguments)


def test_positions_past_its_table_are_refused():
    q, k = torch.randn(1, 33, 4, 64), torch.randn(1, 33, 2, 64)
    with pytest.raises(ValueError, match="table must hold the positions 0 to 32"):
        make()(q, k)
    with pytest.raises(ValueError, match="table must hold"):
        apply_rotary_qk(q, k, (make().cos, make().sin))
