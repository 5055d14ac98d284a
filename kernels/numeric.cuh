// Storage types and their conversions to and from the types that are computed with.
//
// No CUDA header is included, so every install of NVRTC compiles this. The PTX of each conversion
// has a portable twin in integer arithmetic, for older GPUs and for a host compiler that is given
// CUDA's qualifiers. All rounding is to nearest, ties to even.
#pragma once

struct float16 {
  unsigned short bits;
};

struct bfloat16 {
  unsigned short bits;
};

// The elements of caches, which are written here and never read.
struct float8_e4m3fn {
  unsigned char bits;
};

struct float8_e5m2 {
  unsigned char bits;
};

// The element of a table that holds no cosines and sines: see angles.cuh.
struct frequency {
  unsigned long long turns;  // from one position to the next, in units of 2^-64, modulo 1
};

template <bool kCondition, typename A, typename B>
struct Conditional {
  using Type = A;
};

template <typename A, typename B>
struct Conditional<false, A, B> {
  using Type = B;
};

template <typename T>
constexpr bool kIsVoid = false;

template <>
constexpr bool kIsVoid<void> = true;

template <typename A, typename B>
constexpr bool kIsSame = false;

template <typename T>
constexpr bool kIsSame<T, T> = true;

template <typename T>
constexpr bool kIsFrequency = false;

template <>
constexpr bool kIsFrequency<frequency> = true;

// The type to compute in: double when the tensor or the table is 64-bit, else float.
template <typename T, typename Table>
constexpr bool kIsDouble = sizeof(T) == 8 || (sizeof(Table) == 8 && !kIsFrequency<Table>);

template <typename T, typename Table>
using Compute = typename Conditional<kIsDouble<T, Table>, double, float>::Type;

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  union {
    From from;
    To to;
  } bits = {value};
  return bits.to;
}

// CuPy compiles with -ftz=true, under which plain float arithmetic, negation and conversion take
// subnormal numbers for zero. PTX without .ftz keeps them.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float negate(float a) {
  float result;
  asm("neg.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float add(float a, float b) {
  float result;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float subtract(float a, float b) {
  float result;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float multiply(float a, float b) {
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  float result;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

__device__ __forceinline__ float reciprocal(float a) {
  float result;
  asm("rcp.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float divide(float a, float b) {
  float result;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float square_root(float a) {
  float result;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ __forceinline__ float estimate_of_reciprocal_square_root(float a) {
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// No product of doubles is to be rounded together with a sum, unless it is asked for.
__device__ __forceinline__ double multiply(double a, double b) {
  double result;
  asm("mul.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

__device__ __forceinline__ float to_float(double value) {
  float result;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(value));
  return result;
}

__device__ __forceinline__ double to_double(float value) {
  double result;
  asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(value));
  return result;
}
#else
inline float negate(float a) { return -a; }
inline float add(float a, float b) { return a + b; }
inline float subtract(float a, float b) { return a - b; }
inline float multiply(float a, float b) { return a * b; }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float reciprocal(float a) { return 1 / a; }
inline float divide(float a, float b) { return a / b; }
inline float square_root(float a) { return sqrtf(a); }
inline float estimate_of_reciprocal_square_root(float a) { return 1 / sqrtf(a); }
inline double multiply(double a, double b) { return a * b; }
inline float to_float(double value) { return static_cast<float>(value); }
inline double to_double(float value) { return value; }
#endif

__device__ __forceinline__ double negate(double a) { return -a; }
__device__ __forceinline__ double add(double a, double b) { return a + b; }
__device__ __forceinline__ double subtract(double a, double b) { return a - b; }
__device__ __forceinline__ double divide(double a, double b) { return a / b; }
__device__ __forceinline__ double square_root(double a) { return sqrt(a); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// The value if it is finite, else any number.
template <typename Real>
__device__ __forceinline__ Real finite(Real value) {
  constexpr Real kLargest = sizeof(Real) == 8 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
  return -kLargest <= value && value <= kLargest ? value : 0;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
// In one instruction: the smaller magnitude, which NaN has not, with the value's sign.
template <>
__device__ __forceinline__ float finite(float value) {
  float result;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(0x1.fffffep127f));
  return result;
}
#endif

// Within 1 unit in the last place, after a step of Newton's method; 0 of infinity.
__device__ __forceinline__ float reciprocal_square_root(float a) {
  const float estimate = estimate_of_reciprocal_square_root(a);
  const float rest = multiply_add(negate(multiply(a, estimate)), estimate, 1.0f);
  return multiply_add(multiply(0.5f, estimate), finite(rest), estimate);
}

__device__ __forceinline__ double reciprocal_square_root(double a) { return 1 / sqrt(a); }

// Widening is exact.
__device__ __forceinline__ float to_float(bfloat16 value) {
  return bit_cast<float>(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ float to_float(float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const unsigned sign = (value.bits & 0x8000u) << 16;
  const unsigned magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return bit_cast<float>(sign | 0x70000000u | magnitude);
  // A power of two moves the exponent, and makes normal numbers of subnormal ones.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<unsigned>(scaled));
#endif
}

template <typename Real, typename T>
__device__ __forceinline__ Real widen(T value) {
  if constexpr (sizeof(T) == sizeof(Real)) {
    return value;
  } else if constexpr (sizeof(T) == 4) {
    return to_double(value);
  } else {
    return widen<Real>(to_float(value));
  }
}

// Round to odd: what lies between two floats takes the one with an odd last bit, so that a second
// rounding to a 16-bit type gives what one rounding from double would have given.
__device__ __forceinline__ float round_to_odd(double value) {
  const float nearest = to_float(value);
  unsigned bits = bit_cast<unsigned>(nearest);
  const double widened = to_double(nearest);
  if (widened == value || value != value) return nearest;
  if ((widened < 0 ? -widened : widened) > (value < 0 ? -value : value)) bits -= 1;
  return bit_cast<float>(bits | 1u);
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  return static_cast<T>(value);
}

template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const unsigned bits = bit_cast<unsigned>(value);
  if (value != value) return {static_cast<unsigned short>(bits >> 16 | 0x40u)};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
#ifdef __CUDA_ARCH__
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const unsigned sign = bit_cast<unsigned>(value) >> 16 & 0x8000u;
  const unsigned magnitude = bit_cast<unsigned>(value) & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the last place is 2^-24, which is the last place of 0.5f: adding it rounds.
    half = bit_cast<unsigned>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<unsigned short>(sign | half)};
#endif
}

// To the nearest number that is finite, ties to even; kMagic's last place is the format's least
// number above 0.
template <int kMantissaBits, int kBias, unsigned kLargest>
__device__ __forceinline__ unsigned char narrow_to_8_bits(float value) {
  constexpr int kDropped = 23 - kMantissaBits;
  constexpr unsigned kLeastNormal = static_cast<unsigned>(128 - kBias) << 23;
  constexpr unsigned kMagic = static_cast<unsigned>(128 - kBias + kDropped) << 23;
  const unsigned sign = bit_cast<unsigned>(value) >> 24 & 0x80u;
  const unsigned magnitude = bit_cast<unsigned>(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<unsigned char>(0x7fu);  // NaN
  unsigned code;
  if (magnitude < kLeastNormal) {
    code = bit_cast<unsigned>(bit_cast<float>(magnitude) + bit_cast<float>(kMagic)) - kMagic;
  } else {
    const unsigned half = (1u << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1u);
    code = (magnitude + half - (static_cast<unsigned>(127 - kBias) << 23)) >> kDropped;
  }
  return static_cast<unsigned char>(sign | (code < kLargest ? code : kLargest));
}

template <>
__device__ __forceinline__ float8_e4m3fn narrow<float8_e4m3fn>(float value) {
  return {narrow_to_8_bits<3, 7, 0x7eu>(value)};
}

template <>
__device__ __forceinline__ float8_e5m2 narrow<float8_e5m2>(float value) {
  return {narrow_to_8_bits<2, 15, 0x7bu>(value)};
}

template <typename T>
__device__ __forceinline__ T narrow(double value) {
  if constexpr (sizeof(T) <= 2) {
    return narrow<T>(round_to_odd(value));
  } else if constexpr (sizeof(T) == 4) {
    return to_float(value);
  } else {
    return value;
  }
}

// Two neighbours of 16 bits share a word, the first in its low half, and are converted together.
__device__ __forceinline__ unsigned word_of(unsigned short first, unsigned short second) {
  return first | static_cast<unsigned>(second) << 16;
}

struct Two {
  float first;
  float second;
};

template <typename T>
__device__ __forceinline__ Two widen_two(unsigned word);

template <>
__device__ __forceinline__ Two widen_two<bfloat16>(unsigned word) {
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
}

template <>
__device__ __forceinline__ Two widen_two<float16>(unsigned word) {
  return {to_float(float16{static_cast<unsigned short>(word)}),
          to_float(float16{static_cast<unsigned short>(word >> 16)})};
}

template <typename T, typename Real>
__device__ __forceinline__ unsigned narrow_two(Real first, Real second) {
  return word_of(narrow<T>(first).bits, narrow<T>(second).bits);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ unsigned narrow_two<bfloat16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <>
__device__ __forceinline__ unsigned narrow_two<float16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
#endif

// Two neighbours of 8 bits, the first in the low half.
template <typename T>
__device__ __forceinline__ unsigned short narrow_two_to_8_bits(float first, float second) {
  return static_cast<unsigned short>(narrow<T>(first).bits | narrow<T>(second).bits << 8);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
template <>
__device__ __forceinline__ unsigned short narrow_two_to_8_bits<float8_e4m3fn>(float first,
                                                                              float second) {
  unsigned short two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(second), "f"(first));
  return two;
}

template <>
__device__ __forceinline__ unsigned short narrow_two_to_8_bits<float8_e5m2>(float first,
                                                                            float second) {
  unsigned short two;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(two) : "f"(second), "f"(first));
  return two;
}
#endif

// The value, or what has its sign and the most magnitude that is wanted; NaN stays.
__device__ __forceinline__ float clamped(float value, float most) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  float result;
  asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(most));
  return result;
#else
  return value > most ? most : value < -most ? -most : value;
#endif
}

// a * b + c in 64 bits, of factors that take 32.
__device__ __forceinline__ long long multiply_add(int a, int b, long long c) {
#ifdef __CUDA_ARCH__
  long long result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(c));
  return result;
#else
  return static_cast<long long>(a) * b + c;
#endif
}

// a * b - c * d within 1.5 units in the last place, also where the products cancel: Kahan's
// algorithm, analysed in Jeannerod, Louvet and Muller, "Further analysis of Kahan's algorithm for
// the accurate computation of 2 x 2 determinants", Mathematics of Computation 82 (2013).
template <typename Real>
__device__ __forceinline__ Real difference_of_products(Real a, Real b, Real c, Real d) {
  const Real product = multiply(c, d);
  const Real residual = multiply_add(c, d, negate(product));
  const Real difference = multiply_add(a, b, negate(product));
  // Beside a product that is not finite the difference is not finite either, and stays as it is
  // whatever number is subtracted. A residual of 0 keeps a -0.
  return subtract(difference, finite(residual));
}
