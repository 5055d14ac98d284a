"""What holds for all modules of rope_cupy.compat: signatures, imports, arrays, no gradient."""

import ast
import importlib
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from compat_reference import check, rotate, signature, table, values

import rope_cupy
from rope_cupy.compat import (
    comfy_kitchen,
    flash_attn,
    flashinfer,
    liger,
    sglang,
    timm,
    torchtitan,
    vllm,
)

FOLDER = Path(rope_cupy.__file__).parent / "compat"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
OF_FLASHINFER = "rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0"
OF_LLAMA = (
    "rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0, low_freq_factor=1, "
    "high_freq_factor=4, old_context_len=8192"
)
OF_RMS = "q, k, freqs_cis, q_scale, k_scale=None, epsilon=1e-06"
OF_QKNORM = (
    "q_weight, k_weight, cos_sin_cache, positions, *, is_neox, eps=1e-06, head_dim=0, rope_dim=0, "
    "round_norm_before_rope=False, cache_has_full_width=False"
)

SIGNATURES = {  # of the peers' functions, read from their releases
    "flash_attn": {
        "apply_rotary": "(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, "
        "interleaved=False, inplace=False, conjugate=False)",
        "apply_rotary_emb": "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, "
        "cu_seqlens=None, max_seqlen=None)",
        "apply_rotary_emb_func": "(x, cos, sin, interleaved=False, inplace=False, "
        "seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)",
        "apply_rotary_emb_qkv_": "(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, "
        "seqlen_offsets=0, num_heads_q=None)",
        "apply_rotary_emb_kv_": "(kv, cos, sin, interleaved=False, seqlen_offsets=0)",
        "apply_rotary_emb_torch": "(x, cos, sin, interleaved=False)",
        "RotaryEmbedding": "(dim, base=10000.0, interleaved=False, scale_base=None, device=None)",
        "RotaryEmbedding.forward": "(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, "
        "num_heads_q=None)",
    },
    "quack": {
        "apply_rotary": "(x, cos, sin, seqlen_offsets=None, cu_seqlens=None, max_seqlen=None, "
        "interleaved=False, inplace=False, conjugate=False)",
        "apply_rotary_emb": "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=None, "
        "cu_seqlens=None, max_seqlen=None)",
        "apply_rotary_emb_func": "(x, cos, sin, interleaved=False, inplace=False, "
        "seqlen_offsets=None, cu_seqlens=None, max_seqlen=None)",
        "apply_rotary_emb_qkv_": "(qkv, cos, sin, interleaved=False, seqlen_offsets=None, "
        "num_heads_q=None, cu_seqlens=None, max_seqlen=None, headdim=None)",
        "apply_rotary_emb_kv_": "(kv, cos, sin, interleaved=False, seqlen_offsets=None)",
    },
    "flashinfer": {
        **{
            f"apply_rope{place}": f"(q, k, indptr, offsets, {OF_FLASHINFER})"
            for place in ("", "_inplace")
        },
        **{
            f"apply_llama31_rope{place}": f"(q, k, indptr, offsets, {OF_LLAMA})"
            for place in ("", "_inplace")
        },
        **{
            f"apply_rope_pos_ids{place}": f"(q, k, pos_ids, {OF_FLASHINFER})"
            for place in ("", "_inplace")
        },
        **{
            f"apply_llama31_rope_pos_ids{place}": f"(q, k, pos_ids, {OF_LLAMA})"
            for place in ("", "_inplace")
        },
        **{
            f"apply_rope_with_cos_sin_cache{place}": "(positions, query, key, head_size, "
            "cos_sin_cache, is_neox=True)"
            for place in ("", "_inplace")
        },
    },
    "vllm": {
        "rotary_embedding": "(positions, query, key, head_size, cos_sin_cache, is_neox, "
        "rope_dim_offset=0, inverse=False)",
        "fused_qk_norm_rope": "(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, "
        "q_weight, k_weight, cos_sin_cache, is_neox, position_ids, "
        "forced_token_heads_per_warp=-1)",
        "triton_mrope": "(q, k, cos, sin, mrope_section, head_size, rotary_dim, "
        "mrope_interleaved, is_neox_style)",
        "fused_qk_rmsnorm_rope_gate": "(q_gate, k, q_weight, k_weight, cos_sin_cache, positions, "
        "eps, num_q_heads, num_kv_heads, head_dim, rotary_dim, mrope_section=None, norm_beta=0.0)",
        "RotaryEmbeddingOverride.forward_oot": "(self, positions, query, key=None)",
        "RotaryEmbeddingOverride.forward_cuda": "(self, positions, query, key=None)",
    },
    "sglang": {
        "rotary_embedding_cos_sin": "(cos, sin, query, key=None, head_size=0, interleaved=None, "
        "positions=None, *, is_neox=None)",
        # Pull request 14302's, and that of releases, which has the cache where interleaved is.
        "rotary_embedding": "(positions, query, key=None, head_size=0, interleaved=None, "
        "is_neox=None, *, cos_sin_cache=None)",
        "apply_rotary_embedding": "(*, mode='cos_sin', query, key=None, head_size=0, "
        "interleaved=None, is_neox=None, cos=None, sin=None, positions=None, cos_sin_cache=None)",
        "can_use_rotary_embedding_cos_sin": "(rot_dim)",
        "apply_rope_inplace": "(q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0)",
        "apply_rope_inplace_with_kvcache": "(q, k, v, k_cache, v_cache, cos_sin_cache, positions, "
        "out_loc, *, is_neox, rope_dim=0)",
        "apply_rope_with_cos_sin_cache_inplace": "(q, k, cos_sin_cache, positions, *, is_neox, "
        "rope_dim=0, fused_args=None)",
        "apply_rope_with_cos_sin_cache_inplace_by_head_size": "(positions, query, key, head_size, "
        "cos_sin_cache, is_neox=True, fused_set_kv_buffer_arg=None, enable_pdl=None)",
        "FusedSetKVBufferArg": "(value, k_buffer, v_buffer, cache_loc, k_scale=None, v_scale=None)",
        "fused_inplace_qknorm_rope": f"(q, k, {OF_QKNORM})",
        "fused_qknorm_rope_out_of_place": f"(q, k, q_out, k_out, {OF_QKNORM})",
        "apply_rotary_embedding_triton": "(x, cos, sin, interleaved=False)",
    },
    "liger": {
        "liger_rotary_pos_emb": "(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, "
        "rotary_dim=None)",
        "liger_rotary_pos_emb_gpt_oss": "(q, k, cos, sin)",
        "liger_rotary_pos_emb_vision": "(q, k, cos, sin)",
        "liger_multimodal_rotary_pos_emb": "(q, k, cos, sin, mrope_section, unsqueeze_dim=1)",
        "liger_llama4_text_rotary_pos_emb": "(xq, xk, freqs_cis)",
        "liger_llama4_vision_rotary_pos_emb": "(query, key, freqs_ci)",
    },
    "transformer_engine": {
        "apply_rotary_pos_emb": "(t, freqs, tensor_format='sbhd', start_positions=None, "
        "interleaved=False, fused=False, cu_seqlens=None, cp_size=1, cp_rank=0)",
        "apply_fused_qkv_rotary_pos_emb": "(qkv, q_freqs, k_freqs, qkv_split_arg_list, "
        "tensor_format='sbhd', start_positions=None, interleaved=False, cu_seqlens=None, "
        "cp_size=1, cp_rank=0)",
        "RotaryPositionEmbedding": "(dim, rotary_percent=1.0, seq_len_interpolation_factor=None, "
        "pretrained_max_position_embeddings=None, rotary_base=10000.0, interleaved=False)",
        "RotaryPositionEmbedding.forward": "(self, max_seq_len, offset=0)",
    },
    "apex": {
        "fused_apply_rotary_pos_emb": "(t, freqs, transpose_output_memory=False)",
        "fused_apply_rotary_pos_emb_2d": "(t, img_h, img_w, cos_h, sin_h, cos_w, sin_w)",
        "fused_apply_rotary_pos_emb_cached": "(t, cos_, sin_, transpose_output_memory=False)",
        "fused_apply_rotary_pos_emb_thd": "(t, cu_seqlens, freqs)",
        "forward": "(input, freqs, transpose_output, /)",  # whose arguments have no names
        "backward": "(output_grads, freqs, transpose_output, /)",
        "forward_cached": "(input, cos, sin, transpose_output, /)",
        "backward_cached": "(output_grads, cos, sin, transpose_output, /)",
        "forward_thd": "(input, cu_seqlens, freqs, /)",
        "backward_thd": "(output_grads, cu_seqlens, freqs, /)",
        "forward_2d": "(input, cos_h, sin_h, cos_w, sin_w, /)",
        "backward_2d": "(output_grads, cos_h, sin_h, cos_w, sin_w, /)",
    },
    "comfy_kitchen": {
        **{f"apply_rope{name}": "(xq, xk, freqs_cis)" for name in ("", "_")},
        **{f"apply_rope{name}": "(x, freqs_cis)" for name in ("1", "1_")},
        **{f"apply_rope_split_half{name}": "(xq, xk, freqs_cis)" for name in ("", "_")},
        **{f"apply_rope_split_half{name}": "(x, freqs_cis)" for name in ("1", "1_")},
        **{f"rms_rope{name}": f"({OF_RMS})" for name in ("", "_")},
        **{f"rms_rope{name}": "(x, freqs_cis, scale, epsilon=1e-06)" for name in ("1", "1_")},
        **{f"rms_rope_split_half{name}": f"({OF_RMS}, rot_dim=0)" for name in ("", "_")},
        **{
            f"rms_rope_split_half{name}": "(x, freqs_cis, scale, epsilon=1e-06)"
            for name in ("1", "1_")
        },
    },
    "torchtitan": {
        "apply_rotary_emb": "(query, key, rope_cache)",
        "ComplexRoPE.apply_rotary_emb": "(query, key, rope_cache)",
        "CosSinRoPE.apply_rotary_emb": "(query, key, rope_cache)",
    },
    "timm": {
        "apply_rot_embed": "(x, sin_emb, cos_emb, half=False)",
        "apply_rot_embed_list": "(x, sin_emb, cos_emb, half=False)",
        "apply_rot_embed_cat": "(x, emb, half=False)",
    },
}


@pytest.mark.parametrize("peer", MODULES)
def test_signatures_are_the_peers(peer):
    module = importlib.import_module(f"rope_cupy.compat.{peer}")
    told = {name.partition(".")[0] for name in SIGNATURES[peer]}
    assert told == set(module.__all__)
    for name, text in SIGNATURES[peer].items():
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        assert signature(function) == text, name


@pytest.mark.parametrize("peer", MODULES)
def test_the_docstring_the_readme_and_the_page_say_what_to_import_and_what_differs(peer):
    module = importlib.import_module(f"rope_cupy.compat.{peer}")
    first, differs = module.__doc__.split("\n\n")[:2]
    assert "write `" in first and peer in first and " for `" in " ".join(first.split())
    assert differs.startswith("What differs: ")
    for page in ("README.md", "docs/other-libraries.md"):
        text = (FOLDER.parents[1] / page).read_text(encoding="utf-8")
        (row,) = re.findall(rf"^\| .* \| .*`[a-z_.]*\.{peer}`.* \| .+ \|$", text, re.M)
        assert "rope_cupy.compat." in row


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_modules_stand_on_public_names_alone(path):
    allowed = {"rope_cupy", "torch", "numpy", "__future__", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] in allowed
            if node.module == "rope_cupy":
                assert {alias.name for alias in node.names} <= set(rope_cupy.__all__)
            else:
                assert not (node.module or "").startswith("rope_cupy.")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and (FOLDER / f"{node.module}.py").exists()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "rope_cupy":
                assert node.attr in rope_cupy.__all__


def test_modules_without_modules_of_pytorch_import_no_pytorch():
    modules = [m for m in MODULES if m not in ("flash_attn", "quack", "transformer_engine")]
    names = ", ".join(modules)
    code = f"from rope_cupy.compat import {names}; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def weights(count, dim):
    return [torch.nn.Parameter(torch.ones(dim)) for _ in range(count)]


def heads(*counts, dim=16):
    """What a projection gives in grad mode: no leaves, and they require a gradient."""
    return [values(5, n, dim, dtype=torch.float32).requires_grad_() * 1 for n in counts]


POSITIONS = torch.arange(5)


def cache(dim=16):
    return torch.cat(table(8, dim // 2, dtype=torch.float32), -1)


INFERENCE = {
    "flash_attn.apply_rotary": lambda q, k, a, b: flash_attn.apply_rotary(
        q[None], *table(8, 8, dtype=torch.float32), inplace=True
    ),
    "flashinfer.apply_rope_pos_ids": lambda q, k, a, b: flashinfer.apply_rope_pos_ids(
        q, k, POSITIONS
    ),
    "flashinfer.apply_rope_with_cos_sin_cache_inplace": lambda q, k, a, b: (
        flashinfer.apply_rope_with_cos_sin_cache_inplace(POSITIONS, q, k, 16, cache())
    ),
    "vllm.rotary_embedding": lambda q, k, a, b: vllm.rotary_embedding(
        POSITIONS, q, k, 16, cache(), True
    ),
    "vllm.fused_qk_norm_rope": lambda q, k, a, b: vllm.fused_qk_norm_rope(
        torch.cat([q, k, k], 1).flatten(1), 4, 2, 2, 16, 1e-6, a, b, cache(), True, POSITIONS
    ),
    "vllm.fused_qk_rmsnorm_rope_gate": lambda q, k, a, b: vllm.fused_qk_rmsnorm_rope_gate(
        q.flatten(1), k.flatten(1), a, b, cache(), POSITIONS, 1e-6, 2, 2, 16, 16
    ),
    "sglang.apply_rope_inplace": lambda q, k, a, b: sglang.apply_rope_inplace(
        q, k, cache(), POSITIONS, is_neox=True
    ),
    "sglang.apply_rope_inplace_with_kvcache": lambda q, k, a, b: (
        sglang.apply_rope_inplace_with_kvcache(
            *(q, k, k.clone(), *torch.zeros(2, 8, 32), cache(), POSITIONS, POSITIONS), is_neox=True
        )
    ),
    "sglang.fused_inplace_qknorm_rope": lambda q, k, a, b: sglang.fused_inplace_qknorm_rope(
        q, k, a, b, cache(), POSITIONS, is_neox=False
    ),
    "comfy_kitchen.rms_rope_": lambda q, k, a, b: comfy_kitchen.rms_rope_(
        q.detach(), k.detach(), torch.eye(2).expand(5, 1, 8, 2, 2), a, b
    ),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_functions_for_inference_take_parameters_in_grad_mode(name):
    q, k = heads(4, 2)
    result = INFERENCE[name](q, k, *weights(2, 16))
    for each in result if isinstance(result, tuple) else ():
        assert not each.requires_grad
    assert torch.is_grad_enabled()


def of_numpy(x):
    return np.asarray(x)


def of_cupy(x):
    return pytest.importorskip("cupy").asarray(of_numpy(x))


@pytest.mark.parametrize("array", [of_numpy, pytest.param(of_cupy, marks=pytest.mark.gpu)])
def test_other_libraries_arrays(array):
    """Functions whose arguments are arrays alone take those of NumPy and CuPy."""
    q, k = (values(5, n, 16, dtype=torch.float32) for n in (4, 2))
    cos, sin = (part[:5] for part in table(5, 8, dtype=torch.float32))
    neox, neighbours = (rotate(q, cos[:, None], sin[:, None], interleaved=i) for i in (False, True))

    def right(y, exact):
        assert type(y) is type(array(q))
        check(torch.from_numpy(np.asarray(y.get() if hasattr(y, "get") else y)), exact)

    def new(*xs):
        return [array(x.clone()) for x in xs]

    positions, cos_sin = array(POSITIONS), array(torch.cat([cos, sin], -1))
    qa, ka = new(q, k)
    vllm.rotary_embedding(positions, qa, ka, 16, cos_sin, False)
    right(qa, neighbours)
    qa, ka = new(q.flatten(1), k.flatten(1))
    axes = [array(part.expand(3, -1, -1)) for part in (cos, sin)]
    qa, _ = vllm.triton_mrope(qa, ka, *axes, [2, 3, 3], 16, 16, False, True)
    right(qa.reshape(5, 4, 16), neox)
    qa, ka = new(q, k)
    sglang.apply_rope_inplace(qa, ka, cos_sin, positions, is_neox=True)
    right(qa, neox)
    qa, ka = new(q, k)
    sglang.rotary_embedding_cos_sin(array(cos), array(sin), qa, ka)
    right(qa, neighbours)
    right(flashinfer.apply_rope_with_cos_sin_cache(positions, *new(q, k), 16, cos_sin)[0], neox)
    exact = 1e4 ** -(torch.arange(8).double() / 8) * POSITIONS[:, None]
    by_theta = rotate(q, exact.cos()[:, None], exact.sin()[:, None])
    right(flashinfer.apply_rope_pos_ids(*new(q, k), positions)[0], by_theta)
    wide = [array(torch.cat([part, part], -1)) for part in (cos, sin)]
    right(liger.liger_rotary_pos_emb_vision(*new(q, k), *wide)[0], neox)
    qa, ka = (x.swapaxes(0, 1)[None] for x in new(q, k))
    right(liger.liger_rotary_pos_emb(qa, ka, *wide)[0][0].swapaxes(0, 1), neox)
    qa, ka = (x[None] for x in new(q, k))
    prepared = array(torch.cat([cos, cos, sin, sin], -1))
    right(torchtitan.apply_rotary_emb(qa, ka, prepared)[0][0], neox)
    y = timm.apply_rot_embed(array(q.transpose(0, 1)), wide[1], wide[0], half=True)
    right(y.swapaxes(0, 1), neox)
    freqs = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))[:, None]
    right(comfy_kitchen.apply_rope1_(new(q)[0], array(freqs)), neighbours)
    right(comfy_kitchen.apply_rope(*new(q, k), array(freqs))[0], neighbours)


TABLE_CALLS = {  # of q (1, tokens, heads, 16) by cosines and sines (tokens, 8), and their shape
    "vllm.rotary_embedding": lambda q, cos_sin: vllm.rotary_embedding(
        POSITIONS, q[0], None, 16, cos_sin, True
    ),
    "sglang.apply_rope_inplace": lambda q, cos_sin: sglang.apply_rope_inplace(
        q[0], q[0].clone(), cos_sin, POSITIONS, is_neox=True
    ),
    "flashinfer.apply_rope_with_cos_sin_cache_inplace": lambda q, cos_sin: (
        flashinfer.apply_rope_with_cos_sin_cache_inplace(POSITIONS, q[0], q[0].clone(), 16, cos_sin)
    ),
}


@pytest.mark.parametrize("name", TABLE_CALLS)
def test_a_table_is_read_where_it_is_now_and_as_it_is_now(name):
    """A view of a cache is kept: its values may change, it may move, shrink or be turned."""
    call, q = TABLE_CALLS[name], values(1, 5, 4, 16, dtype=torch.float32)

    def check_by(cos_sin):
        x = q.clone()
        call(x, cos_sin)
        cos, sin = (part[:5, None] for part in cos_sin.chunk(2, -1))
        check(x, rotate(q, cos, sin))

    cos_sin = torch.cat(table(16, 8, dtype=torch.float32), -1)
    other = torch.cat(table(16, 8, dtype=torch.float32, base=10.0), -1)
    check_by(cos_sin)
    cos_sin.copy_(other)
    check_by(cos_sin)
    cos_sin.data = torch.cat(table(16, 8, dtype=torch.float32, base=1e3), -1)
    check_by(cos_sin)
    cos_sin.t_()  # as many rows as columns
    check_by(cos_sin)
    cos_sin.data = other
    check_by(cos_sin)
    cos_sin.resize_(5, 16)
    check_by(cos_sin)
    cos_sin.resize_(3, 16)
    x = q.clone()
    call(x, cos_sin)
    assert x[:, 3:].isnan().all() and not x[:, :3].isnan().any()


def test_what_a_reshape_would_copy_is_not_kept():
    """Sections of a table that lie apart are read anew, for a copy would not see new values."""
    q, k = (values(5, n * 16, dtype=torch.float32) for n in (4, 2))
    wide = torch.zeros(5, 3, 16)
    cos, sin = wide.transpose(0, 1).chunk(2, -1)  # whose first two axes are no one axis
    for base in (10.0, 100.0):
        wide.copy_(torch.cat(table(5, 8, dtype=torch.float32, base=base), -1)[:, None])
        x = q.clone()
        vllm.triton_mrope(x, k.clone(), cos, sin, [2, 3, 3], 16, 16, False, True)
        exact = rotate(q.unflatten(1, (4, 16)), cos[0][:, None], sin[0][:, None])
        check(x.unflatten(1, (4, 16)), exact)


def test_kept_views_are_few_and_end_with_their_tensors():
    from rope_cupy.compat import _shared

    _shared._views.clear()
    caches = [torch.cat(table(8, 8, dtype=torch.float32), -1) for _ in range(300)]
    for each in caches:
        _shared.cache_table(each)
    assert len(_shared._views) == _shared.MAX_VIEWS
    assert _shared.cache_table(each) is _shared.cache_table(each)
    memory = np.zeros((8, 16), np.float32)
    alive, last = weakref.ref(memory), torch.from_numpy(memory)
    _shared.cache_table(last)
    del caches, each, memory
    assert len(_shared._views) == 1 and alive() is not None
    del last
    assert not _shared._views and alive() is None


def test_a_table_that_requires_a_gradient_is_refused_though_a_view_of_it_is_kept():
    q, prepared = values(1, 5, 4, 16, dtype=torch.float32), torch.ones(1, 5, 1, 32)
    torchtitan.apply_rotary_emb(q, q, prepared)
    prepared.requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient"):
        torchtitan.apply_rotary_emb(q, q, prepared)
