// Wide access: one type and two verbs.
//
// A run of kSize elements moves in as few accesses as its address allows. The host finds how many
// elements may move at once, a power of two, from the alignment of the pointer and of every stride;
// where neighbours do not touch it is 1.
#pragma once

#include "numeric.cuh"

constexpr int kAccessBytes = 16;

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kAccessBytes ? sizeof(T) * kSize : kAccessBytes) Vec {
  T values[kSize];
};

struct Access {
  long long stride;  // elements from one neighbour to the next
  int width;         // elements that may move at once
};

template <typename T>
constexpr int kWidestAccess = kAccessBytes / sizeof(T);

// The width at which a run of kSize elements moves whole.
template <typename T, int kSize>
constexpr int kWholeWidth = kSize < kWidestAccess<T> ? kSize : kWidestAccess<T>;

template <int kSize, typename T>
__device__ __forceinline__ Vec<T, kSize> load(const T* address, Access access) {
  static_assert((kSize & (kSize - 1)) == 0, "a run halves down to one element");
  if constexpr (kSize == 1) {
    return {*address};
  } else {
    if (access.width >= kWholeWidth<T, kSize>)
      return *reinterpret_cast<const Vec<T, kSize>*>(address);
    const auto low = load<kSize / 2>(address, access);
    const auto high = load<kSize / 2>(address + kSize / 2 * access.stride, access);
    Vec<T, kSize> run;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      run.values[i] = low.values[i];
      run.values[i + kSize / 2] = high.values[i];
    }
    return run;
  }
}

template <int kSize, typename T>
__device__ __forceinline__ void store(T* address, Access access, const Vec<T, kSize>& run) {
  if constexpr (kSize == 1) {
    *address = run.values[0];
  } else if (access.width >= kWholeWidth<T, kSize>) {
    *reinterpret_cast<Vec<T, kSize>*>(address) = run;
  } else {
    Vec<T, kSize / 2> low, high;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      low.values[i] = run.values[i];
      high.values[i] = run.values[i + kSize / 2];
    }
    store(address, access, low);
    store(address + kSize / 2 * access.stride, access, high);
  }
}
