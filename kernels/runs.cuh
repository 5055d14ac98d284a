// Runs: which two elements of a head are rotated together, and where those of neighbouring pairs
// lie.
//
//   interleaved   pair i is (slice[2 i], slice[2 i + 1])
//   half          pair i is (slice[i], slice[i + num_pairs])
//
// kPairs neighbouring pairs are a run of 2 kPairs elements: interleaved, as they lie in memory; in
// the half pairing, the first elements of all pairs and then the second ones. Its address is that
// of the first pair's first element.
#pragma once

#include "vec.cuh"

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
