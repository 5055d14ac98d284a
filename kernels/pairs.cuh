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

// The number as it is in another type.
template <typename To, typename Real>
__device__ __forceinline__ Real rounded(Real value) {
  return widen<Real>(narrow<To>(value));
}

// The numbers in another type: twice rounded on the way from double to 16 bits, as PyTorch does it,
// or once.
template <bool kTwice, typename T, typename Real, int kSize>
__device__ __forceinline__ Vec<T, kSize> narrow_by(const Numbers<Real, kSize>& numbers) {
  if constexpr (kTwice && sizeof(T) == 2) {
    return narrow<T>(widen<float>(narrow<float>(numbers)));
  } else {
    return narrow<T>(numbers);
  }
}

// Turn every pair by its angle; the conjugate turns back, which is the gradient too.
//
// Product is the type to which every product is rounded, as is then their sum, or void: then all is
// as exact as one rounding. kComplex: one product of the two is rounded, as those of complex numbers
// are which PyTorch multiplies on a GPU.
template <bool kInterleaved, bool kConjugate, typename Product, bool kComplex, typename Real,
          int kPairs>
__device__ __forceinline__ Numbers<Real, 2 * kPairs> rotate(Numbers<Real, 2 * kPairs> numbers,
                                                            const Angles<Real, kPairs>& angles) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    Real& first = numbers.values[kInterleaved ? 2 * i : i];
    Real& second = numbers.values[kInterleaved ? 2 * i + 1 : i + kPairs];
    const Real x = first, y = second;
    const Real cos = angles.cos[i];
    const Real sin = kConjugate ? negate(angles.sin[i]) : angles.sin[i];
    if constexpr (kIsVoid<Product>) {
      first = difference_of_products(x, cos, y, sin);
      second = difference_of_products(y, cos, negate(x), sin);
    } else if constexpr (kComplex) {
      first = multiply_add(x, cos, negate(multiply(y, sin)));
      second = multiply_add(x, sin, multiply(y, cos));
    } else {
      const auto product = [](Real a, Real b) { return rounded<Product>(multiply(a, b)); };
      first = subtract(product(x, cos), product(y, sin));
      second = add(product(y, cos), product(x, sin));
    }
  }
  return numbers;
}
