"""rope_cupy.torch.RotaryEmbedding: its table survives what is done to modules."""

import copy
import pickle

import numpy as np
import pytest
import torch
from reference import rotate
from torch._subclasses.fake_tensor import FakeTensorMode

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


def garbage(*shape):
    return torch.full(shape, float("nan"))


def filled_by_assignment(module):
    """As a loader does that assigns buffers of a module that was made on "meta"."""
    module = made_on("meta")
    for name, buffer in list(module._buffers.items()):
        module._buffers[name] = garbage(*buffer.shape)
    return module


def filled_by_attributes(module):
    module = make(device="meta")
    for name, buffer in list(module.named_buffers()):
        setattr(module, name, garbage(*buffer.shape))
    return module


def loaded_by_assignment(module):
    module = torch.nn.Sequential(made_on("meta")).to_empty(device="cpu")
    module.load_state_dict({}, assign=True)
    return module[0]


def first_called_in_inference_mode(module):
    with torch.inference_mode():
        module(torch.randn(1, 2, 4, 64), torch.randn(1, 2, 2, 64))
    return module


def first_called_on_fake_tensors(module):
    with FakeTensorMode():
        q_out, _ = module(torch.empty(1, 2, 4, 64), torch.empty(1, 2, 2, 64))
    assert type(q_out).__name__ == "FakeTensor"
    return module


FILLED = {
    "buffers assigned": filled_by_assignment,
    "attributes assigned": filled_by_attributes,
    "load_state_dict with assign": loaded_by_assignment,
    "memory of to_empty": lambda module: (
        made_on("meta")
        .to_empty(device="cpu")
        ._apply(lambda x: x.fill_(float("nan")) if x.is_floating_point() else x)
    ),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy of a called one": lambda module: copy.deepcopy(
        first_called_in_inference_mode(module)
    ),
    "inference mode": first_called_in_inference_mode,
    "fake tensors": first_called_on_fake_tensors,
}


@pytest.mark.parametrize("fill", FILLED)
def test_what_memory_holds_never_becomes_its_table(fill):
    module = FILLED[fill](make())
    q, k = torch.randn(1, 9, 4, 64, requires_grad=True), torch.randn(1, 9, 2, 64)
    for mine, wanted in zip(module(q, k), make()(q, k), strict=True):
        assert torch.equal(mine, wanted)
    module(q, k)[0].sum().backward()
    assert_table(module)


def test_a_model_of_transformers_that_is_loaded_from_meta_rotates_as_it_did(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.rotary = make()
            self.weight = torch.nn.Parameter(torch.ones(64))
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, q, k):
            return self.rotary(q * self.weight, k)

    q, k = torch.randn(1, 9, 4, 64), torch.randn(1, 9, 2, 64)
    model = Model(transformers.PretrainedConfig())
    model.save_pretrained(tmp_path)
    for loaded in (
        Model.from_pretrained(tmp_path),
        Model.from_pretrained(tmp_path, dtype="bfloat16"),
    ):
        assert_table(loaded.rotary)
        for mine, wanted in zip(loaded.rotary(q, k), model(q, k), strict=True):
            assert torch.equal(mine, wanted)


def test_its_table_is_that_of_what_it_is_now():
    module, q = make(), torch.randn(1, 9, 4, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for base in (10000.0, 500.0):
        module.base = base
        assert_table(module, base=base)
        for call in (module, compiled):
            assert torch.equal(call(q, q)[0], make(base=base)(q, q)[0])


def test_its_table_is_in_no_pickle():
    module = make(max_position=4096)
    module(torch.randn(1, 9, 4, 64), torch.randn(1, 9, 2, 64))
    assert module.cos.numel() * 4 > 100_000 and len(pickle.dumps(module)) < 10_000


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported_before_its_first_call(strict):
    q, k = torch.randn(1, 9, 4, 64), torch.randn(1, 9, 2, 64)
    tokens = torch.export.Dim("tokens", min=2, max=32)
    shapes = {"q": {1: tokens}, "k": {1: tokens}, "positions": None}
    model = torch.export.export(make(), (q, k, None), dynamic_shapes=shapes, strict=strict).module()
    for length in (9, 5):
        mine, wanted = (each(q[:, :length], k[:, :length], None) for each in (model, make()))
        assert all(map(torch.equal, mine, wanted))


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
