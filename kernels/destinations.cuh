// Destinations: where the rows of a token are written.
//
//   Outputs                out[batch, token, head]
//   Slots<Index, Element, Scale>
//                          q is written to out; k and v, the second and the third tensor, to
//                          cache[slot / block_size, slot % block_size, head], of Elements, with
//                          slot = slots[batch, token], an Index. A token whose slot the cache
//                          does not hold is left out, and so is one without a slot.
//   SlotsAndK<...>         as Slots, and k is written to a place of its own too, of every token, as
//                          T: such as to k itself
//
// Numbers are divided by a scale before they are rounded to 8 bits. It may lie in memory as a
// Scale.
#pragma once

#include "norm.cuh"
#include "pairs.cuh"

struct Outputs {
  template <typename Real>
  struct Arguments {};

  using Index = void;
  template <typename T>
  using ElementOf = T;
  static constexpr bool kScatters = false;
  static constexpr bool kKeepsK = false;
};

template <typename Index_, typename Element, typename Scale>
struct Slots {
  template <typename Real>
  struct Arguments {
    View slot;  // of the array of slots
    long long num_slots;
    long long end_of_slots;  // the offset in the array of slots from which on tokens have none
    Divisor block_size;
    long long block[2];  // from one block of a cache to the next, of k's and v's
    long long place[2];  // from one place in a block to the next
    Word<float> scale[2];
    const Index_* slots;
    const Scale* scales[2];  // in memory, or null
  };

  using Index = Index_;
  template <typename T>
  using ElementOf = Element;
  static constexpr bool kScatters = true;
  static constexpr bool kKeepsK = false;

  template <typename Real>
  static __device__ __forceinline__ float scale_of(const Arguments<Real>& args, int cache) {
    const auto* address = args.scales[cache];
    return address == nullptr ? args.scale[cache].value : narrow<float>(widen<Real>(*address));
  }
};

template <typename Index, typename Element, typename Scale>
struct SlotsAndK : Slots<Index, Element, Scale> {
  template <typename Real>
  struct Arguments : Slots<Index, Element, Scale>::template Arguments<Real> {
    View k_out;
    long long k_step;  // from one row of a group to its next
    void* k_data;      // of T, at the rotated slice of the first head
  };

  static constexpr bool kKeepsK = true;
};

// The numbers divided by a scale, each rounded once and then to Element, unless the reciprocal of
// the scale is no float. P. Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor" (1990), theorem 8.4. Quotients that are too large for any Element need not
// be right.
template <typename Element, int kSize, typename Real>
__device__ __forceinline__ Vec<Element, kSize> scaled(const Numbers<Real, kSize>& numbers,
                                                      float scale, float reciprocal) {
  const auto over_scale = [&](int i) {
    const float number = narrow<float>(numbers.values[i]);
    const float quotient = clamped(multiply(number, reciprocal), 0x1p20f);
    // The excess is subtracted, for an addition would make +0 of +0 and -0, and -0 must stay.
    const float excess = multiply_add(quotient, scale, negate(number));
    return multiply_add(excess, negate(reciprocal), quotient);
  };
  union {
    Vec<Element, kSize> run;
    unsigned short twos[kSize > 1 ? kSize / 2 : 1];
  } stored;
  if constexpr (kSize == 1) {
    stored.run.words[0] = narrow<Element>(over_scale(0));
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      stored.twos[i / 2] = narrow_two_to_8_bits<Element>(over_scale(i), over_scale(i + 1));
    }
  }
  return stored.run;
}

// What a cache gets: of numbers that were computed, or of a run as it was loaded.
template <bool kEager, typename T, typename Element, int kSize, typename Real>
__device__ __forceinline__ Vec<Element, kSize> for_cache(const Numbers<Real, kSize>& numbers,
                                                         float scale, float reciprocal) {
  if constexpr (kIsSame<Element, T>) {
    return narrow_by<kEager, T>(numbers);
  } else {
    return scaled<Element>(numbers, scale, reciprocal);
  }
}

template <typename Real, typename Element, typename T, int kSize>
__device__ __forceinline__ Vec<Element, kSize> copied_to_cache(const Vec<T, kSize>& run,
                                                               float scale, float reciprocal) {
  if constexpr (kIsSame<Element, T>) {
    return run;
  } else {
    return scaled<Element>(widen<Real>(run), scale, reciprocal);
  }
}
