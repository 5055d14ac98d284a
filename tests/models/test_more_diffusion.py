"""More tables by model: against their formula in extended precision, and the models' own modules.

Tables are compared in full width, a cosine and a sine for each element, in the pairing of the
model. So a case says all of its model: the angles, their places in a head and how q is rotated.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from blocks import transformer
from test_diffusion import ANGLE_ERROR, LIBRARIES, LONG_PI, angles, grid, text_at
from test_producers import default_dtype

from rope_cupy import RotaryTable, apply_rotary, diffusion, image_tables, video_tables
from rope_cupy.frequencies import axial_from_config, inverse_frequencies
from rope_cupy.tables import source_of


class Case(NamedTuple):
    build: Callable[..., Any]  # (like=, compute_dtype=) -> RotaryTable
    angles: Callable[[], Any]  # of each pair, or each element, in extended precision
    library: Callable[[str], Any]  # (device) -> (cos, sin) of the module, in full width
    rotate: Callable[..., Any]  # (q) -> q rotated by the model's own function
    interleaved: bool
    elementwise: bool = False


def doubled(half, interleaved):
    return np.repeat(half, 2, -1) if interleaved else np.concatenate([half, half], -1)


def full_width_angles(case):
    exact = case.angles()
    return exact if case.elementwise else doubled(exact, case.interleaved)


def numbers_of(table, interleaved):
    """The cosine and sine of each element, from the rotation of (1, 0) and of (0, 1)."""
    *rows, num_pairs = table.shape
    if len(rows) == 3:  # of each head
        shape, squeezed = (*rows, 2 * num_pairs), lambda x: x
    else:
        shape, squeezed = (*rows, 1, 2 * num_pairs), lambda x: x[..., 0, :]
    first = slice(0, None, 2) if interleaved else slice(0, num_pairs)
    second = slice(1, None, 2) if interleaved else slice(num_pairs, None)
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for one, other, sign in ((first, second, 1), (second, first, -1)):
        x = np.zeros(shape, np.float32)
        x[..., one] = 1
        y = apply_rotary(x, table, interleaved=interleaved)
        cos[..., one], sin[..., other] = y[..., one], sign * y[..., other]
    return squeezed(cos), squeezed(sin)


def arrays(pair):
    return tuple(np.asarray(each.detach().cpu()) for each in pair)


def embeddings():
    return pytest.importorskip("diffusers.models.embeddings")


def seen_by_attention(monkeypatch_target, name, processor, attn, *inputs, **options):
    """The query that a processor hands to its attention."""
    seen = []

    def attention(query, key, value, *_, **__):
        seen.append(query)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monkeypatch_target, name, attention)
        processor(attn, *inputs, **options)
    return seen[0]


def same(x, *_):
    return x


def random_q(tokens, heads, head_dim):
    return torch.from_numpy(
        np.random.default_rng(12).standard_normal((1, tokens, heads, head_dim), np.float32)
    )


# CogView 4


def cogview4(size, text_length=0, head_dim=128, base_size=(256, 256)):
    height, width = size

    def pair(device):
        rope = transformer("transformer_cogview4").CogView4RotaryPosEmbed
        latent = torch.empty(1, 16, 2 * height, 2 * width, device=device)
        return rope(head_dim, 2, base_size)(latent)

    def library(device):
        cos, sin = arrays(pair(device))
        still = np.zeros((text_length, head_dim), np.float32)
        return np.concatenate([still + 1, cos]), np.concatenate([still, sin])

    def rotate(q):
        text, image = q.transpose(1, 2).split([text_length, height * width], 2)
        image = embeddings().apply_rotary_emb(image, pair("cpu"), use_real_unbind_dim=-2)
        return torch.cat([text, image], 2).transpose(1, 2)

    rows = [
        (row * base_size[0] // height, column * base_size[1] // width)
        for row, column in grid(*size)
    ]
    points = [(0, 0)] * text_length + rows
    options = {"text_length": text_length, "head_dim": head_dim, "base_size": base_size}
    return Case(
        lambda **how: diffusion.cogview4(size, **options, **how),
        cache(lambda: angles(points, (head_dim // 2,) * 2, 10000)),
        *(library, rotate, False),
    )


# HunyuanImage 2.1


def hunyuan_image(size, text_length=0, dims=(64, 64), base=256.0):
    def pair(device):
        rope = transformer("transformer_hunyuanimage").HunyuanImageRotaryPosEmbed
        return rope([1] * len(size), list(dims), base)(torch.empty(1, 4, *size, device=device))

    def library(device):
        cos, sin = arrays(pair(device))
        still = np.zeros((text_length, sum(dims)), np.float32)
        return np.concatenate([cos, still + 1]), np.concatenate([sin, still])

    def rotate(q):
        image, text = q.split([math.prod(size), text_length], 1)
        image = embeddings().apply_rotary_emb(image, pair("cpu"), sequence_dim=1)
        return torch.cat([image, text], 1)

    points = grid(*size) + [(0,) * len(size)] * text_length
    options = {"text_length": text_length, "dims": dims, "base": base}
    return Case(
        lambda **how: diffusion.hunyuan_image(size, **options, **how),
        cache(lambda: angles(points, dims, base)),
        *(library, rotate, True),
    )


# ERNIE-Image


def ernie_image(size, lengths, dims=(32, 48, 48), base=256):
    several = not isinstance(lengths, int)
    each = lengths if several else [lengths]
    text = [(step, 0, 0) for step in range(max(each))]
    points = [grid(1, *size, start=(length, 0, 0)) + text for length in each]

    def freqs(device):
        rope = transformer("transformer_ernie_image").ErnieImageEmbedND3(sum(dims), base, dims)
        return rope(torch.tensor(points, dtype=torch.float32, device=device))

    def library(device):
        found = freqs(device)[:, :, 0]
        found = found if several else found[0]
        return arrays((found.cos(), found.sin()))

    def rotate(q):
        module = transformer("transformer_ernie_image")
        attn = SimpleNamespace(
            to_q=same, to_k=same, to_v=same, norm_q=None, norm_k=None, heads=q.shape[2]
        )
        attn.to_out = [same, same]
        return seen_by_attention(
            *(module, "dispatch_attention_fn", module.ErnieImageSingleStreamAttnProcessor(), attn),
            q.flatten(2),
            freqs_cis=freqs("cpu"),
        )

    def exact():
        found = np.repeat(angles(points, dims, base), 2, -1)
        return found if several else found[0]

    return Case(
        lambda **how: diffusion.ernie_image(size, lengths, dims=dims, base=base, **how),
        *(cache(exact), library, rotate, False, True),
    )


# Qwen-Image 2.1


def qwen_image21(sizes, lengths, points):
    mask = []
    for length, size in itertools.zip_longest(lengths, sizes):
        mask += [False] * length + [True] * (math.prod(size) if size else 0)

    def turns(device):
        rope = transformer("transformer_qwenimage21").QwenImage21Rope(10000, [16, 56, 56])
        return rope(sizes, torch.tensor(mask, device=device), torch.device(device))

    def library(device):
        found = turns(device)
        return tuple(doubled(each, True) for each in arrays((found.real, found.imag)))

    def rotate(q):
        apply = transformer("transformer_qwenimage21").apply_rotary_emb_qwen
        return apply(q, turns("cpu"), use_real=False)

    return Case(
        lambda **how: diffusion.qwen_image21(sizes, lengths, **how),
        cache(lambda: angles(points, (16, 56, 56), 10000)),
        *(library, rotate, True),
    )


# Cosmos


def cosmos(size, fps=None, head_dim=128, scale=(2.0, 1.0, 1.0), base_fps=24):
    def pair(device):
        rope = transformer("transformer_cosmos").CosmosRotaryPosEmbed
        rope = rope(head_dim, patch_size=(1, 1, 1), rope_scale=scale, base_fps=base_fps)
        return rope(torch.empty(1, 1, *size, device=device), fps=fps)

    def rotate(q):
        q, pairs = q.transpose(1, 2), pair("cpu")
        q = embeddings().apply_rotary_emb(q, pairs, use_real=True, use_real_unbind_dim=-2)
        return q.transpose(1, 2)

    side = head_dim // 6 * 2
    dims = head_dim - 2 * side, side, side

    def exact():
        points = np.array(grid(*size), np.longdouble)
        if fps:
            points[:, 0] *= np.longdouble(base_fps) / fps
        columns = []
        for axis, (dim, factor) in enumerate(zip(dims, scale, strict=True)):
            base = 10000 * np.longdouble(factor) ** (np.longdouble(dim) / (dim - 2))
            columns.append(angles(points[:, axis, None], (dim,), base))
        return np.concatenate(columns, -1)

    options = {"head_dim": head_dim, "scale": scale, "fps": fps, "base_fps": base_fps}
    return Case(
        lambda **how: diffusion.cosmos(size, **options, **how),
        *(cache(exact), lambda device: arrays(pair(device)), rotate, False),
    )


# Kandinsky 5


def kandinsky5(size, scale=(1.0, 1.0, 1.0), dims=(16, 24, 24), block_size=None):
    def matrices(device):
        module = transformer("transformer_kandinsky")
        rope = module.Kandinsky5RoPE3D(dims).to(device)
        places = [torch.arange(each, device=device) for each in size]
        found = rope((1, *size), places, scale)
        tokens = torch.empty(1, *size, 1, device=device)
        return module.fractal_flatten(tokens, found, (1, *size), block_mask=bool(block_size))[1]

    def library(device):
        found = matrices(device)[0, :, 0]
        assert torch.equal(found[..., 0, 1], -found[..., 1, 0])
        halves = arrays((found[..., 0, 0], found[..., 1, 0]))
        return tuple(doubled(half, True) for half in halves)

    def rotate(q):
        return kandinsky_rotated(q, matrices("cpu"))

    points = grid(*size)
    if block_size:
        points.sort(key=lambda at: (at[0], at[1] // 8, at[2] // 8))

    def exact():
        turns, start = angles(points, dims, 10000), 0
        for dim, each in zip(dims, scale, strict=True):
            turns[:, start : start + dim // 2] /= np.longdouble(each)
            start += dim // 2
        return turns

    options = {"scale": scale, "dims": dims, "block_size": block_size}
    return Case(
        lambda **how: diffusion.kandinsky5(size, **options, **how),
        *(cache(exact), library, rotate, True),
    )


def kandinsky_rotated(q, matrices):
    module = transformer("transformer_kandinsky")
    attn = SimpleNamespace(to_query=same, to_key=same, to_value=same, num_heads=q.shape[2])
    attn.query_norm = attn.key_norm = attn.out_layer = same
    return seen_by_attention(
        *(module, "dispatch_attention_fn", module.Kandinsky5AttnProcessor(), attn, q.flatten(2)),
        rotary_emb=matrices,
    )


# Mochi


def mochi(size, heads, head_dim, base_size=(192, 192)):
    shape = 3, heads, head_dim // 2
    frequencies = np.random.default_rng(9).standard_normal(shape).astype("float32")

    def pair(device):
        rope = transformer("transformer_mochi").MochiRoPE(*base_size)
        turns = torch.from_numpy(frequencies).to(device)
        with warnings.catch_warnings():  # of PyTorch, which has no autocast to float32 on the CPU
            warnings.simplefilter("ignore", UserWarning)
            return rope(turns, *size, device=torch.device(device), dtype=torch.float32)

    def library(device):
        return tuple(doubled(half[None], True) for half in arrays(pair(device)))

    def rotate(q):
        module = pytest.importorskip("diffusers.models.attention_processor")
        names = "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
        attn = SimpleNamespace(**dict.fromkeys(names, same), heads=heads, to_out=[same, same])
        attn.norm_q = attn.norm_k = attn.norm_added_q = attn.norm_added_k = None
        x, text = q.flatten(2), torch.zeros(1, 2, heads * head_dim)
        found = seen_by_attention(
            *(module.F, "scaled_dot_product_attention", module.MochiAttnProcessor2_0(), attn),
            *(x, text, torch.ones(1, 2)),
            image_rotary_emb=pair("cpu"),
        )
        return found.transpose(1, 2)[:, : x.shape[1]]

    def exact():
        _, height, width = size
        scale = np.sqrt(np.longdouble(math.prod(base_size)) / (height * width))
        points = np.array(grid(*size), np.longdouble)
        points[:, 1] = (points[:, 1] + 0.5 - np.longdouble(height) / 2) * scale
        points[:, 2] = (points[:, 2] + 0.5 - np.longdouble(width) / 2) * scale
        terms = points[:, :, None, None] * frequencies.astype(np.longdouble)
        return terms.sum(1)[None]

    return Case(
        lambda **how: diffusion.mochi(size, frequencies, base_size=base_size, **how),
        *(cache(exact), library, rotate, True),
    )


# LTX-2

OFFSET = 1
COORDINATES = np.random.default_rng(4).uniform(0, 9, (2, 3, 50, 2)).astype("float32")
COORDINATES *= np.array([1, 60, 80], np.float32)[:, None, None]


def ltx2_angles(middles, wholes, heads, head_dim):
    """`middles` is of shape (batch, tokens, axes)."""
    shares = np.array(middles, np.longdouble) / np.array(wholes, np.longdouble)
    axes, num_pairs = len(wholes), heads * head_dim // 2
    num_steps = num_pairs // axes
    columns = [np.zeros(shares.shape[:2])] * (num_pairs - num_steps * axes)
    for step in range(num_steps):
        power = np.longdouble(step) / max(num_steps - 1, 1)
        largest = np.longdouble(10000) ** power * LONG_PI / 2
        columns += [largest * (2 * shares[..., axis] - 1) for axis in range(axes)]
    return np.stack(columns, -1).reshape(*shares.shape[:2], heads, head_dim // 2)


def ltx2(builder, given, coords, middles, heads, head_dim, interleaved, wholes, rope, **options):
    """`coords` are the module's own, by (module, device), or None for `given` as they are."""

    def pair(device):
        kind = transformer("transformer_ltx2").LTX2AudioVideoRotaryPosEmbed
        module = kind(
            dim=heads * head_dim,
            rope_type="interleaved" if interleaved else "split",
            num_attention_heads=heads,
            double_precision=options.get("double_precision", True),
            **rope,
        )
        found = coords(module, device)
        return module(found, device=device)

    def library(device):
        cos, sin = pair(device)
        if interleaved:
            return arrays(each.unflatten(-1, (heads, -1)) for each in (cos, sin))
        halves = arrays(each.swapaxes(1, 2) for each in (cos, sin))
        return tuple(doubled(half, False) for half in halves)

    def rotate(q):
        module = transformer("transformer_ltx2")
        apply = (
            module.apply_interleaved_rotary_emb if interleaved else module.apply_split_rotary_emb
        )
        return apply(q.flatten(2), pair("cpu")).unflatten(2, (heads, -1))

    return Case(
        lambda **how: getattr(diffusion, builder)(
            given, num_heads=heads, head_dim=head_dim, **options, **how
        ),
        cache(lambda: ltx2_angles(middles(), wholes, heads, head_dim)),
        *(library, rotate, interleaved),
    )


def video_middles(size, fps=24, scale=(8, 32, 32), offset=OFFSET):
    rows = []
    for frame, row, column in grid(*size):
        edges = [max((frame + end) * scale[0] + offset - scale[0], 0) for end in (0, 1)]
        second = np.longdouble(sum(edges)) / 2 / np.longdouble(fps)
        rows.append((second, (row + 0.5) * scale[1], (column + 0.5) * scale[2]))
    return np.array(rows, np.longdouble)[None]


def audio_middles(frames, start=0, scale=4, hop=160, rate=16000):
    rows = []
    for frame in range(start, start + frames):
        edges = [max((frame + end) * scale + OFFSET - scale, 0) for end in (0, 1)]
        rows.append((np.longdouble(sum(edges)) * hop / rate / 2,))
    return np.array(rows)[None]


VIDEO_ROPE = {"modality": "video"}
AUDIO_ROPE = {"modality": "audio", "scale_factors": [4]}
BIG = 20, 2048, 2048


def video_case(size, heads=4, head_dim=128, interleaved=False, fps=24.0, **options):
    rope = {**VIDEO_ROPE}
    if "scale" in options:
        rope["scale_factors"] = options["scale"]
    if "causal_offset" in options:
        rope["causal_offset"] = options["causal_offset"]
    scale, offset = options.get("scale", (8, 32, 32)), options.get("causal_offset", OFFSET)
    return ltx2(
        *("ltx2_video", size),
        lambda module, device: module.prepare_video_coords(1, *size, device, fps=fps),
        lambda: video_middles(size, fps, scale, offset),
        *(heads, head_dim, interleaved, BIG, rope),
        fps=fps,
        **options,
    )


def cross_case(size, heads=4, head_dim=64, interleaved=False, fps=24.0, base_size=20):
    return ltx2(
        *("ltx2_video_cross", size),
        lambda module, device: module.prepare_video_coords(1, *size, device, fps=fps)[:, 0:1],
        lambda: video_middles(size, fps)[..., :1],
        *(heads, head_dim, interleaved, (base_size,), VIDEO_ROPE | {"base_num_frames": base_size}),
        fps=fps,
        base_size=base_size,
    )


def audio_case(frames, heads=4, head_dim=64, interleaved=False, start=0, **options):
    names = {"base_size": "base_num_frames"}
    rope = AUDIO_ROPE | {names.get(name, name): each for name, each in options.items()}
    sizes = options.get("hop_length", 160), options.get("sampling_rate", 16000)
    return ltx2(
        *("ltx2_audio", frames),
        lambda module, device: module.prepare_audio_coords(1, frames, device, shift=start),
        lambda: audio_middles(frames, start, 4, *sizes),
        *(heads, head_dim, interleaved, (options.get("base_size", 20),), rope),
        start=start,
        **options,
    )


def given_case(builder, axes, given_axes, heads, head_dim, interleaved, rope):
    coords = COORDINATES[:, :given_axes]
    middles = coords[:, :axes].astype(np.longdouble).mean(-1).swapaxes(1, 2)
    return ltx2(
        *(builder, coords),
        lambda _, device: torch.tensor(coords[:, :axes], device=device),
        lambda: middles,
        *(heads, head_dim, interleaved, BIG[:axes], rope),
    )


EDIT = [(1, 12, 9), (1, 40, 30)]
EDIT_AT = [
    *(text_at(0, 30) + grid(1, 12, 9, start=(30, -6, -5))),
    *(text_at(42, 5) + grid(1, 40, 30, start=(47, -20, -15)) + text_at(87, 3)),
]
SINGLE_AT = text_at(0, 60) + grid(1, 33, 64, start=(60, -17, -32))
BACK_TO_BACK = grid(1, 2, 3, start=(0, -1, -2)) + grid(1, 5, 1, start=(3, -3, -1))

CASES = {
    "cogview 4": cogview4((64, 64), text_length=20),
    "cogview 4, panorama": cogview4((45, 77)),
    "cogview 4, small heads": cogview4((9, 300), 3, head_dim=40, base_size=(100, 200)),
    "hunyuan image": hunyuan_image((64, 64), text_length=30),
    "hunyuan image, portrait": hunyuan_image((72, 40)),
    "hunyuan image, frames": hunyuan_image((2, 12, 17), 5, dims=(16, 56, 56), base=1000.0),
    "ernie image": ernie_image((64, 48), 40),
    "ernie image, a batch": ernie_image((12, 17), [40, 0, 7]),
    "ernie image, other dims": ernie_image((20, 9), 6, dims=(8, 4, 12), base=10000),
    "qwen image 2.1": qwen_image21([(1, 33, 64)], [60], SINGLE_AT),
    "qwen image 2.1, edit": qwen_image21(EDIT, [30, 5, 3], EDIT_AT),
    "qwen image 2.1, no text": qwen_image21([(1, 2, 3), (1, 5, 1)], [0, 0], BACK_TO_BACK),
    "cosmos": cosmos((4, 11, 20), fps=24),
    "cosmos, an image": cosmos((1, 64, 40)),
    "cosmos 2": cosmos((3, 11, 20), fps=16, scale=(20 / 24, 3.0, 3.0)),
    "cosmos, other": cosmos((9, 5, 7), fps=30, head_dim=40, scale=(1.0, 2.5, 4.0), base_fps=25),
    "cosmos, 23.976 a second": cosmos((9, 5, 7), fps=23.976, head_dim=64),
    "kandinsky 5": kandinsky5((5, 24, 16), scale=(1, 2, 2)),
    "kandinsky 5, large": kandinsky5((2, 33, 45), scale=(1.0, 3.16, 3.16)),
    "kandinsky 5, not scaled": kandinsky5((31, 4, 4)),
    "kandinsky 5, in blocks": kandinsky5((2, 24, 32), (1, 3.16, 3.16), (32, 48, 48), block_size=8),
    "mochi": mochi((3, 15, 26), 4, 16),
    "mochi, one patch a frame": mochi((2, 1, 1), 2, 8),
    "mochi, other base": mochi((5, 12, 8), 3, 32, base_size=(100, 300)),
    "ltx 2 video": video_case((3, 6, 9), 32, 128),
    "ltx 2 video, interleaved": video_case((4, 7, 10), interleaved=True, fps=25.0),
    "ltx 2 video, padded": video_case((2, 5, 3), 3, 14, fps=30.0),
    "ltx 2 video, padded, interleaved": video_case((2, 5, 3), 1, 10, True, fps=23.976),
    "ltx 2 video, other scale": video_case((6, 3, 2), scale=(4, 16, 8), causal_offset=0),
    "ltx 2 video, frequencies in float32": video_case((4, 5, 6), double_precision=False),
    "ltx 2 video by coordinates": given_case("ltx2_video", 3, 3, 2, 64, False, VIDEO_ROPE),
    "ltx 2 cross": cross_case((3, 6, 9), 32, 64),
    "ltx 2 cross, interleaved": cross_case((4, 5, 6), 1, 6, True, fps=30.0, base_size=30),
    "ltx 2 cross by coordinates": given_case("ltx2_video_cross", 1, 3, 2, 64, True, VIDEO_ROPE),
    "ltx 2 audio": audio_case(126, 32, 64),
    "ltx 2 audio, interleaved": audio_case(50, 2, 16, True, start=11),
    "ltx 2 audio, other rate": audio_case(
        50, 1, 2, hop_length=512, sampling_rate=44100, base_size=30
    ),
    "ltx 2 audio by coordinates": given_case("ltx2_audio", 1, 1, 2, 64, False, AUDIO_ROPE),
}

BUILDERS_OF_CASES = {
    "cogview4": ["cogview 4"],
    "cosmos": ["cosmos", "cosmos 2"],
    "ernie_image": ["ernie image"],
    "hunyuan_image": ["hunyuan image"],
    "kandinsky5": ["kandinsky 5"],
    "ltx2_audio": ["ltx 2 audio", "ltx 2 audio by coordinates"],
    "ltx2_video": ["ltx 2 video", "ltx 2 video by coordinates"],
    "ltx2_video_cross": ["ltx 2 cross", "ltx 2 cross by coordinates"],
    "mochi": ["mochi"],
    "qwen_image21": ["qwen image 2.1"],
}


def error_of(case, table, per_angle):
    """The worst error of a table, in units of an ulp of float32 and `per_angle` of the angle."""
    exact, worst = full_width_angles(case), 0.0
    sizes = np.abs(exact).max(tuple(range(exact.ndim - 1)))
    sizes = np.maximum(sizes, np.abs(exact).max((0, 1))) if exact.ndim == 4 else sizes
    assert (table.dtype, table.device) == ("float32", "cpu")
    found = numbers_of(table, case.interleaved)
    for numbers, wanted in zip(found, (np.cos(exact), np.sin(exact)), strict=True):
        assert numbers.shape == wanted.shape
        ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.longdouble)
        worst = max(worst, float((np.abs(numbers - wanted) / (ulp + per_angle * sizes)).max()))
    return worst


def test_every_builder_has_a_case():
    here = image_tables.__name__, video_tables.__name__
    mine = {name for name in diffusion.__all__ if getattr(diffusion, name).__module__ in here}
    assert {*BUILDERS_OF_CASES, "vision_encoder"} == mine
    assert {name.partition(",")[0] for name in CASES} == {
        *itertools.chain(*BUILDERS_OF_CASES.values())
    }


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CASES)
def test_a_table_is_exact_to_the_last_place_of_float32(name, library):
    case, like = CASES[name], LIBRARIES[library](1)
    table = case.build(like=like)
    assert type(source_of(table).arrays[0]) is type(like)
    assert error_of(case, table, 2.0**-49) <= 0.51


@pytest.mark.parametrize("name", CASES)
def test_in_float32_a_table_has_the_bits_of_the_librarys_own(name):
    case = CASES[name]
    table = case.build(like=torch.zeros(1), compute_dtype="float32")
    found = numbers_of(table, case.interleaved)
    for numbers, wanted in zip(found, case.library("cpu"), strict=True):
        assert wanted.dtype == np.float32 and np.array_equal(numbers, wanted)


@pytest.mark.parametrize("library", ["numpy", "jax"])
@pytest.mark.parametrize("name", CASES)
def test_other_libraries_compute_in_float32_with_the_error_of_float32(name, library):
    case, like = CASES[name], LIBRARIES[library](1)
    table = case.build(like=like, compute_dtype="float32")
    assert type(source_of(table).arrays[0]) is type(like)
    assert error_of(case, table, ANGLE_ERROR) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_in_float32_a_table_on_a_gpu_has_the_bits_of_the_librarys_own_there(name):
    case = CASES[name]
    table = case.build(like=torch.zeros(1, device="cuda"), compute_dtype="float32")
    assert table.device.startswith("cuda")
    parts = [part.cpu() for part in source_of(table).arrays]
    on_cpu = RotaryTable.from_elementwise(*parts) if case.elementwise else RotaryTable(*parts)
    found = numbers_of(on_cpu, case.interleaved)
    for numbers, wanted in zip(found, case.library("cuda"), strict=True):
        assert np.array_equal(numbers, wanted)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_q_is_rotated_as_by_the_models_own_function(name, compute_dtype):
    case = CASES[name]
    table = case.build(like=torch.zeros(1), compute_dtype=compute_dtype)
    *rows, num_pairs = table.shape
    batch = rows[0] if len(rows) > 1 and rows[0] > 1 else 1
    heads = rows[2] if len(rows) == 3 else 2
    q = random_q(rows[1] if len(rows) > 1 else rows[0], heads, 2 * num_pairs)
    q = q.repeat(batch, 1, 1, 1)
    wanted = case.rotate(q)
    largest = float(np.abs(full_width_angles(case)).max())
    rounding = 2.0**-7 if name.startswith("kandinsky") else 2.0**-21  # which returns bfloat16
    of_angles = 0 if compute_dtype == "float32" else ANGLE_ERROR * largest
    tolerance = 4 * (rounding + of_angles)  # of numbers up to 4 or 5
    found = apply_rotary(q, table, interleaved=case.interleaved)
    assert (found - wanted).abs().max() <= tolerance
    other = apply_rotary(q, table, interleaved=not case.interleaved)
    assert (other - wanted).abs().max() > tolerance or num_pairs == 1


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "half": lambda: default_dtype(torch.float16),
    "double": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_a_table_lies_beside_like_whatever_pytorchs_defaults_are(name, compute_dtype, default):
    like = torch.zeros(1)
    plain = CASES[name].build(like=like, compute_dtype=compute_dtype)
    with DEFAULTS[default]():
        table = CASES[name].build(like=like, compute_dtype=compute_dtype)
    pairs = zip(source_of(table).arrays, source_of(plain).arrays, strict=True)
    for mine, other in pairs:
        assert mine.device.type == "cpu" and torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arrays_of_any_dtype_are_coordinates_and_frequencies(dtype):
    coordinates = torch.from_numpy(COORDINATES).to(dtype)
    table = diffusion.ltx2_video(coordinates, num_heads=2, head_dim=12, like=coordinates)
    wide = coordinates.double().numpy()
    same_table = diffusion.ltx2_video(wide, num_heads=2, head_dim=12, like=wide)
    pairs = zip(numbers_of(table, True), numbers_of(same_table, True), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    turns = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 2, 4))).to(dtype)
    pairs = zip(
        numbers_of(diffusion.mochi((2, 3, 4), turns, like=turns), True),
        numbers_of(diffusion.mochi((2, 3, 4), turns.double().numpy(), like=wide), True),
        strict=True,
    )
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_the_audio_has_one_table_in_its_own_and_the_cross_attention_of_the_default_model():
    build = transformer("transformer_ltx2").LTX2VideoTransformer3DModel
    fields = {
        each.name: each.default for each in inspect.signature(build.__init__).parameters.values()
    }
    width = fields["audio_num_attention_heads"] * fields["audio_attention_head_dim"]
    assert width == fields["audio_cross_attention_dim"] == 32 * 64
    assert fields["pos_embed_max_pos"] == fields["audio_pos_embed_max_pos"] == 20


def test_the_modules_of_a_small_model_of_ltx_2_have_the_tables_of_the_docstrings():
    build = transformer("transformer_ltx2").LTX2VideoTransformer3DModel
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "audio_num_attention_heads": 2}
    sizes |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    sizes |= {"cross_attention_dim": 24, "caption_channels": 8, "num_layers": 0}
    model = build(**sizes, pos_embed_max_pos=20, audio_pos_embed_max_pos=30, rope_type="split")
    video = model.rope.prepare_video_coords(1, 2, 3, 4, "cpu", fps=25.0)
    audio = model.audio_rope.prepare_audio_coords(1, 9, "cpu")
    how = {"like": video, "compute_dtype": "float32", "num_heads": 2}
    pairs = [
        (model.rope(video), diffusion.ltx2_video((2, 3, 4), head_dim=12, fps=25.0, **how)),
        (model.audio_rope(audio), diffusion.ltx2_audio(9, head_dim=8, base_size=30, **how)),
        (
            model.cross_attn_rope(video[:, 0:1]),
            diffusion.ltx2_video_cross((2, 3, 4), head_dim=8, fps=25.0, base_size=30, **how),
        ),
        (
            model.cross_attn_audio_rope(audio[:, 0:1]),
            diffusion.ltx2_audio(9, head_dim=8, base_size=30, **how),
        ),
    ]
    for wanted, table in pairs:
        for half, whole in zip(wanted, numbers_of(table, False), strict=True):
            assert np.array_equal(doubled(half.swapaxes(1, 2).numpy(), False), whole)


def test_the_texts_of_kandinsky_5_have_the_table_of_the_docstring():
    rope = transformer("transformer_kandinsky").Kandinsky5RoPE1D(64)
    q = random_q(50, 3, 64)
    wanted = kandinsky_rotated(q, rope(torch.arange(50))[None])
    table = RotaryTable.from_inverse_frequencies(inverse_frequencies(64), 50, like=q)
    assert (apply_rotary(q, table, interleaved=True) - wanted).abs().max() < 2.0**-5


def test_defaults_are_those_of_the_models():
    def fields(module, name):
        build = getattr(transformer(module), name)
        parameters = inspect.signature(build.__init__).parameters.values()
        return {each.name: each.default for each in parameters}

    def defaults(builder):
        return {
            each.name: each.default
            for each in inspect.signature(getattr(diffusion, builder)).parameters.values()
        }

    cog = fields("transformer_cogview4", "CogView4Transformer2DModel")
    assert defaults("cogview4")["base_size"] == cog["rope_axes_dim"]
    image = fields("transformer_hunyuanimage", "HunyuanImageTransformer2DModel")
    mine = defaults("hunyuan_image")
    assert (mine["dims"], mine["base"]) == (image["rope_axes_dim"], image["rope_theta"])
    ernie = fields("transformer_ernie_image", "ErnieImageTransformer2DModel")
    mine = defaults("ernie_image")
    assert (mine["dims"], mine["base"]) == (ernie["rope_axes_dim"], ernie["rope_theta"])
    qwen = fields("transformer_qwenimage21", "QwenImage21Transformer2DModel")
    assert defaults("qwen_image21")["dims"] == qwen["axes_dims_rope"]
    world, mine = fields("transformer_cosmos", "CosmosTransformer3DModel"), defaults("cosmos")
    assert (mine["scale"], mine["head_dim"]) == (world["rope_scale"], world["attention_head_dim"])
    five = fields("transformer_kandinsky", "Kandinsky5Transformer3DModel")
    assert defaults("kandinsky5")["dims"] == five["axes_dims"]
    ltx, mine = fields("transformer_ltx2", "LTX2VideoTransformer3DModel"), defaults("ltx2_video")
    wanted = ltx["vae_scale_factors"], ltx["num_attention_heads"], ltx["attention_head_dim"]
    assert (mine["scale"], mine["num_heads"], mine["head_dim"]) == wanted
    mine = defaults("ltx2_audio")
    wanted = ltx["audio_scale_factor"], ltx["audio_hop_length"], ltx["audio_sampling_rate"]
    assert (mine["scale"], mine["hop_length"], mine["sampling_rate"]) == wanted


# Vision encoders

VISION_GRIDS = [(1, 4, 6), (3, 2, 8)]
ENCODERS = {  # the module of a model, its config, the class of its rotary embedding, its merge
    "qwen2_vl": ("Qwen2VLVisionConfig", "Qwen2VLVisionRotaryEmbedding", 2),
    "qwen3_vl": ("Qwen3VLVisionConfig", "Qwen3VLVisionRotaryEmbedding", 2),
    "qwen2_5_vl": ("Qwen2_5_VLVisionConfig", "Qwen2_5_VLVisionRotaryEmbedding", 2),
    "glm4v": ("Glm4vVisionConfig", "Glm4vVisionRotaryEmbedding", 2),
    "lfm3_vl": ("Lfm3VlVisionConfig", "Lfm3VlVisionRotaryEmbedding", 2),
    "paddleocr_vl": ("PaddleOCRVisionConfig", "PaddleOCRVisionRotaryEmbedding", 1),
    "kimi_k25": ("Kimi_K25VisionConfig", "Kimi_K25VisionRotaryEmbedding", 1),
    "minimax_m3_vl": ("MiniMaxM3VLVisionConfig", "MiniMaxM3VLVisionRotaryEmbedding", 2),
    "pixtral": ("PixtralVisionConfig", "PixtralVisionRotaryEmbedding", 1),
}


@pytest.mark.parametrize("model", ENCODERS)
def test_a_vision_encoder_has_the_table_of_its_module_in_the_order_of_its_patches(model):
    config_name, rope_name, merge_size = ENCODERS[model]
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    utils = pytest.importorskip("transformers.vision_utils")
    config = getattr(module, config_name)()
    rotation = axial_from_config(config)
    ids = utils.get_vision_position_ids(
        torch.tensor(VISION_GRIDS), merge_size, include_temporal=len(rotation.names) == 3
    )
    wanted = getattr(module, rope_name)(config)(torch.zeros(1), ids)
    table = diffusion.vision_encoder(config, VISION_GRIDS, like=ids.float(), merge_size=merge_size)
    assert not rotation.interleaved
    for numbers, theirs in zip(numbers_of(table, False), wanted, strict=True):
        assert np.abs(numbers - theirs.numpy()).max() <= 2.0**-23 + ANGLE_ERROR * 8
    if merge_size > 1:
        rows = diffusion.vision_encoder(config, VISION_GRIDS, like=ids.float())
        assert not np.array_equal(numbers_of(rows, False)[1], numbers_of(table, False)[1])


def test_a_vision_encoder_may_be_of_llama_4_or_dinov3():
    module = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = module.Llama4VisionConfig(
        hidden_size=32, num_attention_heads=2, image_size=40, patch_size=8
    )
    turns = module.Llama4VisionRotaryEmbedding(config)(torch.zeros(1))[:25, 0]
    table = diffusion.vision_encoder(config, (1, 5, 5), like=np.zeros(1))
    assert axial_from_config(config).interleaved
    found = numbers_of(table, True)
    for numbers, theirs in zip(found, (turns.real, turns.imag), strict=True):
        assert np.abs(numbers[:, ::2] - theirs.numpy()).max() < 1e-6
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = module.DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=4)
    wanted = module.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 12, 20))
    table = diffusion.vision_encoder(config, (1, 3, 5), like=np.zeros(1))
    for numbers, theirs in zip(numbers_of(table, False), wanted, strict=True):
        assert np.abs(numbers - theirs.numpy()).max() < 1e-5


def test_the_general_vision_encoder_is_that_of_qwen2_vl_and_pixtral():
    how = {"like": np.zeros(1)}
    config = {"model_type": "qwen2_vl_vision", "head_dim": 80}
    pairs = [
        (
            diffusion.vision_encoder(config, VISION_GRIDS, merge_size=2, **how),
            diffusion.qwen2_vl_vision(VISION_GRIDS, **how),
        ),
        (
            diffusion.vision_encoder(
                {"model_type": "pixtral", "head_dim": 64}, [(1, 4, 6), (1, 3, 2)], **how
            ),
            diffusion.pixtral_vision([(4, 6), (3, 2)], **how),
        ),
    ]
    for mine, other in pairs:
        for one, two in zip(numbers_of(mine, False), numbers_of(other, False), strict=True):
            np.testing.assert_allclose(one, two, 0, 2.0**-23)


X, TURNS = np.zeros(1), np.ones((3, 2, 4))
VISION = {"model_type": "qwen2_vl_vision", "head_dim": 80}
GEMMA = {"model_type": "gemma4_vision", "head_dim": 64}
ERNIE = {"model_type": "ernie4_5_vl_moe_text", "head_dim": 128}
VIDEO = (1, 2, 3)


def arguments(*positional, **options):
    return positional, options


REFUSED = [  # of a builder and its arguments
    (ValueError, "grid", r"\(1, 2, 3\)", "cogview4", arguments((1, 2, 3))),
    (TypeError, "grid", "2.0", "cogview4", arguments((1, 2.0))),
    (ValueError, "text_length", "-1", "cogview4", arguments((1, 2), text_length=-1)),
    (ValueError, "base_size", r"\(0, 9\)", "cogview4", arguments((1, 2), base_size=(0, 9))),
    (ValueError, "head_dim", "30", "cogview4", arguments((1, 2), head_dim=30)),
    (TypeError, "base", "'a'", "cogview4", arguments((1, 2), base="a")),
    (ValueError, "compute_dtype", "'half'", "cogview4", arguments((1, 2), compute_dtype="half")),
    (TypeError, "like", "NoneType", "cogview4", arguments((1, 2), like=None)),
    (ValueError, "grid", r"\(1, 2, 3\)", "hunyuan_image", arguments((1, 2, 3))),
    (TypeError, "text_length", "1.0", "hunyuan_image", arguments((1, 2), text_length=1.0)),
    (TypeError, "dims", "64", "hunyuan_image", arguments((1, 2), dims=64)),
    (ValueError, "dims", r"\(64,\)", "hunyuan_image", arguments((1, 2), dims=(64,))),
    (ValueError, "dims", "7", "hunyuan_image", arguments((1, 2), dims=(7, 64))),
    (ValueError, "base", "0", "hunyuan_image", arguments((1, 2), base=0)),
    (ValueError, "compute_dtype", "type", "hunyuan_image", arguments((1, 2), compute_dtype=int)),
    (ValueError, "grid", r"\(1, 0\)", "ernie_image", arguments((1, 0), 4)),
    (ValueError, "text_length", r"\[\]", "ernie_image", arguments((1, 2), [])),
    (ValueError, "text_length", "-4", "ernie_image", arguments((1, 2), [3, -4])),
    (TypeError, "text_length", "'4'", "ernie_image", arguments((1, 2), "4")),
    (ValueError, "dims", r"\(8, 8\)", "ernie_image", arguments((1, 2), 4, dims=(8, 8))),
    (ValueError, "dims", r"\(2, 2, 2\)", "ernie_image", arguments((1, 2), 4, dims=(2, 2, 2))),
    (ValueError, "dims", "3", "ernie_image", arguments((1, 2), 4, dims=(3, 3, 2))),
    (TypeError, "dims", "None", "ernie_image", arguments((1, 2), 4, dims=None)),
    (ValueError, "base", "-2", "ernie_image", arguments((1, 2), 4, base=-2)),
    (ValueError, "compute_dtype", "''", "ernie_image", arguments((1, 2), 4, compute_dtype="")),
    (ValueError, "grids", r"\[\]", "qwen_image21", arguments([], 4)),
    (ValueError, "grids", "2, 2, 3", "qwen_image21", arguments((2, 2, 3), 4)),
    (ValueError, "text_lengths", "3", "qwen_image21", arguments(VIDEO, [1, 2, 3])),
    (ValueError, "text_lengths", "1", "qwen_image21", arguments([VIDEO, VIDEO], 4)),
    (ValueError, "text_lengths", "-1", "qwen_image21", arguments(VIDEO, -1)),
    (TypeError, "text_lengths", "1.5", "qwen_image21", arguments(VIDEO, [1.5])),
    (ValueError, "dims", r"\(8, 8\)", "qwen_image21", arguments(VIDEO, 4, dims=(8, 8))),
    (
        ValueError,
        "config",
        "model_type='bert'",
        "vision_encoder",
        arguments({"model_type": "bert"}, VIDEO),
    ),
    (TypeError, "config", "None", "vision_encoder", arguments(None, VIDEO)),
    (ValueError, "config", "2 slices", "vision_encoder", arguments(GEMMA, VIDEO)),
    (ValueError, "config", "text model", "vision_encoder", arguments(ERNIE, VIDEO)),
    (ValueError, "grids", r"\(4, 6\)", "vision_encoder", arguments(VISION, (4, 6))),
    (ValueError, "grids", "3 by 4", "vision_encoder", arguments(VISION, (1, 3, 4), merge_size=2)),
    (ValueError, "merge_size", "0", "vision_encoder", arguments(VISION, VIDEO, merge_size=0)),
    (TypeError, "merge_size", "True", "vision_encoder", arguments(VISION, VIDEO, merge_size=True)),
    (ValueError, "grid", "2 rows", "cosmos", arguments([VIDEO, VIDEO])),
    (ValueError, "fps", "0", "cosmos", arguments(VIDEO, fps=0)),
    (TypeError, "fps", "'30'", "cosmos", arguments(VIDEO, fps="30")),
    (ValueError, "base_fps", "inf", "cosmos", arguments(VIDEO, base_fps=math.inf)),
    (ValueError, "scale", r"\(2,\)", "cosmos", arguments(VIDEO, scale=(1, 2))),
    (ValueError, "scale", "-1", "cosmos", arguments(VIDEO, scale=(1, 2, -1))),
    (ValueError, "head_dim", "10", "cosmos", arguments(VIDEO, head_dim=10)),
    (ValueError, "head_dim", "13", "cosmos", arguments(VIDEO, head_dim=13)),
    (ValueError, "base", "-1", "cosmos", arguments(VIDEO, base=-1)),
    (ValueError, "compute_dtype", "3", "cosmos", arguments(VIDEO, compute_dtype=3)),
    (ValueError, "grid", r"\(1, 2\)", "kandinsky5", arguments((1, 2))),
    (ValueError, "scale", "0.0", "kandinsky5", arguments(VIDEO, scale=(1, 2, 0))),
    (TypeError, "scale", "'big'", "kandinsky5", arguments(VIDEO, scale="big")),
    (ValueError, "grid", "8 by 12", "kandinsky5", arguments((1, 8, 12), block_size=8)),
    (ValueError, "block_size", "0", "kandinsky5", arguments(VIDEO, block_size=0)),
    (TypeError, "block_size", "True", "kandinsky5", arguments(VIDEO, block_size=True)),
    (TypeError, "dims", "16", "kandinsky5", arguments(VIDEO, dims=16)),
    (ValueError, "dims", r"\(16, 24\)", "kandinsky5", arguments(VIDEO, dims=(16, 24))),
    (ValueError, "dims", "5", "kandinsky5", arguments(VIDEO, dims=(16, 24, 5))),
    (ValueError, "base", "0", "kandinsky5", arguments(VIDEO, base=0)),
    (ValueError, "grid", r"\(1, 2\)", "mochi", arguments((1, 2), TURNS)),
    (ValueError, "frequencies", r"\(2, 4\)", "mochi", arguments(VIDEO, TURNS[0])),
    (ValueError, "frequencies", r"\(2, 2, 4\)", "mochi", arguments(VIDEO, TURNS[:2])),
    (ValueError, "frequencies", r"\(3, 0, 4\)", "mochi", arguments(VIDEO, TURNS[:, :0])),
    (ValueError, "frequencies", "NaN", "mochi", arguments(VIDEO, TURNS * math.nan)),
    (TypeError, "frequencies", "ndarray", "mochi", arguments(VIDEO, TURNS * 1j)),
    (ValueError, "base_size", r"\(0, 1\)", "mochi", arguments(VIDEO, TURNS, base_size=(0, 1))),
    (ValueError, "compute_dtype", "1", "mochi", arguments(VIDEO, TURNS, compute_dtype=1)),
    (ValueError, "grid", r"\(1, 2\)", "ltx2_video", arguments((1, 2))),
    (ValueError, "grid", r"\(4, 3\)", "ltx2_video", arguments(np.zeros((4, 3)))),
    (ValueError, "grid", r"\(1, 3, 9, 1\)", "ltx2_video", arguments(np.zeros((1, 3, 9, 1)))),
    (ValueError, "grid", r"\(1, 1, 9, 2\)", "ltx2_video_cross", arguments(np.zeros((1, 1, 9, 2)))),
    (ValueError, "grid", r"\(1, 3, 0, 2\)", "ltx2_video", arguments(np.zeros((1, 3, 0, 2)))),
    (ValueError, "grid", "NaN", "ltx2_video", arguments(np.full((1, 3, 4, 2), math.nan))),
    (ValueError, "fps", "-24", "ltx2_video", arguments(VIDEO, fps=-24)),
    (TypeError, "scale", "8.5", "ltx2_video", arguments(VIDEO, scale=(8.5, 32, 32))),
    (ValueError, "causal_offset", "-1", "ltx2_video", arguments(VIDEO, causal_offset=-1)),
    (
        ValueError,
        "base_size",
        r"\(20, 2048\)",
        "ltx2_video",
        arguments(VIDEO, base_size=(20, 2048)),
    ),
    (ValueError, "num_heads", "0", "ltx2_video", arguments(VIDEO, num_heads=0)),
    (ValueError, "head_dim", "4", "ltx2_video", arguments(VIDEO, head_dim=4)),
    (ValueError, "head_dim", "7", "ltx2_video_cross", arguments(VIDEO, head_dim=7)),
    (ValueError, "base", "0", "ltx2_video", arguments(VIDEO, base=0)),
    (TypeError, "double_precision", "1", "ltx2_video", arguments(VIDEO, double_precision=1)),
    (ValueError, "base_size", "0", "ltx2_video_cross", arguments(VIDEO, base_size=0)),
    (TypeError, "base_size", "tuple", "ltx2_video_cross", arguments(VIDEO, base_size=(20, 2, 2))),
    (ValueError, "frames", "0", "ltx2_audio", arguments(0)),
    (TypeError, "frames", "2.5", "ltx2_audio", arguments(2.5)),
    (ValueError, "frames", r"\(1, 3, 9, 2\)", "ltx2_audio", arguments(np.zeros((1, 3, 9, 2)))),
    (ValueError, "start", "-1", "ltx2_audio", arguments(3, start=-1)),
    (ValueError, "scale", "0", "ltx2_audio", arguments(3, scale=0)),
    (ValueError, "hop_length", "0", "ltx2_audio", arguments(3, hop_length=0)),
    (TypeError, "sampling_rate", "16000.0", "ltx2_audio", arguments(3, sampling_rate=16000.0)),
    (ValueError, "head_dim", "5", "ltx2_audio", arguments(3, head_dim=5)),
    (ValueError, "compute_dtype", "None", "ltx2_audio", arguments(3, compute_dtype=None)),
]


@pytest.mark.parametrize(("error", "argument", "got", "builder", "given"), REFUSED)
def test_what_gives_no_table_is_refused_by_name(error, argument, got, builder, given):
    positional, options = given
    with pytest.raises(error, match=rf"^{argument} must .*, got .*{got}"):
        getattr(diffusion, builder)(*positional, **{"like": X} | options)


def test_frequencies_that_train_are_refused_and_not_under_no_grad():
    turns = torch.nn.Parameter(torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match=r"^frequencies must not require a gradient"):
        diffusion.mochi(VIDEO, turns, like=turns)
    with torch.no_grad():
        table = diffusion.mochi(VIDEO, turns, like=turns)
    assert table.shape == (1, 6, 2, 4)
