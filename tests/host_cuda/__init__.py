"""The kernels of kernels/, run on the CPU: the sources unchanged, the very launch that is planned.

`rotate` takes the place of `rope_cupy.cpu.rotate`. It plans the launch of a problem as for a GPU,
builds that one kernel with the host's C++ compiler, under AddressSanitizer and
UndefinedBehaviorSanitizer, and runs every thread of the grid over a copy of the arrays' memory, in
which there is nothing but the elements that the problem may touch. See cuda.h and launch.cpp.

A build is kept in build/host_cuda until a source changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rope_cupy import jit
from rope_cupy.memory import ITEMSIZE, ndarray_at
from rope_cupy.options import NUM_AXES
from rope_cupy.plan import LaunchPlan, joint_plan, launch_plan
from rope_cupy.problem import (
    BY_ELEMENT,
    FREQUENCY,
    IMPLICIT,
    INTERLEAVED_MROPE,
    MATRICES,
    OFFSET,
    PACKED,
    SECTIONED_MROPE,
    Pointers,
    RotaryProblem,
    View,
)

HERE = Path(__file__).parent
BUILDS = HERE.parents[1] / "build" / "host_cuda"
LAUNCHER = BUILDS / "launcher"  # which is one for all kernels, and takes longer to build than each
OPTIONS = ["-std=c++17", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
BASE = 0x2000_0000_0000  # far from where Linux puts anything
PAGE = 4096

launched: list[str] = []  # the kernels that have run, whatever came of it


class KernelError(Exception):
    """A kernel has done what it must not; the message is the sanitizer's report."""


class Array(NamedTuple):
    """Elements in memory that a launch may touch; strides count elements."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    written: bool = False


@cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is found."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def why_not() -> str | None:
    """What keeps the kernels from running here, or None."""
    if compiler() is None:
        return "no C++ compiler is found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() {}\n")
        program = f"{folder}/empty"
        compilation = command(str(source), "-o", program)
        done = subprocess.run(compilation, capture_output=True, text=True)
        if done.returncode == 0:
            done = subprocess.run([program], capture_output=True, text=True, env=_settings())
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return f"{compiler()} makes no programs with sanitizers: {said[-1]}"
    return None


def _settings() -> dict[str, str]:
    """The environment of a program with sanitizers, which must be loaded before anything else."""
    settings = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | settings


def rotate(problem: RotaryProblem, pointers: Pointers) -> None:
    """Solve the problem as its kernel does, on arrays at these addresses."""
    _launch(launch_plan(problem), [problem], [pointers])


def rotate_all(problems: Sequence[RotaryProblem], pointers: Sequence[Pointers]) -> None:
    """Solve problems as their kernel does, in one launch where one kernel serves all."""
    plan = joint_plan(tuple(problems))
    if plan is not None and plan.packer.size <= jit.MAX_BLOCK_BYTES:
        _launch(plan, problems, pointers)
        return
    for problem, each in zip(problems, pointers, strict=True):
        rotate(problem, each)


def _launch(
    plan: LaunchPlan, problems: Sequence[RotaryProblem], pointers: Sequence[Pointers]
) -> None:
    arrays = {
        f"{i} {name}": array
        for i, (problem, each) in enumerate(zip(problems, pointers, strict=True))
        for name, array in arrays_of(problem, each).items()
    }
    moves = moves_of(arrays)
    moved = [
        _moved(problem, each, {name: moves[f"{i} {name}"] for name in arrays_of(problem, each)})
        for i, (problem, each) in enumerate(zip(problems, pointers, strict=True))
    ]
    source = jit.sources() / "rotary.cu"
    run(source, plan.kernel, plan.grid, plan.block, plan.packer.pack(*moved), arrays)


def _moved(problem: RotaryProblem, pointers: Pointers, moves: dict[str, int]) -> Pointers:
    """The addresses to which a launch moves the arrays of a problem."""
    at = [pointers.of_tensor(i) for i in range(len(problem.tensors))]
    names = Pointers._fields[Pointers._fields.index("positions") : -1]
    beside = (pointers.k_out + moves["k_out"],) if problem.k_out else ()
    return Pointers(
        x=tuple(x + moves[f"x[{i}]"] for i, (x, _) in enumerate(at)),
        out=tuple(out + moves[f"out[{i}]"] for i, (_, out) in enumerate(at)) + beside,
        cos=pointers.cos + moves.get("cos", 0),
        sin=pointers.sin + moves.get("sin", moves.get("cos", 0)),
        position_offset=pointers.position_offset,
        **{name: getattr(pointers, name) + moves.get(name, 0) for name in names},
    )


def arrays_of(problem: RotaryProblem, pointers: Pointers) -> dict[str, Array]:
    """What the launch of a problem may touch: in place, nothing but the rotated slice."""
    arrays = {}
    first, size = 0, problem.head_dim
    if problem.in_place and not problem.norm:
        first, size = problem.rotary_offset, problem.rotary_dim
    for i, tensor in enumerate(problem.tensors):
        shape = (problem.batch, problem.num_tokens, tensor.num_heads, size)
        x, out = pointers.of_tensor(i)
        for name, address, view in ((f"x[{i}]", x, tensor.x), (f"out[{i}]", out, tensor.out)):
            itemsize = ITEMSIZE[problem.dtype]
            if problem.cache and i and name.startswith("out"):
                itemsize = ITEMSIZE[problem.cache.dtype]
                shape = (problem.cache.num_blocks, problem.cache.block_size, *shape[2:])
            to_first = tensor.start * view.strides[2] + first * view.strides[3]
            start = address + to_first * itemsize
            arrays[name] = Array(start, itemsize, shape, view.strides, name.startswith("out"))
    if problem.rotary_dim:
        arrays["cos"] = _table(problem, pointers.cos, problem.cos, problem.cos_row)
    if problem.rotary_dim and not problem.sin_offset:  # else the sines lie among the cosines
        arrays["sin"] = _table(problem, pointers.sin, problem.sin, problem.sin_row)
        if problem.table_dtype == FREQUENCY:  # of which there is one scale
            arrays["sin"] = Array(pointers.sin, ITEMSIZE[FREQUENCY], (1,), (1,))
    if problem.position_dtype or problem.cu_dtype:
        arrays |= _rows(problem, pointers)
    return arrays | _weights(problem, pointers) | _slots(problem, pointers)


def _weights(problem: RotaryProblem, pointers: Pointers) -> dict[str, Array]:
    """The weights and biases of a norm, of which any may be missing."""
    if problem.norm is None:
        return {}
    arrays = {}
    names = "q_weight", "k_weight", "q_bias", "k_bias"
    for i, (name, stride) in enumerate(zip(names, problem.norm.strides, strict=True)):
        if address := getattr(pointers, name):
            tensor = problem.tensors[i % 2]
            heads = tensor.num_heads if problem.norm.norm.kind == "heads" else 1
            shape = (heads * problem.head_dim,)
            arrays[name] = Array(address, ITEMSIZE[problem.norm.dtype], shape, (stride or 0,))
    return arrays


def _slots(problem: RotaryProblem, pointers: Pointers) -> dict[str, Array]:
    """The slots of a cache, the scales that lie in memory, and k where it is written beside it."""
    if problem.cache is None:
        return {}
    itemsize, strides = ITEMSIZE[problem.cache.slot_dtype], problem.cache.slot_strides
    shape = (problem.batch, problem.num_tokens)
    arrays = {"slots": Array(pointers.slots, itemsize, shape, strides)}
    for name in ("k_scale", "v_scale"):
        if address := getattr(pointers, name):
            arrays[name] = Array(address, ITEMSIZE[problem.cache.scale_dtype], (1,), (1,))
    if problem.k_out:
        shape = (*shape, problem.tensors[1].num_heads, problem.head_dim)
        strides, itemsize = problem.k_out.strides, ITEMSIZE[problem.dtype]
        arrays["k_out"] = Array(pointers.k_out, itemsize, shape, strides, True)
    return arrays


def _rows(problem: RotaryProblem, pointers: Pointers) -> dict[str, Array]:
    """What tells the rows of tokens; of an offset for every sequence there may be none."""
    axis = problem.position_axis
    if problem.position_kind == PACKED:
        shape, strides = (problem.num_sequences,), (problem.cu_stride,)
        begins = Array(pointers.cu_seqlens, ITEMSIZE[problem.cu_dtype], (shape[0] + 1,), strides)
        if not pointers.positions:
            return {"cu_seqlens": begins}
        offsets = Array(pointers.positions, ITEMSIZE[problem.position_dtype], shape, (axis,))
        return {"cu_seqlens": begins, "positions": offsets}
    itemsize = ITEMSIZE[problem.position_dtype]
    shape, strides = (problem.batch, problem.num_tokens), problem.position_strides
    if problem.position_kind == OFFSET:
        shape = (problem.batch, 1)
    if problem.position_kind in (SECTIONED_MROPE, INTERLEAVED_MROPE):
        shape, strides = (NUM_AXES, *shape), (axis, *strides)
    return {"positions": Array(pointers.positions, itemsize, shape, strides)}


def _table(problem: RotaryProblem, address: int, view: View, row: int) -> Array:
    size, step = problem.rotary_dim // 2, problem.table_step
    element = view.strides[3] // step
    if problem.table_form == BY_ELEMENT:
        size *= 2
    elif problem.table_form == MATRICES and step == 1:
        step, element = 2, problem.table_column
    shape: tuple[int, ...] = (problem.num_positions,)
    strides: tuple[int, ...] = (row,)
    if problem.position_kind == IMPLICIT:
        heads = max(tensor.num_heads for tensor in problem.tensors)
        shape, strides = (problem.batch, problem.num_tokens, heads), view.strides[:3]
    shape, strides = (*shape, size, step), (*strides, view.strides[3], element)
    return Array(address, ITEMSIZE[problem.table_dtype], shape, strides)


def moves_of(arrays: dict[str, Array]) -> dict[str, int]:
    """How far a launch moves each array: whole pages, and together where two lie in one place."""
    lows, moves = _places(arrays)
    return {name: int(_move(_span(array)[0], lows, moves)) for name, array in arrays.items()}


def _places(arrays: dict[str, Array]) -> tuple[np.ndarray, np.ndarray]:
    """Where the places begin in which arrays lie, in order, and how far each moves."""
    lows, moves, free, end = [], [], BASE, 0
    for low, high in sorted(map(_span, arrays.values())):
        if low > end:
            lows.append(low)
            moves.append(free - low // PAGE * PAGE)
        end = max(end, high)
        free = (end + moves[-1]) // PAGE * PAGE + 2 * PAGE
    return np.array(lows), np.array(moves)


def _move(address: Any, lows: np.ndarray, moves: np.ndarray) -> Any:
    return moves[np.searchsorted(lows, address, "right") - 1]


def _span(array: Array) -> tuple[int, int]:
    """The first address of an array and the one behind its last."""
    ends = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    if 0 in array.shape:
        return array.address, array.address
    low, high = (sum(end for end in ends if (end < 0) == below) for below in (True, False))
    return array.address + low * array.itemsize, array.address + (high + 1) * array.itemsize


def run(
    source: Path,
    kernel: str,
    grid: tuple[int, int],
    block: tuple[int, int],
    argument_block: bytes,
    arrays: dict[str, Array],
) -> None:
    """Run a kernel, whose arguments name addresses moved by `moves_of`, and write what it wrote."""
    ranges = _ranges(arrays.values())
    places = _every_byte(ranges)
    first, last = int(places[0]), int(places[-1])
    memory = ndarray_at(first, "u1", (last + 1 - first,), (1,))  # holes and all: none is touched
    before = memory[places - first]

    header = struct.pack("<6I", *grid, *block, len(argument_block), len(ranges))
    ranges[:, 0] += _move(ranges[:, 0], *_places(arrays))
    job = b"".join([header, argument_block, ranges.tobytes(), before.tobytes()])
    done = subprocess.run(build(source, kernel), input=job, capture_output=True, env=_settings())
    launched.append(kernel)
    if done.returncode:
        raise KernelError(f"{kernel}\n{done.stderr.decode(errors='replace')}")

    after = np.frombuffer(done.stdout, np.uint8)
    written = np.zeros(len(places), bool)
    outputs = _every_byte(_ranges(array for array in arrays.values() if array.written))
    written[np.searchsorted(places, outputs)] = True
    if not np.array_equal(before[~written], after[~written]):
        raise KernelError(f"{kernel}\nhost_cuda: an array that is only read has been written")
    memory[places[written] - first] = after[written]


def _ranges(arrays: Iterable[Array]) -> np.ndarray:
    """The bytes of arrays as rows (address, number), in order; none touches the next."""
    starts, ends = [], []
    for array in arrays:
        places = np.zeros(1, np.int64)
        for size, stride in zip(array.shape, array.strides, strict=True):
            steps = np.arange(size if stride else min(size, 1)) * stride
            places = (places[:, None] + steps).ravel()
        starts.append(array.address + array.itemsize * places)
        ends.append(starts[-1] + array.itemsize)
    order = np.argsort(start := np.concatenate(starts), kind="stable")
    start, end = start[order], np.maximum.accumulate(np.concatenate(ends)[order])
    first = np.flatnonzero(np.r_[True, start[1:] > end[:-1]])
    last = np.r_[first[1:], len(start)] - 1
    return np.stack([start[first], end[last] - start[first]], axis=1)


def _every_byte(ranges: np.ndarray) -> np.ndarray:
    """The address of every byte of ranges, in order."""
    start, size = ranges.T
    return np.repeat(start - np.cumsum(size) + size, size) + np.arange(size.sum())


def build(source: Path, kernel: str) -> tuple[Path, Path]:
    """Return the program that launches kernels, and one kernel of a source file as it wants it."""
    name = hashlib.sha256(kernel.encode()).hexdigest()[:32]
    launch = ["-O1", "-rdynamic", str(HERE / "launch.cpp"), "-ldl"]
    kernels = _folder(BUILDS / source.stem, source.parent)
    return (
        _made(_folder(LAUNCHER, HERE) / "launch", *launch),
        _made(kernels / name, *kernel_options(source, kernel)),
    )


def _folder(builds: Path, sources: Path) -> Path:
    """Return the folder of what is built of sources, without what was built of earlier ones."""
    folder = builds / _digest(sources)
    if not folder.exists() and builds.exists():
        for other in {*builds.iterdir()} - {folder}:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def kernel_options(source: Path, kernel: str) -> list[str]:
    defines = [f'-DSOURCE="{source.name}"', f"-DKERNEL={kernel}", f"-I{source.parent}"]
    return ["-shared", "-fPIC", "-nostdlib", *defines, str(HERE / "kernel.cpp")]


def command(*arguments: str) -> list[str]:
    """The command line that compiles with sanitizers."""
    found = compiler()
    assert found, "why_not() must have been asked"
    return [found, *OPTIONS, *SANITIZERS, *arguments]


def _made(target: Path, *arguments: str) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            subprocess.run(command(*arguments, "-o", str(made)), check=True)
            made.replace(target)  # at once, for others may be at it too
    return target


@cache
def _digest(sources: Path) -> str:
    """What stands for everything that goes into a build."""
    files = [*sorted(sources.glob("*.cu*")), *sorted(HERE.glob("*.cpp")), *HERE.glob("*.h")]
    version = subprocess.run(command("--version"), capture_output=True, check=True).stdout
    options = " ".join(OPTIONS + SANITIZERS).encode()
    contents = b"".join([version, options, *(path.read_bytes() for path in files)])
    return hashlib.sha256(contents).hexdigest()[:16]
