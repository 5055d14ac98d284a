// Angles: the cosines and sines of neighbouring pairs, read from a table or made of frequencies.
//
// A frequency is what a pair turns by from one position to the next, in turns, without the whole
// ones. Times a position, modulo 2^64, it is what is left of all turns till there, and integers
// lose nothing of it: the product is off by position * 2^-65 turns, which is what the frequency is.
#pragma once

#include "vec.cuh"

// The cosines and sines of kPairs neighbouring pairs.
template <typename Real, int kPairs>
struct Angles {
  Real cos[kPairs];
  Real sin[kPairs];
};

template <typename Real, int kPairs, int kTableStep, int kSinOffset, typename Table>
__device__ __forceinline__ Angles<Real, kPairs> load_angles(const Table* cos_address,
                                                            Access cos_access,
                                                            const Table* sin_address,
                                                            Access sin_access) {
  static_assert(kSinOffset == 0 || kSinOffset < kTableStep,
                "sin must lie in the run that holds cos");
  const auto cos_run = load<kPairs * kTableStep>(cos_address, cos_access);
  auto sin_run = cos_run;
  if constexpr (kSinOffset == 0) sin_run = load<kPairs * kTableStep>(sin_address, sin_access);
  const auto cos = widen<Real>(cos_run), sin = widen<Real>(sin_run);
  Angles<Real, kPairs> angles;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    angles.cos[i] = cos.values[i * kTableStep];
    angles.sin[i] = sin.values[i * kTableStep + kSinOffset];
  }
  return angles;
}

// The cosine and the sine of a part of a turn, in units of 2^-64 turns.
__device__ __forceinline__ void cos_sin(unsigned long long part, double& cos, double& sin) {
  sincospi(static_cast<double>(static_cast<long long>(part)) * 0x1p-63, &sin, &cos);
}

// Within 1e-7. Both are those of the angle from the nearest quarter of a turn, or the other's. The
// polynomials have the least greatest error for an eighth of a turn: E. Y. Remez (1934), 2e-9.
__device__ __forceinline__ void cos_sin(unsigned long long part, float& cos, float& sin) {
  const auto high = static_cast<unsigned>(part >> 32);
  const auto quarter = high + (1u << 29);  // its number is in the two highest bits
  const float x = multiply(static_cast<float>(static_cast<int>(high << 2)), 0x1.921fb6p-32f);
  const float square = multiply(x, x);
  float odd = multiply_add(square, -0x1.98da66p-13f, 0x1.1105b4p-7f);
  odd = multiply_add(square, odd, -0x1.55554p-3f);
  odd = multiply_add(multiply(x, square), odd, x);
  float even = multiply_add(square, 0x1.9a025ap-16f, -0x1.6c0c8cp-10f);
  even = multiply_add(square, even, 0x1.55554ap-5f);
  even = multiply_add(square, even, -0.5f);
  even = multiply_add(square, even, 1.0f);
  const bool is_other = quarter & 1u << 30;
  const unsigned cos_bits = bit_cast<unsigned>(is_other ? odd : even);
  const unsigned sin_bits = bit_cast<unsigned>(is_other ? even : odd);
  cos = bit_cast<float>(cos_bits ^ ((quarter + (1u << 30)) & 1u << 31));
  sin = bit_cast<float>(sin_bits ^ (quarter & 1u << 31));
}

// What `position_of(i)` gives is where pair i is.
template <typename Real, int kPairs, typename PositionOf>
__device__ __forceinline__ Angles<Real, kPairs> angles_at(const Vec<frequency, kPairs>& frequencies,
                                                          Real scale,
                                                          const PositionOf& position_of) {
  Angles<Real, kPairs> angles;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const auto position = static_cast<unsigned long long>(position_of(i));
    cos_sin(position * frequencies.words[i].turns, angles.cos[i], angles.sin[i]);
    angles.cos[i] = multiply(scale, angles.cos[i]);
    angles.sin[i] = multiply(scale, angles.sin[i]);
  }
  return angles;
}
