"""Functions of rope_cupy.compat in one graph of torch.compile, as in a plain call."""

import pytest
import torch
from compat_reference import table, values

from rope_cupy.compat import (
    apex,
    comfy_kitchen,
    flash_attn,
    flashinfer,
    liger,
    quack,
    sglang,
    timm,
    torchtitan,
    transformer_engine,
    vllm,
)

# PyTorch instantiates an autograd.Function itself, when it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
T, H, D = 6, 4, 16
COS, SIN = table(T, D // 2, dtype=torch.float32)
WIDE = [torch.cat([part, part], -1) for part in (COS, SIN)]
CACHE, FREQS = torch.cat([COS, SIN], -1), values(T, 1, 1, D, dtype=torch.float32)
POSITIONS, WEIGHT = torch.arange(T), torch.nn.Parameter(torch.ones(D))
MATRICES = torch.stack([COS, -SIN, SIN, COS], -1).unflatten(-1, (2, 2))
AXES = [part.expand(3, -1, -1) for part in (COS, SIN)]


def in_place(function):
    """A function of q and k that returns what has been written to them."""

    def call(x):
        k = x * 2
        function(x, k)
        return x + k

    return call


CASES = {  # each with the shape of its argument, and whether a gradient is recorded
    "flash_attn": (lambda x: flash_attn.apply_rotary_emb(x, COS, SIN), (1, T, H, D), True),
    "flash_attn leaf": (
        lambda x: flash_attn.apply_rotary_emb(x, COS, SIN, inplace=True) * 1,
        (1, T, H, D),
        True,
    ),
    "flash_attn qkv": (
        lambda x: flash_attn.apply_rotary_emb_qkv_(x * 1, COS, SIN) * 1,
        (1, T, 3, H, D),
        True,
    ),
    "quack qkv leaf": (
        lambda x: quack.apply_rotary_emb_qkv_(x, COS, SIN) * 1,
        (1, T, 3, H, D),
        True,
    ),
    "flashinfer": (
        lambda x: flashinfer.apply_rope_with_cos_sin_cache(POSITIONS, x, x * 2, D, CACHE)[1],
        (T, H * D),
        False,
    ),
    "flashinfer theta": (
        in_place(lambda q, k: flashinfer.apply_rope_pos_ids_inplace(q, k, POSITIONS)),
        (T, H, D),
        False,
    ),
    "vllm": (
        in_place(lambda q, k: vllm.rotary_embedding(POSITIONS, q, k, D, CACHE, True)),
        (T, H * D),
        False,
    ),
    "vllm mrope": (
        lambda x: vllm.triton_mrope(x, x * 2, *AXES, [2, 3, 3], D, D, False, True)[1],
        (T, H * D),
        False,
    ),
    "sglang": (
        in_place(
            lambda q, k: sglang.fused_inplace_qknorm_rope(
                q, k, WEIGHT, WEIGHT, CACHE, POSITIONS, is_neox=True
            )
        ),
        (T, H, D),
        False,
    ),
    "liger": (lambda x: liger.liger_rotary_pos_emb(x, x * 2, *WIDE)[1], (1, H, T, D), True),
    "transformer_engine": (
        lambda x: transformer_engine.apply_rotary_pos_emb(x, FREQS, fused=True),
        (T, 1, H, D),
        True,
    ),
    "transformer_engine qkv": (
        lambda x: transformer_engine.apply_fused_qkv_rotary_pos_emb(x, FREQS, FREQS, [4 * D, D, D])[
            0
        ],
        (T, 2, H, 6 * D),
        True,
    ),
    "apex": (lambda x: apex.forward(x, FREQS, True), (T, 2, H, D), False),
    "comfy_kitchen": (
        lambda x: comfy_kitchen.rms_rope(x, x * 2, MATRICES[None, None], WEIGHT)[1],
        (1, H, T, D),
        True,
    ),
    "torchtitan": (
        lambda x: torchtitan.apply_rotary_emb(x, x * 2, torch.complex(COS, SIN))[1],
        (1, T, H, D),
        True,
    ),
    "timm": (lambda x: timm.apply_rot_embed(x, *WIDE), (1, H, T, D), True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_call_gives_what_a_plain_one_gives(name):
    function, shape, differentiable = CASES[name]
    plain, compiled = (values(*shape, dtype=torch.float32) for _ in range(2))
    if differentiable:
        plain.requires_grad_()
        compiled.requires_grad_()
    expected = function(plain)
    torch._dynamo.reset()
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(result, expected)
    assert torch.equal(plain, compiled)  # what is written in place
    if differentiable:
        gradient = values(*result.shape, dtype=torch.float32, seed=1)
        result.backward(gradient.clone())
        expected.backward(gradient.clone())
        assert torch.equal(plain.grad, compiled.grad)
