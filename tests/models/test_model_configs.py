"""Published models' configs: their frequencies against what transformers computes in float32."""

import copy
import functools
import importlib
import warnings

import numpy as np
import pytest
import torch
from configs import GPT_OSS, PUBLISHED, sizes
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rope_cupy.frequencies import MODEL_DEFAULTS, from_config, layer_types
from rope_cupy.frequencies.configs import layers_that_rotate

FLOAT32 = 3e-6  # relative: a power, a quotient and a product in float32

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
        ("GPT-OSS 20B", None, {"rope_scaling": GPT_OSS | {"truncate": True}}),
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
