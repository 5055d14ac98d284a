"""Tests marked gpu or host_cuda are skipped where they cannot run, and counted; a summary of all.

A module that imports a package of the extra `test` which is not installed is skipped as a whole.

In tests marked host_cuda the kernels' sources, run on the CPU, take the place of the NumPy path.
With ROPE_CUPY_FIGURES naming a folder, the accuracy is also appended to figures.jsonl there.
"""

from __future__ import annotations

import gc
import json
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterator
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import host_cuda
import pytest
from reference import FORMATS, Error

from rope_cupy import cpu

# JAX would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def why_no_gpu() -> str | None:
    """What keeps the tests from a GPU, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no reason to stay away
            from cupy.cuda import runtime
        return None if runtime.getDeviceCount() else "CUDA finds no device"
    except ModuleNotFoundError:
        return "CuPy is not installed"
    except Exception as error:  # no driver, an old one, a library that does not load, ...
        return (str(error).splitlines() or [type(error).__name__])[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-calls",
        type=int,
        default=200,
        help="how many calls test_properties.py draws for each way to a result (200)",
    )
    parser.addoption(
        "--exact-allocations",
        action="store_true",
        help="give each array on a GPU memory of its own, so that compute-sanitizer knows its ends",
    )


def packages_that_tests_use() -> set[str]:
    """The packages of the extra `test` beside pytest, each of which may be missing."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    extra = setup["options.extras_require"]["test"]
    return set(re.findall(r"^\w+", extra, re.MULTILINE)) - {"pytest"}


class ModulesWithoutTheirPackages:
    """Skips them, tests and doctests alike, in this folder and beside it."""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        missing = re.findall(
            r"^E +ModuleNotFoundError: No module named '(\w+)", report.longreprtext, re.MULTILINE
        )
        if report.failed and missing:
            name = missing[-1]
            if name in packages_that_tests_use() and find_spec(name) is None:
                report.outcome = "skipped"
                report.longrepr = str(collector.path), 0, f"Skipped: {NOT_INSTALLED.format(name)}"
        return report


NOT_INSTALLED = "{} is not installed"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ModulesWithoutTheirPackages())
    if config.getoption("exact_allocations"):
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        cupy = pytest.importorskip("cupy")
        cupy.cuda.set_allocator(None)


WHY_NOT = {"gpu": why_no_gpu, "host_cuda": host_cuda.why_not}
SKIPPED = {"gpu": "no GPU here", "host_cuda": "no kernels on the CPU here"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, why_not in WHY_NOT.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        why = why_not() if marked else None
        for item in marked if why else []:
            item.add_marker(pytest.mark.skip(reason=f"{SKIPPED[name]} ({why})"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep Python's collector from all that is imported and collected, for it goes on living.

    PyTorch's compiler makes so many objects that it comes for the few that can be freed too often.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(
    request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> Iterator[None]:
    """Run the kernels' sources instead of NumPy in tests marked host_cuda."""
    if not request.node.get_closest_marker("host_cuda"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "rotate", host_cuda.rotate)
        patch.setattr(cpu, "rotate_all", host_cuda.rotate_all)
        patch.setattr(host_cuda, "launched", launched := [])
        record_property("launched", launched)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a test marked host_cuda that has passed without running a kernel."""
    result = yield
    if pyfuncitem.get_closest_marker("host_cuda"):
        launched, none = host_cuda.launched, pyfuncitem.get_closest_marker("launches_nothing")
        if none and launched:
            pytest.fail(f"a test marked launches_nothing has launched {launched[0]}")
        if not none and not launched:
            pytest.fail("a test marked host_cuda has launched no kernel")
    return result


@pytest.fixture
def record(
    request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> Callable[..., None]:
    """Keep for the summary how far results were from the exact ones: record(kind, *errors).

    The kind is a dtype, and after a comma what else tells these results from others.
    """
    places = {"gpu": "GPU", "host_cuda": "CPU, by the kernels"}
    device = next(
        (places[mark.name] for mark in request.node.iter_markers() if mark.name in places), "CPU"
    )

    def keep(dtype: str, *errors: Error) -> None:
        for error in errors:
            record_property("accuracy", [device, dtype, *error])

    return keep


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    # Every worker of pytest-xdist sends its reports here, with their keywords and properties.
    if hasattr(config, "workerinput"):
        return
    reports = terminalreporter.getreports
    for name, told in SKIPPED.items():
        skipped = [r for r in reports("skipped") if name in getattr(r, "keywords", ())]
        reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped]
        reasons = [reason for reason in reasons if reason.startswith(told)]
        if reasons:
            line = f"{name}: {len(reasons)} tests skipped, {reasons[0]}"
            terminalreporter.write_line(line, yellow=True, bold=True)

    skipped = [r for r in reports("skipped") if isinstance(r, pytest.CollectReport)]
    for name in sorted(packages_that_tests_use()):
        why = f"Skipped: {NOT_INSTALLED.format(name)}"
        files = {report.fspath for report in skipped if report.longrepr[2] == why}
        if files:
            line = f"{name}: {len(files)} files skipped, {NOT_INSTALLED.format('it')}"
            terminalreporter.write_line(line, yellow=True, bold=True)

    launched = [kernel for kernels in recorded(reports("passed"), "launched") for kernel in kernels]
    if launched:
        terminalreporter.write_line(
            f"host_cuda: {len(launched):,} launches of {len(set(launched))} kernels on the CPU, "
            "under AddressSanitizer and UndefinedBehaviorSanitizer"
        )
    largest = max(recorded(reports("passed"), "largest"), default=0)
    if largest:
        terminalreporter.write_line(f"the largest tensor: {largest:,} elements, each compared")
    figures = summed_up(reports("passed") + reports("failed"))
    for figure in figures:
        line = "accuracy on the {device}, {dtype}: worst relative error {relative:.1e}"
        if not figure["dtype"].startswith("float64"):  # whose exact results are float64 themselves
            line += ", {equal:.4%} of {elements:,} elements exact but for one rounding"
            line += ", the worst {ulp} ulp off"
        terminalreporter.write_line(line.format(**figure))
    folder = os.environ.get("ROPE_CUPY_FIGURES")
    if folder and figures:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / "figures.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(figure) + "\n" for figure in figures)


def recorded(reports: list[Any], name: str) -> Iterator[Any]:
    """What the tests' calls recorded under a name."""
    for report in reports:
        for key, value in report.user_properties if report.when == "call" else []:
            if key == name:
                yield value


def summed_up(reports: list[Any]) -> list[dict[str, Any]]:
    """The worst and the sum of what `record` kept, by device and dtype."""
    kept: dict[tuple[str, str], list[Error]] = {}
    for device, dtype, *error in recorded(reports, "accuracy"):
        kept.setdefault((device, dtype), []).append(Error(*error))
    figures = []

    def order(key: tuple[str, str]) -> tuple[str, str, int]:
        dtype, _, rest = key[1].partition(",")
        return key[0], rest, list(FORMATS).index(dtype)

    for device, dtype in sorted(kept, key=order):
        errors = kept[device, dtype]
        elements = sum(error.size for error in errors)
        figure = {
            "device": device,
            "dtype": dtype,
            "relative": max(error.relative for error in errors),
            "equal": 1 - sum(error.unequal for error in errors) / max(elements, 1),
            "elements": elements,
            "ulp": max(error.worst_ulp for error in errors),
        }
        figures.append(figure)
    return figures
