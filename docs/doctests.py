"""An extension of griffe: the examples that end a docstring are shown as code.

Python's `help` and doctest want them without a heading. The reader of Google's style wants one.
"""

from __future__ import annotations

from textwrap import indent
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Put the heading before the first example of a docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of an object that has one with an example."""
        if obj.docstring is None or "\n>>> " not in f"\n{obj.docstring.value}":
            return
        before, _, examples = f"\n{obj.docstring.value}".partition("\n>>> ")
        obj.docstring.value = f"{before.strip()}\n\nExamples:\n{indent('>>> ' + examples, '    ')}"
