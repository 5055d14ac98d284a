// Programmatic dependent launch, from compute capability 9.0 on: a grid may start while the one
// before it in the stream ends. Where a launch does not ask for this, both functions do nothing.
#pragma once

// A compiler barrier: it is never true, for no element has an odd address, but the compiler does
// not know this. A test of it before the wait makes a thread compute the addresses before it, while
// earlier grids still run. Without the test the compiler moves this arithmetic behind the wait.
template <typename... Elements>
__device__ __forceinline__ bool address_barrier(const Elements*... addresses) {
  return ((reinterpret_cast<unsigned long long>(addresses) | ...) & 1) != 0;
}

// Wait until the grids before this one have ended and what they wrote can be read. Every thread
// calls it before it touches memory, so that a grid has never ended before those it depends on.
__device__ __forceinline__ void wait_for_earlier_grids() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next grid start, which must wait by itself.
__device__ __forceinline__ void let_later_grids_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
