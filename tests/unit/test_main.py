"""python -m rope_cupy, as a newcomer runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rope_cupy import __main__ as program
from rope_cupy import __version__
from rope_cupy.environment import Installed


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


def test_a_reader_that_has_read_enough_sees_no_traceback():
    command = [sys.executable, "-u", "-m", "rope_cupy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")


def test_the_version_is_said_with_whose_files_run():
    command = [sys.executable, "-m", "rope_cupy", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    kind = "(checkout|installed wheel)"
    found = re.fullmatch(rf"rope_cupy (\S+), the {kind} in (.+)\n", done.stdout)
    assert found[1] == __version__ and Path(found[3]) == Path(program.__file__).parents[1]


def test_a_wheel_that_a_checkout_hides_is_named(monkeypatch, capsys):
    hidden = Installed("checkout", Path("/a/clone"), Path("/an/environment"))
    monkeypatch.setattr(program.environment, "installed", lambda: hidden)
    monkeypatch.setattr(program, "MODELS", ())
    assert program.main() == 0
    said = capsys.readouterr().out
    assert f"package  {__version__}, the checkout in /a/clone\n" in said
    assert "also     the installed wheel in /an/environment," in said


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
