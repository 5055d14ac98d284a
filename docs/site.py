"""A hook of mkdocs: pages link to files of the repository as they do on its own pages.

A page of docs/ writes `../benchmarks/results/x.csv`, which leads there in a checkout. The site has
these files below its root, where the page finds them without the two dots.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = "CHANGELOG.md", "CONTRIBUTING.md"
FOLDERS = ("benchmarks/results",)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files that lie beside docs/."""
    shown = [path for folder in FOLDERS for path in sorted((ROOT / folder).iterdir())]
    for path in (*(ROOT / page for page in PAGES), *shown):
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links of a page lead to where its files lie in the site."""
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
