"""What a type checker must find: the types of results, and strings that no option takes.

mypy reads this file beside the package; nothing runs it. An ignored error that does not occur is an
error of mypy too.
"""

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray

from rope_cupy import (
    RotaryTable,
    Stream,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
    diffusion,
    join_qkv,
)
from rope_cupy.choices import Layout, RoundNorm
from rope_cupy.compat import sglang, transformer_engine
from rope_cupy.integrations import transformers
from rope_cupy.positions import context_parallel
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


def of_options(q: torch.Tensor, table: RotaryTable) -> None:
    """Options that there are, as strings and as variables."""
    layout: Layout | None = "bhsd"
    round_norm: RoundNorm = "before_weight"
    apply_rotary(q, table, layout=layout, out_of_range="keep", rounding="eager")
    apply_rotary_qk(q, q, table, layout="thd", out_of_range="nan", rounding="once")
    apply_norm_rotary(q, q, table, norm="heads", round_norm=round_norm)
    apply_qk_norm_rotary(q, q, q, q, table, norm="layer", round_norm=False)
    apply_rotary_qkv(q, table, num_heads=4, num_kv_heads=2, norm=None)
    apply_rotary_kv_cache(q, q, q, q, q, table, slot_mapping=q, cache_layout="HND")
    apply_rotary_kv_cache(q, q, q, q, q, table, slot_mapping=q, cache_dtype="float8_e5m2")
    join_qkv([Stream(q, q, q, table)], norm="head", round_norm=True, layout="sbhd")
    RotaryTable(q, q, axes="sh")
    RotaryEmbedding(64, layout="bhsd")
    diffusion.wan((2, 4, 6), like=q, compute_dtype="float32")
    context_parallel(8, 1, 2, scheme="zigzag")
    transformers.enable(torch.nn.Linear(1, 1), rounding="eager")
    transformer_engine.apply_rotary_pos_emb(q, q, "bshd")
    sglang.apply_rotary_embedding(mode="positions", query=q, key=q)


def of_wrong_options(q: torch.Tensor, table: RotaryTable) -> None:
    """A type checker refuses every other string."""
    apply_rotary(q, table, layout="bsh")  # type: ignore[arg-type]
    apply_rotary(q, table, out_of_range="zero")  # type: ignore[arg-type]
    apply_rotary_qk(q, q, table, layout="bsd")  # type: ignore[arg-type]
    apply_rotary_qk(q, q, table, rounding="never")  # type: ignore[arg-type]
    apply_norm_rotary(q, q, table, norm="token")  # type: ignore[arg-type]
    apply_norm_rotary(q, q, table, round_norm="after_weight")  # type: ignore[arg-type]
    apply_qk_norm_rotary(q, q, q, q, table, norm="rms")  # type: ignore[arg-type]
    apply_qk_norm_rotary(q, q, q, q, table, round_norm="before")  # type: ignore[arg-type]
    apply_rotary_qkv(q, table, num_heads=4, num_kv_heads=2, norm="")  # type: ignore[arg-type]
    apply_rotary_kv_cache(q, q, q, q, q, table, slot_mapping=q, cache_layout="NDH")  # type: ignore[arg-type]
    apply_rotary_kv_cache(q, q, q, q, q, table, slot_mapping=q, cache_dtype="fp8")  # type: ignore[arg-type]
    join_qkv([Stream(q, q, q, table)], norm="none")  # type: ignore[arg-type]
    RotaryTable(q, q, axes="hs")  # type: ignore[arg-type]
    RotaryTable.from_full_width(q, q, axes="b")  # type: ignore[arg-type]
    RotaryEmbedding(64, layout="bds")  # type: ignore[arg-type]
    diffusion.wan((2, 4, 6), like=q, compute_dtype="float16")  # type: ignore[arg-type]
    diffusion.mochi((2, 4, 6), q, like=q, compute_dtype="bfloat16")  # type: ignore[arg-type]
    context_parallel(8, 1, 2, scheme="striped")  # type: ignore[arg-type]
    transformers.enable(torch.nn.Linear(1, 1), rounding="torch")  # type: ignore[arg-type]
    transformer_engine.apply_rotary_pos_emb(q, q, "bhsd")  # type: ignore[arg-type]
    sglang.apply_rotary_embedding(mode="cache", query=q, key=q)  # type: ignore[arg-type]
