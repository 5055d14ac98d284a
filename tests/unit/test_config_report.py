"""python -m rope_cupy table: what it says of a config, and what it draws."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from configs import ANY_CONFIG, PUBLISHED, sizes, yarn
from hypothesis import given, settings

from rope_cupy import config_report

LLAMA_3_1 = PUBLISHED["Llama 3.1 8B"]
# Its file says 32,768 positions, and four times as many by YaRN.
QWEN_2_5_YARN = sizes(3584, 28, 32768) | {"rope_scaling": yarn(4.0, 32768, "rope_type")}
QWEN_2_5_YARN["rope_theta"] = 1e6
GEMMA_3 = {
    **{"model_type": "gemma3_text", "head_dim": 256, "max_position_embeddings": 131072},
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}


def run(config, tmp_path, capsys, *options):
    """Return the exit status and what is printed."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return main(path, *options), capsys.readouterr().out


def main(path, *options):
    config_report.add_arguments(parser := ArgumentParser())
    return config_report.main(parser.parse_args([str(path), *options]))


def process(path, *options, **how):
    command = [sys.executable, "-m", "rope_cupy", "table", str(path), *options]
    return subprocess.run(command, timeout=300, **how)


def facts(out):
    """What stands behind the words at the beginnings of lines."""
    names = "layers", "type", "rotary_dim", "base", "cos and sin", "largest safe position"
    lines = out.splitlines()
    return {
        name: line[len(name) :].strip() for name in names for line in lines if line.startswith(name)
    }


def rows(out):
    """The pairs that are printed: (radians a position, positions a turn)."""
    lines = [line.replace(",", "").split() for line in out.splitlines()]
    return {
        int(a): (float(b), float(c))
        for a, b, c in (row for row in lines if len(row) == 3)
        if a.isdigit()
    }


def test_a_newcomer_reads_type_wavelengths_and_the_largest_position(tmp_path):
    (path := tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1))
    image = tmp_path / "spectrum.png"
    done = process(path, "--plot", str(image), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert facts(done.stdout) == {
        **{"type": "llama3", "rotary_dim": "128", "base": "500,000"},
        **{"cos and sin": "times 1", "largest safe position": "131,071"},
    }
    pairs = rows(done.stdout)
    assert {0, 63} <= set(pairs) and len(pairs) >= 8
    assert pairs[0] == (1, pytest.approx(2 * np.pi, rel=1e-5))
    slowest = 500000.0 ** (-126 / 128) / 8  # long wavelengths are divided by the factor
    assert pairs[63] == (
        pytest.approx(slowest, rel=1e-5),
        pytest.approx(2 * np.pi / slowest, rel=1e-5),
    )
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_factor_extends_what_the_file_says(tmp_path, capsys):
    status, out = run(QWEN_2_5_YARN, tmp_path, capsys)
    told = facts(out)
    assert (status, told["largest safe position"]) == (0, "131,071")
    assert told["cos and sin"] == f"times {0.1 * np.log(4) + 1:.6g}"


def test_every_layer_type_is_told_of_or_the_one_asked_for(tmp_path, capsys):
    _, out = run(GEMMA_3, tmp_path, capsys)
    assert [line for line in out.splitlines() if line.startswith(("layers", "base"))] == [
        *("layers       full_attention", "base         1,000,000"),
        *("layers       sliding_attention", "base         10,000"),
    ]
    _, out = run(GEMMA_3, tmp_path, capsys, "--layer-type", "sliding_attention")
    assert (facts(out)["layers"], "full" in out) == ("sliding_attention", False)
    status, out = run(GEMMA_3, tmp_path, capsys, "--layer-type", "global")
    assert status == 1 and "layer_type must be 'full_attention' or 'sliding_attention'" in out


def test_the_length_of_a_sequence_changes_what_depends_on_it(tmp_path, capsys):
    config = LLAMA_3_1 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    short, long = (
        rows(run(config, tmp_path, capsys, *options)[1])
        for options in ((), ("--seq-len", "500000"))
    )
    assert short[0] == long[0] and short[63][1] < long[63][1]


def test_a_config_that_names_no_length_is_said_to(tmp_path, capsys):
    _, out = run({"head_dim": 64}, tmp_path, capsys)
    assert facts(out)["largest safe position"].startswith("not said")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_dim": 64, "rope_scaling": {"rope_type": "spiral"}}, "rope_type must be one of "),
        ({}, "config must have head_dim"),
        ([1, 2], "config must be a config object or its dict, got list"),
    ],
)
def test_what_is_no_config_is_said_in_a_line(config, message, tmp_path, capsys):
    status, out = run(config, tmp_path, capsys)
    assert status == 1 and out.startswith(f"error: {message}") and out.count("\n") == 1


def test_a_file_that_is_no_json_is_refused(tmp_path, capsys):
    (path := tmp_path / "config.json").write_text("{")
    for each in (path, tmp_path / "absent.json", tmp_path):
        assert main(each) == 1
        out = capsys.readouterr().out
        assert "must be a JSON file" in out and out.count("\n") == 1


STRINGS = {"type": "su", "short_factor": ["1", "2"]}
RULES = {
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": 2048},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
    "longrope": {"short_factor": [1] * 32, "long_factor": [1] * 32},
}


def great(kind, **more):
    scaling = {"rope_type": kind, "factor": 10**308, **more}
    config = {"head_dim": 64, "max_position_embeddings": 2048, "rope_scaling": scaling}
    return json.dumps(config)


HOSTILE = {
    "nested too deep": "[" * 100_000 + "]" * 100_000,
    "a dict nested deep": '{"rope_scaling":' * 900 + "{}" + "}" * 900,
    "a great int": json.dumps({"head_dim": 64, "rope_theta": 10**400}),
    "a great factor": json.dumps(QWEN_2_5_YARN).replace("4.0", "1" + "0" * 400),
    "a string for a number": json.dumps({"head_dim": 64, "max_position_embeddings": "many"}),
    "strings for factors": json.dumps({"head_dim": 4, "rope_scaling": STRINGS}),
    "infinity": '{"head_dim": 64, "max_position_embeddings": Infinity}',
    "NaN": '{"head_dim": 64, "rope_theta": NaN}',
    "a great negative head": json.dumps({"head_dim": -(10**400)}),
    "a great hidden size": json.dumps({"hidden_size": -(10**400), "num_attention_heads": 8}),
    **{f"a great number of positions, {kind}": great(kind, **more) for kind, more in RULES.items()},
    "a head that fills all memory": json.dumps({"head_dim": 4_000_000_000}),
    "escape sequences": json.dumps(LLAMA_3_1 | {"rope_scaling": {"\x1b[31m": 1, "type": "llama3"}}),
    "half of a surrogate pair": '{"head_dim": 8, "rope_scaling": {"\\ud800": 1, "type": "yarn"}}',
    "bytes that are no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_at_once(kind, tmp_path):
    path, content = tmp_path / "config.json", HOSTILE[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = process(path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch(r"error: [ -~]{10,600}\n", done.stdout)


def test_what_a_file_calls_its_layers_is_printed_without_its_escape_sequences(tmp_path, capsys):
    layers = {"\x1b[2J\n\u202eevil": {"rope_theta": 1e4}}
    status, out = run({"head_dim": 8, "rope_parameters": layers}, tmp_path, capsys)
    assert status == 0 and "\\x1b[2J\\n\\u202eevil" in out
    assert re.fullmatch(r"[ -~\n]+", out)


@settings(max_examples=300, deadline=None)
@given(config=ANY_CONFIG)
def test_any_json_is_told_of_or_refused_in_one_line(config):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        (path := Path(folder) / "config.json").write_text(json.dumps(config))
        status = main(path)
    out = said.getvalue()
    assert re.fullmatch(r"[ -~\n]+", out)
    assert (status, out.startswith("error: ")) in [(0, False), (1, True)]
    assert status == 0 or out.count("\n") == 1


def test_a_config_without_a_rotation_is_refused_and_the_builder_is_named(tmp_path, capsys):
    bert = {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12}
    status, out = run(bert, tmp_path, capsys)
    assert status == 1 and out.startswith("error: config must describe a rotary embedding")
    flux = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [16, 56, 56]}
    status, out = run(flux | {"attention_head_dim": 128}, tmp_path, capsys)
    assert status == 1 and "rope_cupy.diffusion.flux" in out


def told_of(config, name, tmp_path, capsys, *options):
    status, out = run(config, tmp_path, capsys, *options)
    assert status == 0, out
    return [line[13:] for line in out.splitlines() if line[:13].strip() == name]


def test_the_pairing_is_told_where_the_model_is_known(tmp_path, capsys):
    halves, neighbours = LLAMA_3_1, {"model_type": "glm4", "head_dim": 128}
    assert told_of(halves, "pairing", tmp_path, capsys) == ["halves (interleaved=False)"]
    assert told_of(neighbours, "pairing", tmp_path, capsys) == ["neighbours (interleaved=True)"]
    (unknown,) = told_of({"head_dim": 64}, "pairing", tmp_path, capsys)
    assert unknown.startswith("not said")


def test_sections_of_axes_are_told(tmp_path, capsys):
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    config = {"model_type": "qwen2_vl", "head_dim": 128, "rope_scaling": scaling}
    (told,) = told_of(config, "axes", tmp_path, capsys)
    assert told.startswith("mrope_section 16, 24, 24:")
    by_turns = config | {"rope_scaling": scaling | {"mrope_interleaved": True}}
    assert told_of(by_turns, "axes", tmp_path, capsys)[0].startswith(
        "mrope_section 16, 24, 24 by turns:"
    )
    assert told_of(LLAMA_3_1, "axes", tmp_path, capsys) == []


def test_layers_without_a_rotation_are_told(tmp_path, capsys):
    config = LLAMA_3_1 | {"no_rope_layers": [1, 1, 1, 0] * 2}
    assert told_of(config, "not rotated", tmp_path, capsys) == ["2 of 8 layers: 3, 7"]
    config = {
        "head_dim": 64,
        "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 1e4}},
    }
    assert told_of(config, "not rotated", tmp_path, capsys) == ["layers of the type full_attention"]
    assert told_of(LLAMA_3_1, "not rotated", tmp_path, capsys) == []


EIGHT = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 8}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA_4 = {"model_type": "llama4_text", **EIGHT}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "cohere2"}, "2 of 8 layers: 3, 7"),
        ({"model_type": "cohere2", "sliding_window_pattern": 3}, "2 of 8 layers: 2, 5"),
        ({"model_type": "cohere2", "layer_types": [FULL, *[SLIDING] * 7]}, "1 of 8 layers: 0"),
        ({"model_type": "llama4", "text_config": LLAMA_4}, "2 of 8 layers: 3, 7"),
        ({"model_type": "llama4_text", "no_rope_layers": []}, "2 of 8 layers: 3, 7"),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0] * 8}, "4 of 8 layers: 1, 3, 5, 7"),
        ({"model_type": "smollm3"}, "2 of 8 layers: 3, 7"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 3}, "2 of 8 layers: 2, 5"),
        ({"model_type": "smollm3", "num_hidden_layers": None}, "the last of every 4 layers"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, "2 of 8 layers: 3, 7"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLG"}, "3 of 8 layers: 2, 5, 7"),
        ({"model_type": "exaone4", "sliding_window": None, "layer_types": [FULL] * 8}, None),
        ({"model_type": "exaone4", "sliding_window": None}, None),
        ({"model_type": "nobody", "layer_types": [FULL] * 8}, None),
        ({"model_type": "muse", "layer_rope_theta": [0, 1e4, 1e4, 1e4]}, "1 of 4 layers: 0"),
    ],
)
def test_layers_that_a_class_does_not_rotate_are_told(config, layers, tmp_path, capsys):
    config = {"rope_theta": 1e4, **EIGHT, **config} if "text_config" not in config else config
    assert told_of(config, "not rotated", tmp_path, capsys) == ([] if layers is None else [layers])


def test_a_reader_that_closes_the_pipe_gets_no_traceback(tmp_path):
    (path := tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1))
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = process(path, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_factors_of_longrope_that_are_taken_are_told(tmp_path, capsys):
    scaling = {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 4]}
    config = {"head_dim": 4, "rope_scaling": scaling, "max_position_embeddings": 131072}
    config["original_max_position_embeddings"] = 4096
    (short,) = told_of(config, "factors", tmp_path, capsys)
    (long,) = told_of(config, "factors", tmp_path, capsys, "--seq-len", "4097")
    assert short == "short_factor, for up to 4,096 tokens (--seq-len)"
    assert long == "long_factor, for more than 4,096 tokens (--seq-len)"


def test_the_help_says_what_the_largest_safe_position_is(capsys):
    config_report.add_arguments(parser := ArgumentParser())
    text = " ".join(parser.format_help().split())
    assert "largest safe position is the last position of those that the config says" in text
