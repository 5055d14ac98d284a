"""Every rule of frequencies against its paper's formula in forty digits; tables bit by bit."""

import contextlib
import decimal
import math
import re
import types
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from configs import ANY_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_cupy import RotaryTable, apply_rotary
from rope_cupy.frequencies import (
    axial_from_config,
    dynamic_ntk,
    from_config,
    inverse_frequencies,
    layer_types,
    linear,
    llama3,
    longrope,
    ntk,
    pairs_neighbours,
    partial_rotary_dim,
    proportional,
    rotary_parameters,
    xpos_scale,
    yarn,
)


def numpy_array(array, dtype="float64"):
    return array.astype(dtype)


def torch_array(array, dtype="float64"):
    return torch.from_numpy(array).to(getattr(torch, dtype))


def jax_array(array, dtype="float32"):
    return pytest.importorskip("jax.numpy").asarray(array, dtype)


LIBRARIES = {"numpy": numpy_array, "torch": torch_array, "jax": jax_array}


def exact_frequencies(rotary_dim, base):
    """base ** (-2 i / rotary_dim) for each pair i, as decimal numbers of forty digits."""
    with decimal.localcontext() as context:
        context.prec = 40
        step = decimal.Decimal(-2) / rotary_dim
        return [decimal.Decimal(base) ** (step * pair) for pair in range(rotary_dim // 2)]


@pytest.mark.parametrize("rotary_dim", [2, 6, 64, 72, 128, 512])
@pytest.mark.parametrize("base", [1, 1.5, 256, 10000.0, 500_000, np.float32(1e6), 1e8, 0.25])
def test_inverse_frequencies_follow_the_formula(rotary_dim, base):
    exact = exact_frequencies(rotary_dim, float(base))
    actual = inverse_frequencies(rotary_dim, base)
    assert (actual.dtype, actual.shape) == (np.float64, (rotary_dim // 2,))
    # One rounding of the exponent, which the logarithm of the base magnifies, and one of the power.
    tolerance = (abs(math.log(base)) + 3) * 2.0**-53
    for value, number in zip(actual, exact, strict=True):
        assert abs(Fraction(float(value)) / Fraction(number) - 1) <= tolerance


def test_the_base_is_10000_unless_another_is_given():
    assert np.array_equal(inverse_frequencies(8), inverse_frequencies(8, base=10000))
    assert inverse_frequencies(np.int64(8))[2] == pytest.approx(0.01, rel=1e-15)


PAPER = 1e-12  # how near a rule comes to its formula, relative

mpf = mpmath.mpf


def formula(test):
    """Runs a test whose formulas are computed in forty digits."""
    return mpmath.workdps(40)(test)


def assert_near(actual, exact):
    assert actual.dtype == np.float64 and actual.shape == (len(exact),)
    for value, number in zip(actual.tolist(), exact, strict=True):
        assert abs(mpf(value) - number) <= PAPER * abs(number)


def pairs(rotary_dim, base):
    """The radians per position of each pair without any rule."""
    return [mpf(base) ** (mpf(-2 * pair) / rotary_dim) for pair in range(rotary_dim // 2)]


@pytest.mark.parametrize(("rotary_dim", "base"), [(2, 1e4), (128, 500000.0), (96, 0.5)])
@pytest.mark.parametrize("factor", [8, 4.0, 1.5, 0.25])
@formula
def test_linear_interpolation_divides_every_frequency(rotary_dim, base, factor):
    exact = [theta / mpf(factor) for theta in pairs(rotary_dim, base)]
    assert_near(linear(rotary_dim, base, factor=factor), exact)


@pytest.mark.parametrize(("rotary_dim", "base"), [(4, 1e4), (128, 10000), (96, 1e7)])
@pytest.mark.parametrize("alpha", [1000.0, 8, 1.0, 0.5])
@formula
def test_ntk_raises_the_base_so_that_the_last_pair_is_interpolated(rotary_dim, base, alpha):
    stretched = mpf(base) * mpf(alpha) ** (mpf(rotary_dim) / (rotary_dim - 2))
    actual = ntk(rotary_dim, base, alpha=alpha)
    assert_near(actual, pairs(rotary_dim, stretched))
    assert actual[0] == 1
    assert actual[-1] * alpha == pytest.approx(float(pairs(rotary_dim, base)[-1]), rel=1e-13)


@pytest.mark.parametrize("seq_len", [None, 0, 1, 2047, 2048, 2049, 3000, np.int64(131072)])
@pytest.mark.parametrize(("rotary_dim", "base", "factor"), [(128, 1e4, 2.0), (64, 5e7, 6)])
@formula
def test_dynamic_ntk_grows_with_the_sequence_beyond_the_maximum(rotary_dim, base, factor, seq_len):
    length = mpf(max(int(seq_len or 0), 2048))
    alpha = mpf(factor) * length / 2048 - (mpf(factor) - 1)
    stretched = mpf(base) * alpha ** (mpf(rotary_dim) / (rotary_dim - 2))
    inv_freq = dynamic_ntk(rotary_dim, base, factor=factor, max_position=2048, seq_len=seq_len)
    assert_near(inv_freq, pairs(rotary_dim, stretched))


def yarn_of(rotary_dim, base, factor, original, **betas):
    fields = {"rotary_dim": rotary_dim, "base": base, "factor": factor}
    return fields | {"original_max_position": original} | betas


YARNS = [
    yarn_of(128, 1e6, 4.0, 32768),
    yarn_of(64, 1e4, 40, 4096),
    yarn_of(64, 15e4, 32.0, 4096),
    yarn_of(16, 1e4, 0.5, 64, beta_fast=8),
    # Base and length let the last pair of all turn often, so that the ramp ends beyond it.
    yarn_of(64, 100.0, 2.0, 4096),
    yarn_of(64, 5e4, 32.0, 4096, beta_fast=1.0, beta_slow=1.0),
]


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("given", YARNS)
@formula
def test_yarn_interpolates_the_pairs_of_long_wavelengths(given, truncate):
    rotary_dim, base, factor = given["rotary_dim"], given["base"], mpf(given["factor"])
    # The pair i turns L / (2 pi base ** (2 i / d)) times within L tokens.
    turns = {"fast": given.get("beta_fast", 32), "slow": given.get("beta_slow", 1)}
    wavelengths = {
        end: given["original_max_position"] / (2 * mpmath.pi * times)
        for end, times in turns.items()
    }
    ends = {end: mpmath.log(wavelengths[end], base) * rotary_dim / 2 for end in wavelengths}
    if truncate:
        ends = {"fast": mpmath.floor(ends["fast"]), "slow": mpmath.ceil(ends["slow"])}
    fast, slow = max(ends["fast"], 0), min(ends["slow"], rotary_dim - 1)
    exact = []
    for pair, theta in enumerate(pairs(rotary_dim, base)):
        if pair <= fast:
            exact.append(theta)
        elif pair >= slow:
            exact.append(theta / factor)
        else:
            share = (pair - fast) / (slow - fast)
            exact.append((1 - share) * theta + share * theta / factor)
    inv_freq, scaling = yarn(**given, truncate=truncate)
    assert_near(inv_freq, exact)
    temperature = mpmath.log(factor) / 10 + 1 if factor > 1 else 1
    assert abs(scaling - temperature) <= PAPER


def test_yarn_without_truncation_has_its_ends_between_pairs():
    given = YARNS[2]
    whole, exact = (yarn(**given, truncate=truncate)[0] for truncate in (True, False))
    between = (exact != inverse_frequencies(64, 15e4)) & (exact != linear(64, 15e4, factor=32.0))
    # They are the pairs 8.1 and 17.4 of GPT-OSS.
    assert np.flatnonzero(between).tolist() == list(range(9, 18))
    assert not np.isclose(whole[between], exact[between], rtol=1e-3).any()


def test_yarn_goes_at_one_step_where_its_ends_are_one():
    betas = {"beta_fast": 1.0, "beta_slow": 1.0}
    original = 2 * math.pi * 1e4 ** (19.95 / 32)  # where the pair 19.95 turns once
    options = betas | {"factor": 4.0, "original_max_position": original, "truncate": False}
    plain, inv_freq = inverse_frequencies(64), yarn(64, **options)[0]
    assert np.array_equal(inv_freq[:20], plain[:20])
    assert np.array_equal(inv_freq[20:], plain[20:] / 4)


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ({}, lambda log: log / 10 + 1),
        ({"attention_factor": 1.5}, lambda log: 1.5),
        ({"attention_factor": 1, "mscale": 0.5, "mscale_all_dim": 2.0}, lambda log: 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, lambda log: 1),
        ({"mscale": 0.5, "mscale_all_dim": 2}, lambda log: (0.05 * log + 1) / (0.2 * log + 1)),
        ({"mscale": 0.5}, lambda log: log / 10 + 1),
        ({"mscale_all_dim": 0.5}, lambda log: log / 10 + 1),
        ({"mscale": 0.5, "mscale_all_dim": 0}, lambda log: log / 10 + 1),
    ],
)
def test_yarn_scales_attention_by_what_it_is_told(given, exact):
    scaling = yarn(64, factor=40, original_max_position=4096, **given)[1]
    assert type(scaling) is float and scaling == pytest.approx(exact(math.log(40)), rel=PAPER)


LONGROPE = {
    **{"rotary_dim": 8, "base": 1e4, "original_max_position": 4096, "factor": 32},
    **{"short_factor": [1, 1.5, 2.0, 2.5], "long_factor": np.array([1.0, 8.0, 30.0, 60.0])},
}


@pytest.mark.parametrize(
    ("seq_len", "used"), [(None, "short"), (0, "short"), (4096, "short"), (4097, "long")]
)
@formula
def test_longrope_divides_each_pair_by_its_own_factor(seq_len, used):
    inv_freq, scaling = longrope(**LONGROPE, seq_len=seq_len)
    factors = LONGROPE[f"{used}_factor"]
    thetas = zip(pairs(8, 1e4), factors, strict=True)
    assert_near(inv_freq, [theta / mpf(float(factor)) for theta, factor in thetas])
    assert abs(scaling - mpmath.sqrt(1 + mpmath.log(32) / mpmath.log(4096))) <= PAPER


@pytest.mark.parametrize(
    ("given", "short", "long"),
    [
        ({"factor": 1.0}, 1.0, 1.0),
        ({"factor": 0.5}, 1.0, 1.0),
        ({"attention_factor": 1.25}, 1.25, 1.25),
        ({"short_mscale": 1.1, "long_mscale": 1.2}, 1.1, 1.2),
        ({"attention_factor": 1.25, "short_mscale": 1.1, "long_mscale": 1.2}, 1.1, 1.2),
        ({"attention_factor": 1.25, "long_mscale": 1.2}, 1.25, 1.2),
    ],
)
def test_longrope_scales_attention_by_what_it_is_told(given, short, long):
    assert longrope(**LONGROPE | given, seq_len=4096)[1] == short
    assert longrope(**LONGROPE | given, seq_len=4097)[1] == long


@pytest.mark.parametrize("rotary_dim", [64, 128])
@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32, 1, 4, 8192), (16.0, 1.0, 1.0, 8192), (2.0, 0.5, 64.0, 1000)],
)
@formula
def test_llama3_interpolates_long_wavelengths(rotary_dim, factor, low, high, original):
    exact = []
    for theta in pairs(rotary_dim, 500000.0):
        wavelength = 2 * mpmath.pi / theta
        if wavelength < mpf(original) / high:
            exact.append(theta)
        elif wavelength > mpf(original) / low:
            exact.append(theta / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            exact.append((1 - smooth) * theta / factor + smooth * theta)
    given = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    assert_near(llama3(rotary_dim, 500000.0, **given, original_max_position=original), exact)


@pytest.mark.parametrize("factor", [1.0, 8])
@pytest.mark.parametrize(
    ("head_dim", "share", "rotating"), [(512, 0.25, 64), (256, 1, 128), (10, 0.5, 2)]
)
@formula
def test_proportional_rotates_the_first_pairs_of_the_whole_head(head_dim, share, rotating, factor):
    inv_freq = proportional(head_dim, 1e6, partial_rotary_factor=share, factor=factor)
    first = [theta / factor for theta in pairs(head_dim, 1e6)[:rotating]]
    assert_near(inv_freq, first + [mpf(0)] * (head_dim // 2 - rotating))


@pytest.mark.parametrize(
    ("head_dim", "share", "rotary_dim"),
    [(128, 1, 128), (128, 0.75, 96), (96, 0.25, 24), (80, 0.4, 32), (192, 0.334, 64)],
)
def test_a_part_of_a_head_is_rounded_down(head_dim, share, rotary_dim):
    assert partial_rotary_dim(head_dim, share) == rotary_dim


@pytest.mark.parametrize("options", [{}, {"scale_base": 256, "gamma": 0.5}])
@formula
def test_xpos_decays_with_the_distance_and_faster_in_the_first_pairs(options):
    positions = np.array([-700, 0, 1, 512, 5000])
    scale = xpos_scale(64, positions, **options)
    gamma, scale_base = mpf(options.get("gamma", 0.4)), options.get("scale_base", 512)
    assert scale.dtype == np.float64 and scale.shape == (5, 32)
    for position, row in zip(positions.tolist(), scale, strict=True):
        zeta = [(mpf(pair) / 32 + gamma) / (1 + gamma) for pair in range(32)]
        assert_near(row, [number ** (mpf(position) / scale_base) for number in zeta])
    products = scale[3] / scale[1]  # of q at 512 and k at 0
    assert (np.diff(products) > 0).all() and (products < 1).all()


YARN = {"rotary_dim": 8, "factor": 4.0, "original_max_position": 4096}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rotary_dim": 8, "factor": 2.0, "max_position": 2048}


XPOS = {"rotary_dim": 8, "positions": [0]}
LINEAR, NTK = {"rotary_dim": 8, "factor": 2.0}, {"rotary_dim": 8, "alpha": 2.0}
PART = {"head_dim": 64, "partial_rotary_factor": 1}
GOOD = {"inv_freq": [1.0, 0.5], "num_positions": 8, "like": np.zeros((5, 3, 4))}
REFUSED = [  # a rule, arguments that it takes, and what it does not take in place of each
    (inverse_frequencies, {"rotary_dim": 8}, ValueError, {"rotary_dim": [7, 0, -2]}),
    (inverse_frequencies, {"rotary_dim": 8}, TypeError, {"rotary_dim": [8.0, True, "8", None]}),
    (inverse_frequencies, {"rotary_dim": 8}, ValueError, {"base": [0, -1.0, math.nan, math.inf]}),
    (inverse_frequencies, {"rotary_dim": 8}, TypeError, {"base": ["10000", True, None, 1 + 0j]}),
    (linear, LINEAR, ValueError, {"factor": [0], "rotary_dim": [7], "base": [-1.0]}),
    (linear, LINEAR, TypeError, {"factor": ["2", None]}),
    (ntk, NTK, ValueError, {"alpha": [math.inf], "rotary_dim": [2], "base": [0]}),
    (ntk, NTK, TypeError, {"alpha": [True]}),
    (dynamic_ntk, DYNAMIC, ValueError, {"factor": [-1], "max_position": [0], "seq_len": [-1]}),
    (dynamic_ntk, DYNAMIC, ValueError, {"rotary_dim": [2]}),
    (dynamic_ntk, DYNAMIC, TypeError, {"max_position": ["2048"], "seq_len": [4096.0]}),
    (yarn, YARN, ValueError, {"base": [1], "factor": [0.0], "original_max_position": [0]}),
    (yarn, YARN, ValueError, {"beta_fast": [0.5, 0], "beta_slow": [-1]}),
    (yarn, YARN, ValueError, {"attention_factor": [-1.0], "mscale_all_dim": [math.nan]}),
    (yarn, YARN, TypeError, {"base": ["10000"], "factor": [None]}),
    (yarn, YARN, TypeError, {"truncate": [1, None], "mscale": ["1"]}),
    (
        longrope,
        LONGROPE,
        ValueError,
        {"short_factor": [[1.0, 2.0, 3.0], [1.0, math.nan, 1.0, 1.0]]},
    ),
    (
        longrope,
        LONGROPE,
        ValueError,
        {"long_factor": [[1.0] * 8, [[1.0] * 4], [1.0, 0.0, 1.0, 1.0]]},
    ),
    (longrope, LONGROPE, ValueError, {"original_max_position": [1], "factor": [-32]}),
    (longrope, LONGROPE, ValueError, {"short_mscale": [-1], "seq_len": [-4096]}),
    (longrope, LONGROPE, TypeError, {"long_factor": [["1"] * 4, [1.0, [2.0], 1.0, 1.0], None]}),
    (longrope, LONGROPE, TypeError, {"attention_factor": ["1"], "long_mscale": ["1"]}),
    (longrope, LONGROPE, TypeError, {"seq_len": ["4096"]}),
    (
        llama3,
        LLAMA3,
        ValueError,
        {"factor": [0], "low_freq_factor": [0], "high_freq_factor": [0.5]},
    ),
    (llama3, LLAMA3, TypeError, {"high_freq_factor": [None], "original_max_position": [True]}),
    (proportional, {"head_dim": 8}, ValueError, {"head_dim": [9], "factor": [0]}),
    (proportional, {"head_dim": 8}, ValueError, {"partial_rotary_factor": [1.5, 0]}),
    (proportional, {"head_dim": 8}, TypeError, {"head_dim": [8.0]}),
    (partial_rotary_dim, PART, TypeError, {"head_dim": [8.0]}),
    (xpos_scale, XPOS, ValueError, {"rotary_dim": [3], "scale_base": [0], "gamma": [0.0]}),
    (xpos_scale, XPOS, ValueError, {"positions": [[[0]], 4]}),
    (xpos_scale, XPOS, TypeError, {"positions": [["0"]]}),
]
MISTAKES = [
    pytest.param(function, good, error, name, bad, id=f"{function.__name__}, {name}={bad!r}")
    for function, good, error, wrong in REFUSED
    for name, values in wrong.items()
    for bad in values
]


@pytest.mark.parametrize(("function", "good", "error", "argument", "bad"), MISTAKES)
def test_a_rule_refuses_what_it_cannot_use(function, good, error, argument, bad):
    function(**good)
    got = (
        ""
        if argument == "positions" or isinstance(bad, list)
        else f"{re.escape(repr(bad))}|{type(bad).__name__}"
    )
    with pytest.raises(error, match=rf"^{argument} must .*, got .*({got})"):
        function(**good | {argument: bad})


@pytest.mark.parametrize(
    ("head_dim", "share"), [(64, 1.5), (64, 0), (64, 0.01), (60, 0.25), (73, 1.0), (-8, 0.5)]
)
def test_a_part_of_a_head_that_is_no_even_number_is_refused(head_dim, share):
    with pytest.raises(ValueError, match=r"^partial_rotary_factor must .*, got "):
        partial_rotary_dim(head_dim, share)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_that_is_no_float64_is_refused(sign):
    with pytest.raises(ValueError, match=r"^partial_rotary_factor must .*, got 0.5$"):
        partial_rotary_dim(sign * 10**400, 0.5)


# The spellings of configs; published ones are in test_model_configs.py.

HEAD = {"head_dim": 8, "max_position_embeddings": 4096}
FACTORS = {"short_factor": LONGROPE["short_factor"], "long_factor": [1.0, 8.0, 30.0, 60.0]}


def same(one, other):
    return np.array_equal(one[0], other[0]) and one[1] == other[1]


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_longrope_goes_by_all_its_names(name, key):
    scaling = {key: name, "original_max_position_embeddings": 128} | FACTORS
    config = HEAD | {"rope_scaling": scaling}
    exact = longrope(**LONGROPE | {"original_max_position": 128}, seq_len=129)
    assert same(from_config(config, seq_len=129), exact)


@pytest.mark.parametrize(
    ("outside", "inside"), [({"original_max_position_embeddings": 128}, {}), ({}, {"factor": 32})]
)
def test_the_factor_is_the_quotient_of_the_lengths_where_it_is_not_given(outside, inside):
    inside = inside | {"original_max_position_embeddings": 128}
    for rope_type, rest in (("longrope", FACTORS), ("yarn", {})):
        scaling = inside | {"rope_type": rope_type} | rest
        options = rotary_parameters(HEAD | outside | {"rope_scaling": scaling}).options
        assert options["factor"] == 32 and options["original_max_position"] == 128


def test_the_original_length_beside_the_rope_parameters_goes_before_the_one_in_them():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = HEAD | {"original_max_position_embeddings": 128, "rope_scaling": scaling}
    assert rotary_parameters(config).options["original_max_position"] == 128
    del config["original_max_position_embeddings"], scaling["original_max_position_embeddings"]
    assert rotary_parameters(config).options["original_max_position"] == 4096


def test_the_original_length_of_one_layer_type_is_its_own():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    nested = {"full_attention": scaling, "sliding_attention": {}}
    config = HEAD | {"original_max_position_embeddings": 128, "rope_parameters": nested}
    options = rotary_parameters(config, layer_type="full_attention").options
    assert options["original_max_position"] == 64


def test_rope_type_goes_before_type():
    scaling = {"rope_type": "default", "type": "linear", "factor": 4.0}
    assert rotary_parameters(HEAD | {"rope_scaling": scaling}).rope_type == "default"


@pytest.mark.parametrize("seq_len", [4096, 4097])
def test_phi_3_5_moe_scales_attention_by_its_own_numbers(seq_len):
    scaling = {"type": "longrope", "short_mscale": 1.1, "long_mscale": 1.2} | FACTORS
    config = HEAD | {"original_max_position_embeddings": 4096, "rope_scaling": scaling}
    scale = from_config(config | {"max_position_embeddings": 131072}, seq_len=seq_len)[1]
    assert scale == (1.1 if seq_len == 4096 else 1.2)


@pytest.mark.parametrize("make", [dict, lambda fields: types.SimpleNamespace(**fields)])
def test_a_config_is_a_dict_or_an_object_with_the_same_fields(make):
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = {"rope_theta": 500.0, "rope_scaling": scaling, "partial_rotary_factor": 0.5} | HEAD
    new = {
        "rope_parameters": scaling | {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "rope_theta": None,
    } | HEAD
    exact = linear(4, 500.0, factor=4.0)
    for fields in (old, new):
        for config in (make(fields), make({"text_config": make(fields), "hidden_size": 1})):
            inv_freq, attention_scaling = from_config(config)
            assert np.array_equal(inv_freq, exact) and attention_scaling == 1.0
            told = rotary_parameters(config)
            assert told == ("linear", 4, 500.0, {"factor": 4.0}, 4096)


def test_a_layer_type_has_the_head_of_its_own_layers():
    config = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config |= {"per_layer_config": {"1": {"head_dim": 16}}, "rope_parameters": LAYERED}
    full, sliding = (from_config(config, layer_type=layer_type)[0] for layer_type in LAYERED)
    assert np.array_equal(full, inverse_frequencies(16, 100.0))
    assert np.array_equal(sliding, inverse_frequencies(8, 10.0))


def test_yarn_of_one_layer_type_is_truncated_as_that_type_says():
    given = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    nested = {"full_attention": given | {"truncate": False}, "sliding_attention": {}}
    config = {"head_dim": 64, "rope_theta": 15e4, "rope_parameters": nested}
    assert same(from_config(config, layer_type="full_attention"), yarn(**YARNS[2], truncate=False))


LAYERED = {"full_attention": {"rope_theta": 100.0}, "sliding_attention": {"rope_theta": 10.0}}


def test_the_layer_types_of_a_config_are_those_that_from_config_takes():
    config = HEAD | {"rope_parameters": LAYERED}
    assert layer_types(config) == layer_types({"text_config": config}) == tuple(LAYERED)
    assert layer_types(HEAD) == (None,)
    for layer_type, parameters in LAYERED.items():
        inv_freq = from_config(config, layer_type=layer_type)[0]
        assert np.array_equal(inv_freq, inverse_frequencies(8, parameters["rope_theta"]))


YARN_64 = {"rope_type": "yarn", "original_max_position_embeddings": 64}


def scaled(rope_type, key="rope_type", **fields):
    return HEAD | {"rope_scaling": {key: rope_type} | fields}


HALF_LONGROPE = scaled("su", "type", **FACTORS | {"short_factor": [1, 1]})
BY_LAYER = "layer_type must be 'full_attention' or 'sliding_attention' .*, got "
GIVE = "rope_parameters of type "


@pytest.mark.parametrize(
    ("error", "message", "config", "options"),
    [
        (TypeError, "config must .*, got 'meta-llama", "meta-llama/Llama-3.1-8B", {}),
        (TypeError, "config must .*, got NoneType", None, {}),
        (TypeError, "rope_parameters must be a dict, got list", HEAD | {"rope_scaling": [1]}, {}),
        (ValueError, "config .*hidden_size=8 and num_attention_heads=None", {"hidden_size": 8}, {}),
        (ValueError, "config must have head_dim, or hidden_size", {}, {}),
        (TypeError, "head_dim must .*, got '8'", {"head_dim": "8"}, {}),
        (TypeError, "rotary_dim must .*, got 8.0", {"rotary_dim": 8.0}, {}),
        (ValueError, "rotary_dim must .*, got 7", {"rotary_dim": 7}, {}),
        (ValueError, "partial_rotary_factor must .*, got 2", HEAD | {"rotary_pct": 2}, {}),
        (TypeError, "base must .*, got '1'", HEAD | {"rope_theta": "1"}, {}),
        (ValueError, "base must .*, got 0", HEAD | {"rope_theta": 0}, {}),
        (TypeError, "seq_len must .*, got 1.5", HEAD, {"seq_len": 1.5}),
        (ValueError, "seq_len must .*, got -1", HEAD, {"seq_len": -1}),
        (
            *(TypeError, "original_max_position_embeddings must .*, got '64'"),
            *(scaled("yarn", original_max_position_embeddings="64"), {}),
        ),
        (
            *(ValueError, "max_position_embeddings must .*, got 0"),
            *(HEAD | {"max_position_embeddings": 0, "rope_scaling": YARN_64}, {}),
        ),
        (
            *(ValueError, f"{GIVE}'yarn' must have factor, got rope_type, original"),
            *({"head_dim": 8, "rope_scaling": YARN_64}, {}),
        ),
        (ValueError, "rope_type .*, got 'axial': .*axial_from_config", scaled("axial"), {}),
        (ValueError, f"{GIVE}'linear' must have factor, got rope_type", scaled("linear"), {}),
        (
            *(ValueError, f"{GIVE}'dynamic' must have max_position, got type, factor"),
            *({"head_dim": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
        ),
        (
            *(ValueError, f"{GIVE}'llama3' must have low_freq_factor, high_freq_factor, got "),
            *(scaled("llama3", factor=2.0), {}),
        ),
        (
            *(ValueError, "long_factor must be rotary_dim / 2 = 2 numbers, got 4"),
            *(HALF_LONGROPE | {"partial_rotary_factor": 0.5}, {}),
        ),
        (ValueError, f"{BY_LAYER}None", HEAD | {"rope_parameters": LAYERED}, {}),
        (ValueError, f"{BY_LAYER}'a'", HEAD | {"rope_parameters": LAYERED}, {"layer_type": "a"}),
        (
            ValueError,
            f"{BY_LAYER}None",
            HEAD | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {},
        ),
        (ValueError, "layer_type must be None .*, got 'full'", HEAD, {"layer_type": "full"}),
    ],
)
def test_a_config_that_gives_no_frequencies_is_refused(error, message, config, options):
    with pytest.raises(error, match=f"^{message}"):
        from_config(config, **options)


def cos_sin_of(table, make=numpy_array):
    """The numbers of a table: the vectors (1, 0) rotated by it."""
    x = np.zeros((table.num_positions, 1, table.rotary_dim))
    x[..., ::2] = 1
    rotated = np.asarray(apply_rotary(make(x), table, interleaved=True))[:, 0]
    return rotated[:, ::2], rotated[:, 1::2]


INV_FREQS = {
    "numpy float64": lambda inv_freq: inv_freq,
    "numpy float32": lambda inv_freq: inv_freq.astype("float32"),
    "every other": lambda inv_freq: inv_freq.repeat(2)[::2],
    "torch float64": torch.from_numpy,
    "torch float32": lambda inv_freq: torch.from_numpy(inv_freq).float(),
    "torch bfloat16": lambda inv_freq: torch.from_numpy(inv_freq).bfloat16(),
    "jax": jax_array,
    "list": lambda inv_freq: inv_freq.tolist(),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", INV_FREQS)
def test_a_table_holds_cos_and_sin_of_float64_angles_rounded_once(kind, library):
    inv_freq = INV_FREQS[kind](inverse_frequencies(64, 1e6))
    like = LIBRARIES[library](np.zeros((3, 1, 64)))
    table = RotaryTable.from_inverse_frequencies(inv_freq, 1000, like=like)
    told = (table.dtype, table.device, table.shape, table.rotary_dim, table.num_positions)
    assert told == ("float32", "cpu", (1000, 32), 64, 1000)
    numbers = inv_freq.double().numpy() if isinstance(inv_freq, torch.Tensor) else inv_freq
    angles = np.outer(np.arange(1000.0), np.asarray(numbers, np.float64))
    cos, sin = cos_sin_of(table, LIBRARIES[library])
    assert np.array_equal(cos, np.cos(angles).astype(np.float32))
    assert np.array_equal(sin, np.sin(angles).astype(np.float32))


def test_a_far_position_has_the_angle_of_the_formula():
    last, inv_freq = 131_071, inverse_frequencies(8)
    table = RotaryTable.from_inverse_frequencies(inv_freq, last + 1, like=np.zeros(1))
    cos, sin = (half[-1] for half in cos_sin_of(table))
    with mpmath.workdps(40):
        angles = [last * mpmath.mpf(10000) ** (-mpmath.mpf(pair) / 4) for pair in range(4)]
        exact_cos = [float(mpmath.cos(angle)) for angle in angles]
        exact_sin = [float(mpmath.sin(angle)) for angle in angles]
    # Half a unit of a float32 in the last place; the float64 angle itself is good to 2e-11 here.
    assert np.abs(cos - exact_cos).max() <= 2.0**-25 + 1e-10
    assert np.abs(sin - exact_sin).max() <= 2.0**-25 + 1e-10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_table_made_like_x_rotates_x(library, dtype):
    if (library, dtype) == ("jax", "float64"):
        dtype = "bfloat16"  # JAX has no float64 unless it is asked for it
    x = LIBRARIES[library](np.ones((4, 2, 4)), dtype)
    table = RotaryTable.from_inverse_frequencies([1.0, 0.25], 4, like=x)
    y = apply_rotary(x, table)
    assert type(y) is type(x) and y.dtype == x.dtype
    angles = np.outer(np.arange(4), [1.0, 0.25])[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    exact = np.broadcast_to(np.concatenate([cos - sin, cos + sin], -1), x.shape)
    tolerance = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 2e-7)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, tolerance, 2e-7)


@pytest.mark.parametrize(
    ("error", "argument", "got", "bad"),
    [
        (TypeError, "inv_freq", "str|abc", "abc"),
        (TypeError, "inv_freq", "None", None),
        (TypeError, "inv_freq", "a", ["a", "b"]),
        (TypeError, "inv_freq", "None", [1.0, None]),
        (TypeError, "inv_freq", r"\[1.0\]", [[1.0], [1.0, 2.0]]),
        (TypeError, "inv_freq", "complex|ndarray", np.ones(2, complex)),
        (TypeError, "inv_freq", "complex|Tensor", torch.ones(2, dtype=torch.complex64)),
        (ValueError, "inv_freq", "meta", torch.ones(2, device="meta")),
        (ValueError, "inv_freq", r"\(2, 2\)|2", np.ones((2, 2))),
        (ValueError, "inv_freq", r"\(\)|0", np.ones(())),
        (ValueError, "inv_freq", r"\(0,\)|0|\[\]", []),
        (TypeError, "num_positions", "8.0|float", 8.0),
        (TypeError, "num_positions", "True|bool", True),
        (TypeError, "num_positions", "None", None),
        (ValueError, "num_positions", "-1", -1),
        (TypeError, "like", "None", None),
        (TypeError, "like", "list", [1.0]),
        (TypeError, "like", "str|cpu", "cpu"),
    ],
    ids=lambda value: str(value) if isinstance(value, str | float) else None,
)
def test_what_gives_no_table_is_refused(error, argument, got, bad):
    with pytest.raises(error, match=rf"^{argument} must .*, got .*({got})"):
        RotaryTable.from_inverse_frequencies(**GOOD | {argument: bad})


BERT = {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12}
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 2048}
ROTATING = SIZES | {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("message", "config"),
    [
        ("describe a rotary embedding .* in that of 'bert'", BERT),
        ("describe a rotary embedding", BERT | {"position_embedding_type": "absolute"}),
        ("describe a rotary embedding", {"architectures": ["BertForMaskedLM"], **SIZES}),
        (
            "got position_embedding_type='absolute'$",
            SIZES | {"position_embedding_type": "absolute"},
        ),
        ("got alibi=True$", ROTATING | {"alibi": True}),
        ("got alibi=True in its attn_config$", ROTATING | {"attn_config": {"alibi": True}}),
        (
            "got position_embedding_type='relative_key'$",
            ROTATING | {"position_embedding_type": "relative_key"},
        ),
        (
            "got position_embedding_type='nope' in that of 'nobody'$",
            ROTATING | {"model_type": "nobody", "position_embedding_type": "nope"},
        ),
        ("got alibi=True in that of 'falcon'$", ROTATING | {"model_type": "falcon", "alibi": True}),
        (
            r"got rope in its attn_config, which is not read \(give .*\), in that of 'mpt'$",
            {"model_type": "mpt", "d_model": 64, "attn_config": {"rope": True, "rope_theta": 1e4}},
        ),
        (
            "have no rotary_scaling_factor, got 2: give it as rope_scaling",
            {"model_type": "nomic_bert", "rotary_scaling_factor": 2, **SIZES},
        ),
        (
            "got 'chatglm', whose rope_ratio",
            ROTATING | {"model_type": "chatglm", "rope_ratio": 500},
        ),
        ("describe a rotary embedding", {"model_type": "gpt2", "n_embd": 768, "n_head": 12}),
        ("describe a rotary embedding", {"model_type": "t5", "d_model": 512, "d_kv": 64}),
        ("describe a rotary embedding", {"model_type": "falcon", "alibi": True, **SIZES}),
        ("got position_embedding_type=None in that of 'esm'$", ROTATING | {"model_type": "esm"}),
        ("got use_mem_rope=False", {"model_type": "zamba2", "use_mem_rope": False, **SIZES}),
        (
            "got position_embeddings_type='relative_key'",
            {"model_type": "wav2vec2-bert", "position_embeddings_type": "relative_key", **SIZES},
        ),
        (
            "describe a rotary embedding .*: pass its decoder$",
            {"model_type": "x", "decoder": ROTATING, "encoder": BERT},
        ),
        ("pass its text_config", {"model_type": "musicflamingo", "rope_theta": 1200.0, **SIZES}),
        ("trained", {"model_type": "mistral_large4_text", "rope_theta": 1e4, **SIZES}),
        ("axial_from_config", {"model_type": "dinov3_vit", "rope_theta": 100.0, **SIZES}),
        ("axial_from_config", {"model_type": "ernie4_5_vl_moe_text", "rope_theta": 5e5, **SIZES}),
        ("rope_cupy.diffusion.flux makes its table", {"_class_name": "FluxTransformer2DModel"}),
        ("rope_cupy.diffusion.qwen_image makes", {"_class_name": "QwenImageTransformer2DModel"}),
        (
            "rope_cupy.diffusion.qwen_image_layered makes",
            {"_class_name": "QwenImageTransformer2DModel", "use_layer3d_rope": True},
        ),
        ("diffusers of 'SD3Transformer2DModel'", {"_class_name": "SD3Transformer2DModel", **SIZES}),
    ],
)
def test_a_config_without_such_a_rotation_is_refused_with_the_reason(message, config):
    for call in (from_config, rotary_parameters, layer_types):
        with pytest.raises(ValueError, match=f"^config must .*{message}"):
            call(config)


@pytest.mark.parametrize(
    "config",
    [
        SIZES,
        {"model_type": "llama", **SIZES},
        {"model_type": "falcon", "alibi": False, **SIZES},
        {"model_type": "esm", "position_embedding_type": "rotary", **SIZES},
        {"model_type": "nobody", "rope_theta": 10000.0, **SIZES},
        *(
            {"model_type": "nobody", "position_embedding_type": name, **SIZES}
            for name in ("rope", "rotary", "rope_gptj", "RoPE", "partial_rotary")
        ),
        {"model_type": "llava", "text_config": {"model_type": "llama", **SIZES}},
        {"architectures": ["X"], "rotary_pct": 1.0, "position_embedding_type": "absolute", **SIZES},
        types.SimpleNamespace(**SIZES),
    ],
)
def test_a_config_that_rotates_whether_it_says_so_or_names_no_model_is_read(config):
    inv_freq, scaling = from_config(config)
    assert np.array_equal(inv_freq, inverse_frequencies(8)) and scaling == 1.0


def test_the_file_of_command_r7b_is_read():
    config = {
        **{"model_type": "cohere2", "hidden_size": 4096, "num_attention_heads": 32},
        **{"position_embedding_type": "rope_gptj", "rope_theta": 50000, "rotary_pct": 1.0},
    }
    assert np.array_equal(from_config(config)[0], inverse_frequencies(128, 50000))
    assert pairs_neighbours(config) is True


@pytest.mark.parametrize("told", [{"rope_pct": 0.25}, {}])
def test_stablelm_epoch_rotates_a_quarter_of_each_head(told):
    config = {"model_type": "stablelm_epoch", "hidden_size": 2560, "num_attention_heads": 32}
    assert np.array_equal(from_config(config | told)[0], inverse_frequencies(20))


@pytest.mark.parametrize("told", [True, False])
def test_the_pairing_of_a_file_that_says_it_is_read(told):
    config = {"model_type": "nomic_bert", "rotary_emb_interleaved": told, **SIZES}
    assert pairs_neighbours(config) is told


def test_a_base_in_attn_config_that_is_not_that_of_the_config_is_refused():
    sizes = {"model_type": "dbrx", "d_model": 64, "n_heads": 8}
    config = sizes | {"attn_config": {"rope_theta": 500000}}
    with pytest.raises(ValueError, match=r"^rope_theta must .*, got 10000.0 and, .* 500000"):
        from_config(config)
    expected = inverse_frequencies(8, 500000.0)
    assert np.array_equal(from_config(config | {"rope_theta": 500000.0})[0], expected)
    assert np.array_equal(from_config(sizes)[0], inverse_frequencies(8))


def test_the_base_of_a_rotary_position_type_is_read():
    config = {"model_type": "wav2vec2-conformer", "position_embeddings_type": "rotary", **SIZES}
    inv_freq = from_config(config | {"rotary_embedding_base": 500})[0]
    assert np.array_equal(inv_freq, inverse_frequencies(8, 500.0))


def test_attn_factor_multiplies_the_scaling_of_yarn():
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {"head_dim": 8, "rope_theta": 1e4, "rope_scaling": given}
    plain = from_config(config)
    inv_freq, scaling = from_config(config | {"rope_scaling": given | {"attn_factor": 0.5}})
    assert np.array_equal(inv_freq, plain[0])
    assert scaling == 0.5 * plain[1] == pytest.approx(0.5 * (0.1 * math.log(4) + 1), rel=PAPER)
    both = {"mscale": 0.5, "mscale_all_dim": 2.0, "attn_factor": 3}
    growth = 0.1 * math.log(4)
    assert yarn(**YARN, **both)[1] == pytest.approx(3 * (0.5 * growth + 1) / (2 * growth + 1))
    with pytest.raises(ValueError, match=r"^attn_factor must be None where attention_factor"):
        yarn(**YARN, attn_factor=0.5, attention_factor=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("extrapolation_factor", 0.5), ("apply_yarn_scaling", False)]
)
def test_what_another_program_would_change_of_yarn_is_refused(name, value):
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {"head_dim": 8, "rope_scaling": given | {name: value}}
    with pytest.raises(ValueError, match=f"^{name} must be .* or absent, got {value}"):
        from_config(config)


TINY, GREAT = 1e-320, 10**400


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("base", lambda: inverse_frequencies(64, GREAT)),
        ("base", lambda: inverse_frequencies(64, TINY)),
        ("factor", lambda: linear(8, factor=TINY)),
        ("factor", lambda: linear(8, factor=GREAT)),
        ("alpha", lambda: ntk(4, alpha=1e300)),
        ("alpha", lambda: ntk(4, alpha=TINY)),
        ("alpha", lambda: dynamic_ntk(8, factor=1e308, max_position=1, seq_len=10**9)),
        ("seq_len", lambda: dynamic_ntk(8, factor=1.0, max_position=1, seq_len=GREAT)),
        ("factor", lambda: yarn(8, factor=TINY, original_max_position=64)),
        ("original_max_position", lambda: yarn(8, factor=2.0, original_max_position=GREAT)),
        ("mscale", lambda: yarn(**YARN | {"factor": 1e300}, mscale=1e308, mscale_all_dim=1e308)),
        ("short_factor", lambda: longrope(**LONGROPE | {"short_factor": [TINY] * 4})),
        ("short_factor", lambda: longrope(**LONGROPE | {"short_factor": [GREAT] * 4})),
        ("long_factor", lambda: longrope(**LONGROPE | {"long_factor": [TINY] * 4}, seq_len=9999)),
        ("factor", lambda: llama3(**LLAMA3 | {"factor": TINY})),
        ("factor", lambda: proportional(8, factor=TINY)),
        ("head_dim", lambda: from_config({"head_dim": 4_000_000_000})),
        ("rotary_dim", lambda: from_config({"rotary_dim": 4_000_000_000})),
    ],
)
def test_numbers_whose_frequencies_overflow_are_refused_by_name(argument, call):
    with pytest.raises((TypeError, ValueError), match=f"^{argument}.* must .*, got "):
        call()


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("inv_freq", {"inv_freq": [1.0, math.inf]}),
        ("inv_freq", {"inv_freq": np.array([math.nan, 1.0], np.float32)}),
        ("inv_freq", {"inv_freq": [10**400]}),
        ("inv_freq", {"inv_freq": [Fraction(10**400, 3)]}),
        ("inv_freq", {"inv_freq": torch.tensor([-math.inf])}),
        ("inv_freq", {"inv_freq": [1e308], "num_positions": 100}),
        ("attention_scaling", {"attention_scaling": 10**400}),
        ("attention_scaling", {"attention_scaling": 1e39}),
        ("attention_scaling", {"attention_scaling": -math.inf}),
    ],
)
def test_numbers_that_make_no_finite_table_are_refused(argument, given):
    with pytest.raises(ValueError, match=f"^{argument} must .* finite .*, got "):
        RotaryTable.from_inverse_frequencies(**GOOD | given)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_angles_that_are_not_finite_are_refused(odd):
    with pytest.raises(ValueError, match=r"^angles must be finite, got "):
        RotaryTable.from_angles(np.array([[0.0, odd]]), like=np.zeros(1))


def rotate_by_axes(x, rotation, positions):
    """x, (tokens, heads, head_dim), by an AxialRotation: a call for each slice of a head."""
    angles = rotation.angles(positions)
    for place, part in enumerate(np.split(angles, rotation.num_slices, -1)):
        table = RotaryTable.from_angles(part, like=x)
        offset = place * x.shape[-1] // rotation.num_slices
        x = apply_rotary(x, table, interleaved=rotation.interleaved, rotary_offset=offset)
    return x


def pair_by_pair(x, members, inv_freq, axes, positions):
    """x, the elements members[i] of a head rotated by positions[:, axes[i]] * inv_freq[i]."""
    y = x.copy()
    for (first, second), frequency, axis in zip(members, inv_freq, axes, strict=True):
        angle = (positions[:, axis] * frequency)[:, None]
        cos, sin, a, b = np.cos(angle), np.sin(angle), x[..., first], x[..., second]
        y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


FAST, SLOW = inverse_frequencies(4, 100.0)
# Of heads of 8: which elements make a pair, the frequencies and axes of the pairs.
HALVES, NEIGHBOURS = ([(i, i + 4) for i in range(4)], [(2 * i, 2 * i + 1) for i in range(4)])
BY_AXES = {
    "qwen2_vl_vision": (HALVES, [FAST, SLOW] * 2, [0, 0, 1, 1]),
    "sam3_vit_model": (NEIGHBOURS, [FAST, SLOW] * 2, [0, 0, 1, 1]),
    "inkling2_vision": (NEIGHBOURS, [FAST, SLOW] * 2, [1, 1, 0, 0]),
    "kimi_k25_vision": (HALVES, [FAST] * 2 + [SLOW] * 2, [1, 0, 1, 0]),
    "gemma4_vision": ([(0, 2), (1, 3), (4, 6), (5, 7)], [FAST, SLOW] * 2, [0, 0, 1, 1]),
    "pixtral": (HALVES, inverse_frequencies(8, 100.0)[[0, 2, 1, 3]], [0, 0, 1, 1]),
    "dinov3_vit": (HALVES, 2 * np.pi * np.array([FAST, SLOW] * 2), [0, 0, 1, 1]),
    "minimax_m3_vl_vision": ([(0, 3), (1, 4), (2, 5)], [1.0] * 3, [0, 1, 2]),
    "ernie4_5_vl_moe_text": (NEIGHBOURS, inverse_frequencies(8, 100.0), [1, 2, 0, 0]),
}


@pytest.mark.parametrize("model_type", BY_AXES)
def test_a_model_of_several_axes_is_rotated_as_its_config_says(model_type):
    given = {"rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    rotation = axial_from_config(
        {"model_type": model_type, "head_dim": 8, "rope_parameters": given}
    )
    members, inv_freq, axes = BY_AXES[model_type]
    assert sum(rotation.dims) == 2 * len(members)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 2, 8))
    positions = rng.uniform(-3, 3, (5, len(rotation.names)))
    found = rotate_by_axes(x, rotation, positions)
    np.testing.assert_allclose(found, pair_by_pair(x, members, inv_freq, axes, positions), 0, 1e-6)


EMBEDDED = {"model_type": "qwen2_vl", "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
NESTED = {"model_type": "qwen2_5_vl", "hidden_size": 1280, "num_heads": 16}
MEMORY = {"hidden_size": 256, "downsample_rate": 1, "num_attention_heads": 1}
MEMORY = {f"memory_attention_{name}": value for name, value in MEMORY.items()}


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (EMBEDDED, 80),
        ({"model_type": "qwen2_5_vl", "vision_config": NESTED}, 80),
        ({"model_type": "glm4v", "vision_config": {"head_dim": 128}, "rope_theta": 5e5}, 128),
        ({"model_type": "sam2_video", **MEMORY}, 256),
    ],
)
def test_files_of_old_vision_models_are_read(config, head_dim):
    rotation = axial_from_config(config)
    assert np.array_equal(rotation.inv_freq, np.tile(inverse_frequencies(head_dim // 2), 2))
    assert rotation.dims == (head_dim // 2,) * 2


def test_a_grid_is_counted_as_the_model_counts_it():
    fields = {"head_dim": 8, "rope_theta": 100.0}
    centres = axial_from_config({"model_type": "dinov3_vit", **fields}).angles((2, 4))
    height, width = np.repeat([-0.5, 0.5], 4), np.tile([-0.75, -0.25, 0.25, 0.75], 2)
    np.testing.assert_allclose(centres[:, 0], 2 * np.pi * height, 1e-14)
    np.testing.assert_allclose(centres[:, 2], 2 * np.pi * width, 1e-14)
    from_1 = axial_from_config({"model_type": "llama4_vision_model", **fields}).angles((1, 3))
    np.testing.assert_allclose(from_1[:, 0], [1, 2, 3], 1e-14)
    from_0 = axial_from_config({"model_type": "pixtral", **fields}).angles((1, 3))
    np.testing.assert_allclose(from_0[:, 2], SLOW**0.5 * np.arange(3), 1e-14)


ERNIE = {"model_type": "ernie4_5_vl_moe_text", "head_dim": 8}


@pytest.mark.parametrize(
    ("error", "message", "config"),
    [
        (TypeError, "config must .*, got NoneType", None),
        (ValueError, "config must .*, got model_type='bert'", BERT),
        (ValueError, "config must .*, got model_type=''", SIZES),
        (ValueError, "head_dim must be a multiple of 4", {"model_type": "pixtral", "head_dim": 6}),
        (
            ValueError,
            "head_dim must be positive",
            {"model_type": "mlcd_vision_model", "head_dim": 1},
        ),
        (
            *(ValueError, "rope_type must be 'axial' here, got 'yarn'"),
            {"model_type": "pixtral", "head_dim": 8, "rope_parameters": {"rope_type": "yarn"}},
        ),
        (ValueError, "mrope_section must be 3 numbers whose sum is head_dim / 2 = 4", ERNIE),
        (
            *(ValueError, "mrope_section must begin with two equal"),
            ERNIE | {"rope_parameters": {"mrope_section": [2, 1, 1]}},
        ),
        (TypeError, "vision_config must be", {"model_type": "glm4v", "vision_config": 3}),
    ],
)
def test_a_config_that_gives_no_rotation_by_axes_is_refused(error, message, config):
    with pytest.raises(error, match=f"^{message}"):
        axial_from_config(config)


# Any JSON: a config that is read gives finite numbers, and any other is refused by name.


@settings(max_examples=1000, deadline=None)
@given(ANY_CONFIG, st.sampled_from([None, "full_attention"]), st.sampled_from([None, 1, 10**6]))
def test_any_config_gives_finite_frequencies_or_is_refused(config, layer_type, seq_len):
    with contextlib.suppress(TypeError, ValueError):
        inv_freq, scaling = from_config(config, layer_type=layer_type, seq_len=seq_len)
        assert np.isfinite(inv_freq).all() and math.isfinite(scaling)
        assert inv_freq.dtype == np.float64 and inv_freq.ndim == 1
    with contextlib.suppress(TypeError, ValueError):
        assert np.isfinite(axial_from_config(config).inv_freq).all()
    with contextlib.suppress(TypeError, ValueError):
        assert layer_types(config)
    with contextlib.suppress(TypeError, ValueError):
        assert pairs_neighbours(config) in (None, True, False)
