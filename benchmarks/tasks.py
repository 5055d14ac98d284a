"""What is measured: an operation on a shape, its inputs, and the exact result of a set of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from result import WrongError
from shapes import Shape

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference

Call = Callable[[], Any]
Pair = tuple[torch.Tensor, torch.Tensor]

BY_AXES = ("axes", "mixed axes")
TOLD = ("offsets", "sequences", *BY_AXES)  # how rope_cupy alone, or hardly another, finds positions
VARIANTS = ("in place", "new", "bhsd", "packed", "positions", *TOLD)
TABLES = ("half", "full", "elementwise", "cache", "complex", "matrices", "frequencies")
SEQUENCE = 512  # tokens of a packed sequence
TEXT_SHARE = 9  # one of so many tokens is of the text, whose rows are the table's first ones
BLOCK = 16  # slots of a block of a cache
SCALE = 0.02  # what is divided by before it is rounded to 8 bits: normal numbers, as up to 300
EPS = 1e-6
FIRST_POSITION = 1000  # of the tables: at position 0 nothing is rotated
NUM_POSITIONS = 8192  # of a table that is read by an array of positions, at least
ALIGNMENT = 256  # elements from which q, k and v start
MOST_SETS = 400  # what so many small calls share lies in the L2, as between the layers of a model
MOST_TABLE_BYTES = 2**30  # of all sets; beyond that sets share tables
CHECKED = 1_000_000  # elements of q that are compared with the reference

# The greatest relative error (norm of the difference over norm) of a right result: a few roundings
# to the dtype, where the peers round their tables and products as well. Eight bits have three
# behind the leading one.
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-6, "float64": 1e-14}
CACHE_TOLERANCE = TOLERANCE | {"float8_e4m3fn": 4e-2}


class Op(NamedTuple):
    """What is done, by the functions that a peer has for its kind.

    variant: of the task, how q and k lie and what gives their positions.
    norm: "head" or "heads", over which RMSNorm takes its mean, or nothing.
    cache: "NHD" for k and v that go into a flat cache, "HND" into a paged one, or nothing.
    """

    kind: str
    variant: str = "in place"
    norm: str | None = None
    cache: str | None = None
    cache_dtype: str = "bfloat16"


ROTATION, WITH_ATTENTION, TRAINING = "rotation", "rotation and attention", "training"
HOST_CALL = "host call"
FUSED_OPS = {
    "norm head": Op("norm", norm="head"),
    "norm heads": Op("norm", norm="heads"),
    "cache": Op("cache", "positions", cache="NHD"),
    "cache paged HND": Op("cache", "positions", cache="HND"),
    "cache float8": Op("cache", "positions", cache="NHD", cache_dtype="float8_e4m3fn"),
    "qkv": Op("qkv", "packed"),
    "qkv norm": Op("norm", "packed", norm="head"),
    "join": Op("join", norm="head"),  # text and image, each with v, into joint arrays
    "eager": Op("eager"),  # every product and sum rounded, by tables in the dtype of q
}
OPS = FUSED_OPS | {
    ROTATION: Op("rotation"),
    WITH_ATTENTION: Op("rotation"),
    TRAINING: Op("training"),  # forward and backward
    HOST_CALL: Op("host call"),  # the rotation, by those who have another way of calling it
}


class Task(NamedTuple):
    """An operation on a shape, as it is asked of every provider.

    variant: "in place" rotates dense q and k and overwrites them; "new" writes new arrays; "bhsd"
        rotates in place arrays that lie in memory as (b, h, s, d), "packed" the views of a packed
        (b, s, q_heads + 2 k_heads, d) buffer, "positions" by an array of positions. What follows
        goes by arrays that give positions: "offsets" by one for each batch, "sequences" by the
        cu_seqlens of packed ones, "axes" and "mixed axes" by positions on three axes, of pairs in
        sections and interleaved.
    table: the form of the table that rope_cupy reads; all others get the form that they want. Of
        "frequencies" it computes the angles.
    """

    shape: Shape
    dtype: str = "bfloat16"
    variant: str = "in place"
    table: str = "half"
    device: str = "cuda"
    name: str = ROTATION

    def __str__(self) -> str:
        if self.name in FUSED_OPS:
            return f"{self.name}, {self.shape.name}"
        attention = ", with attention" if self.name == WITH_ATTENTION else ""
        return f"{self.shape.name}, {self.dtype}, {self.variant}, {self.table} table{attention}"

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def heads(self) -> int:
        return self.shape.q_heads + self.shape.k_heads

    @property
    def heads_bytes(self) -> int:
        """Bytes of heads that are read and written once."""
        if self.op.kind == "join":
            return self.rotation_bytes // self.heads * (self.heads + self.shape.k_heads)
        if self.op.cache is None:
            return self.rotation_bytes
        return self.rotation_bytes // self.heads * self.shape.q_heads + self.store_bytes

    @property
    def rotation_bytes(self) -> int:
        """Bytes of q and k that are read and written once.

        In place, what lies outside the rotated slice is not touched; a new array needs it too, and
        so does a norm.
        """
        shape = self.shape
        width = shape.head_dim if self.variant == "new" or self.op.norm else shape.rotary_dim
        return 2 * shape.batch * shape.tokens * self.heads * width * self.itemsize

    @property
    def store_bytes(self) -> int:
        """Bytes of k and v, read from where they are and written to their caches."""
        shape = self.shape
        itemsizes = self.itemsize + getattr(torch, self.op.cache_dtype).itemsize
        return 2 * shape.batch * shape.tokens * shape.k_heads * shape.head_dim * itemsizes

    @property
    def table_bytes(self) -> int:
        """Bytes of the table's rows, of positions, slots and weights, read once.

        A row holds what rope_cupy reads, in float32. Of a full-width one with repeated halves only
        the first half is read; with neighbours repeated, the values that are not needed come along;
        of elements and matrices all are needed. Training counts none.
        """
        shape = self.shape
        if self.name == TRAINING:
            return 0
        full = shape.interleaved and self.table == "full"
        values = 2 if full or self.table in ("elementwise", "matrices") else 1
        num_rows = 1 if self.table == "frequencies" else shape.tokens
        if self.variant == "sequences":
            num_rows = min(num_rows, SEQUENCE)
        rows = num_rows * shape.rotary_dim * 4 * values + self.num_positions * 8
        slots = 8 * shape.batch * shape.tokens if self.op.cache else 0
        heads = {None: 0, "head": 2, "heads": self.heads}[self.op.norm]
        weights = heads * shape.head_dim * self.itemsize
        return rows // (2 if self.name == "eager" else 1) + slots + weights

    @property
    def num_positions(self) -> int:
        """How many integers give the positions of tokens."""
        tokens = self.shape.tokens
        if self.variant == "sequences":
            return -(-tokens // SEQUENCE) + 1
        if self.variant in BY_AXES:
            return 3 * tokens
        return {"positions": tokens, "offsets": self.shape.batch}.get(self.variant, 0)

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """The pairs that are rotated by each of three axes, as in Qwen2-VL and Qwen3-VL."""
        pairs = self.shape.rotary_dim // 2
        others = pairs * (5 if self.variant == "mixed axes" else 6) // 16
        return pairs - 2 * others, others, others


class Table:
    """One table in all the forms that providers read, each made when it is first asked for."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        inv_freq: torch.Tensor,
        first: int,
    ) -> None:
        self.cos, self.sin = cos, sin  # (positions, rotary_dim / 2), float32
        self.interleaved = interleaved
        self.inv_freq, self.first = inv_freq, first  # the first row's position
        self._forms: dict[Any, Any] = {}

    def form(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Return make(table, *arguments), made once."""
        key = make, *arguments
        if key not in self._forms:
            self._forms[key] = make(self, *arguments)
        return self._forms[key]


def rounded(table: Table, dtype: torch.dtype) -> Pair:
    """Return the cosines and sines of a table in a dtype."""
    return table.cos.to(dtype), table.sin.to(dtype)


def cache(table: Table, dtype: torch.dtype) -> torch.Tensor:
    """Return a table as cosines, then sines, in a row."""
    return torch.cat([table.cos, table.sin], dim=-1).to(dtype)


def full_width(table: Table, dtype: torch.dtype) -> Pair:
    """Return a table with every angle twice, at the places of the two elements that it rotates."""
    if table.interleaved:
        return tuple(part.repeat_interleave(2, -1) for part in rounded(table, dtype))
    return tuple(part.repeat(1, 2) for part in rounded(table, dtype))


def complex_numbers(table: Table) -> torch.Tensor:
    """Return a table as cos + i sin."""
    return torch.complex(table.cos, table.sin)


def matrices(table: Table) -> torch.Tensor:
    """Return a table as 2 x 2 rotation matrices."""
    cos, sin = table.cos, table.sin
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


class Cache(NamedTuple):
    """Where k and v go."""

    k: torch.Tensor  # (blocks, BLOCK, heads, d), however it lies
    v: torch.Tensor
    slots: torch.Tensor  # (b, s), int64
    scale: torch.Tensor | None  # of k and of v, (1,), float32

    def arranged(self, layout: str) -> Pair:
        """Return k and v as blocks in a layout."""
        return (self.k, self.v) if layout == "NHD" else _swapped(self.k, self.v)

    def flat(self) -> Pair:
        """Return k and v as (slots, heads, d)."""
        return self.k.flatten(0, 1), self.v.flatten(0, 1)


class Inputs(NamedTuple):
    """One set of what a call reads and writes; q and k seen as (b, s, h, d), however they lie."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: Table
    positions: torch.Tensor | None  # the rows of tokens, (tokens,) or (3, tokens), int64
    options: dict[str, Any]  # the keywords that give positions to rope_cupy
    memory: torch.Tensor  # the dense buffer that holds q, k and v
    weights: Pair | None = None
    cache: Cache | None = None

    @property
    def stored(self) -> Cache:
        """The cache, of an operation that writes one."""
        assert self.cache is not None
        return self.cache


def inputs_of(task: Task, num_sets: int = 0) -> list[Inputs]:
    """Return sets of inputs, on a GPU so many that q, k and tables are three times its L2.

    Of the smallest shapes fewer, for a graph takes long to capture: their inputs lie in the L2.
    """
    shape, dtype, op = task.shape, getattr(torch, task.dtype), task.op
    heads = [shape.q_heads, shape.k_heads, shape.k_heads]
    sizes = [shape.batch * shape.tokens * each * shape.head_dim for each in heads]
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    if not num_sets and task.device == "cuda":
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        rotation = task._replace(name=ROTATION)
        bytes_of_set = rotation.heads_bytes // 2 + rotation.table_bytes
        num_sets = min(max(2, math.ceil(3 * l2_bytes / bytes_of_set)), MOST_SETS)
    num_sets = num_sets or 1
    numbers = torch.empty(num_sets, starts[-1], dtype=dtype, device=task.device).normal_()
    tables, weights = _tables(task, num_sets), _weights(task) if op.norm else None
    sets = []
    for i, memory in enumerate(numbers):
        if task.variant == "packed":
            packed = memory[: sum(sizes)].view(shape.batch, shape.tokens, -1, shape.head_dim)
            q, k, v = packed.split(heads, dim=2)
        else:
            q, k, v = (
                _heads_view(memory[start : start + size], task, each)
                for start, size, each in zip(starts, sizes, heads, strict=False)
            )
        table = tables[i % len(tables)]
        positions = _positions(task, len(table.cos))
        into = _cache(task) if op.cache else None
        sets.append(Inputs(q, k, v, table, *positions, memory, weights, into))
    return sets


def _positions(task: Task, num_positions: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return the rows of tokens, and the keywords that give them to rope_cupy."""
    tokens, device = task.shape.tokens, task.device
    count = torch.arange(tokens, device=device)
    if task.variant == "positions":
        # Those of packed sequences, each from a random position on. Of fewer tokens each is a
        # sequence's next one.
        length = SEQUENCE if tokens >= SEQUENCE else 1
        size = -(-tokens // length), 1
        starts = torch.randint(num_positions - length + 1, size, device=device)
        positions = (starts + torch.arange(length, device=device)).flatten()[:tokens].clone()
        return positions, {"positions": positions}
    if task.variant == "offsets":
        offsets = torch.randint(num_positions - tokens + 1, (1,), device=device)
        offsets = offsets.repeat(task.shape.batch)
        return count + offsets[0], {"seqlen_offsets": offsets}
    if task.variant == "sequences":
        ends = torch.arange(0, tokens + SEQUENCE, SEQUENCE, device=device).clamp(max=tokens)
        return count % SEQUENCE, {"cu_seqlens": ends}
    if task.variant in BY_AXES:  # frames of 32 x 32
        positions = torch.stack([count // 1024, count // 32 % 32, count % 32])
        mixed = task.variant == "mixed axes"
        options = {"mrope_section": task.mrope_section, "mrope_interleaved": mixed}
        return positions, {"positions": positions} | options
    return None, {}


def _heads_view(numbers: torch.Tensor, task: Task, heads: int) -> torch.Tensor:
    _, batch, tokens, *_ = task.shape
    if task.variant == "bhsd":
        return numbers.view(batch, heads, tokens, -1).transpose(1, 2)
    return numbers.view(batch, tokens, heads, -1)


def _tables(task: Task, num_sets: int) -> list[Table]:
    shape = task.shape
    num_positions = shape.tokens
    if task.variant == "positions":
        num_positions = max(num_positions, NUM_POSITIONS)
    elif task.variant == "offsets":
        num_positions += SEQUENCE
    position = torch.arange(num_positions, dtype=torch.float64, device=task.device)
    pair = torch.arange(shape.rotary_dim // 2, dtype=torch.float64, device=task.device)
    inv_freq = 10000.0 ** (-2 * pair / shape.rotary_dim)
    angles = torch.outer(position + FIRST_POSITION, inv_freq)
    parts = torch.stack([angles.cos(), angles.sin()]).float()
    num_tables = max(1, min(num_sets, MOST_TABLE_BYTES // parts.nbytes))
    every = parts.repeat(num_tables, 1, 1, 1)
    return [Table(*each, shape.interleaved, inv_freq, FIRST_POSITION) for each in every]


def _weights(task: Task) -> Pair:
    """Return weights of size 1, so that what is normalised again and again does not fade."""
    shape = task.shape
    heads = (shape.q_heads, shape.k_heads) if task.op.norm == "heads" else (1, 1)
    sizes = [shape.head_dim * each for each in heads]
    signs = [2 * torch.randint(2, (size,), device=task.device) - 1 for size in sizes]
    q_weight, k_weight = (sign.to(getattr(torch, task.dtype)) for sign in signs)
    return q_weight, k_weight


def _cache(task: Task) -> Cache:
    """Return empty caches, twice as large as what is stored, and slots in blocks of any order.

    Of fewer tokens than a sequence each has a block of its own.
    """
    shape, device = task.shape, task.device
    tokens, dtype = shape.batch * shape.tokens, getattr(torch, task.op.cache_dtype)
    count = torch.arange(tokens, device=device)
    is_long = tokens >= SEQUENCE
    num_blocks = 2 * (-(-tokens // BLOCK) if is_long else tokens)
    blocks = torch.randperm(num_blocks, device=device)
    if is_long:
        slots = blocks[count // BLOCK] * BLOCK + count % BLOCK
    else:
        slots = blocks[:tokens] * BLOCK + torch.randint(BLOCK, (tokens,), device=device)
    is_paged = task.op.cache == "HND"
    axes = (shape.k_heads, BLOCK) if is_paged else (BLOCK, shape.k_heads)
    size = num_blocks, *axes, shape.head_dim
    k, v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
    if is_paged:
        k, v = _swapped(k, v)
    scale = torch.full((1,), SCALE, device=device) if dtype.itemsize == 1 else None
    return Cache(k, v, slots.view(shape.batch, shape.tokens), scale)


def _swapped(k: torch.Tensor, v: torch.Tensor) -> Pair:
    return k.transpose(1, 2), v.transpose(1, 2)


def table_of(task: Task, inputs: Inputs) -> Pair:
    """Return the cosines and sines that rope_cupy reads, which for "eager" are rounded."""
    table = inputs.table
    return table.form(rounded, inputs.q.dtype) if task.name == "eager" else (table.cos, table.sin)


def streams_of(inputs: Inputs) -> tuple[tuple[slice, Any], tuple[slice, Any]]:
    """Return the tokens of text and image, and the positions of each."""
    text = inputs.q.shape[1] // TEXT_SHARE
    return (slice(0, text), None), (slice(text, None), text)


class Exact:
    """The result of a task for one set in float64, at some of its tokens."""

    def __init__(self, task: Task, inputs: Inputs) -> None:
        shape = task.shape
        self.task, self.inputs = task, inputs
        self.before = [x.clone() for x in inputs[:3]]
        num = min(shape.tokens, max(8, CHECKED // (shape.q_heads * shape.head_dim)))
        some = np.random.default_rng().permutation(shape.tokens)[:num]
        tokens = sorted({0, shape.tokens - 1, *map(int, some)})
        self.index = torch.tensor(tokens, device=task.device)
        q, k, v = (reference.to_float64(x[:, self.index]) for x in self.before)
        if inputs.weights:
            of_token = task.op.norm == "heads"
            q, k = (
                reference.normalised(x, reference.to_float64(weight), EPS, 0, of_token=of_token)
                for x, weight in zip((q, k), inputs.weights, strict=True)
            )
        rows = self.index if inputs.positions is None else inputs.positions[..., self.index]
        options = {"positions": np.asarray(rows.cpu()), "rotary_offset": shape.rotary_offset} | {
            name: value for name, value in inputs.options.items() if name.startswith("mrope")
        }
        table = [reference.to_float64(part) for part in table_of(task, inputs)]
        q, k = (
            reference.rotate(x, *table, interleaved=shape.interleaved, **options) for x in (q, k)
        )
        self.after = [q, k, v]

    def error_of(self, call: Call) -> float:
        """Restore the set, make a call on it and return its relative error.

        Raises WrongError where that is more than a few roundings, and where what is not to be
        written has been.
        """
        inputs, into = self.inputs, self.inputs.cache
        for x, before in zip(inputs[:3], self.before, strict=True):
            x.copy_(before)
        if into is not None:
            into.k.zero_(), into.v.zero_()
        results = [call()] if into is not None else [*call(), inputs.v][:3]
        actual = [(x.dtype, _numbers(x)[:, self.index]) for x in results]
        if into is not None:
            actual += [(x.dtype, self._stored(x, into)) for x in (into.k, into.v)]
        errors = [
            self._error(dtype, reference.to_float64(values), exact)
            for (dtype, values), exact in zip(actual, self.after, strict=True)
        ]
        return max(errors)

    def _error(self, dtype: torch.dtype, actual: np.ndarray, exact: np.ndarray) -> float:
        name = str(dtype).removeprefix("torch.")
        known = {self.task.dtype} | ({self.task.op.cache_dtype} if self.task.op.cache else set())
        if actual.shape != exact.shape or name not in known:
            raise WrongError(f"{name} of shape {actual.shape}", math.nan)
        error = float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
        if not error <= CACHE_TOLERANCE[name]:
            raise WrongError(f"relative error {error:.1e}", error)
        return error

    def _stored(self, cached: torch.Tensor, into: Cache) -> torch.Tensor:
        """Return what a cache holds of the tokens, and see that no other slot was written."""
        numbers = _numbers(cached) * (1 if into.scale is None else SCALE)
        slots = into.slots[:, self.index]
        rows = numbers[slots // BLOCK, slots % BLOCK]
        numbers[into.slots // BLOCK, into.slots % BLOCK] = 0
        if numbers.any():
            raise WrongError("a slot of no token is written", math.nan)
        return rows


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """Return numbers of 8 bits as such that PyTorch's operations know."""
    return x.float() if x.itemsize == 1 else x
