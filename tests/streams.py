"""Streams of CuPy and of PyTorch that can be kept busy, and recorded as graphs."""

from types import SimpleNamespace

import pytest

SPIN = """
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
"""


class Stream:
    """A stream of a library, which waits for no other, with all earlier work done."""

    def __init__(self, library):
        cupy = pytest.importorskip("cupy")
        self.torch = pytest.importorskip("torch") if library == "torch-cuda" else None
        if self.torch:
            self.stream = self.torch.cuda.Stream()
            self.pointer = self.stream.cuda_stream
        else:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.pointer = self.stream.ptr
        self.spin = cupy.RawKernel(SPIN, "spin")
        self.keep_busy(1)
        cupy.cuda.runtime.deviceSynchronize()

    def current(self):
        return self.torch.cuda.stream(self.stream) if self.torch else self.stream

    def keep_busy(self, cycles=400_000_000):
        """Occupy the stream for about a fifth of a second."""
        self.spin((1,), (1,), (cycles,), stream=SimpleNamespace(ptr=self.pointer))

    def is_busy(self):
        return not (self.stream.query() if self.torch else self.stream.done)

    def capture(self, call):
        """Record the work of a call, which is not done now: what does it, and the call's result."""
        if self.torch:
            graph = self.torch.cuda.CUDAGraph()
            with self.torch.cuda.graph(graph, stream=self.stream):
                result = call()
            return graph.replay, result
        with self.stream:
            self.stream.begin_capture()
            try:
                result = call()
            finally:
                graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream), result
