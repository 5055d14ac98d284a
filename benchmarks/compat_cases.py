"""The calls of rope_cupy.compat's functions that bench_compat.py times, and the plain calls beside.

A function, a call of rope_cupy that does the same, and the peer's function have the same arrays: of
bfloat16, with 32 and 8 heads of 128 elements. The tables of a plain call are views that were made
before. Cosines of angles, outputs in another order of memory, copies of what is not rotated, and
the views of arrays and results that any caller needs, are made by a plain call too, if a function
has to make them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from shapes import Shape
from tasks import EPS, Call

from rope_cupy import (
    RotaryTable,
    Stream,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    apply_rotary_qkv,
    frequencies,
    join_qkv,
)

Q_HEADS, K_HEADS, DIM = 32, 8, 128
SECTIONS = 16, 24, 24
SLOTS = 16384  # of a cache


class Case(NamedTuple):
    """What a function is given, and the plain call.

    written: what both write in place; of others the results are compared.
    init: what an object is made of, where the function is a class.
    """

    arguments: tuple[Any, ...]
    plain: Call
    keywords: dict[str, Any] = {}  # noqa: RUF012
    written: tuple[torch.Tensor, ...] = ()
    init: tuple[Any, ...] | None = None

    def call_of(self, function: Any, device: str) -> Call:
        """Return the call of a function, in which nothing is left to be made."""
        if self.init is not None:
            function = function(*self.init).to(device).eval()
        return partial(function, *self.arguments, **self.keywords)


class Arrays:
    """The arrays of a shape, in the forms in which the peers take them."""

    def __init__(self, shape: Shape, device: str) -> None:
        tokens = self.tokens = shape.tokens
        self.device = device
        inv_freq = torch.from_numpy(frequencies.inverse_frequencies(DIM))
        exact = torch.outer(torch.arange(tokens).double(), inv_freq)
        self.angles = exact.float().to(device)
        cos, sin = (part.to(device, torch.float32) for part in (exact.cos(), exact.sin()))
        self.cos32, self.sin32 = cos, sin
        self.cos, self.sin = cos.bfloat16(), sin.bfloat16()
        self.cache32 = torch.cat([cos, sin], -1)
        self.cache = self.cache32.bfloat16()
        self.full = self.cos.repeat(1, 2), self.sin.repeat(1, 2)  # every angle twice, in halves
        self.each = tuple(part.repeat_interleave(2, -1) for part in (self.cos, self.sin))
        self.complex = torch.complex(cos, sin)
        self.matrices = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        self.positions = torch.arange(tokens, device=device)
        self.ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.axes = self.positions.expand(3, -1).contiguous()
        self.qkv = self._normal(1, tokens, Q_HEADS + 2 * K_HEADS, DIM)
        self.q, self.k, self.v = (
            self._normal(1, tokens, heads, DIM) for heads in (Q_HEADS, K_HEADS, K_HEADS)
        )
        self.kv = self._normal(1, tokens, 2, K_HEADS, DIM)
        self.weights = self._normal(DIM), self._normal(DIM)
        self.caches = tuple(self._normal(SLOTS, K_HEADS * DIM) for _ in range(2))
        self._originals = [(x, x.clone()) for x in (self.qkv, self.q, self.k, self.v, self.kv)]

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)

    def restore(self) -> None:
        """Undo what calls have written to q, k and v."""
        for x, original in self._originals:
            x.copy_(original)


Cases = dict[str, Case]  # by the name of the function, behind which others may follow a comma


def flash_attn(a: Arrays) -> Cases:
    table, keep = (a.cos, a.sin), {"out_of_range": "keep"}
    in_place, heads = {"inplace": True}, {"num_heads": Q_HEADS, "num_kv_heads": K_HEADS}
    new = partial(apply_rotary, a.q, table, **keep)
    both = partial(apply_rotary_qkv, a.qkv, table, out=a.qkv, **heads, **keep)
    packed = {"num_heads_q": Q_HEADS}

    def of_kv() -> None:
        k = a.kv.select(2, 0)
        apply_rotary(k, table, out=k, **keep)

    written = partial(apply_rotary, a.q, table, out=a.q, **keep)
    return {
        "apply_rotary": Case((a.q, *table), new),
        "apply_rotary_emb": Case((a.q, *table), new),
        "apply_rotary_emb_func": Case((a.q, *table), new),
        "apply_rotary_emb, in place": Case((a.q, *table), written, in_place, (a.q,)),
        "apply_rotary_emb_torch": Case(
            (a.q, *table), partial(apply_rotary, a.q, table, rounding="eager")
        ),
        "apply_rotary_emb_qkv_": Case((a.qkv, *table), both, packed, (a.qkv,)),
        "apply_rotary_emb_kv_": Case((a.kv, *table), of_kv, written=(a.kv,)),
        "RotaryEmbedding": Case((a.qkv,), both, packed, (a.qkv,), (DIM,)),
    }


def quack(a: Arrays) -> Cases:
    cases = flash_attn(a)
    return {name: cases[name] for name in cases if name not in OF_FLASH_ATTN_ALONE}


OF_FLASH_ATTN_ALONE = "RotaryEmbedding", "apply_rotary_emb_torch"


def flashinfer(a: Arrays) -> Cases:
    q, k = a.q[0], a.k[0]
    positions, cases = a.positions.int(), {}
    llama = frequencies.llama3(
        *(DIM, 5e5),
        factor=8,
        low_freq_factor=1,
        high_freq_factor=4,
        original_max_position=8192,
    )
    for name, inv_freq in (
        ("rope", frequencies.inverse_frequencies(DIM)),
        ("llama31_rope", llama),
    ):
        table = RotaryTable.from_inverse_frequencies(inv_freq, like=q, precompute=False)
        counted = {"cu_seqlens": a.ends, "seqlen_offsets": a.start}
        for behind, of_peer, options in (
            ("", (a.ends, a.start), counted),
            ("_pos_ids", (positions,), {"positions": positions}),
        ):
            cases |= new_and_in_place(
                f"apply_{name}{behind}", (q, k, *of_peer), q, k, table, options
            )
    table = RotaryTable.from_cache(a.cache32)
    arguments = positions, q.flatten(1), k.flatten(1), DIM, a.cache32
    options = {"positions": positions}
    return cases | new_and_in_place(
        "apply_rope_with_cos_sin_cache", arguments, q, k, table, options
    )


def new_and_in_place(
    name: str, arguments: tuple[Any, ...], q: Any, k: Any, table: Any, options: dict[str, Any]
) -> Cases:
    """Return the cases of a function of FlashInfer and of its form in place."""
    plain = partial(apply_rotary_qk, q, k, table, **options)
    return {
        name: Case(arguments, plain),
        f"{name}_inplace": Case(arguments, partial(plain, out=(q, k)), written=(q, k)),
    }


def vllm(a: Arrays) -> Cases:
    q, k = a.q[0].flatten(1), a.k[0].flatten(1)
    packed = a.qkv[0].flatten(1)
    table, out = RotaryTable.from_cache(a.cache), (q, k)
    of_packed: dict[str, Any] = {"num_heads": Q_HEADS, "num_kv_heads": K_HEADS, "head_dim": DIM}
    of_packed |= {"q_weight": a.weights[0], "k_weight": a.weights[1], "round_norm": False}
    of_packed["positions"] = a.positions
    by_axes = {"positions": a.axes, "mrope_section": SECTIONS}
    axes = tuple(part.expand(3, -1, -1).contiguous() for part in (a.cos, a.sin))
    heads = Q_HEADS, K_HEADS, K_HEADS, DIM, EPS
    gated = torch.stack([a.q[0], a.q[0]], 2).flatten(1)
    of_gated = a.cache, a.positions, EPS, Q_HEADS, K_HEADS, DIM, DIM

    def split() -> Any:
        halves, heads = gated.view(-1, Q_HEADS, 2, DIM), k.view(-1, K_HEADS, DIM)
        stream = Stream(halves[:, :, 0], heads, halves[:, :, 1], table, a.positions, *a.weights)
        return [x.flatten(1) for x in join_qkv([stream], eps=EPS)]

    return {
        "rotary_embedding": Case(
            (a.positions, q, k, DIM, a.cache, True),
            partial(apply_rotary_qk, q, k, table, positions=a.positions, head_dim=DIM, out=out),
            written=(q, k),
        ),
        "fused_qk_norm_rope": Case(
            (packed, *heads, *a.weights, a.cache, True, a.positions),
            partial(apply_rotary_qkv, packed, table, out=packed, **of_packed),
            written=(packed,),
        ),
        "triton_mrope": Case(
            (q, k, *axes, list(SECTIONS), DIM, DIM, False, True),
            partial(
                apply_rotary_qk,
                *(q, k, (a.cos, a.sin)),
                head_dim=DIM,
                rounding="eager",
                out=out,
                **by_axes,
            ),
            written=(q, k),
        ),
        "fused_qk_rmsnorm_rope_gate": Case(
            (gated, k, *a.weights, *of_gated),
            split,
        ),
    }


def sglang(a: Arrays) -> Cases:
    q, k, v = (x[0] for x in (a.q, a.k, a.v))
    written, out = (q, k), {"out": (q, k)}
    by_position = {"positions": a.positions} | out
    table, table16 = RotaryTable.from_cache(a.cache32), RotaryTable.from_cache(a.cache)
    neighbours = partial(apply_rotary_qk, q, k, (a.cos, a.sin), interleaved=True, **out)
    halves = partial(apply_rotary_qk, q, k, table, **by_position)
    halves16 = partial(apply_rotary_qk, q, k, table16, **by_position)
    norm = partial(apply_qk_norm_rotary, q, k, *a.weights, table, positions=a.positions)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos_sin = {"cos": a.cos, "sin": a.sin, "query": q, "key": k}
    by_cache = {"cos_sin_cache": a.cache, "positions": a.positions, "query": q, "key": k}
    neox, of_rope = {"is_neox": True}, (q, k, a.cache32, a.positions)
    caches = tuple(x.unflatten(1, (K_HEADS, DIM)) for x in a.caches)

    def with_caches() -> None:
        how = {"positions": a.positions, "slot_mapping": a.positions}
        apply_rotary_kv_cache(q, k, v, *caches, table, out=q, k_out=k, **how)

    flat = a.positions, q.flatten(1), k.flatten(1), DIM, a.cache32
    of_norm = *a.weights, a.cache32, a.positions
    return {
        "rotary_embedding_cos_sin": Case((a.cos, a.sin, q, k), neighbours, written=written),
        "rotary_embedding": Case(
            (a.positions, q, k, DIM, a.cache, True), halves16, written=written
        ),
        "apply_rotary_embedding": Case((), neighbours, cos_sin, written),
        "apply_rotary_embedding, positions": Case(
            (), halves16, by_cache | {"mode": "positions"}, written
        ),
        "apply_rope_inplace": Case(of_rope, halves, neox, written),
        "apply_rope_inplace_with_kvcache": Case(
            (q, k, v, *a.caches, a.cache32, a.positions, a.positions), with_caches, neox, written
        ),
        "apply_rope_with_cos_sin_cache_inplace": Case(of_rope, halves, neox, written),
        "apply_rope_with_cos_sin_cache_inplace_by_head_size": Case(flat, halves, neox, written),
        "fused_inplace_qknorm_rope": Case(
            (q, k, *of_norm), partial(norm, round_norm=False, **out), neox, written
        ),
        "fused_qknorm_rope_out_of_place": Case(
            (q, k, q_out, k_out, *of_norm),
            partial(norm, round_norm=False, out=(q_out, k_out)),
            neox,
            (q_out, k_out),
        ),
        "apply_rotary_embedding_triton": Case(
            (q, a.cos, a.sin), partial(apply_rotary, q, (a.cos, a.sin), interleaved=True)
        ),
    }


def liger(a: Arrays) -> Cases:
    q, k = a.q.transpose(1, 2), a.k.transpose(1, 2)
    of_heads = {"layout": "bhsd"}
    full = RotaryTable.from_full_width(*a.full)
    rows, axes = (x[None] for x in a.full), (x.expand(3, 1, -1, -1).contiguous() for x in a.full)
    by_axes = {"positions": a.axes, "mrope_section": SECTIONS, "rounding": "eager"} | of_heads
    neighbours = partial(apply_rotary_qk, a.q, a.k, RotaryTable.from_complex(a.complex))
    halves = partial(apply_rotary_qk, q, k, full, **of_heads)
    whole = a.q[0], a.k[0]
    return {
        "liger_rotary_pos_emb": Case((q, k, *rows), halves),
        "liger_rotary_pos_emb_gpt_oss": Case(
            (q, k, a.cos[None], a.sin[None]),
            partial(apply_rotary_qk, q, k, (a.cos, a.sin), **of_heads),
        ),
        "liger_rotary_pos_emb_vision": Case(
            (*whole, *a.full), partial(apply_rotary_qk, *whole, full)
        ),
        "liger_multimodal_rotary_pos_emb": Case(
            (q, k, *axes, list(SECTIONS)), partial(apply_rotary_qk, q, k, full, **by_axes)
        ),
        "liger_llama4_text_rotary_pos_emb": Case((a.q, a.k, a.complex), neighbours),
        "liger_llama4_vision_rotary_pos_emb": Case((a.q, a.k, a.complex), neighbours),
    }


def transformer_engine(a: Arrays) -> Cases:
    x, packed = a.q.transpose(0, 1), a.qkv.view(1, a.tokens, K_HEADS, 6 * DIM).transpose(0, 1)
    angles = a.angles.repeat(1, 2)[:, None, None]
    split = [4 * DIM, DIM, DIM]

    def rotated(x: torch.Tensor = a.q, **options: Any) -> Any:
        rows = angles.flatten(1)
        table = RotaryTable.from_elementwise(rows.cos(), rows.sin())
        return apply_rotary(x, table, **options)

    def of_packed() -> Any:
        rows = angles.flatten(1)
        table = RotaryTable.from_elementwise(rows.cos(), rows.sin())
        heads = packed.unflatten(3, (6, DIM))[:, 0]
        q, k = torch.empty_like(a.q[0]), torch.empty_like(a.k[0])
        out = q.unflatten(1, (K_HEADS, 4)), k[:, :, None]
        layout = {"layout": "sbhd"}
        apply_rotary_qk(heads[:, :, :4], heads[:, :, 4:5], table, out=out, **layout)
        return q, k, heads[:, :, 5].clone()

    fused = {"fused": True}
    packed_tokens = fused | {"tensor_format": "thd", "cu_seqlens": a.ends}
    return {
        "apply_rotary_pos_emb": Case((x, angles), rotated, fused),
        "apply_rotary_pos_emb, bshd": Case(
            (a.q, angles), rotated, fused | {"tensor_format": "bshd"}
        ),
        "apply_rotary_pos_emb, thd": Case(
            (a.q[0], angles),
            partial(rotated, a.q[0], cu_seqlens=a.ends, out_of_range="keep"),
            packed_tokens,
        ),
        "apply_fused_qkv_rotary_pos_emb": Case((packed, angles, angles, split), of_packed),
    }


def apex(a: Arrays) -> Cases:
    x = a.q.transpose(0, 1)
    angles = a.angles.repeat(1, 2)[:, None, None]
    cos, sin = (part[:, None, None] for part in a.full)
    eager = {"rounding": "eager"}
    height = max(n for n in range(1, int(a.tokens**0.5) + 1) if a.tokens % n == 0)
    image = a.q.unflatten(1, (height, -1))
    by_row = tuple(part[None, :height, None, : DIM // 2].contiguous() for part in a.full)
    by_column = tuple(
        part[None, : a.tokens // height, None, : DIM // 2].contiguous() for part in a.full
    )

    def by_table(conjugate: bool) -> Any:
        out = torch.empty_like(a.q)
        return apply_rotary(a.q, elementwise, out=out, conjugate=conjugate, **eager)

    def by_angles(conjugate: bool, x: torch.Tensor = a.q, **options: Any) -> Any:
        rows = angles.flatten(1)
        parts = (part.bfloat16() for part in (rows.cos(), rows.sin()))
        table, out = RotaryTable.from_elementwise(*parts), torch.empty_like(x)
        return apply_rotary(x, table, out=out, conjugate=conjugate, **options, **eager)

    def of_image(x: torch.Tensor, conjugate: bool) -> Any:
        out = torch.empty_like(x)
        how = {"conjugate": conjugate} | eager
        rows = out.view(1, height, -1, DIM)
        apply_rotary(x.view(rows.shape), row_table, out=rows, **how)
        columns = out.view(height, -1, Q_HEADS, DIM)
        apply_rotary(columns, column_table, rotary_offset=DIM // 2, out=columns, **how)
        return out if x is a.q else out.flatten(1, 2)

    elementwise = RotaryTable.from_elementwise(*a.full)
    row_table, column_table = (
        RotaryTable.from_elementwise(*(part[0, :, 0] for part in parts))
        for parts in (by_row, by_column)
    )
    cases = {}
    for name, conjugate in (("forward", False), ("backward", True)):
        of_packed = partial(by_angles, conjugate, a.q[0], cu_seqlens=a.ends, out_of_range="keep")
        cases[name] = Case((x, angles, False), partial(by_angles, conjugate))
        cases[f"{name}_cached"] = Case((x, cos, sin, False), partial(by_table, conjugate))
        cases[f"{name}_thd"] = Case((a.q[0], a.ends, angles), of_packed)
        cases[f"{name}_2d"] = Case(
            (image, *by_row, *by_column), partial(of_image, image, conjugate)
        )
    fused, sizes = "fused_apply_rotary_pos_emb", (height, a.tokens // height)
    return cases | {
        fused: Case((x, angles), partial(by_angles, False)),
        f"{fused}_cached": Case((x, cos, sin), partial(by_table, False)),
        f"{fused}_thd": Case((a.q[0], a.ends, angles), cases["forward_thd"].plain),
        f"{fused}_2d": Case((a.q, *sizes, *by_row, *by_column), partial(of_image, a.q, False)),
    }


def comfy_kitchen(a: Arrays) -> Cases:
    q, k, freqs = a.q, a.k, a.matrices[None, :, None]
    table = RotaryTable.from_matrices(freqs)
    cases = {}
    for pairs, interleaved in (("", True), ("_split_half", False)):
        how = {"interleaved": interleaved}
        with_norm = how | {"eps": EPS}
        q_weight, k_weight = a.weights
        for name, arrays, scales, plain, out in (
            ("apply_rope", (q, k), (), partial(apply_rotary_qk, q, k, table, **how), (q, k)),
            (
                "rms_rope",
                (q, k),
                (q_weight, k_weight),
                partial(apply_qk_norm_rotary, q, k, q_weight, k_weight, table, **with_norm),
                (q, k),
            ),
            ("apply_rope", (q,), (), partial(apply_rotary, q, table, **how), q),
            (
                "rms_rope",
                (q,),
                (q_weight,),
                partial(apply_norm_rotary, q, q_weight, table, **with_norm),
                q,
            ),
        ):
            full_name = f"{name}{pairs}" + ("1" if len(arrays) == 1 else "")
            arguments = *arrays, freqs, *scales
            cases[full_name] = Case(arguments, plain)
            cases[f"{full_name}_"] = Case(arguments, partial(plain, out=out), written=arrays)
    return cases


def torchtitan(a: Arrays) -> Cases:
    numbers = a.complex[None, :, None]
    reals = torch.cat([*a.full], -1)[None, :, None]
    by_complex = partial(apply_rotary_qk, a.q, a.k, RotaryTable.from_complex(numbers))
    by_reals = partial(apply_rotary_qk, a.q, a.k, RotaryTable.from_elementwise(*a.full))
    return {
        "ComplexRoPE.apply_rotary_emb": Case((a.q, a.k, numbers), by_complex),
        "CosSinRoPE.apply_rotary_emb": Case((a.q, a.k, reals), by_reals),
        "apply_rotary_emb": Case((a.q, a.k, numbers), by_complex),
    }


def timm(a: Arrays) -> Cases:
    x, (cos, sin) = a.q.transpose(1, 2), a.each
    table = RotaryTable.from_elementwise(cos, sin)
    how = {"layout": "bhsd", "interleaved": True, "rounding": "eager"}
    plain = partial(apply_rotary, x, table, **how)
    return {
        "apply_rot_embed": Case((x, sin, cos), plain),
        "apply_rot_embed_list": Case(([x], sin, cos), plain),
        "apply_rot_embed_cat": Case((x, torch.cat([sin, cos], -1)), plain),
    }


MODULES: dict[str, Callable[[Arrays], Cases]] = {
    each.__name__: each
    for each in (
        *(flash_attn, quack, flashinfer, vllm, sglang, liger, transformer_engine, apex),
        *(comfy_kitchen, torchtitan, timm),
    )
}
