"""RotaryEmbedding, a module of PyTorch. Importing this defines the operators of compiled graphs.

Calls of rope_cupy's functions import what they need of PyTorch. A new process that loads a file of
`torch.export` or AOTInductor must import this module first: the file names operators, and PyTorch
does not know which package defines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arrays import asked_of
from .checks import count, index
from .choices import Layout
from .frequencies import cos_sin, inverse_frequencies
from .options import check_options
from .private_torch import no_modes
from .rotary import apply_rotary_qk
from .ways import graphs, joins  # noqa: F401, which define the operators

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    """Rotate q and k by a table that the module owns, which is float32 whatever the model's dtype.

    The attributes ``cos`` and ``sin`` hold the cosines and sines of the positions 0 .. max_position
    - 1. Their shape is (max_position, head_dim / 2). They are not buffers: the module computes them
    from `head_dim`, `base` and `max_position` when they are first needed, on the device of q. So no
    checkpoint overwrites them, ``.half()`` does not round them, and neither ``state_dict()`` nor a
    pickle contains them. The attributes are on the device of the module, which follows ``.to()``.

    Args:
        head_dim: the number of elements of a head, all of which are rotated; even.
        base: the base of the inverse frequencies base ** (-2 i / head_dim): Su et al., "RoFormer:
            Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + head_dim / 2).
        max_position: the number of positions in the table.
        layout: the names of the axes of q and k, as for `rope_cupy.apply_rotary_qk`.
        device: the device of ``cos`` and ``sin``; None takes PyTorch's default.

    Raises TypeError or ValueError if `head_dim` is not a positive even int, `base` not a positive
    number or `max_position` not an int of 0 or more.

    The first call on a GPU copies the table there, so make it before you capture a CUDA graph.

    >>> import torch
    >>> rotary = RotaryEmbedding(64, base=500000.0, max_position=8192).half()
    >>> q, k = torch.ones(1, 6, 8, 64).half(), torch.ones(1, 6, 2, 64).half()
    >>> q_out, k_out = rotary(q, k)
    >>> q_out.shape, k_out.dtype, rotary.cos.dtype
    (torch.Size([1, 6, 8, 64]), torch.float16, torch.float32)
    """

    place: torch.Tensor
    __call__: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        max_position: int = 8192,
        layout: Layout | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.base = index("head_dim", head_dim), base
        self.max_position = count("max_position", max_position)
        check_options(interleaved, layout, None, 0, False, "nan", None, False)
        inverse_frequencies(head_dim, base)  # refuses values that give no table
        self.interleaved, self.layout = interleaved, layout
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        self._tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cos(self) -> torch.Tensor:
        """The cosines, on the device of the module."""
        return self._table_on(self.place.device)[0]

    @property
    def sin(self) -> torch.Tensor:
        """The sines, on the device of the module."""
        return self._table_on(self.place.device)[1]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k rotated: see `rope_cupy.apply_rotary_qk`."""
        return apply_rotary_qk(
            q,
            k,
            self._table_for(q),
            positions=positions,
            interleaved=self.interleaved,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return (
            f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}, "
            f"max_position={self.max_position}"
        )

    def _table_for(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = self._table_on(q.device)
        if torch.compiler.is_compiling() or not hasattr(q, "fake_mode"):
            return table
        return tuple(
            part if asked_of(part).is_traced(part) else q.fake_mode.from_tensor(part)
            for part in table
        )

    def _table_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        self._compute(device)
        return self._tables[device, self.head_dim, self.base, self.max_position]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _compute(self, device: torch.device) -> bool:
        """Compute the table of the module's present values on a device, if there is none yet.

        torch.compile calls this while it traces, and does not trace it.
        """
        about = device, self.head_dim, self.base, self.max_position
        if about not in self._tables:
            numbers = cos_sin(inverse_frequencies(self.head_dim, self.base), self.max_position)
            # The table outlives a trace or a mode that is on during the first call, so its tensors
            # must be real ones that gradients can use.
            with no_modes(), torch.inference_mode(False):
                cos, sin = (torch.from_numpy(each).to(device) for each in numbers)
            self._tables[about] = cos, sin
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which computes its own table."""
        return self.__dict__ | {"_tables": {}}
