"""python -m rope_cupy table CONFIG.json: what a model's config says about its rotary embedding.

It prints the type, the wavelengths of the pairs, in positions, and the largest safe position: the
last of as many as the config says the model is made for.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .frequencies import (
    from_config,
    inverse_frequencies,
    layer_types,
    rotary_parameters,
)

if TYPE_CHECKING:
    from .frequencies.rules import Frequencies

SHOWN = 8  # pairs, evenly spaced, and the last


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

    @property
    def wavelengths(self) -> Frequencies:
        """Positions in which each pair turns once."""
        with np.errstate(divide="ignore"):
            return 2 * np.pi / self.inv_freq


def add_arguments(parser: ArgumentParser) -> None:
    """Say what the command line takes."""
    parser.add_argument("config", type=_config, metavar="CONFIG.json", help="of a model")
    parser.add_argument("--layer-type", help='such as "full_attention": by default every one')
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help='tokens, for "dynamic" and "longrope"'
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the wavelengths")


def main(options: Namespace) -> int:
    """Print what the config says, and draw it if wanted; return the exit status."""
    config, layer_type = options.config, options.layer_type
    try:
        types = layer_types(config) if layer_type is None else (layer_type,)
        spectra = [spectrum(config, each, options.seq_len) for each in types]
        if options.plot:
            draw(spectra, options.plot)
    except (TypeError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}")
        return 1
    print("\n\n".join(map(told, spectra)))
    if options.plot:
        print(f"\ndrawn to {options.plot}")
    return 0


def spectrum(config: Any, layer_type: str | None, seq_len: int | None) -> Spectrum:
    """Return what a config says of the layers of one type."""
    parameters = rotary_parameters(config, layer_type=layer_type)
    inv_freq, scaling = from_config(config, seq_len=seq_len, layer_type=layer_type)
    rope_type, rotary_dim, base, options, num_positions = parameters
    original = options.get("original_max_position", options.get("max_position"))
    if original and "factor" in options:
        num_positions = max(num_positions or 0, int(original * options["factor"]))
    return Spectrum(
        layer_type, rope_type, rotary_dim, base, options, inv_freq, scaling, num_positions
    )


def told(of: Spectrum) -> str:
    """Return what is printed of a spectrum."""
    options = [f"{name} {_number(value)}" for name, value in of.options.items()]
    lines = [
        *([f"layers       {of.layer_type}"] if of.layer_type else []),
        f"type         {of.rope_type}",
        f"rotary_dim   {of.rotary_dim}",
        f"base         {_number(of.base)}",
        *([f"options      {', '.join(options)}"] if options else []),
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
    return "\n".join(lines)


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


def _config(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{path} must be a JSON file: {error}") from error


def _number(value: Any) -> str:
    """Return a number as it is read, of a list its length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"of {len(value)} numbers" if isinstance(value, list | tuple) else str(value)
    return f"{value:,.10g}"
