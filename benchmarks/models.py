"""Blocks and layers of diffusers and transformers: their sizes, random weights and inputs.

A library is imported when a block of it is made.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
ROOM = 128  # tokens that a static cache holds beyond those that have been seen


class Size(NamedTuple):
    """What is asked of a block: (frames, height, width) tokens of an image or a video, and text."""

    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text: int
    hidden: int = 0  # of a feed-forward layer, where a block is told

    @property
    def tokens(self) -> int:
        """The tokens of the image or video."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def dim(self) -> int:
        """The elements of a token."""
        return self.heads * self.head_dim


class Step(NamedTuple):
    """What is asked of a layer: sequences of tokens, behind those that a cache holds."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # of the layer's output
    feed_forward: int
    batch: int
    tokens: int
    cached: int = 0


class Model(NamedTuple):
    """A block or a layer, and what it is called with in its own dtype and in float32."""

    module: torch.nn.Module
    inputs: dict[str, Any]
    exact_inputs: dict[str, Any]


class Kind(NamedTuple):
    """Whose model it is, how it is made, its real size, and one for the CPU."""

    library: str
    make: Callable[[Any, str, torch.dtype], Model]
    size: Any
    small: Any


class FixedCache:
    """Keys and values of static length, of which every step writes the same tokens anew.

    It is a StaticCache of transformers whose counter stands still, so that a step can be repeated:
    keys and values are written by `index_copy_`, and their addresses are marked as static, without
    which no CUDA graph may write them.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, written: torch.Tensor) -> None:
        self.keys, self.values, self.written = keys, values, written
        for each in keys, values, written:
            torch._dynamo.mark_static_address(each)

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write keys and values (batch, heads, tokens, head_dim), and return all there are."""
        self.keys.index_copy_(2, self.written, keys)
        self.values.index_copy_(2, self.written, values)
        return self.keys, self.values


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Draw all weights so that layers keep the size of what they are given, and norms do something.

    Scores of the attention are about normal: with larger ones roundings of q and k count for more
    than those of anything else, with smaller ones for less.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.uniform_(parameter, 0.7, 1.3)
    return module.requires_grad_(False).eval()


def in_float32(value: Any) -> Any:
    """Return inputs of any structure with their floats in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: in_float32(each) for name, each in value.items()}
    if isinstance(value, FixedCache):
        wide = [each.float().clone() for each in (value.keys, value.values)]
        return FixedCache(*wide, value.written.clone())
    return type(value)(map(in_float32, value)) if isinstance(value, tuple | list) else value


def sharing_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module that has the same weights, not copies of them."""
    return copy.deepcopy(module, {id(each): each for each in module.parameters()})


def _modules_of(name: str) -> Any:
    return importlib.import_module(f"diffusers.models.transformers.transformer_{name}")


def _grid(*sizes: int, device: str) -> torch.Tensor:
    ranges = [torch.arange(size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(sizes)).float()


def _axes(size: Size) -> list[int]:
    """Return how many elements of a head are rotated by frame, by height and by width."""
    sixteenth = size.head_dim // 16
    return [2 * sixteenth, 7 * sixteenth, 7 * sixteenth]


def _model(module: torch.nn.Module, inputs: dict[str, Any]) -> Model:
    return Model(module, inputs, in_float32(inputs))


def _draws(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what draws random inputs, and those that most blocks have."""
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    return draw, {
        "hidden_states": draw(1, size.tokens, size.dim),
        "encoder_hidden_states": draw(1, size.text, size.dim),
        "temb": draw(1, size.dim),
    }


def flux(size: Size, device: str, dtype: torch.dtype, single: bool = False) -> Model:
    """A block of Flux: image and text by weights of their own, or (single) by the same."""
    of = _modules_of("flux")
    kind = of.FluxSingleTransformerBlock if single else of.FluxTransformerBlock
    with torch.device(device):
        block = randomized(kind(size.dim, size.heads, size.head_dim)).to(dtype)
    _, inputs = _draws(size, device, dtype)
    ids = [torch.zeros(size.text, 3, device=device), _grid(*size.grid, device=device)]
    inputs["image_rotary_emb"] = of.FluxPosEmbed(10000, _axes(size))(torch.cat(ids))
    return _model(block, inputs)


def qwen_image(size: Size, device: str, dtype: torch.dtype) -> Model:
    """A block of Qwen-Image: image and text, each with weights of its own, attend to each other."""
    of = _modules_of("qwenimage")
    with torch.device(device):
        block = randomized(of.QwenImageTransformerBlock(size.dim, size.heads, size.head_dim))
    _, inputs = _draws(size, device, dtype)
    rope = of.QwenEmbedRope(10000, _axes(size), scale_rope=True)
    inputs["encoder_hidden_states_mask"] = None
    inputs["image_rotary_emb"] = rope([size.grid], torch.device(device), size.text)
    return _model(block.to(dtype), inputs)


def wan(size: Size, device: str, dtype: torch.dtype) -> Model:
    """A block of Wan: the video attends to itself, with positions, and then to the text."""
    of = _modules_of("wan")
    with torch.device(device):
        block = of.WanTransformerBlock(size.dim, size.hidden, size.heads, cross_attn_norm=True)
    block = randomized(block).to(dtype)
    block.norm2.float()  # the model keeps these in float32
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    draw, inputs = _draws(size, device, dtype)
    frames, height, width = size.grid
    rope = of.WanRotaryPosEmbed(size.head_dim, (1, 2, 2), 1024).to(device)
    inputs["temb"] = draw(1, 6, size.dim)
    inputs["rotary_emb"] = rope(torch.empty(1, 1, frames, 2 * height, 2 * width, device=device))
    return _model(block, inputs)


def hunyuan_video(size: Size, device: str, dtype: torch.dtype, single: bool = False) -> Model:
    """A block of HunyuanVideo, of two streams or (single) of one."""
    of = _modules_of("hunyuan_video")
    kind = of.HunyuanVideoSingleTransformerBlock if single else of.HunyuanVideoTransformerBlock
    with torch.device(device):
        block = randomized(kind(size.heads, size.head_dim, 4.0)).to(dtype)
    _, inputs = _draws(size, device, dtype)
    frames, height, width = size.grid
    rope = of.HunyuanVideoRotaryPosEmbed(2, 1, _axes(size), 256.0)
    freqs = rope(torch.empty(1, 4, frames, 2 * height, 2 * width, device=device))
    inputs["attention_mask"] = None
    inputs["image_rotary_emb" if single else "freqs_cis"] = freqs
    return _model(block, inputs)


def z_image(size: Size, device: str, dtype: torch.dtype) -> Model:
    """A block of Z-Image, whose text and image are one sequence."""
    of, eighth = _modules_of("z_image"), size.head_dim // 8
    with torch.device(device):
        block = of.ZImageTransformerBlock(0, size.dim, size.heads, size.heads, 1e-5, True)
    axes = [2 * eighth, 3 * eighth, 3 * eighth]
    embed = of.RopeEmbedder(theta=256.0, axes_dims=axes, axes_lens=[1024, 512, 512])
    ids = torch.cat([_grid(size.text, 1, 1, device="cpu"), _grid(*size.grid, device="cpu")])
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = {
        "x": draw(1, size.tokens + size.text, size.dim),
        "attn_mask": None,
        "freqs_cis": embed(ids.int())[None].to(device),
        "adaln_input": draw(1, min(size.dim, 256)),
    }
    return _model(randomized(block).to(dtype), inputs)


def ltx(size: Size, device: str, dtype: torch.dtype) -> Model:
    """A block of LTX-Video."""
    of = _modules_of("ltx")
    with torch.device(device):
        block = of.LTXVideoTransformerBlock(
            size.dim, size.heads, size.head_dim, size.dim, elementwise_affine=True
        )
    draw, inputs = _draws(size, device, dtype)
    rope = of.LTXVideoRotaryPosEmbed(size.dim).to(device)
    inputs["temb"] = draw(1, 1, 6 * size.dim)
    inputs["image_rotary_emb"] = rope(inputs["hidden_states"].float(), *size.grid)
    return _model(randomized(block).to(dtype), inputs)


def decoder_layer(model_type: str, step: Step, device: str, dtype: torch.dtype) -> Model:
    """A layer of a language model, in a prefill or in a step behind cached tokens."""
    of = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        model_type,
        hidden_size=step.hidden,
        intermediate_size=step.feed_forward,
        num_attention_heads=step.heads,
        num_key_value_heads=step.kv_heads,
        head_dim=step.head_dim,
        num_hidden_layers=1,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
    )
    name = {"llama": "Llama", "qwen3": "Qwen3"}[model_type]
    with torch.device(device):
        layer = randomized(getattr(of, f"{name}DecoderLayer")(config, 0)).to(dtype)
        rope = getattr(of, f"{name}RotaryEmbedding")(config)
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    x = draw(step.batch, step.tokens, step.hidden)
    positions = torch.arange(step.cached, step.cached + step.tokens, device=device)
    positions = positions.expand(step.batch, -1)
    inputs: dict[str, Any] = {"hidden_states": x, "attention_mask": None}
    if step.cached:  # as in generate(cache_implementation="static"), whose masks are of all tokens
        length = step.cached + step.tokens + ROOM
        shape = step.batch, step.kv_heads, length, step.head_dim
        inputs["past_key_values"] = FixedCache(draw(shape), draw(shape), positions[0].clone())
        seen = torch.arange(length, device=device) <= positions[..., None]
        inputs["attention_mask"] = seen[:, None]
    exact = in_float32(inputs) | {"position_embeddings": rope(x.float(), positions)}
    return Model(layer, inputs | {"position_embeddings": rope(x, positions)}, exact)


llama = functools.partial(decoder_layer, "llama")
qwen3 = functools.partial(decoder_layer, "qwen3")

SMALL = Size(2, 32, (1, 6, 4), 10)
SMALL_STEP = Step(4, 2, 16, 64, 96, 2, 12)
LLAMA_8B = Step(32, 8, 128, 4096, 14336, 1, 8192)
QWEN3_8B = LLAMA_8B._replace(feed_forward=12288)
IMAGE = Size(24, 128, (1, 64, 64), 512)  # 1024 x 1024
VIDEO = Size(24, 128, (9, 34, 60), 256)
DECODE = {"tokens": 1, "cached": 2048}

KINDS = {
    "flux": Kind(DIFFUSERS, flux, IMAGE, SMALL),
    "flux-single": Kind(DIFFUSERS, functools.partial(flux, single=True), IMAGE, SMALL),
    "qwen-image": Kind(DIFFUSERS, qwen_image, IMAGE, SMALL),
    "z-image": Kind(DIFFUSERS, z_image, IMAGE._replace(heads=30), SMALL),
    "ltx": Kind(DIFFUSERS, ltx, Size(32, 64, (13, 16, 24), 512), SMALL),
    "hunyuan-video": Kind(DIFFUSERS, hunyuan_video, VIDEO, SMALL),
    "hunyuan-video-single": Kind(
        DIFFUSERS, functools.partial(hunyuan_video, single=True), VIDEO, SMALL
    ),
    "wan-2.1-14b": Kind(  # 480p, 81 frames
        *(DIFFUSERS, wan, Size(40, 128, (21, 30, 52), 512, 13824), SMALL._replace(hidden=48))
    ),
    "llama-3-8b-prefill": Kind(TRANSFORMERS, llama, LLAMA_8B, SMALL_STEP),
    "llama-3-8b-decode-1": Kind(
        *(TRANSFORMERS, llama, LLAMA_8B._replace(**DECODE), SMALL_STEP._replace(tokens=1, cached=9))
    ),
    "llama-3-8b-decode-32": Kind(
        *(TRANSFORMERS, llama, LLAMA_8B._replace(batch=32, **DECODE)),
        SMALL_STEP._replace(batch=3, tokens=1, cached=9),
    ),
    "qwen3-8b-prefill": Kind(TRANSFORMERS, qwen3, QWEN3_8B, SMALL_STEP),
    "qwen3-8b-decode-1": Kind(
        *(TRANSFORMERS, qwen3, QWEN3_8B._replace(**DECODE), SMALL_STEP._replace(tokens=1, cached=9))
    ),
    "qwen3-8b-decode-32": Kind(
        *(TRANSFORMERS, qwen3, QWEN3_8B._replace(batch=32, **DECODE)),
        SMALL_STEP._replace(batch=3, tokens=1, cached=9),
    ),
}
