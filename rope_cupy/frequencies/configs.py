"""The rotary embedding of a model, read from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import described, positive
from .models import (
    INTERLEAVED,
    MODEL_DEFAULTS,
    UNROTATED,
)
from .reading import (
    BASES,
    MOST_ELEMENTS,
    PARAMETERS,
    SHARES,
    head_dim_of,
    instead_of_rotation,
    is_null,
    model_type_of,
    of_what_model,
    parts_that_rotate,
    read,
    refuse_another_rotation,
    rotary_dim_of,
    says_anything,
)
from .rules import (
    as_length,
    dynamic_ntk,
    inverse_frequencies,
    linear,
    llama3,
    longrope,
    ntk,
    proportional,
    yarn,
)

if TYPE_CHECKING:
    from .rules import Frequencies


class RotaryParameters(NamedTuple):
    """What a config says about the rotary embedding of its layers.

    Attributes:
        rope_type: a key of `RULES`.
        rotary_dim: the number of elements of a head that are rotated.
        base: the base of the frequencies.
        options: the keyword arguments of the rule, without seq_len.
        max_position: the number of positions that the model is made for, or None.
    """

    rope_type: str
    rotary_dim: int
    base: float
    options: dict[str, Any]
    max_position: int | None


class Rule(NamedTuple):
    """How to compute the frequencies of a type that a config names.

    Attributes:
        function: the function of this package.
        required: its keyword arguments that the config must have.
        optional: its keyword arguments that the config may have.
        by_length: whether it takes seq_len.
    """

    function: Callable[..., Any]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    by_length: bool = False


RULES = {
    "default": Rule(inverse_frequencies),
    "linear": Rule(linear, ("factor",)),
    "ntk": Rule(ntk, ("alpha",)),
    "dynamic": Rule(dynamic_ntk, ("factor", "max_position"), by_length=True),
    "yarn": Rule(
        yarn,
        ("factor", "original_max_position"),
        (
            *("beta_fast", "beta_slow", "truncate", "attention_factor"),
            *("attn_factor", "mscale", "mscale_all_dim"),
        ),
    ),
    "longrope": Rule(
        longrope,
        ("short_factor", "long_factor", "original_max_position", "factor"),
        ("attention_factor", "short_mscale", "long_mscale"),
        by_length=True,
    ),
    "llama3": Rule(
        llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position")
    ),
    "proportional": Rule(proportional, (), ("partial_rotary_factor", "factor")),
}
ALIASES = {"su": "longrope", "mrope": "default"}

# Fields of YaRN configs that other programs let differ, and the only values of them taken here.
YARN_ONLY_AT = {"extrapolation_factor": 1, "apply_yarn_scaling": True}


def from_config(
    config: Any, *, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Frequencies, float]:
    """Return (inv_freq, attention_scaling) of the model that a Hugging Face config describes.

    A config describes a rotary embedding if it has `rope_parameters`, `rope_scaling`, `rope_theta`,
    `partial_rotary_factor` or the names of single models for these, if its
    `position_embedding_type` is "rotary", "rope" or "rope_gptj", or if its `model_type` is a model
    that always rotates ("llama"). A dict that names no model (no `model_type`, no `architectures`)
    is read as that of a Llama. Every other config is refused, and so is a config with
    ``alibi=True`` or another `position_embedding_type`.

    Args:
        config: a config object or its dict, such as a parsed config.json, with the
            `rope_parameters` of transformers 5 or the older `rope_theta`, `rope_scaling` and
            `partial_rotary_factor`. If only the `text_config` of a config says anything about
            rotary embeddings, that part is read.
        seq_len: the number of tokens of the longest sequence, on which "dynamic" and "longrope"
            depend. None, as when transformers makes a model, means up to the original length.
        layer_type: the type of layers whose frequencies are wanted, such as "full_attention" or
            "sliding_attention" (Gemma 3), or None where all layers have the same.

    Returns:
        inv_freq: float64, of shape (rotary_dim / 2,), in radians per position.
        attention_scaling: the factor of cos and sin, 1.0 for most types.

    The types are "default" and "mrope", "linear", "dynamic" (`ntk` where the config has an
    `alpha`), "yarn", "longrope" and "su", "llama3", and "proportional". transformers computes the
    same in float32. The `attn_factor` of a YaRN config multiplies the attention scaling, as in
    vLLM; transformers does not read it.

    Models that rotate by several axes ("axial", DINOv3, Ernie 4.5 VL) have other frequencies, which
    `axial_from_config` reads. The frequencies of Mistral Large 4 are trained and in no config.

    Raises TypeError or ValueError if the config describes no rotary embedding, or one of several
    axes; if its type is unknown; if it lacks a number or has one that its rule refuses; if
    `seq_len` is neither None nor an int of 0 or more; and if the config has no such `layer_type`.

    >>> scaling = {"rope_type": "linear", "factor": 2.0}
    >>> from_config({"head_dim": 4, "rope_theta": 100.0, "rope_scaling": scaling})
    (array([0.5 , 0.05]), 1.0)
    """
    seq_len = as_length(seq_len)
    parameters = rotary_parameters(config, layer_type=layer_type)
    rule = RULES[parameters.rope_type]
    options = parameters.options | ({"seq_len": seq_len} if rule.by_length else {})
    result = rule.function(parameters.rotary_dim, parameters.base, **options)
    return result if isinstance(result, tuple) else (result, 1.0)


def rotary_parameters(config: Any, *, layer_type: str | None = None) -> RotaryParameters:
    """Return what a Hugging Face config, or its dict, says about its rotary embedding.

    Arguments and errors are as for `from_config`, except that numbers are not checked.

    >>> config = {"hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 2048}
    >>> rotary_parameters(config)
    RotaryParameters(rope_type='default', rotary_dim=8, base=10000.0, options={}, max_position=2048)
    """
    config = part_that_rotates(config)
    given = _of_layer_type(rope_parameters(config), layer_type)
    config = _as_layers_see_it(config, layer_type)
    rope_type = _rope_type(given)
    max_position = read(config, "max_position_embeddings", "n_positions")
    original = read(given, "original_max_position_embeddings")
    if layer_type is None:
        original = read(config, "original_max_position_embeddings", otherwise=original)
    if original is None:
        original = max_position
    partial = read(config, *SHARES, otherwise=1.0)
    found = {**given, "original_max_position": original, "max_position": max_position}
    found["partial_rotary_factor"] = partial = read(given, "partial_rotary_factor") or partial
    if rope_type in ("yarn", "longrope") and given.get("factor") is None:
        found["factor"] = _quotient(max_position, original)
    for name, value in YARN_ONLY_AT.items() if rope_type == "yarn" else ():
        if read(given, name, otherwise=value) != value:
            raise ValueError(f"{name} must be {value} or absent, got {described(given[name])}")
    base = read(given, "rope_theta", otherwise=read(config, *BASES, otherwise=10000.0))
    of_attention = read(read(config, "attn_config"), "rope_theta")
    if of_attention not in (None, base):
        raise ValueError(
            f"rope_theta must be that of attn_config, got {described(base)} and, in attn_config, "
            f"{described(of_attention)}: not every program reads the second, so give the one that "
            "the model was trained with as rope_theta"
        )
    rule = RULES[rope_type]
    options = {name: found.get(name) for name in rule.required + rule.optional}
    if missing := [name for name in rule.required if options[name] is None]:
        raise ValueError(
            f"rope_parameters of type {rope_type!r} must have {', '.join(missing)}, "
            f"got {', '.join(map(str, given)) or 'none'}"
        )
    return RotaryParameters(
        rope_type,
        head_dim_of(config) if rope_type == "proportional" else rotary_dim_of(config, partial),
        base,
        {name: value for name, value in options.items() if value is not None},
        max_position,
    )


def layer_types(config: Any) -> tuple[str | None, ...]:
    """Return the layer types that have their own rotary embedding in a config, or in its dict.

    The result is (None,) where all layers have the same. Errors are as for `from_config`.

    >>> layer_types({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})
    ('full_attention',)
    """
    given = rope_parameters(part_that_rotates(config))
    return tuple(layer_type for layer_type, parameters in given.items() if parameters is not None)


def pairs_neighbours(config: Any) -> bool | None:
    """Return whether the model pairs neighbouring elements, or None if this is not known.

    The result is the argument `interleaved` of the functions that rotate: False pairs halves.

    >>> pairs_neighbours({"model_type": "glm4"}), pairs_neighbours({"model_type": "llama"})
    (True, False)
    """
    config = part_that_rotates(config)
    said = read(config, "rope_interleave")
    model_type = model_type_of(config)
    if isinstance(own := read(config, "rotary_emb_interleaved"), bool):
        return own
    if model_type in INTERLEAVED:
        return bool(said) if isinstance(said, bool) else True
    return False if model_type in MODEL_DEFAULTS else None


def layers_that_rotate(config: Any) -> list[bool]:
    """Return whether each layer rotates, or [] if all do or only their interval is known."""
    given = _int_up_to(MOST_ELEMENTS, read(config, "num_hidden_layers"))
    said = read(config, "no_rope_layers", "layer_rope_theta")  # 0 means no rotation
    if isinstance(said, list | tuple) and said:
        return [each != 0 for each in said[:given]]
    rule = UNROTATED.get(model_type_of(config))
    if rule and rule.by_type and not is_null(config, "sliding_window"):
        types, pattern = read(config, "layer_types"), read(config, rule.interval_name)
        if isinstance(types, list | tuple) and types:
            return [name == "sliding_attention" for name in types[:given]]
        # The letters L and G, for local and global layers, repeat. The last layer is global.
        if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
            local = [pattern[layer % len(pattern)] == "L" for layer in range(given or 0)]
            return [*local[:-1], False] if local else []
    interval = unrotated_interval(config)
    if interval is None or given is None:
        return []
    return [(layer + 1) % interval != 0 for layer in range(given)]


def unrotated_interval(config: Any) -> int | None:
    """Return n where every n-th layer does not rotate, or None if the config does not say so."""
    rule = UNROTATED.get(model_type_of(config))
    if rule is None:
        interval = read(config, "no_rope_layer_interval", "nope_layer_interval")
    elif rule.by_type and is_null(config, "sliding_window"):
        return None
    else:
        interval = read(config, rule.interval_name, otherwise=rule.interval)
    return _int_up_to(MOST_ELEMENTS, interval)


def _int_up_to(most: int, value: object) -> int | None:
    """Return a plausible positive int of a config, or None for all else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
        return value
    return None


def part_that_rotates(config: Any) -> Any:
    """Return the part of a config that describes a rotary embedding, or refuse the config."""
    if not isinstance(config, Mapping) and not hasattr(config, "__dict__"):
        raise TypeError(f"config must be a config object or its dict, got {described(config)}")
    text = None if says_anything(config) else read(config, "text_config")
    if text is not None:
        if not isinstance(text, Mapping) and not hasattr(text, "__dict__"):
            raise TypeError(f"text_config must be a config or a dict, got {described(text)}")
        config = text
    refuse_another_rotation(config)
    if got := instead_of_rotation(config):
        raise ValueError(
            "config must describe a rotary embedding by rope_theta, rope_parameters or the like, "
            f"got {got}{of_what_model(config)}{parts_that_rotate(config)}"
        )
    return config


def rope_parameters(config: Any) -> dict[str | None, Mapping[str, Any] | None]:
    """Return the rope parameters of each layer type, under the key None for all layers.

    A value of None means that layers of this type do not rotate.
    """
    given: Any = next((found for name in PARAMETERS if (found := read(config, name))), {})
    if not isinstance(given, Mapping):
        raise TypeError(f"rope_parameters must be a dict, got {described(given)}")
    if any(isinstance(value, Mapping) for value in given.values()):
        kinds = Mapping, type(None)
        return {key: value for key, value in given.items() if isinstance(value, kinds)}
    sliding_base = read(config, "rope_local_base_freq", "local_rope_theta")
    if model_type_of(config) == "olmo3":
        sliding_base = read(config, "rope_theta")
    if sliding_base is None:
        return {None: given}
    return {"full_attention": given, "sliding_attention": {"rope_theta": sliding_base}}


def _of_layer_type(
    given: dict[str | None, Mapping[str, Any] | None], layer_type: str | None
) -> Mapping[str, Any]:
    parameters = given.get(layer_type)
    if parameters is None:
        rotated = [name for name in given if given[name] is not None]
        without = " (the others do not rotate)" if len(rotated) < len(given) else ""
        raise ValueError(
            f"layer_type must be {' or '.join(map(repr, rotated))} for this config{without}, "
            f"got {layer_type!r}"
        )
    return parameters


def _as_layers_see_it(config: Any, layer_type: str | None) -> Any:
    """Return the config with the head_dim of the layers of one type (Gemma 4 has two)."""
    if not isinstance(config, Mapping):
        several = layer_type is not None and getattr(config, "is_heterogeneous", False)
        if not several:
            return config
        try:
            return config.per_layer_config[layer_type]
        except KeyError as error:
            raise ValueError(f"config must have layers of the type {layer_type!r}") from error
    types, layers = config.get("layer_types") or (), config.get("per_layer_config") or {}
    if not isinstance(types, list | tuple) or not isinstance(layers, Mapping):
        raise TypeError(
            "layer_types must be a list and per_layer_config a dict, got "
            f"{described(types)} and {described(layers)}"
        )
    named = {str(layer): name for layer, name in enumerate(types)}
    own = [fields for layer, fields in layers.items() if named.get(str(layer)) == layer_type]
    if layer_type == "full_attention" and read(config, "global_head_dim"):
        own.append({"head_dim": read(config, "global_head_dim")})
    if own and not isinstance(own[0], Mapping):
        raise TypeError(f"per_layer_config must hold dicts, got {described(own[0])}")
    return {**config, **own[0]} if own else config


def _rope_type(given: Mapping[str, Any]) -> str:
    name = read(given, "rope_type", "type", otherwise="default")
    rope_type = ALIASES.get(name, name) if isinstance(name, str) else ""
    if rope_type == "yarn" and "long_factor" in given:  # early files of Phi-3 have this name
        rope_type = "longrope"
    if rope_type == "dynamic" and given.get("alpha"):
        rope_type = "ntk"
    if rope_type == "axial":
        raise ValueError(
            "rope_type must be of one position, got 'axial': where the model is known, "
            "rope_cupy.frequencies.axial_from_config reads it"
        )
    if rope_type not in RULES:
        wanted = ", ".join([*RULES, *ALIASES])
        raise ValueError(f"rope_type must be one of {wanted}, got {described(name)}")
    return rope_type


def _quotient(max_position: Any, original: Any) -> float | None:
    if max_position is None:
        return None
    longest = positive("max_position_embeddings", max_position)
    return longest / positive("original_max_position_embeddings", original)
