// RMSNorm: elements over the root of the mean of their squares, times weights.
//
//   NoNorm                       leaves them as they are
//   RmsNorm<Weight, 0, ...>      of each head, with weights (head_dim,)
//   RmsNorm<Weight, kTokenThreads, ...>  of all heads of a token, with weights (num_heads *
//                                head_dim,), in a block of up to so many threads
//
// Weight is the type of the weights, which may be missing.
//
// B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
//
// The threads that have a head, or a token, are neighbours in one block. kSpan of them, a power of
// two, add up by shuffles what they have; where there are more, kShares, they do so by way of shared
// memory. Threads without a row have ended before, and no one waits for them.
//
// kRoundings: how often what is normalised becomes a number of the tensor's type, once it is weighed
// (1) and before that too (2), or never.
#pragma once

#include "views.cuh"

// A number in the place of an integer.
template <typename Real>
struct alignas(8) Word {
  Real value;
};

struct Weights {
  long long head;  // from those of one head to those of the next
  long long step;  // from those of one row of a set to those of its next
  long long element;
  long long width;

  template <typename T, bool kCommon>
  __device__ __forceinline__ Access access() const {
    if constexpr (kCommon) return {1, kWidestAccess<T>};
    return {element, static_cast<int>(width)};
  }
};

struct NoNorm {
  template <typename Real>
  struct Arguments {};

  using Weight = float;
  static constexpr bool kIsThere = false;
  static constexpr bool kOfToken = false;
  static constexpr int kMostThreads = 640;
};

template <typename Weight_, int kTokenThreads, int kSpan, bool kShares, int kRoundings>
struct RmsNorm {
  template <typename Real>
  struct Arguments {
    Weights layout[2];
    Word<Real> share[2];  // of an element in the mean
    Word<Real> eps;
    Word<Real> offset;       // is added to weights
    const void* weights[2];  // at the rotated slice of the first head; null where all are 1
  };

  using Weight = Weight_;
  static constexpr bool kIsThere = true;
  static constexpr bool kOfToken = kTokenThreads > 0;
  static constexpr int kMostThreads = kOfToken ? kTokenThreads : 512;

  // The sums of what all threads of a head, or of a token, have: `num_threads` from the first on.
  template <int kRows, typename Real>
  static __device__ __forceinline__ void add_up(Real (&sums)[kRows], int first, int num_threads) {
    static_assert(kSpan > 0 && kSpan <= 32 && (kSpan & (kSpan - 1)) == 0, "spans halve in a warp");
    static_assert(kRows == 1 || !kShares, "shared memory holds one sum of a thread");
#pragma unroll
    for (int lanes = kSpan / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sums[i] = add(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], lanes));
      }
    }
    if constexpr (kShares) {
      __shared__ Real shared[kMostThreads / kSpan];
      shared[(threadIdx.y * blockDim.x + threadIdx.x) / kSpan] = sums[0];
      __syncthreads();
      Real sum = 0;
      for (int i = 0; i < num_threads / kSpan; ++i) sum = add(sum, shared[first / kSpan + i]);
      sums[0] = sum;
    }
  }

  // What elements are multiplied by. Of a token a thread has many: where division and root branch,
  // the compiler holds what comes before and what comes behind apart, for which together it has not
  // enough registers.
  //
  // kEager: with the error of PyTorch's own function.
  template <bool kEager, typename Real>
  static __device__ __forceinline__ Real scale_of(Real mean_square) {
    if constexpr (kEager && sizeof(Real) == 4) {
      return estimate_of_reciprocal_square_root(mean_square);
    } else if constexpr (kOfToken) {
      return divide(static_cast<Real>(1), square_root(mean_square));
    } else {
      return reciprocal_square_root(mean_square);
    }
  }

  // The numbers of a run times a scale and, if there are any, their weights.
  template <typename T, int kSize, typename Real>
  static __device__ __forceinline__ Numbers<Real, kSize> normalised(
      const Vec<T, kSize>& run, Real scale, const Vec<Weight, kSize>& weights, bool has_weights,
      Real offset) {
    auto numbers = widen<Real>(run);
    const auto scaled = [&](int i) {
      const Real number = multiply(numbers.values[i], scale);
      return kRoundings == 2 ? widen<Real>(narrow<T>(number)) : number;
    };
    if (has_weights) {
      const auto weight = widen<Real>(weights);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Real factor = add(weight.values[i], offset);
        numbers.values[i] = multiply(scaled(i), factor);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) numbers.values[i] = scaled(i);
    }
    return kRoundings > 0 ? widen<Real>(narrow<T>(numbers)) : numbers;
  }
};

template <typename Real, int kSize>
__device__ __forceinline__ Real sum_of_squares(const Numbers<Real, kSize>& numbers) {
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = multiply_add(numbers.values[i], numbers.values[i], sum);
  return sum;
}
