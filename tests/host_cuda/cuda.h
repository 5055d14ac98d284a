// CUDA's words for a host C++ compiler, with CUDA's meaning: enough to build kernels/ as they stand.
//
// launch.cpp runs the threads of a block one at a time, in an order drawn at random. A thread that
// waits for others gives way to them, so barriers and shuffles do what they do on a GPU. What CUDA
// leaves undefined is an error: a barrier that some threads never reach, a shuffle by a lane that
// its mask leaves out or from one that does not take part.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct Dim3 {
  unsigned x, y, z;
};

extern Dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float sqrtf(float a) { return __builtin_sqrtf(a); }
inline double sqrt(double a) { return __builtin_sqrt(a); }

inline void sincospi(double x, double* sin, double* cos) {
  const long double angle = 3.14159265358979323846264338327950288L * x;
  *sin = static_cast<double>(__builtin_sinl(angle));
  *cos = static_cast<double>(__builtin_cosl(angle));
}

namespace host {
int lane();
void wait_for_block();
void wait_for_warp(unsigned mask, const char* what);
// Wait for the lanes of the mask, then read what `source` gave.
unsigned long long exchange(unsigned mask, unsigned long long bits, int source, const char* what);
unsigned ballot(unsigned mask, bool vote, const char* what);

// A lane whose source lies beyond its segment of the warp keeps its own value.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool beyond, const char* what) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, beyond ? lane() : source, what);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline int segment(int width) { return lane() / width * width; }
}  // namespace host

inline void __syncthreads() { host::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { host::wait_for_warp(mask, "__syncwarp"); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return host::ballot(mask, predicate != 0, "__ballot_sync");
}

inline int __any_sync(unsigned mask, int predicate) {
  return host::ballot(mask, predicate != 0, "__any_sync") != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return host::ballot(mask, predicate == 0, "__all_sync") == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  source = host::segment(width) + (source & (width - 1));
  return host::shuffle(mask, value, source, false, "__shfl_sync");
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int source = host::lane() ^ lanes;  // an earlier segment may be read, a later one not
  return host::shuffle(mask, value, source, source >= host::segment(width) + width,
                       "__shfl_xor_sync");
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int source = host::lane() - lanes;
  return host::shuffle(mask, value, source, source < host::segment(width), "__shfl_up_sync");
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int source = host::lane() + lanes;
  return host::shuffle(mask, value, source, source >= host::segment(width) + width,
                       "__shfl_down_sync");
}
