"""benchmarks/bench_models.py, on the CPU: models that are enabled give what they gave before."""

import argparse
import csv
import importlib
import math

import pytest
import torch
from result import WrongError
from test_bench_host import MACHINE, rows_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import bench_models
from bench_models import COMPILED, EAGER, ENABLED, GRAPHS, Call
from models import DIFFUSERS, KINDS, FixedCache, in_float32, sharing_weights
from transformers import StaticCache

from rope_cupy import dispatch, fused
from rope_cupy.options import NO_PARTS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)
    with torch.no_grad():
        yield


def made(name, dtype=torch.float32):
    kind = KINDS[name]
    return kind.make(kind.small, "cpu", dtype)


@pytest.mark.parametrize("name", KINDS)
def test_an_enabled_model_gives_the_outputs_of_the_model(name):
    model, library = made(name), KINDS[name].library
    before = Call(model.module, model.inputs).outputs()
    switched = bench_models.enabled(model.module, library)
    assert next(switched.parameters()) is next(model.module.parameters())
    found = Call(switched, model.inputs).outputs()
    assert bench_models.error_of(found, before) < 2e-6
    assert not any(each.isnan().any() for each in found)
    # The model itself is as it was.
    for each, right in zip(Call(model.module, model.inputs).outputs(), before, strict=True):
        assert torch.equal(each, right)


@pytest.mark.parametrize(
    ("name", "count"), [("flux", 2), ("wan-2.1-14b", 1), ("qwen3-8b-prefill", 1)]
)
def test_what_is_enabled_is_rotated_by_rope_cupy_and_the_model_is_not(name, count, monkeypatch):
    model, library = made(name), KINDS[name].library
    switched, normalised = bench_models.enabled(model.module, library), []

    def counted(*arguments, rotate=fused.rotate):
        normalised.append(arguments[-1] is not NO_PARTS)
        return rotate(*arguments)

    def counted_streams(streams, out, join=dispatch.join):
        normalised.extend(stream[-1] is not NO_PARTS for stream in streams)
        return join(streams, out)

    monkeypatch.setattr(fused, "rotate", counted)
    monkeypatch.setattr(dispatch, "join", counted_streams)
    Call(model.module, model.inputs)()
    assert not normalised
    Call(switched, model.inputs)()
    assert normalised == [True] * count


def test_an_output_that_is_wrong_is_not_timed(monkeypatch):
    def broken(module, library):
        switched = sharing_weights(module)
        switched.register_forward_hook(lambda module, inputs, output: output * 1.2)
        return switched

    monkeypatch.setattr(bench_models, "enabled", broken)
    model = made("ltx", torch.bfloat16)
    results = bench_models.measured(model, DIFFUSERS, "cpu", 1, (EAGER,))
    assert results[EAGER].status == "ok" and results[EAGER].microseconds
    wrong = results[EAGER + ENABLED]
    assert wrong.status == "wrong" and wrong.microseconds is None
    assert wrong.error == pytest.approx(0.2, abs=0.02) and "error 0." in wrong.reason


def test_an_output_that_is_no_number_is_wrong():
    exact = (torch.ones(4),)
    assert math.isnan(bench_models.error_of((torch.full((4,), math.nan),), exact))
    assert bench_models.error_of((torch.ones(4),), exact) == 0
    with pytest.raises(ValueError):
        bench_models.error_of((), exact)
    assert issubclass(WrongError, Exception)


def test_a_step_writes_its_place_in_a_cache_of_static_addresses():
    shape, written = (1, 2, 5, 4), torch.tensor([3])
    cache = FixedCache(torch.zeros(shape), torch.zeros(shape), written)
    for _ in range(2):
        keys, values = cache.update(torch.ones(1, 2, 1, 4), 2 * torch.ones(1, 2, 1, 4))
    assert keys is cache.keys and values is cache.values
    assert keys.sum((0, 1, 3)).tolist() == [0, 0, 0, 8, 0]
    assert values.sum((0, 1, 3)).tolist() == [0, 0, 0, 16, 0]
    wide = in_float32(
        {"cache": cache, "x": (torch.ones(1).bfloat16(), [None, torch.ones(1).int()])}
    )
    assert wide["cache"].keys.data_ptr() != cache.keys.data_ptr()
    assert wide["x"][0].dtype == torch.float32 and wide["x"][1][1].dtype == torch.int32
    for each in (cache, wide["cache"]):
        assert all(hasattr(x, "_dynamo_static_input_type") for x in vars(each).values())


@pytest.mark.parametrize("name", ["llama-3-8b-decode-1", "qwen3-8b-decode-32"])
def test_a_step_is_that_of_a_static_cache_of_transformers(name):
    """After a prefill by the model itself, of tokens that the cache then holds."""
    model = made(name)
    step, inputs = KINDS[name].small, model.inputs
    rope = layer_rope(model.module)
    x = torch.randn(step.batch, step.cached + step.tokens, step.hidden)
    positions = torch.arange(x.shape[1]).expand(step.batch, -1)
    cos, sin = rope(x, positions)
    whole = Call(
        model.module,
        {
            "hidden_states": x,
            "attention_mask": torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, None],
            "position_embeddings": (cos, sin),
        },
    ).outputs()
    cache = inputs["past_key_values"]
    static = StaticCache(config=model.module.self_attn.config, max_cache_len=cache.keys.shape[2])
    before = slice(0, step.cached)
    model.module(
        x[:, before],
        attention_mask=torch.ones(step.cached, cache.keys.shape[2]).tril().bool()[None, None],
        position_embeddings=(cos[:, before], sin[:, before]),
        past_key_values=static,
    )
    cache.keys.copy_(static.layers[0].keys)
    cache.values.copy_(static.layers[0].values)
    found = Call(model.module, inputs | {"hidden_states": x[:, step.cached :]}).outputs()
    assert bench_models.error_of(found, (whole[0][:, step.cached :],)) < 1e-5
    assert inputs["attention_mask"].sum() == step.batch * (step.cached + 1)


def layer_rope(layer):
    """What makes the cosines and sines of a layer."""
    module = importlib.import_module(type(layer).__module__)
    name = type(layer).__name__.replace("DecoderLayer", "RotaryEmbedding")
    return getattr(module, name)(layer.self_attn.config)


QUICK = "--quick", "--dtype=float32", "--keep"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run of two models writes, run once, and its rows."""
    path = tmp_path_factory.mktemp("quick") / "models.csv"
    rows, _ = rows_of("bench_models.py", path, *QUICK, "--models=wan-2.1-14b,llama-3-8b-prefill")
    return path.read_text(), rows


def test_quick_compiles_nothing(quick):
    _, rows = quick
    assert [(row["model"], row["call"], row["dtype"]) for row in rows] == [
        (name, call, "float32")
        for name in ("wan-2.1-14b", "llama-3-8b-prefill")
        for call in (EAGER, EAGER + ENABLED)
    ]


def test_rows_of_other_models_are_kept(quick, tmp_path, capsys):
    path = tmp_path / "models.csv"
    before, _ = quick
    path.write_text(before)
    rows, _ = rows_of("bench_models.py", path, *QUICK, "--models=flux,wan-2.1-14b")
    names = ["flux", "wan-2.1-14b", "llama-3-8b-prefill"]
    assert [row["model"] for row in rows] == [name for name in names for _ in range(2)]
    of_llama = [line for line in before.splitlines() if "llama-3-8b-prefill" in line]
    assert path.read_text().splitlines()[-2:] == of_llama
    assert [each.name for each in tmp_path.iterdir()] == ["models.csv"]
    path.write_text("model,date\nflux,2026-01-01\n")
    with pytest.raises(ValueError, match="must have the columns"):
        bench_models.merge(write_rows(tmp_path / "part.csv", rows), path)


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_library_that_is_missing_is_absent(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setitem(KINDS, "flux", KINDS["flux"]._replace(make=missing))
    options = argparse.Namespace(device="cpu", dtype="float32", quick=True)
    rows = bench_models._rows("flux", options)
    assert [(row["call"], row["status"], row["reason"]) for row in rows] == [
        (EAGER, "absent", "No module named 'diffusers'"),
        (EAGER + ENABLED, "absent", "No module named 'diffusers'"),
    ]


def test_the_times_of_all_calls_without_a_gpu(tmp_path):
    path = tmp_path / "new" / "models.csv"
    rows, printed = rows_of("bench_models.py", path, "--models=flux,qwen3-8b-decode-1")
    assert list(rows[0])[: len(MACHINE)] == MACHINE
    calls = [way + which for way in (EAGER, COMPILED, GRAPHS) for which in ("", ENABLED)]
    names = ["flux", "qwen3-8b-decode-1"]
    assert [(row["model"], row["call"]) for row in rows] == [
        (name, call) for name in names for call in calls
    ]
    for row in rows:
        if not row["call"].startswith(EAGER):
            assert (row["status"], row["reason"]) == ("unsupported", "is timed on a GPU only")
            assert row["milliseconds"] == row["speedup"] == row["error"] == ""
            continue
        assert (row["status"], row["reason"]) == ("ok", "")
        eager = next(each for each in rows if each["model"] == row["model"])
        speedup = float(eager["milliseconds"]) / float(row["milliseconds"])
        assert float(row["speedup"]) == pytest.approx(speedup, rel=2e-3, abs=1e-3)
        assert 5e-4 < float(row["error"]) < 1e-2
    assert "replaced 1 FluxAttnProcessor" in printed
    assert "tokens=1 cached=9" in rows[-1]["size"]


def test_the_models_have_their_sizes():
    """Those of the configs that are published with them."""
    wan, qwen, flux = (KINDS[name].size for name in ("wan-2.1-14b", "qwen-image", "flux"))
    assert (wan.heads, wan.head_dim, wan.dim, wan.hidden) == (40, 128, 5120, 13824)
    assert (wan.tokens, wan.text) == (32760, 512)
    assert qwen == flux and (flux.dim, flux.tokens, flux.text) == (3072, 4096, 512)
    llama, qwen3 = (KINDS[name].size for name in ("llama-3-8b-prefill", "qwen3-8b-decode-32"))
    assert (llama.heads, llama.kv_heads, llama.head_dim) == (32, 8, 128)
    assert (llama.hidden, llama.feed_forward, llama.tokens) == (4096, 14336, 8192)
    assert (qwen3.feed_forward, qwen3.batch, qwen3.tokens, qwen3.cached) == (12288, 32, 1, 2048)
