"""Transformers of diffusers, small and random, rotated by rope_cupy instead of their own code.

Each keeps its weights and inputs. What it rotates q and k with is replaced by `apply_rotary` and a
table of `rope_cupy.diffusion`: both rotate by the same angles in float32, so outputs differ by
roundings alone, and by far more where nothing is rotated.
"""

import blocks
import pytest
import torch

from rope_cupy import apply_rotary, diffusion

# Of the largest output: a rotation rounds to float32, by 2**-24, two or three times, and one or two
# blocks carry this on. Where nothing is rotated, outputs differ by more than 2**-7.
TOLERANCE = 2.0**-20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(31)
    with torch.no_grad():
        yield


def assert_same_but_for_rounding(found, expected, unrotated):
    largest = expected.abs().max()
    assert torch.isfinite(expected).all() and largest > 0
    assert (unrotated - expected).abs().max() > 2.0**-7 * largest
    assert (found - expected).abs().max() <= TOLERANCE * largest


def assert_same_with(rotate, function, module, build, monkeypatch, shapes):
    """The output is that of the model where a module's function is ours, called on such shapes."""
    model, inputs = build()
    expected, calls = model(**inputs).sample, []

    def ours(x, freqs, **_):
        calls.append(tuple(x.shape))
        return rotate(x)

    module = blocks.transformer(module)
    monkeypatch.setattr(module, function, ours)
    found = model(**inputs).sample
    assert calls == shapes
    monkeypatch.setattr(module, function, lambda x, freqs, **_: x)
    assert_same_but_for_rounding(found, expected, model(**inputs).sample)


def test_flux_gives_the_same_output(monkeypatch):
    ids = torch.cat([torch.zeros(7, 3), blocks.grid(1, 5, 6).float()])
    table = diffusion.flux(ids, dims=(4, 4, 8), like=ids)
    assert_same_with(
        lambda x: apply_rotary(x, table, interleaved=True),
        *("apply_rotary_emb", "transformer_flux", blocks.flux, monkeypatch),
        [(2, 37, 2, 16)] * 4,  # q and k of one double and of one single block
    )


@pytest.mark.parametrize("compute_dtype", ["float64", "float32"])
def test_qwen_image_gives_the_same_output(monkeypatch, compute_dtype):
    options = {"dims": (4, 6, 6), "like": torch.zeros(1), "compute_dtype": compute_dtype}
    table = diffusion.qwen_image((1, 5, 6), 7, **options)
    first = {7: 0, 30: 7}  # the position of the first token of the text, and of the image
    streams = [(2, 30, 3, 16)] * 2 + [(2, 7, 3, 16)] * 2  # q and k of the image, then of the text
    assert_same_with(
        lambda x: apply_rotary(x, table, positions=first[x.shape[1]], interleaved=True),
        *("apply_rotary_emb_qwen", "transformer_qwenimage", blocks.qwen_image, monkeypatch),
        streams * 2,
    )


def test_wan_gives_the_same_output(monkeypatch):
    model, inputs = blocks.wan()
    expected = model(**inputs).sample
    table, calls = diffusion.wan((3, 4, 5), head_dim=20, like=expected), []

    def rotate(norm, arguments, normalized):
        calls.append(tuple(normalized.shape))
        return apply_rotary(normalized, table, interleaved=True, head_dim=20)

    # Wan's own rotation is local to its processor, which leaves it out where it is given no table.
    # What it would rotate are the outputs of these two norms, heads not yet apart.
    monkeypatch.setattr(model.rope, "forward", lambda hidden_states: None)
    unrotated = model(**inputs).sample
    for block in model.blocks:
        block.attn1.norm_q.register_forward_hook(rotate)
        block.attn1.norm_k.register_forward_hook(rotate)
    found = model(**inputs).sample
    assert calls == [(2, 60, 40)] * 4
    assert_same_but_for_rounding(found, expected, unrotated)
