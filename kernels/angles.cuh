// Angles: the cosines and sines of neighbouring pairs, read from a table or made of frequencies.
//
//   OneAngle<kStep, kSinOffset>  both elements of a pair are rotated by one angle. The pair owns
//                                kStep elements, of which its cosine is the first. Its sine lies
//                                kSinOffset elements behind it or, if that is 0, in another array
//   ByElement                    each element has an angle of its own, which lies where the element
//                                itself does: cosines in one array, sines in another
//   Matrices<kStep>              a pair is multiplied by [[m00, m01], [m10, m11]]: four neighbours
//                                where kStep is 4, numbers that lie apart where it is 1
//   NoTable                      nothing is rotated: all elements lie outside the slice
//
// A frequency is the angle between two neighbouring positions, in full turns, without its whole
// turns. The product of frequency and position, modulo 2^64, is the angle without its whole turns.
// Integers lose nothing: the product is off by position * 2^-65 turns, which is the error of the
// frequency.
#pragma once

#include "runs.cuh"

// The cosines and sines of kPairs neighbouring pairs: of each pair's first element and, where it
// has an angle of its own, of the second one.
template <typename Real, int kPairs, int kAngles = 1>
struct Angles {
  Real cos[kAngles * kPairs];
  Real sin[kAngles * kPairs];
};

// What a form needs besides addresses and strides.
struct NoArguments {};

template <int kStep, int kSinOffset>
struct OneAngle {
  static_assert(kSinOffset == 0 || kSinOffset < kStep, "sin must lie in the run that holds cos");
  using Arguments = NoArguments;
  static constexpr int kAngles = 1;
  // PyTorch multiplies complex numbers in its own way.
  static constexpr bool kIsComplex = kStep == 2 && kSinOffset == 1;

  // Elements from a row to those of a pair, in steps of the access.
  template <bool kInterleaved>
  static __device__ __forceinline__ int offset_of(int pair) {
    return pair * kStep;
  }

  template <bool kInterleaved, int kPairs, typename Real, typename Table>
  static __device__ __forceinline__ Angles<Real, kPairs> load_angles(const Arguments&,
                                                                     const Table* cos_address,
                                                                     Access cos_access,
                                                                     const Table* sin_address,
                                                                     Access sin_access, int) {
    const auto cos_run = load<kPairs * kStep>(cos_address, cos_access);
    auto sin_run = cos_run;
    if constexpr (kSinOffset == 0) sin_run = load<kPairs * kStep>(sin_address, sin_access);
    const auto cos = widen<Real>(cos_run), sin = widen<Real>(sin_run);
    Angles<Real, kPairs> angles;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles.cos[i] = cos.values[i * kStep];
      angles.sin[i] = sin.values[i * kStep + kSinOffset];
    }
    return angles;
  }
};

struct ByElement {
  using Arguments = NoArguments;
  static constexpr int kAngles = 2;
  static constexpr bool kIsComplex = false;

  template <bool kInterleaved>
  static __device__ __forceinline__ int offset_of(int pair) {
    return run_of<kInterleaved>(pair);
  }

  template <bool kInterleaved, int kPairs, typename Real, typename Table>
  static __device__ __forceinline__ Angles<Real, kPairs, 2> load_angles(
      const Arguments&, const Table* cos_address, Access cos_access, const Table* sin_address,
      Access sin_access, int num_pairs) {
    const auto cos =
        widen<Real>(load_pairs<kInterleaved, kPairs, false>(cos_address, cos_access, num_pairs));
    const auto sin =
        widen<Real>(load_pairs<kInterleaved, kPairs, false>(sin_address, sin_access, num_pairs));
    Angles<Real, kPairs, 2> angles;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int first = kInterleaved ? 2 * i : i;
      const int second = kInterleaved ? 2 * i + 1 : i + kPairs;
      angles.cos[i] = cos.values[first];
      angles.sin[i] = sin.values[first];
      angles.cos[i + kPairs] = cos.values[second];
      angles.sin[i + kPairs] = sin.values[second];
    }
    return angles;
  }
};

// (a, b) becomes (a m00 + b m01, a m10 + b m11).
template <int kStep>
struct Matrices;

template <>
struct Matrices<4> {
  using Arguments = NoArguments;
  static constexpr int kAngles = 2;
  static constexpr bool kIsComplex = false;

  template <bool kInterleaved>
  static __device__ __forceinline__ int offset_of(int pair) {
    return 4 * pair;
  }

  template <bool kInterleaved, int kPairs, typename Real, typename Table>
  static __device__ __forceinline__ Angles<Real, kPairs, 2> load_angles(const Arguments&,
                                                                        const Table* address,
                                                                        Access access, const Table*,
                                                                        Access, int) {
    const auto matrices = widen<Real>(load<4 * kPairs>(address, access));
    Angles<Real, kPairs, 2> angles;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles.cos[i] = matrices.values[4 * i];
      angles.sin[i] = negate(matrices.values[4 * i + 1]);
      angles.sin[i + kPairs] = matrices.values[4 * i + 2];
      angles.cos[i + kPairs] = matrices.values[4 * i + 3];
    }
    return angles;
  }
};

template <>
struct Matrices<1> {
  struct Arguments {
    long long column;  // from the first number of a row to the second
  };
  static constexpr int kAngles = 2;
  static constexpr bool kIsComplex = false;

  template <bool kInterleaved>
  static __device__ __forceinline__ int offset_of(int pair) {
    return pair;
  }

  // The first row of a matrix is at the cosine's address, the second at the sine's.
  template <bool kInterleaved, int kPairs, typename Real, typename Table>
  static __device__ __forceinline__ Angles<Real, kPairs, 2> load_angles(const Arguments& args,
                                                                        const Table* first_row,
                                                                        Access first_access,
                                                                        const Table* second_row,
                                                                        Access second_access, int) {
    const auto m00 = widen<Real>(load<kPairs>(first_row, first_access));
    const auto m01 = widen<Real>(load<kPairs>(first_row + args.column, first_access));
    const auto m10 = widen<Real>(load<kPairs>(second_row, second_access));
    const auto m11 = widen<Real>(load<kPairs>(second_row + args.column, second_access));
    Angles<Real, kPairs, 2> angles;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles.cos[i] = m00.values[i];
      angles.sin[i] = negate(m01.values[i]);
      angles.sin[i + kPairs] = m10.values[i];
      angles.cos[i + kPairs] = m11.values[i];
    }
    return angles;
  }
};

struct NoTable : OneAngle<1, 0> {};

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

// `position_of(i)` is the position of pair i.
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
