"""What the tests say of those that they cannot run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import why_no_gpu


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU here")
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_without_a_gpu_the_summary_says_how_many_tests_are_skipped_and_why(workers):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "graph", "tests/test_gpu.py", *workers]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120
    )
    skipped = int(re.search(r"(\d+) skipped", done.stdout)[1])
    assert skipped > 0
    assert f"gpu: {skipped} tests skipped, no GPU here ({why_no_gpu()})" in done.stdout
