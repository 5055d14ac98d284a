"""README.md and the pages of docs/ as programs: their blocks of code, and what these must print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS_A_GPU = "<!-- needs a GPU -->\n"
BLOCK = re.compile(rf"(?:^##+ ([^\n]*)\n)|(?:^({NEEDS_A_GPU})?```(\w+)\n(.*?)^```$)", re.M | re.S)


class Block(NamedTuple):
    """A block of code, and the section that it stands in."""

    section: str
    language: str
    source: str
    needs_a_gpu: bool


def blocks_of(page: Path) -> list[Block]:
    """All blocks of code of a page."""
    section, found = "", []
    for title, needs_a_gpu, language, source in BLOCK.findall(page.read_text(encoding="utf-8")):
        section = title or section
        if language:
            found.append(Block(section, language, source, bool(needs_a_gpu)))
    return found


def run(
    page: Path, on_gpu: bool = False, replaced: dict[str, str] | None = None
) -> dict[str, SimpleNamespace]:
    """Run the Python of a page as one program; return the names that each section leaves behind.

    What is printed must stand in the block, in lines that begin with "# ". A block before a block
    of text that begins with the name of an error must end in this error. Words may be replaced, as
    those of a GPU. Blocks that are marked as needing a GPU are compiled, and run on a GPU alone.
    """
    names: dict[str, Any] = {}
    left, blocks = {}, blocks_of(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        source = block.source
        for word, other in (replaced or {}).items():
            source = source.replace(word, other)
        code = compile(source, f"{page.name}: {block.section}", "exec")
        if block.needs_a_gpu and not on_gpu:
            continue
        error = after.source if after and re.match(r"\w+Error: ", after.source) else ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if error:
                with pytest.raises((TypeError, ValueError)) as caught:
                    exec(code, names)
                said = f"{type(caught.value).__name__}: {caught.value}\n"
                assert said == error, f"{page.name} must say {said}"
            else:
                exec(code, names)
        said = [line[2:] for line in block.source.splitlines() if line.startswith("# ")]
        lines = printed.getvalue().splitlines()
        assert lines == said, f"{page.name}, {block.section!r}, prints {lines}"
        left[block.section] = SimpleNamespace(**names)
    assert left, f"{page.name} has no code that runs here"
    return left
