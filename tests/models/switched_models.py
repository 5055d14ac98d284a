"""Small models that an integration switches to rope_cupy, and the calls that they make then."""

import copy
import functools

import torch
import transformers
from blocks import CONFIGS, LATENT, NUM_LAYERS, config, model_of, tokens
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_cupy.integrations import _transformers_calls, _transformers_forms
from rope_cupy.integrations.transformers import enable

TOLERANCE = 3e-6  # of the largest number: float32, and layers that make a rounding larger
ROTATE, NORM = "apply_rotary_qk", "apply_qk_norm_rotary"
ROTATE_ONE, NORM_ONE = "apply_rotary", "apply_norm_rotary"
SLIDING, FULL = "sliding_attention", "full_attention"
EACH, NORMED = {ROTATE: NUM_LAYERS}, {NORM: NUM_LAYERS}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
ROUTED = EXPERTS | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts": 2}

SECTIONS = {"rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MLA = {"num_key_value_heads": 4, "v_head_dim": 16, "first_k_dense_replace": NUM_LAYERS, **LATENT}

# Models, and the calls that one pass makes: one a layer, but where a layer does not rotate.
MODELS = {
    **{name: (CONFIGS[name], EACH) for name in CONFIGS},
    "Qwen3": (CONFIGS["Qwen3"], NORMED),
    "Qwen3, YaRN": (CONFIGS["Qwen3, YaRN"], NORMED),
    "Gemma 3": (CONFIGS["Gemma 3"], NORMED),
    "Qwen2": (config("qwen2"), EACH),
    "Gemma 2": (config("gemma2", head_dim=16, sliding_window=8), EACH),
    "Mistral": (config("mistral", head_dim=16), EACH),
    "GLM, half of each head": (config("glm", head_dim=16), EACH),
    "GLM-4": (config("glm4", head_dim=16), EACH),
    "Cohere": (config("cohere"), EACH),
    "Cohere, LayerNorms": (config("cohere", use_qk_norm=True), EACH),
    "GPT-NeoX, half of each head": (config("gpt_neox", rotary_pct=0.5), EACH),
    "OLMo 2, norms of all heads": (config("olmo2"), NORMED),
    "ERNIE 4.5": (config("ernie4_5", head_dim=16), EACH),
    "Helium": (config("helium", head_dim=16), EACH),
    "EXAONE 4, a layer without a rotation": (
        config("exaone4", sliding_window=8, layer_types=[SLIDING, FULL]),
        {NORM: 1},
    ),
    "Qwen3-Next, half of each head": (
        config(
            *("qwen3_next", {"rope_type": "default", "partial_rotary_factor": 0.5}),
            **{"head_dim": 16, "layer_types": ["linear_attention", FULL]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
            **{"shared_expert_intermediate_size": 32, **EXPERTS, "num_experts": 2},
        ),
        {NORM: 1},
    ),
    "HunYuan, norms after the rotation": (config("hunyuan_v1_dense", head_dim=16), EACH),
    "nanochat, backwards": (config("nanochat", head_dim=16), EACH),
    "MiniMax-M2, half of each head": (
        config("minimax_m2", head_dim=16, rotary_dim=8, **EXPERTS),
        NORMED,
    ),
    "GLM-4-MoE": (config("glm4_moe", head_dim=16, use_qk_norm=True, **ROUTED), NORMED),
    "LFM2": (config("lfm2", layer_types=[FULL] * NUM_LAYERS), NORMED),
    "GPT-J, q and k apart": (
        {
            **{"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": NUM_LAYERS},
            **{"rotary_dim": 8, "n_positions": 256},
        },
        {ROTATE_ONE: 2 * NUM_LAYERS},
    ),
    "DeepSeek-V4, q and k apart": (
        config("deepseek_v4", head_dim=32, **ROUTED, **LATENT),
        {ROTATE_ONE: NUM_LAYERS, NORM_ONE: 2 * NUM_LAYERS},
    ),
    "Gemma 4, q and k apart": (
        config(
            *("gemma4_text",),
            **{"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 2},
            **{"layer_types": [SLIDING, FULL], "sliding_window": 8, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97},
        ),
        {NORM_ONE: 2 * NUM_LAYERS},
    ),
    "Qwen3.5": (
        config(
            *("qwen3_5_text", SECTIONS),
            **{"head_dim": 16, "layer_types": ["linear_attention", FULL]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        ),
        {NORM: 1},
    ),
    "DeepSeek-V2, complex numbers": (config("deepseek_v2", **MLA), EACH),
    "DeepSeek-V3.2, an indexer beside": (
        config("deepseek_v32", **MLA, index_n_heads=2, index_head_dim=32, index_topk=4),
        {ROTATE: 2 * NUM_LAYERS},
    ),
    "Llama 4, complex numbers": (
        config("llama4_text", head_dim=16, intermediate_size_mlp=96, **EXPERTS),
        EACH,
    ),
}
NOT_EAGER = "Llama 4, complex numbers", "DeepSeek-V2, complex numbers"


@functools.cache
def built_once(name):
    return model_of(MODELS[name][0])


def built(name):
    return copy.deepcopy(built_once(name))


def watched_calls(monkeypatch):
    """The names of calls of rope_cupy, as they are made; `spoiled` ones rotate the other way."""

    class Calls(list):
        spoiled = False

    made = Calls()

    def watch(module, name):
        function = getattr(module, name)

        def watched(*arrays, **options):
            made.append(name)
            options["conjugate"] = options.get("conjugate", False) ^ made.spoiled
            return function(*arrays, **options)

        monkeypatch.setattr(module, name, watched)

    for name in (NORM, NORM_ONE):
        watch(_transformers_calls, name)
    for name in (ROTATE, ROTATE_ONE):
        watch(_transformers_forms, name)
    return made


def counted(calls):
    counts = {name: calls.count(name) for name in dict.fromkeys(calls)}
    calls.clear()
    return counts


def switched(model, calls, **options):
    report = enable(model, **options)
    calls.clear()  # those of the probe
    return report


def logits(model, **inputs):
    inputs = {**tokens(), **inputs}
    if isinstance(model, transformers.GPTJForCausalLM):
        inputs["position_ids"] = inputs["position_ids"] % 200
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def gradients(model, **inputs):
    """The loss of a model and the gradients of its weights, as they are used."""
    model.zero_grad()
    given = tokens() | inputs
    loss = model(**given, labels=given["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def state(model):
    """The class of each module, and the names of what it holds."""
    return [(type(each), sorted(vars(each))) for each in model.modules()]


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_all_close(actual, expected, tolerance):
    """The same loss and gradients; one that is next to nothing is compared with the largest."""
    assert_close(actual[0], expected[0], tolerance)
    assert actual[1].keys() == expected[1].keys()
    least = 1e-2 * max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).abs().max()
        assert error <= tolerance * max(gradient.abs().max(), least), name


class Rotating(nn.Module):
    """A module with any rotary function."""

    def __init__(self, rotate=None):
        super().__init__()
        self.options = {}

    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin, **self.options)


def rotated(module, q, k, cos, sin):
    with torch.no_grad():
        return torch.cat([each.flatten() for each in module(q, k, cos, sin)])


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
