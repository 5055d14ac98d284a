"""The shapes that the benchmarks rotate: those of real models by name, and groups of them.

A shape counts the tokens that are rotated: CogVideoX and HunyuanVideo leave their text tokens as
they are, Flux and Qwen-Image rotate them too.
"""

from __future__ import annotations

from typing import NamedTuple

TRAFFIC = 200e6  # bytes of bfloat16 q and k that the shapes of the group "head-dims" move


class Shape(NamedTuple):
    """q is (batch, tokens, q_heads, head_dim) and k (batch, tokens, k_heads, head_dim)."""

    name: str
    batch: int
    tokens: int
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    rotary_offset: int
    interleaved: bool


def _shape(
    name: str,
    tokens: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    rotary_dim: int = 0,
    rotary_offset: int = 0,
    interleaved: bool = False,
) -> Shape:
    rotary_dim = rotary_dim or head_dim
    return Shape(
        name, 1, tokens, q_heads, k_heads, head_dim, rotary_dim, rotary_offset, interleaved
    )


def _equal_traffic(head_dim: int, rotary_dim: int = 0) -> Shape:
    """Return a shape of 32 and 8 heads whose rotation in place moves TRAFFIC bytes of q and k."""
    rotated = rotary_dim or head_dim
    part = f"-rotary-{rotary_dim}" if rotary_dim else ""
    tokens = round(TRAFFIC / (2 * 2 * (32 + 8) * rotated))
    return _shape(f"head-dim-{head_dim}{part}", tokens, 32, 8, head_dim, rotary_dim)


DIFFUSION = [
    _shape("qwen-image", 4096 + 512, 24, 24, 128, interleaved=True),  # 1024 x 1024, 512 of text
    _shape("flux.1", 4096 + 512, 24, 24, 128, interleaved=True),  # 1024 x 1024, 512 of text
    _shape("wan-2.1-14b-720p", 21 * 45 * 80, 40, 40, 128, interleaved=True),  # 81 frames
    _shape("hunyuan-video-720p", 33 * 45 * 80, 24, 24, 128, interleaved=True),  # 129 frames
    _shape("cogvideox-5b", 13 * 30 * 45, 48, 48, 64, interleaved=True),  # 49 frames, 480 x 720
]
LANGUAGE = [
    _shape("llama-3-8b-prefill", 8192, 32, 8, 128),
    _shape("llama-3-8b-decode-1", 1, 32, 8, 128),
    _shape("llama-3-8b-decode-64", 64, 32, 8, 128),  # a token of each of 64 sequences
    _shape("llama-3-70b-prefill", 8192, 64, 8, 128),
    _shape("llama-3-70b-decode-1", 1, 64, 8, 128),
    _shape("llama-3-70b-decode-64", 64, 64, 8, 128),
    _shape("qwen3-8b-prefill", 8192, 32, 8, 128),
    _shape("qwen3-32b-decode-64", 64, 64, 8, 128),
    # The last 64 of the 192 elements of a query turn, and so does the one key of all heads.
    _shape("deepseek-v3-prefill", 4096, 128, 1, 192, 64, 128, interleaved=True),
    _shape("gemma-3-12b-prefill", 8192, 16, 8, 256),
]
SMALL = [
    _shape("1-token-32/8", 1, 32, 8, 128),
    _shape("32-tokens-64/8", 32, 64, 8, 128),
    _shape("64-tokens-32/8", 64, 32, 8, 128),
    _shape("1024-tokens-32/8", 1024, 32, 8, 128),
]
OTHER = [
    _shape("4096-tokens-32/1-d64", 4096, 32, 1, 64, interleaved=True),
    _shape("4096-tokens-32/8-d256", 4096, 32, 8, 256),
]
SWEEP = [
    _shape(f"sweep-{tokens}", tokens, 32, 8, 128)
    for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
]
HEAD_DIMS = [
    *map(_equal_traffic, (64, 72, 80, 96, 128, 160, 192, 256, 320, 512)),
    _equal_traffic(128, 64),
    _equal_traffic(96, 32),
    _equal_traffic(256, 64),
]

GROUPS = {
    "models": [*DIFFUSION, *LANGUAGE],
    "small": SMALL,
    "other": OTHER,
    "sweep": SWEEP,
    "head-dims": HEAD_DIMS,
}
GROUPS["all"] = [shape for group in GROUPS.values() for shape in group]
SHAPES = {shape.name: shape for shape in GROUPS["all"]}


def is_causal(shape: Shape) -> bool:
    """Return whether the attention of a shape is causal, which that of diffusion models is not."""
    return shape not in DIFFUSION


def chosen(names: str) -> list[Shape]:
    """Return the shapes of a list of names of shapes and groups with commas, each once.

    An unknown name is a ValueError.

    >>> [shape.tokens for shape in chosen("qwen-image,llama-3-8b-decode-1")]
    [4608, 1]
    """
    shapes: dict[str, Shape] = {}
    for name in names.split(","):
        if name not in GROUPS and name not in SHAPES:
            raise ValueError(f"no shape or group {name!r}; groups: {', '.join(GROUPS)}")
        for shape in GROUPS.get(name) or [SHAPES[name]]:
            shapes[shape.name] = shape
    return list(shapes.values())
