"""Small models of transformers and of diffusers, random but always the same, and their inputs."""

import copy
import importlib

import numpy as np
import pytest
import torch
from configs import llama3, yarn
from transformers import AutoConfig, AutoModelForCausalLM

# Models of transformers, with a language to model.

NUM_LAYERS = 2

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
YARN = yarn(4.0, 64, "rope_type")
LLAMA3 = llama3(8.0) | {"original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3]}
LONGROPE["long_factor"] = [1.0, 1.5, 2.5, 4.0]
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}


def config(model_type, scaling=None, positions=None, **fields):
    given = {"rope_scaling": scaling, "max_position_embeddings": positions}
    given = {name: value for name, value in given.items() if value is not None}
    return {"model_type": model_type} | given | fields


CONFIGS = {
    "Llama, llama3": config("llama", LLAMA3, 512, rope_theta=1000.0),
    "Qwen3": config("qwen3", head_dim=32, rope_theta=1e6),
    "Qwen3, YaRN": config("qwen3", YARN, 256, head_dim=32, rope_theta=1e4),
    "GPT-OSS, YaRN without truncation": config(
        *("gpt_oss", YARN | {"truncate": False}, 256),
        **{"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1},
        layer_types=["full_attention"] * NUM_LAYERS,
    ),
    "Gemma 3": config(
        *("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
        **{"head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 8},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "DeepSeek-V3, YaRN": config(
        *("deepseek_v3", YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, 256),
        **{"num_key_value_heads": 4, "v_head_dim": 16, "first_k_dense_replace": NUM_LAYERS},
        **LATENT,
    ),
    "Phi-3, LongRoPE, half of each head": config(
        *("phi3", LONGROPE, 512), partial_rotary_factor=0.5, original_max_position_embeddings=32
    ),
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


# Text models that see images: their package, the class of their text, and their sections.
VISION = {
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLText", {"mrope_section": [2, 3, 3]}),
    "Qwen3-VL": (
        "qwen3_vl",
        "Qwen3VLText",
        {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    ),
}


def vision_model(name, num_positions):
    package, prefix, sections = VISION[name]
    configuration, modeling = (
        importlib.import_module(f"transformers.models.{package}.{kind}_{package}")
        for kind in ("configuration", "modeling")
    )
    config = getattr(configuration, f"{prefix}Config")(
        **SIZES,
        head_dim=16,
        max_position_embeddings=num_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4} | sections,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return getattr(modeling, f"{prefix}Model")(config).eval()


# Transformers of diffusers: how each is built, and what it is given.


def transformer(name):
    return pytest.importorskip(f"diffusers.models.transformers.{name}")


def grid(*sizes):
    return torch.from_numpy(np.indices(sizes).reshape(len(sizes), -1).T.copy())


def flux():
    build = transformer("transformer_flux").FluxTransformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    layers = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1}
    model = build(**sizes, **layers, joint_attention_dim=12, pooled_projection_dim=8)
    text = {"encoder_hidden_states": torch.randn(2, 7, 12), "txt_ids": torch.zeros(7, 3)}
    image = {"hidden_states": torch.randn(2, 30, 4), "img_ids": grid(1, 5, 6).float()}
    rest = {"pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.3, 0.9])}
    return model.eval(), {**text, **image, **rest}


def qwen_image():
    build = transformer("transformer_qwenimage").QwenImageTransformer2DModel
    sizes = {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 6, 6)}
    layers = {"in_channels": 16, "out_channels": 4, "num_layers": 2}
    model = build(**sizes, **layers, joint_attention_dim=12)
    inputs = {"hidden_states": torch.randn(2, 30, 16), "img_shapes": [[(1, 5, 6)]] * 2}
    text = {"encoder_hidden_states": torch.randn(2, 7, 12), "timestep": torch.tensor([0.3, 0.9])}
    return model.eval(), inputs | text


def wan():
    build = transformer("transformer_wan").WanTransformer3DModel
    sizes = {"num_attention_heads": 2, "attention_head_dim": 20, "num_layers": 2}
    layers = {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24}
    inputs = {"hidden_states": torch.randn(2, 4, 3, 8, 10), "timestep": torch.tensor([30, 900])}
    text = {"encoder_hidden_states": torch.randn(2, 7, 12)}
    return build(**sizes, **layers).eval(), inputs | text
