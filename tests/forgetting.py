"""What the process keeps of calls is forgotten, so that a test sees them made anew."""

from __future__ import annotations

import sys

from rope_cupy import call, eager, joined, together


def forget() -> None:
    """Forget the kinds of calls that were made, and what is prepared for their signatures."""
    eager._prepared.clear()
    together._together.clear()
    joined._joined.clear()
    call.kind_of.cache_clear()
    call._known_kind.cache_clear()
    operators = sys.modules.get("rope_cupy.ways.operators")  # which only PyTorch's graphs import
    if operators is not None:
        operators.kind_of_text.cache_clear()
