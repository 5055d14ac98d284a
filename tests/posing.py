"""A GPU that arrays on the CPU pretend to lie on.

All of a call is as on a GPU, down to what the driver is handed, which is compared with the plan and
with the addresses that the call has; then NumPy solves the problem at these addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forgetting import forget

from rope_cupy import cpu, jit, together
from rope_cupy.arrays import base, dlpack, numpy, torch
from rope_cupy.plan import joint_plan, launch_plan
from rope_cupy.prepared import Prepared

STREAM = 7


class Driver:
    """What a launch asks of CuPy and of CUDA's driver."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.launched: list[tuple[str, list[int], int, int]] = []
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            setDevice=lambda device: None,
            getDeviceCount=lambda: 1,
            streamIsCapturing=lambda stream: False,
        )
        self.cuda = SimpleNamespace(runtime=runtime)

    def kernel(self, name: str, device: int) -> Any:
        """A kernel that has been compiled."""
        self.names.append(name)
        return SimpleNamespace(ptr=len(self.names))

    def launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        """Note a launch: its kernel, sizes, stream and the address of its argument."""
        read = jit._Config.from_address(config)
        at = ctypes.c_void_p.from_address(parameters).value
        self.launched.append((self.names[function - 1], [*read.sizes], read.stream, at or 0))
        return 0


@contextlib.contextmanager
def posing() -> Iterator[list[Prepared]]:
    """Let arrays on the CPU pose as ones of a GPU; gives what has been launched."""
    driver, written = Driver(), []
    write = Prepared.write

    def write_and_compare(self: Prepared, at: tuple[int, ...], position_offset: Any) -> None:
        driver.launched.clear()
        write(self, at, position_offset)
        if self.launcher is None:
            assert not self.problem.num_rows and not driver.launched
            return
        first = position_offset or 0
        if position_offset is not None and self.begins_at_row:
            first = self.first_row(position_offset)
            at = self._moved(at, first)
        pointers, plan = self.pointers(at, first), self.launcher.plan
        expected = plan.argument_block(pointers)
        ((name, sizes, stream, block),) = driver.launched
        assert (name, stream) == (plan.kernel, STREAM)
        assert sizes == [*plan.grid, 1, *plan.block, 1]
        assert ctypes.string_at(block, len(expected)) == expected
        written.append(self)
        cpu.rotate(self.problem, pointers)

    run_together = together.Together.run

    def run_together_and_compare(self: Any, values: Any) -> None:
        driver.launched.clear()
        run_together(self, values)
        pointers = [
            part.pointers(at, first) for part, (at, first) in zip(self.parts, values, strict=True)
        ]
        problems = tuple([part.problem for part in self.parts])
        plan = joint_plan(problems) if len(problems) > 1 else launch_plan(*problems)
        assert plan is not None
        expected = plan.packer.pack(*pointers)
        ((name, sizes, stream, block),) = driver.launched
        assert (name, stream) == (plan.kernel, STREAM)
        assert sizes == [*plan.grid, 1, *plan.block, 1]
        assert ctypes.string_at(block, len(expected)) == expected
        written.extend(self.parts)
        cpu.rotate_all(problems, pointers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together.Together, "run", run_together_and_compare)
        for library in (numpy.NumPy, torch.Torch, dlpack.DLPack):
            patch.setattr(library, "describe", _posing(library.describe))
        for library in (numpy.NumPy, torch.Torch, dlpack.DLPack, dlpack.Bfloat16Library):
            patch.setattr(library, "streams", lambda self: lambda device: STREAM)
        for name, value in {
            "cupy": lambda: driver,
            "_cu_launch_kernel_ex": lambda: driver.launch,
            "kernel": driver.kernel,
            "_starts_early": lambda device: False,
        }.items():
            patch.setattr(jit, name, value)
        patch.setattr(base, "cupy", lambda: driver)
        patch.setattr(dlpack, "_module_of", lambda device: contextlib.nullcontext(np))
        patch.setattr(Prepared, "write", write_and_compare)
        forget()
        yield written
    forget()


def _posing(describe: Any) -> Any:
    def describe_on_a_gpu(self: Any, *arguments: Any) -> Any:
        array = describe(self, *arguments)
        return array._replace(spec=array.spec._replace(device="cuda:0"))

    return describe_on_a_gpu
