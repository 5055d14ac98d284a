"""The pages of docs/: their code runs and prints what it says, their figures were measured."""

import csv
import inspect
import re
import shlex
import socket
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pages import PAGES, README, ROOT, blocks_of, run
from reference import check, rotate

import rope_cupy
from rope_cupy import environment

figures = pytest.importorskip("figures")
ON_GPU = pytest.mark.gpu
RESULTS = ROOT / "benchmarks/results"
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in [README, *PAGES]}
WITH_CODE = [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))]
NEEDING_A_GPU = [page for page in WITH_CODE if any(b.needs_a_gpu for b in blocks_of(page))]


def by_name(page):
    return page.name


def numbers(array):
    """A tensor or an array as float64 in NumPy."""
    return np.asarray(array.double().cpu() if isinstance(array, torch.Tensor) else array, float)


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a program that it starts alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **place}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=by_name)
def test_the_code_of_a_page_prints_what_it_says(page, one_process, without_a_gpu):
    torch.manual_seed(0)
    left = run(page)
    for section, hold in HELD.get(page.name, {}).items():
        hold(left[section])


@ON_GPU
@pytest.mark.parametrize("page", NEEDING_A_GPU, ids=by_name)
def test_the_code_of_a_page_runs_on_a_gpu(page, one_process):
    run(page, on_gpu=True)


def test_only_what_needs_a_gpu_is_left_out_on_the_cpu():
    """A block that a CPU can run must not be marked."""
    left_out = [block for page in PAGES for block in blocks_of(page) if block.needs_a_gpu]
    assert all('device="cuda"' in block.source for block in left_out)
    assert [block.section for block in left_out] == ["CUDA graphs"]


# What the code of some sections must have computed.


def hold_the_rotation_of_torch_tensors(names):
    torch.manual_seed(0)
    cos, sin = numbers(names.cos), numbers(names.sin)
    for name in ("q_out", "k_out"):
        found = getattr(names, name)
        before = torch.randn(found.shape, dtype=torch.bfloat16)
        exact = rotate(numbers(before.transpose(1, 2)), cos, sin, interleaved=True)
        check(numbers(found.transpose(1, 2)), exact, "bfloat16")


def hold_packed_views(names):
    torch.manual_seed(0)
    torch.randn_like(names.q_out), torch.randn_like(names.k_out)
    before = numbers(torch.randn(300, 3, 16, 128)).transpose(1, 0, 2, 3)
    cos, sin = numbers(names.cos), numbers(names.sin)
    for found, x in zip((names.packed_q, names.packed_k), before, strict=False):
        exact = rotate(x[None], cos, sin, positions=np.arange(300) % 100)
        check(numbers(found)[None], exact, "float32")
    assert np.array_equal(numbers(names.v), before[2])


def cos_sin(base, positions, dim=128):
    angles = np.outer(positions, base ** -(np.arange(dim // 2) / (dim // 2)))
    return np.cos(angles), np.sin(angles)


def hold_the_norm(names):
    exact = rotate(np.ones((1, 16, 32, 128)) / np.sqrt(1 + 1e-6), *cos_sin(500000.0, np.arange(16)))
    np.testing.assert_allclose(names.q_out, exact[0], atol=1e-6)
    np.testing.assert_allclose(names.k_out, exact[0, :, :8], atol=1e-6)


def hold_the_caches(names):
    exact = rotate(np.ones((1, 16, 32, 128)), *cos_sin(10000.0, np.arange(100, 116)))[0]
    np.testing.assert_allclose(names.q_out, exact, atol=1e-6)
    np.testing.assert_allclose(names.k_cache[2], exact[:, :8], atol=1e-6)
    assert not names.k_cache[[0, 1, *range(3, 8)]].any()


def hold_the_caches_of_8_bits(names):
    exact = rotate(np.ones((1, 16, 32, 128)), *cos_sin(10000.0, np.arange(100, 116)))[0, :, :8]
    for cache, written in ((names.k_cache, exact), (names.v_cache, names.v)):
        codes = torch.from_numpy(cache).view(torch.float8_e4m3fn).double().numpy() * 0.02
        np.testing.assert_allclose(codes[0], written, rtol=2**-4, atol=0.02 * 2**-10)


def hold_the_offsets(names):
    for row, length in enumerate(names.lengths):
        exact = rotate(np.ones((1, 1, 32, 128)), *cos_sin(10000.0, [length]))
        np.testing.assert_allclose(names.q_out[row], exact[0], atol=1e-6)


def hold_the_streams(names):
    table = rope_cupy.diffusion.qwen_image((1, 24, 32), text_length=20, like=names.joint_q)
    wanted = rope_cupy.apply_rotary(np.ones_like(names.joint_q), table, interleaved=True)
    np.testing.assert_allclose(names.joint_q, wanted, atol=1e-6)
    np.testing.assert_array_equal(names.joint_q, names.joint_k)
    np.testing.assert_array_equal(names.one_q, names.joint_q)
    np.testing.assert_array_equal(names.one_k, names.joint_k)
    assert (names.one_v == 1).all()


def hold_the_exchange(names):
    """Each group of heads is that of the whole, rotated at the positions of this process."""
    whole = names.rope_cupy.apply_rotary(names.mine, names.table, positions=names.first)
    for process, sent in enumerate(names.to_send):
        heads = slice(8 * process, 8 * process + 8)
        torch.testing.assert_close(sent, whole[0, :, heads], rtol=0, atol=0)
    assert names.to_send.is_contiguous()


def hold_the_gradients(names):
    """The gradient of a query is its key, both rotated, and the query rotated back."""
    queries, keys = names.queries.detach(), names.keys.detach()
    cos, sin = cos_sin(10000.0, np.arange(300))
    rotated = np.zeros(queries.shape)
    rotated[:, :, ::4] = rotate(numbers(keys), cos, sin)
    exact = rotate(rotated, cos, -sin)
    np.testing.assert_allclose(numbers(names.queries.grad), exact, rtol=1e-4, atol=1e-4)


HELD = {
    "index.md": {
        "PyTorch": hold_the_rotation_of_torch_tensors,
        "Positions": hold_packed_views,
        "One launch before attention": hold_the_norm,
    },
    "serving.md": {
        "Write the cache in the same launch": hold_the_caches,
        "Caches of 8 bits": hold_the_caches_of_8_bits,
        "Positions of a batch": hold_the_offsets,
    },
    "diffusion-models.md": {"A processor of your own": hold_the_streams},
    "several-gpus.md": {"Ulysses by strides": hold_the_exchange},
    "training.md": {"Gradients": hold_the_gradients},
}


# Figures.


class Cell(NamedTuple):
    """A number of a committed file, and how it is written."""

    file: str
    column: str
    where: dict
    form: str

    def __str__(self):
        with (RESULTS / self.file).open(encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if self.where.items() <= r.items()]
        (row,) = rows
        return self.form.format(float(row[self.column]))


def time_of(model, call, file="2026-11-28-h100-models.csv"):
    where = {"model": model, "call": call, "status": "ok"}
    return Cell(file, "milliseconds", where, "{:.2f}")


def host_of(provider, call, form):
    where = {"provider": provider, "call": call, "status": "ok"}
    return Cell("2026-11-26-h100-host.csv", "microseconds", where, form)


def start_of(step):
    return Cell("2026-11-28-h100-cold-start.csv", "milliseconds", {"step": step}, "{:.0f}")


def share_of(file, **where):
    where |= {"shape": "qwen-image", "dtype": "bfloat16", "provider": "rope_cupy"}
    return Cell(file, "limit_share", where, "{:.0%}")


def model_row(name, model, *more, **where):
    """A row of a page: eager, compiled and more ways by the clock, each as it is and enabled."""
    ways = "eager", "compiled", *more
    cells = [time_of(model, way + which, **where) for way in ways for which in ("", ENABLED)]
    return f"| {name} | {' | '.join(['{}'] * len(cells))} |", cells


def whole_row(name, model):
    return model_row(name, model, "reduce-overhead", file="2026-11-29-h200-models.csv")


ENABLED, PLACED = ", enabled", "in place, positions"
ROTATION = {"variant": "in place", "table": "half", "measure": "rotation"}
# Sentences and rows with figures, and the numbers of committed files that these are.
CLAIMS = {
    "README.md": [
        model_row("Flux", "flux"),
        model_row("Qwen-Image", "qwen-image"),
        model_row("LTX", "ltx"),
        model_row("HunyuanVideo", "hunyuan-video"),
        model_row("Wan 2.1 14B", "wan-2.1-14b"),
        model_row("Qwen3 8B, 8,192 tokens", "qwen3-8b-prefill"),
        model_row("Llama 3 8B, 8,192 tokens", "llama-3-8b-prefill"),
        (
            "A block of Qwen-Image takes {} ms with rope_cupy and {} ms without; the rotation "
            "reaches {} of the memory's limit, the norm with the rotation {}",
            [
                *[time_of("qwen-image", call) for call in ("eager, enabled", "eager")],
                share_of("2026-11-26-h100-rotary.csv", **ROTATION),
                share_of("2026-11-26-h100-fused.csv", op="norm head"),
            ],
        ),
    ],
    "diffusion-models.md": [
        whole_row("Flux", "flux"),
        whole_row("Flux, single stream", "flux-single"),
        whole_row("Qwen-Image", "qwen-image"),
        whole_row("Z-Image", "z-image"),
        whole_row("LTX", "ltx"),
        whole_row("HunyuanVideo", "hunyuan-video"),
        whole_row("HunyuanVideo, single stream", "hunyuan-video-single"),
        whole_row("Wan 2.1 14B", "wan-2.1-14b"),
    ],
    "language-models.md": [
        whole_row("Llama 3 8B, 8,192 tokens", "llama-3-8b-prefill"),
        whole_row("Llama 3 8B, a step of 1 sequence", "llama-3-8b-decode-1"),
        whole_row("Llama 3 8B, a step of 32 sequences", "llama-3-8b-decode-32"),
        whole_row("Qwen3 8B, 8,192 tokens", "qwen3-8b-prefill"),
        whole_row("Qwen3 8B, a step of 1 sequence", "qwen3-8b-decode-1"),
        whole_row("Qwen3 8B, a step of 32 sequences", "qwen3-8b-decode-32"),
    ],
    "performance.md": [
        (
            "an empty RawKernel of {} us: SGLang took {} us in place with positions, FlashInfer {} "
            "us, Liger {} us, comfy-kitchen {} us, diffusers {} us and flash-attn {} us",
            [
                host_of("RawKernel", "empty", "{:.2f}"),
                host_of("SGLang", PLACED, "{:.2f}"),
                host_of("FlashInfer", PLACED, "{:.1f}"),
                host_of("Liger", "in place", "{:.1f}"),
                host_of("comfy-kitchen", "in place", "{:.1f}"),
                host_of("diffusers", "new arrays", "{:.0f}"),
                host_of("flash-attn", "in place", "{:.0f}"),
            ],
        ),
        (
            "added {} ms to that of NumPy. A first call took {} ms, and {} ms where",
            [
                start_of("import rope_cupy after numpy"),
                start_of("first call, kernel cached"),
                start_of("first call, nothing cached"),
            ],
        ),
        ("Over 100% is reached", []),  # what a share may be, and no figure
    ],
}
FIGURE = r"\d[\d,.]*(?: ?(?:%|us\b|ms\b|GB/s|times as)|x\b)"


def without_code(name):
    """A page without its code and its line breaks; without tables where others are compared."""
    text = re.sub(r"^```\w+\n.*?^```$|<!--.*?-->", "", TEXTS[name], flags=re.M | re.S)
    if name == "performance.md":
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    return " ".join(text.split())


@pytest.mark.parametrize("name", TEXTS)
def test_a_figure_in_a_sentence_is_one_of_the_committed_results(name):
    text = without_code(name)
    for template, cells in CLAIMS.get(name, []):
        sentence = template.format(*cells)
        assert sentence in text
        text = text.replace(sentence, "")
    assert re.findall(FIGURE, text) == []


@pytest.mark.parametrize("name", ["README.md", "diffusion-models.md", "language-models.md"])
def test_a_row_with_figures_is_one_of_the_committed_results(name):
    """Each is a claim of its own: ("| Flux | {} | {} |", [Cell(...), Cell(...)])."""
    text = re.sub(r"<!--.*?-->", "", TEXTS[name], flags=re.S)
    claimed = [template.format(*cells) for template, cells in CLAIMS[name]]
    assert [
        row for row in re.findall(r"^\|.*\| \d+\.\d+ \|.*$", text, re.M) if row not in claimed
    ] == []


def test_a_measurement_shown_as_it_was_printed_stands_in_the_committed_results():
    results = (RESULTS / "2026-11-28-h100.txt").read_text(encoding="utf-8").splitlines()
    shown = [s for page in PAGES for _, language, s, _ in blocks_of(page) if language == "text"]
    (block,) = [each for each in shown if re.search(FIGURE, each)]
    assert "of copy" in block and {*block.splitlines()} <= {*results}


def lines_of(head, body):
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def training_rows():
    """The table of the page, of the rows that have a time."""
    with (RESULTS / "2026-11-25-h100-training.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    columns = list(dict.fromkeys((row["shape"], row["measure"]) for row in rows))
    table = {}
    for row in rows:
        share = f" ({float(row['limit_share']):.1%})" if row["limit_share"] else ""
        cell = figures.digits(float(row["microseconds"])) + share
        calls = table.setdefault((row["provider"], row["call"]), dict.fromkeys(columns, "-"))
        calls[row["shape"], row["measure"]] = cell
    body = [[*who, *cells.values()] for who, cells in table.items() if who[0] != "limit"]
    return lines_of(["library", "call", *map(", ".join, columns)], body)


SHOWN_OF_COMPAT = {  # functions of each library: new arrays, in place, the others that differ
    "flash_attn": ("apply_rotary_emb", "apply_rotary_emb, in place", "apply_rotary_emb_qkv_"),
    "quack": ("apply_rotary_emb", "apply_rotary_emb, in place", "apply_rotary_emb_qkv_"),
    "flashinfer": (
        "apply_rope",
        "apply_rope_pos_ids_inplace",
        "apply_rope_with_cos_sin_cache_inplace",
    ),
    "vllm": ("rotary_embedding", "fused_qk_norm_rope", "triton_mrope"),
    "sglang": (
        "apply_rope_inplace",
        "apply_rope_inplace_with_kvcache",
        "fused_inplace_qknorm_rope",
    ),
    "liger": ("liger_rotary_pos_emb", "liger_multimodal_rotary_pos_emb"),
    "comfy_kitchen": ("apply_rope", "apply_rope_split_half_", "rms_rope_"),
    "torchtitan": ("ComplexRoPE.apply_rotary_emb", "CosSinRoPE.apply_rotary_emb"),
    "timm": ("apply_rot_embed_cat",),
}


def compat_rows():
    """The table of the page: a function of another library beside that of rope_cupy.compat."""
    few, many = "64-tokens-32/8", "llama-3-8b-prefill"
    columns = {
        "host": ("host", few),
        "GPU, 64 tokens": ("GPU", few),
        "GPU, 8,192 tokens": ("GPU", many),
    }
    with (RESULTS / "2026-11-29-h200-compat.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] != "plain call"]
    times = {
        (row["call"], (row["measure"], row["shape"]), row["provider"] == "rope_cupy.compat"): row
        for row in rows
    }

    def cells(call):
        pairs = [times[call, column, ours] for column in columns.values() for ours in (True, False)]
        return [figures.digits(float(row["microseconds"])) for row in pairs]

    calls = [f"{module}.{name}" for module, names in SHOWN_OF_COMPAT.items() for name in names]
    head = ["function", *[name for column in columns for name in (column, "theirs")]]
    return lines_of(head, [[call, *cells(call)] for call in calls])


def test_every_table_of_the_page_on_performance_is_what_the_committed_results_give(
    capsys, monkeypatch
):
    page = TEXTS["performance.md"]
    commands = re.findall(r"^python benchmarks/figures\.py (.*)$", page, re.M)
    monkeypatch.chdir(ROOT)
    saved = []
    monkeypatch.setattr(figures, "save", lambda figure, path: saved.append(path))
    for command in commands:
        figures.main(shlex.split(command))
    made = [*capsys.readouterr().out.splitlines(), *training_rows(), *compat_rows()]
    lines = page.splitlines()
    assert [line for line in made if line and line not in lines] == []
    measured = [line for line in lines if re.match(r"\|.*\| [\d*]", line)]
    assert [line for line in measured if line not in made] == []
    (plot,) = saved
    assert plot.is_file() and plot.stat().st_size < 200e3 and f"](../{plot})" in page


# Pages as a whole.


def test_the_links_of_a_page_lead_to_files():
    others = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for page in [README, *PAGES, *others]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_sites_navigation_and_in_the_readme():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert re.search(rf": {page.name}$", navigation, re.M), page.name
        assert f"](docs/{page.name})" in TEXTS["README.md"]


def test_the_reference_shows_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)$", TEXTS["reference.md"], re.M)
    wanted = {f"rope_cupy.{name}" for name in rope_cupy.__all__} | {"rope_cupy.torch"}
    compat = (ROOT / "rope_cupy/compat").glob("[a-z]*.py")
    wanted |= {f"rope_cupy.compat.{path.stem}" for path in compat}
    wanted |= {f"rope_cupy.integrations.{name}" for name in ("diffusers", "transformers")}
    assert wanted <= {*shown} and len(shown) == len({*shown})


def test_what_views_or_computes_a_table_is_on_the_page_of_tables():
    page = TEXTS["which-table-is-mine.md"]
    offered = {name for name in vars(rope_cupy.RotaryTable) if name.startswith("from_")}
    assert {name for name in offered if f"`RotaryTable.{name}(" not in page} == set()


def test_every_table_of_a_model_is_on_the_page_of_diffusion_models():
    page = TEXTS["diffusion-models.md"]
    assert [name for name in rope_cupy.diffusion.__all__ if f"`{name}`" not in page] == []


def test_every_function_of_one_launch_is_on_the_first_page():
    table = re.findall(r"^\| `(\w+)\(", TEXTS["index.md"], re.M)
    named = {name: getattr(rope_cupy, name) for name in rope_cupy.__all__}
    functions = {name for name, value in named.items() if inspect.isfunction(value)}
    assert {*table, "apply_rotary", "apply_rotary_qk"} == functions


def test_every_module_of_another_library_is_on_its_page():
    page = TEXTS["other-libraries.md"]
    for path in (ROOT / "rope_cupy/compat").glob("[a-z]*.py"):
        assert f"| `rope_cupy.compat.{path.stem}` |" in page


def test_the_words_of_faults_of_the_machine_are_those_of_the_code():
    source = (ROOT / "rope_cupy/environment.py").read_text(encoding="utf-8")
    source = source.replace("{MIN_CUPY}", environment.MIN_CUPY)
    section = TEXTS["troubleshooting.md"].split("## The machine")[1]
    for words in re.findall(r"^\| `(.+?)` \|", section, re.M):
        assert words in source, words


def test_the_map_names_every_module():
    page = TEXTS["architecture.md"]
    for path in (ROOT / "rope_cupy").glob("*.py"):
        assert path.name == "__init__.py" or path.name in page, path.name
    for path in (ROOT / "kernels").iterdir():
        assert f"`{path.name}`" in page, path.name
