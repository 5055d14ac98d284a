// Pairs: how the two elements of a pair are rotated.
#pragma once

#include "angles.cuh"

// The number, rounded to another type.
template <typename To, typename Real>
__device__ __forceinline__ Real rounded(Real value) {
  return widen<Real>(narrow<To>(value));
}

// The numbers in another type. kTwice: from double to 16 bits they are rounded twice, as by
// PyTorch.
template <bool kTwice, typename T, typename Real, int kSize>
__device__ __forceinline__ Vec<T, kSize> narrow_by(const Numbers<Real, kSize>& numbers) {
  if constexpr (kTwice && sizeof(T) == 2) {
    return narrow<T>(widen<float>(narrow<float>(numbers)));
  } else {
    return narrow<T>(numbers);
  }
}

// Rotate every pair by its angle; the conjugate rotates back, which is the gradient too. Where each
// element has an angle of its own, (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b), and the
// conjugate is the transpose of that.
//
// Product is the type to which every product is rounded, and then their sum. With void, the result
// is as exact as if it were rounded once. kComplex: one of the two products is rounded, as PyTorch
// does it on a GPU with complex numbers.
template <bool kInterleaved, bool kConjugate, typename Product, bool kComplex, typename Real,
          int kPairs, int kAngles>
__device__ __forceinline__ Numbers<Real, 2 * kPairs> rotate(
    Numbers<Real, 2 * kPairs> numbers, const Angles<Real, kPairs, kAngles>& angles) {
  constexpr int kSecond = kAngles == 2 ? kPairs : 0;  // from a pair's first angle to its second
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    Real& first = numbers.values[kInterleaved ? 2 * i : i];
    Real& second = numbers.values[kInterleaved ? 2 * i + 1 : i + kPairs];
    const Real x = first, y = second;
    const Real cos = angles.cos[i], second_cos = angles.cos[i + kSecond];
    const Real sin = kConjugate ? negate(angles.sin[i + kSecond]) : angles.sin[i];
    Real second_sin = sin;
    if constexpr (kAngles == 2) {
      second_sin = kConjugate ? negate(angles.sin[i]) : angles.sin[i + kSecond];
    }
    if constexpr (kIsVoid<Product>) {
      first = difference_of_products(x, cos, y, sin);
      second = difference_of_products(y, second_cos, negate(x), second_sin);
    } else if constexpr (kComplex) {
      first = multiply_add(x, cos, negate(multiply(y, sin)));
      second = multiply_add(x, sin, multiply(y, cos));
    } else {
      const auto product = [](Real a, Real b) { return rounded<Product>(multiply(a, b)); };
      first = subtract(product(x, cos), product(y, sin));
      second = add(product(y, second_cos), product(x, second_sin));
    }
  }
  return numbers;
}
