"""benchmarks/rotary.ipynb executed, and the tables and plots of benchmarks/figures.py."""

import csv
import doctest
import shutil
import subprocess
from pathlib import Path

import bench_host
import committed
import figures
import numpy as np
import pytest
from shapes import SHAPES

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "benchmarks/rotary.ipynb"

MACHINE = {
    "date": "2026-01-02",
    "gpu": "GPU A",
    "driver": "580.1",
    "python": "3.12.3",
    "numpy": "2.4",
    "cupy": "14.20",
    "torch": "2.11",
    "rope_cupy": "0.1.0",
}
HOST = [("in place", "Liger", 38.0), ("in place", "rope_cupy", 10.07), ("empty", "RawKernel", 6.4)]


def measurement(shape, provider, microseconds=None, status="ok", **others):
    """A row of bench_rotary.py whose limit takes 10 us."""
    about = SHAPES[shape]._asdict()
    about["pairing"] = "interleaved" if about.pop("interleaved") else "half"
    row = MACHINE | about | {"shape": about.pop("name"), "dtype": "bfloat16"}
    row |= {"variant": "in place", "table": "half", "measure": "rotation", "provider": provider}
    row |= {"version": "1.0", "status": status, "reason": "", "error": "", "megabytes": 1}
    row |= {"microseconds": microseconds, "limit_share": microseconds and 10 / microseconds}
    del row["name"]
    return row | others


def host_rows(**others):
    rows = [{"call": call, "provider": name, "microseconds": time} for call, name, time in HOST]
    rows.append({"call": "in place", "provider": "quack", "status": "absent", "reason": "gone"})
    return [MACHINE | {"status": "ok", "reason": ""} | row | others for row in rows]


def rotary_rows(**others):
    """Two models and a sweep by rope_cupy, two peers, and three that measure nothing."""
    rows = [
        measurement("qwen-image", "limit", 9.5),
        measurement("qwen-image", "rope_cupy", 10.1),
        measurement("qwen-image", "Liger", status="unsupported", reason="half pairs only"),
        measurement("qwen-image", "SGLang", 12.5),
        measurement("qwen-image", "vLLM", status="absent", reason="not installed"),
        measurement("qwen-image", "quack", status="unsupported", reason="no GPU"),
        measurement("qwen-image", "diffusers", status="unsupported", reason="no GPU"),
        measurement("llama-3-8b-decode-1", "diffusers", status="absent", reason="not installed"),
        measurement("llama-3-8b-decode-1", "limit", 9.5),
        measurement("llama-3-8b-decode-1", "rope_cupy", 8.004),
        measurement("llama-3-8b-decode-1", "Liger", 8.001),
        measurement("llama-3-8b-decode-1", "SGLang", status="wrong", reason="off by 1"),
        measurement("llama-3-8b-decode-1", "vLLM", status="absent", reason="not installed"),
    ]
    for shape in ("sweep-64", "sweep-4"):
        rows += [measurement(shape, "rope_cupy", 10.5), measurement(shape, "SGLang", 20)]
        rows += [measurement(shape, "vLLM", status="absent", reason="not installed")]
    rows += [  # none of which is what the tables show
        measurement("qwen-image", "rope_cupy", 1, dtype="float32"),
        measurement("qwen-image", "rope_cupy", 1, variant="new"),
        measurement("qwen-image", "rope_cupy", 1, table="complex"),
        measurement("qwen-image", "rope_cupy", 1, measure="rotation and attention"),
        measurement("head-dim-128", "rope_cupy", 1),
    ]
    return [row | others for row in rows]


def fused_rows(**others):
    """Two norms and a cache, by rope_cupy, the rotation alone and peers."""
    of_norm = {"op": "norm head"}
    rows = [
        measurement("qwen-image", "limit", 9.5, **of_norm),
        measurement("qwen-image", "rotation alone", 10, **of_norm),
        measurement("qwen-image", "rope_cupy", 10.2, **of_norm),
        measurement("qwen-image", "SGLang", 14, **of_norm),
        measurement("qwen-image", "Liger", status="unsupported", reason="halves", **of_norm),
        measurement("qwen-image", "torch.compile", 40, **of_norm),
        measurement("llama-3-8b-decode-1", "limit", 9.5, **of_norm),
        measurement("llama-3-8b-decode-1", "rotation alone", 8, **of_norm),
        measurement("llama-3-8b-decode-1", "rope_cupy", 8.1, **of_norm),
        measurement("llama-3-8b-decode-1", "SGLang", status="wrong", reason="off", **of_norm),
        measurement("llama-3-8b-decode-1", "Liger", 20, **of_norm),
        measurement("llama-3-8b-prefill", "limit", 9.5, op="cache"),
        measurement("llama-3-8b-prefill", "rope_cupy", 10.4, op="cache"),
        measurement("llama-3-8b-prefill", "two launches", 12.5, op="cache"),
        measurement("llama-3-8b-prefill", "vLLM", status="absent", reason="gone", op="cache"),
    ]
    for row in rows:
        for column in ("variant", "table", "measure"):
            del row[column]
    return [row | {"gigabytes_a_second": ""} | others for row in rows]


def model_rows(**others):
    """Two models, as they are and enabled, called in two ways; one has no compiled time."""
    times = {
        "flux": {"eager": 3.4, "eager, enabled": 2.5, "compiled": 2.2, "compiled, enabled": 2.0},
        "qwen3-8b-decode-1": {"eager": 1.2, "eager, enabled": 1.5},
    }
    rows = []
    for model, calls in times.items():
        library = "diffusers" if model == "flux" else "transformers"
        for call in ("eager", "eager, enabled", "compiled", "compiled, enabled"):
            row = MACHINE | {"model": model, "library": library, "size": "big", "call": call}
            row |= {"dtype": "bfloat16", "version": "1.2", "status": "wrong", "reason": "off"}
            row |= {"milliseconds": "", "speedup": "", "gpu_milliseconds": "", "error": "0.1"}
            if call in calls:
                time = calls[call]
                row |= {"status": "ok", "reason": "", "milliseconds": time, "error": "0.004"}
                row["speedup"] = f"{calls[call.removesuffix(', enabled')] / time:.3f}"
            rows.append(row | others)
    return rows


@pytest.fixture
def write(tmp_path):
    """write(name, rows): the path of a CSV file of these rows."""

    def write_csv(name, rows):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write_csv


@pytest.fixture
def run(write):
    (made_up,) = figures.read(write("a.csv", rotary_rows()))
    return made_up


def executed(notebook, cwd, **settings):
    """The notebook's outputs, in order, with no cell failed."""
    content = nbformat.read(notebook, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ROPE_CUPY_BENCH", "ROPE_CUPY_SAVE"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        resources = {"metadata": {"path": str(cwd)}}
        nbclient.NotebookClient(
            content, timeout=300, kernel_name="python3", resources=resources
        ).execute()
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return [output.data for output in outputs if "data" in output]


def markdown(shown):
    return [data["text/markdown"] for data in shown if "text/markdown" in data]


def files_of(folder):
    """What files that git tracks, and those that it does not ignore, hold."""
    command = "git", "ls-files", "--cached", "--others", "--exclude-standard"
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {name: (folder / name).read_bytes() for name in names.splitlines()}


def test_without_a_gpu_the_notebook_reads_the_committed_results_and_says_so():
    unchanged = files_of(ROOT / "benchmarks")
    banner, *tables = markdown(executed(NOTEBOOK, ROOT, CUDA_VISIBLE_DEVICES=""))
    assert banner.startswith("> **Nothing was measured on this machine.** These are committed")
    for name in ("NVIDIA H100 80GB HBM3 (2026-", "NVIDIA H200 (2026-", "ROPE_CUPY_SAVE=1"):
        assert name in banner
    assert tables == committed_tables()
    assert unchanged == files_of(ROOT / "benchmarks")


def copied(folder):
    """The notebook beside the modules that it imports, in a folder without results."""
    (folder / "results").mkdir(parents=True)
    for source in ("figures.py", "shapes.py", "committed.py", "rotary.ipynb"):
        shutil.copy(ROOT / "benchmarks" / source, folder)
    return folder / "rotary.ipynb"


SCRIPT = """
import shutil, sys
shutil.copy({csv!r}, sys.argv[-1])
"""


@pytest.mark.parametrize("save", [None, "1"])
def test_measurements_are_copied_to_the_results_only_when_asked(tmp_path, write, save):
    """Scripts that write made-up measurements stand for those that measure."""
    notebook = copied(tmp_path / "benchmarks")
    kinds = {"rotary": rotary_rows, "host": host_rows, "fused": fused_rows, "models": model_rows}
    for kind, rows in kinds.items():
        csv = str(write(f"{kind}.csv", rows(gpu="NVIDIA H300 80GB")))
        (notebook.parent / f"bench_{kind}.py").write_text(SCRIPT.format(csv=csv))
    results = notebook.parent / "results"
    older = results / "2026-01-02-h300-host.csv"
    older.write_text("older")
    settings = {"ROPE_CUPY_BENCH": "run", "TMPDIR": str(tmp_path)}
    settings |= {} if save is None else {"ROPE_CUPY_SAVE": save}
    banner, *_ = markdown(executed(notebook, tmp_path, **settings))
    assert banner.startswith("> **These results were measured on the GPU of this machine.**")
    found = {path.name for path in results.iterdir()}
    if save is None:
        assert found == {older.name} and older.read_text() == "older"
    else:
        assert found == {f"2026-01-02-h300-{kind}.csv" for kind in kinds}
        for kind in kinds:
            copy = results / f"2026-01-02-h300-{kind}.csv"
            assert copy.read_bytes() == (tmp_path / f"{kind}.csv").read_bytes()


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("cpu", "cpu"),
    ],
)
def test_a_file_of_results_is_named_by_its_day_and_gpu(tmp_path, write, gpu, name):
    csv = write("a.csv", host_rows(gpu=gpu))
    assert committed.save(csv, tmp_path, "host").name == f"2026-01-02-{name}-host.csv"


def test_without_a_gpu_the_notebook_measures_on_the_cpu_and_draws_five_figures(tmp_path):
    for library in ("diffusers", "transformers"):
        pytest.importorskip(library)
    unchanged = files_of(ROOT / "benchmarks")
    shown = executed(NOTEBOOK, ROOT / "tests", ROPE_CUPY_BENCH="small", TMPDIR=str(tmp_path))
    assert sum("image/png" in data for data in shown) == 5
    banner, table, of_fused, of_models = markdown(shown)
    assert banner.startswith("> **These small shapes were measured on the CPU.**")
    assert table.startswith("no GPU: the CPU, ")
    assert "| llama-3-8b-decode-64 | 64 | 32/8, D128 | half |" in table
    assert of_fused.startswith("no GPU: the CPU, ")
    assert "| norm heads: shape | limit | rotation alone | rope_cupy | torch eager |" in of_fused
    assert "| block or layer | eager | eager, enabled |" in of_models
    assert of_models.count("(**") == 2
    assert unchanged == files_of(ROOT / "benchmarks")
    for kind in ("rotary", "host", "fused"):
        (path,) = tmp_path.glob(f"*/{kind}.csv")
        (measured,) = figures.read(path)
        ours = measured[measured["provider"] == "rope_cupy"]
        assert set(ours["status"]) <= {"ok", "unsupported"}
        assert (ours["microseconds"][ours["status"] == "ok"] > 0).all()
        assert (ours["status"] == "ok").any()


@pytest.mark.parametrize("num_kinds", [2, 3, 4], ids=["", "fused", "fused, models"])
def test_the_notebook_draws_the_newest_results_of_each_gpu(tmp_path, write, num_kinds):
    folder = copied(tmp_path / "benchmarks").parent
    kinds = {"rotary": rotary_rows, "host": host_rows, "fused": fused_rows, "models": model_rows}
    for gpu, date in (("GPU A", "2026-01-02"), ("GPU A", "2026-02-03"), ("GPU B", "2026-01-04")):
        for kind, rows in list(kinds.items())[:num_kinds]:
            name = f"{date}-{gpu[-1]}-{kind}.csv"
            shutil.move(write(name, rows(gpu=gpu, date=date)), folder / "results")
    shown = executed(folder / "rotary.ipynb", folder, ROPE_CUPY_BENCH="read")
    assert sum("image/png" in data for data in shown) == 1 + num_kinds
    banner, *tables = markdown(shown)
    assert "committed results of GPU A (2026-02-03) and GPU B (2026-01-04)." in banner
    captions = [table.partition(";")[0] for table in tables]
    newest = ["GPU A, driver 580.1, 2026-02-03", "GPU B, driver 580.1, 2026-01-04"]
    assert captions == newest * (num_kinds - 1)


def test_the_table_of_models_says_how_much_faster_what_is_enabled_is(write, capsys):
    path = write("a-models.csv", model_rows())
    (run,) = figures.read(path)
    versions = "Python 3.12.3, NumPy 2.4, CuPy 14.20, PyTorch 2.11, rope_cupy 0.1.0"
    expected = f"""\
GPU A, driver 580.1, 2026-01-02; {versions}, diffusers 1.2, transformers 1.2:

| block or layer | eager | eager, enabled | compiled | compiled, enabled |
| --- | --- | --- | --- | --- |
| flux | 3.40 | 2.50 (**1.36**) | 2.20 | 2.00 (**1.10**) |
| qwen3-8b-decode-1 | 1.20 | 1.50 (**0.80**) | wrong | wrong |"""
    assert figures.models(run) == expected
    figures.main(["--models", str(path)])
    assert capsys.readouterr().out == expected + "\n"
    figures.main([str(write("a.csv", rotary_rows())), "--readme", "--models", str(path)])
    assert capsys.readouterr().out.endswith(f"\n\n{expected}\n")
    # A part that is measured again counts, in a file of its own too.
    again = [row for row in model_rows() if row["model"] == "flux"]
    again[1] |= {"milliseconds": 2.0, "speedup": 1.7}
    (run,) = figures.read(path, write("b-models.csv", again))
    assert "| flux | 3.40 | 2.00 (**1.70**) |" in figures.models(run)


def test_the_gpus_time_has_a_table_of_its_own_without_calls_that_have_none(write):
    rows = model_rows()
    for row in rows:
        row["gpu_speedup"] = ""
        if row["model"] == "flux" and row["status"] == "ok" and "eager" not in row["call"]:
            enabled = row["call"].endswith("enabled")
            row |= {"gpu_milliseconds": 2.1 - 0.1 * enabled, "gpu_speedup": 1.05 if enabled else 1}
    (run,) = figures.read(write("a-models.csv", rows))
    assert figures.models(run).endswith("""

| block or layer, GPU alone | compiled | compiled, enabled |
| --- | --- | --- |
| flux | 2.10 | 2.00 (**1.05**) |
| qwen3-8b-decode-1 | wrong | wrong |""")


def test_the_plot_of_models_has_a_bar_for_each_way_to_call_one(write):
    (run,) = figures.read(write("a.csv", model_rows()))
    (axes,) = figures.draw(figures.draw_models, [run]).axes
    assert [each.get_text() for each in axes.get_yticklabels()] == ["flux", "qwen3-8b-decode-1"]
    bars = {bar.get_label(): [each.get_width() for each in bar] for bar in axes.containers}
    assert list(bars) == ["eager", "compiled"]
    assert np.allclose(bars["eager"], [0.36, -0.2])
    assert np.allclose(bars["compiled"], [0.1, np.nan], equal_nan=True)
    texts = {each.get_text() for each in axes.texts}
    assert {"1.36", "0.80", "1.10"} <= texts
    with pytest.raises(ValueError, match="must hold an enabled model, got none"):
        figures.draw(figures.draw_models, [run[run["call"] == "eager"]])


def test_the_readme_shows_every_provider_and_names_the_absent(run):
    versions = "Python 3.12.3, NumPy 2.4, CuPy 14.20, PyTorch 2.11, rope_cupy 0.1.0"
    expected = f"""\
GPU A, driver 580.1, 2026-01-02; {versions}:

| shape | tokens | heads | pairs | limit | rope_cupy | SGLang | Liger |
| --- | --- | --- | --- | --- | --- | --- | --- |
| qwen-image | 4,608 | 24/24, D128 | interleaved | 10.0 | **10.1** (99%) | 12.5 (80%) | - |
| llama-3-8b-decode-1 | 1 | 32/8, D128 | half | 10.0 | **8.00** (125%) | wrong | **8.00** (125%) |

Measured beside it: SGLang 1.0, Liger 1.0.
Absent from this run: diffusers, vLLM.
Unable to do these: quack."""
    assert figures.readme(run) == expected


FUSED = """\
| norm head: shape | limit | rotation alone | rope_cupy | SGLang | Liger | torch.compile |
| --- | --- | --- | --- | --- | --- | --- |
| qwen-image | 10.0 | 10.0 (100%) | **10.2** (98%) | 14.0 (71%) | - | 40.0 (25%) |
| llama-3-8b-decode-1 | 10.0 | 8.00 (125%) | **8.10** (123%) | wrong | 20.0 (50%) |  |

| cache: shape | limit | rope_cupy | two launches |
| --- | --- | --- | --- |
| llama-3-8b-prefill | 10.0 | **10.4** (96%) | 12.5 (80%) |

Measured beside it: SGLang 1.0, Liger 1.0, torch.compile 1.0.
Absent from this run: vLLM."""


def test_the_tables_of_what_is_fused_name_the_fastest_that_does_all_of_it(write, capsys):
    path = write("a-fused.csv", fused_rows())
    (run,) = figures.read(path)
    assert figures.fused(run) == f"{figures.caption(run)}:\n\n{FUSED}"
    figures.main(["--fused", str(path)])
    assert capsys.readouterr().out == figures.fused(run) + "\n"
    figures.main([str(write("a.csv", rotary_rows())), "--readme", "--fused", str(path)])
    assert capsys.readouterr().out.endswith(
        f"Unable to do these: quack.\n\n\n{figures.fused(run)}\n"
    )
    with pytest.raises(SystemExit):
        figures.main([])


def test_the_plot_of_what_is_fused_has_a_band_for_each_task(write):
    (run,) = figures.read(write("a.csv", fused_rows()))
    (axes,) = figures.draw(figures.draw_fused, [run]).axes
    tasks = [label.get_text() for label in axes.get_yticklabels()]
    assert tasks == [
        *("norm head, qwen-image", "norm head, llama-3-8b-decode-1", "cache, llama-3-8b-prefill")
    ]
    shares = figures.share_by_task(run)
    assert np.isclose(shares.at["norm head, qwen-image", "rope_cupy"], 10 / 10.2)
    assert len(axes.collections) == len(shares.columns) == 6


def test_the_plot_of_what_is_fused_has_twelve_bands_and_says_of_how_many(write):
    shapes = "qwen-image", "flux.1", "llama-3-8b-prefill", "llama-3-8b-decode-64", "head-dim-64"
    rows = [
        measurement(shape, provider, 11, op=op)
        for op in ("norm head", "cache", "qkv")
        for shape in shapes
        for provider in ("limit", "rope_cupy")
    ]
    for row in rows:
        for column in ("variant", "table", "measure"):
            del row[column]
    (run,) = figures.read(write("a.csv", rows))
    (axes,) = figures.draw(figures.draw_fused, [run]).axes
    tasks = [label.get_text() for label in axes.get_yticklabels()]
    left_out = "llama-3-8b-decode-64"  # the last but one is what the fourth round lacks
    assert tasks == [
        f"{op}, {shape}"
        for op in ("norm head", "cache", "qkv")
        for shape in shapes
        if shape != left_out
    ]
    assert axes.get_title(loc="left").startswith("12 of 15 operations and shapes, bfloat16;")


def test_every_plot_says_shape_dtype_scale_and_gpu(write):
    kinds = {"rotary": rotary_rows, "host": host_rows, "fused": fused_rows, "models": model_rows}
    runs = {kind: figures.read(write(f"{kind}.csv", rows())) for kind, rows in kinds.items()}
    q, k = "q (1, tokens, 32, 128)", "k (1, tokens, 8, 128)"
    subjects = {
        (figures.draw_times, "rotary"): f"{q} and {k}, bfloat16, in place; logarithmic scales",
        (figures.draw_shares, "rotary"): "2 shapes of models, bfloat16, in place; linear scale",
        (figures.draw_host_times, "host"): f"{figures.HOST_SHAPE}, bfloat16; linear scale",
        (figures.draw_fused, "fused"): (
            "3 of 3 operations and shapes, bfloat16; linear scale; the table has all"
        ),
        (figures.draw_models, "models"): (
            "Blocks and layers at their models' sizes, bfloat16; linear scale from 1"
        ),
    }
    for (panel, kind), subject in subjects.items():
        (axes,) = figures.draw(panel, runs[kind]).axes
        title = axes.get_title(loc="left").splitlines()
        assert title[:2] == [subject, "GPU A, driver 580.1, 2026-01-02"]
        assert axes.get_title() == ""
    shape = bench_host.SHAPE
    q, k = ((shape.batch, shape.tokens, heads, shape.head_dim) for heads in (shape[3], shape[4]))
    assert f"q {q} and k {k}" == figures.HOST_SHAPE


def test_a_limit_that_was_not_measured_leaves_times_alone(write):
    rows = [measurement("gemma-3-12b-prefill", "rope_cupy", 1234.6, limit_share="")]
    rows += [measurement("gemma-3-12b-prefill", "diffusers", status="failed", limit_share="")]
    (run,) = figures.read(write("a.csv", rows))
    (row,) = figures.comparison(run)[["limit", "rope_cupy", "diffusers"]].to_numpy().tolist()
    assert row == ["", "**1,235**", "failed"]


def test_the_sweep_is_ordered_by_tokens_and_has_the_limit(run):
    times = figures.time_by_tokens(run)
    assert times.index.tolist() == [4, 64]
    assert times.columns.tolist() == ["limit", "rope_cupy", "SGLang"]
    assert np.allclose(times, [[10, 10.5, 20]] * 2)


def test_shares_are_by_shape_and_nan_where_nothing_was_measured(run):
    shares = figures.share_by_shape(run)
    assert shares.index.tolist() == ["qwen-image", "llama-3-8b-decode-1"]
    assert shares.columns.tolist() == ["rope_cupy", "SGLang", "Liger"]
    exact = [[10 / 10.1, 0.8, np.nan], [10 / 8.004, np.nan, 10 / 8.001]]
    assert np.allclose(shares, exact, equal_nan=True)


def test_host_times_are_ordered_and_leave_out_what_was_not_measured(write):
    (run,) = figures.read(write("host.csv", host_rows()))
    times = figures.host_times(run)
    assert times["provider"].tolist() == ["RawKernel", "rope_cupy", "Liger"]
    assert figures.host_table(run).splitlines() == [
        "| host time of | call, in us | plain |",
        "| --- | --- | --- |",
        "| RawKernel | empty | 6.40 |",
        "| rope_cupy | in place | 10.1 |",
        "| Liger | in place | 38.0 |",
    ]


def test_ways_to_make_a_call_are_columns_of_host_times(write):
    others = {"in place, compiled": 90, "in place, compiled, dynamic lengths": 95.2, "new": 20.04}
    (ours,) = [row for row in host_rows() if row["provider"] == "rope_cupy"]
    more = [ours | {"call": call, "microseconds": time} for call, time in others.items()]
    (run,) = figures.read(write("host.csv", [*host_rows(), *more]))
    assert figures.host_table(run).splitlines() == [
        "| host time of | call, in us | plain | compiled | compiled, dynamic lengths |",
        "| --- | --- | --- | --- | --- |",
        "| RawKernel | empty | 6.40 | - | - |",
        "| rope_cupy | in place | 10.1 | 90.0 | 95.2 |",
        "| rope_cupy | new | 20.0 | - | - |",
        "| Liger | in place | 38.0 | - | - |",
    ]


def test_runs_of_different_gpus_are_kept_apart_and_files_of_one_run_put_together(write):
    first = write("a.csv", rotary_rows()[:3])
    second = write("b.csv", rotary_rows(gpu="GPU B"))
    third = write("c.csv", [*rotary_rows()[3:], measurement("qwen-image", "rope_cupy", 11)])
    a, b = figures.read(first, second, third)
    assert (set(a["gpu"]), set(b["gpu"])) == ({"GPU A"}, {"GPU B"})
    assert len(a) == len(b) == len(rotary_rows())
    # The row measured last counts.
    assert figures.comparison(a).at["qwen-image", "rope_cupy"] == "**11.0** (91%)"
    assert figures.comparison(b).at["qwen-image", "rope_cupy"] == "**10.1** (99%)"


def test_a_run_without_the_shapes_of_a_figure_says_what_is_wanted(run):
    with pytest.raises(ValueError, match="must hold sweep in bfloat16, in place, got none"):
        figures.time_by_tokens(run[~run["shape"].str.startswith("sweep")])


def test_the_command_prints_the_readmes_table_and_draws_the_same_plot_each_time(write, capsys):
    paths = [str(write("a-rotary.csv", rotary_rows())), "--host", str(write("h.csv", host_rows()))]
    figures.main([*paths, "--readme"])
    printed = capsys.readouterr().out
    (run,) = figures.read(paths[0])
    assert printed.startswith(figures.readme(run) + "\n\n| host time of | call, in us | plain |")
    plot = Path(paths[0]).with_suffix(".svg")
    before = plot.read_bytes()
    assert len(before) < 200e3
    assert str(plot.parent).encode() not in before
    figures.main([*paths, "--readme"])
    assert plot.read_bytes() == before

    figures.main(paths)
    drawn = {path.name for path in plot.parent.glob("*.svg")} - {plot.name}
    assert drawn == {"a-rotary-tokens.svg", "a-rotary-shapes.svg", "h.svg"}


def test_the_plots_hold_what_was_measured(write):
    runs = figures.read(write("a.csv", rotary_rows()), write("b.csv", rotary_rows(gpu="GPU B")))
    figure = figures.draw(figures.draw_times, runs)
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
        assert lines == {"limit": [10, 10], "rope_cupy": [10.5, 10.5], "SGLang": [20, 20]}
    assert [axes.get_title(loc="left").splitlines()[1][:5] for axes in figure.axes] == [
        "GPU A",
        "GPU B",
    ]
    figure = figures.draw(figures.draw_shares, runs[:1])
    (axes,) = figure.axes
    shapes = [label.get_text() for label in axes.get_yticklabels()]
    assert shapes == ["qwen-image", "llama-3-8b-decode-1"]
    assert len(axes.collections) == 3


def test_every_provider_has_a_look_of_its_own():
    assert len(set(figures.STYLES.values())) == len(figures.STYLES)


def test_the_example_of_a_docstring_is_right():
    assert doctest.testmod(figures) == (0, 2)


def committed_tables():
    rotary, fused, models = (
        figures.latest(NOTEBOOK.parent / "results", kind) for kind in ("rotary", "fused", "models")
    )
    return [*map(figures.readme, rotary), *map(figures.fused, fused), *map(figures.models, models)]


def test_the_committed_notebook_shows_the_committed_results_of_a_gpu():
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert markdown(shown) == [
        committed.banner("read", NOTEBOOK.parent / "results"),
        *committed_tables(),
    ]
    assert sum("image/png" in data for data in shown) == 5
