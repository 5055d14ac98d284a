"""The committed results and the notebook: what it says that it shows, and where it may write."""

from __future__ import annotations

import shutil
from pathlib import Path

import figures
import pandas as pd

KINDS = "rotary", "host", "fused", "models"  # of files of results
BANNERS = {
    "run": "**These results were measured on the GPU of this machine.**",
    "small": "**These small shapes were measured on the CPU.** They say nothing about a GPU.",
}
HOW = (
    "`ROPE_CUPY_BENCH=run` measures on a GPU, which takes minutes. `small` times small shapes on "
    "the CPU. `read` shows the committed results, which a machine without a GPU does by itself.",
    "Measurements are written to a temporary folder, and no file of the repository is changed. "
    "`ROPE_CUPY_SAVE=1` copies them to benchmarks/results, over files of the same day and GPU.",
)


def banner(choice: str, folder: Path) -> str:
    """What the notebook shows, what it writes, and how to ask for something else, in Markdown.

    `choice` is "read", "run" or "small"; `folder` holds the committed results.
    """
    shown = _committed(folder) if choice == "read" else BANNERS[choice]
    return "\n>\n".join([f"> {line}" for line in (shown, *HOW)])


def _committed(folder: Path) -> str:
    runs = [run.iloc[0] for kind in KINDS for run in figures.latest(folder, kind)]
    dates: dict[str, set[str]] = {}
    for run in runs:
        dates.setdefault(run["gpu"], set()).add(run["date"])
    measured = [f"{gpu} ({', '.join(sorted(dates[gpu]))})" for gpu in sorted(dates)]
    return (
        "**Nothing was measured on this machine.** These are committed results of "
        f"{' and '.join(measured)}."
    )


def save(csv: Path, folder: Path, kind: str) -> Path:
    """Copy a file of measurements to a folder, under the date and the GPU of its first row."""
    first = pd.read_csv(csv, dtype=str, keep_default_na=False).iloc[0]
    words = first["gpu"].lower().split()
    gpu = next((word for word in words if any(map(str.isdigit, word))), "-".join(words))
    return Path(shutil.copy(csv, folder / f"{first['date']}-{gpu}-{kind}.csv"))
