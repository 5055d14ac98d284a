"""What Hugging Face configs of single models leave out, and what no field of theirs says."""

from __future__ import annotations

from typing import Any, NamedTuple

# Models whose files may say nothing about their rotary embedding, which is Llama's.
PLAIN = """
    arcee aria_text blt_patcher chameleon cohere2 dbrx deepseek_ocr2_encoder deepseek_ocr2_text
    diffllama doge dots1 esmc eurobert exaone4 exaone_moe falcon falcon_h1 glm4v_text
    glm_image_text glm_ocr_text gpt_neox_japanese granite granite4_vision_text
    granite_docling_text granite_swa granitemoe granitemoe_swa granitemoeshared hunyuan_v1_dense
    hunyuan_v1_moe hunyuan_vl_text hyperclovax idefics jais2 kyutai_speech_to_text lasr_encoder
    llama mimi mimi_decoder mimi_encoder ministral mistral moshi nanochat
    nemotron3_diarization_audio olmo olmo2 olmo_hybrid olmoe phi3 phi4_multimodal
    pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder
    pocket_tts_audio_tokenizer_encoder qwen2 qwen2_moe qwen3_moe qwen3_omni_moe_talker_text
    roformer starcoder2 unlimited_ocr_text voxtral_realtime_text
"""

# Fields that files of these models may leave out, because the model's class has them.
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in PLAIN.split()},
    "afmoe": {"head_dim": 128},
    "apertus": {
        "rope_theta": 12000000.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "axk1": {"qk_rope_head_dim": 64},
    "axk2": {"qk_rope_head_dim": 32},
    "bailing_hybrid": {"qk_rope_head_dim": 64, "rope_theta": 6000000.0},
    "bamba": {"partial_rotary_factor": 0.5},
    "beam": {
        "head_dim": 128,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "bitnet": {"rope_theta": 500000.0},
    "blt_global_transformer": {"rope_theta": 500000.0},
    "blt_local_decoder": {"rope_theta": 500000.0},
    "blt_local_encoder": {"rope_theta": 500000.0},
    "cohere": {"rope_theta": 500000.0},
    "cohere2_moe": {"head_dim": 128},
    "csm": {"rope_theta": 500000.0},
    "csm_depth_decoder_model": {"rope_theta": 500000.0},
    "cwm": {
        "rope_theta": 1000000.0,
        "head_dim": 128,
        "rope_parameters": {
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "deepseek_v2": {"qk_rope_head_dim": 64},
    "deepseek_v3": {"qk_rope_head_dim": 64},
    "deepseek_v32": {"qk_rope_head_dim": 64},
    "dia_decoder": {"head_dim": 128},
    "dia_encoder": {"head_dim": 128},
    "emu3_text_model": {"rope_theta": 1000000.0},
    "ernie4_5": {"rope_theta": 500000.0, "head_dim": 128},
    "ernie4_5_moe": {"rope_theta": 500000.0},
    "evolla": {"rope_theta": 500000.0},
    "flex_olmo": {"rope_theta": 500000.0},
    "flint": {"head_dim": 128},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "head_dim": 256},
    "gemma3n_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "head_dim": 256},
    "glm": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "glm4": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "glm4_moe_lite": {"qk_rope_head_dim": 64},
    "glm4v_moe_text": {"partial_rotary_factor": 0.5},
    "glm_moe_dsa": {"qk_rope_head_dim": 64},
    "glmasr_encoder": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {
        "rope_theta": 150000.0,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
        },
    },
    "gte": {"rope_theta": 160000.0},
    "helium": {"rope_theta": 100000.0, "head_dim": 128},
    "higgs_audio_v2": {
        "head_dim": 128,
        "rope_parameters": {
            "factor": 32.0,
            "rope_theta": 500000.0,
            "high_freq_factor": 0.5,
            "low_freq_factor": 0.125,
            "original_max_position_embeddings": 1024,
            "rope_type": "llama3",
        },
    },
    "hrm_text": {"head_dim": 128},
    "hy_v3": {"head_dim": 128, "rope_theta": 11158840.0},
    "hy_v4": {"qk_rope_head_dim": 64},
    "internlm3": {"head_dim": 128},
    "iquestcoder": {"head_dim": 128},
    "jetmoe": {"head_dim": 128},
    "jina_embeddings_v3": {"rope_theta": 20000.0},
    "kolibri1": {"head_dim": 128},
    "laguna": {
        "head_dim": 128,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    },
    "lfm2": {"rope_theta": 1000000.0},
    "lfm2_moe": {"rope_theta": 1000000.0},
    "llama4_text": {"rope_theta": 500000.0, "head_dim": 128},
    "longcat_flash": {"qk_rope_head_dim": 64, "rope_theta": 10000000.0},
    "mellum": {
        "head_dim": 128,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mimo_v2_flash": {
        "head_dim": 192,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "partial_rotary_factor": 0.334,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.334,
            },
        },
    },
    "minicpm3": {"qk_rope_head_dim": 32},
    "minimax": {"rope_theta": 1000000.0},
    "minimax_m2": {"rope_theta": 5000000.0, "head_dim": 128},
    "ministral3": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "rope_type": "yarn",
        },
    },
    "mixtral": {"rope_theta": 1000000.0},
    "mllama_text_model": {"rope_theta": 500000.0},
    "modernbert": {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    "modernbert-decoder": {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    "molmo2_text": {"head_dim": 128},
    "muse_glimmer_assistant": {"head_dim": 128, "rope_theta": 500000.0},
    "muse_glimmer_text": {"head_dim": 128},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "neucodec": {"head_dim": 64},
    "nomic_bert": {"rope_theta": 1000.0},
    "olmo3": {"rope_theta": 500000.0},
    "paddleocr_vl_text": {"head_dim": 128, "rope_theta": 500000.0},
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"rope_theta": 1000000.0},
    "qwen2_5_omni_dit": {"head_dim": 64},
    "qwen2_5_omni_talker": {"head_dim": 128, "rope_theta": 1000000.0},
    "qwen2_5_omni_text": {"rope_theta": 1000000.0},
    "qwen2_5_vl_text": {"rope_theta": 1000000.0},
    "qwen2_vl_text": {"rope_theta": 1000000.0},
    "qwen3": {"head_dim": 128},
    "qwen3_5_moe_text": {"head_dim": 256, "partial_rotary_factor": 0.25},
    "qwen3_5_text": {"partial_rotary_factor": 0.25, "head_dim": 256},
    "qwen3_next": {"partial_rotary_factor": 0.25, "head_dim": 256},
    "qwen3_omni_moe_talker_code_predictor": {"head_dim": 128},
    "qwen3_omni_moe_text": {"rope_theta": 1000000.0},
    "qwen3_vl_moe_text": {"rope_theta": 500000.0},
    "qwen3_vl_text": {"rope_theta": 500000.0, "head_dim": 128},
    "qwen4_exp_text": {"head_dim": 256},
    "recurrent_gemma": {"partial_rotary_factor": 0.5},
    "seed_oss": {"head_dim": 128},
    "smollm3": {"rope_theta": 2000000.0},
    "solar_open": {"head_dim": 128, "rope_theta": 1000000.0},
    "stablelm": {"partial_rotary_factor": 0.25},
    "stablelm_epoch": {"rope_pct": 0.25},
    "t5_gemma_module": {"head_dim": 256},
    "t5gemma2_decoder": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "head_dim": 256},
    "t5gemma2_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "head_dim": 256},
    "timesfm2_5": {"head_dim": 80},
    "vaultgemma": {"head_dim": 256},
    "voxtral_realtime_encoder": {"head_dim": 64},
    "xcodec2": {"head_dim": 64},
    "youtu": {"qk_rope_head_dim": 64},
    "zaya": {
        "head_dim": 128,
        "rope_parameters": {
            "hybrid": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "partial_rotary_factor": 0.5,
            },
            "hybrid_sliding": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    },
}

# Models that pair neighbouring elements of a head; the others of MODEL_DEFAULTS pair its halves.
INTERLEAVED = frozenset(
    """
    axk1 axk2 bailing_hybrid blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher
    codegen cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 ernie4_5
    ernie4_5_moe glm glm4 glm4_moe_lite glm_moe_dsa gptj helium llama4_text longcat_flash mistral4
    moonshine moonshine_streaming pe_audio_encoder pe_audio_video_encoder pe_video_encoder roformer
    youtu
    """.split()
)

# Models that rotate where their position_embedding_type is "rotary" or "rope", and nowhere else.
POSITION_TYPE_DECIDES = frozenset(
    "esm granitemoehybrid seamless_m4t seamless_m4t_v2 wav2vec2-bert wav2vec2-conformer".split()
)


class Unrotated(NamedTuple):
    """Which layers of a model do not rotate."""

    interval_name: str  # the field with the number n: every n-th layer does not rotate
    interval: int | None = 4  # n where the file does not say
    by_type: bool = False  # whether layer_types decides: only sliding layers rotate


# Models in which some layers do not rotate, though their file may not say so.
UNROTATED = {
    "afmoe": Unrotated("global_attn_every_n_layers", by_type=True),
    **dict.fromkeys(
        ("cohere2", "exaone4", "exaone_moe"), Unrotated("sliding_window_pattern", by_type=True)
    ),
    "flint": Unrotated("", None, by_type=True),
    "kolibri1": Unrotated("", 5, by_type=True),
    "llama4_text": Unrotated("no_rope_layer_interval"),
    "smollm3": Unrotated("no_rope_layer_interval"),
}

# Models whose config does not say enough, or whose rotation is of another kind; and why.
OTHER_ROTATIONS = {
    "chatglm": "whose rope_ratio multiplies the base in some versions and divides positions in "
    "others: where it is the base (ChatGLM3, GLM-4), write model_type 'glm', a rope_theta of "
    "10000 * rope_ratio and a head_dim of kv_channels",
    "clvp_encoder": "which rotates 32 elements or more, by a rule of its own",
    "efficientloftr": "which rotates hidden states by two axes before they are split into heads",
    "kimi_linear": "which has no rotation: its qk_rope_head_dim elements are not rotated",
    **dict.fromkeys(
        ("mistral_large4", "mistral_large4_text"),
        "whose frequencies are trained: its checkpoint's rotary_emb.alpha scales them by "
        "exp(alpha), so give these to from_inverse_frequencies",
    ),
    "musicflamingo": "whose rope_parameters are of its audio's times: pass its text_config",
    "vjepa2": "in which the two elements of a pair have angles of their own",
}

# Models that rotate by their partial_rotary_factor, whatever their rotary_dim says.
SHARE_DECIDES = frozenset(["minimax_m3_vl_text"])

# The builders of rope_cupy.diffusion, by the class that a config of diffusers names.
DIFFUSERS_BUILDERS = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "CogView4Transformer2DModel": "cogview4",
    "CosmosTransformer3DModel": "cosmos",
    "ErnieImageTransformer2DModel": "ernie_image",
    "Flux2Transformer2DModel": "flux2",
    "FluxTransformer2DModel": "flux",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "LTX2VideoTransformer3DModel": "ltx2_video",
    "LTXVideoTransformer3DModel": "ltx_video",
    "Lumina2Transformer2DModel": "lumina2",
    "MochiTransformer3DModel": "mochi",
    "QwenImage21Transformer2DModel": "qwen_image21",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "z_image",
}

# Fields of a dict without a model_type that is a config of diffusers.
DIFFUSERS_FIELDS = (
    *("_diffusers_version", "_use_default_values", "axes_dims_rope", "axes_dims", "axes_dim"),
    *("rope_axes_dim", "in_channels", "rope_max_seq_len"),
)


class Axes(NamedTuple):
    """How a model rotates the pairs of a head by the positions of its tokens on several axes."""

    names: tuple[str, ...] = ("height", "width")
    order: tuple[int, ...] = (0, 1)  # of the axes, in a head
    alternating: bool = False  # whether axes alternate pair by pair
    of_whole_head: bool = False  # whether axes share the frequencies of a whole head
    interleaved: bool = False
    num_slices: int = 1  # of a head, each rotated by a call of its own
    base: float = 10000.0
    first: float | None = 0.0  # the first position on every axis; None: centres from -1 to 1
    turns: bool = False  # whether the frequencies are in turns, not in radians


_HALVES = Axes()
_NEIGHBOURS = Axes(interleaved=True)
_CENTRES = Axes(base=100.0, first=None, turns=True)

# Models that rotate by several axes, by the model_type of the part that rotates.
SEVERAL_AXES = {
    **dict.fromkeys(
        """
        cohere_compass_vision dots3_note_vision_encoder ernie4_5_vl_moe_vision exaone4_5_vision
        glm4v_vision glm4v_moe_vision glm5_next_vision glm_ocr_vision mlcd_vision_model
        muse_glimmer_vision muse_spark_vision paddleocr_vl_vision qwen2_5_omni_vision_encoder
        qwen2_5_vl_vision qwen2_vl_vision qwen3_5_vision qwen3_5_moe_vision
        qwen3_omni_moe_vision_encoder qwen3_vl_vision qwen3_vl_moe_vision qwen4_exp_vision
        video_llama_3_vision
        """.split(),
        _HALVES,
    ),
    **dict.fromkeys(
        ("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_vit_model"), _NEIGHBOURS
    ),
    **dict.fromkeys(("dinov3_vit", "eomt_dinov3", "sapiens2"), _CENTRES),
    "ernie4_5_vl_moe_text": Axes(
        ("time", "height", "width"), (1, 2, 0), of_whole_head=True, interleaved=True, base=500000.0
    ),
    "gemma4_vision": _HALVES._replace(num_slices=2, base=100.0),
    "inkling2_vision": _NEIGHBOURS._replace(order=(1, 0)),
    "kimi_k25_vision": Axes(order=(1, 0), alternating=True),
    "lfm3_vl_vision": _HALVES._replace(base=1e6),
    "llama4_vision_model": _NEIGHBOURS._replace(order=(1, 0), first=1.0),
    "minimax_m3_vl_vision": Axes(("time", "height", "width"), (0, 1, 2)),
    "pixtral": Axes(of_whole_head=True),
    "step3p5_vision": Axes(order=(1, 0)),
}
