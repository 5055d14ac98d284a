"""Whole transformers of diffusers, small and random, turned by rope_cupy instead of their own code.

Each keeps its weights and inputs. What it rotates q and k with is replaced by `apply_rotary` and a
table of `rope_cupy.diffusion`: both turn by the same angles in float32, so outputs differ by
roundings alone, and by far more where nothing turns.
"""

import numpy as np
import pytest
import torch

from rope_cupy import apply_rotary, diffusion

# Of the largest output: a rotation rounds to float32, by 2**-24, two or three times, and one or two
# blocks carry this on. Where nothing turns, outputs differ by more than 2**-7.
TOLERANCE = 2.0**-20


def transformer(name):
    return pytest.importorskip(f"diffusers.models.transformers.{name}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(31)
    with torch.no_grad():
        yield


def assert_same_but_for_rounding(found, expected, unturned):
    largest = expected.abs().max()
    assert torch.isfinite(expected).all() and largest > 0
    assert (unturned - expected).abs().max() > 2.0**-7 * largest
    assert (found - expected).abs().max() <= TOLERANCE * largest


def grid(*sizes):
    return torch.from_numpy(np.indices(sizes).reshape(len(sizes), -1).T.copy())


def test_flux_gives_the_same_output(monkeypatch):
    module = transformer("transformer_flux")
    model = module.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    text_ids, image_ids = torch.zeros(7, 3), grid(1, 5, 6).float()
    inputs = {
        "hidden_states": torch.randn(2, 30, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": image_ids,
        "txt_ids": text_ids,
    }
    expected = model(**inputs).sample

    ids = torch.cat([text_ids, image_ids])
    table, calls = diffusion.flux(ids, dims=(4, 4, 8), like=ids), []

    def turn(x, freqs, sequence_dim):
        calls.append(tuple(x.shape))
        return apply_rotary(x, table, interleaved=True)

    monkeypatch.setattr(module, "apply_rotary_emb", turn)
    found = model(**inputs).sample
    assert calls == [(2, 37, 2, 16)] * 4  # q and k of one double and of one single block
    monkeypatch.setattr(module, "apply_rotary_emb", lambda x, freqs, sequence_dim: x)
    assert_same_but_for_rounding(found, expected, model(**inputs).sample)


@pytest.mark.parametrize("compute_dtype", ["float64", "float32"])
def test_qwen_image_gives_the_same_output(monkeypatch, compute_dtype):
    module = transformer("transformer_qwenimage")
    model = module.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 30, 16),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_shapes": [[(1, 5, 6)]] * 2,
    }
    expected = model(**inputs).sample

    table = diffusion.qwen_image(
        (1, 5, 6), 7, dims=(4, 6, 6), like=expected, compute_dtype=compute_dtype
    )
    calls = []

    def turn(x, freqs, use_real):
        calls.append(tuple(x.shape))
        offset = {7: 0, 30: 7}[x.shape[1]]
        return apply_rotary(x, table, positions=offset, interleaved=True)

    monkeypatch.setattr(module, "apply_rotary_emb_qwen", turn)
    found = model(**inputs).sample
    streams = [(2, 30, 3, 16)] * 2 + [(2, 7, 3, 16)] * 2  # q and k of the image, then of the text
    assert calls == streams * 2
    monkeypatch.setattr(module, "apply_rotary_emb_qwen", lambda x, freqs, use_real: x)
    assert_same_but_for_rounding(found, expected, model(**inputs).sample)


def test_wan_gives_the_same_output(monkeypatch):
    module = transformer("transformer_wan")
    model = module.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=20,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "timestep": torch.tensor([30, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }
    expected = model(**inputs).sample

    table, calls = diffusion.wan((3, 4, 5), head_dim=20, like=expected), []

    def turn(norm, arguments, normalized):
        calls.append(tuple(normalized.shape))
        return apply_rotary(normalized, table, interleaved=True, head_dim=20)

    # Wan's own rotation is local to its processor, which leaves it out where it is given no table.
    # What it would turn are the outputs of these two norms, heads not yet apart.
    monkeypatch.setattr(model.rope, "forward", lambda hidden_states: None)
    unturned = model(**inputs).sample
    for block in model.blocks:
        block.attn1.norm_q.register_forward_hook(turn)
        block.attn1.norm_k.register_forward_hook(turn)
    found = model(**inputs).sample
    assert calls == [(2, 60, 40)] * 4
    assert_same_but_for_rounding(found, expected, unturned)
