"""Whole models of Hugging Face transformers, their rotary function replaced, say the same.

The models are tiny, of random weights, in float32. In place of cos and sin they hand a table and
the positions of their tokens to `apply_rotary_qk`.
"""

import importlib

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rope_cupy import RotaryTable, apply_rotary_qk
from rope_cupy.frequencies import layer_types

TOKENS = 24
TOLERANCE = 2.0**-18  # of the largest logit: float32 in another order
SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None},
    "max_position_embeddings": 4096,
}
LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0},
    **{"mscale_all_dim": 0.5, "original_max_position_embeddings": 16},
}
NUMBERS = np.linspace(1, 4, 12).tolist()
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    **{"short_factor": [1.0] * 12, "long_factor": NUMBERS, "original_max_position_embeddings": 64},
}
MODELS = {
    "llama": {"head_dim": 32, "rope_parameters": LLAMA_3},
    "qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gpt_oss": {
        "head_dim": 32,
        "rope_parameters": YARN | {"truncate": False},
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
    },
    "phi3": {"hidden_size": 128, "rope_parameters": LONGROPE},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "deepseek_v3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
        **{"v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        **{"num_experts_per_tok": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
        **{"num_key_value_heads": 4, "rope_parameters": YARN},
    },
}


class Tables(torch.nn.Module):
    """Stands for a model's rotary embedding: hands a table and positions to its attention."""

    def __init__(self, config):
        super().__init__()
        self.tables = {
            name: RotaryTable.from_config(config, 64, like=torch.ones(1), layer_type=name)
            for name in layer_types(config)
        }

    def forward(self, x, position_ids, layer_type=None):
        return self.tables[layer_type], position_ids


def model_of(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES | MODELS[name])
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval(), config


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_says_the_same(name, monkeypatch):
    model, config = model_of(name)
    tokens = torch.randint(0, 64, (2, TOKENS))
    positions = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) + 7])
    exact = model(tokens, position_ids=positions).logits

    module, called = importlib.import_module(type(model).__module__), []

    def rotated(q, k, table, positions, **options):
        called.append((q.shape, k.shape))
        # DeepSeek-V3's pairs lie beside each other, and its own function also moves them apart: in
        # q and in k alike, so that no product of these changes.
        interleaved = name == "deepseek_v3"
        return apply_rotary_qk(
            q, k, table, positions=positions, layout="bhsd", interleaved=interleaved
        )

    for function in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, rotated)
    model.model.rotary_emb = Tables(config)
    logits = model(tokens, position_ids=positions).logits

    assert len(called) == config.num_hidden_layers
    assert all(shape[0] == 2 and shape[2] == TOKENS for shapes in called for shape in shapes)
    assert (logits - exact).abs().max() <= TOLERANCE * exact.abs().max()

    # The positions matter: the logits at others differ by far more.
    elsewhere = model(tokens, position_ids=2 * positions).logits
    assert (elsewhere - exact).abs().max() > 100 * TOLERANCE * exact.abs().max()
