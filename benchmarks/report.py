"""What every benchmark says of the machine and of its progress, and where its CSV goes."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = ("date", "gpu", "driver", "python", "numpy", "cupy", "torch", "rope_cupy")


def machine(device: str) -> dict[str, str]:
    """Return the columns that every row begins with."""
    on_gpu = device == "cuda"
    values = (
        datetime.date.today().isoformat(),
        torch.cuda.get_device_name() if on_gpu else "cpu",
        _driver() if on_gpu else "",
        platform.python_version(),
        np.__version__,
        version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        torch.__version__,
        version("rope-cupy"),
    )
    return dict(zip(MACHINE, values, strict=True))


def version(*distributions: str) -> str:
    """Return the version of the first of these packages that is installed, or nothing."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def default_path(kind: str, device: str) -> Path:
    """Return where the CSV of a benchmark goes, such as results/2026-11-25-h100-rotary.csv."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    model = re.search(r"\b[A-Z]+\d\w*", gpu)
    short = model.group().lower() if model else gpu.lower().replace(" ", "-")
    return RESULTS / f"{datetime.date.today().isoformat()}-{short}-{kind}.csv"


def destination(kind: str, options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """Return where the CSV goes, in a folder that is there, and the columns of `machine`.

    The process ends where a GPU is asked for and none is there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; --device cpu measures on the CPU")
    path = options.csv or default_path(kind, options.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, machine(options.device)


def several(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads an option of known names with commas, or "all"."""

    def names(text: str) -> list[str]:
        given = list(known) if text == "all" else text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(known)}")
        return given

    return names


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return ""
