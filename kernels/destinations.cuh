// Destinations: where the rows of a token are written.
//
//   Outputs                out[batch, token, head]
//   Slots<Index, Element>  of q the same; of k and v, the second and third tensor, the place in a
//                          cache that slots[batch, token] names, an Index: cache[slot / block_size,
//                          slot % block_size, head], of Elements. A slot that the cache does not
//                          hold is that of a token which is left out.
//
// What is written to 8 bits is divided by a scale before.
#pragma once

#include "norm.cuh"

struct Outputs {
  template <typename Real>
  struct Arguments {};

  using Index = void;
  template <typename T>
  using ElementOf = T;
  static constexpr bool kScatters = false;
};

template <typename Index_, typename Element>
struct Slots {
  template <typename Real>
  struct Arguments {
    View slot;  // of the array of slots
    long long num_slots;
    Divisor block_size;
    long long block[2];  // from one block of a cache to the next, of k's and v's
    long long place[2];  // from one place in a block to the next
    Word<float> scale[2];
    const Index_* slots;
    const float* scales[2];  // in memory, or null
  };

  using Index = Index_;
  template <typename T>
  using ElementOf = Element;
  static constexpr bool kScatters = true;
};

// The numbers over a scale, each rounded once, and then to Element, but for scales so small that
// their reciprocal is infinite. P. Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor" (1990), theorem 8.4.
template <typename Element, int kSize, typename Real>
__device__ __forceinline__ Vec<Element, kSize> scaled(const Numbers<Real, kSize>& numbers,
                                                      float scale) {
  const float reciprocal = divide(1.0f, scale);
  Vec<Element, kSize> run;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float number = narrow<float>(numbers.values[i]);
    const float quotient = multiply(number, reciprocal);
    const float rest = multiply_add(negate(quotient), scale, number);
    const float nearest = multiply_add(rest, reciprocal, quotient);
    const bool is_small = -0x1p20f < quotient && quotient < 0x1p20f;  // all others are too large
    run.words[i] = narrow<Element>(is_small ? nearest : quotient);
  }
  return run;
}
