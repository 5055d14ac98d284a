"""The strings of options: all layouts are taken, and signatures name the types."""

import inspect
import typing
from itertools import permutations, product

import numpy as np
import pytest

import rope_cupy
from rope_cupy import choices, diffusion, positions

ALIASES = {name for name, each in vars(choices).items() if typing.get_origin(each)}


def test_layouts_are_all_orders_of_tokens_heads_and_batches_before_d():
    orders = [
        "".join(order) + "d"
        for tokens, batches in product("st", ("b", ""))
        for order in permutations([*batches, tokens, "h"])
    ]
    assert sorted(choices.LAYOUTS) == sorted(orders)


@pytest.mark.parametrize("layout", choices.LAYOUTS)
def test_every_layout_rotates_the_same_heads(layout):
    """The axes are moved to where the layout says, and back."""
    rng = np.random.default_rng(0)
    known = "bshd" if "b" in layout else "shd"
    x = rng.standard_normal((2, 5, 3, 8)[-len(known) :])
    angles = rng.standard_normal((5, 4))
    table = np.cos(angles), np.sin(angles)
    order = [known.index(axis) for axis in layout.replace("t", "s")]
    found = rope_cupy.apply_rotary(x.transpose(order), table, layout=layout)
    a, b = x[..., :4], x[..., 4:]
    cos, sin = (each[:, None] for each in table)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    np.testing.assert_allclose(found, exact.transpose(order), rtol=1e-14, atol=1e-14)


def functions():
    """Every public function that takes an option, by its name."""
    for module in (rope_cupy, diffusion):
        for name in module.__all__:
            if inspect.isfunction(each := getattr(module, name)):
                yield name, each
    yield "context_parallel", positions.context_parallel
    for name, each in vars(rope_cupy.RotaryTable).items():
        if isinstance(each, classmethod) and not name.startswith("_"):
            yield f"RotaryTable.{name}", each.__func__


OPTIONS = {
    "layout": choices.Layout,
    "out_of_range": choices.OutOfRange,
    "rounding": choices.Rounding,
    "norm": choices.NormKind,
    "round_norm": choices.RoundNorm,
    "cache_layout": choices.CacheLayout,
    "cache_dtype": choices.CacheDtype,
    "axes": choices.TableAxes,
    "compute_dtype": choices.ComputeDtype,
    "scheme": choices.Scheme,
}


def test_every_option_of_a_public_function_has_the_type_of_its_strings():
    seen = set()
    for name, function in functions():
        for option in OPTIONS.keys() & function.__annotations__.keys():
            seen.add(option)
            found = eval(function.__annotations__[option], function.__globals__)
            assert found in (OPTIONS[option], OPTIONS[option] | None), (name, option)
    assert seen == OPTIONS.keys()


def test_every_type_of_strings_is_of_an_option():
    used = {id(each) for each in OPTIONS.values()}
    assert {name for name in ALIASES if id(getattr(choices, name)) not in used} == {"BeforeWeight"}


def test_help_names_the_type_and_not_all_of_its_strings():
    shown = str(inspect.signature(rope_cupy.apply_rotary))
    assert "layout: 'Layout | None' = None" in shown
    assert "bhsd" not in shown
