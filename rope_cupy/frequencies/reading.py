"""Reading fields of a Hugging Face config, and refusing configs of other rotations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checks import described, index
from .models import (
    DIFFUSERS_BUILDERS,
    DIFFUSERS_FIELDS,
    MODEL_DEFAULTS,
    OTHER_ROTATIONS,
    POSITION_TYPE_DECIDES,
    SEVERAL_AXES,
    SHARE_DECIDES,
)
from .rules import partial_rotary_dim

MOST_ELEMENTS = 2**16  # of a head; a larger number in a config is a mistake
BASES = "rope_theta", "rotary_emb_base", "global_rope_theta", "rotary_embedding_base"
SHARES = "partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_emb_fraction"
PARAMETERS = "rope_scaling", "rope_parameters"
# A config that has one of these describes a rotary embedding.
EVIDENCE = (
    *(*PARAMETERS, *SHARES, "rope_theta", "rotary_emb_base", "global_rope_theta"),
    *("rope_local_base_freq", "local_rope_theta", "rotary_dim"),
)
NAMES = "model_type", "architectures", "_class_name"  # fields that name the model
ROTARY_POSITION_TYPES = "rotary", "rope"
POSITION_TYPES = "position_embedding_type", "position_embeddings_type"


def read(config: Any, *names: str, otherwise: Any = None) -> Any:
    """Return the first of these fields that is present and not null."""
    if isinstance(config, Mapping):
        sources: tuple[Any, ...] = config, MODEL_DEFAULTS.get(model_type_of(config), {})
        values = (source.get(name) for source in sources for name in names)
    else:
        values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), otherwise)


def model_type_of(config: Any) -> str:
    """Return the model_type of a config, or "" if it has none."""
    known = isinstance(config, Mapping)
    found = config.get("model_type") if known else getattr(config, "model_type", None)
    return found if isinstance(found, str) else ""


def head_dim_of(config: Any) -> int:
    """Return the number of elements of a head."""
    head_dim = read(config, "head_dim", "kv_channels", "attention_head_dim")
    if head_dim is None:
        hidden_size = read(config, "hidden_size", "n_embd", "d_model")
        num_heads = read(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
        if hidden_size is None or not num_heads:
            raise ValueError(
                "config must have head_dim, or hidden_size and num_attention_heads, got "
                f"hidden_size={_shown(hidden_size)} and num_attention_heads={_shown(num_heads)}"
            )
        head_dim = index("hidden_size", hidden_size) // index("num_attention_heads", num_heads)
    return few_elements("head_dim", head_dim)


def few_elements(name: str, value: object) -> int:
    """Return a number of elements of a head, or refuse a number that is too large."""
    number = index(name, value)
    if number > MOST_ELEMENTS:
        raise ValueError(f"{name} must be at most {MOST_ELEMENTS} in a config, got {number}")
    return number


def _has(config: Any, name: str) -> bool:
    """Return whether a config itself has this field, neither null nor empty."""
    if isinstance(config, Mapping):
        return config.get(name) not in (None, {}) or (name == "rotary_dim" and name in config)
    return getattr(config, name, None) not in (None, {})


def is_null(config: Any, name: str) -> bool:
    """Return whether a config has null for a field, and does not just leave it out."""
    if isinstance(config, Mapping):
        return name in config and config[name] is None
    return getattr(config, name, "") is None


def says_anything(config: Any) -> bool:
    return any(_has(config, name) for name in EVIDENCE) or model_type_of(config) in SEVERAL_AXES


def instead_of_rotation(config: Any) -> str:
    """Return what a config has instead of a rotary embedding, or "" if it describes one."""
    position_type = read(config, *POSITION_TYPES)
    named = next((name for name in POSITION_TYPES if _has(config, name)), POSITION_TYPES[0])
    said = f"{named}={_shown(position_type)}"
    if model_type_of(config) in POSITION_TYPE_DECIDES:
        return "" if position_type in ROTARY_POSITION_TYPES else said
    attention = read(config, "attn_config")
    if _has(config, "alibi") and read(config, "alibi"):
        return "alibi=True"
    if read(attention, "alibi"):
        return "alibi=True in its attn_config"
    for name, off in ("use_mem_rope", False), ("rotary_emb_fraction", 0):
        if read(config, name) == off:
            return f"{name}={off}"
    if isinstance(position_type, str) and re.match("(?!no).*(rope|rotary)", position_type, re.I):
        return ""
    # BERT's "absolute" stands in files of models that rotate (ModernBERT).
    if position_type not in (None, "absolute"):
        return said
    if says_anything(config) or model_type_of(config) in MODEL_DEFAULTS:
        return ""
    if read(attention, "rope"):
        return "rope in its attn_config, which is not read (give head_dim and rope_theta),"
    if position_type is not None:
        return said
    named_model = any(_has(config, name) for name in NAMES) or hasattr(config, "model_type")
    return "none of them" if named_model else ""


def refuse_another_rotation(config: Any) -> None:
    """Refuse a config of a model whose rotation is not by one position and fixed frequencies."""
    if _is_of_diffusers(config):
        class_name = config.get("_class_name")
        builder = DIFFUSERS_BUILDERS.get(class_name) if isinstance(class_name, str) else None
        if builder == "qwen_image" and config.get("use_layer3d_rope"):
            builder = "qwen_image_layered"
        makes = f"rope_cupy.diffusion.{builder} makes its table"
        if builder is None:
            makes = (
                "where it rotates, its table is made by rope_cupy.diffusion (flux, qwen_image, wan "
                "and others) or of the angles of rope_cupy.frequencies.axial"
            )
        named = f" of {class_name!r}" if isinstance(class_name, str) else ""
        raise ValueError(
            f"config must be that of a language model, got one of diffusers{named}: {makes}"
        )
    model_type = model_type_of(config)
    if factor := read(config, "rotary_scaling_factor"):
        raise ValueError(
            f"config must have no rotary_scaling_factor, got {described(factor)}: give it as "
            'rope_scaling of the type "dynamic", and max_trained_positions as '
            "max_position_embeddings"
        )
    if model_type in OTHER_ROTATIONS:
        raise ValueError(
            f"config must be of a model whose frequencies it holds, got {model_type!r}, "
            f"{OTHER_ROTATIONS[model_type]}"
        )
    if model_type in SEVERAL_AXES:
        raise ValueError(
            f"config must be of a model that rotates by one position, got {model_type!r}, which "
            "rotates by several: rope_cupy.frequencies.axial_from_config reads it"
        )


def _is_of_diffusers(config: Any) -> bool:
    if not isinstance(config, Mapping):
        return False
    if type(config).__module__.startswith("diffusers.") or "_class_name" in config:
        return True
    return not model_type_of(config) and any(field in config for field in DIFFUSERS_FIELDS)


def of_what_model(config: Any) -> str:
    if model_type := model_type_of(config):
        return f" in that of {model_type!r}"
    return ""


def parts_that_rotate(config: Any) -> str:
    fields = config if isinstance(config, Mapping) else vars(config)
    parts = [
        str(name)
        for name, part in fields.items()
        if (isinstance(part, Mapping) or hasattr(part, "model_type"))
        and name not in PARAMETERS
        and (says_anything(part) or model_type_of(part) in MODEL_DEFAULTS)
        and _has_heads(part)
    ]
    return f": pass its {' or '.join(parts)}" if parts else ""


def _has_heads(part: Any) -> bool:
    """Return whether a part of a config says how many elements of a head are rotated."""
    if model_type_of(part) in SEVERAL_AXES:
        return True
    try:
        return rotary_dim_of(part, 1.0) > 0
    except (TypeError, ValueError):
        return False


def _shown(value: object) -> str:
    return "None" if value is None else described(value)


def rotary_dim_of(config: Any, partial_rotary_factor: float) -> int:
    said = read(config, "rotary_dim", "qk_rope_head_dim")
    if not said:
        return partial_rotary_dim(head_dim_of(config), partial_rotary_factor)
    rotary_dim = few_elements("rotary_dim", said)
    if model_type_of(config) in SHARE_DECIDES:
        share = partial_rotary_dim(head_dim_of(config), partial_rotary_factor)
        if rotary_dim != share:
            raise ValueError(
                f"rotary_dim must be head_dim * partial_rotary_factor = {share}, which is what "
                f"transformers rotates of {model_type_of(config)!r}, got {rotary_dim}"
            )
    return rotary_dim
