"""RotaryProblem, one call in sizes, strides and flags, and the records that it is made of. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ..choices import HEAD_NORM, LAYER_NORM
from ..memory import ITEMSIZE, ArraySpec
from ..options import Norm

MAX_ROWS = 2**31 - 2**10  # The last block may reach beyond them, and it counts in 32 bits too.
MAX_HEAD_DIM = 2**22  # The lanes of such a head fit a grid of 65,535 blocks.
MAX_TENSORS = 3  # q, k and v
INPUT_OF = 0, 1, 2, 1  # which of the inputs an output is of: k may have one beside its cache
MAX_NORM_DIM = 512  # A head that is normalised lies in one block of threads.
FREQUENCY = "frequency"  # the dtype of a table that angles are made of: see kernels/angles.cuh
ANY_POSITION = 2**63 - 1  # the number of positions of such a table: all that are not negative

# A table holds one angle for both elements of a pair, or two. Without one nothing is rotated.
ONE_ANGLE, BY_ELEMENT, MATRICES, NO_TABLE = "one angle", "by element", "matrices", "no table"


class TableSpec(NamedTuple):
    """A table of cosines and sines: (p, r), (b, s, r) or (b, s, h, r), with r = rotary_dim / 2.

    In a table of frequencies, `cos` holds the frequencies, which are the same at every position,
    and `sin` one number by which the computed sines and cosines are multiplied.

    In a table by element both have 2 r elements instead of r. In a table of matrices both have the
    shape (..., r, 2): `cos` is the first row of each matrix, `sin` the second one.
    """

    cos: ArraySpec
    sin: ArraySpec
    # A pair owns this many neighbouring elements: several where cos and sin, or copies, alternate.
    step: int
    # The elements from a pair's cos to its sin where the pair owns both, else 0.
    sin_offset: int
    form: str = ONE_ANGLE  # or BY_ELEMENT, MATRICES or NO_TABLE

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at half width: (..., r)."""
        if self.form == MATRICES:
            return self.cos.shape[:-1]
        *rows, width = self.cos.shape
        return (*rows, width // 2 if self.form == BY_ELEMENT else width)


class BSHDView(NamedTuple):
    """An array seen as (batch, tokens, heads, head_dim)."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


class View(NamedTuple):
    """Where an array lies: strides over (batch, token, head, element or pair), in elements."""

    strides: tuple[int, int, int, int]
    alignment: int


class RotaryTensor(NamedTuple):
    """A tensor that is rotated or copied, and where it is written."""

    num_heads: int
    x: View
    out: View  # in a cache over (block, place in it, head, element)
    start: int = 0  # its first head in the array, which may hold several tensors


class NormProblem(NamedTuple):
    """The norm of the first two tensors."""

    norm: Norm
    dtype: str  # of weights and biases
    # Of the weights of each tensor, then of the biases of each; None where there are none.
    strides: tuple[int | None, int | None, int | None, int | None]
    alignments: tuple[int, int, int, int]


class CacheProblem(NamedTuple):
    """The caches that the second and the third tensor are written to."""

    dtype: str
    slot_dtype: str
    slot_strides: tuple[int, int]  # over batch and token
    num_tokens: int  # that have a slot: the first ones
    scale_dtype: str  # of scales in memory
    num_blocks: int
    block_size: int
    scales: tuple[float, float]
    k_out: View | None  # where k is written too, unscaled and whatever its slot is


class RotaryProblem(NamedTuple):
    """One launch: rotate `tensors`, each (batch, num_tokens, num_heads, head_dim), by a table.

    A third tensor is copied.
    """

    dtype: str
    batch: int
    num_tokens: int
    head_dim: int
    rotary_dim: int
    rotary_offset: int
    tensors: tuple[RotaryTensor, ...]
    in_place: bool
    table_dtype: str
    cos: View
    sin: View
    table_form: str  # ONE_ANGLE, BY_ELEMENT, MATRICES or NO_TABLE
    table_step: int
    sin_offset: int
    table_heads: int  # in the table, each of as many neighbouring heads of a tensor; or 1
    table_column: int  # elements from the first number in a row of a matrix to the second
    num_positions: int
    cos_row: int  # elements from one position to the next, with explicit positions
    sin_row: int
    position_kind: str
    position_dtype: str | None  # of positions or seqlen_offsets
    cu_dtype: str | None  # of cu_seqlens
    position_strides: tuple[int, int]  # over batch and token
    position_axis: int  # elements from one of three axes, or of sequences, to the next
    section_ends: tuple[int, int]  # pairs: see kernels/positions.cuh
    num_sequences: int
    cu_stride: int  # of cu_seqlens
    interleaved: bool
    conjugate: bool
    keep_out_of_range: bool  # Tokens at positions outside the table stay as they are, else NaN.
    eager: bool
    norm: NormProblem | None
    cache: CacheProblem | None
    # Whether the one tensor is two, alike in all but where they lie: it has the heads of both.
    of_two: bool = False

    @property
    def is_double(self) -> bool:
        """Whether a GPU computes in float64, and not in float32."""
        return "float64" in (self.dtype, self.table_dtype)

    @property
    def norm_kind(self) -> str | None:
        """Whether a head or a token is normalised, or a head as a layer; None without a norm.

        The first two are the same where every tensor has one head.
        """
        if self.norm is None or self.norm.norm.kind == LAYER_NORM:
            return self.norm and LAYER_NORM
        has_one_head = all(tensor.num_heads == 1 for tensor in self.tensors[:2])
        return HEAD_NORM if has_one_head else self.norm.norm.kind

    @property
    def has_columns(self) -> bool:
        """Whether the numbers of a table's matrices lie apart, each in its own place."""
        return self.table_form == MATRICES and self.table_step == 1

    @property
    def pair_bytes(self) -> int:
        """How many bytes of a table a pair owns: of one angle, those beside its cosine."""
        if self.table_form == NO_TABLE:
            return 0
        numbers = self.table_step if self.table_form == ONE_ANGLE else 4
        return numbers * ITEMSIZE[self.table_dtype]

    @property
    def k_out(self) -> View | None:
        """Where k is written beside its cache."""
        return self.cache and self.cache.k_out

    @property
    def num_rows(self) -> int:
        """The number of heads of all tokens of all tensors."""
        return sum(map(self.num_rows_of, self.tensors))

    def table_steps(self, part: View) -> tuple[int, int]:
        """Return the elements from a pair to the next, and from its first angle to its second."""
        step = part.strides[3]
        if self.table_form == MATRICES:
            return step, self.table_column
        if self.table_form == BY_ELEMENT:
            return (2 * step, step) if self.interleaved else (step, self.rotary_dim // 2 * step)
        return step, 0

    def out_dtype(self, i: int) -> str:
        """Return the dtype of an output."""
        return self.cache.dtype if self.cache and 0 < i < MAX_TENSORS else self.dtype

    def heads_of_one(self, i: int) -> int:
        """Return the heads of a tensor, or of each where it is two."""
        return self.tensors[i].num_heads // (2 if self.of_two else 1)

    def num_rows_of(self, tensor: RotaryTensor) -> int:
        """Return the number of heads of all tokens of a tensor."""
        return self.batch * self.num_tokens * tensor.num_heads


class Pointers(NamedTuple):
    """The addresses of a problem's arrays, 0 for those that it does not have, and the offset that
    is added to the index of every token where positions are not explicit.
    """

    x: tuple[int, ...]
    out: tuple[int, ...]
    cos: int
    sin: int
    positions: int = 0  # or of seqlen_offsets
    cu_seqlens: int = 0
    q_weight: int = 0
    k_weight: int = 0
    q_bias: int = 0
    k_bias: int = 0
    slots: int = 0
    k_scale: int = 0
    v_scale: int = 0
    position_offset: int = 0

    def by_name(self) -> dict[str, int]:
        """Return the addresses of x0, out0 and so on, and the other fields, by their names."""
        _, _, *others = self
        named = dict(zip(self._fields[2:], others, strict=True))
        for i in range(MAX_TENSORS):
            named[f"x{i}"], named[f"out{i}"] = self.of_tensor(i)
        named["k_out"] = self.k_out
        return named

    @property
    def k_out(self) -> int:
        """The address where k is written beside its cache."""
        return self.out[MAX_TENSORS] if len(self.out) > MAX_TENSORS else 0

    def of_tensor(self, i: int) -> tuple[int, int]:
        """Return the addresses of the arrays that a problem's tensor and its output lie in."""
        return self.x[min(i, len(self.x) - 1)], self.out[min(i, len(self.out) - 1)]


# The fields of Pointers by the names of the arguments that they are the addresses of.
POINTER_OF = {
    "positions": "positions",
    "seqlen_offsets": "positions",
    "cu_seqlens": "cu_seqlens",
    "weight": "q_weight",
    "q_weight": "q_weight",
    "k_weight": "k_weight",
    "bias": "q_bias",
    "q_bias": "q_bias",
    "k_bias": "k_bias",
    "slot_mapping": "slots",
    "k_scale": "k_scale",
    "v_scale": "v_scale",
}
OF_POSITIONS = "positions", "seqlen_offsets", "cu_seqlens"
OF_BIASES = "bias", "q_bias", "k_bias"
OF_WEIGHTS = "weight", "q_weight", "k_weight", *OF_BIASES  # all that a norm has
# The position of a token is its index, or is read, or is its index plus an offset of its batch or
# its sequence, or is one of three that are read.
IMPLICIT, GIVEN, OFFSET, PACKED = "implicit", "given", "offset", "packed"
TOKEN_INDEX = "token index"  # as IMPLICIT, but with frequencies, where no row belongs to a token
OF_AXES = SECTIONED_MROPE, INTERLEAVED_MROPE = "sectioned mrope", "interleaved mrope"
