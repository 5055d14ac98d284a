"""Rotations against implementations that no one here wrote, on the tables they make themselves."""

import numpy as np
import pytest
import torch
from reference import FORMATS, dtype_name, to_float64

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

TOKENS = 37
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


def heads(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(getattr(torch, dtype))


def assert_agree(y, peer, x):
    """As near as two roundings of the dtype allow: the peer rounds every product."""
    format = FORMATS[dtype_name(peer)]
    y, peer, x = to_float64(y), to_float64(peer), to_float64(x)
    assert y.shape == peer.shape
    assert np.linalg.norm(y - peer) <= format.tolerance * np.linalg.norm(peer)
    assert np.abs(y - peer).max() <= 2.0 ** (1 - format.mantissa_bits) * np.abs(x).max()
    assert np.linalg.norm(y - x) > 0.1 * np.linalg.norm(x)


@pytest.fixture(scope="module")
def llama():
    """Llama's own rotary embedding for heads of 64 elements, and the function that applies it."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=8 * 64, num_attention_heads=8, num_key_value_heads=2, vocab_size=8
    )
    return modeling.LlamaRotaryEmbedding(config), modeling.apply_rotary_pos_emb


@pytest.mark.parametrize("positions", ["from zero", "from anywhere", "by batch"])
def test_llama_rotates_its_heads_the_same_way(dtype, llama, positions):
    rotary_embedding, apply_rotary_pos_emb = llama
    q = heads(2, 8, TOKENS, 64, dtype=dtype, seed=1)
    k = heads(2, 2, TOKENS, 64, dtype=dtype, seed=2)
    position_ids = {
        "from zero": torch.arange(TOKENS)[None],
        "from anywhere": torch.arange(TOKENS)[None] + 1000,
        "by batch": torch.stack([torch.arange(TOKENS), torch.arange(TOKENS).flip(0) * 7]),
    }[positions]
    cos, sin = rotary_embedding(q, position_ids)
    peer = apply_rotary_pos_emb(q, k, cos, sin)
    table = RotaryTable.from_full_width(cos, sin)
    for y, expected, x in zip(
        apply_rotary_qk(q, k, table, layout="bhsd"), peer, (q, k), strict=True
    ):
        assert_agree(y, expected, x)


def test_llama_agrees_on_the_table_of_its_inverse_frequencies(llama):
    rotary_embedding, apply_rotary_pos_emb = llama
    q = heads(1, 8, TOKENS, 64, dtype="float32", seed=3)
    k = heads(1, 2, TOKENS, 64, dtype="float32", seed=4)
    peer = apply_rotary_pos_emb(q, k, *rotary_embedding(q, torch.arange(TOKENS)[None]))
    table = RotaryTable.from_inverse_frequencies(rotary_embedding.inv_freq, TOKENS + 5, like=q)
    results = apply_rotary_qk(q, k, table, layout="bhsd")
    for y, expected in zip(results, peer, strict=True):
        # Llama's angles are float32 themselves: 36 rad is known to 2 millionths.
        assert torch.allclose(y, expected, rtol=0, atol=2e-5)


def test_gptj_rotates_part_of_its_heads_the_same_way(dtype):
    modeling = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = heads(2, TOKENS, 4, 96, dtype=dtype, seed=5)
    sin, cos = modeling.create_sinusoidal_positions(TOKENS, 32).to(x.dtype).chunk(2, dim=-1)
    rotated = modeling.apply_rotary_pos_emb(x[..., :32], sin[None], cos[None])
    y = apply_rotary(x, (cos, sin), interleaved=True)
    assert_agree(y[..., :32], rotated, x[..., :32])
    assert torch.equal(y[..., 32:], x[..., 32:])


@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_multiplication_rotates_interleaved_pairs_the_same_way(dtype, complex_dtype):
    x = heads(2, TOKENS, 3, 128, dtype=dtype, seed=6)
    inv_freq = 10000.0 ** -torch.linspace(0, 1, 64, dtype=torch.float64)
    angles = torch.outer(torch.arange(TOKENS).double(), inv_freq)
    freqs_cis = torch.polar(torch.ones_like(angles), angles).to(complex_dtype)
    product = torch.view_as_complex(x.reshape(2, TOKENS, 3, 64, 2)) * freqs_cis[:, None]
    peer = torch.view_as_real(product).flatten(3).to(x.dtype)
    assert_agree(apply_rotary(x, RotaryTable.from_complex(freqs_cis), interleaved=True), peer, x)
    back = apply_rotary(peer, RotaryTable.from_complex(freqs_cis), interleaved=True, conjugate=True)
    assert torch.allclose(back, x, rtol=0, atol=2e-6)
