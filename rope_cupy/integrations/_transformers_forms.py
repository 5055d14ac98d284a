"""What a rotary function of a model computes, found by a probe of a few numbers.

A rotary function takes one or two tensors and the cosines and sines, or complex numbers, of their
tokens. It is run on the CPU on random numbers, in each layout that its axes could have, on whole
heads and on a part of one; `probe` returns the form of rope_cupy's call that gives the same.
Cosines and sines are all different in a probe, so that a form says which of them are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

MAX_FUNCTIONS = 512  # that are remembered; transformers has half as many
BATCH, HEADS, KV_HEADS, TOKENS, ROTARY_DIM, HEAD_DIM = 2, 4, 2, 6, 8, 12  # of a probe: all differ
SIZES = {"b": BATCH, "h": HEADS, "s": TOKENS}
TOLERANCE = 1e-5  # of float32 numbers near 1
# The layout of what is rotated, the axes of the cosines, and where these get an axis of heads.
CASES = (
    ("bhsd", "bs", 1),
    ("bshd", "bs", 2),
    ("bhsd", "s", 0),
    ("bshd", "s", 1),
    ("shd", "s", 1),
    ("hsd", "s", 0),
)
WORDS = {
    "elementwise": "an angle for each element",
    "first half": "the first half of every angle twice",
    "half width": "every angle once",
    "complex": "complex numbers",
}


class Parameters(NamedTuple):
    """What a rotary function takes, by name."""

    names: tuple[str, ...]  # of all, in their order
    arrays: tuple[str, ...]  # one or two tensors that are rotated
    angles: tuple[str, ...]  # cosines and sines, or complex numbers
    known: frozenset[str]  # these, and where the cosines get an axis of heads
    unsqueeze_dim: int | None  # its default; None where there is no such parameter


class Form(NamedTuple):
    """How rope_cupy says what a rotary function does."""

    interleaved: bool
    angles: str  # a key of WORDS
    to_halves: bool = False  # neighbours in, halves out
    at_the_end: bool = False  # the last elements of a head are rotated
    negated: bool = False  # rotates the other way

    def __str__(self) -> str:
        return (
            f"pairs of {'neighbours' if self.interleaved else 'halves'}"
            f"{', given back as halves' * self.to_halves}"
            f"{', the last of a head' * self.at_the_end}{', backwards' * self.negated}"
            f"; {WORDS[self.angles]}"
        )


class Probed(NamedTuple):
    """A rotary function and what was found of it."""

    original: Callable[..., Any]
    parameters: Parameters
    form: Form
    layouts: dict[tuple[int, int, int | None], tuple[str, str, int]]  # by axes of x, of cos, dim
    takes_parts: bool  # of a head
    keeps_dtype: bool  # results have the dtype of x, whatever that of the cosines
    # Whether cosines and sines must be float32 for rounding="eager" to give the function's bits;
    # None where it does not give them.
    float32_table: bool | None


FORMS = (
    Form(False, "elementwise"),  # Llama and most
    Form(True, "first half"),  # GLM, ERNIE 4.5, Helium
    Form(True, "elementwise"),  # Cohere
    Form(False, "half width"),  # GPT-OSS
    Form(True, "first half", to_halves=True),  # DeepSeek-V3
    Form(True, "half width"),  # GPT-J
    Form(False, "first half"),
    Form(True, "complex"),  # Llama 4
    Form(True, "complex", to_halves=True),
)
VARIANTS = tuple(
    form._replace(at_the_end=at_the_end, negated=negated)
    for at_the_end, negated, form in product((False, True), (False, True), FORMS)
)


@lru_cache(MAX_FUNCTIONS)
def parameters_of(function: Callable[..., Any]) -> Parameters | None:
    """Return the parameters of a function that has those of a rotary one, None of any other.

    Where the library `kernels` is installed, transformers makes a module of a function.
    """
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return None
    names = tuple(signature)
    complex_ones = tuple(name for name in names if name.startswith(("freqs_ci", "freqs_cos_sin")))
    angles = ("cos", "sin") if {"cos", "sin"} <= set(names) else complex_ones[:1]
    if not angles:
        return None
    arrays = names[: min(names.index(name) for name in angles)]
    rest = [signature[name] for name in names if name not in (*arrays, *angles)]
    optional = all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in rest)
    if len(arrays) not in (1, 2) or not optional:
        return None
    dim = signature["unsqueeze_dim"].default if "unsqueeze_dim" in names else None
    return Parameters(names, arrays, angles, frozenset((*arrays, *angles, "unsqueeze_dim")), dim)


@lru_cache(MAX_FUNCTIONS)
def probe(function: Callable[..., Any]) -> Probed | None:
    """Return what gives the results of a function in every layout that it takes, None if nothing.

    The function is called on the CPU, without gradients, with numbers from a generator of its own.
    """
    parameters = parameters_of(function)
    if parameters is None:
        return None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for form in VARIANTS:
            if (len(parameters.angles) == 1) != (form.angles == "complex"):
                continue
            probed = Probed(function, parameters, form, {}, False, False, None)
            wholes = {key: case for key, case in _cases(parameters) if _agrees(probed, case)}
            if not wholes:
                continue
            probed = probed._replace(layouts=wholes)
            parts = [_agrees(probed, case, HEAD_DIM) for case in wholes.values()]
            if False in parts:
                continue
            keeps = _keeps_dtype(probed, next(iter(wholes.values())))
            probed = probed._replace(takes_parts=all(parts), keeps_dtype=keeps)
            return probed._replace(float32_table=_float32_table(probed))
    return None


def _cases(
    parameters: Parameters,
) -> Iterator[tuple[tuple[int, int, int | None], tuple[str, str, int]]]:
    for layout, axes, dim in CASES:
        key = len(layout), len(axes) + 1, None if parameters.unsqueeze_dim is None else dim
        yield key, (layout, axes, dim)


def _arguments(
    probed: Probed, case: tuple[str, str, int], head_dim: int, dtype: Any, table_dtype: Any
) -> dict[str, Any]:
    """Return the arguments of a call in a layout, by the names of a function's parameters."""
    layout, axes, dim = case
    parameters, generator = probed.parameters, torch.Generator().manual_seed(3)

    def draw(axes: str, last: int, heads: int, dtype: Any) -> torch.Tensor:
        shape = [heads if axis == "h" else SIZES[axis] for axis in axes.removesuffix("d")]
        options: dict[str, Any] = {"generator": generator, "device": "cpu"}
        return torch.randn(*shape, last, dtype=torch.float32, **options).to(dtype)

    heads = zip(parameters.arrays, (HEADS, KV_HEADS), strict=False)
    given = {name: draw(layout, head_dim, count, dtype) for name, count in heads}
    width = ROTARY_DIM // 2 if probed.form.angles in ("half width", "complex") else ROTARY_DIM
    cos, sin = (draw(axes, width, 1, table_dtype) for _ in range(2))
    if probed.form.angles == "complex":
        given[parameters.angles[0]] = torch.complex(cos.float(), sin.float())
    else:
        given |= {"cos": cos, "sin": sin}
    return given if parameters.unsqueeze_dim is None else given | {"unsqueeze_dim": dim}


def _results(call: Callable[..., Any], given: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors that a call gives, None where it refuses, writes or gives another."""
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    try:
        results = call(**copies)
    except Exception:  # of the model's code: any error says that it takes no such arguments
        return None
    results = results if isinstance(results, tuple) else (results,)
    if not all(isinstance(each, torch.Tensor) for each in results):
        return None
    arrays = [(v, copies[k]) for k, v in given.items() if isinstance(v, torch.Tensor)]
    return results if all(torch.equal(*pair) for pair in arrays) else None


def _agrees(probed: Probed, case: tuple[str, str, int], head_dim: int = ROTARY_DIM) -> bool | None:
    """Whether a form gives a function's results; None where the function refuses such arguments."""
    given = _arguments(probed, case, head_dim, torch.float32, torch.float32)
    wanted = _results(probed.original, given)
    if wanted is None:
        return None
    found = _results(lambda **given: _fused_as(probed, "once", case[0], given), given)
    return (
        found is not None
        and [each.shape for each in found] == [each.shape for each in wanted]
        and all(map(_close, found, wanted))
    )


def _fused_as(probed: Probed, rounding: str, layout: str, given: dict[str, Any]) -> Any:
    x, rows = (given[names[0]] for names in (probed.parameters.arrays, probed.parameters.angles))
    rotated = rotary_dim(probed.form, rows.shape[-1])
    options = options_of(probed.form, rounding, layout, x.shape[-1], rotated)
    return fused(probed, rounding, options, given)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def _keeps_dtype(probed: Probed, case: tuple[str, str, int]) -> bool:
    given = _arguments(probed, case, ROTARY_DIM, torch.bfloat16, torch.float32)
    results = _results(probed.original, given)
    return results is not None and all(each.dtype == torch.bfloat16 for each in results)


def _float32_table(probed: Probed) -> bool | None:
    """Return with which table rounding="eager" gives a function's bits, None where with neither."""
    if probed.form.angles == "complex":  # whose products a device may round once or twice
        return None
    case = next(iter(probed.layouts.values()))
    dtypes = [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32,) * 2]
    if probed.keeps_dtype:
        dtypes.append((torch.bfloat16, torch.float32))
    for float32_table in (False, True):
        candidate = probed._replace(float32_table=float32_table)
        if all(_same_bits(candidate, case, *pair) for pair in dtypes):
            return float32_table
    return None


def _same_bits(probed: Probed, case: tuple[str, str, int], dtype: Any, table_dtype: Any) -> bool:
    given = _arguments(probed, case, ROTARY_DIM, dtype, table_dtype)
    wanted = _results(probed.original, given)
    found = _results(lambda **given: _fused_as(probed, "eager", case[0], given), given)
    return wanted is not None and found is not None and all(map(torch.equal, found, wanted))


# Calls of rope_cupy.


def table_of(probed: Probed, rounding: str, given: dict[str, Any]) -> RotaryTable:
    """View the cosines and sines of a call."""
    angles = [given[name] for name in probed.parameters.angles]
    form = probed.form
    if form.angles == "complex":
        return RotaryTable.from_complex(angles[0])
    if rounding == "eager" and probed.float32_table:
        angles = [each.float() for each in angles]
    if form.angles == "first half":
        angles = [each[..., : each.shape[-1] // 2] for each in angles]
    if form.angles == "elementwise":
        cos, sin = angles
        return RotaryTable.from_elementwise(cos, -sin if form.negated else sin)
    return RotaryTable(*angles)


def rotary_dim(form: Form, width: int) -> int:
    """Return how many elements of a head a call rotates, by the width of its cosines."""
    return 2 * width if form.angles in ("half width", "complex") else width


def options_of(
    form: Form, rounding: str, layout: str, head_dim: int, rotated: int
) -> dict[str, Any]:
    """Return the options of a call of rope_cupy."""
    return {
        "layout": layout,
        "interleaved": form.interleaved,
        "rotary_offset": head_dim - rotated if form.at_the_end else 0,
        "conjugate": form.negated and form.angles != "elementwise",
        "rounding": rounding,
    }


def fused(probed: Probed, rounding: str, options: dict[str, Any], given: dict[str, Any]) -> Any:
    """Rotate what a function of this form was given, in one call."""
    table = table_of(probed, rounding, given)
    xs = [given[name] for name in probed.parameters.arrays]
    if len(xs) == 1:
        return as_given(probed.form, apply_rotary(xs[0], table, **options))
    q, k = apply_rotary_qk(xs[0], xs[1], table, **options)
    return as_given(probed.form, q), as_given(probed.form, k)


def as_given(form: Form, x: Any) -> Any:
    """Return rotated pairs in the order that a function of this form gives them back in."""
    if not form.to_halves:
        return x
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
