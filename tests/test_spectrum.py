"""python -m rope_cupy table: what it says of a config, and what it draws."""

import json
import subprocess
import sys
from argparse import ArgumentParser

import numpy as np
import pytest

from rope_cupy import spectrum

LLAMA_3_1 = {
    "model_type": "llama",
    **{"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131072},
    "rope_theta": 500000.0,
    "rope_scaling": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
}
QWEN_2_5_YARN = {  # whose file says 32,768 positions, and four times as many by YaRN
    **{"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768},
    "rope_theta": 1e6,
    "rope_scaling": {
        **{"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"}
    },
}
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
    spectrum.add_arguments(parser := ArgumentParser())
    status = spectrum.main(parser.parse_args([str(path), *options]))
    return status, capsys.readouterr().out


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
    command = [sys.executable, "-m", "rope_cupy", "table", str(path), "--plot", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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
    spectrum.add_arguments(parser := ArgumentParser())
    for each in (path, tmp_path / "absent.json"):
        with pytest.raises(SystemExit):
            parser.parse_args([str(each)])
        assert "must be a JSON file" in capsys.readouterr().err
