"""Transformers of diffusers, small and random: what each is called with, how often it rotates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from blocks import grid

diffusers = pytest.importorskip("diffusers")

from rope_cupy.integrations import _diffusers_prologue as prologue  # noqa: E402
from rope_cupy.integrations import diffusers as integration  # noqa: E402

CALLS = "apply_qk_norm_rotary", "apply_rotary_qk", "apply_norm_rotary", "join_qkv"
# Of the largest output: norm and rotation round to float32, by 2**-24, a few times in each block.
TOLERANCE = 2.0**-20

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
TWO = {"num_layers": 1, "num_single_layers": 1}
FLUX_SIZES = {
    **HEADS,
    **TWO,
    "in_channels": 4,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}
WAN_SIZES = {"num_attention_heads": 2, "attention_head_dim": 20, **CHANNELS, "num_layers": 2}
WAN_SIZES |= {"text_dim": 12, "freq_dim": 16, "ffn_dim": 24}
HUNYUAN_SIZES = {**HEADS, **CHANNELS, "num_refiner_layers": 1, "text_embed_dim": 12}
COGVIDEO_SIZES = {**HEADS, **CHANNELS, "num_layers": 2, "time_embed_dim": 8, "text_embed_dim": 12}
COGVIDEO_SIZES |= {
    "sample_width": 10,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
}
COGVIEW_SIZES = {**HEADS, **CHANNELS, "num_layers": 2, "time_embed_dim": 8, "condition_dim": 4}
LTX_SIZES = {
    **HEADS,
    **CHANNELS,
    "num_layers": 2,
    "caption_channels": 12,
    "cross_attention_dim": 32,
}
HIDREAM_SIZES = {**HEADS, **CHANNELS, **TWO, "patch_size": 2, "caption_channels": [12, 10]}
HIDREAM_SIZES |= {"text_emb_dim": 6, "num_routed_experts": 2, "num_activated_experts": 1}
HIDREAM_SIZES |= {"axes_dims_rope": (4, 4, 8), "max_resolution": (8, 8), "llama_layers": [0, 1]}
HIDREAM_SIZES |= {"force_inference_output": True}
AUDIO = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
AUDIO |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}


class Tiny(NamedTuple):
    """A class of models, its config, the inputs of a call, and how many of our calls it makes."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    calls: int
    compiles: bool = True  # in one graph, as diffusers writes it
    trains: bool = True  # its table needs no gradient


def mask(*lengths, width=7):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def joint(axes=3, **more):
    """An image of 5 by 6 tokens and 7 of a text, with positions of some axes."""
    ids = torch.cat([torch.zeros(30, axes - 2), grid(5, 6).float()], 1)
    tokens = {
        "hidden_states": torch.randn(2, 30, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }
    places = {"img_ids": ids, "txt_ids": torch.zeros(7, axes), "timestep": torch.tensor([0.3, 0.9])}
    return tokens | places | more


def video(text=7, width=12, **more):
    """A video of 3 by 8 by 10 and a text."""
    tokens = {"encoder_hidden_states": torch.randn(2, text, width)}
    latents = {"hidden_states": torch.randn(2, 4, 3, 8, 10), "timestep": torch.tensor([30, 900])}
    return tokens | latents | more


def image(height=8, width=10, **more):
    """An image and a text."""
    tokens = {"encoder_hidden_states": torch.randn(2, 7, 12), "timestep": torch.tensor([0.3, 0.9])}
    return {"hidden_states": torch.randn(2, 4, height, width)} | tokens | more


def qwen_image():
    inputs = joint()
    del inputs["img_ids"], inputs["txt_ids"]
    shapes = {"img_shapes": [[(1, 5, 6)]] * 2, "encoder_hidden_states_mask": mask(7, 5)}
    return inputs | shapes | {"hidden_states": torch.randn(2, 30, 16)}


def cogvideox():
    angles = torch.randn(60, 8).repeat_interleave(2, -1)
    frames = {"hidden_states": torch.randn(2, 3, 4, 8, 10)}
    return video() | frames | {"image_rotary_emb": (angles.cos(), angles.sin())}


def cogview(**more):
    sizes = {"target_size": torch.tensor([[8.0, 10.0]] * 2), "crop_coords": torch.zeros(2, 2)}
    return image(timestep=torch.tensor([30, 900]), attention_mask=mask(7, 5).int()) | sizes | more


def glm_image():
    prior = {"prior_token_id": torch.randint(16, (2, 20))}
    return cogview(prior_token_drop=torch.zeros(2, 20, dtype=torch.bool), **prior)


def ltx(**more):
    sizes = {"num_frames": 2, "height": 3, "width": 4}
    return video() | {"hidden_states": torch.randn(2, 24, 4)} | sizes | more


def ltx_of_points():
    points = torch.rand(2, 3, 24) * torch.tensor([20.0, 2048.0, 2048.0])[:, None]
    return ltx(encoder_attention_mask=mask(7, 5), video_coords=points)


def ltx2():
    audio = {"audio_hidden_states": torch.randn(2, 10, 4), "audio_num_frames": 10}
    return ltx(audio_encoder_hidden_states=torch.randn(2, 7, 12), **audio)


def z_image():
    x, texts = [torch.randn(4, 1, 8, 10), torch.randn(4, 1, 8, 6)], [7, 5]
    texts = [torch.randn(length, 12) for length in texts]
    return {"x": x, "t": torch.tensor([0.3, 0.9]), "cap_feats": texts}


def hunyuan_video15():
    second = {
        "encoder_hidden_states_2": torch.randn(2, 4, 10),
        "timestep": torch.tensor([3.0, 9.0]),
    }
    masks = {"encoder_attention_mask": mask(7, 5), "encoder_attention_mask_2": mask(3, 4, width=4)}
    return video(image_embeds=torch.randn(2, 3, 6)) | second | masks


def hidream(width=8):
    texts = {"encoder_hidden_states_t5": torch.randn(2, 5, 12), "pooled_embeds": torch.randn(2, 6)}
    texts |= {"encoder_hidden_states_llama3": torch.randn(2, 2, 7, 10)}
    return texts | {
        "hidden_states": torch.randn(2, 4, 8, width),
        "timesteps": torch.tensor([30, 900]),
    }


def omnigen():
    text = {"input_ids": torch.randint(16, (2, 7)), "attention_mask": torch.ones(2, 28, 28)}
    images = {
        "input_img_latents": [],
        "input_image_sizes": {},
        "timestep": torch.tensor([0.3, 0.9]),
    }
    places = {"position_ids": torch.arange(28)[None].repeat(2, 1)}
    return text | images | places | {"hidden_states": torch.randn(2, 4, 8, 10)}


def ernie_image():
    text = {"text_bth": torch.randn(2, 7, 12), "text_lens": torch.tensor([7, 5])}
    return text | {"hidden_states": torch.randn(2, 4, 5, 6), "timestep": torch.tensor([0.3, 0.9])}


def text_layers():
    return joint(text_encoder_layers=[torch.randn(2, 7, 6) for _ in range(2)])


def text_of_layers():
    return image(encoder_hidden_states=torch.randn(2, 2, 7, 12))


def control():
    states = torch.randn(2, 6, 3, 8, 10)
    return video(control_hidden_states=states, control_hidden_states_scale=torch.ones(1))


ONE = torch.ones(2)
APPROXIMATOR = {"approximator_num_channels": 64, "approximator_hidden_dim": 8}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
TINY = [
    Tiny(
        *("FluxTransformer2DModel", FLUX_SIZES | {"pooled_projection_dim": 8}),
        *(lambda: joint(pooled_projections=torch.randn(2, 8)), 2),
    ),
    Tiny(
        *("ChromaTransformer2DModel", FLUX_SIZES | APPROXIMATOR | {"approximator_layers": 1}),
        *(lambda: joint(attention_mask=mask(37, 33, width=37)), 2),
    ),
    Tiny("BriaTransformer2DModel", FLUX_SIZES, joint, 2),
    Tiny("BriaFiboTransformer2DModel", FLUX_SIZES | {"text_encoder_dim": 6}, text_layers, 2),
    Tiny("LongCatImageTransformer2DModel", FLUX_SIZES | {"pooled_projection_dim": 12}, joint, 2),
    Tiny("OvisImageTransformer2DModel", FLUX_SIZES | CHANNELS, joint, 2),
    Tiny(
        "Flux2Transformer2DModel",
        FLUX_SIZES | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        *(lambda: joint(4, guidance=ONE), 2),
    ),
    Tiny(
        "Flux3Transformer2DModel",
        FLUX_SIZES | {"axes_dims_rope": (4,) * 4, "timestep_channels": 16, "cond_in_channels": 4},
        *(lambda: joint(4), 3),
    ),
    Tiny(
        "QwenImageTransformer2DModel",
        {**HEADS, "num_layers": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6)}
        | {"in_channels": 16, "out_channels": 4},
        *(qwen_image, 2),
    ),
    Tiny("WanTransformer3DModel", WAN_SIZES, video, 2),
    Tiny(
        *("WanTransformer3DModel", WAN_SIZES | {"image_dim": 6, "added_kv_proj_dim": 40}),
        *(lambda: video(512, encoder_hidden_states_image=torch.randn(2, 5, 6)), 2),
    ),
    Tiny(
        *("WanVACETransformer3DModel", WAN_SIZES | {"vace_layers": [0], "vace_in_channels": 6}),
        *(control, 3),
    ),
    Tiny("ChronoEditTransformer3DModel", WAN_SIZES, video, 2),
    Tiny("SkyReelsV2Transformer3DModel", WAN_SIZES, video, 2),
    Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN_SIZES | TWO | {"pooled_projection_dim": 6, "rope_axes_dim": (4, 4, 8)},
        lambda: video(
            encoder_attention_mask=mask(7, 5), pooled_projections=torch.randn(2, 6), guidance=ONE
        ),
        2,
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_SIZES
        | {"num_layers": 2, "text_embed_2_dim": 10, "image_embed_dim": 6}
        | {"rope_axes_dim": (4, 4, 8)},
        *(hunyuan_video15, 2, False),
    ),
    Tiny(
        *("HunyuanImageTransformer2DModel", HUNYUAN_SIZES | TWO | {"rope_axes_dim": (8, 8)}),
        *(lambda: image(5, 6, encoder_attention_mask=mask(7, 5)), 2),
    ),
    Tiny(
        "MotifVideoTransformer3DModel",
        {**HEADS, **CHANNELS, **TWO, "text_embed_dim": 12, "rope_axes_dim": (4, 4, 8)},
        *(lambda: video(encoder_attention_mask=mask(7, 5)), 2),
    ),
    Tiny(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2}
        | {"n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 4, 8], "axes_lens": [256, 32, 32]},
        *(z_image, 3),
    ),
    Tiny(
        "BriaFibo2Transformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
        | {"cap_feat_dim": 12, "injection_layer_ids": (1,), "perceiver_num_layers": 1}
        | {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2}
        | {"gist_min_text_len": 2, "gist_max_text_len": 16}
        | {"axes_dims": (4, 4, 8), "axes_lens": (64, 32, 32)},
        *(text_of_layers, 3),
    ),
    Tiny("LTXVideoTransformer3DModel", LTX_SIZES, ltx_of_points, 2),
    Tiny("LTX2VideoTransformer3DModel", LTX_SIZES | AUDIO, ltx2, 12),
    Tiny(
        "LTX2VideoTransformer3DModel",
        LTX_SIZES
        | AUDIO
        | {"rope_type": "split", "gated_attn": True, "audio_gated_attn": True}
        | {"perturbed_attn": True},
        *(ltx2, 12),
    ),
    Tiny(
        *(
            "CogVideoXTransformer3DModel",
            COGVIDEO_SIZES | {"use_rotary_positional_embeddings": True},
        ),
        *(cogvideox, 2),
    ),
    Tiny(
        *(
            "ConsisIDTransformer3DModel",
            COGVIDEO_SIZES | {"use_rotary_positional_embeddings": True},
        ),
        *(cogvideox, 2),
    ),
    Tiny(
        "Lumina2Transformer2DModel",
        {"in_channels": 4, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "cap_feat_dim": 12}
        | {"axes_dim_rope": (4, 4, 4), "axes_lens": (64, 32, 32)},
        *(lambda: image(encoder_attention_mask=mask(7, 5)), 3, False),
    ),
    Tiny(
        "CosmosTransformer3DModel",
        {**HEADS, **CHANNELS, "num_layers": 2, "text_embed_dim": 12, "adaln_lora_dim": 4}
        | {"max_size": (8, 16, 16), "extra_pos_embed_type": None, "concat_padding_mask": False},
        *(video, 2),
    ),
    Tiny(
        "CogView4Transformer2DModel",
        COGVIEW_SIZES | {"text_embed_dim": 12, "sample_size": 16, "rope_axes_dim": (16, 16)},
        *(lambda: cogview(original_size=torch.tensor([[8.0, 10.0]] * 2)), 2),
    ),
    Tiny(
        "GlmImageTransformer2DModel",
        COGVIEW_SIZES | {"text_embed_dim": 12, "prior_vq_quantizer_codebook_size": 16},
        *(glm_image, 2),
    ),
    Tiny("HiDreamImageTransformer2DModel", HIDREAM_SIZES, hidream, 2, False),
    Tiny("HiDreamImageTransformer2DModel", HIDREAM_SIZES, lambda: hidream(width=4), 2, False),
    Tiny(
        "SanaVideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, **CHANNELS, "num_layers": 2}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "sample_size": 8}
        | {"cross_attention_dim": 24, "caption_channels": 12},
        *(video, 2),
    ),
    Tiny(
        "OmniGenTransformer2DModel",
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"intermediate_size": 24, "num_layers": 2, "pad_token_id": 0, "vocab_size": 16}
        | {"rope_scaling": FACTORS, "pos_embed_max_size": 16, "time_step_dim": 16},
        *(omnigen, 2, False),
    ),
    Tiny(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 24}
        | {**CHANNELS, "text_in_dim": 12, "rope_axes_dim": (4, 4, 8)},
        *(ernie_image, 2),
    ),
    Tiny(
        "MochiTransformer3DModel",
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 8, "in_channels": 4}
        | {"text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 7},
        *(lambda: video(width=16, encoder_attention_mask=mask(7, 5)), 2, True, False),
    ),
]

FLUX, QWEN, WAN, LTX, HUNYUAN = (
    next(tiny for tiny in TINY if tiny.name.startswith(name))
    for name in ("FluxT", "QwenImageT", "WanT", "LTXVideoT", "HunyuanVideoT")
)


def build(tiny):
    """Return the model, in evaluation, with weights that all count, and the inputs of a call."""
    torch.manual_seed(41)
    model = getattr(diffusers, tiny.name)(**tiny.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
    return model, tiny.inputs()


def output_of(model, inputs):
    """Return all numbers that a call of a model gives, as one tensor."""
    return torch.cat([each.flatten() for each in _tensors(model(**inputs).to_tuple())])


def _tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for each in output for tensor in _tensors(each)]


def in_dtype(inputs, dtype):
    """Return inputs whose numbers have a dtype; positions and tables stay as they are."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        kept = "image_rotary_emb", "img_ids", "txt_ids"
        return {
            name: each if name in kept else in_dtype(each, dtype) for name, each in inputs.items()
        }
    return [in_dtype(each, dtype) for each in inputs] if isinstance(inputs, list) else inputs


def counted_calls(monkeypatch):
    """Return a list that gets the name of each of our functions that a model calls."""
    made = []

    def counted(name, function):
        def call(*args, **options):
            made.append(name)
            return function(*args, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(prologue, name, counted(name, getattr(prologue, name)))
    return made


def gradients(model, output, weights):
    return torch.autograd.grad((output * weights).sum(), [*model.parameters()], allow_unused=True)


def assert_switched(model, inputs, calls, expected_calls):
    """The output is that of the model, by our calls."""
    del calls[:]
    with torch.no_grad():
        found = output_of(model, inputs)
        assert len(calls) == expected_calls
        integration.disable(model)
        expected = output_of(model, inputs)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return expected
