"""Every config class of the installed transformers: read as its own module does, or refused."""

import contextlib
import functools
import importlib
import inspect
import pathlib
import re
import warnings

import numpy as np
import pytest
import torch
import transformers

from rope_cupy.frequencies import axial_from_config, from_config, layer_types, pairs_neighbours

FLOAT32 = 3e-6  # relative: a power, a quotient and a product in float32
ANGLES = 2e-4  # of cosines and sines of the angles of float32 here, up to 100 radians

# A rotation by one position that no module of frequencies stands for: what computes it.
WITHOUT_MODULE = {
    "CodeGenConfig": "a function of its attention, as GPT-J's in test_model_configs",
    "GPTJConfig": "a function of its attention, see test_model_configs",
    "IQuestCoderConfig": "its layers are not in the package",
    "InternLM3Config": "its layers are not in the package",
    "RoFormerConfig": "a table of sinusoids, see below",
}
# Whose modules gave other angles before transformers 5.23: other dims, order of axes and base.
MENDED = "MiniMaxM3VLVisionConfig", "Step3p7VisionConfig", "FuyuConfig"
# What has a module of frequencies and is refused, and why.
REFUSED = {
    **dict.fromkeys(  # which rotate where their position_embedding_type or use_mem_rope says so
        [
            *("EsmConfig", "GraniteMoeHybridConfig", "SeamlessM4TConfig", "Wav2Vec2BertConfig"),
            *("Wav2Vec2ConformerConfig", "Zamba2Config"),
        ],
        "must describe a rotary embedding",
    ),
    "ClvpEncoderConfig": "a rule of its own",
    "EfficientLoFTRConfig": "split into heads",
    "Glm4MoeConfig": "head_dim=42",  # defaults that fit no model
    "Glm4vMoeTextConfig": "head_dim=42",
    "MistralLarge4TextConfig": "trained",
    "MiniMaxM3VLTextConfig": "rotary_dim must be",
    "MusicFlamingoConfig": "text_config",
    "NeoMMEConfig": "not homogeneous",
    "Qwen3OmniMoeTextConfig": "head_dim=73",
}


@functools.cache
def modules_of(package):
    """The modules of a model's package that hold its layers."""
    folder = pathlib.Path(transformers.__file__).parent / "models" / package
    found = []
    for path in sorted(folder.glob("modeling_*.py")):
        with contextlib.suppress(ImportError):  # of what is not installed here
            found.append(importlib.import_module(f"transformers.models.{package}.{path.stem}"))
    return found


@functools.cache
def rotary_classes(package):
    """(class, names in the annotations of its arguments) of a package's rotary embeddings."""
    return [
        (found, set(re.findall(r"\w+Config\b", str(inspect.signature(found.__init__)))))
        for module in modules_of(package)
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and re.search("Rotary|RopePosition", name)
    ]


def configs():
    """Every config of defaults, by the name of its class, with its package."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/configuration_*.py")):
        package = path.parent.name
        module = importlib.import_module(f"transformers.models.{package}.{path.stem}")
        for name, found in vars(module).items():
            if (
                inspect.isclass(found)
                and issubclass(found, transformers.PretrainedConfig)
                and found.__module__ == module.__name__
            ):
                # Some have no defaults, some ask for what is not installed or not here.
                with contextlib.suppress(Exception):
                    yield name, package, found()


def built(name, package, config):
    """The rotary embeddings of a package that can be made of a config."""
    annotated = [found for found, names in rotary_classes(package) if name in names]
    result = []
    for found in annotated or [found for found, _ in rotary_classes(package)]:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            result.append(found(config).eval())  # DINOv3 moves the patches of an image it trains on
    return [each for each in result if frequency_buffers(each) or hasattr(each, "freqs_ci")]


def frequency_buffers(rotary):
    return {
        name: buffer.double().numpy()
        for name, buffer in rotary.named_buffers()
        if "inv_freq" in name and "original" not in name
    }


def refusal(read):
    """(what a call gives, None) or (None, why it is refused)."""
    try:
        return read(), None
    except (TypeError, ValueError) as error:
        return None, str(error)


def by_layer_type(config):
    return {
        layer_type: from_config(config, layer_type=layer_type) for layer_type in layer_types(config)
    }


def agrees(ours, rotary):
    """Whether frequencies and scaling of every layer type are those of a module, of one or more."""
    buffers, compared = frequency_buffers(rotary), 0
    for layer_type, (inv_freq, scaling) in ours.items():
        prefix = "" if layer_type is None else f"{layer_type}_"
        theirs = buffers.get(f"{prefix}inv_freq")
        if theirs is None:  # of layers that this config has none of
            continue
        compared += 1
        if theirs.shape != inv_freq.shape or not np.allclose(inv_freq, theirs, FLOAT32, 0):
            return False
        if getattr(rotary, f"{prefix}attention_scaling", 1.0) != pytest.approx(scaling, rel=1e-9):
            return False
    return compared > 0


def grid(config, names):
    """Positions of 5 by 7 patches as a module takes them, and as `angles` does."""
    height, width = np.indices((5, 7)).reshape(2, -1)
    columns = {"time": height * 0 + 2, "height": height, "width": width}
    return np.stack([columns[name] for name in names], -1)


def cos_and_sin(rotary, config, rotation):
    """(cos, sin) of a module as (tokens, rotary_dim), and the angles of a rotation beside them."""
    points = grid(config, rotation.names)
    positions = torch.from_numpy(points)
    if hasattr(rotary, "freqs_ci"):  # Llama 4, whose table is that of its own grid and a class
        size = config.image_size // config.patch_size
        table = rotary.freqs_ci[: size**2, 0]
        pairs = (part.repeat_interleave(2, -1) for part in (table.real, table.imag))
        return *pairs, rotation.angles((size, size))
    if rotation.first is None:  # DINOv3, which is given an image
        result = rotary(torch.zeros(1, 3, 5 * config.patch_size, 7 * config.patch_size))
        return *result, rotation.angles((5, 7))
    if "text" in config.model_type:  # Ernie
        cos, sin = rotary(torch.zeros(1), positions.T[:, None])
    elif "Gemma4" in type(rotary).__name__:
        cos, sin = rotary(torch.zeros(1), positions[None])
    else:
        cos, sin = rotary(torch.zeros(1), positions)
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in (cos, sin))
    return cos, sin, rotation.angles(points)


def full_width(angles, rotation):
    """Angles as a module lays them out for its pairing."""
    if rotation.interleaved:
        return angles.repeat(2, -1)
    slices = np.split(angles, rotation.num_slices, -1)
    return np.concatenate([part for part in slices for _ in range(2)], -1)


def agrees_by_axes(rotation, rotary, config):
    cos, sin, angles = cos_and_sin(rotary, config, rotation)
    wide = full_width(angles, rotation)
    return (
        tuple(cos.shape) == wide.shape
        and np.abs(cos.double().numpy() - np.cos(wide)).max() < ANGLES
        and np.abs(sin.double().numpy() - np.sin(wide)).max() < ANGLES
    )


def judged(name, package, config):
    """What became of a config: "equal", "by axes", "refused", "no rotation", or what is wrong."""
    ours, why = refusal(lambda: by_layer_type(config))
    rotation = refusal(lambda: axial_from_config(config))[0]
    theirs = built(name, package, config)
    if rotation is not None and why is not None:
        if not theirs:
            part = getattr(config, "vision_config", None)
            own = None if part is None else refusal(lambda: axial_from_config(part))[0]
            same = own is not None and np.array_equal(own.inv_freq, rotation.inv_freq)
            return "by axes" if same else "axes without a module"
        right = [agrees_by_axes(rotation, rotary, config) for rotary in theirs]
        return "by axes" if all(right) else "other angles by axes"
    if why is not None:
        if not theirs:
            return "no rotation"
        return "refused" if re.search(REFUSED.get(name, "$^"), why) else f"refused: {why}"
    if theirs:
        right = [agrees(ours, rotary) for rotary in theirs]
        return "equal" if any(right) else "other frequencies"
    text = getattr(config, "text_config", None)
    if text is not None:  # which is judged by itself
        told = by_layer_type(text)
        same = told.keys() == ours.keys() and all(
            np.array_equal(told[key][0], ours[key][0]) for key in ours
        )
        return "equal" if same else "not that of its text_config"
    return "equal" if name in WITHOUT_MODULE else "frequencies without a module"


@pytest.fixture(scope="module")
def survey():
    """(config, verdict) of every config of defaults, by the name of its class."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of classes that are deprecated, or lack a package
        patch.setenv("HF_HUB_OFFLINE", "1")
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        found = {name: (config, judged(name, *rest, config)) for name, *rest, config in configs()}
        transformers.logging.set_verbosity(level)
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    return {name: told for name, told in found.items() if not (old and name in MENDED)}


def test_every_config_class_is_read_as_its_own_module_does_or_refused(survey):
    verdicts = [verdict for _, verdict in survey.values()]
    right = "equal", "by axes", "refused", "no rotation"
    assert not {name: verdict for name, (_, verdict) in survey.items() if verdict not in right}
    assert verdicts.count("equal") >= 200 and verdicts.count("by axes") >= 38
    assert verdicts.count("no rotation") >= 400


def test_models_without_a_rotation_are_refused(survey):
    without = """
        Albert Bart Bert Bloom CLIPText Deberta DistilBert Electra GPT2 GPTNeo Marian Mpt OPT
        Pegasus Roberta Siglip T5 ViT Whisper XLNet
    """
    for name in without.split():
        assert survey[f"{name}Config"][1] == "no rotation"


def test_what_is_saved_of_a_config_is_read_as_the_config_or_refused(survey):
    compared = 0
    for name, (config, verdict) in survey.items():
        if verdict not in ("equal", "by axes"):
            continue
        read = by_layer_type if verdict == "equal" else axial_from_config
        wanted = read(config)
        for fields in (config.to_dict(), config.to_diff_dict()):
            told, why = refusal(lambda read=read, fields=fields: read(fields))
            if why is not None:
                continue
            compared += 1
            if verdict == "by axes":
                assert np.array_equal(told.inv_freq, wanted.inv_freq), name
                assert np.array_equal(told.axes, wanted.axes), name
                continue
            for layer_type, (inv_freq, scaling) in wanted.items():
                assert np.array_equal(told[layer_type][0], inv_freq), (name, layer_type)
                assert told[layer_type][1] == scaling, (name, layer_type)
    assert compared >= 500


def test_the_pairing_of_a_model_is_that_of_its_function(survey):
    seen, x = {True: 0, False: 0}, torch.arange(8.0)[None, None, None]
    for name, (config, verdict) in survey.items():
        alone = verdict == "equal" and not config.sub_configs
        told = pairs_neighbours(config) if alone else None
        package = type(config).__module__.split(".")[2]
        functions = [
            getattr(module, function)
            for module in modules_of(package)
            for function in ("rotate_half", "rotate_every_two")
            if hasattr(module, function)
            and not hasattr(module, "apply_rotary_pos_emb_interleave")
            and not hasattr(module, "apply_rotary_emb")
        ]
        if told is None or not functions:
            continue
        rotated = [function(x)[0, 0, 0].tolist() for function in functions]
        assert all((abs(row[0]) == 1) == told for row in rotated), name
        seen[told] += 1
    assert seen[True] >= 10 and seen[False] >= 80
