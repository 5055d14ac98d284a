"""Published models' configs: their frequencies against what transformers computes in float32."""

import copy
import functools
import importlib
import warnings

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rope_cupy.frequencies import MODEL_DEFAULTS, from_config, layer_types
from rope_cupy.frequencies.configs import layers_that_rotate

FLOAT32 = 3e-6  # relative: a power, a quotient and a product in float32

PHI_3_SHORT = [
    *[1.05, 1.05, 1.05, 1.1, 1.1, 1.1500000000000001, 1.2000000000000002, 1.2500000000000002],
    *[1.3000000000000003, 1.3500000000000003, 1.5000000000000004, *[2.000000000000001] * 21],
    *[2.0500000000000007, 2.0500000000000007, 2.0500000000000007, 2.1000000000000005],
    *[2.1000000000000005, 2.1000000000000005, 2.1500000000000004, 2.1500000000000004],
    *[2.3499999999999996, 2.549999999999999, 2.5999999999999988, 2.5999999999999988],
    *[2.7499999999999982, 2.849999999999998, 2.849999999999998, 2.9499999999999975],
]
PHI_3_LONG = [
    *[1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547],
    *[1.2299998998641968, 1.2299998998641968, 1.2999999523162842, 1.4499999284744263],
    *[1.5999999046325684, 1.6499998569488525, 1.8999998569488525, 2.859999895095825],
    *[3.68999981880188, 5.419999599456787, 5.489999771118164, 5.489999771118164],
    *[9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355],
    *[15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055],
    *[30.009998321533203, 32.35000228881836, 32.590003967285156, 35.56000518798828],
    *[39.95000457763672, 53.840003967285156, 56.20000457763672, 57.95000457763672],
    *[59.29000473022461, 59.77000427246094, 59.920005798339844, 61.190006256103516],
    *[61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086],
    *[63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922],
    *[64.760009765625, 64.80001068115234, 64.81001281738281, 64.81001281738281],
]
PHI_4_LONG = [
    *[1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649],
    *[2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845],
    *[5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158],
    *[11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105],
    *[25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71],
    *[32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77],
]


def sizes(hidden_size, num_attention_heads, max_position_embeddings, head_dim=None):
    fields = {
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
    }
    return fields | ({} if head_dim is None else {"head_dim": head_dim})


def llama3(factor, low=1.0, high=4.0):
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def yarn(factor, original, **others):
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original} | others


def deepseek_yarn(factor, mscale, beta_fast=32):
    others = {"beta_fast": beta_fast, "beta_slow": 1}
    return yarn(factor, 4096, mscale=mscale, mscale_all_dim=mscale, **others)


# What bears on the rotary embedding in the config.json of each model, as it was first published.
PUBLISHED = {
    "Llama 2 7B": {"model_type": "llama", "rope_scaling": None, **sizes(4096, 32, 4096)},
    "Llama 3.1 8B": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": llama3(8.0),
        **sizes(4096, 32, 131072),
    },
    "Llama 3.2 1B": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": llama3(32.0),
        **sizes(2048, 32, 131072, 64),
    },
    "Llama 4 Scout": {
        "model_type": "llama4_text",
        "rope_theta": 500000.0,
        "rope_scaling": llama3(16.0, low=1.0, high=1.0),
        **sizes(5120, 40, 10485760, 128),
    },
    "Vicuna 1.5 7B 16k": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
        **sizes(4096, 32, 4096),
    },
    "InternLM 3 8B, as Llama": {
        "model_type": "llama",
        "rope_theta": 50000000,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        **sizes(4096, 32, 32768, 128),
    },
    "Hunyuan 7B": {
        "model_type": "hunyuan_v1_dense",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        **sizes(4096, 32, 32768, 128),
    },
    "Mixtral 8x7B": {"model_type": "mixtral", "rope_theta": 1e6, **sizes(4096, 32, 32768)},
    "Qwen2.5 7B 1M": {"model_type": "qwen2", "rope_theta": 10000000.0, **sizes(3584, 28, 1010000)},
    "Qwen2.5 7B, YaRN": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "rope_scaling": yarn(4.0, 32768),
        **sizes(3584, 28, 131072),
    },
    "Qwen2-VL 7B": {
        "model_type": "qwen2_vl",
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        **sizes(3584, 28, 32768),
    },
    "Qwen3 8B": {
        "model_type": "qwen3",
        "rope_theta": 1000000,
        "rope_scaling": None,
        **sizes(4096, 32, 40960, 128),
    },
    "Qwen3 32B, YaRN": {
        "model_type": "qwen3",
        "rope_theta": 1000000,
        "rope_scaling": {"rope_type": "yarn", **yarn(4.0, 32768)},
        **sizes(5120, 64, 131072, 128),
    },
    "Qwen3-Next 80B": {
        "model_type": "qwen3_next",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        **sizes(2048, 16, 262144, 256),
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "rope_theta": 10000,
        "rope_scaling": deepseek_yarn(40, 0.707),
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        **sizes(2048, 16, 163840),
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "rope_theta": 10000,
        "rope_scaling": deepseek_yarn(40, 1.0),
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        **sizes(7168, 128, 163840),
    },
    "Kimi K2": {
        "model_type": "deepseek_v3",
        "rope_theta": 50000.0,
        "rope_scaling": deepseek_yarn(32.0, 1.0, beta_fast=1.0),
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        **sizes(7168, 64, 131072),
    },
    "GPT-OSS 20B": {
        "model_type": "gpt_oss",
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        **sizes(2880, 64, 131072, 64),
    },
    "OLMo 3 7B": {
        "model_type": "olmo3",
        "rope_theta": 500000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "attention_factor": 1.2079441541679836,
            "original_max_position_embeddings": 8192,
        },
        **sizes(4096, 32, 65536),
    },
    "Phi-3 mini 128k": {
        "model_type": "phi3",
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": PHI_3_SHORT,
            "long_factor": PHI_3_LONG,
        },
        "original_max_position_embeddings": 4096,
        **sizes(3072, 32, 131072),
    },
    "Phi-4": {"model_type": "phi3", "rope_theta": 250000, **sizes(5120, 40, 16384)},
    "Phi-4-mini": {
        "model_type": "phi3",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": PHI_4_LONG,
        },
        "original_max_position_embeddings": 4096,
        **sizes(3072, 24, 131072),
    },
    "Phi-2": {"model_type": "phi", "partial_rotary_factor": 0.4, **sizes(2560, 32, 2048)},
    "GPT-NeoX 20B": {
        "model_type": "gpt_neox",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        **sizes(6144, 64, 2048),
    },
    "StableLM 2 1.6B": {
        "model_type": "stablelm",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
        **sizes(2048, 32, 4096),
    },
    "GLM-4 9B": {
        "model_type": "glm",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        **sizes(4096, 32, 131072, 128),
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2",
        "rope_theta": 5000000,
        "rotary_dim": 64,
        **sizes(3072, 48, 196608, 128),
    },
    "Gemma 2 9B": {"model_type": "gemma2", "rope_theta": 10000.0, **sizes(3584, 16, 8192, 256)},
    "Gemma 3 1B": {
        "model_type": "gemma3_text",
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        **sizes(1152, 4, 32768, 256),
    },
    "Gemma 3 4B": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
    "Gemma 3 27B": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 128,
            "hidden_size": 5376,
            "num_attention_heads": 32,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
    "Gemma 4 E2B": {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "global_head_dim": 512,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            **sizes(1536, 8, 131072, 256),
        },
    },
    "ModernBERT base": {
        "model_type": "modernbert",
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        **sizes(768, 12, 8192),
    },
}


LAYERED = "OLMo 3 7B", "Gemma 3 1B", "Gemma 3 4B", "Gemma 3 27B", "Gemma 4 E2B", "ModernBERT base"
LAYER_TYPES = {model: ("full_attention", "sliding_attention") for model in LAYERED}
CASES = [(model, layer) for model in PUBLISHED for layer in LAYER_TYPES.get(model, (None,))]


@functools.cache
def config_of(model):
    fields = copy.deepcopy(PUBLISHED[model])  # transformers writes into what it is given
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


SPELLINGS = {
    "as published": PUBLISHED.__getitem__,
    "an object": config_of,
    "as saved by transformers 5": lambda model: config_of(model).to_dict(),
}


@functools.cache
def rotary_class(module):
    """The class whose default frequencies a model of transformers has."""
    module = importlib.import_module(module.replace(".configuration_", ".modeling_"))
    return next(
        value
        for name, value in vars(module).items()
        if name.endswith("RotaryEmbedding") and hasattr(value, "compute_default_rope_parameters")
    )


@functools.cache
def transformers_answer(model, layer_type, seq_len):
    config = config_of(model).get_text_config()
    layers = {} if layer_type is None else {"layer_type": layer_type}
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer_type]
    given = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if given["rope_type"] == "default":
        function = rotary_class(type(config).__module__).compute_default_rope_parameters
    elif given.get("alpha"):
        function = rotary_class(type(config).__module__).compute_ntk_alpha_rope_parameters
    else:
        function = functools.partial(ROPE_INIT_FUNCTIONS[given["rope_type"]], seq_len=seq_len)
    inv_freq, attention_scaling = function(config, **layers)
    return inv_freq.double().numpy(), attention_scaling


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("model", "layer_type"), CASES)
def test_a_published_config_has_the_frequencies_of_transformers(model, layer_type, spelling):
    config = SPELLINGS[spelling](model)
    for seq_len in (None, 1, 4096, 4097, 32768, 32769, 200_000):
        inv_freq, attention_scaling = from_config(config, seq_len=seq_len, layer_type=layer_type)
        expected, expected_scaling = transformers_answer(model, layer_type, seq_len)
        assert inv_freq.dtype == np.float64
        np.testing.assert_allclose(inv_freq, expected, rtol=FLOAT32, atol=0)
        assert attention_scaling == pytest.approx(expected_scaling, rel=1e-12)


@pytest.mark.parametrize("model", ["InternLM 3 8B, as Llama", "Phi-3 mini 128k", "Phi-4-mini"])
def test_the_length_of_the_sequence_changes_the_frequencies_beyond_the_first_length(model):
    first = 32768 if "InternLM" in model else 4096
    short, longer = (from_config(PUBLISHED[model], seq_len=first + more)[0] for more in (0, 1))
    unknown = from_config(PUBLISHED[model])[0]
    assert np.array_equal(short, unknown) and not np.array_equal(short, longer)


@pytest.mark.parametrize(
    ("model", "layer_type", "changed"),
    [
        ("Llama 3.1 8B", None, {"rope_scaling": None}),
        (
            "GPT-OSS 20B",
            None,
            {"rope_scaling": PUBLISHED["GPT-OSS 20B"]["rope_scaling"] | {"truncate": True}},
        ),
        ("DeepSeek-V3", None, {"qk_rope_head_dim": 32}),
        ("Qwen3-Next 80B", None, {"partial_rotary_factor": 0.5}),
        ("GPT-NeoX 20B", None, {"rotary_pct": 0.5}),
        ("GPT-NeoX 20B", None, {"rotary_emb_base": 20000}),
        ("MiniMax-M2", None, {"rotary_dim": 32}),
        ("Gemma 3 1B", "sliding_attention", {"rope_local_base_freq": 20000}),
        ("Gemma 3 1B", "full_attention", {"rope_theta": 20000}),
        ("ModernBERT base", "full_attention", {"global_rope_theta": 20000}),
        ("Hunyuan 7B", None, {"rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0}}),
    ],
)
def test_a_field_that_single_models_have_is_read(model, layer_type, changed):
    before = from_config(PUBLISHED[model], layer_type=layer_type)[0]
    after = from_config(PUBLISHED[model] | changed, layer_type=layer_type)[0]
    assert not np.array_equal(before, after)


def test_deepseek_scales_attention_by_the_quotient_of_its_two_mscales():
    assert from_config(PUBLISHED["DeepSeek-V3"])[1] == 1.0
    alone = PUBLISHED["DeepSeek-V3"]["rope_scaling"] | {"mscale_all_dim": 0}
    growth = 0.1 * np.log(40)
    scaling = from_config(PUBLISHED["DeepSeek-V3"] | {"rope_scaling": alone})[1]
    assert scaling == pytest.approx(growth + 1, rel=1e-15)
    both = alone | {"mscale": 0.5, "mscale_all_dim": 2.0}
    scaling = from_config(PUBLISHED["DeepSeek-V3"] | {"rope_scaling": both})[1]
    assert scaling == pytest.approx((0.5 * growth + 1) / (2 * growth + 1), rel=1e-15)


@pytest.mark.parametrize("rotary_dim", [64, None])
def test_gpt_j_has_the_frequencies_of_its_table(rotary_dim):
    module = importlib.import_module("transformers.models.gptj.modeling_gptj")
    config = AutoConfig.for_model("gptj", rotary_dim=64)
    fields = config.to_dict() | {"rotary_dim": rotary_dim}
    table = module.create_sinusoidal_positions(2, rotary_dim or 256).double().numpy()
    sin, cos = table[1].reshape(2, -1)
    for spelling in [fields] + [config] * (rotary_dim == 64):
        inv_freq, attention_scaling = from_config(spelling)
        np.testing.assert_allclose(inv_freq, np.arctan2(sin, cos), FLOAT32)
        assert attention_scaling == 1.0


@pytest.mark.parametrize("model_type", MODEL_DEFAULTS)
@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"rope_type": "default"}}])
def test_what_a_file_leaves_out_is_what_the_class_of_the_model_gives(model_type, scaling):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    left = scaling | sizes(4096, 32, 8192)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes deprecate what they still read
        config = AutoConfig.for_model(model_type, **copy.deepcopy(left))
    for layer_type in layer_types(config):
        told = from_config({"model_type": model_type, **left}, layer_type=layer_type)
        wanted = from_config(config, layer_type=layer_type)
        assert np.array_equal(told[0], wanted[0]) and told[1] == wanted[1]


NINE = sizes(32, 4, 64, 8) | {
    **{"intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 9},
    **{"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "afmoe", "global_attn_every_n_layers": 3},
        {"model_type": "cohere2"},
        {"model_type": "cohere2", "sliding_window_pattern": 3},
        {"model_type": "exaone4"},
        {"model_type": "exaone4", "sliding_window_pattern": 2},
        {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 9},
        {"model_type": "exaone_moe"},
        {"model_type": "flint", "layer_types": ["full_attention", *["sliding_attention"] * 8]},
        {"model_type": "kolibri1"},
        {"model_type": "llama4_text"},
        {"model_type": "llama4_text", "no_rope_layers": [], "no_rope_layer_interval": 2},
        {"model_type": "muse_glimmer_text"},
        {"model_type": "smollm3"},
        {"model_type": "smollm3", "no_rope_layer_interval": 3},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_the_layers_that_rotate_are_those_of_the_model(fields, monkeypatch):
    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    config = AutoConfig.for_model(**copy.deepcopy(NINE | fields))
    module = importlib.import_module(
        type(config).__module__.replace(".configuration_", ".modeling_")
    )
    function = "apply_rotary_emb" if model_type == "llama4_text" else "apply_rotary_pos_emb"
    rotate, layers = getattr(module, function), []
    rotated = set()

    def note_and_rotate(*args, **kwargs):
        rotated.add(layers[-1])
        return rotate(*args, **kwargs)

    monkeypatch.setattr(module, function, note_and_rotate)
    model = AutoModel.from_config(config).eval()
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: layers.append(number))
    model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    expected = [number in rotated for number in range(9)]
    assert layers == list(range(9))
    from_file = {} if model_type == "muse_glimmer_text" else NINE | fields
    for told in [config, config.to_dict()] + [from_file] * bool(from_file):
        assert (layers_that_rotate(told) or [True] * 9) == expected
