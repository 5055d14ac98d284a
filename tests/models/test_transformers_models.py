"""Small models of transformers whose rotary embedding is this library's: the same logits."""

import importlib

import numpy as np
import pytest
import torch
from blocks import CONFIGS, NUM_LAYERS, SIZES, VISION, model_of, tokens, vision_model

from rope_cupy import RotaryTable, apply_rotary_qk
from rope_cupy.frequencies import from_config

NUM_POSITIONS = 128
# Of the largest logit: transformers rounds angles of up to 128 radians to float32, and before it
# the radians per position, which is 1.2e-5 of a radian together.
TOLERANCE = 2e-5


def logits(model, inputs):
    with torch.no_grad():
        result = model(**inputs, use_cache=False).logits
    return result[inputs["attention_mask"].bool()].numpy()


class Tables(torch.nn.Module):
    """What stands in for a model's cos and sin: the table of a layer type, and the positions."""

    def __init__(self, config, seq_len, stretch=1.0):
        super().__init__()
        given = config.rope_parameters
        layer_types = [name for name in given if isinstance(given[name], dict)] or [None]
        self.tables = {}
        for layer_type in layer_types:
            inv_freq, scaling = from_config(config, seq_len=seq_len, layer_type=layer_type)
            table = RotaryTable.from_inverse_frequencies(
                inv_freq * stretch,
                NUM_POSITIONS,
                like=torch.empty(1),
                attention_scaling=scaling,
            )
            self.tables[layer_type] = table

    def forward(self, x, position_ids, layer_type=None):
        return self.tables[layer_type], position_ids


@pytest.fixture
def replaced_calls(monkeypatch):
    """Replaces the rotary function of a model's module; returns the tables of its calls."""

    def replace(model, interleaved):
        calls = []

        def rotate(q, k, table, positions):
            calls.append(table)
            return apply_rotary_qk(
                q, k, table, positions=positions, layout="bhsd", interleaved=interleaved
            )

        name = "apply_rotary_pos_emb" + "_interleave" * interleaved
        module = importlib.import_module(type(model).__module__)
        assert callable(getattr(module, name))
        monkeypatch.setattr(module, name, rotate)
        return calls

    return replace


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gives_the_same_logits_with_this_rotary_embedding(name, replaced_calls):
    model, inputs = model_of(CONFIGS[name]), tokens()
    seq_len = int(inputs["position_ids"].max()) + 1
    assert seq_len <= NUM_POSITIONS
    expected = logits(model, inputs)
    # transformers gives the pairs of DeepSeek back as halves: a permutation of q and k alike,
    # which their products do not see.
    calls = replaced_calls(model, interleaved="DeepSeek" in name)
    model.model.rotary_emb = Tables(model.config, seq_len)
    actual = logits(model, inputs)
    layer_types = getattr(model.config, "layer_types", None) if "Gemma" in name else None
    tables = model.model.rotary_emb.tables
    assert calls == [tables[layer_type] for layer_type in layer_types or [None] * NUM_LAYERS]
    largest = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= TOLERANCE * largest
    model.model.rotary_emb = Tables(model.config, seq_len, stretch=1.01)
    astray = logits(model, inputs)
    assert np.abs(astray - expected).max() > 100 * TOLERANCE * largest


# Text models that see images: three positions of a token, (3, batch, tokens).


def seen_tokens():
    """Text, two images of 2 x 3 and 3 x 2 patches and text again, in a batch of two."""
    image = [[3, 3 + row, 3 + column] for row in range(2) for column in range(3)]
    other = [[40, 40 + row, 40 + column] for row in range(3) for column in range(2)]
    text = [[place] * 3 for place in (0, 1, 2)], [[place] * 3 for place in (50, 51, 90)]
    first = torch.tensor(text[0] + image + other + text[1])
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], (2, len(first)), generator=generator),
        "position_ids": torch.stack([first, first.flip(0)]).permute(2, 0, 1),
    }


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("name", VISION)
def test_a_text_model_that_sees_images_gives_the_same(name, precompute, monkeypatch):
    model, inputs, used = vision_model(name, NUM_POSITIONS), seen_tokens(), []
    table = RotaryTable.from_config(
        model.config,
        NUM_POSITIONS if precompute else None,
        like=torch.empty(1),
        precompute=precompute,
    )

    class Table(torch.nn.Module):
        def forward(self, x, position_ids):
            return table, position_ids

    def rotate(q, k, table, positions):
        used.append(table)
        sections = VISION[name][2]
        return apply_rotary_qk(q, k, table, positions=positions, layout="bhsd", **sections)

    def hidden():
        with torch.no_grad():
            return model(**inputs, use_cache=False).last_hidden_state.numpy()

    expected = hidden()
    module = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", rotate)
    model.rotary_emb = Table()
    largest = np.abs(expected).max()
    assert np.abs(hidden() - expected).max() <= TOLERANCE * largest
    assert used == [table] * NUM_LAYERS
    inputs["position_ids"] = inputs["position_ids"].flip(0)  # height for width
    assert np.abs(hidden() - expected).max() > 100 * TOLERANCE * largest
