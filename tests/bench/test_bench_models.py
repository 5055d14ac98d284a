"""benchmarks/bench_models.py, on the CPU: models that are enabled give what they gave before."""

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

from rope_cupy import rotary
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

    def counted(*arguments, rotate=rotary.rotate):
        normalised.append(arguments[-1] is not NO_PARTS)
        return rotate(*arguments)

    monkeypatch.setattr(rotary, "rotate", counted)
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


def test_a_step_writes_the_last_keys_and_values_of_its_cache():
    cache = FixedCache(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    keys, values = cache.update(torch.ones(1, 2, 1, 4), 2 * torch.ones(1, 2, 1, 4))
    assert keys[:, :, :4].sum() == 0 and bool((keys[:, :, 4:] == 1).all())
    assert values is cache.values and bool((values[:, :, 4:] == 2).all())
    wide = in_float32(
        {"cache": cache, "x": (torch.ones(1).bfloat16(), [None, torch.ones(1).int()])}
    )
    assert wide["cache"].keys.data_ptr() != cache.keys.data_ptr()
    assert wide["x"][0].dtype == torch.float32 and wide["x"][1][1].dtype == torch.int32


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


def test_quick_compiles_nothing(tmp_path):
    options = ["--quick", "--models=wan-2.1-14b", "--dtype=float32"]
    rows, _ = rows_of("bench_models.py", tmp_path / "models.csv", *options)
    assert [(row["model"], row["call"], row["dtype"]) for row in rows] == [
        ("wan-2.1-14b", EAGER, "float32"),
        ("wan-2.1-14b", EAGER + ENABLED, "float32"),
    ]


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
