"""Time transformer blocks of diffusers with their own attention processor and with rope_cupy.

    python benchmarks/bench_blocks.py
    python benchmarks/bench_blocks.py --blocks qwen-image --quick

A block has the sizes of its model, random weights and random inputs. Blocks of all kinds are called
in turn, without gradients. `milliseconds` is the median of 50 calls of each, between CUDA events,
which is what a user waits for: the GPU's time where the host is ahead of it. `gpu_milliseconds` is
the time of the GPU alone, by replays of a CUDA graph, and `host_milliseconds` that of the host.
Before they are timed, the outputs of the attention and of the block are compared with diffusers'
own and with those of a float32 block with the same weights: rope_cupy's must be no farther from
these than diffusers' own, but for 5%.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import runner
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_qwenimage, transformer_wan
from peers import need
from result import Result, WrongError
from runner import Entry, Parser
from timing import Clock, Events, HostLoop, OnTheCPU, Replays

from rope_cupy import RotaryTable, apply_qk_norm_rotary

COLUMNS = ("block", "batch", "tokens", "text", "dtype", "call", "version", "status", "reason")
COLUMNS += ("milliseconds", "speedup", "gpu_milliseconds", "host_milliseconds")
COLUMNS += ("block_error", "block_difference", "attention_error", "attention_difference")
DIFFUSERS, OURS = "diffusers", "rope_cupy"
COMPILED = ", compiled"
RUNS, QUICK_RUNS, CPU_RUNS = 50, 30, 3
HOST_CALLS, HOST_REPEATS = 5, 9  # few, so that the GPU's queue of launches never fills

# Norms relative to that of the float32 output: of the difference between rope_cupy's output and
# diffusers', and of rope_cupy's error, which must not be larger than MARGIN times diffusers' error.
DIFFERENCE = {"bfloat16": 1e-2, "float32": 1e-5}
MARGIN = 1.05

Tensors = tuple[torch.Tensor, ...]


class QwenImageProcessor:
    """Joint attention: q and k are normalised, turned and joined by one pass over each stream."""

    _attention_backend = None  # transformer.set_attention_backend sets it

    def __call__(
        self, attn, image, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb, **_
    ):
        text, mask, n = encoder_hidden_states, encoder_hidden_states_mask, len(image_rotary_emb[1])
        image_table, text_table = map(RotaryTable.from_complex, image_rotary_emb)
        head_dim = attn.inner_dim // attn.heads
        how = {"interleaved": True, "head_dim": head_dim, "eps": attn.norm_q.eps}
        v = torch.cat([attn.add_v_proj(text), attn.to_v(image)], dim=1)
        q, k = torch.empty_like(v), torch.empty_like(v)
        image_qk = attn.to_q(image), attn.to_k(image), attn.norm_q.weight, attn.norm_k.weight
        apply_qk_norm_rotary(*image_qk, image_table, out=(q[:, n:], k[:, n:]), **how)
        text_weights = attn.norm_added_q.weight, attn.norm_added_k.weight
        text_qk = attn.add_q_proj(text), attn.add_k_proj(text), *text_weights
        apply_qk_norm_rotary(*text_qk, text_table, out=(q[:, :n], k[:, :n]), **how)
        q, k, v = (x.unflatten(2, (-1, head_dim)) for x in (q, k, v))
        mask = None if mask is None else F.pad(mask, (0, image.shape[1]), value=True)[:, None, None]
        joint = dispatch_attention_fn(q, k, v, mask, backend=self._attention_backend).flatten(2)
        return attn.to_out[0](joint[:, n:].contiguous()), attn.to_add_out(joint[:, :n].contiguous())


class WanProcessor:
    """Self-attention whose q and k are normalised over all heads and rotated, in place, at once."""

    _attention_backend = None  # transformer.set_attention_backend sets it

    def __call__(self, attn, hidden_states, _encoder_hidden_states, mask, rotary_emb):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        weights = attn.norm_q.weight, attn.norm_k.weight
        table = RotaryTable.from_full_width(*rotary_emb)
        head_dim = attn.inner_dim // attn.heads
        how = {"interleaved": True, "head_dim": head_dim, "norm": "heads", "eps": attn.norm_q.eps}
        apply_qk_norm_rotary(q, k, *weights, table, out=(q, k), **how)
        q, k, v = (x.unflatten(2, (-1, head_dim)) for x in (q, k, v))
        joint = dispatch_attention_fn(q, k, v, mask, backend=self._attention_backend).flatten(2)
        return attn.to_out[0](joint)


class Size(NamedTuple):
    """What is asked of a block: (frames, height, width) tokens of an image or a video, and text."""

    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text: int
    hidden: int = 0  # of Wan's feed-forward layer
    batch: int = 1

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


class Block(NamedTuple):
    """A block of diffusers, its inputs, and other processors of the attention that rotates."""

    module: torch.nn.Module
    attention: str  # the name of that module
    inputs: dict[str, Any]
    processors: dict[str, Callable[[], Any]]


def qwen_image(size: Size, device: str, dtype: torch.dtype) -> Block:
    """A block of Qwen-Image: image and text, each with weights of its own, attend to each other."""
    with torch.device(device):
        block = transformer_qwenimage.QwenImageTransformerBlock(size.dim, size.heads, size.head_dim)
    sixteenth = size.head_dim // 16
    rope = transformer_qwenimage.QwenEmbedRope(
        10000, [2 * sixteenth, 7 * sixteenth, 7 * sixteenth], scale_rope=True
    )
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = {
        "hidden_states": draw(size.batch, size.tokens, size.dim),
        "encoder_hidden_states": draw(size.batch, size.text, size.dim),
        "encoder_hidden_states_mask": None,
        "temb": draw(size.batch, size.dim),
        "image_rotary_emb": rope([size.grid], torch.device(device), size.text),
    }
    processors = {OURS: QwenImageProcessor}
    return Block(randomized(block).to(dtype), "attn", inputs, processors)


def wan(size: Size, device: str, dtype: torch.dtype) -> Block:
    """A block of Wan 2.1: the video attends to itself, with positions, and then to the text."""
    with torch.device(device):
        block = transformer_wan.WanTransformerBlock(
            size.dim, size.hidden, size.heads, cross_attn_norm=True
        )
    block = randomized(block).to(dtype)
    block.norm2.float()  # the model keeps these in float32
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    rope = transformer_wan.WanRotaryPosEmbed(size.head_dim, (1, 2, 2), 1024).to(device)
    frames, height, width = size.grid
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = {
        "hidden_states": draw(size.batch, size.tokens, size.dim),
        "encoder_hidden_states": draw(size.batch, size.text, size.dim),
        "temb": draw(size.batch, 6, size.dim),
        "rotary_emb": rope(torch.empty(1, 1, frames, 2 * height, 2 * width, device="meta")),
    }
    return Block(block, "attn1", inputs, {OURS: WanProcessor})


class Kind(NamedTuple):
    """How a block is made, its model's size, and a size for the CPU."""

    make: Callable[[Size, str, torch.dtype], Block]
    size: Size
    small: Size


KINDS = {
    "qwen-image": Kind(  # 1024 x 1024
        qwen_image, Size(24, 128, (1, 64, 64), 512), Size(4, 32, (1, 12, 10), 40)
    ),
    "wan-2.1-14b-480p": Kind(  # 81 frames
        wan, Size(40, 128, (21, 30, 52), 512, 13824), Size(4, 32, (4, 6, 8), 40, 256)
    ),
}


def randomized(block: torch.nn.Module) -> torch.nn.Module:
    """Draw all weights so that layers keep the size of what they are given, and norms do something.

    Scores of the attention are about normal: with larger ones roundings of q and k count for more
    than those of anything else, with smaller ones for less.
    """
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
            torch.nn.init.normal_(module.bias, std=0.1 * module.in_features**-0.5)
        elif getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
    return block.requires_grad_(False).eval()


class Call:
    """A block with a processor of its attention and, shared by all, weights and inputs."""

    def __init__(self, block: Block, processor: Any = None, compiled: bool = False) -> None:
        self.inputs, self.attention = block.inputs, None
        module = copy.deepcopy(block.module, {id(each): each for each in block.module.parameters()})
        attention = module.get_submodule(block.attention)
        if processor:
            attention.set_processor(processor())
        self.module = torch.compile(module, dynamic=False, fullgraph=True) if compiled else module
        if not compiled:  # a hook in what is compiled would break its graph
            self.attention = attention

    def __call__(self) -> Tensors:
        """Return what the block returns, as a tuple."""
        return _tuple(self.module(**self.inputs))

    def outputs(self) -> dict[str, Tensors]:
        """Return the outputs of the block and, where it is not compiled, of its attention."""
        found: dict[str, Tensors] = {}

        def keep(module: Any, arguments: Any, output: Any) -> None:
            found["attention"] = _tuple(output)

        hook = self.attention.register_forward_hook(keep) if self.attention is not None else None
        found["block"] = self()
        if hook:
            hook.remove()
        return found


def exact_outputs(block: Block) -> dict[str, Tensors]:
    """Return the outputs of the block in float32, with its own processor and the same weights."""
    inputs = {
        name: x.float() if isinstance(x, torch.Tensor) else x for name, x in block.inputs.items()
    }
    module = copy.deepcopy(block.module).float()
    return Call(block._replace(module=module, inputs=inputs)).outputs()


def _tuple(output: Any) -> Tensors:
    return output if isinstance(output, tuple) else (output,)


class Agreement(NamedTuple):
    """Relative norms: of the error, and of the difference from diffusers' output."""

    error: float
    difference: float


def agreement(found: Tensors, theirs: Tensors, exact: Tensors) -> Agreement:
    """Compare outputs, whichever of them is worst."""
    rows = [
        (_apart(ours, right) / right.norm(), _apart(ours, their) / right.norm())
        for ours, their, right in zip(found, theirs, exact, strict=True)
    ]
    return Agreement(*(float(torch.stack(column).max()) for column in zip(*rows, strict=True)))


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).norm()


def checked(
    found: dict[str, Tensors], theirs: dict[str, Tensors], exact: dict[str, Tensors]
) -> dict[str, Agreement]:
    """Return how outputs agree with the exact ones and with diffusers' own.

    Raises WrongError where any is too far from either.
    """
    result = {}
    for name, outputs in found.items():
        for output, their in zip(outputs, theirs[name], strict=True):
            if output.dtype != their.dtype or output.shape != their.shape:
                what = f"{name}: {output.dtype} of shape {tuple(output.shape)}"
                raise WrongError(what, math.nan)
        ours = agreement(outputs, theirs[name], exact[name])
        their_error = agreement(theirs[name], theirs[name], exact[name]).error
        allowed = DIFFERENCE[str(outputs[0].dtype).removeprefix("torch.")]
        for what, value, limit in (
            ("error", ours.error, max(MARGIN * their_error, DIFFERENCE["float32"])),
            ("difference from diffusers'", ours.difference, allowed),
        ):
            if not value <= limit:
                reason = f"{name}: {what} {value:.2g}, more than {limit:.2g}"
                raise WrongError(reason, value)
        result[name] = ours
    return result


def calls_of(block: Block) -> dict[str, Callable[[], Call]]:
    """Return how each of the calls that are compared is made."""
    processors = {DIFFUSERS: None} | block.processors
    make = functools.partial(functools.partial, Call, block)
    eager = {name: make(processor) for name, processor in processors.items()}
    return eager | {
        name + COMPILED: make(processors[name], compiled=True) for name in (DIFFUSERS, OURS)
    }


def measured(
    block: Block, device: str, runs: int, with_compiled: bool
) -> tuple[dict[str, Result], dict[str, dict[str, Agreement]]]:
    """Check the outputs of every call, then time those that are right."""
    torch.compiler.reset()
    exact, theirs = exact_outputs(block), Call(block).outputs()
    agreements: dict[str, dict[str, Agreement]] = {}

    def entry(name: str, make: Callable[[], Call]) -> Entry:
        def ways() -> list[list[Call]]:
            need(device != "cpu" or not name.endswith(COMPILED), "runs on a GPU only")
            return [[make()]]

        def check(call: Call) -> float:
            agreements[name] = checked(call.outputs(), theirs, exact)
            return agreements[name]["block"].error

        return Entry(ways, check)

    entries = {
        name: entry(name, make)
        for name, make in calls_of(block).items()
        if with_compiled or not name.endswith(COMPILED)
    }
    clock: Clock = OnTheCPU(runs)
    beside: dict[str, Clock] = {}
    if device != "cpu":
        clock, beside["gpu"] = Events(runs), Replays(min_calls=1)
        beside["host"] = HostLoop(HOST_CALLS, HOST_REPEATS, 0, on_gpu=True)
    return runner.measured(entries, clock, **beside), agreements


@torch.no_grad()
def _rows(name: str, options: argparse.Namespace) -> list[runner.Row]:
    on_cpu, kind = options.device == "cpu", KINDS[name]
    size = kind.small if on_cpu else kind.size
    torch.manual_seed(0)
    block = kind.make(size, options.device, getattr(torch, options.dtype))
    runs = CPU_RUNS if on_cpu else QUICK_RUNS if options.quick else RUNS
    results, agreements = measured(block, options.device, runs, not options.quick)
    about = {"block": name, "batch": size.batch, "tokens": size.tokens, "text": size.text}
    eager = results[DIFFUSERS].microseconds
    rows = []
    for call, result in results.items():
        time = result.microseconds
        row = about | {"dtype": options.dtype, "call": call, "version": peers.version(DIFFUSERS)}
        row |= {"status": result.status, "reason": result.reason}
        row["milliseconds"] = "" if time is None else f"{time / 1e3:.4g}"
        row["speedup"] = f"{eager / time:.3f}" if eager and time else ""
        for clock, microseconds in result.beside.items():
            row[f"{clock}_milliseconds"] = f"{microseconds / 1e3:.4g}"
        for part, each in agreements.get(call, {}).items():
            row |= {f"{part}_{what}": f"{value:.3g}" for what, value in each._asdict().items()}
        rows.append(row)
    return rows


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    groups = []
    for name in options.blocks:
        size = KINDS[name].small if options.device == "cpu" else KINDS[name].size
        title = f"{name}, {size.tokens:,} tokens and {size.text:,} of text: a block"
        groups.append((title, functools.partial(_rows, name, options)))
    runner.run("blocks", options, COLUMNS, groups)


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)  # on the CPU, blocks are small
    parser.names("--blocks", KINDS)
    parser.flags(quick=f"nothing compiled, {QUICK_RUNS} calls of each")
    parser.add_argument("--dtype", choices=list(DIFFERENCE), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
