"""RotaryTable: cosines and sines in any form that models keep them in, read where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays
from .checks import MOST_FLOAT32, as_float, count, described, is_array
from .choices import TABLE_AXES, TableAxes
from .memory import FLOATS
from .problem import TableSpec, check_dtype
from .table_forms import (
    TableSource,
    TableView,
    complex_numbers,
    cos_sin_cache,
    elementwise,
    frequencies,
    full_width,
    half_width,
    matrices,
    no_table,
)

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

TURNS_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A566  # in units of 2^-160
MAX_RECENT = 8  # attributes of arrays of a form that were seen to fit together
MOST_RADIANS = 2**64  # of a frequency whose turns those digits are enough for

WITHOUT_TABLE = TableSource(no_table, ())
_recent: dict[Callable[..., TableView], tuple[Callable[..., bool], ...]] = {}


class RotaryTable:
    """The cosine and sine of every pair's angle at every position, viewed without a copy.

    ``cos`` and ``sin`` have one of the shapes

    - ``(p, rotary_dim / 2)``: a row for each position,
    - ``(b, s, rotary_dim / 2)``: a row for each batch and token (b may be 1),
    - ``(b, s, h, rotary_dim / 2)``: a row for each batch, token and head (b and h may be 1),

    and the dtype float16, bfloat16, float32 or float64, which need not be that of the arrays to
    rotate. They may be strided, of any library, on the CPU or a GPU. Later changes to their values
    are seen. Other forms: `from_full_width`, `from_elementwise`, `from_cache`, `from_complex`,
    `from_matrices`, `from_inverse_frequencies`, `from_config`, `from_angles`. No constructor reads
    a value, so none can see that a table has another form than its own: `check` can.

    `axes` names the axes before the last where there are others than their number says: "p" for
    positions, "b" for batches, "s" for tokens and "h" for heads, as "p", "s", "bs", "sh" or "bsh".
    So ``axes="sh"`` takes (s, h, rotary_dim / 2), which is a row for each batch and token without.

    Raises TypeError or ValueError when the arrays do not fit together.

    >>> import numpy as np
    >>> angles = np.outer(np.arange(4), [1.0, 0.1])
    >>> RotaryTable(np.cos(angles), np.sin(angles))
    RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
    """

    def __init__(self, cos: Any, sin: Any, *, axes: TableAxes | None = None) -> None:
        self._set(half_width, axes, cos, sin)

    @classmethod
    def from_full_width(cls, cos: Any, sin: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View tables of shape (..., rotary_dim), which hold every angle once for each element.

        Each element of the head finds its angle at its own place: with ``interleaved=False`` the
        halves repeat (Hugging Face transformers), with ``interleaved=True`` every angle repeats at
        once (diffusers' Flux, CogVideoX and HunyuanVideo). Of each pair the first element's number
        is read alone: columns 0 to rotary_dim / 2 - 1, or with ``interleaved=True`` every second
        column from 0 on. The second copy is never read. Where it is no copy, because the elements
        of a pair have angles of their own, `from_elementwise` reads both. `axes` and errors are as
        for `RotaryTable`.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> RotaryTable.from_full_width(np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(full_width, axes, cos, sin)

    @classmethod
    def from_elementwise(cls, cos: Any, sin: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View tables of shape (..., rotary_dim), in which each element has an angle of its own.

        A pair (a, b), of halves or of neighbours as `interleaved` says, becomes (a cos_a - b sin_a,
        b cos_b + a sin_b), where cos_a lies where a does, and so on (ERNIE-Image, V-JEPA 2, the
        reference functions of apex and FlashInfer, and whatever computes ``x * cos + rotate_half(x)
        * sin``). Both numbers of a pair are read. Such a pair is not rotated in general:
        ``conjugate=True`` is the transpose, which is the gradient, and not the inverse. Where both
        angles of every pair are one, `from_full_width` gives the same by half of the reads. `axes`
        and errors are as for `RotaryTable`.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1, 0.01, 0.001])
        >>> RotaryTable.from_elementwise(np.cos(angles), np.sin(angles))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(elementwise, axes, cos, sin)

    @classmethod
    def from_cache(cls, cos_sin: Any) -> RotaryTable:
        """View a (p, rotary_dim) cache of cosines, then sines, in a row (vLLM, SGLang, FlashInfer).

        Errors as for `RotaryTable`.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> RotaryTable.from_cache(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(cos_sin_cache, None, cos_sin)

    @classmethod
    def from_complex(cls, freqs_cis: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View cos + i sin, complex64 or complex128 (Llama's own code, Qwen-Image, Lumina).

        The shapes are those of `RotaryTable`, and so are `axes` and the errors. A complex number
        rotates two neighbours, unless a call says ``interleaved=False``.

        >>> import numpy as np
        >>> RotaryTable.from_complex(np.exp(1j * np.outer(np.arange(4), [1.0, 0.1])))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(complex_numbers, axes, freqs_cis)

    @classmethod
    def from_matrices(cls, freqs: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View matrices [[cos, -sin], [sin, cos]], (..., rotary_dim / 2, 2, 2) (Flux, ComfyUI).

        Any others are as good: all four numbers are read, and ``conjugate=True``, the gradient, is
        the transpose. A matrix rotates two neighbours, unless a call says ``interleaved=False``.
        What stands for the dots is as for `RotaryTable`, and so are `axes` and the errors.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> cos, sin = np.cos(angles), np.sin(angles)
        >>> RotaryTable.from_matrices(np.stack([cos, -sin, sin, cos], axis=-1).reshape(4, 2, 2, 2))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(matrices, axes, freqs)

    @classmethod
    def from_inverse_frequencies(
        cls,
        inv_freq: Any,
        num_positions: int | None = None,
        *,
        like: Any,
        attention_scaling: float = 1.0,
        precompute: bool = True,
    ) -> RotaryTable:
        """Compute the table of positions 0 .. num_positions - 1 from radians per position.

        Angles, cosines and sines are computed in float64, multiplied by `attention_scaling` and
        stored as float32, in the library and on the device of the array `like`. `inv_freq` is any
        array of shape (rotary_dim / 2,), or a sequence of numbers.

        With ``precompute=False`` there is no table, and no `num_positions`: every call computes the
        cosines and sines of its tokens, at any position from 0 to 2 ** 63 - 2; only negative ones
        are out of range. What is kept is each frequency in units of 2 ** -64 turns, so that the
        angle of a position is reduced to one turn without an error. On a GPU cosines and sines are
        off by 1e-7 at most, up to the position 1,000,000 and on; where q is float64, and on the
        CPU, by 1e-12 there.

        Raises TypeError or ValueError when `inv_freq` is not finite numbers of one axis, or gives
        angles that are not, `num_positions` not an int of 0 or more (or given with
        ``precompute=False``), or `attention_scaling` not a number that is finite in float32.

        >>> import numpy as np
        >>> from rope_cupy.frequencies import inverse_frequencies
        >>> x = np.zeros((4, 1, 8), np.float32)
        >>> RotaryTable.from_inverse_frequencies(inverse_frequencies(8), 4, like=x)
        RotaryTable(shape=(4, 4), rotary_dim=8, dtype='float32', device='cpu')
        >>> RotaryTable.from_inverse_frequencies([1.0, 0.1], like=x, precompute=False)
        RotaryTable(shape=(9223372036854775807, 2), rotary_dim=4, dtype='frequency', device='cpu')
        """
        if not isinstance(precompute, bool):
            raise TypeError(f"precompute must be True or False, got {described(precompute)}")
        if precompute:
            num_positions = count("num_positions", num_positions)
        elif num_positions is not None:
            raise ValueError(
                f"num_positions must be None with precompute=False, got {described(num_positions)}"
            )
        if isinstance(attention_scaling, bool) or not isinstance(attention_scaling, Real):
            raise TypeError(
                f"attention_scaling must be a number, got {described(attention_scaling)}"
            )
        scale, radians = as_float(attention_scaling), _radians(inv_freq)
        if not abs(scale) <= MOST_FLOAT32:
            raise ValueError(
                f"attention_scaling must be finite in float32, got {attention_scaling}"
            )
        if not precompute:
            words = _frequency_words(radians, scale)
            return cls._of(frequencies, None, arrays.placed(words, like))
        positions = np.arange(num_positions, dtype=np.float64)[:, None]
        if not math.isfinite(float(np.abs(radians).max()) * max(positions.size - 1, 0)):
            raise ValueError(
                "inv_freq must give angles that are finite in float64 at every position, got "
                f"{np.abs(radians).max()} radians for {positions.size} positions"
            )
        return cls._computed(like, scale, positions, radians)

    @classmethod
    def from_config(
        cls,
        config: Any,
        num_positions: int | None = None,
        *,
        like: Any,
        seq_len: int | None = None,
        layer_type: str | None = None,
        precompute: bool = True,
    ) -> RotaryTable:
        """Compute the table that a Hugging Face config, or its dict, describes.

        `rope_cupy.frequencies.from_config` says what is read, and what `seq_len` and `layer_type`
        mean, and which configs are refused; the attention scaling of the config's type is in the
        table. The rest, and errors, are those of `from_inverse_frequencies`. The table of a vision
        encoder is `from_angles` of `rope_cupy.frequencies.axial_from_config`.

        >>> import numpy as np
        >>> scaling = {"rope_type": "linear", "factor": 2.0}
        >>> config = {"head_dim": 8, "rope_theta": 1e6, "rope_scaling": scaling}
        >>> RotaryTable.from_config(config, 16, like=np.zeros(1))
        RotaryTable(shape=(16, 4), rotary_dim=8, dtype='float32', device='cpu')
        """
        from .frequencies import from_config  # which most programs need not import

        inv_freq, scaling = from_config(config, seq_len=seq_len, layer_type=layer_type)
        return cls.from_inverse_frequencies(
            inv_freq,
            num_positions,
            like=like,
            attention_scaling=scaling,
            precompute=precompute,
        )

    @classmethod
    def from_angles(cls, angles: Any, *, like: Any) -> RotaryTable:
        """Compute the table of the angles, in radians, that every pair turns by at every row.

        `angles` is an array of float64 or float32, of any library and of a shape as for
        `RotaryTable`: of grids of images and video, say, by `rope_cupy.frequencies.axial`. Of
        float32, large angles have lost digits before they come here. Cosines and sines are computed
        in float64 and stored as float32, in the library and on the device of the array `like`. The
        host reads the angles, and so waits for a GPU that they lie on.

        Raises TypeError or ValueError when `angles` is no such array of finite numbers.

        >>> import numpy as np
        >>> x = np.zeros((4, 1, 8), np.float32)
        >>> RotaryTable.from_angles(np.outer(np.arange(4), [1.0, 0.1]), like=x)
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float32', device='cpu')
        """
        dtype = str(getattr(angles, "dtype", "")).removeprefix("torch.")
        if not is_array(angles) or dtype not in ("float64", "float32"):
            raise TypeError(
                f"angles must be an array of float64 or float32, got {described(angles)}"
            )
        numbers = arrays.library_of("angles", angles).download(angles).astype(np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError("angles must be finite, got an infinity or NaN")
        return cls._computed(like, 1.0, numbers)

    @classmethod
    def _computed(cls, like: Any, scale: float, *factors: NDArray[np.float64]) -> RotaryTable:
        """Compute the table of a product of angles where `like` lies, cos and sin times `scale`."""

        def cos_and_sin(module: Any, *factors: Any) -> tuple[Any, Any]:
            angles, single = math.prod(factors[1:], start=factors[0]), module.float32
            cos = module.asarray(scale * module.cos(angles), dtype=single)
            return cos, module.asarray(scale * module.sin(angles), dtype=single)

        return cls._of(half_width, None, *arrays.computed(cos_and_sin, factors, like))

    @classmethod
    def _of(cls, form: Callable[..., TableView], axes: object, *sources: Any) -> RotaryTable:
        table = cls.__new__(cls)
        table._set(form, axes, *sources)
        return table

    def _set(self, form: Callable[..., TableView], axes: object, *parts: Any) -> None:
        """Keep the arrays of a table, once they are known to fit together."""
        if axes is not None:
            parts = tuple([_with_axes(part, axes, form is matrices) for part in parts])
        if arrays.is_compiling(parts[0]):  # what is compiled checks it when it runs
            self._source = TableSource(form, parts)
            return
        parts = tuple([arrays.asked_of(part).lasting(part) for part in parts])
        self._source = TableSource(form, parts)
        library = arrays.library_of_all(parts)
        at = library.addresses(parts) if library else None
        recent = _recent.get(form, ())
        if at and any([matches(*parts) for matches in recent]) and 0 not in at:
            return
        if not self.shape[-1]:
            raise ValueError("table must have a rotary_dim of 2 or more, got 0")
        matches = library.matcher(parts) if library and at else None
        if matches:
            _recent[form] = (matches, *recent[: MAX_RECENT - 1])

    def check(self) -> str:
        """Read all values and return a sentence that says what they are.

        It names the constructor that they are for where that is another one: "every angle twice, in
        halves: use RotaryTable.from_full_width", or "not a rotation". On a GPU it copies the arrays
        to the CPU and waits for that, so it is for a program that is being written.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> RotaryTable(np.cos(angles), np.sin(angles)).check()
        'one angle a pair, of every position'
        >>> RotaryTable(np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)).check()
        'every angle twice, in halves: use RotaryTable.from_full_width'
        """
        from .table_check import verdict  # which programs that run need not import

        form, parts = self._source
        values = [arrays.library_of("table", part).download(part) for part in parts]
        return verdict(form.__name__, values, self.axes)

    @property
    def _spec(self) -> TableSpec:
        return self._source.view(None).specs[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy looks at the copies of the arrays, not at the addresses of these.
        return type(self)._of, (self._source.form, None, *self._source.arrays)

    @property
    def axes(self) -> str:
        """The names of all axes but the last: "p" of positions, "bs" or "bsh"."""
        return {2: "p", 3: "bs", 4: "bsh"}[len(self.shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of cos and of sin at half width: (..., rotary_dim / 2)."""
        return self._spec.shape

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return 2 * self.shape[-1]

    @property
    def num_positions(self) -> int:
        """The size of the axis of positions, or of tokens where the table is by batch and token.

        It is 2 ** 63 - 1 with ``precompute=False``.
        """
        return self.shape[0] if len(self.shape) == 2 else self.shape[1]

    @property
    def dtype(self) -> str:
        """The dtype of cos and sin, such as "float32"; "frequency" with ``precompute=False``."""
        return self._spec.cos.dtype

    @property
    def device(self) -> str:
        """The device of cos and sin, "cpu" or such as "cuda:0"."""
        return self._spec.cos.device

    def __repr__(self) -> str:
        axes = "" if self.axes == "p" else f"axes={self.axes!r}, "
        return (
            f"RotaryTable(shape={self.shape}, {axes}rotary_dim={self.rotary_dim}, "
            f"dtype={self.dtype!r}, device={self.device!r})"
        )


def source_of(table: Any) -> TableSource:
    """Return the source of a RotaryTable, or of the one that a (cos, sin) tuple stands for.

    None is no table: a call that normalises may have none.
    """
    if isinstance(table, RotaryTable):
        return table._source
    if isinstance(table, tuple) and len(table) == 2:
        return TableSource(half_width, table)
    if table is None:
        return WITHOUT_TABLE
    raise TypeError(f"table must be a RotaryTable or a tuple (cos, sin), got {described(table)}")


def _frequency_words(radians: NDArray[np.float64], scale: float) -> NDArray[np.int32]:
    """Return 64 bits for each frequency, and those of the scale: (pairs + 1, 2) words of 32 bits.

    A frequency is in turns, in units of 2^-64 and without whole ones: see kernels/angles.cuh. The
    words have a dtype that every library knows.
    """
    turns = []
    for each in radians.tolist():
        if not abs(each) < MOST_RADIANS:
            raise ValueError(f"inv_freq must be below {MOST_RADIANS} radians, got {each}")
        numerator, denominator = each.as_integer_ratio()
        twice = 2 * numerator * TURNS_PER_RADIAN // (denominator << 96)
        turns.append((twice + 1 >> 1) % 2**64)
    words = np.array([*turns, 0], np.uint64)
    words[-1:].view(np.float64)[:] = scale
    return words.view(np.int32).reshape(-1, 2)


def _radians(inv_freq: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if arrays.is_kind_of_array(type(inv_freq)):  # type: ignore[arg-type]
        array = arrays.describe("inv_freq", inv_freq)
        check_dtype("inv_freq", array.spec, FLOATS)
        arrays.check_gradient("inv_freq", inv_freq)
        values = np.asarray(array.library.download(inv_freq), np.float64)
    elif _is_sequence_of_numbers(inv_freq):
        values = np.array([as_float(value) for value in inv_freq])
    else:
        raise TypeError(f"inv_freq must be an array or a sequence of numbers, got {inv_freq!r}")
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"inv_freq must have one axis, of rotary_dim / 2 numbers, got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        odd = values[~np.isfinite(values)][0]
        raise ValueError(f"inv_freq must be finite in float64, got {odd}")
    return values


def _is_sequence_of_numbers(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(item, Real) and not isinstance(item, bool) for item in value)
    )


def _with_axes(array: Any, axes: object, of_matrices: bool) -> Any:
    """Return an array with the axes that these names say: with one batch where they name none."""
    if not isinstance(axes, str):
        raise TypeError(
            f"axes must be None or one of {', '.join(TABLE_AXES)}, got {described(axes)}"
        )
    if axes not in TABLE_AXES:
        raise ValueError(f"axes must be None or one of {', '.join(TABLE_AXES)}, got {axes!r}")
    own = 3 if of_matrices else 1
    if not is_array(array):
        raise TypeError(
            f"axes must be None with what is no array of its own, got {axes!r} with "
            f"{type(array).__name__}"
        )
    if array.ndim != len(axes) + own:
        raise ValueError(
            f"axes must name {array.ndim - own} axes of an array of {array.ndim}, got {axes!r}"
        )
    return array if axes == "p" or "b" in axes else array[None]
