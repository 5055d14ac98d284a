// Views: where rows lie in an array. A row is one head of one token, numbered over an outer, a
// middle and an inner axis.
//
// Every field of the argument block is 8 bytes wide, so that nothing lies between two fields.
#pragma once

#include "vec.cuh"

struct Coordinates {
  int outer;
  int middle;
  int inner;
};

// Strides count elements.
struct View {
  long long outer;
  long long middle;
  long long inner;
  long long element;
  long long width;

  template <bool kCommon>
  __device__ __forceinline__ long long offset(const Coordinates& at) const {
    if constexpr (kCommon) {
      const long long rows = multiply_add(at.outer, static_cast<int>(outer), 0);
      return multiply_add(at.inner, static_cast<int>(inner),
                          multiply_add(at.middle, static_cast<int>(middle), rows));
    } else {
      return at.outer * outer + at.middle * middle + at.inner * inner;
    }
  }

  template <typename T, bool kCommon>
  __device__ __forceinline__ Access access() const {
    if constexpr (kCommon) return {1, kWidestAccess<T>};
    return {element, static_cast<int>(width)};
  }
};

// Division of numbers below 2^31: Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication" (1994).
struct Divisor {
  long long value;
  long long multiplier;
  long long shift;

  __device__ __forceinline__ unsigned divide(unsigned number) const {
    const auto product =
        static_cast<unsigned long long>(2 * number) * static_cast<unsigned>(multiplier);
    return static_cast<unsigned>(product >> 32) >> static_cast<unsigned>(shift);
  }
};
