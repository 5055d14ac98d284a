"""benchmarks/bench_blocks.py, on the CPU: blocks with rope_cupy give what diffusers' own give."""

import math

import pytest
import torch
from result import WrongError
from test_bench_host import MACHINE, rows_of

pytest.importorskip("diffusers")

import bench_blocks
from bench_blocks import (
    COMPILED,
    DIFFUSERS,
    KINDS,
    OURS,
    Call,
    QwenImageProcessor,
    WanProcessor,
)
from diffusers.models.transformers import transformer_qwenimage, transformer_wan

from rope_cupy import apply_qk_norm_rotary, apply_rotary_qk

CALLS = [("qwen-image", OURS), ("wan-2.1-14b-480p", OURS)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)
    with torch.no_grad():
        yield


def made(kind, dtype="float32", batch=1, mask=None):
    """A small block, and masks of its text where they are asked for."""
    size = KINDS[kind].small._replace(batch=batch)
    block = KINDS[kind].make(size, "cpu", getattr(torch, dtype))
    if mask is not None:
        block.inputs["encoder_hidden_states_mask"] = mask(size)
    return block


def two_tokens_left_out(size):
    mask = torch.ones(size.batch, size.text, dtype=torch.bool)
    mask[-1, 3] = mask[-1, -1] = False
    return mask


def checked(block, call):
    """How the outputs of a call agree with the exact ones and with diffusers' own."""
    found = Call(block, block.processors[call]).outputs()
    theirs, exact = Call(block).outputs(), bench_blocks.exact_outputs(block)
    return bench_blocks.checked(found, theirs, exact)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "call"), CALLS)
def test_a_block_gives_the_same_output_but_for_rounding(kind, call, dtype, batch):
    agreements = checked(made(kind, dtype, batch), call)
    assert set(agreements) == {"attention", "block"}
    for agreement in agreements.values():
        if dtype == "float32":
            assert agreement.error < 1e-6 and agreement.difference < 1e-6
        else:
            assert 1e-3 < agreement.error < 6e-3 and agreement.difference < 5e-3


@pytest.mark.host_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_give_the_same_output(kind):
    checked(made(kind, "bfloat16", batch=2), OURS)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_the_text_are_left_out_by_a_mask(dtype, batch, call=OURS):
    block = made("qwen-image", dtype, batch, two_tokens_left_out)
    checked(block, call)
    masked = Call(block, block.processors[call])()
    block.inputs["encoder_hidden_states_mask"] = None
    unmasked = Call(block, block.processors[call])()
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(masked, unmasked, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_q_and_k_are_written_where_the_attention_reads_them(monkeypatch, batch):
    outs, attended, copied = [], [], []

    def spy(module, name, seen):
        function = getattr(module, name)

        def seeing(*arguments, **options):
            seen.append((arguments, options))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, seeing)

    block = made("qwen-image", batch=batch)
    ours = Call(block, block.processors[OURS])
    spy(bench_blocks, "apply_qk_norm_rotary", outs)
    spy(bench_blocks, "dispatch_attention_fn", attended)
    spy(torch, "cat", copied)
    ours()
    assert len(copied) == 1
    (((q, k, v, mask), _),) = attended
    assert mask is None
    size = KINDS["qwen-image"].small
    assert q.shape == k.shape == v.shape == (batch, size.text + size.tokens, 4, 32)
    image, text = (options["out"] for _, options in outs)
    for joint, of_image, of_text in zip((q, k), image, text, strict=True):
        assert joint.is_contiguous()
        for slice_of_it, first, tokens in (
            (of_text, 0, size.text),
            (of_image, size.text, size.tokens),
        ):
            assert slice_of_it.data_ptr() == joint[:, first:].data_ptr()
            assert slice_of_it.shape == (batch, tokens, size.dim)
            assert slice_of_it.stride() == (joint.stride(0), size.dim, 1)


def back(rotate, *arguments, **options):
    return rotate(*arguments, conjugate=True, **options)


def weights_swapped(rotate, q, k, q_weight, k_weight, *arguments, **options):
    return rotate(q, k, k_weight, q_weight, *arguments, **options)


def not_normalised(rotate, q, k, q_weight, k_weight, table, *, out, **options):
    how = {name: options[name] for name in ("interleaved", "head_dim")}
    return apply_rotary_qk(q, k, table, out=out, **how)


def halves_paired(rotate, *arguments, interleaved, **options):
    return rotate(*arguments, interleaved=False, **options)


def last_token_left(rotate, q, k, *arguments, out, **options):
    before = k[:, -1].clone()
    rotate(q, k, *arguments, out=out, **options)
    out[1][:, -1] = before


@pytest.mark.parametrize(
    "wrong", [back, weights_swapped, not_normalised, halves_paired, last_token_left]
)
@pytest.mark.parametrize(("kind", "call"), CALLS)
def test_what_is_wrong_is_not_timed(monkeypatch, kind, call, wrong):
    monkeypatch.setattr(
        bench_blocks,
        "apply_qk_norm_rotary",
        lambda *arguments, **options: wrong(apply_qk_norm_rotary, *arguments, **options),
    )
    block = made(kind, "bfloat16")
    with pytest.raises(WrongError, match=r"^attention: (error|difference from diffusers')"):
        checked(block, call)
    results, agreements = bench_blocks.measured(block, "cpu", 1, with_compiled=False)
    assert list(results) == [DIFFUSERS, *block.processors]
    for name, result in results.items():
        right = name == DIFFUSERS
        assert result.status == ("ok" if right else "wrong")
        assert (result.microseconds is not None) == right == (name in agreements)


def test_an_output_that_is_no_number_or_of_another_dtype_is_wrong():
    exact = {"block": (torch.ones(4), torch.ones(4))}
    with pytest.raises(WrongError, match="block: error nan"):
        bench_blocks.checked({"block": (torch.ones(4), torch.full((4,), math.nan))}, exact, exact)
    with pytest.raises(WrongError, match=r"block: torch.bfloat16 of shape \(4,\)"):
        bench_blocks.checked({"block": (torch.ones(4), torch.ones(4).bfloat16())}, exact, exact)


def test_a_whole_qwen_image_gives_the_same_output():
    model = transformer_qwenimage.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 30, 16),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "encoder_hidden_states_mask": torch.ones(2, 7),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_shapes": [[(1, 5, 6)]] * 2,
    }
    inputs["encoder_hidden_states_mask"][1, 4:] = 0
    expected = model(**inputs).sample
    model.set_attn_processor(QwenImageProcessor())
    model.set_attention_backend("native")
    backends = {each._attention_backend for each in model.attn_processors.values()}
    assert backends == {"native"}
    assert_same(model(**inputs).sample, expected)


def test_a_whole_wan_gives_the_same_output():
    model = transformer_wan.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=20,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 10),
        "timestep": torch.tensor([30, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }
    expected = model(**inputs).sample
    for block in model.blocks:
        block.attn1.set_processor(WanProcessor())
    assert_same(model(**inputs).sample, expected)


def assert_same(found, expected):
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_times_of_all_calls_without_a_gpu(tmp_path):
    path = tmp_path / "new" / "blocks.csv"
    rows, printed = rows_of("bench_blocks.py", path)
    assert list(rows[0])[: len(MACHINE)] == MACHINE
    compiled = [DIFFUSERS + COMPILED, OURS + COMPILED]
    assert [(row["block"], row["call"]) for row in rows] == [
        *(("qwen-image", call) for call in (DIFFUSERS, OURS, *compiled)),
        *(("wan-2.1-14b-480p", call) for call in (DIFFUSERS, OURS, *compiled)),
    ]
    for row in rows:
        size = KINDS[row["block"]].small
        assert row["tokens"] == str(size.tokens) and row["text"] == str(size.text)
        assert (row["batch"], row["dtype"]) == ("1", "bfloat16")
        if row["call"] in compiled:
            assert (row["status"], row["reason"]) == ("unsupported", "runs on a GPU only")
            assert row["milliseconds"] == row["speedup"] == row["block_error"] == ""
            continue
        assert (row["status"], row["reason"]) == ("ok", "")
        eager = next(each for each in rows if each["block"] == row["block"])
        speedup = float(eager["milliseconds"]) / float(row["milliseconds"])
        assert float(row["speedup"]) == pytest.approx(speedup, rel=2e-3, abs=1e-3)
        for name in ("block", "attention"):
            assert 1e-3 < float(row[f"{name}_error"]) < 6e-3
            difference = float(row[f"{name}_difference"])
            assert (difference == 0) == (row["call"] == DIFFUSERS) and difference < 5e-3
    assert "qwen-image, 120 tokens and 40 of text: a block" in printed


def test_quick_measures_the_blocks_that_are_named_and_compiles_nothing(tmp_path):
    options = ["--quick", "--blocks=wan-2.1-14b-480p", "--dtype=float32"]
    rows, _ = rows_of("bench_blocks.py", tmp_path / "blocks.csv", *options)
    assert [(row["block"], row["call"], row["dtype"]) for row in rows] == [
        ("wan-2.1-14b-480p", DIFFUSERS, "float32"),
        ("wan-2.1-14b-480p", OURS, "float32"),
    ]


def test_the_blocks_have_the_sizes_of_their_models():
    """Those of the configs of Qwen/Qwen-Image and Wan-AI/Wan2.1-T2V-14B-Diffusers."""
    qwen, wan = (KINDS[name].size for name in ("qwen-image", "wan-2.1-14b-480p"))
    assert (qwen.heads, qwen.head_dim, qwen.dim) == (24, 128, 3072)
    assert (qwen.tokens, qwen.text, qwen.batch) == (4096, 512, 1)
    assert (wan.heads, wan.head_dim, wan.dim, wan.hidden) == (40, 128, 5120, 13824)
    assert (wan.tokens, wan.text, wan.batch) == (32760, 512, 1)
