"""Configs of models: published ones, and any JSON that could be taken for one."""

from hypothesis import strategies as st

from rope_cupy.frequencies import MODEL_DEFAULTS, RULES
from rope_cupy.frequencies.models import OTHER_ROTATIONS, SEVERAL_AXES

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
    fields = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
    fields |= {"max_position_embeddings": max_position_embeddings}
    return fields | ({} if head_dim is None else {"head_dim": head_dim})


def published(model_type, sized, theta=None, scaling=None, **others):
    """The fields of a config.json; `sized` are the arguments of `sizes`."""
    given = {"rope_theta": theta, "rope_scaling": scaling}
    given = {name: value for name, value in given.items() if value is not None}
    return {"model_type": model_type, **sizes(*sized), **given, **others}


def llama3(factor, low=1.0, high=4.0):
    factors = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return factors | {"original_max_position_embeddings": 8192, "rope_type": "llama3"}


def yarn(factor, original, key="type", **others):
    return {key: "yarn", "factor": factor, "original_max_position_embeddings": original} | others


def deepseek_yarn(factor, mscale, beta_fast=32):
    others = {"beta_fast": beta_fast, "beta_slow": 1}
    return yarn(factor, 4096, mscale=mscale, mscale_all_dim=mscale, **others)


def longrope(short_factor, long_factor):
    return {"type": "longrope", "short_factor": short_factor, "long_factor": long_factor}


NULL = {"rope_scaling": None}  # as some files say it
LATENT = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
FROM_4096 = {"original_max_position_embeddings": 4096}
GPT_OSS = yarn(32.0, 4096, "rope_type", beta_fast=32.0, beta_slow=1.0, truncate=False)
OLMO_3 = {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.2079441541679836}
GEMMA_3 = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
PROPORTIONAL = {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25}
GEMMA_4 = {
    "full_attention": PROPORTIONAL,
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}

# What bears on the rotary embedding in the config.json of each model, as it was first published.
PUBLISHED = {
    "Llama 2 7B": published("llama", (4096, 32, 4096), **NULL),
    "Llama 3.1 8B": published("llama", (4096, 32, 131072), 500000.0, llama3(8.0)),
    "Llama 3.2 1B": published("llama", (2048, 32, 131072, 64), 500000.0, llama3(32.0)),
    "Llama 4 Scout": published(
        "llama4_text", (5120, 40, 10485760, 128), 500000.0, llama3(16.0, low=1.0, high=1.0)
    ),
    "Vicuna 1.5 7B 16k": published(
        "llama", (4096, 32, 4096), scaling={"type": "linear", "factor": 4.0}
    ),
    "InternLM 3 8B, as Llama": published(
        "llama", (4096, 32, 32768, 128), 50000000, {"rope_type": "dynamic", "factor": 6.0}
    ),
    "Hunyuan 7B": published(
        *("hunyuan_v1_dense", (4096, 32, 32768, 128), 10000.0),
        {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    ),
    "Mixtral 8x7B": published("mixtral", (4096, 32, 32768), 1e6),
    "Qwen2.5 7B 1M": published("qwen2", (3584, 28, 1010000), 10000000.0),
    "Qwen2.5 7B, YaRN": published("qwen2", (3584, 28, 131072), 1000000.0, yarn(4.0, 32768)),
    "Qwen2-VL 7B": published(
        *("qwen2_vl", (3584, 28, 32768), 1000000.0),
        {"type": "mrope", "mrope_section": [16, 24, 24]},
    ),
    "Qwen3 8B": published("qwen3", (4096, 32, 40960, 128), 1000000, **NULL),
    "Qwen3 32B, YaRN": published(
        "qwen3", (5120, 64, 131072, 128), 1000000, {"rope_type": "yarn", **yarn(4.0, 32768)}
    ),
    "Qwen3-Next 80B": published(
        "qwen3_next", (2048, 16, 262144, 256), 10000000, partial_rotary_factor=0.25
    ),
    "DeepSeek-V2-Lite": published(
        "deepseek_v2", (2048, 16, 163840), 10000, deepseek_yarn(40, 0.707), **LATENT
    ),
    "DeepSeek-V3": published(
        "deepseek_v3", (7168, 128, 163840), 10000, deepseek_yarn(40, 1.0), **LATENT
    ),
    "Kimi K2": published(
        *("deepseek_v3", (7168, 64, 131072), 50000.0, deepseek_yarn(32.0, 1.0, beta_fast=1.0)),
        **LATENT,
    ),
    "GPT-OSS 20B": published("gpt_oss", (2880, 64, 131072, 64), 150000, GPT_OSS),
    "OLMo 3 7B": published(
        "olmo3", (4096, 32, 65536), 500000, yarn(8.0, 8192, "rope_type", **OLMO_3)
    ),
    "Phi-3 mini 128k": published(
        *("phi3", (3072, 32, 131072), 10000.0, longrope(PHI_3_SHORT, PHI_3_LONG)), **FROM_4096
    ),
    "Phi-4": published("phi3", (5120, 40, 16384), 250000),
    "Phi-4-mini": published(
        *("phi3", (3072, 24, 131072), 10000.0, longrope([1.0] * 48, PHI_4_LONG)),
        **{"partial_rotary_factor": 0.75, **FROM_4096},
    ),
    "Phi-2": published("phi", (2560, 32, 2048), partial_rotary_factor=0.4),
    "GPT-NeoX 20B": published("gpt_neox", (6144, 64, 2048), rotary_pct=0.25, rotary_emb_base=10000),
    "StableLM 2 1.6B": published("stablelm", (2048, 32, 4096), 10000, partial_rotary_factor=0.25),
    "GLM-4 9B": published("glm", (4096, 32, 131072, 128), 10000.0, partial_rotary_factor=0.5),
    "MiniMax-M2": published("minimax_m2", (3072, 48, 196608, 128), 5000000, rotary_dim=64),
    "Gemma 2 9B": published("gemma2", (3584, 16, 8192, 256), 10000.0),
    "Gemma 3 1B": published(
        *("gemma3_text", (1152, 4, 32768, 256), 1000000), **NULL, rope_local_base_freq=10000
    ),
    "Gemma 3 4B": {"model_type": "gemma3", "text_config": GEMMA_3 | {"hidden_size": 2560}},
    "Gemma 3 27B": {
        "model_type": "gemma3",
        "text_config": GEMMA_3 | {"head_dim": 128, "hidden_size": 5376, "num_attention_heads": 32},
    },
    "Gemma 4 E2B": {
        "model_type": "gemma4",
        "text_config": published(
            *("gemma4_text", (1536, 8, 131072, 256)), global_head_dim=512, rope_parameters=GEMMA_4
        ),
    },
    "ModernBERT base": published(
        *("modernbert", (768, 12, 8192)), global_rope_theta=160000.0, local_rope_theta=10000.0
    ),
}


# Any JSON that could be taken for a config.

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, 2, 8, 64, 4096, 1e-320, 1e-308, 1e308, 4_000_000_000]),
    st.sampled_from([10**400, -(10**400), 10**308, 1.0000000000000002]),
    st.sampled_from([-1, "", "64", "yarn", "rotary", "\x1b[31m", "\ud800", "full_attention"]),
    st.lists(st.one_of(st.floats(), st.integers()), max_size=4),
)
FIELDS = [
    *("head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings", "text_config"),
    *("vision_config", "layer_types", "per_layer_config", "global_head_dim", "rope_theta", "alibi"),
    *("rope_parameters", "rope_scaling", "rotary_dim", "partial_rotary_factor", "rotary_pct"),
    *("rope_local_base_freq", "original_max_position_embeddings", "position_embedding_type"),
    *("model_type", "_class_name", "no_rope_layers", "no_rope_layer_interval", "architectures"),
    *("rope_pct", "layer_rope_theta", "num_hidden_layers", "sliding_window_pattern", "d_model"),
    *("sliding_window", "rotary_scaling_factor", "rotary_emb_interleaved", "n_heads"),
    *("memory_attention_hidden_size", "embed_dim", "num_heads", "attn_config", "use_mem_rope"),
]
KEYS = [
    *("rope_type", "type", "factor", "rope_theta", "alpha", "beta_fast", "beta_slow", "truncate"),
    *("attention_factor", "attn_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "mrope_section"),
    *("full_attention", "sliding_attention", "partial_rotary_factor", "extrapolation_factor"),
]
PARAMETERS = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(HOSTILE, st.dictionaries(st.sampled_from(KEYS), HOSTILE))
)
TYPED = st.builds(
    lambda parameters, rope_type: parameters | {"rope_type": rope_type},
    st.dictionaries(st.sampled_from(KEYS), st.one_of(st.floats(1e-320, 1e308), HOSTILE)),
    st.sampled_from([*RULES, "su", "axial"]),
)
MODELS = st.sampled_from([*MODEL_DEFAULTS, *SEVERAL_AXES, *OTHER_ROTATIONS, "bert", "FluxPosEmbed"])
FLAT = st.dictionaries(st.sampled_from(FIELDS), st.one_of(HOSTILE, PARAMETERS, TYPED, MODELS))
SIZED = st.builds(
    lambda config, parameters: (
        {"head_dim": 8, "max_position_embeddings": 64} | config | {"rope_scaling": parameters}
    ),
    st.dictionaries(st.sampled_from(FIELDS), HOSTILE, max_size=3),
    TYPED,
)
ANY_CONFIG = st.one_of(
    FLAT,
    SIZED,
    st.builds(lambda config, part: config | {"text_config": part}, FLAT, st.one_of(FLAT, SIZED)),
    st.recursive(HOSTILE, lambda inner: st.dictionaries(st.text(max_size=3), inner), max_leaves=4),
)
