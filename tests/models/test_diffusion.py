"""Tables by model: against their formula in extended precision, and against the models' own code.

`CASES` names a model at a real size: how it is built here, the positions of its tokens written out
anew, and the table that diffusers or transformers computes.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from blocks import transformer

from rope_cupy import RotaryTable, apply_rotary, diffusion
from rope_cupy.frequencies import axial, from_config
from rope_cupy.frequencies.models import DIFFUSERS_BUILDERS
from rope_cupy.tables import source_of

LIBRARIES = {
    "numpy": np.zeros,
    "torch": torch.zeros,
    "jax": lambda size: pytest.importorskip("jax.numpy").zeros(size),
}


class Case(NamedTuple):
    build: Callable[..., Any]  # (like=, compute_dtype=) -> RotaryTable
    angles: Callable[[], Any]  # in extended precision, of the table's shape
    library: Callable[[str], Any]  # (device) -> (cos, sin) of the library's own module
    computes_in: str = "float32"  # what the library does without Apple's GPUs


def grid(*sizes, start=None):
    """All points of a grid, the last axis fastest."""
    points = [()]
    for size, first in zip(sizes, start or [0] * len(sizes), strict=True):
        points = [(*point, first + step) for point in points for step in range(size)]
    return points


def angles(points, dims, base):
    """The angle of every pair at every point, in extended precision."""
    points, columns = np.array(points, np.longdouble), []
    for axis, dim in enumerate(dims):
        for pair in range(dim // 2):
            frequency = np.longdouble(base) ** (np.longdouble(-2 * pair) / dim)
            columns.append(points[..., axis] * frequency)
    return np.stack(columns, -1)


def halved(table):
    """The half width of a table of diffusers that has every angle twice."""
    return tuple(half[..., ::2].cpu().numpy() for half in table)


def parts(turns):
    return turns.real.cpu().numpy(), turns.imag.cpu().numpy()


FLUX_IDS = [(0, 0, 0)] * 512 + grid(1, 64, 64)  # 1024 x 1024
FLUX2_IDS = grid(1, 1, 1, 300) + grid(1, 48, 64, 1)  # 768 x 1024
FLUX2_IDS += grid(1, 24, 32, 1, start=(10, 0, 0, 0))  # and an image to edit


def flux_library(device):
    ids = torch.tensor(FLUX_IDS, dtype=torch.float32, device=device)
    return halved(transformer("transformer_flux").FluxPosEmbed(10000, [16, 56, 56])(ids))


def flux2_library(device):
    ids = torch.tensor(FLUX2_IDS, device=device)
    return halved(transformer("transformer_flux2").Flux2PosEmbed(2000, [32, 32, 32, 32])(ids))


def qwen_library(grids, text_length, scale_rope=True, module="QwenEmbedRope"):
    def library(device):
        rope = getattr(transformer("transformer_qwenimage"), module)
        rope = rope(theta=10000, axes_dim=[16, 56, 56], scale_rope=scale_rope)
        image, text = rope([grids], device=torch.device(device), max_txt_seq_len=text_length)
        return parts(torch.cat([text, image]))

    return library


def text_at(first, length):
    return [(first + step,) * 3 for step in range(length)]


LAYERED = "QwenEmbedLayer3DRope"
QWEN_EDIT = [(1, 83, 83), (1, 61, 96)]
QWEN_EDIT_POINTS = grid(1, 83, 83, start=(0, -42, -42)) + grid(1, 61, 96, start=(1, -31, -48))


def wan_library(head_dim, shape):
    def library(device):
        rope = transformer("transformer_wan").WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
        turns = rope.to(device)(torch.empty(1, 16, *shape, device=device))
        return tuple(half[0, :, 0] for half in halved(turns))

    return library


def hunyuan_library(text_length):
    def library(device):
        rope = transformer("transformer_hunyuan_video").HunyuanVideoRotaryPosEmbed
        cos, sin = halved(rope(2, 1, [16, 56, 56])(torch.empty(1, 16, 3, 90, 160, device=device)))
        still = np.zeros((text_length, 64), np.float32)
        return np.concatenate([cos, still + 1]), np.concatenate([sin, still])

    return library


def cogvideox_library(frames, height, width, base_size):
    def library(device):
        pipeline = pytest.importorskip("diffusers.pipelines.cogvideo.pipeline_cogvideox")
        if base_size:
            base_height, base_width = base_size
            size = height, width
            crop = pipeline.get_resize_crop_region_for_grid(size, base_width, base_height)
            kind = {"crops_coords": crop}
        else:
            kind = {"crops_coords": None, "grid_type": "slice", "max_size": (height, width)}
        embed = pytest.importorskip("diffusers.models.embeddings").get_3d_rotary_pos_embed
        size = {"grid_size": (height, width), "temporal_size": frames}
        return halved(embed(64, **size, **kind, device=torch.device(device)))

    return library


def spread(first, end, size):
    """From `first` to the last but one of `size` steps that lead from 0 to `end`."""
    whole_way = np.longdouble(end) * (size - 1) / size - first
    return [first + step * whole_way / (size - 1) for step in range(size)]


def cogvideox_points(frames, rows, columns):
    return [(frame, row, column) for frame in range(frames) for row in rows for column in columns]


LTX_SCALE = 8 / 25, 32.0, 32.0
LTX_COORDINATES = np.random.default_rng(3).uniform(0, (9, 512, 704), (2, 90, 3)).astype("float32")


def ltx_angles(points, num_heads, head_dim):
    shares = np.array(points, np.longdouble) / [20, 2048, 2048]
    num_steps = num_heads * head_dim // 6
    columns = [np.zeros(shares.shape[:2])] * (num_heads * head_dim % 6 // 2)
    for step in range(num_steps):
        largest = np.longdouble(10000) ** (np.longdouble(step) / (num_steps - 1)) * LONG_PI / 2
        columns += [largest * (2 * shares[..., axis] - 1) for axis in range(3)]
    return np.stack(columns, -1).reshape(*shares.shape[:2], num_heads, head_dim // 2)


LONG_PI = 4 * np.arctan(np.longdouble(1))


def ltx_library(num_heads, head_dim, size=None):
    def library(device):
        rope = transformer("transformer_ltx").LTXVideoRotaryPosEmbed(num_heads * head_dim)
        if size:
            x, given = torch.empty(1, 1, device=device), (*size, LTX_SCALE)
        else:
            coordinates = torch.tensor(LTX_COORDINATES, device=device)
            x, given = torch.empty(2, 1, device=device), (None, None, None, None)
            given = (*given, coordinates.transpose(1, 2))
        turns = halved(rope(x, *given))
        return tuple(half.reshape(*half.shape[:2], num_heads, -1) for half in turns)

    return library


def ltx_points(frames, height, width):
    scaled = np.array(grid(frames, height, width), np.longdouble)
    return scaled[None] * np.array(LTX_SCALE, np.longdouble)


def z_image_library(device):
    module = transformer("transformer_z_image")
    model = object.__new__(module.ZImageTransformer2DModel)  # its methods, without its weights
    image, text = torch.empty(16, 1, 96, 70, device=device), torch.empty(77, 8, device=device)
    found = model.patchify_and_embed([image], [text], 2, 1)
    (image,), (text,), (image_ids,), (text_ids,) = found[0], found[1], found[3], found[4]
    ids = torch.cat([image_ids[: len(image)], text_ids[: len(text)]])
    return parts(module.RopeEmbedder(256.0, [32, 48, 48], [1024, 512, 512])(ids))


Z_IMAGE_POINTS = (
    grid(1, 48, 35, start=(97, 0, 0)) + [(0, 0, 0)] * 16 + grid(96, 1, 1, start=(1, 0, 0))
)


def lumina_library(lengths, part):
    def library(device):
        rope = transformer("transformer_lumina2").Lumina2RotaryPosEmbed(10000, [32, 32, 32])
        mask = torch.zeros(len(lengths), 40, dtype=torch.int64, device=device)
        for row, length in zip(mask, lengths, strict=True):
            row[:length] = 1
        found = rope(torch.empty(len(lengths), 16, 64, 48, device=device), mask)
        return parts(found[{"image": 2, "joint": 3}[part]])

    return library


def lumina_points(length, rows=0):
    points = grid(length, 1, 1) + grid(1, 32, 24, start=(length, 0, 0))
    return points + [(0, 0, 0)] * (rows - len(points))


VISION_GRIDS = [(1, 36, 52), (3, 8, 12)]


def qwen2_vl_points():
    points = []
    for frames, height, width in VISION_GRIDS:
        for _ in range(frames):
            for top, left in grid(height // 2, width // 2):
                points += grid(2, 2, start=(2 * top, 2 * left))
    return points


def qwen2_vl_library(device):
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    rope = module.Qwen2VLVisionRotaryEmbedding(module.Qwen2VLVisionConfig()).to(device)
    ids = module.get_vision_position_ids(torch.tensor(VISION_GRIDS, device=device), 2)
    return tuple(half[:, :40].cpu().numpy() for half in rope(ids, ids))


def pixtral_library(device):
    module = pytest.importorskip("transformers.models.pixtral.modeling_pixtral")
    rope = module.PixtralVisionRotaryEmbedding(module.PixtralVisionConfig()).to(device)
    ids = torch.tensor(grid(64, 48) + grid(7, 9), device=device)
    return tuple(half[:, :32].cpu().numpy() for half in rope(ids.float(), ids))


def pixtral_angles():
    turns = angles([(y, x, y, x) for y, x in grid(64, 48) + grid(7, 9)], (64,) * 2, 10000)
    return np.concatenate([turns[:, 0:32:2], turns[:, 33:64:2]], -1)


def case(builder, arguments, points, dims, library, base=10000, computes_in="float32", **options):
    """A case whose angles are those of points on axes, by a builder's arguments and options."""
    build = getattr(diffusion, builder)
    return Case(
        lambda **how: build(*arguments, **options, **how),
        cache(lambda: angles(points, dims, base)),
        *(library, computes_in),
    )


AXES, THREE, VIDEO = (16, 56, 56), (32,) * 3, (16, 24, 24)
IN_64, TEXT_OF_HUNYUAN = "float64", [(0, 0, 0)] * 70
FLUX, QWEN, EDIT = np.array(FLUX_IDS), (1, 83, 83), text_at(48, 300) + QWEN_EDIT_POINTS
LAYERS, MANY_LAYERS = [(1, 40, 30), (1, 40, 30), (1, 20, 50)], [(1, 3, 2)] * 9
LAYERS_AT = [
    *(text_at(25, 60) + grid(1, 40, 30, start=(0, -20, -15))),
    *(grid(1, 40, 30, start=(1, -20, -15)) + grid(1, 20, 50, start=(-1, -10, -25))),
]
MANY_AT = [point for at in [*range(8), -1] for point in grid(1, 3, 2, start=(at, 0, 0))]
PORTRAIT = cogvideox_points(2, spread(0, 30, 48), spread(12, 32, 32))
PANORAMA = cogvideox_points(2, spread(6, 24, 20), spread(0, 45, 50))
ALONE, BATCH = ((32, 24), 30), ((32, 24), [30, 11])
OF_BATCH = [lumina_points(30), lumina_points(11, 30 + 32 * 24)]
IMAGES = [lumina_points(30)[30:], lumina_points(11)[11:]]
OF_VISION = (torch.tensor(VISION_GRIDS),)


def lumina_alone(device):
    return tuple(half[0] for half in lumina_library([30], "joint")(device))


CASES = {
    "flux": case("flux", (FLUX,), FLUX_IDS, AXES, flux_library, computes_in=IN_64),
    "flux 2": case(
        *("flux2", (torch.tensor(FLUX2_IDS),), FLUX2_IDS, (32,) * 4, flux2_library, 2000, IN_64)
    ),
    "qwen image": case(
        *("qwen_image", (QWEN, 200), text_at(41, 200) + grid(*QWEN, start=(0, -42, -42)), AXES),
        qwen_library([QWEN], 200),
    ),
    "qwen image edit": case(
        "qwen_image", (QWEN_EDIT, 300), EDIT, AXES, qwen_library(QWEN_EDIT, 300)
    ),
    "qwen image, not centred": case(
        *("qwen_image", ((2, 30, 40), 20), text_at(40, 20) + grid(2, 30, 40), AXES),
        qwen_library([(2, 30, 40)], 20, scale_rope=False),
        scale_rope=False,
    ),
    "qwen image layered": case(
        *("qwen_image_layered", (LAYERS, 60), LAYERS_AT, AXES),
        qwen_library(LAYERS, 60, module=LAYERED),
    ),
    "qwen image layered, more layers than patches": case(
        *("qwen_image_layered", (MANY_LAYERS, 5), text_at(8, 5) + MANY_AT, AXES),
        qwen_library(MANY_LAYERS, 5, scale_rope=False, module=LAYERED),
        scale_rope=False,
    ),
    "wan": case(  # 720p
        *("wan", ((3, 45, 80),), grid(3, 45, 80), (44, 42, 42)),
        *(wan_library(128, (3, 90, 160)), 10000, IN_64),
    ),
    "wan, small heads": case(
        *("wan", ((21, 5, 7),), grid(21, 5, 7), (24, 20, 20)),
        *(wan_library(64, (21, 10, 14)), 10000, IN_64),
        head_dim=64,
    ),
    "hunyuan video": case(
        *("hunyuan_video", ((3, 45, 80),), grid(3, 45, 80) + TEXT_OF_HUNYUAN, AXES),
        *(hunyuan_library(70), 256),
        text_length=70,
    ),
    "cogvideox 1.0": case(
        *("cogvideox", ((5, 30, 45),), grid(5, 30, 45), VIDEO),
        cogvideox_library(5, 30, 45, (30, 45)),
    ),
    "cogvideox 1.0, portrait": case(
        "cogvideox", ((2, 48, 32),), PORTRAIT, VIDEO, cogvideox_library(2, 48, 32, (30, 45))
    ),
    "cogvideox 1.0, panorama": case(
        *("cogvideox", ((2, 20, 50),), PANORAMA, VIDEO, cogvideox_library(2, 20, 50, (30, 45))),
        base_size=(30, 45),
    ),
    "cogvideox 1.5": case(
        *("cogvideox", ((3, 48, 85),), grid(3, 48, 85), VIDEO),
        cogvideox_library(3, 48, 85, None),
        base_size=None,
    ),
    "ltx video": Case(
        lambda **how: diffusion.ltx_video((3, 16, 22), **how),
        cache(lambda: ltx_angles(ltx_points(3, 16, 22), 32, 64)),
        ltx_library(32, 64, (3, 16, 22)),
    ),
    "ltx video by coordinates": Case(
        lambda **how: diffusion.ltx_video(LTX_COORDINATES, num_heads=2, head_dim=20, **how),
        lambda: ltx_angles(LTX_COORDINATES, 2, 20),
        ltx_library(2, 20),
    ),
    "z-image": case(
        "z_image", ((1, 48, 35), 77), Z_IMAGE_POINTS, (32, 48, 48), z_image_library, 256
    ),
    "lumina 2": case("lumina2", ALONE, lumina_points(30), THREE, lumina_alone, computes_in=IN_64),
    "lumina 2, a batch": case(
        "lumina2", BATCH, OF_BATCH, THREE, lumina_library([30, 11], "joint"), computes_in=IN_64
    ),
    "lumina 2, images of a batch": case(
        *("lumina2", BATCH, IMAGES, THREE, lumina_library([30, 11], "image"), 10000, IN_64),
        with_text=False,
    ),
    "qwen2-vl vision": case(
        "qwen2_vl_vision", OF_VISION, qwen2_vl_points(), (40, 40), qwen2_vl_library
    ),
    "pixtral vision": Case(
        lambda **how: diffusion.pixtral_vision([(64, 48), (7, 9)], **how),
        *(pixtral_angles, pixtral_library),
    ),
}
IN_FLOAT32 = [name for name, case in CASES.items() if case.computes_in == "float32"]
IN_FLOAT64 = [name for name, case in CASES.items() if case.computes_in == "float64"]


# A frequency in float32 has the error of a power, a division and an exponent that the logarithm of
# the base magnifies, an angle one rounding more.
ANGLE_ERROR = 2.0**-21


def cos_sin_of(table):
    """The numbers of a table, of its shape: the vectors (1, 0) rotated by it."""
    *rows, num_pairs = table.shape
    x = np.zeros((*rows, 2 * num_pairs) if len(rows) == 3 else (*rows, 1, 2 * num_pairs))
    x[..., ::2] = 1
    rotated = apply_rotary(x, table, interleaved=True).reshape(*rows, 2 * num_pairs)
    return rotated[..., ::2], rotated[..., 1::2]


def largest_angles(exact):
    """The largest angle of each pair: its rounding is that of all, where LTX-Video subtracts 1."""
    return np.abs(exact).max(0 if exact.ndim == 2 else (0, 1))


def largest_error(case, table, per_angle):
    """The worst error of a table, in units of an ulp of float32 and `per_angle` of the angle."""
    exact, worst = case.angles(), 0.0
    assert (table.dtype, table.device, table.shape) == ("float32", "cpu", exact.shape)
    for numbers, wanted in zip(cos_sin_of(table), (np.cos(exact), np.sin(exact)), strict=True):
        ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.longdouble)
        errors = np.abs(numbers - wanted) / (ulp + per_angle * largest_angles(exact))
        worst = max(worst, float(errors.max()))
    return worst


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CASES)
def test_a_table_is_exact_to_the_last_place_of_float32(name, library):
    case, like = CASES[name], LIBRARIES[library](1)
    table = case.build(like=like)
    assert type(source_of(table).arrays[0]) is type(like)
    # Half an ulp is the one rounding; a float64 angle is off by a few of its own, however large.
    assert largest_error(case, table, 2.0**-49) <= 0.51


@pytest.mark.parametrize("name", CASES)
def test_in_float32_a_table_has_the_bits_of_the_librarys_own(name, monkeypatch):
    case = CASES[name]
    if case.computes_in == "float64":  # then the library takes this for one of Apple's machines
        flux, flux2 = transformer("transformer_flux"), transformer("transformer_flux2")
        for module in (flux, flux2):
            monkeypatch.setattr(module, "maybe_adjust_dtype_for_device", lambda *_: torch.float32)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    table = case.build(like=torch.zeros(1), compute_dtype="float32")
    for numbers, wanted in zip(cos_sin_of(table), case.library("cpu"), strict=True):
        assert wanted.dtype == np.float32 and np.array_equal(numbers, wanted)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_a_library_that_computes_in_float64_has_the_same_table(name):
    case = CASES[name]
    table = case.build(like=torch.zeros(1))
    for numbers, wanted in zip(cos_sin_of(table), case.library("cpu"), strict=True):
        assert np.array_equal(numbers, wanted.astype(np.float32))


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_library_that_computes_in_float32_is_off_by_the_rounding_of_its_angles(name):
    case = CASES[name]
    table, exact = case.build(like=torch.zeros(1)), case.angles()
    tolerance = 2.0**-23 + ANGLE_ERROR * largest_angles(exact)
    differs = False
    for numbers, wanted in zip(cos_sin_of(table), case.library("cpu"), strict=True):
        assert (np.abs(numbers - wanted) <= tolerance).all()
        differs = differs or not np.array_equal(numbers, wanted)
    assert differs


@pytest.mark.parametrize("library", ["numpy", "jax"])
@pytest.mark.parametrize("name", CASES)
def test_other_libraries_compute_in_float32_with_the_error_of_float32(name, library):
    case, like = CASES[name], LIBRARIES[library](1)
    table = case.build(like=like, compute_dtype="float32")
    assert type(source_of(table).arrays[0]) is type(like)
    assert largest_error(case, table, ANGLE_ERROR) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_float32_a_table_on_a_gpu_has_the_bits_of_the_librarys_own_there(name):
    table = CASES[name].build(like=torch.zeros(1, device="cuda"), compute_dtype="float32")
    assert table.device.startswith("cuda")
    on_cpu = RotaryTable(*(half.cpu() for half in source_of(table).arrays))
    for numbers, wanted in zip(cos_sin_of(on_cpu), CASES[name].library("cuda"), strict=True):
        assert np.array_equal(numbers, wanted)


def test_ids_of_a_batch_give_each_batch_its_rows():
    ids = np.array(FLUX_IDS)[::97]
    batch = np.stack([ids, ids[::-1], ids * 2])
    table = diffusion.flux(batch, like=batch)
    assert table.shape == (3, len(ids), 64)
    for rows, one in zip(zip(*cos_sin_of(table), strict=True), batch, strict=True):
        alone = cos_sin_of(diffusion.flux(one, like=batch))
        assert np.array_equal(rows, alone)


@pytest.mark.parametrize(
    "make", [np.array, torch.tensor, np.ndarray.tolist], ids=["numpy", "torch", "list"]
)
def test_ids_may_be_of_any_library_and_fractional(make):
    ids = np.random.default_rng(5).uniform(-9, 9, (4, 3)).astype("float32")
    dims, like = (2, 4, 2), np.zeros(1)
    rows = cos_sin_of(diffusion.flux(make(ids), dims=dims, base=7, like=like))
    wanted = cos_sin_of(RotaryTable.from_angles(axial(ids, dims, 7), like=like))
    assert np.array_equal(rows, wanted)


def test_the_two_streams_of_qwen_image_are_rotated_apart_by_offsets_into_one_table():
    table = diffusion.qwen_image((1, 4, 6), 5, like=np.zeros(1))
    joint = np.random.default_rng(6).standard_normal((2, 29, 3, 128), np.float32)
    text = apply_rotary(joint[:, :5], table, positions=0, interleaved=True)
    image = apply_rotary(joint[:, 5:], table, positions=5, interleaved=True)
    together = apply_rotary(joint, table, interleaved=True)
    assert np.array_equal(np.concatenate([text, image], 1), together)


def test_text_that_is_not_rotated_keeps_every_bit():
    x = np.random.default_rng(7).standard_normal((58, 2, 128), np.float32)
    video = diffusion.hunyuan_video((2, 4, 6), like=x, text_length=10)
    assert np.array_equal(apply_rotary(x, video, interleaved=True)[48:], x[48:])
    x = x[..., :64]
    video = diffusion.cogvideox((2, 4, 6), like=x, text_length=10)
    rotated = apply_rotary(x, video, interleaved=True)
    assert np.array_equal(rotated[:10], x[:10]) and (rotated[11:] != x[11:]).any(-1).all()


X = np.zeros(1)


def arguments(*positional, **options):
    return positional, options


REFUSED = [  # of a builder and its arguments
    (TypeError, "ids", "'abc'", "flux", arguments("abc")),
    (TypeError, "ids", "list", "flux", arguments([[1, 2, 3], [4]])),
    (TypeError, "ids", "ndarray", "flux", arguments(np.zeros((4, 3), complex))),
    (ValueError, "ids", r"\(4, 3\)", "flux2", arguments(np.zeros((4, 3)))),
    (ValueError, "ids", r"\(3,\)", "flux", arguments(np.zeros(3))),
    (ValueError, "ids", "NaN", "flux", arguments(np.full((4, 3), math.nan))),
    (TypeError, "like", "NoneType", "wan", arguments((1, 2, 3), like=None)),
    (TypeError, "dims", "128", "flux", arguments(np.zeros((4, 3)), dims=128)),
    (ValueError, "dims", "7", "hunyuan_video", arguments((1, 2, 3), dims=(16, 7, 2))),
    (ValueError, "dims", r"\(8, 8\)", "z_image", arguments((1, 2, 3), 4, dims=(8, 8))),
    (ValueError, "base", "-1", "wan", arguments((1, 2, 3), base=-1)),
    (TypeError, "base", "'a'", "ltx_video", arguments((1, 2, 3), base="a")),
    (TypeError, "base", "a tuple of 3", "wan", arguments((1, 2, 3), base=(1, 2, 3))),
    (ValueError, "compute_dtype", "'half'", "wan", arguments((1, 2, 3), compute_dtype="half")),
    (ValueError, "compute_dtype", "type", "pixtral_vision", arguments((2, 3), compute_dtype=float)),
    (ValueError, "grid", r"\(1, 2\)", "wan", arguments((1, 2))),
    (ValueError, "grid", r"\(1, 0, 3\)", "wan", arguments((1, 0, 3))),
    (TypeError, "grid", "2.0", "wan", arguments((1, 2.0, 3))),
    (TypeError, "grid", "'no'", "lumina2", arguments("no", 4)),
    (ValueError, "grid", "2 rows", "wan", arguments([(1, 2, 3), (1, 2, 3)])),
    (ValueError, "grid", r"\(4, 3\)", "ltx_video", arguments(np.zeros((4, 3)))),
    (ValueError, "grids", r"\[\]", "qwen_image", arguments([], 4)),
    (ValueError, "grids", "1 rows", "qwen_image_layered", arguments((1, 2, 3), 4)),
    (ValueError, "grids", "2 frames", "qwen_image_layered", arguments([(1, 2, 3), (2, 2, 3)], 4)),
    (ValueError, "grids", "3 by 4", "qwen2_vl_vision", arguments((1, 3, 4))),
    (ValueError, "text_length", "-1", "qwen_image", arguments((1, 2, 3), -1)),
    (TypeError, "text_length", "4.0", "lumina2", arguments((2, 3), 4.0)),
    (ValueError, "text_length", r"\[\]", "lumina2", arguments((2, 3), [])),
    (ValueError, "multiple", "0", "z_image", arguments((1, 2, 3), 4, multiple=0)),
    (ValueError, "head_dim", "24", "cogvideox", arguments((1, 2, 3), head_dim=24)),
    (ValueError, "head_dim", "4", "wan", arguments((1, 2, 3), head_dim=4)),
    (ValueError, "head_dim", "30", "pixtral_vision", arguments((2, 3), head_dim=30)),
    (ValueError, "base_size", "30", "cogvideox", arguments((1, 2, 3), base_size=(30, 0))),
    (ValueError, "scale", r"\(2,\)", "ltx_video", arguments((1, 2, 3), scale=(1, 2))),
]


@pytest.mark.parametrize(("error", "argument", "got", "builder", "given"), REFUSED)
def test_what_gives_no_table_is_refused_by_name(error, argument, got, builder, given):
    positional, options = given
    with pytest.raises(error, match=rf"^{argument} must .*, got .*{got}"):
        getattr(diffusion, builder)(*positional, **{"like": X} | options)


def test_a_float32_table_is_refused_like_any_other():
    with pytest.raises(ValueError, match=r"^dims must be positive and even, got 3"):
        diffusion.hunyuan_video((1, 2, 3), like=X, dims=(2, 3, 2), compute_dtype="float32")


def scalar_angles(points, dims, bases):
    """The angles of tokens, one pair at a time."""
    rows = []
    for point in points:
        rows.append([])
        for position, dim, base in zip(point, dims, bases, strict=True):
            for pair in range(dim // 2):
                rows[-1].append(position * math.pow(base, -2 * pair / dim))
    return np.array(rows).reshape(len(points), sum(dims) // 2)


AXIAL = [
    ((3, 4), (4, 6), 10000.0, grid(3, 4)),
    ((2, 1, 3, 2), (2, 4, 8, 2), (10.0, 1e4, 256, 2), grid(2, 1, 3, 2)),
    (([0.5, -2], [7, 1, 3.25]), (4, 2), 100, [(y, x) for y in (0.5, -2) for x in (7, 1, 3.25)]),
    ([2, np.array([9, 5])], (2, 2), 3.0, [(0, 9), (0, 5), (1, 9), (1, 5)]),
    (np.array([[5, 1], [5, 1], [-3, 0]], np.int32), (8, 2), 1e6, [(5, 1), (5, 1), (-3, 0)]),
    (np.array([[0.1], [2.7]]), (6,), [50.0], [(0.1,), (2.7,)]),
    ((0, 3), (2, 2), 5.0, []),
]


@pytest.mark.parametrize(("positions", "dims", "base", "points"), AXIAL)
def test_axial_angles_follow_the_formula_token_by_token(positions, dims, base, points):
    found = axial(positions, dims, base)
    bases = base if isinstance(base, list | tuple) else [base] * len(dims)
    wanted = scalar_angles(points, dims, bases)
    assert found.dtype == np.float64 and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, 1e-14, 0)


def test_axial_keeps_the_axes_before_the_tokens():
    points = np.random.default_rng(8).uniform(-5, 5, (2, 3, 4, 2))
    found = axial(points, (4, 2))
    assert found.shape == (2, 3, 4, 3)
    for batch in np.ndindex(2, 3):
        assert np.array_equal(found[batch], axial(points[batch], (4, 2)))


@pytest.mark.parametrize(
    ("error", "argument", "got", "positions", "dims", "base"),
    [
        (TypeError, "dims", "4", (2,), 4, 10.0),
        (TypeError, "dims", r"\(\)", (), (), 10.0),
        (ValueError, "dims", "3", (2, 2), (4, 3), 10.0),
        (ValueError, "dims", "0", (2, 2), (4, 0), 10.0),
        (TypeError, "dims", "4.0", (2, 2), (4.0, 2), 10.0),
        (ValueError, "base", r"\(10.0,\)", (2, 2), (4, 2), (10.0,)),
        (ValueError, "base", "0", (2, 2), (4, 2), 0),
        (TypeError, "base", "None", (2, 2), (4, 2), None),
        (ValueError, "positions", r"\(2,\)", (2,), (4, 2), 10.0),
        (ValueError, "positions", r"\(2, -1\)", (2, -1), (4, 2), 10.0),
        (TypeError, "positions", "True", (2, True), (4, 2), 10.0),
        (TypeError, "positions", "'ab'", (2, "ab"), (4, 2), 10.0),
        (ValueError, "positions", r"\(2, 2\)", ([[1, 2], [3, 4]], 2), (4, 2), 10.0),
        (ValueError, "positions", r"\(4, 3\)", np.zeros((4, 3)), (4, 2), 10.0),
        (ValueError, "positions", r"\(2,\)", np.zeros(2), (4, 2), 10.0),
        (TypeError, "positions", "ndarray", np.zeros((4, 2), complex), (4, 2), 10.0),
        (TypeError, "positions", "None", None, (4, 2), 10.0),
        (ValueError, "positions", "infinity", np.full((1, 2), math.inf), (4, 2), 10.0),
    ],
)
def test_what_gives_no_axial_angles_is_refused(error, argument, got, positions, dims, base):
    with pytest.raises(error, match=rf"^{argument} must .*, got .*{got}"):
        axial(positions, dims, base)


def test_the_builder_that_is_named_for_a_class_of_diffusers_is_there():
    models = pytest.importorskip("diffusers.models.transformers")
    for class_name, builder in DIFFUSERS_BUILDERS.items():
        assert callable(getattr(models, class_name)) and callable(getattr(diffusion, builder))


def test_the_config_of_a_model_of_diffusers_is_refused():
    models = pytest.importorskip("diffusers.models.transformers")
    refused = 0
    for found in vars(models).values():
        if not inspect.isclass(found) or not hasattr(found, "load_config"):
            continue
        arguments = inspect.signature(found.__init__).parameters.values()
        fields = {each.name: each.default for each in arguments if each.default is not each.empty}
        with pytest.raises(ValueError, match=r"^config must .* diffusers of"):
            from_config(fields | {"_class_name": found.__name__})
        if {"in_channels", "axes_dims_rope"} & fields.keys():
            refused += 1
            with pytest.raises(ValueError, match=r"^config must .* diffusers: "):
                from_config(fields)
    assert refused >= 30


def test_qwen_image_layered_has_its_own_module_and_builder():
    module = transformer("transformer_qwenimage")
    model = module.QwenImageTransformer2DModel(
        num_layers=0, num_attention_heads=1, axes_dims_rope=(4, 6, 6), use_layer3d_rope=True
    )
    assert type(model.pos_embed).__name__ == LAYERED
    with pytest.raises(ValueError, match=r"^config must .* one of diffusers: .* qwen_image"):
        from_config(model.config)
    named = dict(model.config) | {"_class_name": type(model).__name__}
    with pytest.raises(ValueError, match=r"rope_cupy\.diffusion\.qwen_image_layered makes"):
        from_config(named)
