"""python -m rope_cupy: say what it runs on, rotate the q and k of two real models, check and time.

Every element is compared with complex multiplication in float64 by the same table, rounded once to
bfloat16. What keeps kernels from a GPU is said with the command that mends it, and the CPU rotates.
The exit status is 1 when a check fails, and when a GPU is there but cannot be used.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import (
    RotaryTable,
    __version__,
    apply_rotary,
    apply_rotary_qk,
    config_report,
    environment,
    jit,
)
from .arrays.dlpack import Bfloat16
from .environment import Fault
from .frequencies import cos_sin, inverse_frequencies

HEAD_DIM = 128


class Model(NamedTuple):
    name: str
    num_tokens: int
    num_tokens_on_cpu: int
    q_heads: int
    k_heads: int
    base: float
    interleaved: bool


MODELS = (
    Model("Qwen-Image", 4608, 512, 24, 24, 10_000.0, True),
    Model("Llama-3-8B prefill", 8192, 1024, 32, 8, 500_000.0, False),
)


class Accuracy(NamedTuple):
    relative_error: float  # norm of the difference over norm of the exact result
    rounded_right: float  # share of elements equal to the exact result rounded once
    worst_ulp: float  # how far the others are off, in units in the last place

    @property
    def passes(self) -> bool:
        return self.rounded_right >= 0.999 and self.worst_ulp <= 1


class Report(NamedTuple):
    num_tokens: int
    accuracy: Accuracy
    seconds: float
    num_bytes: int  # q and k read and written once, the table read once
    copy_rate: float | None  # bytes a second of a device-to-device copy of q and k


def main() -> int:
    cupy, faults = _cupy_and_faults()
    print(f"rope_cupy {__version__}\n")
    for label, text in _environment(cupy, faults):
        print(f"  {label:9}{text}")
    # A GPU that nobody has installed CuPy for is not missed.
    unusable = bool(faults) and _gpu_is_there() and bool(environment.packages())
    cupy = None if faults else cupy
    heads = ("model", "tokens", "heads", "pairs", "rel. error", "right", "time", "GB/s", "of copy")
    print("\n  {:19}{:>8}{:>8}{:>13}{:>12}{:>11}{:>12}{:>8}{:>10}".format(*heads))
    passed = True
    for model in MODELS:
        report = _rotate_and_time(model, cupy)
        accuracy, rate = report.accuracy, report.num_bytes / report.seconds
        verdict = "ok" if accuracy.passes else f"FAILED: up to {accuracy.worst_ulp:.1f} ulp off"
        print(
            f"  {model.name:19}{report.num_tokens:8}{f'{model.q_heads}/{model.k_heads}':>8}"
            f"{'interleaved' if model.interleaved else 'half':>13}{accuracy.relative_error:12.2e}"
            f"{accuracy.rounded_right:11.4%}{_duration(report.seconds):>12}{_gigabytes(rate):>8}"
            f"{f'{rate / report.copy_rate:.1%}' if report.copy_rate else '-':>10}  {verdict}"
        )
        passed &= accuracy.passes
    print(
        f"""
  bfloat16 q and k of head_dim {HEAD_DIM}, a float32 table, in place, q and k in one launch
  rel. error  norm of the difference to float64 over its norm: rounding to bfloat16 alone is 1.7e-3
  right       elements equal to the float64 result rounded once; no other may be off by over 1 ulp
  GB/s        bytes of q and k read and written once and of the table read once
  of copy     share of the rate of a device-to-device copy of q and k, measured beside it
"""
    )
    if unusable:
        print("THE GPU CANNOT BE USED; on the CPU ", end="")
    print("all checks passed" if passed else "A CHECK FAILED")
    return 0 if passed and not unusable else 1


def _cupy_and_faults() -> tuple[Any, list[Fault]]:
    """Return CuPy, None where it cannot be imported, and what keeps kernels from a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what they say
        try:
            cupy = environment.import_cupy()
        except ImportError as error:
            return None, [error.args[0]]
        faults = [_fault(cupy.cuda.runtime.getDeviceCount), _fault(cupy.cuda.nvrtc.getVersion)]
        if not any(faults):
            faults.append(_fault(lambda: _rotate_one_pair(cupy)))
    return cupy, [fault for fault in faults if fault]


def _fault(check: Callable[[], Any]) -> Fault | None:
    """Return what is wrong where a check fails."""
    try:
        with environment.explained():
            check()
    except RuntimeError as error:
        known = [fault for fault in error.args if isinstance(fault, Fault)]
        return known[0] if known else Fault(str(error).partition("\n")[0], "nvidia-smi")
    return None


def _gpu_is_there() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _rotate_one_pair(cupy: Any) -> None:
    x = cupy.empty((1, 1, 2), "float32")
    apply_rotary(x, (x[0, :, :1], x[0, :, 1:]))


def _package() -> list[tuple[str, str]]:
    """Return whose files run, and where others lie that a reader may take for them."""
    found = environment.installed()
    lines = [("package", f"{__version__}, the {found}")]
    if found.unused:
        unused = f"the installed wheel in {found.unused}, which runs in any other folder"
        lines.append(("also", unused))
    return lines


def _environment(cupy: Any, faults: list[Fault]) -> list[tuple[str, str]]:
    if faults:
        lines = [("device", f"GPU not used: CPU path, NumPy {np.__version__}")]
        if not _gpu_is_there():
            path = f"no GPU: CPU path, NumPy {np.__version__}; what follows is for a GPU"
            lines = [("device", path)]
        lines += _said("why", *faults)
    else:
        lines = [("GPU", _gpu(cupy))]
    driver = environment.driver()
    if driver:
        lines.append(("driver", environment.cuda_name(driver)))
    if cupy:
        lines.append(("CuPy", f"{cupy.__version__} for CUDA {environment.cupy_cuda()}"))
        lines += _said("warning", environment.packages_fault())
        lines += _nvrtc(faults)
        uncached = environment.cache_fault()
        lines += _said("warning", uncached) or [("cache", environment.cache_folder())]
    return [*lines, *_package(), ("kernels", str(jit.sources()))]


def _said(label: str, *faults: Fault | None) -> list[tuple[str, str]]:
    """Return two lines of the table for each fault."""
    pairs = [((label, fault.wrong), ("fix", fault.command)) for fault in faults if fault]
    return [line for pair in pairs for line in pair]


def _gpu(cupy: Any) -> str:
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return (
        f"{device['name'].decode()}, {device['multiProcessorCount']} multiprocessors, "
        f"{device['totalGlobalMem'] / 2**30:.0f} GiB, compute capability "
        f"{device['major']}.{device['minor']}"
    )


def _nvrtc(faults: list[Fault]) -> list[tuple[str, str]]:
    """Return which NVRTC is loaded, whose it is, its file, and what it does not fit."""
    try:
        found = environment.nvrtc()
    except RuntimeError:
        return [("NVRTC", "none can be loaded")]
    lines = [("NVRTC", str(found).removeprefix("NVRTC "))]
    if found.file:
        lines.append(("library", str(found.file)))
    fault = environment.nvrtc_fault(found)
    return lines if fault in faults else [*lines, *_said("warning", fault)]


def _rotate_and_time(model: Model, cupy: Any) -> Report:
    num_tokens = model.num_tokens if cupy else model.num_tokens_on_cpu
    rng = np.random.default_rng(0)
    words = [
        _bfloat16_words(rng.standard_normal((1, num_tokens, heads, HEAD_DIM)))
        for heads in (model.q_heads, model.k_heads)
    ]
    inv_freq = inverse_frequencies(HEAD_DIM, model.base)
    module = cupy or np
    q_and_k = [module.array(part) for part in words]
    table = RotaryTable.from_inverse_frequencies(inv_freq, num_tokens, like=q_and_k[0])

    def rotate(q: Any, k: Any) -> None:
        tensors = Bfloat16(q), Bfloat16(k)
        apply_rotary_qk(*tensors, table, interleaved=model.interleaved, out=tensors)

    rotate(*q_and_k)
    rotated = [part.get() if cupy else part for part in q_and_k]
    cos, sin = cos_sin(inv_freq, num_tokens)
    accuracy = _accuracy(words, rotated, cos + 1j * sin.astype(np.float64), model.interleaved)

    moved = 2 * sum(part.nbytes for part in words)
    copy_rate = None
    if cupy:
        # Over three times the L2 and more in turn, so that no call finds its data in the cache.
        l2_bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["l2CacheSize"]
        flat_words = np.concatenate([part.ravel() for part in words])
        flat, *copies = (cupy.array(flat_words) for _ in range(2 + 6 * l2_bytes // moved))
        sets = [_views(copy, q_and_k) for copy in copies]
        seconds = _seconds_on_gpu(rotate, sets, cupy)
        copy_seconds = _seconds_on_gpu(
            lambda source: cupy.copyto(flat, source), [[copy] for copy in copies], cupy
        )
        copy_rate = moved / copy_seconds
    else:
        seconds = _seconds_on_cpu(rotate, q_and_k)
    return Report(num_tokens, accuracy, seconds, moved + cos.nbytes + sin.nbytes, copy_rate)


def _views(flat: Any, like: list[Any]) -> list[Any]:
    """See one buffer as the arrays of `like`, one behind the other."""
    ends = np.cumsum([0, *(part.size for part in like)])
    return [
        flat[begin:end].reshape(part.shape)
        for begin, end, part in zip(ends, ends[1:], like, strict=False)
    ]


def _seconds_on_gpu(call: Callable[..., Any], sets: list[list[Any]], cupy: Any) -> float:
    """Return the median time of a call, from replays of a CUDA graph of at least 20 of them."""
    calls = max(20, len(sets))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for arrays in sets:
            call(*arrays)
        stream.begin_capture()
        for i in range(calls):
            call(*sets[i % len(sets)])
        graph = stream.end_capture()
        graph.launch()
        times = []
        for _ in range(20):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls)
    return float(np.median(times))


def _seconds_on_cpu(call: Callable[..., Any], arrays: list[Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call(*arrays)
        times.append(time.perf_counter() - start)
    return min(times)


def _accuracy(
    words: list[NDArray[np.uint16]],
    rotated: list[NDArray[np.uint16]],
    turns: NDArray[np.complex128],
    interleaved: bool,
) -> Accuracy:
    """Compare with complex multiplication: a pair is a complex number and its turn another."""
    square_error, square_norm, num_right, count, worst = 0.0, 0.0, 0, 0, 0.0
    for before, after in zip(words, rotated, strict=True):
        exact = _pairs(_numbers(before), interleaved) * turns[:, None]
        actual = _pairs(_numbers(after), interleaved)
        for wanted, got in ((exact.real, actual.real), (exact.imag, actual.imag)):
            ulp = np.ldexp(1.0, np.frexp(wanted)[1] - 8)  # bfloat16 keeps 8 bits
            off = np.abs(got - np.rint(wanted / ulp) * ulp) / ulp
            square_error += float(np.square(got - wanted).sum())
            square_norm += float(np.square(wanted).sum())
            num_right += int((off == 0).sum())
            count += off.size
            worst = max(worst, float(off.max()))
    return Accuracy((square_error / square_norm) ** 0.5, num_right / count, worst)


def _pairs(x: NDArray[np.float64], interleaved: bool) -> NDArray[np.complex128]:
    if interleaved:
        return x[..., 0::2] + 1j * x[..., 1::2]
    return x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]


def _bfloat16_words(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _numbers(words: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.0f}" if rate >= 1e11 else f"{rate / 1e9:.2g}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _run() -> int:
    parser = ArgumentParser(
        prog="python -m rope_cupy", description=(__doc__ or "").partition(": ")[2]
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    summary = (config_report.__doc__ or "").partition(": ")[2].partition("\n")[0]
    config_report.add_arguments(commands.add_parser("table", help=summary, description=summary))
    version = f"rope_cupy {__version__}, the {environment.installed()}"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args()
    if options.command:
        return config_report.main(options)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as head has read enough
        config_report.close_stdout()
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(_run())
