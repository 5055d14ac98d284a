"""Draws docs/speed.svg, the chart of the README, from the committed results.

    python docs/chart.py

It needs nothing but Python, so that the same results give the same file.
"""

from __future__ import annotations

import csv
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks/results"
OURS, OTHERS, TEXT, QUIET = "#ee5500", "#7788aa", "#222222", "#666666"
WIDTH, ROW, LABEL, BAR = 760, 21, 215, 450


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    """The rows of a file of results that have a time, and these values."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["status"] == "ok" and all(row[key] == wanted[key] for key in wanted)
        ]


def block() -> list[tuple[str, float, str]]:
    """The times of a block of Qwen-Image: (who, length of the bar, what stands behind it)."""
    names = {
        "eager": "diffusers",
        "eager, enabled": "with rope_cupy",
        "compiled": "torch.compile",
        "compiled, enabled": "torch.compile with rope_cupy",
    }
    measured = rows("2026-11-28-h100-models.csv", model="qwen-image")
    found = {row["call"]: float(row["milliseconds"]) for row in measured}
    times = {name: found[call] for call, name in names.items()}
    longest = max(times.values())
    return [(name, time / longest, f"{time:.2f} ms") for name, time in times.items()]


def shares(name: str, without: tuple[str, ...], **wanted: str) -> list[tuple[str, float, str]]:
    """The shares of the limit of one shape, the largest first."""
    measured = rows(name, shape="qwen-image", dtype="bfloat16", **wanted)
    found = {row["provider"]: float(row["limit_share"]) for row in measured}
    kept = {name: share for name, share in found.items() if name not in without}
    return [
        (name, min(share, 1.0), f"{share:.0%}")
        for name, share in sorted(kept.items(), key=lambda item: -item[1])
    ]


def panels() -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Each panel: its title and its bars."""
    rotation = {"variant": "in place", "table": "half", "measure": "rotation"}
    return [
        ("A block of Qwen-Image: milliseconds, shorter is better", block()),
        (
            "Rotation of q and k: share of the limit of the memory, longer is better",
            shares("2026-11-26-h100-rotary.csv", ("limit", "copy"), **rotation),
        ),
        (
            "RMSNorm and rotation in one pass: the same share",
            shares("2026-11-26-h100-fused.csv", ("limit", "rotation alone"), op="norm head"),
        ),
    ]


def svg() -> str:
    """The chart."""
    lines, y = [], 24

    def text(x: float, words: str, color: str = TEXT, more: str = "") -> None:
        lines.append(f'<text x="{x:g}" y="{y}" fill="{color}"{more}>{escape(words)}</text>')

    text(12, "One NVIDIA H100 80GB: Qwen-Image, bfloat16, 4,096 image and 512 text tokens", QUIET)
    for title, bars in panels():
        y += 32
        text(12, title, more=' font-weight="bold"')
        for name, length, value in bars:
            y += ROW
            ours = "rope_cupy" in name
            weight = ' font-weight="bold"' if ours else ""
            text(LABEL, name, more=f' text-anchor="end"{weight}')
            lines.append(
                f'<rect x="{LABEL + 10}" y="{y - 12}" width="{BAR * length:.1f}" height="15" '
                f'fill="{OURS if ours else OTHERS}"/>'
            )
            text(LABEL + 18 + round(BAR * length, 1), value, more=weight)
    height = y + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">'
    )
    back = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, back, *lines, "</svg>", ""])


if __name__ == "__main__":
    (FOLDER / "speed.svg").write_text(svg(), encoding="utf-8")
