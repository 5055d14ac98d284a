"""Time the functions of rope_cupy.compat beside the plain calls that they stand on, and the peers.

    python benchmarks/bench_compat.py
    python benchmarks/bench_compat.py --modules vllm --providers "plain call,vllm"

What the calls are: see compat_cases.py. The peer's functions are those of its package, if it is
installed. Every result is compared with the plain call's before it is timed.

The host's time is measured as in bench_host.py, for the first shape. The GPU's is that of a CUDA
graph of calls, for every shape; the arrays lie in the L2 cache if they fit. `above_plain` is how
many microseconds more a call takes than its plain call. All calls of a module are repeated in turn.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peers
import runner
import torch
from bench_host import CPU_CALLS, WARM_UP
from compat_cases import MODULES, Arrays, Case
from result import AbsentError, Result, WrongError
from runner import TIMED, Entry, Parser
from shapes import Shape
from tasks import TOLERANCE, Call
from timing import FEWEST_REPLAYS, Clock, HostLoop, OnTheCPU, Replays

COLUMNS = ("shape", "measure", "call", "provider", *TIMED, "above_plain", "error")
GPU, HOST = "GPU", "host"
PLAIN, COMPAT = OURS = "plain call", "rope_cupy.compat"
CALLS, REPEATS = 200, 21  # more repeats than others: what is told is a difference

PEERS = {  # the package of each peer, and its modules that have the functions
    "flash_attn": (
        "flash-attn",
        ("flash_attn.layers.rotary", "flash_attn.ops.triton.rotary"),
    ),
    "quack": ("quack-kernels", ("quack.rotary",)),
    "flashinfer": ("flashinfer-python", ("flashinfer",)),
    "vllm": (
        "vllm",
        (
            "vllm._custom_ops",
            "vllm.model_executor.layers.rotary_embedding.mrope",
            "vllm.model_executor.layers.fused_qk_norm_rope",
        ),
    ),
    "sglang": (
        "sglang",
        ("sglang.jit_kernel.rope", "sglang.jit_kernel.diffusion.qknorm_rope", "sgl_kernel"),
    ),
    "liger": (
        "liger-kernel",
        tuple(
            f"liger_kernel.transformers.{name}" for name in ("rope", "qwen2vl_mrope", "llama4_rope")
        ),
    ),
    "transformer_engine": (
        "transformer-engine",
        ("transformer_engine.pytorch.attention.rope",),
    ),
    "apex": ("apex", ("fused_rotary_positional_embedding", "apex.transformer.functional")),
    "comfy_kitchen": ("comfy-kitchen", ("comfy_kitchen",)),
    "torchtitan": ("torchtitan", ("torchtitan.models.common.rope",)),
    "timm": ("timm", ("timm.layers",)),
}
RENAMED = {  # where a peer has two functions of one name: the modules, and the peer's name
    "apply_rotary_embedding_triton": (
        ("sglang.jit_kernel.diffusion.triton.rotary",),
        "apply_rotary_embedding",
    ),
}


def function_of(modules: tuple[str, ...], name: str) -> Any:
    """Return a function of the first of several modules that has it."""
    reasons = []
    for module in modules:
        try:
            found = peers.imported(module)
        except AbsentError as error:
            reasons.append(str(error))
            continue
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    if name in RENAMED:
        return function_of(*RENAMED[name])
    raise AbsentError(reasons[0] if reasons else f"there is no {name} in {', '.join(modules)}")


def entries_of(
    module: str, providers: list[str], arrays: Arrays
) -> Iterator[tuple[tuple[str, str], Entry]]:
    """Yield what is measured of a module, by call and provider."""
    peer, modules_of_peer = PEERS[module]
    modules = {PLAIN: (), COMPAT: (f"rope_cupy.compat.{module}",), peer: modules_of_peer}
    for name, case in MODULES[module](arrays).items():
        exact = functools.cache(partial(_results, case, case.plain, arrays))
        for provider in filter(providers.__contains__, modules):
            ways = partial(_ways, name, case, modules[provider], arrays.device)
            yield (f"{module}.{name}", provider), Entry(ways, partial(_check, case, arrays, exact))


def _ways(name: str, case: Case, modules: tuple[str, ...], device: str) -> list[list[Call]]:
    if not modules:
        return [[case.plain]]
    return [[case.call_of(function_of(modules, name.partition(",")[0]), device)]]


def _check(case: Case, arrays: Arrays, exact: Callable[[], Any], call: Call) -> float:
    """Return the largest relative error of a call's results, or raise WrongError."""
    pairs = zip(_results(case, call, arrays), exact(), strict=True)
    error = max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)
    if not error <= TOLERANCE["bfloat16"]:
        raise WrongError("differs from the plain call", error)
    return error


def _results(case: Case, call: Call, arrays: Arrays) -> list[torch.Tensor]:
    """Return copies of what a call gives for the arrays as they were at first."""
    arrays.restore()
    results = call()
    results = case.written or results
    each = results if isinstance(results, tuple | list) else (results,)
    return [x.flatten().clone() for x in each]


def measured(
    module: str, providers: list[str], shape: Shape, device: str, measure: str
) -> dict[tuple[str, str], Result]:
    """Check all calls of a module and time those that are right, all in turn."""
    clock: Clock = OnTheCPU(CPU_CALLS)
    if device == "cuda":
        clock = (
            Replays(FEWEST_REPLAYS) if measure == GPU else HostLoop(CALLS, REPEATS, WARM_UP, True)
        )
    with torch.inference_mode():
        return runner.measured(dict(entries_of(module, providers, Arrays(shape, device))), clock)


def rows_of(results: dict[tuple[str, str], Result], shape: Shape, measure: str) -> list[runner.Row]:
    """Return the rows of the CSV."""
    rows = []
    for (call, provider), result in results.items():
        row = runner.row_of(provider, result)
        row |= {"shape": shape.name, "measure": measure, "call": call}
        row["version"] = peers.installed("rope_cupy" if provider in OURS else provider)
        plain = results.get((call, PLAIN), Result("absent")).microseconds
        if result.microseconds and plain:
            row["above_plain"] = f"{result.microseconds - plain:.3f}"
        rows.append(row)
    return rows


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    measures = [(options.shapes[0], HOST)]
    if options.device == "cuda":
        measures += [(shape, GPU) for shape in options.shapes]

    def rows(module: str, shape: Shape, measure: str) -> list[runner.Row]:
        results = measured(module, options.providers, shape, options.device, measure)
        return rows_of(results, shape, measure)

    groups = (
        (f"{module}, {shape.name}, {measure}", partial(rows, module, shape, measure))
        for shape, measure in measures
        for module in options.modules
    )
    runner.run("compat", options, COLUMNS, groups)


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)
    text = "shapes, of which the number of tokens counts"
    parser.shapes("64-tokens-32/8,llama-3-8b-prefill", text)
    parser.names("--modules", MODULES)
    parser.names("--providers", (*OURS, *(package for package, _ in PEERS.values())))
    return parser.parse_args()


if __name__ == "__main__":
    main()
