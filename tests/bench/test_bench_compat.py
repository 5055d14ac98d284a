"""benchmarks/bench_compat.py, on the CPU: every function is there, right, and compared."""

import importlib

import bench_compat
import pytest
from bench_compat import COMPAT, HOST, OURS, PEERS, PLAIN, function_of, measured, rows_of
from compat_cases import MODULES, Arrays
from result import AbsentError, Result
from shapes import Shape
from test_bench_host import MACHINE
from test_bench_host import rows_of as rows_of_script

FEW = Shape("few", 1, 6, 32, 8, 128, 128, 0, False)
NO_CALLS = {  # names that rotate nothing by themselves
    "FusedSetKVBufferArg",
    "can_use_rotary_embedding_cos_sin",
    "RotaryEmbeddingOverride",
    "RotaryPositionEmbedding",
}


def test_the_script_writes_a_row_for_each_provider_of_each_call(tmp_path):
    path = tmp_path / "new" / "compat.csv"
    options = "--modules=torchtitan,vllm", "--shapes=32-tokens-64/8,llama-3-8b-prefill"
    rows, printed = rows_of_script("bench_compat.py", path, *options)
    assert list(rows[0])[: len(MACHINE)] == MACHINE
    assert {(row["shape"], row["measure"]) for row in rows} == {("32-tokens-64/8", HOST)}
    calls = list(dict.fromkeys(row["call"] for row in rows))
    assert calls[2:4] == ["torchtitan.apply_rotary_emb", "vllm.rotary_embedding"]
    for call in calls:
        plain, ours, peer = (row for row in rows if row["call"] == call)
        assert (plain["provider"], ours["provider"]) == OURS
        assert (plain["status"], ours["status"], plain["above_plain"]) == ("ok", "ok", "0.000")
        times = float(ours["microseconds"]), float(plain["microseconds"])
        rounded = 1e-4 * max(times)  # five digits of each are written
        assert float(ours["above_plain"]) == pytest.approx(times[0] - times[1], abs=rounded)
        assert float(plain["error"]) == 0 and float(ours["error"]) == 0
        assert peer["provider"] == PEERS[call.partition(".")[0]][0]
        assert (peer["status"] == "ok") == (peer["reason"] == "") == (peer["above_plain"] != "")
    assert "vllm, 32-tokens-64/8, host" in printed and " above_plain " in printed


@pytest.mark.parametrize("module", MODULES)
def test_every_function_is_measured_and_gives_what_its_plain_call_gives(module):
    results = measured(module, [*OURS], FEW, "cpu", HOST)
    names = {call.partition(".")[2].partition(",")[0].partition(".")[0] for call, _ in results}
    public = {*importlib.import_module(f"rope_cupy.compat.{module}").__all__}
    assert public - names <= NO_CALLS and names <= public
    for key, result in results.items():
        assert result.status == "ok", (key, result)
        assert result.error < 1e-3, key


@pytest.mark.parametrize("name", ["vllm.rotary_embedding", "torchtitan.apply_rotary_emb"])
def test_a_function_that_is_wrong_is_not_timed(monkeypatch, name):
    module, _, function = name.partition(".")
    of_compat = importlib.import_module(f"rope_cupy.compat.{module}")
    right = getattr(of_compat, function)

    def wrong(*arguments):
        results = right(*arguments)
        (arguments[1] if results is None else results[1]).mul_(1.1)
        return results

    monkeypatch.setattr(of_compat, function, wrong)
    results = measured(module, [*OURS], FEW, "cpu", HOST)
    assert results[name, PLAIN].status == "ok"
    assert (results[name, COMPAT].status, results[name, COMPAT].microseconds) == ("wrong", None)
    (row,) = (row for row in rows_of({(name, COMPAT): Result("wrong")}, FEW, HOST))
    assert "above_plain" not in row and row["microseconds"] == ""


def test_a_second_call_in_place_is_compared_with_arrays_as_they_were():
    arrays = Arrays(FEW, "cpu")
    for (_, provider), entry in bench_compat.entries_of("vllm", [*OURS], arrays):
        if provider == COMPAT:
            call = entry.ways()[0][0]
            assert entry.check(call) == entry.check(call) < 1e-3


def test_a_function_that_a_peer_has_by_another_name_is_found(monkeypatch):
    modules = ("rope_cupy.compat.timm",)
    quack = importlib.import_module("rope_cupy.compat.quack")
    monkeypatch.setitem(bench_compat.RENAMED, "turn", ((quack.__name__,), "apply_rotary"))
    assert function_of(modules, "turn") is quack.apply_rotary
    timm = importlib.import_module(*modules)
    monkeypatch.setitem(bench_compat.RENAMED, "apply_rot_embed", ((quack.__name__,), "turn"))
    assert function_of(modules, "apply_rot_embed") is timm.apply_rot_embed


def test_a_function_is_that_of_the_first_module_that_has_it():
    modules = "no_such_package", "rope_cupy.compat.timm", "rope_cupy.compat.quack"
    quack = importlib.import_module(modules[2])
    assert function_of(modules, "apply_rotary") is quack.apply_rotary
    with pytest.raises(AbsentError, match=r"^no_such_package is not installed$"):
        function_of(modules, "rotary")
    with pytest.raises(AbsentError, match=r"^there is no rotary in rope_cupy\.compat\.quack$"):
        function_of(modules[2:], "rotary")
