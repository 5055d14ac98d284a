"""README.md: its code runs as it stands there and gives the exact values, its figures are measured.

Where a block loads a large model or needs a GPU, a small model or the CPU stands in for it.
"""

import importlib.util
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import README, ROOT, blocks_of
from reference import check, rotate

from rope_cupy import RotaryTable, apply_rotary_qk
from rope_cupy.integrations.diffusers import disable as disable_processors
from rope_cupy.integrations.transformers import disable as disable_functions

TEXT = README.read_text(encoding="utf-8")
ON_GPU = pytest.mark.gpu
ON_CPU = {'"cuda"': '"cpu"'}


def sections():
    """The Python of README.md, by what stands above it."""
    blocks = [block for block in blocks_of(README) if block.language == "python"]
    assert len({block.section for block in blocks}) == len(blocks)
    return {block.section: block.source for block in blocks}


def run(section, replaced=None):
    """The names that the code of a section leaves behind."""
    source, names = sections()[section], {}
    for word, other in (replaced or {}).items():
        assert word in source
        source = source.replace(word, other)
    exec(compile(source, "README.md", "exec"), names)
    return names


def numbers(array):
    """An array of any library as float64 in NumPy."""
    array = array.double().cpu() if isinstance(array, torch.Tensor) else array
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)


def test_the_readme_is_one_screen_that_says_what_it_is_of():
    assert len(TEXT.splitlines()) <= 150
    first = TEXT.split("\n\n")[1]
    assert "RoPE" in first and "rotary position embeddings" in first


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=ON_GPU)])
def test_the_code_for_cupy_arrays_gives_the_exact_values(library):
    names = run("CuPy arrays", {"import cupy as": f"import {library} as"})
    angles = np.outer(np.arange(8192), 500000.0 ** -(np.arange(64) / 64))
    cos, sin = (numbers(part.astype(np.float32)) for part in (np.cos(angles), np.sin(angles)))
    rng = names["cp"].random.default_rng(0)
    for name in "qk":
        before = numbers(rng.standard_normal(names[name].shape, dtype=np.float32))
        check(numbers(names[f"{name}_out"]), rotate(before, cos, sin), "float32")
        at = np.arange(100, 612)
        check(numbers(names[name]), rotate(before, cos, sin, positions=at), "float32")


def test_the_pipeline_shown_is_switched_and_gives_what_it_gave(monkeypatch, capsys):
    from diffusers import FluxPipeline
    from tiny_diffusers import FLUX, build, output_of

    model, inputs = build(FLUX)

    class Pipeline(FluxPipeline):
        """One step of a pipeline whose transformer is small."""

        def __call__(self, prompt):
            with torch.no_grad():
                return SimpleNamespace(images=[output_of(self.transformer, inputs)])

    others = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    small = Pipeline(transformer=model, **others)
    wanted = small("").images[0]
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda name, torch_dtype: small)
    names = run("A pipeline of diffusers", ON_CPU)
    assert "replaced 2 FluxAttnProcessor" in capsys.readouterr().out
    assert not torch.equal(names["image"], wanted)
    torch.testing.assert_close(names["image"], wanted, rtol=1e-4, atol=1e-4)
    disable_processors(small)
    assert torch.equal(small("").images[0], wanted)


def test_the_model_shown_is_switched_and_gives_what_it_gave(monkeypatch, capsys):
    from blocks import CONFIGS, model_of
    from transformers import AutoModelForCausalLM

    small = model_of(CONFIGS["Qwen3"])
    prompt = torch.tensor([[97 - 7, 11, 18]])
    wanted = small.generate(prompt, max_new_tokens=20)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, dtype: small)
    names = run("A model of transformers", ON_CPU | {"9707, 11, 1879": "90, 11, 18"})
    assert "Qwen3Attention.q_norm: one call with the rotation" in capsys.readouterr().out
    assert torch.equal(names["tokens"], wanted) and wanted.shape[1] > 3
    disable_functions(small)


def test_every_module_of_another_librarys_functions_has_its_row():
    rows = re.findall(r"^\| .+ \| `rope_cupy\.compat\.(\w+)`(?:, `\.(\w+)`)? \| .+ \|$", TEXT, re.M)
    named = [name for row in rows for name in row if name]
    folder = ROOT / "rope_cupy/compat"
    there = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert sorted(named) == sorted(there)


ROWS = re.findall(r"^\| (.+?) \| `(apply_rotary_qk\(.+\))` \|$", TEXT, re.M)
HEADS_FIRST, NEIGHBOURS = ("Llama", "Flux's own"), ("Flux", "Qwen-Image")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_line_for_a_model_rotates_as_the_model_does(row):
    """The tables of these rows, made anew from angles, and the rotation by its definition."""
    whose, call = row
    torch.manual_seed(3)
    angles = torch.rand(40, 32, dtype=torch.float64) * 6
    shape = (2, 40, 8, 64) if whose.startswith(("Flux", "Wan", "Llama", "Qwen")) else (40, 8, 64)
    shape = shape if len(shape) == 4 else (1, *shape)
    q, k = (
        torch.randn(shape, dtype=torch.float64),
        torch.randn(shape, dtype=torch.float64)[:, :, :2],
    )
    neighbours, positions = whose.startswith(NEIGHBOURS), torch.arange(40)
    names = {"cos": angles.cos(), "sin": angles.sin(), "positions": positions}
    names["cos_sin"] = torch.cat([angles.cos(), angles.sin()], -1)
    if "from_full_width" in call:
        wide = angles.repeat_interleave(2, -1) if neighbours else torch.cat([angles, angles], -1)
        names |= {"cos": wide.cos(), "sin": wide.sin()}
    elif "from_complex" in call:
        names["freqs"] = torch.polar(torch.ones_like(angles), angles)
    elif "from_matrices" in call:
        rows = [torch.stack([angles.cos(), -angles.sin()], -1)]
        rows.append(torch.stack([angles.sin(), angles.cos()], -1))
        names["freqs"] = torch.stack(rows, -2)[None, None]  # (batch, 1, tokens, pairs, 2, 2)
    heads_first = whose.startswith(HEADS_FIRST)
    given = [x.transpose(1, 2) if heads_first else x for x in (q, k)]
    names |= {"apply_rotary_qk": apply_rotary_qk, "RotaryTable": RotaryTable}
    found = eval(call, names | dict(zip("qk", given, strict=True)))
    for x, y in zip((q, k), found, strict=True):
        y = y.transpose(1, 2) if heads_first else y
        exact = rotate(
            x.numpy(), angles.cos().numpy(), angles.sin().numpy(), interleaved=neighbours
        )
        np.testing.assert_allclose(y.numpy(), exact, atol=1e-12)


def test_the_readme_has_these_lines_for_models():
    assert len(ROWS) == 6


def chart():
    spec = importlib.util.spec_from_file_location("chart", ROOT / "docs/chart.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_chart_is_drawn_from_the_committed_results():
    assert (ROOT / "docs/speed.svg").read_text(encoding="utf-8") == chart().svg()
    rows = dict(
        re.findall(r">([^<]+)</text>\n<rect .*\n.*?>([\d.]+(?: ms|%))</text>", chart().svg())
    )
    assert rows["diffusers"] and rows["with rope_cupy"].endswith(" ms")
