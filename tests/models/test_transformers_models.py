"""Small models of transformers whose rotary embedding is this library's: the same logits."""

import copy
import importlib

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rope_cupy import RotaryTable, apply_rotary_qk
from rope_cupy.frequencies import from_config

NUM_LAYERS = 2
NUM_POSITIONS = 128
# Of the largest logit: transformers rounds angles of up to 128 radians to float32, and before it
# the radians per position, which is 1.2e-5 of a radian together.
TOLERANCE = 2e-5

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,  # attention must not be uniform, or no rotation changes a logit
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}

CONFIGS = {
    "Llama, llama3": {
        "model_type": "llama",
        "rope_theta": 1000.0,
        "rope_scaling": LLAMA3,
        "max_position_embeddings": 512,
    },
    "Qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6},
    "Qwen3, YaRN": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_theta": 1e4,
        "rope_scaling": YARN,
        "max_position_embeddings": 256,
    },
    "GPT-OSS, YaRN without truncation": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "rope_scaling": YARN | {"truncate": False},
        "max_position_embeddings": 256,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention"] * NUM_LAYERS,
    },
    "Gemma 3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "DeepSeek-V3, YaRN": {
        "model_type": "deepseek_v3",
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        "max_position_embeddings": 256,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": NUM_LAYERS,
    },
    "Phi-3, LongRoPE, half of each head": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 512,
    },
}


def model_of(fields):
    fields = copy.deepcopy(SIZES | fields)  # transformers writes into what it is given
    config = AutoConfig.for_model(**fields, attn_implementation="eager")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens():
    """Two sequences, the second padded on the left; positions leave gaps, to reach far."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :5] = 0
    steps = torch.randint(1, 10, mask.shape, generator=generator)
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], mask.shape, generator=generator),
        "attention_mask": mask,
        "position_ids": (steps * mask).cumsum(1),
    }


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

VISION = {
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLText", {"mrope_section": [2, 3, 3]}),
    "Qwen3-VL": (
        "qwen3_vl",
        "Qwen3VLText",
        {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    ),
}


def vision_model(name):
    package, prefix, sections = VISION[name]
    configuration = importlib.import_module(
        f"transformers.models.{package}.configuration_{package}"
    )
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    config = getattr(configuration, f"{prefix}Config")(
        **SIZES,
        head_dim=16,
        max_position_embeddings=NUM_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4} | sections,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return getattr(modeling, f"{prefix}Model")(config).eval()


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
    model, inputs, used = vision_model(name), seen_tokens(), []
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
