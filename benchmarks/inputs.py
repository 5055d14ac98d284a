"""Fresh random inputs of a case, in sets that do not fit the cache, and the exact result of one."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import WrongError
from providers import BY_AXES, SEQUENCE, Call, Case, Inputs, Table

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference

FIRST_POSITION = 1000  # of the tables: at position 0 nothing turns
NUM_POSITIONS = 8192  # of a table that is read by an array of positions, at least
ALIGNMENT = 256  # elements from which q, k and v start
MOST_SETS = 400  # what so many small calls share lies in the L2, as between the layers of a model
MOST_TABLE_BYTES = 2**30  # of all sets; beyond that sets share tables
CHECKED = 1_000_000  # elements of q that are compared with the reference

# The greatest relative error (norm of the difference over norm) of a right result: a few roundings
# to the dtype, where the peers round their tables and products as well.
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-6, "float64": 1e-14}


def inputs_of(case: Case) -> list[Inputs]:
    """Return sets of inputs, on a GPU so many that all of them are three times its L2.

    Of the smallest shapes fewer, for a graph takes long to capture: their inputs lie in the L2.
    """
    shape, dtype = case.shape, getattr(torch, case.dtype)
    sizes = [shape.batch * shape.tokens * heads * shape.head_dim for heads in _heads(case)]
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    num_sets = 1
    if case.device == "cuda":
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        bytes_of_set = case.heads_bytes // 2 + case.table_bytes
        num_sets = min(max(2, math.ceil(3 * l2_bytes / bytes_of_set)), MOST_SETS)
    numbers = torch.empty(num_sets, starts[-1], dtype=dtype, device=case.device).normal_()
    tables = _tables(case, num_sets)
    sets = []
    for i, memory in enumerate(numbers):
        if case.variant == "packed":
            packed = memory[: sum(sizes)].view(shape.batch, shape.tokens, -1, shape.head_dim)
            q, k, v = packed.split(_heads(case), dim=2)
        else:
            q, k, v = (
                _heads_view(memory[start : start + size], case, heads)
                for start, size, heads in zip(starts, sizes, _heads(case), strict=False)
            )
        table = tables[i % len(tables)]
        sets.append(Inputs(q, k, v, table, *_positions(case, len(table.cos)), memory))
    return sets


def _positions(case: Case, num_positions: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return the rows of tokens, and the keywords that tell rope_cupy of them."""
    tokens, device = case.shape.tokens, case.device
    count = torch.arange(tokens, device=device)
    if case.variant == "positions":
        positions = _of_sequences(tokens, num_positions, device)
        return positions, {"positions": positions}
    if case.variant == "offsets":
        offsets = torch.randint(num_positions - tokens + 1, (1,), device=device)
        offsets = offsets.repeat(case.shape.batch)
        return count + offsets[0], {"seqlen_offsets": offsets}
    if case.variant == "sequences":
        ends = torch.arange(0, tokens + SEQUENCE, SEQUENCE, device=device).clamp(max=tokens)
        return count % SEQUENCE, {"cu_seqlens": ends}
    if case.variant in BY_AXES:  # frames of 32 x 32
        positions = torch.stack([count // 1024, count // 32 % 32, count % 32])
        mixed = case.variant == "mixed axes"
        how = {"mrope_section": case.mrope_section, "mrope_interleaved": mixed}
        return positions, {"positions": positions} | how
    return None, {}


def _of_sequences(tokens: int, num_positions: int, device: str) -> torch.Tensor:
    """Return those of packed sequences of SEQUENCE tokens, each from a random position on.

    Of fewer tokens each is a sequence's next one, at a random position.
    """
    length = SEQUENCE if tokens >= SEQUENCE else 1
    starts = torch.randint(num_positions - length + 1, (-(-tokens // length), 1), device=device)
    return (starts + torch.arange(length, device=device)).flatten()[:tokens].clone()


def _heads(case: Case) -> list[int]:
    return [case.shape.q_heads, case.shape.k_heads, case.shape.k_heads]


def _heads_view(numbers: torch.Tensor, case: Case, heads: int) -> torch.Tensor:
    _, batch, tokens, *_ = case.shape
    if case.variant == "bhsd":
        return numbers.view(batch, heads, tokens, -1).transpose(1, 2)
    return numbers.view(batch, tokens, heads, -1)


def _tables(case: Case, num_sets: int) -> list[Table]:
    shape = case.shape
    num_positions = shape.tokens
    if case.variant == "positions":
        num_positions = max(num_positions, NUM_POSITIONS)
    elif case.variant == "offsets":
        num_positions += SEQUENCE
    position = torch.arange(num_positions, dtype=torch.float64, device=case.device)
    pair = torch.arange(shape.rotary_dim // 2, dtype=torch.float64, device=case.device)
    inv_freq = 10000.0 ** (-2 * pair / shape.rotary_dim)
    angles = torch.outer(position + FIRST_POSITION, inv_freq)
    parts = torch.stack([angles.cos(), angles.sin()]).float()
    num_tables = max(1, min(num_sets, MOST_TABLE_BYTES // parts.nbytes))
    every = parts.repeat(num_tables, 1, 1, 1)
    return [Table(*each, shape.interleaved, inv_freq, FIRST_POSITION) for each in every]


class Exact:
    """The rotation of one set in float64, at some of its tokens."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        shape = case.shape
        self.case, self.inputs = case, inputs
        self.before = inputs.q.clone(), inputs.k.clone()
        num = min(shape.tokens, max(8, CHECKED // (shape.q_heads * shape.head_dim)))
        some = np.random.default_rng().permutation(shape.tokens)[:num]
        self.tokens = torch.tensor(sorted({0, shape.tokens - 1, *map(int, some)}))
        index = self.tokens.to(case.device)
        rows = index if inputs.positions is None else inputs.positions[..., index]
        how = {"positions": np.asarray(rows.cpu())} | {
            name: value for name, value in inputs.how.items() if name.startswith("mrope")
        }
        cos, sin = map(reference.to_float64, (inputs.table.cos, inputs.table.sin))
        self.after = [
            reference.rotate(
                reference.to_float64(x[:, index]),
                cos,
                sin,
                interleaved=shape.interleaved,
                rotary_offset=shape.rotary_offset,
                **how,
            )
            for x in self.before
        ]

    def error_of(self, call: Call) -> float:
        """Restore the set, make a call on it and return its relative error.

        Raises WrongError where that is more than a few roundings.
        """
        for x, before in zip((self.inputs.q, self.inputs.k), self.before, strict=True):
            x.copy_(before)
        results = call()
        index = self.tokens.to(self.case.device)
        errors = [0.0]
        for result, exact in zip(results, self.after, strict=True):
            actual = reference.to_float64(result[:, index])
            if actual.shape != exact.shape or result.dtype != self.inputs.q.dtype:
                raise WrongError(f"{result.dtype} of shape {tuple(result.shape)}", math.nan)
            errors.append(float(np.linalg.norm(actual - exact) / np.linalg.norm(exact)))
        error = max(errors, key=lambda error: (math.isnan(error), error))
        if not error <= TOLERANCE[self.case.dtype]:
            raise WrongError(f"relative error {error:.1e}", error)
        return error
