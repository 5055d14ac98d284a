"""python -m rope_cupy, as a newcomer runs it."""

import re
import subprocess
import sys

import pytest

from rope_cupy import __main__ as program
from rope_cupy import __version__


def test_it_says_what_it_runs_on_and_rotates_two_models():
    done = subprocess.run(
        [sys.executable, "-m", "rope_cupy"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"rope_cupy {__version__}"
    assert re.search(r"^  (device +no GPU: CPU path|GPU +\S)", done.stdout, re.MULTILINE)
    for model in ("Qwen-Image", "Llama-3-8B prefill"):
        (line,) = (line for line in lines if line.startswith(f"  {model} "))
        assert line.endswith("ok")
        assert float(re.search(r"(\S+)%", line)[1]) >= 99.9
    assert lines[-1] == "all checks passed"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("model", program.MODELS, ids=lambda model: model.name)
def test_a_wrong_rotation_fails_the_check_and_the_exit_status(model, monkeypatch, capsys):
    right = program.apply_rotary_qk
    monkeypatch.setattr(program, "MODELS", (model._replace(num_tokens=64, num_tokens_on_cpu=64),))
    assert program.main() == 0

    def backwards(*args, **options):
        return right(*args, **options, conjugate=True)

    monkeypatch.setattr(program, "apply_rotary_qk", backwards)
    assert program.main() == 1
    assert "FAILED" in capsys.readouterr().out
