"""What a type checker must find: the results of a call are arrays of the library that came in.

mypy reads this file beside the package; nothing runs it.
"""

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
)
from rope_cupy.torch import RotaryEmbedding


def of_torch(q: torch.Tensor, k: torch.Tensor, table: RotaryTable) -> None:
    """Tensors in, tensors out."""
    assert_type(apply_rotary(q, table), torch.Tensor)
    assert_type(apply_rotary(q, table, positions=3, out=q), torch.Tensor)
    assert_type(apply_rotary_qk(q, k, (q, q)), tuple[torch.Tensor, torch.Tensor])
    assert_type(apply_rotary_qk(q, k, table, out=(q, k)), tuple[torch.Tensor, torch.Tensor])
    assert_type(RotaryEmbedding(64)(q, k), tuple[torch.Tensor, torch.Tensor])
    assert_type(apply_norm_rotary(q, None, table), torch.Tensor)
    assert_type(apply_norm_rotary(q, q, None, norm="layer", bias=q), torch.Tensor)
    assert_type(apply_qk_norm_rotary(q, k, q, k, table), tuple[torch.Tensor, torch.Tensor])
    assert_type(apply_rotary_qkv(q, table, num_heads=4, num_kv_heads=2), torch.Tensor)
    assert_type(apply_rotary_kv_cache(q, k, k, q, q, table, slot_mapping=q), torch.Tensor)


def of_parameters(q: torch.nn.Parameter, table: RotaryTable) -> None:
    """A parameter is a tensor to its caller."""
    result: torch.Tensor = apply_rotary(q, table)
    del result


def of_numpy(q: NDArray[np.float32], k: NDArray[np.float32], table: RotaryTable) -> None:
    """NumPy's arrays in, NumPy's arrays out."""
    assert_type(apply_rotary(q, table), NDArray[np.float32])
    assert_type(apply_rotary_qk(q, k, table), tuple[NDArray[np.float32], NDArray[np.float32]])
