// Pairs: which two elements of a head turn together, and the turn itself.
//
//   interleaved   pair i is (slice[2 i], slice[2 i + 1])
//   half          pair i is (slice[i], slice[i + num_pairs])
#pragma once

#include "vec.cuh"

template <typename T, int kPairs>
struct Pairs {
  Vec<T, kPairs> first;
  Vec<T, kPairs> second;
};

template <bool kInterleaved, int kPairs, typename T>
__device__ __forceinline__ Pairs<T, kPairs> load_pairs(const T* slice, Access access, int pair,
                                                       int num_pairs) {
  if constexpr (kInterleaved) {
    const auto run = load<2 * kPairs>(slice + 2 * pair * access.stride, access);
    Pairs<T, kPairs> pairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs.first.values[i] = run.values[2 * i];
      pairs.second.values[i] = run.values[2 * i + 1];
    }
    return pairs;
  } else {
    return {load<kPairs>(slice + pair * access.stride, access),
            load<kPairs>(slice + (pair + num_pairs) * access.stride, access)};
  }
}

template <bool kInterleaved, typename T, int kPairs>
__device__ __forceinline__ void store_pairs(T* slice, Access access, int pair, int num_pairs,
                                            const Pairs<T, kPairs>& pairs) {
  if constexpr (kInterleaved) {
    Vec<T, 2 * kPairs> run;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      run.values[2 * i] = pairs.first.values[i];
      run.values[2 * i + 1] = pairs.second.values[i];
    }
    store(slice + 2 * pair * access.stride, access, run);
  } else {
    store(slice + pair * access.stride, access, pairs.first);
    store(slice + (pair + num_pairs) * access.stride, access, pairs.second);
  }
}

// The cosines and sines of kPairs neighbouring pairs.
template <typename Real, int kPairs>
struct Angles {
  Real cos[kPairs];
  Real sin[kPairs];
};

// Turn every pair by its angle; the conjugate turns back, which is the gradient too. Rounds once.
template <bool kConjugate, typename Real, typename T, int kPairs>
__device__ __forceinline__ Pairs<T, kPairs> rotate(const Pairs<T, kPairs>& pairs,
                                                   const Angles<Real, kPairs>& angles) {
  Pairs<T, kPairs> rotated;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const Real x = widen<Real>(pairs.first.values[i]);
    const Real y = widen<Real>(pairs.second.values[i]);
    const Real cos = angles.cos[i];
    const Real sin = kConjugate ? negate(angles.sin[i]) : angles.sin[i];
    rotated.first.values[i] = narrow<T>(difference_of_products(x, cos, y, sin));
    rotated.second.values[i] = narrow<T>(difference_of_products(y, cos, negate(x), sin));
  }
  return rotated;
}
