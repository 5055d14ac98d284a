"""RotaryTable: cosines and sines in the forms that models keep them in, read without a copy."""

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
MAX_RECENT = 8  # how many signatures of checked arrays are kept for each form
MOST_RADIANS = 2**64  # the largest frequency for which TURNS_PER_RADIAN has enough digits

WITHOUT_TABLE = TableSource(no_table, ())
_recent: dict[Callable[..., TableView], tuple[Callable[..., bool], ...]] = {}


class RotaryTable:
    """A view of the cosines and sines of every pair's angle at every position, without a copy.

    ``cos`` and ``sin`` have one of the shapes

    - ``(p, rotary_dim / 2)``: a row for each position,
    - ``(b, s, rotary_dim / 2)``: a row for each batch and token (b may be 1),
    - ``(b, s, h, rotary_dim / 2)``: a row for each batch, token and head (b and h may be 1),

    and the dtype float16, bfloat16, float32 or float64, which may differ from that of the arrays to
    rotate. They may be strided arrays of any library, on the CPU or a GPU. A later call sees values
    that have changed. Other constructors take other forms: `from_full_width`, `from_elementwise`,
    `from_cache`, `from_complex`, `from_matrices`, `from_inverse_frequencies`, `from_config` and
    `from_angles`. No constructor reads a value, so a table of the wrong form is not seen: `check`
    sees it.

    `axes` names the axes before the last, "p" for positions, "b" for batches, "s" for tokens and
    "h" for heads: "p", "s", "bs", "sh" or "bsh". Without it the number of axes decides, as listed
    above. So ``axes="sh"`` takes (s, h, rotary_dim / 2), which would otherwise mean (b, s, ...).

    Raises TypeError or ValueError if the arrays do not fit together.

    >>> import numpy as np
    >>> angles = np.outer(np.arange(4), [1.0, 0.1])
    >>> RotaryTable(np.cos(angles), np.sin(angles))
    RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
    """

    def __init__(self, cos: Any, sin: Any, *, axes: TableAxes | None = None) -> None:
        self._set(half_width, axes, cos, sin)

    @classmethod
    def from_full_width(cls, cos: Any, sin: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View tables of shape (..., rotary_dim), which hold the angle of each pair twice.

        The angle of an element is in the column of that element. So with ``interleaved=False`` the
        second half repeats the first (Hugging Face transformers), and with ``interleaved=True``
        every column is repeated at once (diffusers' Flux, CogVideoX and HunyuanVideo). Only the
        column of a pair's first element is read: columns 0 to rotary_dim / 2 - 1, or with
        ``interleaved=True`` columns 0, 2, 4 and so on. Where the two elements of a pair have
        different angles, use `from_elementwise`, which reads both. `axes` and errors are as for
        `RotaryTable`.

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
        b cos_b + a sin_b), where cos_a is in the column of a, and so on. ERNIE-Image, V-JEPA 2 and
        the reference functions of apex and FlashInfer compute this, and every model that computes
        ``x * cos + rotate_half(x) * sin``. In general this is no rotation: ``conjugate=True`` is
        the transpose, which is the gradient but not the inverse. Where both angles of every pair
        are equal, `from_full_width` gives the same result and reads half as much. `axes` and errors
        are as for `RotaryTable`.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1, 0.01, 0.001])
        >>> RotaryTable.from_elementwise(np.cos(angles), np.sin(angles))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(elementwise, axes, cos, sin)

    @classmethod
    def from_cache(cls, cos_sin: Any) -> RotaryTable:
        """View a cache (p, rotary_dim), each row of which holds cosines, then sines.

        vLLM, SGLang and FlashInfer have such caches. Errors are as for `RotaryTable`.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> RotaryTable.from_cache(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(cos_sin_cache, None, cos_sin)

    @classmethod
    def from_complex(cls, freqs_cis: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View cos + i sin, complex64 or complex128 (Llama's own code, Qwen-Image, Lumina).

        Shapes, `axes` and errors are as for `RotaryTable`. Pairs are neighbours, unless a call says
        ``interleaved=False``.

        >>> import numpy as np
        >>> RotaryTable.from_complex(np.exp(1j * np.outer(np.arange(4), [1.0, 0.1])))
        RotaryTable(shape=(4, 2), rotary_dim=4, dtype='float64', device='cpu')
        """
        return cls._of(complex_numbers, axes, freqs_cis)

    @classmethod
    def from_matrices(cls, freqs: Any, *, axes: TableAxes | None = None) -> RotaryTable:
        """View matrices [[cos, -sin], [sin, cos]], (..., rotary_dim / 2, 2, 2) (Flux, ComfyUI).

        Any 2 by 2 matrices are taken: all four numbers are read, and ``conjugate=True`` takes the
        transpose, which is the gradient. Pairs are neighbours, unless a call says
        ``interleaved=False``. The first axes, `axes` and errors are as for `RotaryTable`.

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

        `inv_freq` is any array of shape (rotary_dim / 2,), or a sequence of numbers. Cosines and
        sines are computed in float64, multiplied by `attention_scaling` and stored as float32, in
        the library and on the device of the array `like`.

        With ``precompute=False`` no table is stored, and `num_positions` must be left out. Every
        call computes the cosines and sines of its tokens, at any position from 0 to 2 ** 63 - 2.
        Only negative positions are out of range. Frequencies are stored in units of 2 ** -64 turns,
        so that the angle of a position is reduced to one turn exactly. Up to the position 1,000,000
        and beyond, cosines and sines have an error of at most 1e-7 on a GPU, and of 1e-12 on the
        CPU or where q is float64.

        Raises TypeError or ValueError if `inv_freq` is not one axis of finite numbers or gives an
        angle that is not finite, `num_positions` is not an int of 0 or more (or is given with
        ``precompute=False``), or `attention_scaling` is not a number that is finite in float32.

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
            if num_positions is None:
                raise TypeError("num_positions must be an int, or precompute False, got None")
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

        `rope_cupy.frequencies.from_config` says what is read, what `seq_len` and `layer_type` mean
        and which configs are refused. The attention scaling of the config is part of the table. All
        else, and errors, are as for `from_inverse_frequencies`. For a vision encoder, pass the
        angles of `rope_cupy.frequencies.axial_from_config` to `from_angles`.

        >>> import numpy as np
        >>> scaling = {"rope_type": "linear", "factor": 2.0}
        >>> config = {"head_dim": 8, "rope_theta": 1e6, "rope_scaling": scaling}
        >>> RotaryTable.from_config(config, 16, like=np.zeros(1))
        RotaryTable(shape=(16, 4), rotary_dim=8, dtype='float32', device='cpu')
        """
        from .frequencies import from_config  # few programs need it

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
        """Compute the table of an array of angles, in radians, one for each row and pair.

        `angles` is a float64 or float32 array of any library, with a shape as for `RotaryTable`,
        such as the angles of a grid that `rope_cupy.frequencies.axial` returns. Large angles in
        float32 have lost digits already. Cosines and sines are computed in float64 and stored as
        float32, in the library and on the device of the array `like`. Angles of PyTorch or CuPy on
        the GPU of `like` stay there, and the host does not wait: those that are not finite give
        NaN. All others are read by the host.

        Raises TypeError or ValueError if `angles` is not such an array, or if the host reads it and
        it is not finite.

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
        on_gpu = arrays.in_float64_beside(angles, like)
        if on_gpu is not None:
            return cls._computed(like, 1.0, on_gpu)
        numbers = arrays.library_of("angles", angles).download(angles).astype(np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError("angles must be finite, got an infinity or NaN")
        return cls._computed(like, 1.0, numbers)

    @classmethod
    def _computed(cls, like: Any, scale: float, *factors: Any) -> RotaryTable:
        """Compute the table of a product of angles on the device of `like`, times `scale`."""

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
        """Check that the arrays of a table fit together, and keep them."""
        if axes is not None:
            parts = tuple([_with_axes(part, axes, form is matrices) for part in parts])
        if arrays.is_compiling(parts[0]) or any(map(arrays.is_traced_by_jax, parts)):
            # A compiled call checks them when it runs, one that JAX traces when it is called.
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

        If another constructor is right, the sentence names it: "every angle twice, in halves: use
        RotaryTable.from_full_width". Values that rotate nothing are "not a rotation". Arrays on a
        GPU are copied to the CPU, and the host waits for that. So call this while you write a
        program, and not in one that runs.

        >>> import numpy as np
        >>> angles = np.outer(np.arange(4), [1.0, 0.1])
        >>> RotaryTable(np.cos(angles), np.sin(angles)).check()
        'one angle a pair, of every position'
        >>> RotaryTable(np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)).check()
        'every angle twice, in halves: use RotaryTable.from_full_width'
        """
        from .table_check import verdict  # few programs need it

        form, parts = self._source
        values = [arrays.library_of("table", part).download(part) for part in parts]
        return verdict(form.__name__, values, self.axes)

    @property
    def _spec(self) -> TableSpec:
        return self._source.view(None).specs[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy views copies of the arrays, and not the addresses of these.
        return type(self)._of, (self._source.form, None, *self._source.arrays)

    @property
    def axes(self) -> str:
        """The names of all axes but the last: "p", "bs" or "bsh"."""
        return {2: "p", 3: "bs", 4: "bsh"}[len(self.shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of cos, and of sin, at half width: (..., rotary_dim / 2)."""
        return self._spec.shape

    @property
    def rotary_dim(self) -> int:
        """The number of elements of a head that are rotated."""
        return 2 * self.shape[-1]

    @property
    def num_positions(self) -> int:
        """The number of positions, or of tokens in a table by batch and token.

        It is 2 ** 63 - 1 with ``precompute=False``.
        """
        return self.shape[0] if len(self.shape) == 2 else self.shape[1]

    @property
    def dtype(self) -> str:
        """The dtype of cos and sin, such as "float32"; "frequency" with ``precompute=False``."""
        return self._spec.cos.dtype

    @property
    def device(self) -> str:
        """The device of cos and sin, such as "cpu" or "cuda:0"."""
        return self._spec.cos.device

    def __repr__(self) -> str:
        axes = "" if self.axes == "p" else f"axes={self.axes!r}, "
        return (
            f"RotaryTable(shape={self.shape}, {axes}rotary_dim={self.rotary_dim}, "
            f"dtype={self.dtype!r}, device={self.device!r})"
        )


def source_of(table: Any) -> TableSource:
    """Return the source of a RotaryTable, or of the table that a tuple (cos, sin) stands for.

    None stands for no table, which a call with a norm may have.
    """
    if isinstance(table, RotaryTable):
        return table._source
    if isinstance(table, tuple) and len(table) == 2:
        return TableSource(half_width, table)
    if table is None:
        return WITHOUT_TABLE
    remedy = ""
    if arrays.is_traced_by_jax(table):
        remedy = ": make a RotaryTable within the function that is traced, of arrays"
    raise TypeError(
        "table must be a RotaryTable, such as from_complex, from_matrices and from_cache make, or "
        f"a tuple (cos, sin), got {described(table)}{remedy}"
    )


def _frequency_words(radians: NDArray[np.float64], scale: float) -> NDArray[np.int32]:
    """Return 64 bits for each frequency, then 64 for the scale: (pairs + 1, 2) words of 32 bits.

    A frequency is a fraction of a turn in units of 2^-64: see kernels/angles.cuh. Words of 32 bits
    have a dtype that every library knows.
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
    """Return an array with the named axes, and with an axis of one batch where none is named."""
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
