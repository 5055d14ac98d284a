"""The published rules of inverse frequencies, a function each. NumPy, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import as_float, described, index, positive

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Frequencies = NDArray[np.float64]


MOST_TOKENS = 2**63  # positions are 64-bit integers


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> Frequencies:
    """Return base ** (-2 i / rotary_dim) for each pair i, in radians per position.

    The result is float64, of shape (rotary_dim / 2,).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
    section 3.2.2.

    Raises TypeError or ValueError when `rotary_dim` is not a positive even int or `base` is not a
    positive number.

    >>> inverse_frequencies(4, base=100.0)
    array([1. , 0.1])
    """
    rotary_dim, base = even("rotary_dim", rotary_dim), positive("base", base)
    exponents = -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    return finite("base", base, lambda: np.power(base, exponents))


def partial_rotary_dim(head_dim: int, partial_rotary_factor: float) -> int:
    """Return how many elements of a head are rotated where only a part is, rounded down.

    Source: Black et al., "GPT-NeoX-20B: An Open-Source Autoregressive Language Model" (2022),
    section 2.1.1, which rotates the first quarter of each head.

    Raises TypeError or ValueError when `head_dim` is not a positive int, `partial_rotary_factor`
    not a number in (0, 1], or the number of rotated elements is odd or 0.

    >>> partial_rotary_dim(96, 0.25)
    24
    """
    head_dim = index("head_dim", head_dim)
    factor = positive("partial_rotary_factor", partial_rotary_factor)
    share = as_float(head_dim) * min(factor, 1.0)
    rotary_dim = int(share) if math.isfinite(share) else 0
    if factor > 1 or rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(
            "partial_rotary_factor must be in (0, 1] and rotate a positive even number of the "
            f"head_dim={head_dim} elements, got {partial_rotary_factor}"
        )
    return rotary_dim


def linear(rotary_dim: int, base: float = 10000.0, *, factor: float) -> Frequencies:
    """Return inverse frequencies divided by `factor`, which makes positions `factor` times denser.

    The result is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation" (2023), section 2.3.

    Raises TypeError or ValueError as `inverse_frequencies`, and when `factor` is not a positive
    number.

    >>> linear(4, base=100.0, factor=2.0)
    array([0.5 , 0.05])
    """
    inv_freq, factor = inverse_frequencies(rotary_dim, base), positive("factor", factor)
    return finite("factor", factor, lambda: inv_freq / factor)


def ntk(rotary_dim: int, base: float = 10000.0, *, alpha: float) -> Frequencies:
    """Return the inverse frequencies of the base times alpha ** (rotary_dim / (rotary_dim - 2)).

    The first frequency does not change, and the last is divided by `alpha`. The result is float64,
    of shape (rotary_dim / 2,), in radians per position.

    Source: "NTK-aware" interpolation, in Peng et al., "YaRN: Efficient Context Window Extension of
    Large Language Models" (2023), section 3.1.

    Raises TypeError or ValueError as `inverse_frequencies`, when `rotary_dim` is 2, and when
    `alpha` is not a positive number.

    >>> ntk(4, base=100.0, alpha=2.0)
    array([1.  , 0.05])
    """
    rotary_dim, base = even("rotary_dim", rotary_dim), positive("base", base)
    alpha = positive("alpha", alpha)
    if rotary_dim == 2:
        raise ValueError("rotary_dim must be 4 or more for a new base to change it, got 2")
    try:
        stretched = base * alpha ** (rotary_dim / (rotary_dim - 2))
    except OverflowError:
        stretched = math.inf
    if not 0 < stretched < math.inf:
        raise ValueError(f"alpha must give a base that is a positive float64, got {alpha}")
    return inverse_frequencies(rotary_dim, stretched)


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
    length = max(as_length(seq_len) or 0, max_position)
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
    attn_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> tuple[Frequencies, float]:
    """Return (inv_freq, attention_scaling) of YaRN.

    A pair that makes more than `beta_fast` full turns within `original_max_position` tokens keeps
    its frequency. A pair that makes less than `beta_slow` turns has its frequency divided by
    `factor`. The pairs between are interpolated linearly by their index. ``truncate=True`` first
    rounds the first index of this range down and the last one up; GPT-OSS does not.

    attention_scaling is `attention_factor` if given, else 0.1 ln(factor) + 1 (1 for a factor up to
    1). With both `mscale` and `mscale_all_dim`, as in DeepSeek, it is the quotient of
    0.1 mscale ln(factor) + 1 and 0.1 mscale_all_dim ln(factor) + 1. One of them alone, or 0, has no
    effect. DeepSeek also multiplies its softmax scale by the square of the divisor, which is not
    part of this result. `attn_factor` multiplies the attention_scaling, as in vLLM. It is not
    `attention_factor`, and only one of the two may be given.

    inv_freq is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    sections 3.2 and 3.4. The paper's ramp is linear in the number of turns; this one, linear in the
    index of the pair, is that of the authors' code, with which every model was trained.

    Raises TypeError or ValueError as `inverse_frequencies`, and if `base` is not more than 1,
    another number is not positive, `beta_fast` is less than `beta_slow`, `truncate` is not a bool,
    or both `attention_factor` and `attn_factor` are given.

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
    scaling = _yarn_scaling(factor, attention_factor, attn_factor, mscale, mscale_all_dim)

    def pair_that_turns(times: float) -> float:
        turns = math.log(original) - math.log(2 * math.pi) - math.log(times)
        return rotary_dim * turns / (2 * math.log(base))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = float(np.floor(first)), float(np.ceil(last))
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001
    interpolated = np.clip((np.arange(len(inv_freq)) - first) / width, 0, 1)
    slower = linear(rotary_dim, base, factor=factor)
    return inv_freq * (1 - interpolated) + slower * interpolated, scaling


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

    The frequency of each pair is divided by a number for that pair: from `short_factor` for up to
    `original_max_position` tokens and for ``seq_len=None``, from `long_factor` for more. `factor`
    is the longest context divided by the original one. attention_scaling is `short_mscale` or
    `long_mscale` if given (Phi-3.5-MoE), else `attention_factor` if given, else
    sqrt(1 + ln(factor) / ln(original_max_position)), or 1 for a `factor` up to 1.

    inv_freq is float64, of shape (rotary_dim / 2,), in radians per position.

    Source: Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens" (2024),
    section 3; attention_scaling is not in the paper but in the code published with Phi-3 (2024).

    Raises TypeError or ValueError as `inverse_frequencies`, and if `short_factor` or `long_factor`
    is not rotary_dim / 2 positive numbers, another number is not positive, `original_max_position`
    is not more than 1, or `seq_len` is neither None nor an int of 0 or more.

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
    if (as_length(seq_len) or 0) > original:
        return finite("long_factor", long.min(), lambda: inv_freq / long), long_scaling
    return finite("short_factor", short.min(), lambda: inv_freq / short), short_scaling


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

    A pair that makes more than `high_freq_factor` full turns within `original_max_position` tokens
    keeps its frequency. A pair that makes less than `low_freq_factor` turns has its frequency
    divided by `factor`. The pairs between are interpolated linearly by their number of turns. Where
    both factors are equal, as in Llama 4, there are none between. The result is float64, of shape
    (rotary_dim / 2,), in radians per position.

    Source: the code published with Llama 3.1 (Meta, 2024); it is the "NTK-by-parts" interpolation
    of Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    section 3.2.

    Raises TypeError or ValueError as `inverse_frequencies`, and if another number is not positive
    or `high_freq_factor` is less than `low_freq_factor`.

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
    slower = linear(rotary_dim, base, factor=factor)
    original = positive("original_max_position", original_max_position)
    turns = finite("original_max_position", original, lambda: inv_freq * original) / (2 * math.pi)
    with np.errstate(over="ignore"):  # where low and high are almost equal
        kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
    return slower * (1 - kept) + inv_freq * kept


def proportional(
    head_dim: int,
    base: float = 10000.0,
    *,
    partial_rotary_factor: float = 1.0,
    factor: float = 1.0,
) -> Frequencies:
    """Return inverse frequencies of a whole head, the lowest of which are 0 (Gemma 4).

    The first pairs, a share of `partial_rotary_factor`, have the frequencies of a whole head
    divided by `factor`. All other pairs have the frequency 0. A partial rotary embedding would
    spread all frequencies over the first pairs instead. The result is float64, of shape
    (head_dim / 2,), in radians per position.

    Source: p-RoPE, in Barbero et al., "Round and Round We Go! What makes Rotary Positional
    Encodings useful?" (2024), section 6.

    Raises TypeError or ValueError if `head_dim` is not a positive even int, `base` or `factor` is
    not a positive number, or `partial_rotary_factor` is not in (0, 1].

    >>> proportional(8, partial_rotary_factor=0.5)
    array([1. , 0.1, 0. , 0. ])
    """
    head_dim, share = even("head_dim", head_dim), partial_rotary_factor
    if positive("partial_rotary_factor", share) > 1:
        raise ValueError(f"partial_rotary_factor must be in (0, 1], got {share}")
    inv_freq = linear(head_dim, base, factor=factor)
    inv_freq[int(share * head_dim // 2) :] = 0
    return inv_freq


def xpos_scale(
    rotary_dim: int, positions: Any, *, scale_base: float = 512.0, gamma: float = 0.4
) -> Frequencies:
    """Return xPos's scale of each position and pair: multiply q by it and divide k by it.

    The scale of position n and pair i is ((2 i / rotary_dim + gamma) / (1 + gamma)) ** (n /
    scale_base). With it the product of q and k decays with their distance. Positions that count
    from the middle of the sequence keep long sequences from overflowing. `positions` are real
    numbers of shape (s,); the result is float64, of shape (s, rotary_dim / 2).

    Source: Sun et al., "A Length-Extrapolatable Transformer" (2022), algorithm 1; the default of
    scale_base is from the authors' code.

    Raises TypeError or ValueError when `rotary_dim` is not a positive even int, `positions` not
    real numbers of one axis, or `scale_base` or `gamma` not a positive number.

    >>> xpos_scale(4, [0, 1], scale_base=1.0, gamma=1.0)
    array([[1.  , 1.  ],
           [0.5 , 0.75]])
    """
    rotary_dim = even("rotary_dim", rotary_dim)
    scale_base, gamma = positive("scale_base", scale_base), positive("gamma", gamma)
    powers = real_numbers("positions", positions) / scale_base
    zeta = (np.arange(0, rotary_dim, 2) / rotary_dim + gamma) / (1 + gamma)
    return finite("positions", described(positions), lambda: np.power(zeta, powers[:, None]))


def cos_sin(
    inv_freq: NDArray[Any], num_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of position * inv_freq, computed in float64, stored as float32.

    Both have the shape (num_positions, rotary_dim / 2).
    """
    angles = np.outer(np.arange(num_positions, dtype=np.float64), inv_freq)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _yarn_scaling(
    factor: float,
    attention_factor: float | None,
    attn_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
) -> float:
    scaling = _optional("attention_factor", attention_factor)
    multiple = _optional("attn_factor", attn_factor)
    over, under = _optional("mscale", mscale), _optional("mscale_all_dim", mscale_all_dim)
    growth = 0.1 * math.log(max(factor, 1))
    if scaling is not None and multiple is not None:
        raise ValueError(
            f"attn_factor must be None where attention_factor is given, got {attn_factor}"
        )
    if scaling is None:
        scaling = growth + 1
        if over is not None and under is not None:
            scaling = (over * growth + 1) / (under * growth + 1)
    scaling *= 1.0 if multiple is None else multiple
    if not math.isfinite(scaling):
        raise ValueError(
            "mscale, mscale_all_dim and attn_factor must give an attention scaling that is finite "
            f"in float64, got {mscale}, {mscale_all_dim} and {attn_factor}"
        )
    return scaling


def finite(name: str, value: object, compute: Callable[[], Frequencies]) -> Frequencies:
    """Return the result of `compute`, or refuse the argument `name` if the result overflows."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        result = compute()
    if not np.isfinite(result).all():
        raise ValueError(f"{name} must give numbers that are finite in float64, got {value}")
    return result


def even(name: str, value: object) -> int:
    number = index(name, value)
    if number <= 0 or number % 2:
        raise ValueError(f"{name} must be positive and even, got {number}")
    return number


def _optional(name: str, value: Any) -> float | None:
    """Return a positive number, or None for None and for 0, which configs write for None."""
    return None if value is None or value == 0 else positive(name, value)


def as_length(seq_len: object) -> int | None:
    length = None if seq_len is None else index("seq_len", seq_len, "None or an int")
    if length is not None and not 0 <= length < MOST_TOKENS:
        raise ValueError(f"seq_len must be None or 0 or more, below 2^63, got {length}")
    return length


def real_numbers(name: str, values: Any) -> Frequencies:
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
    numbers = real_numbers(name, values)
    if len(numbers) != num_pairs:
        raise ValueError(f"{name} must be rotary_dim / 2 = {num_pairs} numbers, got {len(numbers)}")
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {numbers.tolist()}")
    return numbers
