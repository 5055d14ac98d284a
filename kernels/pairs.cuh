// Pairs: which two elements of a head turn together, and the turn itself.
//
//   interleaved   pair i is (slice[2 i], slice[2 i + 1])
//   half          pair i is (slice[i], slice[i + num_pairs])
//
// kPairs neighbouring pairs are a run of 2 kPairs elements: interleaved, as they lie in memory; in
// the half pairing, the first elements of all pairs and then the second ones. Its address is that of
// the first pair's first element.
#pragma once

#include "angles.cuh"

// Elements from a slice to the run of a pair and those behind it, in steps of the access.
template <bool kInterleaved>
__device__ __forceinline__ int run_of(int pair) {
  return kInterleaved ? 2 * pair : pair;
}

template <bool kInterleaved, int kPairs, bool kPastL1, typename T>
__device__ __forceinline__ Vec<T, 2 * kPairs> load_pairs(const T* run, Access access,
                                                         int num_pairs) {
  if constexpr (kInterleaved) {
    return load<2 * kPairs, kPastL1>(run, access);
  } else {
    return join(load<kPairs, kPastL1>(run, access),
                load<kPairs, kPastL1>(run + num_pairs * access.stride, access));
  }
}

template <bool kInterleaved, int kPairs, bool kPastL1, typename T>
__device__ __forceinline__ void store_pairs(T* run, Access access, int num_pairs,
                                            const Vec<T, 2 * kPairs>& pairs) {
  if constexpr (kInterleaved) {
    store<kPastL1>(run, access, pairs);
  } else {
    store<kPastL1>(run, access, half_of<0>(pairs));
    store<kPastL1>(run + num_pairs * access.stride, access, half_of<1>(pairs));
  }
}

// Turn every pair by its angle; the conjugate turns back, which is the gradient too. Rounds once.
template <bool kInterleaved, bool kConjugate, int kPairs, typename Real, typename T>
__device__ __forceinline__ Vec<T, 2 * kPairs> rotate(const Vec<T, 2 * kPairs>& pairs,
                                                     const Angles<Real, kPairs>& angles) {
  auto numbers = widen<Real>(pairs);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    Real& first = numbers.values[kInterleaved ? 2 * i : i];
    Real& second = numbers.values[kInterleaved ? 2 * i + 1 : i + kPairs];
    const Real x = first, y = second;
    const Real cos = angles.cos[i];
    const Real sin = kConjugate ? negate(angles.sin[i]) : angles.sin[i];
    first = difference_of_products(x, cos, y, sin);
    second = difference_of_products(y, cos, negate(x), sin);
  }
  return narrow<T>(numbers);
}
