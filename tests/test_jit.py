"""What stands between a caller and a launch: CuPy, and the sources of the kernels."""

import sys

import pytest

from rope_cupy import jit


def test_without_cupy_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"needs CuPy .*pip install 'rope-cupy\[cuda12\]'"):
        jit.cupy()


def test_an_install_without_kernels_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "rope_cupy" / "jit.py"))
    jit.sources.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"kernels are missing: no kernels/rotary\.cu in"):
            jit.sources()
    finally:
        jit.sources.cache_clear()
