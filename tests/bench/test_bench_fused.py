"""benchmarks/bench_fused.py, on the CPU: what it counts, compares and wants."""

import sys

import bench_fused
import peers
import pytest
import torch
from bench_fused import NAMES, OURS, ROTATION, Goal, goals
from peers import PEERS, Peer
from peers.pytorch import store
from peers.rope_cupy import alone, fused
from result import Result
from runner import limit_share, measured_task
from shapes import SHAPES, Shape, chosen
from tasks import BLOCK, FUSED_OPS, TOLERANCE, Task
from test_bench_host import MACHINE, rows_of

import rope_cupy

TINY = {
    "halves": Shape("halves", 2, 20, 4, 2, 16, 16, 0, False),
    "neighbours": Shape("neighbours", 1, 600, 2, 2, 16, 16, 0, True),  # longer than a sequence
    "slice": Shape("slice", 2, 5, 4, 2, 24, 8, 8, True),
}
ON_A_GPU = {"SGLang", "comfy-kitchen", "FlashInfer", "Liger", "torch.compile", "two launches"}
ON_A_GPU |= {"vLLM", "flash-attn", "quack"}


def task(op, shape="halves"):
    shape = TINY.get(shape) or SHAPES[shape]
    return Task(shape, variant=FUSED_OPS[op].variant, device="cpu", name=op)


def names_of(op):
    return peers.names_for(FUSED_OPS[op].kind)


def test_the_script_writes_a_row_for_each_provider_of_each_operation(tmp_path):
    path = tmp_path / "new" / "fused.csv"
    rows, printed = rows_of("bench_fused.py", path, "--quick", "--goals", "--ops=norm head,cache")
    assert list(rows[0])[: len(MACHINE)] == MACHINE
    tasks = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    decoding = "llama-3-8b-decode-64", "llama-3-8b-decode-1"
    assert tasks == [(op, shape) for op in ("norm head", "cache") for shape in decoding]
    for op, shape in tasks:
        of_task = [row for row in rows if (row["op"], row["shape"]) == (op, shape)]
        planned = [name for name in names_of(op) if name != "torch.compile"]
        assert [row["provider"] for row in of_task] == planned
        for row in of_task:
            assert (row["status"] == "ok") == (row["provider"] not in ON_A_GPU)
            assert (row["status"] == "ok") == (row["reason"] == "") == (row["limit_share"] != "")
    of_limit, of_rotation, ours = rows[:3]
    assert (of_limit["provider"], of_limit["error"]) == ("limit", "")
    assert (of_rotation["version"], of_rotation["error"]) == ("0.1.0", "")
    time, megabytes = float(ours["microseconds"]), float(ours["megabytes"])
    counted = 2 * 64 * 40 * 128 * 2 + 64 * 128 * 4 + 2 * 128 * 2
    assert megabytes == pytest.approx(counted / 1e6, rel=1e-3)
    assert float(ours["gigabytes_a_second"]) == pytest.approx(megabytes / time * 1e3, rel=1e-3)
    assert 0 < float(ours["error"]) < TOLERANCE["bfloat16"]
    assert "norm head, llama-3-8b-decode-64  microseconds" in printed
    wanted = [line for line in printed.splitlines() if line.startswith("time of torch")]
    assert len(wanted) == 2 and all(">= 1.167" in line for line in wanted)
    assert str(path) in printed


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("op", FUSED_OPS)
def test_every_provider_is_right_or_says_why_not(op, shape):
    results = measured_task(task(op, shape), names_of(op), quick=True)
    assert list(results) == names_of(op)
    for name, result in results.items():
        assert result.status in ("ok", "absent", "unsupported"), (name, result)
        assert (result.status == "ok") == (result.microseconds is not None)
        assert (result.error is None) == (result.status != "ok" or name in peers.YARDSTICKS)
        if name not in ON_A_GPU and name != "transformers":
            assert result.status == "ok", (name, result)


def of_ours(change):
    """A provider that calls ours, then changes what that has left."""

    def provider(task, inputs):
        def call():
            results = fused(task, inputs)()
            change(inputs)
            return results

        return call

    return provider


def unweighted(task, inputs):
    ones = tuple(torch.ones_like(weight) for weight in inputs.weights)
    return fused(task, inputs._replace(weights=ones))


def weights_exchanged(task, inputs):
    return fused(task, inputs._replace(weights=inputs.weights[::-1]))


def norm_of_heads_together(task, inputs):
    q, k = inputs.q, inputs.k
    weights = (weight.repeat(x.shape[2]) for weight, x in zip(inputs.weights, (q, k), strict=True))
    table = inputs.table
    how = {"interleaved": task.shape.interleaved, "norm": "heads", "out": (q, k)}
    call = rope_cupy.apply_qk_norm_rotary
    return lambda: call(q, k, *weights, (table.cos, table.sin), **how)


def next_slots(task, inputs):
    cache = inputs.cache
    moved = (cache.slots + 1) % (cache.k.shape[0] * BLOCK)
    return fused(task, inputs._replace(cache=cache._replace(slots=moved)))


def scaled(task, inputs):
    double = inputs.cache._replace(scale=2 * inputs.cache.scale)
    return fused(task, inputs._replace(cache=double))


def unrotated_k(inputs):
    store(inputs.k, inputs.v, inputs.cache)


def one_slot_more(inputs):
    cache = inputs.cache
    free = set(range(cache.k.shape[0] * BLOCK)) - set(cache.slots.flatten().tolist())
    slot = min(free)
    cache.v[slot // BLOCK, slot % BLOCK, 0, 0] = 1


WRONG = {
    "the rotation alone": ("norm head", alone),
    "unweighted": ("norm head", unweighted),
    "unweighted, of all heads": ("norm heads", unweighted),
    "weights exchanged": ("norm head", weights_exchanged),
    "a norm of all heads": ("norm head", norm_of_heads_together),
    "unweighted and packed": ("qkv norm", unweighted),
    "nothing packed": ("qkv", lambda task, inputs: lambda: inputs[:2]),
    "v changed": ("qkv", of_ours(lambda inputs: inputs.v.mul_(1.1))),
    "other slots": ("cache", next_slots),
    "other slots in blocks": ("cache paged HND", next_slots),
    "v forgotten": ("cache", of_ours(lambda inputs: inputs.cache.v.zero_())),
    "k as it was": ("cache", of_ours(unrotated_k)),
    "one slot more": ("cache paged HND", of_ours(one_slot_more)),
    "another scale": ("cache float8", scaled),
    "another dtype": ("eager", lambda task, inputs: lambda: [x.float() for x in inputs[:2]]),
}


@pytest.mark.parametrize(("op", "provider"), WRONG.values(), ids=WRONG)
def test_a_wrong_result_is_named_wrong_and_not_timed(monkeypatch, op, provider):
    calls = []

    def counted(task, inputs):
        call = provider(task, inputs)
        return lambda: calls.append(op) or call()

    kinds = {FUSED_OPS[op].kind: counted}
    monkeypatch.setitem(PEERS, "peer", Peer((), kinds, gpu_only=False))
    results = measured_task(task(op), ["peer", OURS], quick=True)
    assert (results["peer"].status, results["peer"].microseconds) == ("wrong", None)
    assert results["peer"].reason and len(calls) == 1
    assert results[OURS].status == "ok"


@pytest.mark.parametrize(
    ("op", "heads", "table"),
    [
        # 2 sequences of 5 tokens, 4 + 2 heads of bfloat16; 8 of the 24 elements of a head turn.
        ("norm head", 2 * 10 * 6 * 24 * 2, 5 * 8 * 4 + 2 * 24 * 2),
        ("norm heads", 2 * 10 * 6 * 24 * 2, 5 * 8 * 4 + 6 * 24 * 2),
        ("cache", 2 * 10 * (4 * 8 + 2 * 2 * 24) * 2, 5 * 8 * 4 + 5 * 8 + 10 * 8),
        ("cache float8", 10 * (2 * 4 * 8 * 2 + 2 * 2 * 24 * 3), 5 * 8 * 4 + 5 * 8 + 10 * 8),
        ("qkv", 2 * 10 * 6 * 8 * 2, 5 * 8 * 4),
        ("eager", 2 * 10 * 6 * 8 * 2, 5 * 8 * 2),
    ],
)
def test_bytes_are_those_of_a_hand_computed_example(op, heads, table):
    asked = task(op, "slice")
    assert (asked.heads_bytes, asked.table_bytes) == (heads, table)


def ok(**times):
    return {name: Result("ok", microseconds=time) for name, time in times.items()}


def test_goals_of_a_norm_are_held_by_ratios_and_unknown_without_a_time():
    asked = task("norm head", "qwen-image")
    times = ok(limit=40, rope_cupy=41, SGLang=50) | {ROTATION: Result("ok", microseconds=40)}
    results = times | {"torch.compile": Result("failed", "no compiler")}
    found = {goal.text: (goal.measured, goal.held) for goal in goals(asked, results)}
    assert found == {
        "time over rotation alone's": (41 / 40, "yes"),
        "SGLang's time over ours": (50 / 41, "no"),
        "torch.compile's time over ours": (None, "?"),
    }
    slower = results | ok(rope_cupy=42)
    assert [goal.held for goal in goals(asked, slower)] == ["no", "no", "?"]
    small = task("norm head", "llama-3-8b-decode-1")
    assert [goal.text for goal in goals(small, results)] == ["SGLang's time over ours"]
    unable = results | {"SGLang": Result("unsupported", "a norm of each head only")}
    assert not [*goals(task("norm heads", "llama-3-8b-decode-1"), unable)]


def test_goals_of_a_cache_are_a_share_of_the_limit_and_the_ratio_of_bytes():
    asked = task("cache", "llama-3-8b-prefill")
    times = ok(limit=95, rope_cupy=100) | {"two launches": Result("ok", microseconds=117)}
    share, sglang, torch_ = goals(asked, times)
    assert share.measured == limit_share(asked, times, OURS) > 0.95 and share.held == "yes"
    assert sglang.demanded == pytest.approx((2 * 40 + 2 * 16) / (2 * 48))
    assert (sglang.measured, sglang.held) == (1.17, "yes")
    assert (torch_.measured, torch_.held) == (None, "?")
    _, of_float8, _ = goals(task("cache float8", "llama-3-8b-prefill"), times)
    assert of_float8.demanded == pytest.approx((4 * 40 + 3 * 16) / (4 * 32 + 3 * 16))
    assert not [*goals(task("qkv norm", "qwen-image"), times)]


@pytest.mark.parametrize(
    ("measured", "at_least", "held"),
    [
        *((1.5, True, "yes"), (1.5, False, "yes"), (1.6, True, "yes"), (1.4, False, "yes")),
        *((1.6, False, "no"), (1.4, True, "no"), (None, True, "?")),
    ],
)
def test_a_goal_is_held_at_its_bound(measured, at_least, held):
    assert Goal("", task("qkv"), measured, 1.5, at_least).held == held


def test_every_operation_has_a_plan_of_known_shapes_and_is_compared_with_the_limit():
    assert list(bench_fused.PLAN) == list(FUSED_OPS)
    for op, names in bench_fused.PLAN.items():
        assert any(shape.tokens <= bench_fused.FEW_TOKENS for shape in chosen(names)), op
        assert {"limit", OURS} < {*names_of(op)} <= {*NAMES}
        assert (ROTATION in names_of(op)) == (FUSED_OPS[op].kind not in ("cache", "join"))
    assert set(bench_fused.COMPILED) <= SHAPES.keys()


def test_what_sglang_compiles_is_built_once_and_a_failure_is_left_to_the_call(monkeypatch):
    built = []

    def build(*kernel):
        built.append(kernel)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(peers.sglang, "kernel", build)
    tasks = [task(op, "qwen3-8b-prefill") for op in FUSED_OPS] + [task("norm head", "slice")]
    peers.build_ahead(tasks, ["SGLang", "two launches"])
    assert sorted(built) == [
        ("diffusion/qknorm_rope.cuh", "QKNormRopeKernel<128, 128, true, PDL, bf16_t>"),
        ("elementwise/kvcache.cuh", "StoreKVCacheKernel<2048, PDL>"),
        ("elementwise/rope.cuh", "FusedRopeKernel<true, 128, PDL, bf16_t>"),
        ("elementwise/rope.cuh", "FusedRopeKernel<true, 128, PDL, bf16_t>::run_fused"),
    ]


@pytest.mark.parametrize(
    "option", ["--shapes=qwen", "--ops=norm", "--providers=nobody", "--device=tpu"]
)
def test_an_unknown_name_ends_the_run_with_the_names_there_are(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["bench_fused.py", option])
    with pytest.raises(SystemExit):
        bench_fused.main()
    assert option.partition("=")[2] in capsys.readouterr().err
