"""benchmarks/bench_rotary.py on the CPU, and what it counts and compares."""

import configparser
import csv
import datetime
import doctest
import gc
import re
import subprocess
import sys
from pathlib import Path

import bench_rotary
import peers
import pytest
import result
import shapes
import tasks
from nvrtc import compiled, ptx
from peers import PEERS, Peer
from result import AbsentError
from runner import Entry, measured
from shapes import GROUPS, SHAPES, Shape
from tasks import TOLERANCE, Task

import rope_cupy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLUMNS = (
    "date,gpu,driver,python,numpy,cupy,torch,rope_cupy,shape,batch,tokens,q_heads,k_heads,head_dim,"
    "rotary_dim,rotary_offset,pairing,dtype,variant,table,measure,provider,version,status,reason,"
    "microseconds,megabytes,limit_share,error"
)
TINY = {
    "halves": Shape("halves", 2, 5, 4, 2, 16, 16, 0, False),
    "neighbours": Shape("neighbours", 2, 5, 4, 2, 16, 16, 0, True),
    "slice": Shape("slice", 2, 5, 4, 2, 24, 8, 8, True),
}


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run bench_rotary on the tiny shapes with more providers, and return the rows of its CSV."""

    def rows(*options, **more_providers):
        path = tmp_path / "rotary.csv"
        for name, provider in more_providers.items():
            monkeypatch.setitem(PEERS, name, Peer((), {"rotation": provider}, gpu_only=False))
        command = ["bench_rotary.py", "--device", "cpu", "--quick", "--csv", str(path), *options]
        monkeypatch.setattr(sys, "argv", command)
        bench_rotary.main()
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))

    for shape in TINY.values():
        monkeypatch.setitem(SHAPES, shape.name, shape)
    yield rows
    gc.unfreeze()


def rotated(task, inputs, **options):
    table = inputs.table.cos, options.pop("sin", inputs.table.sin)
    options = {"interleaved": task.shape.interleaved, **options}
    options = {"rotary_offset": task.shape.rotary_offset, **options}
    return rope_cupy.apply_rotary_qk(inputs.q, inputs.k, table, **options)


def test_the_script_writes_a_row_for_each_provider(tmp_path):
    path = tmp_path / "of_the_cpu.csv"
    script = [sys.executable, BENCHMARKS / "bench_rotary.py", "--device", "cpu", "--quick"]
    options = ["--shapes", "llama-3-8b-decode-1", "--providers", "limit,copy,rope_cupy,SGLang"]
    done = subprocess.run(
        [*script, *options, "--csv", path], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert path.read_text(encoding="utf-8").splitlines()[0] == COLUMNS
    with path.open(encoding="utf-8") as file:
        limit, copy, rotation, sglang = csv.DictReader(file)
    assert limit.items() >= {"provider": "limit", "status": "ok", "error": ""}.items()
    assert copy.items() >= {"provider": "copy", "status": "ok", "error": ""}.items()
    expected = {
        "gpu": "cpu",
        "driver": "",
        "rope_cupy": rotation["version"],
        "shape": "llama-3-8b-decode-1",
        **{"batch": "1", "tokens": "1", "q_heads": "32", "k_heads": "8", "head_dim": "128"},
        **{"rotary_dim": "128", "rotary_offset": "0", "pairing": "half", "dtype": "bfloat16"},
        **{"variant": "in place", "table": "half", "measure": "rotation"},
        **{"provider": "rope_cupy", "status": "ok", "reason": ""},
    }
    assert rotation.items() >= expected.items()
    datetime.date.fromisoformat(rotation["date"])
    assert float(rotation["megabytes"]) == pytest.approx((2 * 40 * 128 * 2 + 128 * 4) / 1e6)
    assert 1 < float(rotation["microseconds"]) < 1e6
    assert 0 < float(rotation["error"]) < TOLERANCE["bfloat16"]
    moved, counted = 2 * 40 * 128 * 2, 2 * 40 * 128 * 2 + 128 * 4
    share = float(limit["microseconds"]) * counted / moved / float(rotation["microseconds"])
    assert float(rotation["limit_share"]) == pytest.approx(share, rel=1e-3)
    assert sglang["status"] == "unsupported" and "GPU" in sglang["reason"]
    assert "[1/1] llama-3-8b-decode-1" in done.stderr
    assert "rope_cupy" in done.stdout and str(path) in done.stdout


def test_every_provider_is_right_or_says_why_not(measure):
    options = ["--shapes", ",".join(TINY), "--variants", "all", "--dtypes", "bfloat16,float32"]
    rows = measure(*options)
    rest = len(peers.names_for("rotation")) - 1
    assert (
        len(rows) == 3 * len(tasks.VARIANTS) * 2 * rest + 2
    )  # "limit, same places": a slice, in place, two dtypes
    for row in rows:
        name, whole = row["provider"], row["shape"] != "slice"
        assert row["status"] in ("ok", "absent", "unsupported"), row
        assert (row["status"] == "ok") == (row["reason"] == ""), row
        assert (row["status"] == "ok") == (row["microseconds"] != ""), row
        by_axes = row["variant"] in tasks.BY_AXES
        packed_batches = row["variant"] == "sequences" and row["batch"] != "1"
        cannot = {
            "rope_cupy": packed_batches,
            "torch eager": by_axes,
            "limit": False,
            "copy": False,
        }
        if name in cannot:
            assert (row["status"] == "ok") != cannot[name], row
        can = whole and row["variant"] in ("in place", "new", "bhsd", "packed")
        if name == "transformers":
            assert (row["status"] == "ok") == (can and row["pairing"] == "half"), row
        if name == "diffusers" and row["status"] != "absent":
            assert (row["status"] == "ok") == can, row
        if row["error"]:
            assert float(row["error"]) < TOLERANCE[row["dtype"]], row


@pytest.mark.parametrize("form", tasks.TABLES)
def test_rope_cupy_is_right_with_every_form_of_table(measure, form):
    rows = measure("--shapes", ",".join(TINY), "--providers", "rope_cupy", "--tables", form)
    assert [(row["table"], row["status"]) for row in rows] == [(form, "ok")] * 3


def zeroed_rest(task, inputs):
    for x in (inputs.q, inputs.k):
        x[..., task.shape.rotary_offset + task.shape.rotary_dim :] = 0
    return rotated(task, inputs)


def last_token_left(task, inputs):
    q, k = (x.clone() for x in rotated(task, inputs))
    k[:, -1] = inputs.k[:, -1]
    return q, k


WRONG = {
    "not at all": lambda task, inputs: (inputs.q, inputs.k),
    "q alone": lambda task, inputs: (rotated(task, inputs)[0], inputs.k),
    "k alone": lambda task, inputs: (inputs.q, rotated(task, inputs)[1]),
    "back": lambda task, inputs: rotated(task, inputs, sin=-inputs.table.sin),
    "other pairs": lambda task, inputs: rotated(task, inputs, interleaved=False),
    "another slice": lambda task, inputs: rotated(task, inputs, rotary_offset=0),
    "two percent too long": lambda task, inputs: [1.02 * x for x in rotated(task, inputs)],
    "into nothing": lambda task, inputs: [x * float("nan") for x in rotated(task, inputs)],
    "another shape": lambda task, inputs: [x[..., :-1] for x in rotated(task, inputs)],
    "all but the last token": last_token_left,
    "what lies behind the slice as well": zeroed_rest,
}


@pytest.mark.parametrize("rotate", WRONG.values(), ids=WRONG)
def test_a_wrong_result_is_named_wrong_and_not_timed(measure, capsys, rotate):
    calls = []

    def wrong(task, inputs):
        return lambda: calls.append(task) or rotate(task, inputs)

    options = "--shapes", "slice", "--providers", "wrong,limit,rope_cupy"
    row, limit, right = measure(*options, wrong=wrong)
    assert (row["status"], row["microseconds"], row["limit_share"]) == ("wrong", "", "")
    assert row["reason"] and not float(row["error"]) <= TOLERANCE["bfloat16"]
    assert len(calls) == 1
    assert (limit["status"], right["status"]) == ("ok", "ok")
    assert re.search(r"^wrong .*wrong: ", capsys.readouterr().out, re.MULTILINE)


def test_who_is_absent_or_fails_is_named_and_the_others_are_measured(measure):
    def absent(task, inputs):
        raise AbsentError("absent is not installed")

    def failing(task, inputs):
        raise RuntimeError("no memory\nand a long story")

    options = "--shapes", "halves", "--providers", "absent,failing,rope_cupy"
    *others, right = measure(*options, absent=absent, failing=failing)
    assert [(row["status"], row["reason"]) for row in others] == [
        ("absent", "absent is not installed"),
        ("failed", "RuntimeError: no memory"),
    ]
    assert all(row["microseconds"] == row["error"] == "" for row in others)
    assert right["status"] == "ok"


def test_a_package_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    with pytest.raises(AbsentError):
        peers.call_of("transformers", Task(TINY["halves"], device="cpu"), None)


def test_what_is_done_is_kept_when_the_run_is_interrupted(measure):
    def interrupted(task, inputs):
        if task.shape.name == "neighbours":
            raise KeyboardInterrupt
        return lambda: rotated(task, inputs)

    options = "--shapes", "halves,neighbours,slice", "--providers", "interrupted"
    rows = measure(*options, interrupted=interrupted)
    assert [row["shape"] for row in rows] == ["halves"]


def test_attention_is_timed_with_the_rotation_and_has_no_share_of_the_limit(measure):
    options = "--shapes", "halves", "--providers", "limit,rope_cupy,torch eager", "--attention"
    rows = measure(*options)
    assert [row["measure"] for row in rows] == 3 * ["rotation"] + 3 * ["rotation and attention"]
    assert all(row["status"] == "ok" and float(row["microseconds"]) > 0 for row in rows)
    assert all(row["limit_share"] for row in rows[:3])
    assert not any(row["limit_share"] for row in rows[3:])


@pytest.mark.parametrize(
    "options",
    [["--shapes", "qwen"], ["--providers", "nobody"], ["--dtypes", "int8"], ["--tables", "thirds"]],
)
def test_an_unknown_name_ends_the_run_with_the_names_there_are(measure, capsys, options):
    with pytest.raises(SystemExit):
        measure(*options)
    assert options[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("interleaved", "options", "heads", "table"),
    [
        # 2 sequences of 3 tokens of 4 + 2 heads of bfloat16; 8 of the 16 elements of a head turn.
        (False, {}, 2 * (2 * 3 * 6 * 8 * 2), 3 * 8 * 4),
        (True, {"variant": "packed"}, 1152, 96),
        (False, {"variant": "new"}, 2 * (2 * 3 * 6 * 16 * 2), 96),
        (False, {"variant": "positions"}, 1152, 96 + 3 * 8),
        (False, {"variant": "offsets"}, 1152, 96 + 2 * 8),
        (False, {"variant": "sequences"}, 1152, 96 + 2 * 8),
        (False, {"variant": "axes"}, 1152, 96 + 3 * 3 * 8),
        (False, {"table": "frequencies"}, 1152, 4 * 8),
        (False, {"dtype": "float32"}, 2304, 96),
        (False, {"table": "cache"}, 1152, 96),
        (True, {"table": "complex"}, 1152, 96),
        (False, {"table": "full"}, 1152, 96),  # the second half repeats the first, and is not read
        (True, {"table": "full"}, 1152, 192),  # every second value repeats the one before
        (False, {"table": "matrices"}, 1152, 3 * 4 * 4 * 4),
    ],
)
def test_bytes_are_those_of_a_hand_computed_example(interleaved, options, heads, table):
    shape = Shape("", 2, 3, 4, 2, 16, 8, 4, interleaved)
    task = Task(shape, **options)
    assert (task.heads_bytes, task.table_bytes) == (heads, table)


def test_shapes_can_be_rotated_and_have_names_of_their_own():
    assert len(SHAPES) == len(GROUPS["all"])
    for shape in SHAPES.values():
        assert re.fullmatch(r"[a-z0-9./-]+", shape.name)
        assert min(shape.batch, shape.tokens, shape.k_heads, shape.rotary_dim) > 0
        assert shape.q_heads % shape.k_heads == 0, shape
        assert shape.rotary_dim % 2 == 0, shape
        assert 0 <= shape.rotary_offset <= shape.head_dim - shape.rotary_dim, shape


def test_shapes_of_every_head_dim_move_200_megabytes():
    for shape in GROUPS["head-dims"]:
        assert Task(shape).heads_bytes == pytest.approx(200e6, rel=1e-3), shape


def test_shapes_are_chosen_by_name_and_by_group_each_once():
    names = [shape.name for shape in shapes.chosen("small,32-tokens-64/8,qwen-image")]
    assert names == [*(shape.name for shape in GROUPS["small"]), "qwen-image"]
    with pytest.raises(ValueError, match="no shape or group 'qwen'"):
        shapes.chosen("qwen")


@pytest.mark.parametrize("module", [shapes, result], ids=lambda module: module.__name__)
def test_examples_are_true(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_the_limit_kernels_compile_and_move_each_word_by_one_access():
    try:
        compiled("", [], ())
    except Exception as error:
        pytest.skip(f"NVRTC cannot be loaded ({error})")
    code = (BENCHMARKS / "limit.cu").read_text(encoding="utf-8")
    kernels = re.findall(r"__global__ void (\w+)", code)
    assert "limit_kernel" in kernels
    for kernel in kernels:
        assembly = ptx(code, kernel, ("-std=c++17", "-arch=sm_90")).split(f".entry {kernel}(")[1]
        body = assembly.split("\n}")[0]
        loads, stores = re.findall(r"ld\.global\S*", body), re.findall(r"st\.global\S*", body)
        assert [re.sub("v4.*", "v4", each) for each in loads + stores] == [
            "ld.global.v4",
            "st.global.v4",
        ]


class Numbers:
    """A clock whose times are what the calls return; some cannot be prepared."""

    def prepare(self, calls):
        return calls[0]() / 1

    def times(self, prepared):
        return [*prepared]


def test_the_fastest_way_counts_and_a_clock_beside_that_fails_leaves_the_time():
    class Failing(Numbers):
        def prepare(self, calls):
            raise RuntimeError("no graph")

    entries = {
        "fast": Entry(lambda: [[lambda: 3], [lambda: 2], [lambda: 4]]),
        "failing": Entry(lambda: [[lambda: 1], [lambda: "one"]]),
    }
    results = measured(entries, Numbers(), cpu=Numbers(), gpu=Failing())
    fast, failing = results["fast"], results["failing"]
    assert (fast.status, fast.microseconds, fast.beside) == ("ok", 2, {"cpu": 2})
    assert fast.reason == "gpu: RuntimeError: no graph"
    assert (failing.status, failing.microseconds, failing.beside) == ("failed", None, {})


def test_the_extra_of_peers_installs_every_peer_that_pip_installs_beside_the_others():
    """vLLM and SGLang pin a PyTorch each, and flash-attn is compiled when it is installed."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    extra = config["options.extras_require"]["peers"].split()
    own = {"torch", "cupy", "cupy-cuda12x", "cupy-cuda13x", "rope-cupy", "rope_cupy"}
    alone = {"vllm", "sglang", "sgl-kernel", "sglang-kernel", "flash-attn"}
    packages = {name for peer in PEERS.values() for name in peer.distributions}
    assert sorted(packages - own - alone) == extra
