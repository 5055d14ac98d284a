"""What the tests say of those that they cannot run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import why_no_gpu

ROOT = Path(__file__).parents[1]


def output_of(*arguments, **settings):
    """What pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    environment = os.environ | settings
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    )
    return done.stdout


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU here")
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_without_a_gpu_the_summary_says_how_many_tests_are_skipped_and_why(workers):
    said = output_of("-k", "graph", "tests/test_gpu.py", *workers)
    skipped = int(re.search(r"(\d+) skipped", said)[1])
    assert skipped > 0
    assert f"gpu: {skipped} tests skipped, no GPU here ({why_no_gpu()})" in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"PATH": "", "CXX": ""}, r"no C\+\+ compiler is found"),
        ({"CXX": "false"}, r"\S+/false makes no programs with sanitizers: status 1"),
    ],
    ids=["no compiler", "a compiler that fails"],
)
def test_without_a_compiler_the_summary_says_how_many_tests_are_skipped_and_why(settings, why):
    said = output_of("-k", "apart", "tests/test_host_cuda.py", **settings)
    skipped = int(re.search(r"(\d+) skipped", said)[1])
    assert skipped > 0
    told = rf"^host_cuda: {skipped} tests skipped, no kernels on the CPU here \({why}\)$"
    assert re.search(told, said, re.MULTILINE)
