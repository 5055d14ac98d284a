"""What is compared: a provider is a function from a case and its inputs to a call of no argument.

The call rotates q and k, in place where the provider can, and returns them rotated: the results
have the shapes of q and k. What a provider needs (a table in its own form, views, compiled code) is
made beforehand. `AbsentError` says that a provider is not installed, `UnsupportedError` that it
cannot do a case. Every provider is called through its public functions, but where its own docstring
says otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from outcome import AbsentError, UnsupportedError
from shapes import Shape

Call = Callable[[], Any]
Pair = tuple[torch.Tensor, torch.Tensor]

BY_AXES = ("axes", "mixed axes")
TOLD = ("offsets", "sequences", *BY_AXES)  # how rope_cupy alone, or hardly another, finds positions
VARIANTS = ("in place", "new", "bhsd", "packed", "positions", *TOLD)
TABLES = ("half", "full", "elementwise", "cache", "complex", "matrices", "frequencies")
SEQUENCE = 512  # tokens of a packed sequence
WORD = 16  # bytes that the limit kernel moves at once


class Case(NamedTuple):
    """What is asked of every provider.

    variant: "in place" rotates dense q and k and overwrites them; "new" writes new arrays; "bhsd"
        rotates in place arrays that lie in memory as (b, h, s, d), "packed" the views of a packed
        (b, s, q_heads + 2 k_heads, d) buffer, "positions" by an array of positions. What follows
        goes by arrays that tell positions: "offsets" by one for each batch, "sequences" by the
        cu_seqlens of packed ones, "axes" and "mixed axes" by positions on three axes, of pairs in
        sections and in turn.
    table: the form of the table that rope_cupy reads; all others get the form that they want. Of
        "frequencies" it computes the angles.
    """

    shape: Shape
    dtype: str
    variant: str = "in place"
    table: str = "half"
    device: str = "cuda"

    @property
    def heads_bytes(self) -> int:
        """Bytes of q and k that are read and written once.

        In place, what lies outside the rotated slice is not touched; a new array needs it too.
        """
        _, batch, tokens, q_heads, k_heads, head_dim, rotary_dim, _, _ = self.shape
        width = head_dim if self.variant == "new" else rotary_dim
        return 2 * batch * tokens * (q_heads + k_heads) * width * self.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of the table's rows that hold what rope_cupy reads once, and of the positions.

        A row is float32. Of a full-width one with repeated halves only the first half is read; with
        neighbours repeated, the values that are not needed come along; of elements and matrices all
        are needed.
        """
        full = self.shape.interleaved and self.table == "full"
        values = 2 if full or self.table in ("elementwise", "matrices") else 1
        num_rows = 1 if self.table == "frequencies" else self.shape.tokens
        if self.variant == "sequences":
            num_rows = min(num_rows, SEQUENCE)
        return num_rows * self.shape.rotary_dim * 4 * values + self.num_positions * 8

    @property
    def num_positions(self) -> int:
        """How many integers tell the positions of tokens."""
        tokens = self.shape.tokens
        numbers = {"positions": tokens, "offsets": self.shape.batch} | dict.fromkeys(
            BY_AXES, 3 * tokens
        )
        if self.variant == "sequences":
            return -(-tokens // SEQUENCE) + 1
        return numbers.get(self.variant, 0)

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """The pairs that turn by each of three axes, as in Qwen2-VL and Qwen3-VL."""
        pairs = self.shape.rotary_dim // 2
        others = pairs * (5 if self.variant == "mixed axes" else 6) // 16
        return pairs - 2 * others, others, others

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return getattr(torch, self.dtype).itemsize


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


class Inputs(NamedTuple):
    """One set of what a call reads and writes; q and k seen as (b, s, h, d), however they lie."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: Table
    positions: torch.Tensor | None  # the rows of tokens, (tokens,) or (3, tokens), int64
    how: dict[str, Any]  # by which keywords rope_cupy is told of them
    memory: torch.Tensor  # the dense buffer that holds q, k and v


def cache(table: Table, dtype: torch.dtype) -> torch.Tensor:
    """Return a table as cosines, then sines, in a row."""
    return torch.cat([table.cos, table.sin], dim=-1).to(dtype)


def full_width(table: Table, dtype: torch.dtype) -> Pair:
    """Return a table with every angle twice, at the places of the two elements that it turns."""
    if table.interleaved:
        return tuple(part.to(dtype).repeat_interleave(2, -1) for part in (table.cos, table.sin))
    return tuple(part.to(dtype).repeat(1, 2) for part in (table.cos, table.sin))


def complex_numbers(table: Table) -> torch.Tensor:
    """Return a table as cos + i sin."""
    return torch.complex(table.cos, table.sin)


def matrices(table: Table) -> torch.Tensor:
    """Return a table as 2 x 2 rotation matrices."""
    cos, sin = table.cos, table.sin
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


def limit(case: Case, inputs: Inputs, threads: int = 256) -> Call:
    """Read and write back as many bytes as q and k have to move, in place and from dense memory."""
    words = case.heads_bytes // 2 // WORD
    if case.device == "cpu":
        numbers = inputs.memory.view(torch.uint8)[: words * WORD].view(torch.int64)
        return lambda: numbers.bitwise_xor_(0)
    q_heads, k_heads = case.shape.q_heads, case.shape.k_heads
    q_words = words * q_heads // (q_heads + k_heads)
    start = inputs.memory.data_ptr()
    arguments = start, start + q_words * WORD, q_words, words - q_words
    return _limit_launch("limit_kernel", -(-words // threads), (threads,), arguments)


def limit_same_places(case: Case, inputs: Inputs, threads: int = 256) -> Call:
    """Read and write back just the slices of q and k that turn, in place.

    The memory is fetched in larger pieces than a slice may be, so this can take longer than the
    limit, which moves as many bytes that lie together.
    """
    shape = case.shape
    if case.device == "cpu":
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[case.itemsize]
        slices = [x.view(integer) for x in _slices(case, inputs)]
        return lambda: [x.bitwise_xor_(0) for x in slices]
    widths = shape.rotary_dim, shape.head_dim, shape.rotary_offset
    if any(width * case.itemsize % WORD for width in widths):
        raise UnsupportedError(f"slices of whole words of {WORD} bytes only")
    words, pitch, _ = (width * case.itemsize // WORD for width in widths)
    rows_of_a_block = max(1, threads // words)
    rows = [shape.batch * shape.tokens * heads for heads in (shape.q_heads, shape.k_heads)]
    arguments = *(x.data_ptr() for x in _slices(case, inputs)), *rows, pitch
    num_blocks = -(-sum(rows) // rows_of_a_block)
    return _limit_launch("limit_rows_kernel", num_blocks, (words, rows_of_a_block), arguments)


def _limit_launch(
    name: str, num_blocks: int, block: tuple[int, ...], arguments: tuple[int, ...]
) -> Call:
    cupy = imported("cupy")
    launch = functools.partial(_limit_kernel(name), (num_blocks,), block)
    arguments = *arguments, cupy.uint32(0)
    return lambda: launch(arguments, stream=_CurrentStream())


@functools.cache
def _limit_kernel(name: str) -> Any:
    code = (Path(__file__).parent / "limit.cu").read_text(encoding="utf-8")
    module = imported("cupy").RawModule(code=code, options=("-std=c++17",))
    return module.get_function(name)


class _CurrentStream:
    """PyTorch's current stream, as CuPy's launch reads it."""

    @property
    def ptr(self) -> int:
        return torch.cuda.current_stream().cuda_stream


def copy(case: Case, inputs: Inputs) -> Call:
    """Copy the bytes of q and k from one dense buffer to another."""
    numbers = inputs.memory.view(torch.uint8)[: case.heads_bytes // 2]
    copied = torch.empty_like(numbers)
    return lambda: copied.copy_(numbers)


def rope_cupy(case: Case, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk."""
    if case.variant == "sequences" and case.shape.batch > 1:
        raise UnsupportedError("packed sequences of one batch only")
    q, k = inputs.q, inputs.k
    table = inputs.table.form(_rope_cupy_table, case.table)
    how = inputs.how
    if case.table == "frequencies":
        if "positions" in how:
            raise UnsupportedError("the table's first row is not of position 0")
        how = how | {"positions": inputs.table.first}
    return functools.partial(
        imported("rope_cupy").apply_rotary_qk,
        q,
        k,
        table,
        interleaved=case.shape.interleaved,
        rotary_offset=case.shape.rotary_offset,
        out=None if case.variant == "new" else (q, k),
        **how,
    )


def _rope_cupy_table(table: Table, form: str) -> Any:
    view = imported("rope_cupy").RotaryTable
    if form == "elementwise":
        return view.from_elementwise(*table.form(full_width, torch.float32))
    if form == "full":
        return view.from_full_width(*table.form(full_width, torch.float32))
    if form == "cache":
        return view.from_cache(table.form(cache, torch.float32))
    if form == "complex":
        return view.from_complex(table.form(complex_numbers))
    if form == "matrices":
        return view.from_matrices(table.form(matrices))
    if form == "frequencies":
        return view.from_inverse_frequencies(table.inv_freq, like=table.cos, precompute=False)
    return view(table.cos, table.sin)


def rotated_by_torch(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    offset: int,
) -> torch.Tensor:
    """Return x (b, s, h, d) rotated, by PyTorch's own operations."""
    rows = slice(x.shape[1]) if positions is None else positions
    cos, sin = cos[rows][:, None], sin[rows][:, None]
    end = offset + 2 * cos.shape[-1]
    turning = x[..., offset:end].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = turned.to(x.dtype)
    if end - offset == x.shape[-1]:
        return turned
    return torch.cat([x[..., :offset], turned, x[..., end:]], dim=-1)


def rotated_qk_by_torch(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> Pair:
    """Return q and k rotated, by PyTorch's own operations."""
    return rotated_by_torch(q, *arguments), rotated_by_torch(k, *arguments)


def torch_eager(case: Case, inputs: Inputs) -> Call:
    """PyTorch's operations one by one, in float32 and into new arrays."""
    return functools.partial(rotated_qk_by_torch, *_torch_arguments(case, inputs))


def torch_compile(case: Case, inputs: Inputs) -> Call:
    """The same function compiled by torch.compile for the case's shape, into new arrays."""
    if case.device == "cpu":
        raise UnsupportedError("measured on a GPU only")
    return functools.partial(_compiled(case), *_torch_arguments(case, inputs))


@functools.lru_cache(maxsize=1)
def _compiled(case: Case) -> Callable[..., Pair]:
    torch.compiler.reset()  # else the shapes before count against the limit of recompilations
    return torch.compile(rotated_qk_by_torch, dynamic=False)


def _torch_arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    table, shape = inputs.table, case.shape
    _one_position(case)
    scalars = shape.interleaved, shape.rotary_offset
    return inputs.q, inputs.k, table.cos, table.sin, inputs.positions, *scalars


def liger(case: Case, inputs: Inputs) -> Call:
    """liger_kernel.transformers.rope.liger_rotary_pos_emb: a Triton kernel, in place.

    It copies what is not dense as (b, s, h, d), and returns the rotated copies.
    """
    gpu_only(case)
    shape = case.shape
    rotate = imported("liger_kernel.transformers.rope").liger_rotary_pos_emb
    if shape.interleaved:
        raise UnsupportedError("pairs of halves only")
    if shape.rotary_offset:
        raise UnsupportedError("no slice at an offset")
    _no_positions(inputs)
    _in_place_only(case)
    cos, sin = inputs.table.form(full_width, torch.float32)
    cos, sin = cos[None, : shape.tokens], sin[None, : shape.tokens]
    q, k = inputs.q.transpose(1, 2), inputs.k.transpose(1, 2)

    def call() -> Pair:
        q_out, k_out = rotate(q, k, cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return call


def flash_attn(case: Case, inputs: Inputs) -> Call:
    """flash_attn.layers.rotary: apply_rotary_emb, a Triton kernel."""
    gpu_only(case)
    library = imported("flash_attn.layers.rotary")
    if case.variant == "offsets":
        how = {"seqlen_offsets": inputs.how["seqlen_offsets"]}
    elif case.variant == "sequences":
        how = {"cu_seqlens": inputs.how["cu_seqlens"].int(), "max_seqlen": SEQUENCE}
    else:
        return _rotated_one_by_one(case, inputs, library, 256)
    shape, table = case.shape, inputs.table
    part = slice(0, SEQUENCE if case.variant == "sequences" else len(table.cos))
    rotate = functools.partial(
        library.apply_rotary_emb,
        cos=table.cos[part],
        sin=table.sin[part],
        interleaved=shape.interleaved,
        inplace=True,
        **how,
    )
    q, k = (x[0] if case.variant == "sequences" else x for x in _slices(case, inputs))
    return _whole(lambda: (rotate(q), rotate(k)), inputs)


def quack(case: Case, inputs: Inputs) -> Call:
    """quack.rotary: apply_rotary_emb, a kernel of CuTe's DSL."""
    gpu_only(case)
    if case.shape.head_dim % 8 or case.shape.rotary_dim % 8:
        raise UnsupportedError("multiples of 8 only")
    return _rotated_one_by_one(case, inputs, imported("quack.rotary"), 512)


def _rotated_one_by_one(case: Case, inputs: Inputs, library: Any, most: int) -> Call:
    """Call apply_rotary_emb for q and for k, and its form for a packed buffer, which takes both."""
    shape = case.shape
    _no_positions(inputs)
    if shape.rotary_offset and case.variant == "new":
        raise UnsupportedError("a new array of the slice alone")
    q, k = _slices(case, inputs) if shape.rotary_offset else (inputs.q, inputs.k)
    if q.shape[-1] > most:
        raise UnsupportedError(f"head_dim of {most} at most")
    tables = {"cos": inputs.table.cos, "sin": inputs.table.sin, "interleaved": shape.interleaved}
    if case.variant == "packed" and not shape.rotary_offset:
        heads = shape.q_heads + 2 * shape.k_heads
        size = shape.batch * shape.tokens * heads * shape.head_dim
        packed = inputs.memory[:size].view(shape.batch, shape.tokens, heads, shape.head_dim)
        rotate = functools.partial(library.apply_rotary_emb_qkv_, packed, **tables)
        return _whole(functools.partial(rotate, num_heads_q=shape.q_heads), inputs)
    inplace = case.variant != "new"
    rotate = functools.partial(library.apply_rotary_emb, **tables, inplace=inplace)

    def call() -> Pair:
        q_out, k_out = rotate(q), rotate(k)
        return (inputs.q, inputs.k) if inplace else (q_out, k_out)

    return call


def flashinfer(case: Case, inputs: Inputs) -> Call:
    """flashinfer.rope.apply_rope_with_cos_sin_cache, and its form in place."""
    gpu_only(case)
    shape = case.shape
    library = imported("flashinfer.rope")
    if shape.rotary_dim not in (64, 128, 256, 512):
        raise UnsupportedError("head_dim of 64, 128, 256 or 512")
    _sixteen_bits(case)
    table, positions = inputs.table.form(cache, torch.float32), _every_position(case, inputs)
    if case.variant == "new":
        if shape.rotary_dim != shape.head_dim:
            raise UnsupportedError("a new array of the slice alone")
        q, k = (x.view(-1, x.shape[2] * x.shape[3]) for x in (inputs.q, inputs.k))
        rotate = functools.partial(
            library.apply_rope_with_cos_sin_cache,
            positions,
            q,
            k,
            shape.head_dim,
            table,
            not shape.interleaved,
        )

        def call() -> Pair:
            q_out, k_out = rotate()
            return q_out.view(inputs.q.shape), k_out.view(inputs.k.shape)

        return call
    q, k = (_by_token(x) for x in _slices(case, inputs))
    rotate = functools.partial(
        library.apply_rope_with_cos_sin_cache_inplace,
        positions,
        q,
        k,
        shape.rotary_dim,
        table,
        not shape.interleaved,
    )
    return _whole(rotate, inputs)


def sglang(case: Case, inputs: Inputs) -> Call:
    """SGLang's fused kernel, in place, launched with programmatic dependent launch.

    `import sglang` needs most of what a server needs. So the package is found without importing it,
    and its public header is built as its own sglang.jit_kernel.rope builds it; what is called is
    the FusedRopeKernel that apply_rope_inplace calls, without the custom op around it.
    """
    gpu_only(case)
    shape = case.shape
    _in_place_only(case)
    _sixteen_bits(case)
    q, k = (_by_token(x) for x in _slices(case, inputs))
    if q.stride(1) != k.stride(1):
        raise UnsupportedError("one stride from head to head for q and k")
    run = _sglang_kernel(not shape.interleaved, shape.rotary_dim, case.dtype).run_rope
    table, positions = inputs.table.form(cache, torch.float32), _every_position(case, inputs)
    return _whole(functools.partial(run, q, k, table, positions), inputs)


@functools.cache
def _sglang_kernel(is_neox: bool, rotary_dim: int, dtype: str) -> Any:
    build = imported("tvm_ffi.cpp").load_inline
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise AbsentError("sglang is not installed")
    folder = Path(package.origin).parent / "jit_kernel"
    header = folder / "csrc" / "elementwise" / "rope.cuh"
    if not header.exists():
        raise AbsentError(f"sglang {version('SGLang')} has no {header.relative_to(folder.parent)}")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", f"{major}.{minor}")
    use_pdl = "true" if major >= 9 else "false"
    element = {"bfloat16": "bf16_t", "float16": "fp16_t"}[dtype]
    kernel = f"FusedRopeKernel<{str(is_neox).lower()}, {rotary_dim}, {use_pdl}, {element}>"
    return build(
        f"sglang_rope_{is_neox}_{rotary_dim}_{dtype}",
        cuda_sources=[
            f'#include "{header}"',
            f"TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_rope, ({kernel}::run));",
        ],
        extra_cflags=["-std=c++20", "-O3"],
        extra_cuda_cflags=[
            f"-DSGL_CUDA_ARCH={major * 100 + minor * 10}",
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
        ],
        extra_include_paths=[str(folder / "include")],
    )


def vllm(case: Case, inputs: Inputs) -> Call:
    """vllm._custom_ops.rotary_embedding, in place: what vLLM's layer RotaryEmbedding calls.

    The layer makes its table itself; this function takes one, in the dtype of q.
    """
    gpu_only(case)
    shape = case.shape
    rotate = imported("vllm._custom_ops").rotary_embedding
    _in_place_only(case)
    q, k = (_by_token(x) for x in _slices(case, inputs))
    table, positions = inputs.table.form(cache, q.dtype), _every_position(case, inputs)
    arguments = positions, q, k, shape.rotary_dim, table, not shape.interleaved
    return _whole(functools.partial(rotate, *arguments), inputs)


def comfy_kitchen(case: Case, inputs: Inputs) -> Call:
    """comfy_kitchen.apply_rope and its kin for halves and in place, on its fastest backend."""
    gpu_only(case)
    shape = case.shape
    library = imported("comfy_kitchen")
    _whole_heads_only(case)
    _no_positions(inputs)
    name = "apply_rope" if shape.interleaved else "apply_rope_split_half"
    rotate = getattr(library, name + ("" if case.variant == "new" else "_"))
    table = inputs.table.form(matrices)[None, : shape.tokens, None]
    return functools.partial(rotate, inputs.q, inputs.k, table)


def transformers(case: Case, inputs: Inputs) -> Call:
    """apply_rotary_pos_emb of transformers' Llama, with tables in the dtype of q; new arrays."""
    rotate = imported("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    if case.shape.interleaved:
        raise UnsupportedError("pairs of halves only")
    _whole_heads_only(case)
    _no_positions(inputs)
    tables = inputs.table.form(full_width, inputs.q.dtype)
    cos, sin = (part[None, : case.shape.tokens] for part in tables)
    return functools.partial(rotate, inputs.q, inputs.k, cos, sin, unsqueeze_dim=2)


def diffusers(case: Case, inputs: Inputs) -> Call:
    """diffusers.models.embeddings.apply_rotary_emb, for q and for k; new arrays.

    Neighbours turn by complex numbers, which is its shorter way, and halves by cosines and sines.
    """
    shape, table = case.shape, inputs.table
    function = imported("diffusers.models.embeddings").apply_rotary_emb
    _whole_heads_only(case)
    _no_positions(inputs)
    if case.itemsize > 4:
        raise UnsupportedError("computes in float32")
    if shape.interleaved:
        freqs = table.form(complex_numbers)[None, : shape.tokens]
        options: dict[str, Any] = {"use_real": False}
    else:
        freqs = tuple(part[: shape.tokens] for part in table.form(full_width, torch.float32))
        options = {"use_real_unbind_dim": -2, "sequence_dim": 1}
    rotate = functools.partial(function, freqs_cis=freqs, **options)
    return lambda: (rotate(inputs.q), rotate(inputs.k))


PROVIDERS: dict[str, Callable[..., Call]] = {
    "limit": limit,
    "limit, same places": limit_same_places,
    "copy": copy,
    "rope_cupy": rope_cupy,
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "Liger": liger,
    "flash-attn": flash_attn,
    "FlashInfer": flashinfer,
    "SGLang": sglang,
    "vLLM": vllm,
    "quack": quack,
    "comfy-kitchen": comfy_kitchen,
    "transformers": transformers,
    "diffusers": diffusers,
}
YARDSTICKS = ("limit", "limit, same places", "copy")  # these move the bytes and rotate nothing
# What a provider may be given besides; the fastest of them counts.
THREADS = [{"threads": threads} for threads in (128, 256, 512, 1024)]
OPTIONS: dict[str, list[dict[str, int]]] = {"limit": THREADS, "limit, same places": THREADS}
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
DISTRIBUTIONS = {
    "limit": CUPY,
    "limit, same places": CUPY,
    "copy": ("torch",),
    "rope_cupy": ("rope-cupy",),
    "torch eager": ("torch",),
    "torch.compile": ("torch",),
    "Liger": ("liger-kernel",),
    "flash-attn": ("flash-attn",),
    "FlashInfer": ("flashinfer-python",),
    "SGLang": ("sglang",),
    "vLLM": ("vllm",),
    "quack": ("quack-kernels",),
    "comfy-kitchen": ("comfy-kitchen",),
    "transformers": ("transformers",),
    "diffusers": ("diffusers",),
}


def version(provider: str) -> str:
    """Return the version of a provider's package, or nothing."""
    return report.version(*DISTRIBUTIONS.get(provider, ()))


def build_ahead(cases: list[Case], providers: list[str]) -> None:
    """Build what FlashInfer and SGLang compile, at once; a failure is met again in a call."""
    builds: list[Callable[[], Any]] = []
    if "FlashInfer" in providers:
        builds.append(_call_flashinfer)
    if "SGLang" in providers:
        keys = {(not case.shape.interleaved, case.shape.rotary_dim, case.dtype) for case in cases}
        builds += [functools.partial(_sglang_kernel, *key) for key in keys]

    def attempt(build: Callable[[], Any]) -> None:
        try:
            build()
        except Exception:
            return

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(attempt, builds))


def _call_flashinfer() -> None:
    rotate = imported("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    positions = torch.zeros(1, dtype=torch.int64, device="cuda")
    q, k = torch.zeros(2, 1, 64, dtype=torch.bfloat16, device="cuda")
    rotate(positions, q, k, 64, torch.zeros(1, 64, device="cuda"))


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise AbsentError(f"{package} is not installed" if missing else str(error)) from error


def gpu_only(case: Case) -> None:
    if case.device == "cpu":
        raise UnsupportedError("runs on a GPU only")


def _one_position(case: Case) -> None:
    if case.variant in BY_AXES:
        raise UnsupportedError("one position of a token only")


def _no_positions(inputs: Inputs) -> None:
    if inputs.positions is not None:
        raise UnsupportedError("takes no positions")


def _whole_heads_only(case: Case) -> None:
    if case.shape.rotary_dim != case.shape.head_dim:
        raise UnsupportedError("whole heads only")


def _in_place_only(case: Case) -> None:
    if case.variant == "new":
        raise UnsupportedError("rotates in place only")


def _sixteen_bits(case: Case) -> None:
    if case.itemsize != 2:
        raise UnsupportedError("float16 and bfloat16 only")


def _slices(case: Case, inputs: Inputs) -> Pair:
    """Return the parts of q and k that turn, which is how a slice of a head is passed to most."""
    shape = case.shape
    part = slice(shape.rotary_offset, shape.rotary_offset + shape.rotary_dim)
    return inputs.q[..., part], inputs.k[..., part]


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """Return (b, s, h, d) as (b * s, h, d), without a copy."""
    try:
        return x.view(-1, *x.shape[2:])
    except RuntimeError as error:
        raise UnsupportedError("all tokens must lie at one stride from each other") from error


def _every_position(case: Case, inputs: Inputs) -> torch.Tensor:
    """Return a position for each token of the batch, for those who must have them."""
    _one_position(case)
    if inputs.positions is None:
        positions = torch.arange(case.shape.tokens, device=inputs.q.device)
    else:
        positions = inputs.positions
    return positions.repeat(case.shape.batch)


def _whole(rotate: Call, inputs: Inputs) -> Call:
    """Return a call that rotates in place and returns q and k."""

    def call() -> Pair:
        rotate()
        return inputs.q, inputs.k

    return call
