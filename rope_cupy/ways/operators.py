"""Operators that rotate when a graph runs. They record no gradients: see `graphs` for those.

An operator takes tensors, the name of the table's form, and options one by one, and has a call of
them again when it runs: a graph may be stored, and run in another process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import eager
from ..arrays.torch import outline
from ..call import Call
from ..options import Options, check_options, check_parts
from ..private_torch import is_schema
from ..problem import OF_POSITIONS
from ..table_forms import FORMS, TableSource, complex_numbers, complex_pairs

MAX_KNOWN = 1024  # that is remembered of operators' arguments: forms, options, which arrays


class Arguments(NamedTuple):
    """What every operator takes behind the tensors that it rotates, before the options."""

    cos: Any
    sin: Any  # None where one array is the whole table
    form: str  # of FORMS
    positions: Any
    seqlen_offsets: Any
    cu_seqlens: Any
    position_offset: Any
    weight: Any  # or q_weight
    k_weight: Any
    slot_mapping: Any
    k_scale: Any
    v_scale: Any


NUM_ARGUMENTS = len(Arguments._fields)
OF_EXTRA = "k_weight", "slot_mapping", "k_scale", "v_scale"


def arguments_of(call: Call) -> tuple[Any, ...]:
    """Return a call as an operator takes it, behind the tensors that it rotates."""
    form, parts = call.table
    if form is complex_numbers:  # which Inductor gives to no operator that writes
        form, parts = complex_pairs, tuple([torch.view_as_real(part) for part in parts])
    cos, sin = parts if len(parts) == 2 else (parts[0], None)
    extra = dict(call.extra)
    return (
        *(cos, sin, form.__name__),
        *[extra.get(name) for name in OF_POSITIONS],
        call.position_offset,
        extra.get("weight", extra.get("q_weight")),
        *[extra.get(name) for name in OF_EXTRA],
        *_flat(call.options),
    )


def _flat(options: Options) -> tuple[Any, ...]:
    """Return options one by one, with the fields of their parts."""
    *plain, norm, packed, cache = options
    last = None if packed is None else list(packed), *(cache or (None,) * 4)
    *of_norm, round_norm = norm or (None, 0.0, 0.0, False)
    return *plain, *of_norm, repr(round_norm), *last


class _Known(NamedTuple):
    """What is known of operators' arguments but for their tensors."""

    names: tuple[str, ...]  # of what is rotated
    form: Any
    extra_names: tuple[str, ...]
    options: Options


@lru_cache(maxsize=MAX_KNOWN)
def _known(num: int, form: str, there: tuple[bool, ...], options: tuple[Any, ...]) -> _Known:
    """Check the options, once, and name the arrays. `there` says which extra arrays are."""
    plain, (*norm, round_norm) = options[:-9], options[-9:-5]
    packed, cache = options[-5], options[-4:]
    round_norm = {"True": True, "False": False}.get(round_norm, round_norm.strip("'"))
    parts = check_parts(
        None if norm[0] is None else (*norm, round_norm),
        packed,
        None if cache[0] is None else cache,
    )
    names: tuple[str, ...] = ("q", "k", "v")[:num]
    if num == 1:
        names = ("qkv",) if packed else ("x",)
    all_names = *OF_POSITIONS, "weight" if names == ("x",) else "q_weight", *OF_EXTRA
    extra_names = tuple(name for name, is_there in zip(all_names, there, strict=True) if is_there)
    return _Known(names, FORMS[form], extra_names, check_options(*plain, parts=parts))


def call_of(
    xs: tuple[torch.Tensor, ...], outs: tuple[torch.Tensor, ...] | None, arguments: Sequence[Any]
) -> Call:
    """Return the call that an operator has been given: the inverse of `arguments_of`."""
    own, flat = Arguments(*arguments[:NUM_ARGUMENTS]), arguments[NUM_ARGUMENTS:]
    extra = *own[3:6], *own[7:]
    there = tuple([array is not None for array in extra])
    options = tuple([tuple(each) if isinstance(each, list) else each for each in flat])
    names, form, extra_names, checked = _known(len(xs), own.form, there, options)
    parts = (own.cos,) if own.sin is None else (own.cos, own.sin)
    source, arrays = TableSource(form, parts), present(extra)
    return Call(names, xs, source, extra_names, arrays, own.position_offset, checked, outs)


def new(call: Call) -> tuple[torch.Tensor, ...]:
    """Rotate into new tensors by an operator."""
    arguments = arguments_of(call)
    if len(call.xs) == 1:
        return (torch.ops.rope_cupy.rotate_new(*call.xs, *arguments),)
    return tuple(torch.ops.rope_cupy.rotate_qk_new(*call.xs, *arguments))


def three(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return up to three tensors as an operator takes them that writes."""
    return (*tensors, None, None)[:3]


def present(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return those that are there."""
    return tuple([each for each in tensors if each is not None])


def check_traced(call: Call) -> None:
    """Check a call on the sizes that are traced, but for those that no one knows yet.

    A run checks its own sizes again.
    """
    extra = tuple((name, array) for name, array in call.extra if array.ndim)
    call = call.with_extra(extra)
    table = [("table", part) for part in call.table.arrays]
    outlines = [outline(name, array) for name, array in (*table, *call.named)]
    if any(each is None for each in outlines):
        return
    kept = iter(outlines)

    def taken(number: int) -> tuple[Any, ...]:
        return tuple([next(kept) for _ in range(number)])

    form = call.table.form
    table_source = TableSource(form, taken(len(table)))
    xs, arrays = taken(len(call.xs)), taken(len(extra))
    outs = None if call.out is None else taken(len(call.out))
    eager.check(call._replace(xs=xs, table=table_source, extra_arrays=arrays, out=outs))


def _in_memory(call: Call) -> Call:
    """Return a call whose numbers of NumPy, which a graph holds as tensors, are ints again."""
    numbers = [array for _, array in call.position_arrays if not array.ndim]
    if not numbers:
        return call
    offset = sum([int(each) for each in numbers], call.position_offset or 0)
    extra = tuple(
        (name, array) for name, array in call.extra if array.ndim or name not in OF_POSITIONS
    )
    return call.with_extra(extra)._replace(position_offset=offset)


def _run_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return eager.rotate(_in_memory(call_of((x,), None, arguments)))[0]  # type: ignore[no-any-return]


def _run_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return eager.rotate(_in_memory(call_of((q, k), None, arguments)))


def _run_write(*arguments: Any) -> None:
    eager.rotate(
        _in_memory(call_of(present(arguments[:3]), present(arguments[3:6]), arguments[6:]))
    )


def _fake_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return a tensor like the result, which has no memory yet."""
    check_traced(call_of((x,), None, arguments))
    return torch.empty_like(x)


def _fake_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    check_traced(call_of((q, k), None, arguments))
    return torch.empty_like(q), torch.empty_like(k)


def _fake_write(*arguments: Any) -> None:
    check_traced(call_of(present(arguments[:3]), present(arguments[3:6]), arguments[6:]))


# Operators are PyTorch's, and so of the process: they outlive a module that is imported again (by
# `importlib.reload`, say), and then call the functions of the new one.

_TYPES = dict.fromkeys(Arguments._fields, "Tensor?") | {
    "cos": "Tensor",
    "form": "str",
    "position_offset": "SymInt?",
}
_OPTIONS = (
    "bool interleaved, str? layout, int? head_dim, int rotary_offset, bool conjugate, "
    "str out_of_range, int[]? mrope_section, bool mrope_interleaved, str rounding, str? norm, "
    "float eps, float weight_offset, str round_norm, int[]? packed, str? cache_layout, "
    "str? cache_dtype, float? k_number, float? v_number"
)
_BEHIND = ", ".join([f"{kind} {name}" for name, kind in _TYPES.items()]) + ", " + _OPTIONS
ONE, TWO = (
    f"(Tensor x, {_BEHIND}) -> Tensor",
    f"(Tensor q, Tensor k, {_BEHIND}) -> (Tensor, Tensor)",
)
WRITES = (
    "(Tensor x, Tensor? k, Tensor? v, Tensor(a!) out, Tensor(b!)? k_out, Tensor(c!)? v_out, "
    f"{_BEHIND}) -> ()"
)
RUN, FAKE, VMAP = "CompositeExplicitAutograd", "fake", "vmap"


def define(module: str, name: str, schema: str, functions: dict[str, str]) -> None:
    """Define an operator by the names of functions of a module, and what PyTorch calls them for."""
    whole_name = f"rope_cupy::{name}"
    if hasattr(torch.ops.rope_cupy, name):
        known = getattr(torch.ops.rope_cupy, name).default._schema
        if not is_schema(known, whole_name + schema):
            raise ImportError(
                "rope_cupy.torch must be imported in a new process after another version of it, "
                f"whose operator {whole_name} takes other arguments"
            )
        return
    torch.library.define(whole_name, schema)
    for key, function in functions.items():
        call = _by_name(module, function)
        if key == FAKE:
            torch.library.register_fake(whole_name, call)
        elif key == VMAP:
            torch.library.register_vmap(whole_name, call)
        else:
            torch.library.impl(whole_name, key, call)


def _by_name(module: str, function: str) -> Callable[..., Any]:
    """Return what calls a function of a module as it is then."""

    def call(*arguments: Any) -> Any:
        return getattr(sys.modules[module], function)(*arguments)

    return call


define(__name__, "rotate_new", ONE, {RUN: "_run_new", FAKE: "_fake_new"})
define(__name__, "rotate_qk_new", TWO, {RUN: "_run_qk_new", FAKE: "_fake_qk_new"})
define(__name__, "write_into", WRITES, {RUN: "_run_write", FAKE: "_fake_write"})
