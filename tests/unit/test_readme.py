"""The code in README.md runs as it stands there, gives the exact values and fails as it says."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import check, rotate

import rope_cupy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ (.*)\n((?:(?!##+ ).*\n)*)", README, re.M))
ON_GPU = pytest.mark.gpu


def code(section, language="python"):
    """The code blocks of a section, one after the other."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    assert blocks, f"no {language} under {section}"
    return "\n".join(blocks)


def run(source):
    """The names that the code leaves behind."""
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    return names


def numbers(array):
    """An array of any library as float64 in NumPy."""
    array = array.double().cpu() if isinstance(array, torch.Tensor) else array
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=ON_GPU)])
def test_the_quick_start_for_cupy_arrays_gives_the_exact_values(library):
    names = run(code("CuPy arrays").replace("import cupy as", f"import {library} as"))
    rng = names["cp"].random.default_rng(0)
    angles = np.outer(np.arange(8192), 500000.0 ** -(np.arange(64) / 64))
    cos, sin = (numbers(part.astype(np.float32)) for part in (np.cos(angles), np.sin(angles)))
    for name in "qk":
        before = rng.standard_normal(names[name].shape, dtype=np.float32)
        exact = rotate(numbers(before), cos, sin)
        check(numbers(names[f"{name}_out"]), exact, "float32")
        check(numbers(names[name]), exact, "float32")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_the_quick_start_for_torch_tensors_gives_the_exact_values(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    torch.manual_seed(0)
    names = run(code("PyTorch tensors"))
    torch.manual_seed(0)
    q, k = (torch.randn_like(names[name]) for name in ("q_out", "k_out"))
    cos, sin = numbers(names["cos"]), numbers(names["sin"])
    for before, after in ((q, names["q_out"]), (k, names["k_out"])):
        exact = rotate(numbers(before.transpose(1, 2)), cos, sin, interleaved=True)
        check(numbers(after.transpose(1, 2)), exact, "bfloat16")

    q, k, v = numbers(torch.randn_like(names["qkv"])).transpose(1, 0, 2, 3)
    for before, after in ((q, names["q"]), (k, names["k"])):
        exact = rotate(before[None], cos, sin, positions=np.arange(300) % 100)
        check(numbers(after)[None], exact, "float32")
    assert np.array_equal(numbers(names["v"]), v)

    # The gradient of a query is its key, both rotated, and the query rotated back.
    queries, keys = names["queries"], names["keys"]
    rotated = torch.zeros_like(queries)
    rotated[:, :, ::4] = names["rotary"](queries, keys)[1].detach()
    angles = np.outer(np.arange(300), 500000.0 ** -(np.arange(64) / 64))
    exact = rotate(numbers(rotated), np.cos(angles)[None], -np.sin(angles)[None])
    np.testing.assert_allclose(numbers(queries.grad), exact, rtol=1e-4, atol=1e-4)


def test_one_pass_before_attention_gives_the_exact_values():
    names = run(code("One pass before attention"))
    ones, angles = (
        np.ones((1, 16, 32, 128)),
        np.outer(np.arange(200), 10000.0 ** -(np.arange(64) / 64)),
    )
    cos, sin = np.cos(angles), np.sin(angles)
    exact = rotate(ones / np.sqrt(1 + 1e-6), cos, sin)
    np.testing.assert_allclose(names["q_out"], exact[0], atol=1e-6)
    np.testing.assert_allclose(names["k_out"], exact[0, :, :8], atol=1e-6)
    exact = rotate(ones, cos, sin, positions=100)
    np.testing.assert_allclose(names["q"], exact[0], atol=1e-6)
    for cache, written in ((names["k_cache"], exact[0, :, :8]), (names["v_cache"], names["v"])):
        codes = torch.from_numpy(cache).view(torch.float8_e4m3fn).double().numpy() * 0.02
        assert not codes[[0, 1, *range(3, 8)]].any()
        np.testing.assert_allclose(codes[2], written, rtol=2**-4, atol=0.02 * 2**-10)


def test_the_models_shown_are_switched_and_give_what_they_gave(capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = run(code("In a model"))
    said, model = capsys.readouterr().out, names["model"].eval()
    assert "replaced 2 FluxAttnProcessor" in said
    assert "Qwen3Attention.q_norm: one call with the rotation" in said
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        enabled = model(tokens).logits
        names["transformers"].disable(model)
        names["diffusers"].disable(names["image"])
        before = model(tokens).logits
    assert not torch.equal(enabled, before)
    torch.testing.assert_close(enabled, before, rtol=1e-4, atol=1e-4)


def test_the_function_shown_of_another_library_gives_the_exact_values():
    names = run(code("In place of another library's function"))
    angles = numbers(names["angles"])
    exact = rotate(numbers(names["q"]), np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(numbers(names["q_out"]), exact, atol=2e-6)


def test_the_error_shown_is_the_error_raised():
    with pytest.raises(ValueError) as caught:
        run(code("Errors"))
    assert f"ValueError: {caught.value}\n" == code("Errors", "text")


@pytest.mark.parametrize("function", [rope_cupy.apply_rotary, rope_cupy.apply_rotary_qk])
def test_the_table_of_options_lists_every_keyword_with_its_default(function):
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", SECTIONS["Options"], re.M)
    parameters = inspect.signature(function).parameters.values()
    keywords = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert {name: ast.literal_eval(default) for name, default in rows} == keywords


def test_the_table_of_tables_lists_every_view_of_a_models_table():
    listed = set(re.findall(r"^\| `RotaryTable\.(\w+)\(", SECTIONS["Tables"], re.M))
    offered = {name for name in vars(rope_cupy.RotaryTable) if name.startswith("from_")}
    computed = {"from_inverse_frequencies", "from_angles", "from_config"}
    assert listed == offered - computed
    assert all(name in SECTIONS["Tables"] + SECTIONS["Tables of models"] for name in computed)


def test_every_line_of_a_measurement_shown_stands_in_the_committed_results():
    results = (ROOT / "benchmarks/results/2026-11-28-h100.txt").read_text().splitlines()
    shown = code("Try it", "text").splitlines()
    assert any("of copy" in line for line in shown)
    assert set(shown) <= set(results)
