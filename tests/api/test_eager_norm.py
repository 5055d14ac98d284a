"""A norm and the rotation behind it have the bits of the modules of models, with rounding="eager".

What remains is the order in which PyTorch adds squares up, in float32. The numbers here are of few
bits, so that every order gives the same sum and each result is the module's bit by bit; of random
numbers all but one in 10,000 are, and those are the next number of their format.
"""

import importlib

import pytest
import torch

from rope_cupy import RotaryTable, apply_norm_rotary, apply_qk_norm_rotary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCH, TOKENS, HEADS, EPS = 2, 40, 4, 1e-5
BEFORE = "before_weight"
# The class of a model of transformers, round_norm, and what is added to weights.
MODELS = {
    "llama": ("LlamaRMSNorm", BEFORE, 0.0),
    "qwen3": ("Qwen3RMSNorm", BEFORE, 0.0),
    "qwen3_moe": ("Qwen3MoeRMSNorm", BEFORE, 0.0),
    "glm4_moe": ("Glm4MoeRMSNorm", BEFORE, 0.0),
    "minimax_m2": ("MiniMaxM2RMSNorm", BEFORE, 0.0),
    "olmo2": ("Olmo2RMSNorm", True, 0.0),
    "gemma3": ("Gemma3RMSNorm", True, 1.0),
}
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_each_width = pytest.mark.parametrize("norm", ["head", "heads"])


def modeling(model):
    name = f"transformers.models.{model}.modeling_{model}"
    pytest.importorskip("transformers", reason="transformers is not installed")
    return importlib.import_module(name)


def of_few_bits(shape, dtype, device):
    """Multiples of a quarter up to 2, whose squares add up exactly in float32 in any order."""
    return (torch.randint(-8, 9, shape, device=device) / 4).to(dtype)


def filled(module, offset, dtype, device):
    """The module with random weights of a dtype."""
    module = module.to(device, dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape) * 0.3 + 1 - offset)
    return module


def table_of(head_dim, dtype, device):
    angles = torch.rand(1, TOKENS, head_dim // 2, device=device) * 6
    return [torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin())]


def normalised(module, x, norm):
    return module(x) if norm == "head" else module(x.flatten(2)).view(x.shape)


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(11)
    return request.param


@pytest.mark.parametrize("model", MODELS)
@of_each_dtype
@of_each_width
@torch.no_grad()
def test_q_and_k_have_the_bits_of_transformers_norm_and_rotation(norm, dtype, model, device):
    theirs, (name, round_norm, offset) = modeling(model), MODELS[model]
    q, k = (of_few_bits((BATCH, TOKENS, h, 128), dtype, device) for h in (HEADS, 2))
    sizes = [128 if norm == "head" else 128 * x.shape[2] for x in (q, k)]
    modules = [
        filled(getattr(theirs, name)(size, eps=EPS), offset, dtype, device) for size in sizes
    ]
    cos, sin = table_of(128, dtype, device)
    normal = [normalised(module, x, norm) for module, x in zip(modules, (q, k), strict=True)]
    wanted = theirs.apply_rotary_pos_emb(*normal, cos, sin, unsqueeze_dim=2)
    options = {"norm": norm, "eps": EPS, "weight_offset": offset, "rounding": "eager"}
    weights, table = [m.weight for m in modules], RotaryTable.from_full_width(cos, sin)
    results = apply_qk_norm_rotary(q, k, *weights, table, round_norm=round_norm, **options)
    for ours, each in zip(results, wanted, strict=True):
        assert ours.dtype == each.dtype
        assert torch.equal(ours, each)
    other = True if round_norm == BEFORE else BEFORE
    if dtype != torch.float32:  # where a module has one rounding more it shows
        results = apply_qk_norm_rotary(q, k, *weights, table, round_norm=other, **options)
        assert not torch.equal(results[0], wanted[0])


@of_each_dtype
@torch.no_grad()
def test_diffusers_rms_norm_with_weights_of_its_dtype(dtype, device):
    normalization = pytest.importorskip("diffusers.models.normalization")
    embeddings = importlib.import_module("diffusers.models.embeddings")
    module = filled(normalization.RMSNorm(64, eps=EPS), 0.0, dtype, device)
    x = of_few_bits((BATCH, TOKENS, HEADS, 64), dtype, device)
    angles = torch.rand(TOKENS, 32, device=device) * 6
    freqs = [part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin())]
    wanted = embeddings.apply_rotary_emb(module(x), freqs, sequence_dim=1)
    table = RotaryTable(angles.cos(), angles.sin())
    ours = apply_norm_rotary(
        *(x, module.weight, table),
        **{"eps": EPS, "round_norm": BEFORE, "interleaved": True, "rounding": "eager"},
    )
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@of_each_dtype
@torch.no_grad()
def test_random_numbers_have_the_bits_of_the_module_but_for_the_order_of_a_sum(
    dtype, head_dim, device
):
    if dtype == torch.float32:
        pytest.skip("of float32 the order decides the last bit of every eighth element")
    theirs = modeling("llama")
    module = filled(theirs.LlamaRMSNorm(head_dim, eps=EPS), 0.0, dtype, device)
    x = torch.randn(BATCH, 400, HEADS, head_dim, device=device).to(dtype)
    angles = torch.rand(1, 400, head_dim // 2, device=device) * 6
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    normal = module(x)
    wanted, _ = theirs.apply_rotary_pos_emb(normal, normal, cos, sin, unsqueeze_dim=2)
    ours = apply_norm_rotary(
        *(x, module.weight, RotaryTable.from_full_width(cos, sin)),
        **{"eps": EPS, "round_norm": BEFORE, "rounding": "eager"},
    )
    unequal = ours != wanted
    assert unequal.float().mean() <= 1e-4
    off = (ours.double() - wanted.double()).abs()[unequal]
    # A rounding of a normalised number the other way reaches both elements of its pair.
    last_place = torch.finfo(dtype).eps * 8
    assert (off <= last_place * wanted.double().abs().max()).all()


@pytest.mark.parametrize("turns", ["quarters", "any"])
@of_each_dtype
@torch.no_grad()
def test_hunyuans_norm_behind_the_rotation(dtype, turns, device):
    """Turned by quarters, numbers have few bits still, and every element has the module's bits."""
    theirs = modeling("hunyuan_v1_dense")
    module = filled(theirs.HunYuanDenseV1RMSNorm(128, eps=EPS), 0.0, dtype, device)
    q, k = (of_few_bits((BATCH, TOKENS, h, 128), dtype, device) for h in (HEADS, 2))
    cos, sin = table_of(128, dtype, device)
    if turns == "quarters":
        quarters = torch.randint(4, (1, TOKENS, 64), device=device)
        cos, sin = (
            torch.tensor(each, device=device, dtype=dtype)[quarters].repeat(1, 1, 2)
            for each in ([1, 0, -1, 0], [0, 1, 0, -1])
        )
    wanted = [module(each) for each in theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)]
    table = RotaryTable.from_full_width(cos, sin)
    options = {"eps": EPS, "round_norm": BEFORE, "rounding": "eager"}
    weights = module.weight, module.weight
    results = apply_qk_norm_rotary(q, k, *weights, table, norm_after=True, **options)
    for ours, each in zip(results, wanted, strict=True):
        assert ours.dtype == each.dtype
        if turns == "quarters":
            assert torch.equal(ours, each)
        elif dtype == torch.float32:  # of which the order decides the last bit
            torch.testing.assert_close(ours, each, rtol=1e-6, atol=1e-7)
        else:
            assert (ours != each).float().mean() <= 1e-3
            torch.testing.assert_close(ours, each, rtol=2 * torch.finfo(dtype).eps, atol=0)
    before = apply_qk_norm_rotary(q, k, *weights, table, **options)
    assert not torch.equal(before[0], wanted[0])


@pytest.mark.parametrize("mean", [0.0, 8.0])
@of_each_dtype
@torch.no_grad()
def test_a_layer_is_that_of_torch(dtype, mean, device):
    x = (torch.randn(BATCH, 400, HEADS, 96, device=device) + mean).to(dtype)
    weight, bias = torch.randn(2, 96, device=device).to(dtype)
    wanted = torch.nn.functional.layer_norm(x, (96,), weight, bias, EPS)
    options = {"norm": "layer", "eps": EPS, "bias": bias, "rounding": "eager"}
    ours = apply_norm_rotary(x, weight, None, **options)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=1e-6 * (1 + mean))
    if dtype != torch.float32:
        # The mean has an error in its last place, which is as much of these numbers as it is large.
        assert (ours != wanted).float().mean() <= 1e-3 * (1 + mean / 4)
