"""Tables and plots from CSV files of bench_rotary.py, bench_host, bench_fused and bench_models.

    python benchmarks/figures.py benchmarks/results/2026-11-26-h100-rotary.csv

draws the plots beside the first file. With --readme it prints the table in the README and draws
only the plot that stands there. This prints the tables of what is fused with the rotation:

    python benchmarks/figures.py --fused benchmarks/results/2026-11-26-h100-fused.csv

and --models, with a file of bench_models.py, that of blocks and layers of models.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from shapes import GROUPS

RUN = ["date", "gpu", "driver", "python", "numpy", "cupy", "torch", "rope_cupy"]
AMOUNTS = ["microseconds", "megabytes", "gigabytes_a_second", "limit_share", "error"]
AMOUNTS += ["multiple", "above_one_addition", "speedup", "gpu_speedup"]
AMOUNTS += ["milliseconds", "gpu_milliseconds", "host_milliseconds"]
MEASURED = ["version", "status", "reason", *AMOUNTS]
COUNTS = ["batch", "tokens", "q_heads", "k_heads", "head_dim", "rotary_dim", "rotary_offset"]

# What stands for a user's call: both the README and the plots show it.
SHOWN = {"variant": "in place", "dtype": "bfloat16", "table": "half", "measure": "rotation"}

OURS = "rope_cupy"
YARDSTICKS = {"limit", "limit, same places", "copy"}  # they move the bytes and rotate nothing
ROTATION = "rotation alone"  # rope_cupy's, beside what is fused with it
MADE_OF_OTHERS = {ROTATION, "two launches", "torch two launches"}
# Paul Tol's muted scheme, which keeps its differences for colour-blind readers, beside one orange.
STYLES = {
    OURS: ("#ee5500", "o"),
    "SGLang": ("#332288", "s"),
    "FlashInfer": ("#44aa99", "D"),
    "flash-attn": ("#88ccee", "^"),
    "quack": ("#117733", "v"),
    "Liger": ("#882255", "P"),
    "vLLM": ("#999933", "X"),
    "comfy-kitchen": ("#aa4499", "<"),
    "torch.compile": ("#555555", ">"),
    "transformers": ("#ddcc77", "p"),
    "diffusers": ("#cc99bb", "h"),
    "torch eager": ("#aaaaaa", "d"),
    ROTATION: ("#000000", "|"),
    "two launches": ("#cc6677", "1"),
    "torch two launches": ("#bbbbbb", "2"),
}
UNKNOWN = ("#777777", "*")
HOST_SHAPE = "q (1, 16, 32, 128) and k (1, 16, 8, 128)"  # of bench_host.py
MOST_BANDS = 12  # of the plot of what is fused
HOST_WAYS = "4 threads", "compiled", "compiled, dynamic lengths"  # behind the names of calls
ENABLED = ", enabled"  # behind a way to call a model
MODEL_WAYS = {"eager": "#ee5500", "compiled": "#332288", "reduce-overhead": "#44aa99"}
WITHOUT_A_TIME = {"wrong": "wrong", "failed": "failed", "unsupported": "-", "absent": "-"}
# The same file gives the same SVG, and fonts are in it as outlines.
DRAWING = {"svg.hashsalt": OURS, "svg.fonttype": "path", "font.size": 9, "axes.axisbelow": True}


def read(*paths: Path | str) -> list[pd.DataFrame]:
    """The runs in CSV files: one frame for each GPU, date and set of versions.

    A row measured again in the same run takes the place of the earlier one. Files of the same run
    are put together; times of different runs never are, since they cannot be compared.
    """
    files = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in paths]
    rows = pd.concat(files, ignore_index=True)
    for column in rows.columns.intersection(COUNTS + AMOUNTS):
        rows[column] = pd.to_numeric(rows[column])
    keys = [column for column in rows if column not in MEASURED]
    rows = rows.drop_duplicates(keys, keep="last")
    return [run for _, run in rows.groupby(RUN, sort=False)]


def latest(folder: Path, kind: str) -> list[pd.DataFrame]:
    """The newest run of each GPU in a folder of results, of a kind such as "rotary"."""
    paths = sorted(folder.glob(f"*-{kind}.csv"))
    runs = read(*paths) if paths else []
    newest = {run["gpu"].iloc[0]: run for run in sorted(runs, key=lambda run: run["date"].iloc[0])}
    return list(newest.values())


def caption(run: pd.DataFrame) -> str:
    """GPU, driver and date of a run; then its versions."""
    about = run.iloc[0]
    machine = ["no GPU: the CPU" if about["gpu"] == "cpu" else about["gpu"]]
    machine += [f"driver {about['driver']}"] if about["driver"] else []
    names = {"python": "Python", "numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", OURS: OURS}
    versions = [f"{name} {about[column]}" for column, name in names.items() if about[column]]
    return f"{', '.join([*machine, about['date']])}; {', '.join(versions)}"


def shown(run: pd.DataFrame, group: str = "models") -> pd.DataFrame:
    """The rows of rotations in bfloat16, in place, of a group of shapes."""
    for column, value in SHOWN.items():
        run = run[run[column] == value]
    run = run[run["shape"].isin([shape.name for shape in GROUPS[group]])]
    if run.empty:
        raise ValueError(f"the run must hold {group} in bfloat16, in place, got none")
    return run


def providers(rows: pd.DataFrame) -> list[str]:
    """The names of those that rotate and did so, even wrongly, in some row; rope_cupy first."""
    idle = rows["status"].isin(["absent", "unsupported"])
    present = set(rows["provider"][~idle]) - YARDSTICKS
    return [name for name in STYLES if name in present] + sorted(present - STYLES.keys())


def by_provider(rows: pd.DataFrame, value: str, index: str = "shape") -> pd.DataFrame:
    """One column of the CSV spread out: a row for each shape, a column for each provider."""
    spread = rows.pivot(index=index, columns="provider", values=value)
    return spread.reindex(rows[index].unique())


def limits(rows: pd.DataFrame, index: str = "shape") -> pd.Series:
    """Microseconds that the limit kernel needs for all counted bytes, table among them."""
    rows = rows[(rows["status"] == "ok") & rows["limit_share"].notna()]
    return (rows["microseconds"] * rows["limit_share"]).groupby(rows[index]).first()


def time_by_tokens(run: pd.DataFrame) -> pd.DataFrame:
    """Microseconds per call: a row for each number of tokens of the sweep, a column by provider.

    Besides the providers present it has the column "limit", where that was measured.
    """
    rows = shown(run, "sweep")
    times = by_provider(rows, "microseconds", "tokens")[providers(rows)]
    times.insert(0, "limit", limits(rows, "tokens"))
    return times.dropna(axis="columns", how="all").sort_index()


def share_by_shape(run: pd.DataFrame) -> pd.DataFrame:
    """The limit's time over each provider's, by the shapes of models; NaN where not measured."""
    rows = shown(run)
    return by_provider(rows, "limit_share")[providers(rows)].dropna(axis="columns", how="all")


def share_by_task(run: pd.DataFrame) -> pd.DataFrame:
    """The same by operation and shape, for what is fused with the rotation."""
    rows = run.assign(task=run["op"] + ", " + run["shape"])
    shares = by_provider(rows, "limit_share", "task")[providers(rows)]
    return shares.dropna(axis="columns", how="all")


def host_times(run: pd.DataFrame) -> pd.DataFrame:
    """Microseconds of each call measured by bench_host.py, a column for each way to make it.

    The columns are "plain" and what stands behind the name of a call, such as "compiled". The calls
    that are fastest plainly come first.
    """
    rows = run[run["status"] == "ok"]
    names = rows["call"].str.extract(f"^(?P<call>.*?)(?:, (?P<way>{'|'.join(HOST_WAYS)}))?$")
    rows = rows.assign(call=names["call"], way=names["way"].fillna("plain"))
    times = rows.pivot_table("microseconds", ["provider", "call"], "way", sort=False)
    columns = [way for way in ("plain", *HOST_WAYS) if way in times]
    return times[columns].sort_values(columns[0], kind="stable").reset_index()


def digits(microseconds: float) -> str:
    """Three significant digits, without an exponent.

    >>> digits(1.077), digits(59.06), digits(1039.4)
    ('1.08', '59.1', '1,039')
    """
    return f"{microseconds:,.{max(0, 2 - math.floor(math.log10(microseconds)))}f}"


def comparison(run: pd.DataFrame) -> pd.DataFrame:
    """The README's table, as text: a row for each model's shape, a column for each provider.

    A cell is microseconds per call and, in brackets, the share of the limit; the fastest is bold,
    "-" is a shape that the provider does not do, and nothing one on which it was not asked.
    """
    rows = shown(run)
    return cells(rows, providers(rows))


def cells(rows: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The texts of such a table for these rows and providers."""
    times, shares = by_provider(rows, "microseconds"), by_provider(rows, "limit_share")
    status, limit = by_provider(rows, "status"), limits(rows)
    rivals = [name for name in names if name != ROTATION]
    texts = {name: {} for name in ("tokens", "heads", "pairs", "limit", *names)}
    for shape, row in rows.groupby("shape", sort=False).first().iterrows():
        texts["tokens"][shape] = f"{row['batch'] * row['tokens']:,}"
        rotated = "" if row["rotary_dim"] == row["head_dim"] else f" ({row['rotary_dim']} of it)"
        heads = f"{row['q_heads']}/{row['k_heads']}, D{row['head_dim']}{rotated}"
        texts["heads"][shape] = heads
        texts["pairs"][shape] = row["pairing"]
        texts["limit"][shape] = digits(limit[shape]) if shape in limit else ""
        for name in names:
            time, share = times.at[shape, name], shares.at[shape, name]
            if status.at[shape, name] != "ok":
                texts[name][shape] = WITHOUT_A_TIME.get(status.at[shape, name], "")
                continue
            fastest = name in rivals and digits(time) == digits(times.loc[shape, rivals].min())
            text = f"**{digits(time)}**" if fastest else digits(time)
            texts[name][shape] = text if math.isnan(share) else f"{text} ({share:.0%})"
    return pd.DataFrame(texts).rename_axis("shape")


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    lines = [[table.index.name, *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[name, *texts] for name, *texts in table.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def readme(run: pd.DataFrame) -> str:
    """What the README shows of a run: caption, table, and who was measured and who was absent."""
    return "\n".join([caption(run) + ":", "", markdown(comparison(run)), "", *company(shown(run))])


def company(rows: pd.DataFrame) -> list[str]:
    """Who was measured beside rope_cupy, who was absent, and who can do none of it."""
    rows = rows[~rows["provider"].isin(MADE_OF_OTHERS)]
    names = providers(rows)
    version = rows.groupby("provider")["version"].max()
    versions = [f"{name} {version[name]}".rstrip() for name in names if name != OURS]
    idle = rows[~rows["provider"].isin([*names, *YARDSTICKS])].groupby("provider")["status"]
    idle = idle.agg(lambda each: "absent" if (each == "absent").any() else "unsupported")
    lines = [f"Measured beside it: {', '.join(versions)}."] if versions else []
    for status, told in (("absent", "Absent from this run"), ("unsupported", "Unable to do these")):
        who = sorted(idle.index[idle == status], key=str.lower)
        lines += [f"{told}: {', '.join(who)}."] if who else []
    return lines


def fused_table(run: pd.DataFrame, op: str) -> pd.DataFrame:
    """The README's table of what is fused with the rotation, as text, in the order of the file."""
    rows = run[run["op"] == op]
    present = {*providers(rows)}
    names = [name for name in rows["provider"].unique() if name in present]
    table = cells(rows, names).drop(columns=["tokens", "heads", "pairs"])
    return table.rename_axis(f"{op}: shape")


def fused(run: pd.DataFrame) -> str:
    """What the README shows of what is fused: caption, a table for each operation, and of whom."""
    tables = [markdown(fused_table(run, op)) for op in run["op"].unique()]
    return "\n\n".join([caption(run) + ":", *tables, "\n".join(company(run))])


def host_table(run: pd.DataFrame) -> str:
    """The host times of a run in microseconds as a table, the shortest first."""
    provider, call, *ways = host_times(run).columns
    table = host_times(run).rename(columns={provider: "host time of", call: "call, in us"})
    for way in ways:
        table[way] = ["-" if math.isnan(time) else digits(time) for time in table[way]]
    return markdown(table.set_index("host time of"))


def by_model(run: pd.DataFrame, value: str) -> pd.DataFrame:
    """A row for each model, a column for each way to call it; NaN where there is no time."""
    table = run.pivot(index="model", columns="call", values=value)
    return table.reindex(index=run["model"].unique(), columns=run["call"].unique())


def models_table(run: pd.DataFrame, of: str = "") -> str:
    """Milliseconds of blocks and layers as they are and enabled, in brackets how much faster.

    With "gpu_" as `of`, milliseconds of the GPU alone, for the calls that have them.
    """
    times, speedups = by_model(run, f"{of}milliseconds"), by_model(run, f"{of}speedup")
    status = by_model(run, "status")
    if of:
        times = times.dropna(axis="columns", how="all")
    table = pd.DataFrame(index=times.index.rename(f"block or layer{', GPU alone' if of else ''}"))
    for call in times:
        table[call] = [
            _model_cell(times.at[name, call], speedups.at[name, call], status.at[name, call], call)
            for name in times.index
        ]
    return markdown(table)


def _model_cell(time: float, speedup: float, status: str, call: str) -> str:
    if math.isnan(time):
        return WITHOUT_A_TIME.get(status, "")
    return f"{digits(time)} (**{speedup:.2f}**)" if call.endswith(ENABLED) else digits(time)


def models(run: pd.DataFrame) -> str:
    """The table of blocks and layers, below the run's caption and the versions of libraries."""
    pairs = run[["library", "version"]].drop_duplicates().itertuples(index=False)
    libraries = ", ".join([f"{library} {version}" for library, version in pairs if version])
    tables = [models_table(run)]
    if run["gpu_milliseconds"].notna().any():
        tables.append(models_table(run, "gpu_"))
    return "\n\n".join([f"{caption(run)}, {libraries}:", *tables])


def draw_models(axes: Axes, run: pd.DataFrame) -> None:
    """How much faster each block or layer is, a bar for each way to call it."""
    speedups = by_model(run, "speedup")
    ways = [way for way in MODEL_WAYS if speedups.get(way + ENABLED, pd.Series()).notna().any()]
    if not ways:
        raise ValueError("the run must hold an enabled model, got none")
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        rows = [row - 0.4 + (number + 0.5) * height for row in range(len(speedups))]
        gains = speedups[way + ENABLED]
        bars = axes.barh(rows, gains - 1, height, left=1, color=MODEL_WAYS[way], label=way)
        names = ["" if math.isnan(gain) else f"{gain:.2f}" for gain in gains]
        axes.bar_label(bars, names, padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(speedups)), speedups.index)
    (dtype,) = run["dtype"].unique()
    axes.set_title(f"Blocks and layers at their models' sizes, {dtype}; linear scale from 1")
    axes.set(xlabel="times as fast as the same call of the model as it is")
    axes.set_ylim(len(speedups) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def draw_times(axes: Axes, run: pd.DataFrame) -> None:
    """Time against tokens for every provider, log-log, with the limit as a line."""
    times = time_by_tokens(run)
    if "limit" in times:
        axes.plot(times["limit"], color="black", linestyle="--", linewidth=1, label="limit")
    # The legend lists the lines as they lie at their right end, from the top.
    names = times.columns.drop("limit", errors="ignore")
    for name in times[names].ffill().iloc[-1].sort_values(ascending=False).index:
        color, marker = STYLES.get(name, UNKNOWN)
        weight = (
            {"linewidth": 2.2, "markersize": 6, "zorder": 3}
            if name == OURS
            else {"linewidth": 0.9, "markersize": 3.5}
        )
        axes.plot(times[name].dropna(), color=color, marker=marker, label=name, **weight)
    row = shown(run, "sweep").iloc[0]
    batch, head_dim = row["batch"], row["head_dim"]
    shapes = [f"({batch}, tokens, {row[heads]}, {head_dim})" for heads in ("q_heads", "k_heads")]
    axes.set_title(f"q {shapes[0]} and k {shapes[1]}, {row['dtype']}, in place; logarithmic scales")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds per call")
    axes.set_xticks(times.index, [f"{tokens:,}" for tokens in times.index], rotation=30)
    axes.minorticks_off()
    axes.grid(color="#dddddd", linewidth=0.6)


def draw_shares(axes: Axes, run: pd.DataFrame) -> None:
    """The share of the limit by shape: a band for each shape, a mark for each provider."""
    shares = share_by_shape(run)
    draw_bands(axes, shares)
    axes.set_title(f"{len(shares)} shapes of models, {SHOWN['dtype']}, in place; linear scale")


def draw_fused(axes: Axes, run: pd.DataFrame) -> None:
    """The same for what is fused with the rotation, for some operations and shapes."""
    shares = share_by_task(run)
    drawn = shares.loc[shares.index.isin(representative(shares.index))]
    draw_bands(axes, drawn.dropna(axis="columns", how="all"))
    (dtype,) = run["dtype"].unique()
    count = f"{len(drawn)} of {len(shares)} operations and shapes"
    axes.set_title(f"{count}, {dtype}; linear scale; the table has all")


def representative(tasks: Iterable[str]) -> list[str]:
    """The tasks that are drawn, such as "cache, flux.1": at most MOST_BANDS.

    They are the first shape of each operation, then the last of each, then the second and so on.

    >>> representative(f"{op}, {i}" for op in ("norm", "cache") for i in range(7))[:5]
    ['norm, 0', 'cache, 0', 'norm, 6', 'cache, 6', 'norm, 1']
    """
    by_operation: dict[str, list[str]] = {}
    for task in tasks:
        by_operation.setdefault(task.partition(", ")[0], []).append(task)
    orders = [[each[0], *each[1:][-1:], *each[1:-1]] for each in by_operation.values()]
    ranked = [task for rank in zip_longest(*orders) for task in rank if task is not None]
    return ranked[:MOST_BANDS]


def draw_bands(axes: Axes, shares: pd.DataFrame) -> None:
    """A band for each row of shares, a mark for each column."""
    count = len(shares.columns)
    for position, name in enumerate(shares):
        color, marker = STYLES.get(name, UNKNOWN)
        size, above = (42, 3) if name == OURS else (16, 2)
        heights = [row + (position - (count - 1) / 2) * 0.8 / count for row in range(len(shares))]
        axes.scatter(
            shares[name], heights, size, color=color, marker=marker, label=name, zorder=above
        )
    for row in range(0, len(shares), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_yticks(range(len(shares)), shares.index)
    axes.set(xlabel="share of the limit (further right is faster)", ylim=(len(shares) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)


def draw_host_times(axes: Axes, run: pd.DataFrame) -> None:
    """Host time of one plain call, a bar for each provider and call, the fastest at the top."""
    times = host_times(run).dropna(subset="plain")
    if times.empty:
        raise ValueError("the run must hold a host time, got none")
    labels = times["provider"] + ", " + times["call"]
    colors = [STYLES[OURS][0] if name == OURS else "#b8bcc4" for name in times["provider"]]
    bars = axes.barh(range(len(times)), times["plain"], 0.7, color=colors)
    axes.bar_label(bars, [digits(time) for time in times["plain"]], padding=3)
    axes.set_yticks(range(len(times)), labels)
    axes.set_title(f"{HOST_SHAPE}, bfloat16; linear scale")
    axes.set(xlabel="microseconds of the host per call", ylim=(len(times) - 0.5, -0.5))
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def draw(
    panel: Callable[[Axes, pd.DataFrame], None],
    runs: list[pd.DataFrame],
    *,
    width: float = 9,
    height: float = 5,
) -> Figure:
    """A figure of one panel for each run, `width` by `height` inches each.

    A panel's title says what is drawn: shapes, dtype and scale. GPU, date and versions follow it.
    """
    with matplotlib.rc_context(DRAWING):
        size = (width * len(runs), height)
        figure = Figure(size, facecolor="white", layout="constrained")
        grid = figure.subplots(1, len(runs), squeeze=False)
        marks = {}
        for axes, run in zip(grid[0], runs, strict=True):
            panel(axes, run)
            title = f"{axes.get_title()}\n{caption(run)}".replace("; Python", "\nPython")
            axes.set_title("")
            axes.set_title(title, loc="left", fontsize=8, color="#222222")
            handles, labels = axes.get_legend_handles_labels()
            marks = dict(zip(labels, handles, strict=True)) | marks
        if marks:
            figure.legend(marks.values(), marks, loc="outside right upper", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, the same file for the same figure."""
    with matplotlib.rc_context(DRAWING):
        figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", nargs="*", type=Path, help="files of bench_rotary.py")
    parser.add_argument("--host", nargs="+", type=Path, default=[], help="files of bench_host.py")
    parser.add_argument("--fused", nargs="+", type=Path, default=[], help="of bench_fused.py")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="of bench_models.py")
    parser.add_argument("--readme", action="store_true", help="only what the README shows")
    options = parser.parse_args(arguments)
    if not options.csv:
        tables = [fused(run) for run in (read(*options.fused) if options.fused else [])]
        tables += [models(run) for run in (read(*options.models) if options.models else [])]
        if not tables:
            parser.error("no file to read")
        print("\n\n".join(tables))
        return
    runs = read(*options.csv)
    host_runs = read(*options.host) if options.host else []

    print("\n\n".join(map(readme, runs)))
    print("".join(f"\n{host_table(run)}" for run in host_runs))
    if options.fused:
        print("\n" + "\n\n".join(map(fused, read(*options.fused))))
    if options.models:
        print("\n" + "\n\n".join(map(models, read(*options.models))))
    stem = options.csv[0].with_suffix("")
    if options.readme:
        save(draw(draw_times, runs), stem.with_suffix(".svg"))
        return
    save(draw(draw_times, runs), Path(f"{stem}-tokens.svg"))
    save(draw(draw_shares, runs), Path(f"{stem}-shapes.svg"))
    if host_runs:
        save(draw(draw_host_times, host_runs), options.host[0].with_suffix(".svg"))


if __name__ == "__main__":
    main()
