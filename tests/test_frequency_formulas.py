"""Each rule for inverse frequencies against the formula of its paper, pair by pair in 40 digits."""

import numpy as np
import pytest

from rope_cupy.frequencies import (
    dynamic_ntk,
    linear,
    llama3,
    longrope,
    ntk,
    partial_rotary_dim,
    proportional,
    xpos_scale,
    yarn,
)

mpmath = pytest.importorskip("mpmath")
mpf = mpmath.mpf
CASES = [(64, 10000.0), (128, 500000.0), (128, 1e6), (80, 150000.0), (8, 256.0)]


@pytest.fixture(autouse=True)
def forty_digits():
    with mpmath.workdps(40):
        yield


def plain(dim, base, pair):
    return mpf(base) ** (-mpf(2 * pair) / dim)


def hold(actual, exact):
    """Float64, and each number within 1e-12 of its own size of the exact one."""
    assert actual.dtype == np.float64 and len(actual) == len(exact)
    for number, value in zip(actual.tolist(), exact, strict=True):
        assert abs(mpf(number) - value) <= mpf("1e-12") * abs(value)


def turns(dim, base, pair, tokens):
    """How often a pair turns within so many tokens."""
    return tokens * plain(dim, base, pair) / (2 * mpmath.pi)


@pytest.mark.parametrize(("dim", "base"), CASES)
@pytest.mark.parametrize("factor", [1.0, 2.5, 8])
def test_linear_divides_every_frequency(dim, base, factor):
    exact = [plain(dim, base, pair) / mpf(factor) for pair in range(dim // 2)]
    hold(linear(dim, base, factor=factor), exact)


@pytest.mark.parametrize(("dim", "base"), CASES)
@pytest.mark.parametrize("alpha", [1.0, 3.5, 1000])
def test_ntk_slows_the_last_pair_by_alpha_and_the_first_by_nothing(dim, base, alpha):
    new = mpf(base) * mpf(alpha) ** (mpf(dim) / (dim - 2))
    actual = ntk(dim, base, alpha=alpha)
    hold(actual, [plain(dim, new, pair) for pair in range(dim // 2)])
    hold(actual[[0, -1]], [mpf(1), plain(dim, base, dim // 2 - 1) / mpf(alpha)])


@pytest.mark.parametrize(("dim", "base"), CASES)
@pytest.mark.parametrize("factor", [1.0, 2.0, 4])
@pytest.mark.parametrize("seq_len", [None, 0, 100, 2048, 2049, 30000])
def test_dynamic_ntk_grows_with_the_sequence(dim, base, factor, seq_len):
    length = max(seq_len or 0, 2048)
    alpha = mpf(factor) * length / 2048 - (mpf(factor) - 1)
    new = mpf(base) * alpha ** (mpf(dim) / (dim - 2))
    exact = [plain(dim, new, pair) for pair in range(dim // 2)]
    hold(dynamic_ntk(dim, base, factor=factor, max_position=2048, seq_len=seq_len), exact)


@pytest.mark.parametrize(("dim", "base"), CASES)
@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (8.0, 2.0)])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_goes_from_kept_to_divided_frequencies(dim, base, fast, slow, truncate):
    factor, original = mpf(40), 4096

    def pair_of(beta):
        return dim * mpmath.log(original / (2 * mpmath.pi * beta)) / (2 * mpmath.log(mpf(base)))

    first, last = pair_of(fast), pair_of(slow)
    assert abs(turns(dim, base, first, original) - fast) < mpf("1e-30")  # what pair_of means
    if truncate:
        first, last = mpmath.floor(first), mpmath.ceil(last)
    first, last = max(first, mpf(0)), min(last, mpf(dim - 1))
    exact = []
    for pair in range(dim // 2):
        divided = min(max((pair - first) / (last - first), mpf(0)), mpf(1))
        kept = plain(dim, base, pair)
        exact.append(kept * (1 - divided) + kept / factor * divided)
    options = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    actual, scaling = yarn(dim, base, factor=40.0, original_max_position=original, **options)
    hold(actual, exact)
    hold(np.array([scaling]), [1 + mpmath.log(factor) / 10])


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"factor": 0.5}, lambda: mpf(1)),
        ({"factor": 16.0}, lambda: 1 + mpmath.log(16) / 10),
        ({"factor": 16.0, "attention_factor": 0.75}, lambda: mpf("0.75")),
        (
            {"factor": 40.0, "mscale": 0.5, "mscale_all_dim": 2.0},
            lambda: (1 + mpmath.log(40) / 20) / (1 + mpmath.log(40) / 5),
        ),
        ({"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, lambda: mpf(1)),
        ({"factor": 40.0, "mscale": 0.5}, lambda: 1 + mpmath.log(40) / 10),
    ],
)
def test_the_attention_scaling_of_yarn(options, exact):
    hold(np.array([yarn(64, original_max_position=4096, **options)[1]]), [exact()])


@pytest.mark.parametrize(("dim", "base"), CASES)
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 8.0), (3.0, 3.0)])
def test_llama3_divides_the_frequencies_of_long_wavelengths(dim, base, low, high):
    original, factor, exact = 8192, mpf(8), []
    for pair in range(dim // 2):
        kept = plain(dim, base, pair)
        wavelength = 2 * mpmath.pi / kept
        if wavelength < mpf(original) / high:
            exact.append(kept)
        elif wavelength > mpf(original) / low:
            exact.append(kept / factor)
        else:
            smooth = (original / wavelength - low) / (high - mpf(low))
            exact.append((1 - smooth) * kept / factor + smooth * kept)
    options = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position": original}
    hold(llama3(dim, base, factor=8.0, **options), exact)


@pytest.mark.parametrize("seq_len", [None, 4096, 4097])
@pytest.mark.parametrize("factor", [1.0, 32.0])
def test_longrope_divides_each_frequency_by_its_own_number(seq_len, factor):
    dim, base, rng = 96, 10000.0, np.random.default_rng(0)
    short, long = rng.uniform(1, 2, dim // 2).tolist(), rng.uniform(1, 64, dim // 2).tolist()
    lists = {"short_factor": short, "long_factor": long, "original_max_position": 4096}
    actual, scaling = longrope(dim, base, **lists, factor=factor, seq_len=seq_len)
    chosen = long if seq_len == 4097 else short
    hold(actual, [plain(dim, base, pair) / mpf(chosen[pair]) for pair in range(dim // 2)])
    hold(np.array([scaling]), [mpmath.sqrt(1 + mpmath.log(factor) / mpmath.log(4096))])


@pytest.mark.parametrize(("share", "pairs"), [(0.25, 16), (0.5, 32), (1.0, 64)])
def test_proportional_turns_the_first_pairs_as_the_whole_head_would(share, pairs):
    actual = proportional(128, 1e6, partial_rotary_factor=share, factor=8.0)
    exact = [plain(128, 1e6, pair) / 8 if pair < pairs else mpf(0) for pair in range(64)]
    hold(actual, exact)


@pytest.mark.parametrize(
    ("head_dim", "share", "dim"), [(128, 0.25, 32), (80, 0.4, 32), (64, 1, 64)]
)
def test_a_partial_rotary_dim_is_a_share_of_the_head(head_dim, share, dim):
    assert partial_rotary_dim(head_dim, share) == dim


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_xpos_scales_decay_with_the_distance(gamma):
    positions = [-1000, -1, 0, 3, 511.5]
    actual = xpos_scale(16, positions, scale_base=512.0, gamma=gamma)
    for position, row in zip(positions, actual, strict=True):
        zetas = [(mpf(2 * pair) / 16 + mpf(gamma)) / (1 + mpf(gamma)) for pair in range(8)]
        hold(row, [zeta ** (mpf(position) / 512) for zeta in zetas])
    # q at 3 by k at 0 is q at 1003 by k at 1000: the scale is of the distance alone.
    far = xpos_scale(16, [1003, 1000])
    near = xpos_scale(16, [3, 0])
    np.testing.assert_allclose(far[0] / far[1], near[0] / near[1], 1e-12)


LISTS = {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "original_max_position": 4096}


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "factor", lambda: linear(64, factor=0)),
        (TypeError, "factor", lambda: linear(64, factor="2")),
        (ValueError, "rotary_dim", lambda: linear(63, factor=2)),
        (ValueError, "alpha", lambda: ntk(64, alpha=-1)),
        (ValueError, "rotary_dim", lambda: ntk(2, alpha=2)),
        (ValueError, "max_position", lambda: dynamic_ntk(64, factor=2, max_position=0)),
        (TypeError, "seq_len", lambda: dynamic_ntk(64, factor=2, max_position=8, seq_len=1.5)),
        (ValueError, "seq_len", lambda: dynamic_ntk(64, factor=2, max_position=8, seq_len=-1)),
        (ValueError, "base", lambda: yarn(64, 1.0, factor=2, original_max_position=8)),
        (
            ValueError,
            "beta_fast",
            lambda: yarn(64, factor=2, original_max_position=8, beta_fast=1, beta_slow=2),
        ),
        (TypeError, "truncate", lambda: yarn(64, factor=2, original_max_position=8, truncate=1)),
        (ValueError, "short_factor", lambda: longrope(66, **LISTS, factor=2.0)),
        (
            TypeError,
            "long_factor",
            lambda: longrope(64, **LISTS | {"long_factor": "1"}, factor=2.0),
        ),
        (
            ValueError,
            "original_max_position",
            lambda: longrope(64, **LISTS | {"original_max_position": 1}, factor=2.0),
        ),
        (
            ValueError,
            "high_freq_factor",
            lambda: llama3(
                64, factor=8, low_freq_factor=4, high_freq_factor=1, original_max_position=8192
            ),
        ),
        (ValueError, "partial_rotary_factor", lambda: proportional(64, partial_rotary_factor=1.5)),
        (ValueError, "partial_rotary_factor", lambda: partial_rotary_dim(64, 0.01)),
        (ValueError, "scale_base", lambda: xpos_scale(64, [0], scale_base=0)),
        (TypeError, "positions", lambda: xpos_scale(64, ["a"])),
    ],
)
def test_what_a_rule_cannot_take_is_refused_by_name(error, name, call):
    with pytest.raises(error, match=rf"^{name} must .*, got "):
        call()
