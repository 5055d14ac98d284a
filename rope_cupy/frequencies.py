"""Inverse frequencies: how far each pair turns from one position to the next. NumPy, float64.

A model extends its context by other frequencies than it was first trained with. Each function here
is one rule; `from_config` finds the rule and its numbers in a Hugging Face config. Some rules also
scale attention: cos and sin are then multiplied by the `attention_scaling` that comes with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .checks import described, index, positive

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Frequencies = NDArray[np.float64]


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> Frequencies:
    """Return base ** (-2 i / rotary_dim) of each pair i, in radians per position.

    The result is float64, of shape (rotary_dim / 2,).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
    section 3.2.2.

    Raises TypeError or ValueError when `rotary_dim` is not a positive even int or `base` is not a
    positive number.

    >>> inverse_frequencies(4, base=100.0)
    array([1. , 0.1])
    """
    rotary_dim, base = _even("rotary_dim", rotary_dim), positive("base", base)
    return np.power(base, -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def partial_rotary_dim(head_dim: int, partial_rotary_factor: float) -> int:
    """Return how many elements of a head turn when only a part of it does, rounded down.

    Source: Black et al., "GPT-NeoX-20B: An Open-Source Autoregressive Language Model" (2022),
    section 2.1.1, which turns the first quarter of each head.

    Raises TypeError or ValueError when `head_dim` is not a positive int, `partial_rotary_factor`
    not a number in (0, 1], or what turns would be no even number of elements.

    >>> partial_rotary_dim(96, 0.25)
    24
    """
    head_dim = index("head_dim", head_dim)
    factor = positive("partial_rotary_factor", partial_rotary_factor)
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(
            "partial_rotary_factor must be in (0, 1] and turn a positive even number of the "
            f"head_dim={head_dim} elements, got {partial_rotary_factor}"
        )
    return rotary_dim


def linear(rotary_dim: int, base: float = 10000.0, *, factor: float) -> Frequencies:
    """Return inverse frequencies divided by `factor`: positions `factor` times denser.

    The result is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation" (2023), section 2.3.

    Raises TypeError or ValueError as `inverse_frequencies`, and when `factor` is not a positive
    number.

    >>> linear(4, base=100.0, factor=2.0)
    array([0.5 , 0.05])
    """
    return inverse_frequencies(rotary_dim, base) / positive("factor", factor)


def ntk(rotary_dim: int, base: float = 10000.0, *, alpha: float) -> Frequencies:
    """Return inverse frequencies of the base times alpha ** (rotary_dim / (rotary_dim - 2)).

    The first pair turns as before, the last 1 / alpha as fast. The result is float64, of shape
    (rotary_dim / 2,), in radians per position.

    Source: "NTK-aware" interpolation, in Peng et al., "YaRN: Efficient Context Window Extension of
    Large Language Models" (2023), section 3.1.

    Raises TypeError or ValueError as `inverse_frequencies`, when `rotary_dim` is 2, and when
    `alpha` is not a positive number.

    >>> ntk(4, base=100.0, alpha=2.0)
    array([1.  , 0.05])
    """
    rotary_dim, base = _even("rotary_dim", rotary_dim), positive("base", base)
    alpha = positive("alpha", alpha)
    if rotary_dim == 2:
        raise ValueError("rotary_dim must be 4 or more for a new base to change it, got 2")
    return inverse_frequencies(rotary_dim, base * alpha ** (rotary_dim / (rotary_dim - 2)))


def dynamic_ntk(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    factor: float,
    max_position: int,
    seq_len: int | None = None,
) -> Frequencies:
    """Return NTK-aware inverse frequencies for a sequence of `seq_len` tokens.

    Up to `max_position` tokens, or with ``seq_len=None``, they are the plain ones; beyond it they
    are `ntk` with alpha = factor * seq_len / max_position - (factor - 1). The result is float64, of
    shape (rotary_dim / 2,), in radians per position, and differs for every longer sequence: keys
    that were rotated for a shorter one do not fit it.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    section 3.3, where factor is 1.

    Raises TypeError or ValueError as `ntk`, when `factor` or `max_position` is not a positive
    number, and when `seq_len` is not None or an int of 0 or more.

    >>> dynamic_ntk(4, base=100.0, factor=1.0, max_position=2048, seq_len=4096)
    array([1.  , 0.05])
    """
    factor = positive("factor", factor)
    max_position = positive("max_position", max_position)  # type: ignore[assignment]
    length = max(_length(seq_len) or 0, max_position)
    return ntk(rotary_dim, base, alpha=1 + factor * (length / max_position - 1))


def yarn(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> tuple[Frequencies, float]:
    """Return (inv_freq, attention_scaling) of YaRN.

    A pair that turns more than `beta_fast` times within `original_max_position` tokens keeps its
    frequency, one that turns less than `beta_slow` times has it divided by `factor`, and those
    between go linearly, by their index, from one to the other. ``truncate=True`` first moves both
    ends to whole pairs, down and up; GPT-OSS does not.

    attention_scaling is `attention_factor` where given, else 0.1 ln(factor) + 1 (1 for a factor up
    to 1). DeepSeek gives both `mscale` and `mscale_all_dim`: then it is 0.1 mscale ln(factor) + 1
    over 0.1 mscale_all_dim ln(factor) + 1. One alone, or 0, counts as none. DeepSeek also
    multiplies its softmax scale by the square of that divisor, which is not in this result.

    inv_freq is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    sections 3.2 and 3.4. The paper's ramp is linear in the number of turns; this one, linear in the
    index of the pair, is that of the authors' code, with which every model was trained.

    Raises TypeError or ValueError as `inverse_frequencies`, when `base` is not more than 1, another
    number not positive, `beta_fast` less than `beta_slow` or `truncate` no bool.

    >>> inv_freq, attention_scaling = yarn(8, factor=4.0, original_max_position=4096)
    >>> inv_freq
    array([1.00e+00, 1.00e-01, 6.25e-03, 2.50e-04])
    >>> round(attention_scaling, 4)
    1.1386
    """
    inv_freq = inverse_frequencies(rotary_dim, base)
    base = positive("base", base, above=1)
    factor = positive("factor", factor)
    original = positive("original_max_position", original_max_position)
    fast, slow = positive("beta_fast", beta_fast), positive("beta_slow", beta_slow)
    if fast < slow:
        raise ValueError(f"beta_fast must be beta_slow={beta_slow} or more, got {beta_fast}")
    if not isinstance(truncate, bool):
        raise TypeError(f"truncate must be a bool, got {described(truncate)}")
    scaling = _yarn_scaling(factor, attention_factor, mscale, mscale_all_dim)

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(base))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001
    interpolated = np.clip((np.arange(len(inv_freq)) - first) / width, 0, 1)
    return inv_freq * (1 - interpolated) + inv_freq / factor * interpolated, scaling


def longrope(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position: int,
    factor: float,
    seq_len: int | None = None,
    attention_factor: float | None = None,
    short_mscale: float | None = None,
    long_mscale: float | None = None,
) -> tuple[Frequencies, float]:
    """Return (inv_freq, attention_scaling) of LongRoPE, for a sequence of `seq_len` tokens.

    The frequency of each pair is divided by its own number: of `short_factor` up to
    `original_max_position` tokens, or with ``seq_len=None``, and of `long_factor` beyond it.
    attention_scaling is `short_mscale` or `long_mscale` where given (Phi-3.5-MoE), else
    `attention_factor` where given, else sqrt(1 + ln(factor) / ln(original_max_position)), or 1 for
    a `factor` (of the longest context over the original one) up to 1.

    inv_freq is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens" (2024),
    section 3; attention_scaling is not in the paper but in the code published with Phi-3 (2024).

    Raises TypeError or ValueError as `inverse_frequencies`, when `short_factor` or `long_factor` is
    not rotary_dim / 2 positive numbers, another number not positive, `original_max_position` not
    more than 1, or `seq_len` not None or an int of 0 or more.

    >>> longrope(4, 100.0, short_factor=[1, 1], long_factor=[1, 4], original_max_position=4096,
    ...          factor=4096.0, seq_len=8192)
    (array([1.   , 0.025]), 1.4142135623730951)
    """
    inv_freq = inverse_frequencies(rotary_dim, base)
    short = _one_a_pair("short_factor", short_factor, len(inv_freq))
    long = _one_a_pair("long_factor", long_factor, len(inv_freq))
    original = positive("original_max_position", original_max_position, above=1)
    factor = positive("factor", factor)
    scaling = _optional("attention_factor", attention_factor)
    if scaling is None:
        scaling = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    short_scaling = _optional("short_mscale", short_mscale) or scaling
    long_scaling = _optional("long_mscale", long_mscale) or scaling
    if (_length(seq_len) or 0) > original:
        return inv_freq / long, long_scaling
    return inv_freq / short, short_scaling


def llama3(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> Frequencies:
    """Return the inverse frequencies of Llama 3.1 and later.

    A pair that turns more than `high_freq_factor` times within `original_max_position` tokens keeps
    its frequency, one that turns less than `low_freq_factor` times has it divided by `factor`, and
    those between go linearly, by how often they turn, from one to the other. Where both are one
    number, as in Llama 4, there is nothing between. The result is float64, of shape
    (rotary_dim / 2,), in radians per position.

    Source: the code published with Llama 3.1 (Meta, 2024); it is the "NTK-by-parts" interpolation
    of Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    section 3.2.

    Raises TypeError or ValueError as `inverse_frequencies`, when another number is not positive or
    `high_freq_factor` less than `low_freq_factor`.

    >>> llama3(4, 1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    ...        original_max_position=256)
    array([1.     , 0.00125])
    """
    inv_freq, factor = inverse_frequencies(rotary_dim, base), positive("factor", factor)
    low = positive("low_freq_factor", low_freq_factor)
    high = positive("high_freq_factor", high_freq_factor)
    if high < low:
        raise ValueError(
            f"high_freq_factor must be low_freq_factor={low_freq_factor} or more, "
            f"got {high_freq_factor}"
        )
    turns = inv_freq * positive("original_max_position", original_max_position) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
    return inv_freq / factor * (1 - kept) + inv_freq * kept


def proportional(
    head_dim: int,
    base: float = 10000.0,
    *,
    partial_rotary_factor: float = 1.0,
    factor: float = 1.0,
) -> Frequencies:
    """Return inverse frequencies of a whole head, the lowest of which are 0 (Gemma 4).

    Unlike a partial rotary embedding, the pairs that turn are the first `partial_rotary_factor` of
    those of the whole head, at their frequencies there over `factor`; the others stand still. The
    result is float64, of shape (head_dim / 2,), in radians per position.

    Source: p-RoPE, in Barbero et al., "Round and Round We Go! What makes Rotary Positional
    Encodings useful?" (2024), section 6.

    Raises TypeError or ValueError when `head_dim` is not a positive even int, `base` or `factor`
    not a positive number, or `partial_rotary_factor` not in (0, 1].

    >>> proportional(8, partial_rotary_factor=0.5)
    array([1. , 0.1, 0. , 0. ])
    """
    head_dim, share = _even("head_dim", head_dim), partial_rotary_factor
    if positive("partial_rotary_factor", share) > 1:
        raise ValueError(f"partial_rotary_factor must be in (0, 1], got {share}")
    inv_freq = linear(head_dim, base, factor=factor)
    inv_freq[int(share * head_dim // 2) :] = 0
    return inv_freq


def xpos_scale(
    rotary_dim: int, positions: Any, *, scale_base: float = 512.0, gamma: float = 0.4
) -> Frequencies:
    """Return xPos's scale of each position and pair: multiply q by it, divide k by it.

    The scale of position n and pair i is ((2 i / rotary_dim + gamma) / (1 + gamma)) ** (n /
    scale_base), so that the product of q and k decays with their distance, and a distance that
    grows does not overflow if positions count from the middle of the sequence. `positions` are
    real numbers of shape (s,); the result is float64, of shape (s, rotary_dim / 2).

    Source: Sun et al., "A Length-Extrapolatable Transformer" (2022), algorithm 1; the scale_base is
    that of the authors' code.

    Raises TypeError or ValueError when `rotary_dim` is not a positive even int, `positions` not
    real numbers of one axis, or `scale_base` or `gamma` not a positive number.

    >>> xpos_scale(4, [0, 1], scale_base=1.0, gamma=1.0)
    array([[1.  , 1.  ],
           [0.5 , 0.75]])
    """
    rotary_dim = _even("rotary_dim", rotary_dim)
    scale_base, gamma = positive("scale_base", scale_base), positive("gamma", gamma)
    powers = _numbers("positions", positions) / scale_base
    zeta = (np.arange(0, rotary_dim, 2) / rotary_dim + gamma) / (1 + gamma)
    return np.power(zeta, powers[:, None])


def cos_sin(
    inv_freq: NDArray[Any], num_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of position * inv_freq, computed in float64, stored as float32.

    Both have the shape (num_positions, rotary_dim / 2).
    """
    angles = np.outer(np.arange(num_positions, dtype=np.float64), inv_freq)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class RotaryParameters(NamedTuple):
    """What a config says about the rotary embedding of its layers."""

    rope_type: str  # a key of RULES
    rotary_dim: int  # how many elements of a head the frequencies are for
    base: float
    options: dict[str, Any]  # the keyword arguments of the rule, without seq_len
    max_position: int | None  # how many positions the model is made for


class Rule(NamedTuple):
    """How a type of a config becomes frequencies."""

    function: Callable[..., Any]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    by_length: bool = False  # whether the function takes seq_len


RULES = {
    "default": Rule(inverse_frequencies),
    "linear": Rule(linear, ("factor",)),
    "ntk": Rule(ntk, ("alpha",)),
    "dynamic": Rule(dynamic_ntk, ("factor", "max_position"), by_length=True),
    "yarn": Rule(
        yarn,
        ("factor", "original_max_position"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
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

# What files of these models may leave out, because the classes that read them give it.
MODEL_DEFAULTS: dict[str, dict[str, float]] = {
    "apertus": {"rope_theta": 12e6},
    "bamba": {"partial_rotary_factor": 0.5},
    "cohere": {"rope_theta": 5e5},
    "ernie4_5": {"rope_theta": 5e5, "head_dim": 128},
    "ernie4_5_moe": {"rope_theta": 5e5},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 256},
    "gemma3n_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 256},
    "glm": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "glm4": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {"rope_theta": 15e4, "head_dim": 64},
    "helium": {"rope_theta": 1e5, "head_dim": 128},
    "lfm2": {"rope_theta": 1e6},
    "llama4_text": {"rope_theta": 5e5, "head_dim": 128},
    "minimax_m2": {"rope_theta": 5e6, "head_dim": 128},
    "mixtral": {"rope_theta": 1e6},
    "mllama_text_model": {"rope_theta": 5e5},
    "modernbert": {"global_rope_theta": 16e4, "local_rope_theta": 1e4},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "olmo3": {"rope_theta": 5e5},
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"rope_theta": 1e6},
    "qwen2_5_vl_text": {"rope_theta": 1e6},
    "qwen2_vl_text": {"rope_theta": 1e6},
    "qwen3": {"head_dim": 128},
    "qwen3_5_text": {"partial_rotary_factor": 0.25, "head_dim": 256},
    "qwen3_next": {"partial_rotary_factor": 0.25, "head_dim": 256},
    "qwen3_vl_text": {"rope_theta": 5e5, "head_dim": 128},
    "smollm3": {"rope_theta": 2e6},
    "stablelm": {"partial_rotary_factor": 0.25},
}


def from_config(
    config: Any, *, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Frequencies, float]:
    """Return (inv_freq, attention_scaling) of the model that a Hugging Face config describes.

    Args:
        config: a config object or its dict, such as a parsed config.json: `rope_parameters` of
            transformers 5 or the older `rope_theta`, `rope_scaling`, `partial_rotary_factor` and
            what single models call them. Of a config whose `text_config` alone says anything about
            rotary embeddings, that part is read.
        seq_len: how many tokens the longest sequence has. "dynamic" and "longrope" depend on it:
            None, as where transformers makes the model, stands for no more than the original
            length.
        layer_type: whose frequencies, where the config has several, such as "full_attention" and
            "sliding_attention" (Gemma 3); None where it has one for all.

    Returns:
        inv_freq: float64, of shape (rotary_dim / 2,), in radians per position.
        attention_scaling: what cos and sin are multiplied by, 1.0 for most types.

    The types are "default" and "mrope", "linear", "dynamic" (`ntk` where the config has an
    `alpha`), "yarn", "longrope" and "su", "llama3", and "proportional". transformers computes the
    same in float32.

    Raises TypeError or ValueError when the config's type is another one, when it lacks a number or
    holds one that its rule refuses, when `seq_len` is not None or an int of 0 or more, and when
    `layer_type` is none of the config's.

    >>> scaling = {"rope_type": "linear", "factor": 2.0}
    >>> from_config({"head_dim": 4, "rope_theta": 100.0, "rope_scaling": scaling})
    (array([0.5 , 0.05]), 1.0)
    """
    seq_len = _length(seq_len)
    parameters = rotary_parameters(config, layer_type=layer_type)
    rule = RULES[parameters.rope_type]
    options = parameters.options | ({"seq_len": seq_len} if rule.by_length else {})
    result = rule.function(parameters.rotary_dim, parameters.base, **options)
    return result if isinstance(result, tuple) else (result, 1.0)


def rotary_parameters(config: Any, *, layer_type: str | None = None) -> RotaryParameters:
    """Return what a Hugging Face config, or its dict, says about its rotary embedding.

    Arguments and errors are those of `from_config`; the numbers have not been checked.

    >>> config = {"hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 2048}
    >>> rotary_parameters(config)
    RotaryParameters(rope_type='default', rotary_dim=8, base=10000.0, options={}, max_position=2048)
    """
    if not isinstance(config, Mapping) and not hasattr(config, "__dict__"):
        raise TypeError(f"config must be a config object or its dict, got {described(config)}")
    config = _text_part(config)
    given = _of_layer_type(_given(config), layer_type)
    config = _as_layers_see_it(config, layer_type)
    rope_type = _rope_type(given)
    max_position = _read(config, "max_position_embeddings", "n_positions")
    original = _read(given, "original_max_position_embeddings")
    if layer_type is None:
        original = _read(config, "original_max_position_embeddings", otherwise=original)
    if original is None:
        original = max_position
    base = _read(config, "rope_theta", "rotary_emb_base", "global_rope_theta", otherwise=10000.0)
    partial = _read(config, "partial_rotary_factor", "rotary_pct", otherwise=1.0)
    found = {**given, "original_max_position": original, "max_position": max_position}
    found["partial_rotary_factor"] = partial = _read(given, "partial_rotary_factor") or partial
    if rope_type in ("yarn", "longrope") and given.get("factor") is None:
        found["factor"] = _quotient(max_position, original)
    rule = RULES[rope_type]
    options = {name: found.get(name) for name in rule.required + rule.optional}
    if missing := [name for name in rule.required if options[name] is None]:
        raise ValueError(
            f"rope_parameters of type {rope_type!r} must have {', '.join(missing)}, "
            f"got {', '.join(map(str, given)) or 'none'}"
        )
    return RotaryParameters(
        rope_type,
        _head_dim(config) if rope_type == "proportional" else _rotary_dim(config, partial),
        _read(given, "rope_theta", otherwise=base),
        {name: value for name, value in options.items() if value is not None},
        max_position,
    )


def layer_types(config: Any) -> tuple[str | None, ...]:
    """Return the layer types of which a config, or its dict, gives rotary embeddings of their own.

    (None,) where it has one for all layers.

    >>> layer_types({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})
    ('full_attention',)
    """
    return tuple(_given(_text_part(config)))


def _read(config: Any, *names: str, otherwise: Any = None) -> Any:
    """Return the first of these fields that is there and not null."""
    if isinstance(config, Mapping):
        sources: tuple[Any, ...] = config, MODEL_DEFAULTS.get(config.get("model_type", ""), {})
        values = (source.get(name) for source in sources for name in names)
    else:
        values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), otherwise)


def _text_part(config: Any) -> Any:
    """Return the part of a config of text and images that describes the text model."""
    fields = "rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_dim"
    return config if _read(config, *fields) is not None else _read(config, "text_config") or config


def _given(config: Any) -> dict[str | None, Mapping[str, Any]]:
    """Return the rope parameters of each layer type, or of None for all layers."""
    given = _read(config, "rope_scaling") or _read(config, "rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise TypeError(f"rope_parameters must be a dict, got {described(given)}")
    nested = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    if nested:
        return nested
    sliding_base = _read(config, "rope_local_base_freq", "local_rope_theta")
    if _read(config, "model_type") == "olmo3":
        sliding_base = _read(config, "rope_theta")
    if sliding_base is None:
        return {None: given}
    return {"full_attention": given, "sliding_attention": {"rope_theta": sliding_base}}


def _of_layer_type(
    given: dict[str | None, Mapping[str, Any]], layer_type: str | None
) -> Mapping[str, Any]:
    if layer_type not in given:
        raise ValueError(
            f"layer_type must be {' or '.join(map(repr, given))} for this config, "
            f"got {layer_type!r}"
        )
    return given[layer_type]


def _as_layers_see_it(config: Any, layer_type: str | None) -> Any:
    """Return the config with the head_dim of the layers of one type (Gemma 4 has two)."""
    if not isinstance(config, Mapping):
        several = layer_type is not None and getattr(config, "is_heterogeneous", False)
        return config.per_layer_config[layer_type] if several else config
    types = dict(enumerate(config.get("layer_types") or ()))
    layers = config.get("per_layer_config") or {}
    own = [layers[layer] for layer in layers if types.get(int(layer)) == layer_type]
    if layer_type == "full_attention" and config.get("global_head_dim"):
        own.append({"head_dim": config["global_head_dim"]})
    return {**config, **own[0]} if own else config


def _rope_type(given: Mapping[str, Any]) -> str:
    name = _read(given, "rope_type", "type", otherwise="default")
    rope_type = str(ALIASES.get(name, name))
    if rope_type == "yarn" and "long_factor" in given:  # what early files of Phi-3 call it
        rope_type = "longrope"
    if rope_type == "dynamic" and given.get("alpha"):
        rope_type = "ntk"
    if rope_type not in RULES:
        raise ValueError(f"rope_type must be one of {', '.join([*RULES, *ALIASES])}, got {name!r}")
    return rope_type


def _quotient(max_position: Any, original: Any) -> float | None:
    if max_position is None:
        return None
    longest = positive("max_position_embeddings", max_position)
    return longest / positive("original_max_position_embeddings", original)


def _rotary_dim(config: Any, partial_rotary_factor: float) -> int:
    told = _read(config, "rotary_dim", "qk_rope_head_dim")
    if told:
        return index("rotary_dim", told)
    return partial_rotary_dim(_head_dim(config), partial_rotary_factor)


def _head_dim(config: Any) -> int:
    head_dim = _read(config, "head_dim", "kv_channels", "attention_head_dim")
    if head_dim is None:
        hidden_size = _read(config, "hidden_size", "n_embd")
        num_heads = _read(config, "num_attention_heads", "n_head")
        if hidden_size is None or not num_heads:
            raise ValueError(
                "config must have head_dim, or hidden_size and num_attention_heads, got "
                f"hidden_size={hidden_size} and num_attention_heads={num_heads}"
            )
        head_dim = index("hidden_size", hidden_size) // index("num_attention_heads", num_heads)
    return index("head_dim", head_dim)


def _yarn_scaling(
    factor: float,
    attention_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
) -> float:
    scaling = _optional("attention_factor", attention_factor)
    over, under = _optional("mscale", mscale), _optional("mscale_all_dim", mscale_all_dim)
    growth = 0.1 * math.log(max(factor, 1))
    if scaling is not None:
        return scaling
    if over is None or under is None:
        return growth + 1
    return (over * growth + 1) / (under * growth + 1)


def _even(name: str, value: object) -> int:
    number = index(name, value)
    if number <= 0 or number % 2:
        raise ValueError(f"{name} must be positive and even, got {number}")
    return number


def _optional(name: str, value: Any) -> float | None:
    """Return a positive number, or None for None and for 0, which configs write for it."""
    return None if value is None or value == 0 else positive(name, value)


def _length(seq_len: object) -> int | None:
    length = None if seq_len is None else index("seq_len", seq_len, "None or an int")
    if length is not None and length < 0:
        raise ValueError(f"seq_len must be None or 0 or more, got {length}")
    return length


def _numbers(name: str, values: Any) -> Frequencies:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # of unequal lengths, or on a GPU
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, got {described(values)}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {array.shape}")
    return array.astype(np.float64)


def _one_a_pair(name: str, values: Any, num_pairs: int) -> Frequencies:
    numbers = _numbers(name, values)
    if len(numbers) != num_pairs:
        raise ValueError(f"{name} must be rotary_dim / 2 = {num_pairs} numbers, got {len(numbers)}")
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {numbers.tolist()}")
    return numbers


def axial(positions: Any, dims: Sequence[int], base: Any = 10000.0) -> Frequencies:
    """Return the angles, in radians, of tokens that have a position on each of several axes.

    The first dims[0] rotary elements turn by the position on the first axis, the next dims[1] by
    that on the second, and so on: pair i of an axis by position * base ** (-2 i / dim).
    `RotaryTable.from_angles` makes a table of the result.

    Args:
        positions: an array of shape (..., tokens, axes), the positions of each token, which may be
            fractional or negative. Or a tuple or list that gives, for each axis, its positions as
            numbers, or how many it has, n for 0 .. n - 1: the tokens are then all points of this
            grid, the last axis fastest.
        dims: how many rotary elements each axis has, each even.
        base: a number, or a tuple or list of one for each axis.

    Returns:
        A float64 array of shape (..., tokens, sum(dims) / 2).

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3.2, for
    two axes.

    Raises TypeError or ValueError when a position is not a finite number, one of `dims` not a
    positive even int, a base not a positive number, or their counts differ.

    >>> axial((2, 3), dims=(2, 2))
    array([[0., 0.],
           [0., 1.],
           [0., 2.],
           [1., 0.],
           [1., 1.],
           [1., 2.]])
    >>> axial(np.array([[0.5, -3.0]]), dims=(4, 2), base=(100.0, 10000.0))
    array([[ 0.5 ,  0.05, -3.  ]])
    """
    if not isinstance(dims, list | tuple) or not dims:
        raise TypeError(f"dims must be a tuple of ints, one for each axis, got {dims!r}")
    bases = base if isinstance(base, list | tuple) else [base] * len(dims)
    if len(bases) != len(dims):
        raise ValueError(f"base must be one number or {len(dims)}, as many as dims, got {base}")
    frequencies = [
        inverse_frequencies(_even("dims", dim), number)
        for dim, number in zip(dims, bases, strict=True)
    ]
    if isinstance(positions, list | tuple):
        if len(positions) != len(dims):
            raise ValueError(f"positions must be of {len(dims)} axes, as dims, got {positions}")
        sizes = [axis for axis in positions if isinstance(axis, int | np.integer)]
        if sizes and min(sizes) < 0:
            raise ValueError(f"positions must be 0 or more on each axis, got {positions}")
        axes = [
            np.arange(index("positions", axis))
            if isinstance(axis, int | np.integer)
            else _numbers("positions", axis)
            for axis in positions
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    else:
        points = np.asarray(positions)
    if points.dtype.kind not in "iuf":
        raise TypeError(f"positions must be real numbers, got {described(positions)}")
    if points.ndim < 2 or points.shape[-1] != len(dims):
        raise ValueError(
            f"positions must have the shape (..., tokens, {len(dims)}), got {points.shape}"
        )
    if not np.isfinite(points).all():
        raise ValueError("positions must be finite, got an infinity or NaN")
    points = points.astype(np.float64)
    return np.concatenate(
        [points[..., axis, None] * pairs for axis, pairs in enumerate(frequencies)], axis=-1
    )
