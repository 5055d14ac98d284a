"""The way of a call that PyTorch traces: the graph holds an operator in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import private_torch
from ..arrays import asked_of
from ..arrays.torch import refuse_transform
from ..call import (
    AN_INT_OR_ARRAY,
    NO_EXTRA,
    Call,
    Extra,
    Kind,
    check_counted,
    check_position_offset,
)
from ..checks import check_number, count, index, is_array
from ..options import (
    NO_PARTS,
    Cache,
    Norm,
    Packed,
    check_norm_after,
    check_options,
    check_parts,
    check_round_norm,
    check_without_table,
)
from ..private_torch import base_of, run_untraced
from ..problem import OF_POSITIONS
from ..table_forms import FORMS, OF_NEIGHBOURS, TableSource, no_table
from ..tables import source_of
from . import UNTRACED, autograd
from .operators import (
    OF_OTHERS,
    VERSION,
    VMAP,
    arguments_of,
    check_traced,
    define,
    extra_tensors,
    new,
    of_written,
    present,
    schemas,
    table_tensors,
    written_of,
)

PARTS = "CompositeImplicitAutograd"  # of PyTorch's dispatcher: made of other operators


def parse(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    extra: Extra = NO_EXTRA,
    parts: tuple[Any, Any, Any] = NO_PARTS,
) -> Call:
    """Return the record of a call that is traced: see `rope_cupy.call.parse`.

    Numbers that change are no numbers while they are traced: an operator checks them when it runs.
    An int of NumPy, which torch.compile takes for an array, is a tensor without axes.
    """
    source, interleaved = source_of(table), options[0]
    if interleaved is None:
        options = source.form in OF_NEIGHBOURS, *options[1:]
    norm, packed, cache = parts
    _check_types(norm, packed, cache)
    records = (
        None if norm is None else Norm(*norm),
        None if packed is None else Packed(*packed),
        None if cache is None else Cache(*cache),
    )
    checked = check_options(*options, parts=records)
    if source.form is no_table:
        check_without_table(names, interleaved, checked)
    if positions[1] is not None or positions[2] is not None:
        check_counted(*positions, lambda each: is_array(each) and each.ndim > 0)
    there, ints = [], []
    for name, each in zip(OF_POSITIONS, positions, strict=True):
        if each is None:
            continue
        if not is_array(each):
            ints.append(index(name, each, AN_INT_OR_ARRAY))
            continue
        if isinstance(each, torch.Tensor) and not each.ndim:
            raise ValueError(f"{name} must have an axis where it is a tensor, got shape ()")
        there.append((name, each))
    if out is not None and out[0] is None and cache is not None:  # a new q beside caches
        check_tensor(names[0], xs[0])
        out = torch.empty_like(xs[0]), *out[1:]
    offset = sum(ints) if ints else None
    if offset is not None and (positions[1] is not None or positions[2] is not None):
        check_position_offset(offset, any([name != "positions" for name, _ in there]))
    if offset is not None and offset >= 2**63:
        raise ValueError(f"positions must fit 64 bits, got {offset}")
    extra_names = *[name for name, _ in there], *extra[0]
    extra_arrays = *[each for _, each in there], *extra[1]
    kind = Kind(names, source.form, extra_names, checked)
    return Call(kind, xs, source, extra_arrays, offset, out)


def rotate(call: Call) -> tuple[Any, ...]:
    """Put an operator into the graph that is traced; return `out`, or new tensors.

    What is written in place where a gradient is recorded is written from a new result.
    """
    for name, x in zip(call.names, call.xs, strict=True):
        check_tensor(name, x)
    if call.out is not None:
        for name, y in zip(call.out_names, call.out, strict=True):
            check_tensor(name, y)
    autograd.check_recordable(call)
    records = any([autograd.wants_gradient(each) for _, each in call.named])
    call = with_tensors(call, records)
    arguments, out = traced_arguments(call), call.out
    if out is not None and not records:
        torch.ops.rope_cupy.rotate_into(*of_written(call.xs, out), *arguments)
        return out
    if len(call.xs) == 1:
        results = (torch.ops.rope_cupy.rotate(call.xs[0], *arguments),)
    else:
        results = tuple(torch.ops.rope_cupy.rotate_qk(call.xs[0], call.xs[1], *arguments))
    if out is None:
        return results
    autograd.check_in_place(call)
    for y, result in zip(out, results, strict=True):
        y.copy_(result)
    return out


def with_tensors(call: Call, records: bool) -> Call:
    """Return a call whose table and extra arrays are tensors."""
    parts = [_as_tensor("table", part, records) for part in call.table.arrays]
    extra = [
        (name, _as_tensor(name, array, records and array.ndim > 0)) for name, array in call.extra
    ]
    return call._replace(table=call.table._replace(arrays=tuple(parts))).with_extra((*extra,))


def _check_types(norm: Any, packed: Any, cache: Any) -> None:
    """Refuse of the last three of Options what an operator would take for a number or a flag."""
    if norm is not None:
        check_number("eps", norm[1])
        check_number("weight_offset", norm[2])
        check_round_norm(norm[3])
        check_norm_after(norm[4])
    if packed is not None:
        count("num_heads", packed[0], 1)
        count("num_kv_heads", packed[1], 1)
    if cache is not None:
        for name, scale in (("k_scale", cache[2]), ("v_scale", cache[3])):
            if scale is not None:
                check_number(name, scale)


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor of PyTorch in a call that is traced, got {type(x).__name__}"
        )


def _as_tensor(name: str, array: Any, records: bool) -> Any:
    """Return an array that is read as a tensor: NumPy's, where no backward pass reads it again."""
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray):
        check_tensor(name, array)
    if records:
        raise TypeError(
            f"{name} must be a tensor of PyTorch where a compiled call records a gradient, which "
            "would not see that another array changes, got a NumPy array"
        )
    return torch.from_numpy(array)


# Operators that are made of those that run: what is compiled holds the latter alone.


class Arguments(NamedTuple):
    """What an operator that is traced takes behind its tensors, before the options one by one."""

    cos: Any  # None without a table
    sin: Any  # None where one array is the whole table
    form: str  # of FORMS
    positions: Any
    seqlen_offsets: Any
    cu_seqlens: Any
    position_offset: Any
    weight: Any  # or q_weight
    k_weight: Any
    bias: Any  # or q_bias
    k_bias: Any
    slot_mapping: Any
    k_scale: Any
    v_scale: Any


NUM_ARGUMENTS = len(Arguments._fields)
BOOLS = {"True": True, "False": False}  # of round_norm, which is a text else


def traced_arguments(call: Call) -> tuple[Any, ...]:
    """Return a call as an operator takes it that is traced, behind the tensors that it rotates.

    Options stand one by one, for numbers among them may be ones that change.
    """
    *plain, norm, packed, cache = call.options
    *of_norm, round_norm, after = norm or (None, 0.0, 0.0, False, False)
    rounds = round_norm if isinstance(round_norm, str) else repr(round_norm)
    return (
        *(*table_tensors(call.table.arrays), call.table.form.__name__),
        *extra_tensors(call),
        *(*plain, *of_norm, rounds, after),
        *(None if packed is None else list(packed), *(cache or (None,) * 4)),
        VERSION,
    )


def traced_call(
    xs: tuple[torch.Tensor, ...], outs: tuple[torch.Tensor, ...] | None, arguments: Sequence[Any]
) -> Call:
    """Return the call that an operator has been given: the inverse of `traced_arguments`."""
    own, flat = Arguments(*arguments[:NUM_ARGUMENTS]), arguments[NUM_ARGUMENTS:-1]
    options = [tuple(each) if isinstance(each, list) else each for each in flat]
    plain, norm, packed, cache = options[:-10], options[-10:-5], options[-5], options[-4:]
    parts = check_parts(
        None if norm[0] is None else (*norm[:3], BOOLS.get(str(norm[3]), norm[3]), norm[4]),
        packed,
        None if cache[0] is None else cache,
    )
    names: tuple[str, ...] = ("q", "k", "v")[: len(xs)]
    if len(xs) == 1:
        names = ("qkv",) if packed else ("x",)
    of_norm = "q_weight", "k_weight", "q_bias", "k_bias"
    if names == ("x",):
        of_norm = "weight", "k_weight", "bias", "k_bias"
    all_names = *OF_POSITIONS, *of_norm, *OF_OTHERS
    arrays = *own[3:6], *own[7:]
    extra_names = [name for name, array in zip(all_names, arrays, strict=True) if array is not None]
    table = TableSource(FORMS[own.form], present((own.cos, own.sin)))
    kind = Kind(names, table.form, (*extra_names,), check_options(*plain, parts=parts))
    return Call(kind, xs, table, present(arrays), own.position_offset, outs)


def _rotate(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _rotated((x,), arguments)[0]  # type: ignore[no-any-return]


def _rotate_qk(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return _rotated((q, k), arguments)


def _rotated(xs: tuple[torch.Tensor, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    call = traced_call(xs, None, arguments)
    for _, x in (*zip(call.names, xs, strict=True), *call.weights):
        asked_of(x).check_transform("an input", x)
    return autograd.rotate(call, new)


def _rotate_into(*arguments: Any) -> None:
    """Write by an operator.

    A view whose place in memory may change is told by its base and its place there, for PyTorch
    (2.11 and 2.13) hands such a view to an operator at the place of its base. Where that cannot be
    told, it is written from a new tensor instead; and of a cache, which is too large for one, the
    place is made a constant of the graph.
    """
    xs, outs, others = written_of(arguments)
    call = traced_call(xs, outs, others)
    for x in xs:
        asked_of(x).check_transform("an input", x)
    if hasattr(xs[0], "fake_mode"):
        check_traced(call)
    own = arguments_of(call)
    if not any(map(_moves, outs)):
        torch.ops.rope_cupy.write_into(*of_written(xs, outs), *own)
        return
    bases = _bases(call)
    if bases:
        places = [number for y, base in zip(outs, bases, strict=True) for number in _place(y, base)]
        torch.ops.rope_cupy.write_into_places(*of_written(xs, bases), *own, places)
        return
    written = []
    for name, y in zip(call.out_names, outs, strict=True):
        moves, is_cache = _moves(y), name.endswith("_cache")
        if moves and is_cache:
            int(y.storage_offset())
        written.append(torch.empty_like(y) if moves and not is_cache else y)
    torch.ops.rope_cupy.write_into(*of_written(xs, tuple(written)), *own)
    for y, result in zip(outs, written, strict=True):
        if result is not y:
            y.copy_(result)


def _moves(y: torch.Tensor) -> bool:
    """Return whether a tensor is a view whose place may change from run to run."""
    is_symbolic = isinstance(y.storage_offset(), torch.SymInt)
    return is_symbolic and (base_of(y) is not None or y.is_inference())


def _bases(call: Call) -> tuple[torch.Tensor, ...]:
    """Return the tensors that the outputs are views of, of which no two are one; none else.

    A copy of a base that is contiguous has its elements where the base has them.
    """
    outs = call.out or ()
    bases = tuple([y if base_of(y) is None else base_of(y) for y in outs])
    if any([base.is_inference() or not base.is_contiguous() for base in bases]):
        return ()
    read = (*call.xs, *call.table.arrays, *call.extra_arrays)
    storages = [private_torch.storage_number(each) for each in (*bases, *read)]
    is_alone = [storages.count(each) == 1 for each in storages[: len(bases)]]
    return bases if all(is_alone) else ()


def _place(y: torch.Tensor, base: torch.Tensor) -> tuple[Any, ...]:
    """Return where a view lies in its base: its number of axes, sizes and strides, and its begin.

    `operators.placed` makes views of it again.
    """
    return y.ndim, *y.shape, *y.stride(), y.storage_offset() - base.storage_offset()


def refuse_vmap(*_: Any) -> None:
    refuse_transform("an input")


_TYPES = dict.fromkeys(Arguments._fields, "Tensor?") | {
    "form": "str",
    "position_offset": "SymInt?",
}
OPTIONS = (
    "bool interleaved, str? layout, int? head_dim, int rotary_offset, bool conjugate, "
    "str out_of_range, int[]? mrope_section, bool mrope_interleaved, str rounding, str? norm, "
    "float eps, float weight_offset, str round_norm, bool norm_after, int[]? packed, "
    "str? cache_layout, str? cache_dtype, float? k_number, float? v_number, str version"
)
ONE, TWO, WRITES = schemas(
    ", ".join([f"{kind} {name}" for name, kind in _TYPES.items()]) + ", " + OPTIONS
)

define(__name__, "rotate", ONE, {PARTS: "_rotate", VMAP: "refuse_vmap"})
define(__name__, "rotate_qk", TWO, {PARTS: "_rotate_qk", VMAP: "refuse_vmap"})
define(__name__, "rotate_into", WRITES, {PARTS: "_rotate_into", VMAP: "refuse_vmap"})


for _function in UNTRACED:
    run_untraced(_function)
