"""python -m rope_cupy table CONFIG.json: what a model's config says about its rotary embedding.

It prints the type, the wavelengths of the pairs, in positions, and the largest safe position. That
is the last position of those that the config says the model was made for: max_position_embeddings
less 1, or, where this is more, its original length times its factor less 1. Beyond it the rotation
is as exact, but by angles that no training has shown the model.
"""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .checks import described, positive
from .frequencies import (
    from_config,
    inverse_frequencies,
    layer_types,
    pairs_neighbours,
    rotary_parameters,
)
from .frequencies.configs import (
    layers_that_rotate,
    part_that_rotates,
    rope_parameters,
    unrotated_interval,
)
from .frequencies.reading import read

if TYPE_CHECKING:
    from .frequencies.rules import Frequencies

SHOWN = 8  # pairs, evenly spaced, and the last
MOST_LETTERS = 400  # of a message


class Spectrum(NamedTuple):
    """The rotary embedding of the layers of one type, or of all."""

    layer_type: str | None
    rope_type: str
    rotary_dim: int
    base: float
    options: dict[str, Any]
    inv_freq: Frequencies
    attention_scaling: float
    num_positions: int | None  # that the model is made for, None where the config does not say
    notes: tuple[tuple[str, str], ...] = ()  # what else the config says: (name, text)

    @property
    def wavelengths(self) -> Frequencies:
        """Positions in which each pair turns once."""
        with np.errstate(divide="ignore", over="ignore"):
            return 2 * np.pi / np.abs(self.inv_freq)


def add_arguments(parser: ArgumentParser) -> None:
    """Say what the command line takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="of a model")
    parser.add_argument("--layer-type", help='such as "full_attention": by default every one')
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help='tokens, for "dynamic" and "longrope"'
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the wavelengths")
    parser.epilog = "The largest safe position is " + " ".join(
        (__doc__ or "").partition("That\nis ")[2].split()
    )


def main(options: Namespace) -> int:
    """Print what the config says, and draw it if wanted; return the exit status."""
    layer_type = options.layer_type
    try:
        config = _config(options.config)
        types = layer_types(config) if layer_type is None else (layer_type,)
        spectra = [spectrum(config, each, options.seq_len) for each in types]
        if options.plot:
            draw(spectra, options.plot)
    except (TypeError, ValueError, ImportError, OSError) as error:
        _print(_printable(f"error: {error}"))
        return 1
    text = "\n\n".join(map(report, spectra))
    if options.plot:
        text += f"\n\ndrawn to {_printable(str(options.plot))}"
    _print(text)
    return 0


def _print(text: str) -> None:
    """Print a text, of which a reader that closes the pipe wants no more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_stdout()


def close_stdout() -> None:
    """Let nothing more be written to a pipe that is closed, as Python would when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def spectrum(config: Any, layer_type: str | None, seq_len: int | None) -> Spectrum:
    """Return what a config says of the layers of one type."""
    parameters = rotary_parameters(config, layer_type=layer_type)
    inv_freq, scaling = from_config(config, seq_len=seq_len, layer_type=layer_type)
    rope_type, rotary_dim, base, options, max_position = parameters
    num_positions = 0.0
    if max_position is not None:
        num_positions = positive("max_position_embeddings", max_position)
    original = options.get("original_max_position", options.get("max_position"))
    if original and "factor" in options:
        # As floats: two numbers that are finite in float64 may be ints whose product is not.
        num_positions = max(num_positions, float(original) * float(options["factor"]))
    if num_positions == math.inf:
        raise ValueError("factor must give a finite number of positions, got an infinity")
    return Spectrum(
        layer_type,
        rope_type,
        rotary_dim,
        base,
        options,
        inv_freq,
        scaling,
        int(num_positions) or None,
        tuple(_notes(config, layer_type, parameters.options, seq_len)),
    )


def _notes(
    config: Any, layer_type: str | None, options: Mapping[str, Any], seq_len: int | None
) -> list[tuple[str, str]]:
    """Return what a config says besides the frequencies, as lines of two columns."""
    neighbours, config = pairs_neighbours(config), part_that_rotates(config)
    given = rope_parameters(config)
    pairing = {
        True: "neighbours (interleaved=True)",
        False: "halves (interleaved=False)",
        None: "not said; halves (interleaved=False) in most models",
    }
    notes = [("pairing", pairing[neighbours])]
    own = given.get(layer_type) or {}
    if sections := read(own, "mrope_section"):
        order = " by turns" if read(own, "mrope_interleaved") is True else ""
        notes.append(
            ("axes", f"mrope_section {_listed(sections)}{order}: pairs by time, height, width")
        )
    if "short_factor" in options:
        original, length = options["original_max_position"], seq_len or 0
        which = ("long", "more than") if length > original else ("short", "up to")
        notes.append(
            ("factors", f"{which[0]}_factor, for {which[1]} {_number(original)} tokens (--seq-len)")
        )
    without = [f"layers of the type {name}" for name in given if given[name] is None]
    if layers := layers_that_rotate(config):
        still = [number for number, rotates in enumerate(layers) if not rotates]
        if still:
            without.append(f"{len(still)} of {len(layers)} layers: {_listed(still)}")
    elif interval := unrotated_interval(config):
        without.append(f"the last of every {interval} layers")
    if without:
        notes.append(("not rotated", "; ".join(without)))
    return notes


def report(of: Spectrum) -> str:
    """Return what is printed of a spectrum."""
    options = [f"{name} {_number(value)}" for name, value in of.options.items()]
    lines = [
        *([f"layers       {of.layer_type}"] if of.layer_type else []),
        f"type         {of.rope_type}",
        f"rotary_dim   {of.rotary_dim}",
        f"base         {_number(of.base)}",
        *([f"options      {', '.join(options)}"] if options else []),
        *(f"{name:13}{text}" for name, text in of.notes),
        f"cos and sin  times {of.attention_scaling:.6g}",
        "",
        "   pair   radians a position   positions a turn",
    ]
    num_pairs = len(of.inv_freq)
    for pair in sorted({*range(0, num_pairs, -(-num_pairs // SHOWN)), num_pairs - 1}):
        lines.append(f"{pair:7}{of.inv_freq[pair]:21.6g}{of.wavelengths[pair]:19,.6g}")
    lines.append("")
    if of.num_positions:
        whole = int((of.wavelengths <= of.num_positions).sum())
        lines.append(f"largest safe position  {of.num_positions - 1:,}")
        lines.append(f"whole turns up to it   of {whole} of {num_pairs} pairs")
    else:
        lines.append("largest safe position  not said: the config has no max_position_embeddings")
    return "\n".join(map(_printable, lines))


def draw(spectra: list[Spectrum], path: Path) -> None:
    """Draw the wavelengths of every pair, beside those of the base alone, to an image."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for number, each in enumerate(spectra):
        name = each.layer_type or each.rope_type
        axes.semilogy(each.wavelengths, ".-", color=f"C{number}", label=name)
        if each.rope_type != "default":
            plain = 2 * np.pi / inverse_frequencies(each.rotary_dim, each.base)
            axes.semilogy(plain, ":", color=f"C{number}", label=f"base {_number(each.base)} alone")
        if each.num_positions:
            label = f"{each.num_positions:,} positions"
            axes.axhline(each.num_positions, color=f"C{number}", linewidth=0.8, label=label)
    axes.set(xlabel="pair", ylabel="positions a turn", title="Wavelengths of the rotary embedding")
    axes.legend()
    figure.savefig(path, dpi=150)


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} must be a JSON file, got one that is nested too deep") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error


def _printable(text: str) -> str:
    """Return a line as a terminal may be given it: what a file says may be anything."""
    letters = (c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[:MOST_LETTERS])
    return "".join(letters) + ("..." if len(text) > MOST_LETTERS else "")


def _number(value: Any) -> str:
    """Return a number as it is read, of a list its length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"of {len(value)} numbers" if isinstance(value, list | tuple) else str(value)
    return f"{value:,.10g}"


def _listed(values: Any) -> str:
    """Return the first numbers of a list."""
    if not isinstance(values, list | tuple):
        return _shown(values)
    return ", ".join(map(_shown, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")


def _shown(value: object) -> str:
    return str(value) if isinstance(value, int) else described(value)
