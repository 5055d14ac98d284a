"""PyTorch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import private_torch
from ..memory import array_spec
from .base import Array, Library, Outline, attribute_matcher, check_device, memory_order, resized

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

_forward_ad: Any = torch.autograd.forward_ad
_modes_or_tangents = private_torch.modes_and_tangents()
_address_of = torch.Tensor.data_ptr
_is_nested = attrgetter("is_nested")
NUMPY_FLOATS = torch.float16, torch.float32, torch.float64
MAX_DTYPES = 256  # whose names are kept; PyTorch has fewer


class Torch(Library):
    """PyTorch's tensors, on the CPU or a GPU."""

    may_lack_memory = True
    # PyTorch's own functions, for a function of Python above them takes as long as one of them.
    # A version that is counted on tells a backward pass that the elements which it saved are gone.
    empty_like: Callable[[Any], Any] = staticmethod(torch.empty_like)  # type: ignore[assignment]
    mark_written: Callable[[tuple[Any, ...]], None] = staticmethod(  # type: ignore[assignment]
        private_torch.version_counter()
    )

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return a new tensor."""
        shape = resized(array.shape, axis, size)
        if array.is_contiguous():
            return array.new_empty(shape)
        order = memory_order(array.stride())
        return torch.empty_permuted(shape, order, dtype=array.dtype, device=array.device)

    def part(self, array: Any, axis: int, start: int, stop: int) -> Any:
        """Return a view, by PyTorch's fastest way to one."""
        return array.narrow(axis, start, stop - start)

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Refuse what is not elements at strides in memory, and describe all others."""
        if private_torch.is_traced_by_jit() or private_torch.is_traced_by_make_fx():
            raise TypeError(
                f"{name} must not be traced, for the launch is not recorded: got a trace"
            )
        check_strided(name, array)
        device = check_device(name, str(array.device))
        pointer = _pointer(name, array)
        dtype = _dtype_name(array.dtype)
        spec = array_spec(tuple(array.shape), array.stride(), dtype, device, pointer, True)
        return Array(spec, pointer, self, array)

    def attributes(self, array: Any) -> Any:
        """Return what is read of a tensor. Keys of PyTorch's dispatcher tell a view that is lazily
        negated, a sparse tensor, one of inference mode, ...
        """
        if private_torch.is_traced_by_jit():
            return None
        keys = private_torch.keys_of(array)
        requires_grad = array.requires_grad
        return keys, array.dtype, array.shape, array.stride(), array.device, requires_grad

    def addresses(self, arrays: Sequence[Any]) -> tuple[int, ...] | None:
        """Return the addresses, None where a mode changes or records what is done.

        A nested tensor has none here: a `matcher` that is asked of its strides ends the process.
        """
        if _modes_or_tangents():
            return None
        try:
            return None if any(map(_is_nested, arrays)) else tuple(map(_address_of, arrays))
        except (AttributeError, TypeError, RuntimeError):  # of other libraries, or of no memory
            return None

    def matcher(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        """Return PyTorch's own check, of which a tensor that is given twice is kept apart."""
        firsts = [[each is array for each in arrays].index(True) for array in arrays]
        once = sorted({*firsts})
        check = private_torch.matcher(tuple([arrays[i] for i in once]))
        if check is None:
            return attribute_matcher(self.attributes, arrays)
        if len(once) == len(arrays):
            return check
        again = [(i, first) for i, first in enumerate(firsts) if i != first]

        def match(*now: Any) -> bool:
            if any([now[i] is not now[first] for i, first in again]):
                return False
            return check(*[now[i] for i in once])

        return match

    def requires_grad(self, array: Any) -> bool:
        """Return whether a gradient is wanted where gradients are recorded."""
        return array.requires_grad  # type: ignore[no-any-return]

    def wants_gradient(self, array: Any) -> bool:
        """Return whether operations on the tensor are recorded now."""
        return array.requires_grad and torch.is_grad_enabled()

    def is_distributed(self, array: Any) -> bool:
        """Return whether it is a DTensor."""
        return hasattr(array, "device_mesh")

    def is_traced(self, array: Any) -> bool:
        """Return whether it is fake, on the device "meta", or recorded by make_fx."""
        return private_torch.is_traced_by_make_fx() or array.is_meta or hasattr(array, "fake_mode")

    def is_beside_real(self, array: Any) -> bool:
        """Return whether it is fake, in a trace that takes real tensors for constants."""
        return getattr(getattr(array, "fake_mode", None), "allow_non_fake_inputs", False)

    def check_transform(self, name: str, array: Any) -> None:
        """Refuse what a transform of functions wraps, and what has a tangent or no strides."""
        if private_torch.is_wrapped_by_transform(array):
            refuse_transform(name)
        if private_torch.is_functional(array):
            return
        if _forward_ad.unpack_dual(array).tangent is not None:
            raise ValueError(
                f"{name} must not carry a forward-mode tangent, which rope_cupy has no rule for, "
                "got a dual tensor"
            )
        check_strided(name, array)  # before a new q is made of one that is not

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Compute with PyTorch on the device of `like`."""
        # Copies, for PyTorch takes no negative strides and warns of what is read-only.
        copies = [
            array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
            for array in arrays
        ]
        with torch.device(like.device):  # not on PyTorch's default device, whatever it is
            return function(torch, *(copy.to(like.device) for copy in copies))

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the CPU, in float32 where NumPy does not have its dtype."""
        copy = array.detach().cpu().resolve_conj().resolve_neg()
        if copy.is_floating_point() and copy.dtype not in NUMPY_FLOATS:
            copy = copy.float()
        return copy.numpy()  # type: ignore[no-any-return]

    def in_float64(self, array: Any) -> Any:
        """Return the tensor, or a copy, without its history."""
        return array.detach().double()

    def streams(self) -> Callable[[int], int]:
        """Return what asks PyTorch for its current stream."""
        return private_torch.raw_stream()


def outline(name: str, array: Any) -> Outline | None:
    """Return what is known of a tensor that is only traced, None where a size is unknown.

    Symbolic sizes are those of the call that is traced, of which this makes no guard. Tensors that
    share a storage lie in it as they will in memory.
    """
    check_strided(name, array)
    numbers = *array.shape, *array.stride(), array.storage_offset()
    known = [each if isinstance(each, int) else each.node.hint for each in numbers]
    if None in known:
        return None
    num, (*sizes, offset) = array.ndim, known
    # Storages lie farther apart than any of them is long.
    pointer = (private_torch.storage_number(array) << 64) + offset * array.itemsize
    shape, strides, dtype = (*sizes[:num],), (*sizes[num:],), _dtype_name(array.dtype)
    return Outline(array_spec(shape, strides, dtype, str(array.device), pointer, True), pointer)


def refuse_transform(name: str) -> None:
    """Refuse what a transform of functions wraps, of which each has a rule of its own."""
    raise TypeError(
        f"{name} must not come from a transform of torch.func (grad, vjp, jacrev, jvp, vmap, ...) "
        "or from is_grads_batched=True, for which rope_cupy has no rule: use torch.autograd.grad, "
        "and an axis of batches, got a tensor that a transform wraps"
    )


def check_strided(name: str, array: Any) -> None:
    """Refuse a tensor that is not its elements at strides."""
    if array.layout is not torch.strided or array.is_nested:
        kind = "nested" if array.is_nested else array.layout
        raise TypeError(f"{name} must be a strided tensor, got layout {kind}")
    if array.is_conj() or array.is_neg():
        raise ValueError(
            f"{name} must hold its own values, got a lazy view: call resolve_conj() or "
            "resolve_neg()"
        )


def _pointer(name: str, array: Any) -> int:
    """Return the address of a tensor, which fake tensors do not have."""
    try:
        pointer: int = array.data_ptr()
    except RuntimeError as error:
        raise TypeError(f"{name} must be a tensor in memory, got {type(array).__name__}") from error
    if not pointer and array.numel():
        raise TypeError(f"{name} must be a tensor in memory, got {type(array).__name__}")
    return pointer


@lru_cache(maxsize=MAX_DTYPES)
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
