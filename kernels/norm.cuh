// RMSNorm: elements are divided by the root of the mean of their squares and multiplied by weights.
//
//   NoNorm                       leaves elements as they are
//   RmsNorm<Weight, 0, ...>      normalises each head, with weights (head_dim,)
//   RmsNorm<Weight, kTokenThreads, ...>
//                                normalises all heads of a token together, with weights
//                                (num_heads * head_dim,), in a block of up to kTokenThreads threads
//
// Weight is the type of the weights. Without weights all of them are 1.
//
// B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
//
// The threads of a head, or of a token, are neighbours in one block. kSpan of them, a power of two,
// add up their sums by shuffles. kCrossWarp: there are more threads, which add up the spans' sums
// through shared memory. Threads without a row have ended before, and no thread waits for them.
//
// kRoundings: how often a normalised number is rounded to the tensor's type: never (0), after the
// multiplication by its weight (1), or before it as well (2).
#pragma once

#include "views.cuh"

// A number in the place of an integer.
template <typename Real>
struct alignas(8) Word {
  Real value;
};

struct Weights {
  long long head;  // from those of one head to those of the next
  long long step;  // from those of one row of a group to those of its next
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
  static constexpr bool kEnabled = false;
  static constexpr bool kPerToken = false;
  static constexpr int kMostThreads = 640;
};

template <typename Weight_, int kTokenThreads, int kSpan, bool kCrossWarp, int kRoundings>
struct RmsNorm {
  template <typename Real>
  struct Arguments {
    Weights layout[2];
    Word<Real> inverse_count[2];  // 1 / the number of elements in a mean
    Word<Real> eps;
    Word<Real> weight_offset;  // is added to weights
    const void* weights[2];    // at the rotated slice of the first head; null where all are 1
  };

  using Weight = Weight_;
  static constexpr bool kEnabled = true;
  static constexpr bool kPerToken = kTokenThreads > 0;
  static constexpr int kMostThreads = kPerToken ? kTokenThreads : 512;

  // Replace the sums of each thread by those of all threads of its head, or of its token. These are
  // `num_threads` threads from `first` on.
  template <int kRows, typename Real>
  static __device__ __forceinline__ void add_up(Real (&sums)[kRows], int first, int num_threads) {
    static_assert(kSpan > 0 && kSpan <= 32 && (kSpan & (kSpan - 1)) == 0, "spans halve in a warp");
    static_assert(kRows == 1 || !kCrossWarp, "shared memory holds one sum of a thread");
#pragma unroll
    for (int lanes = kSpan / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sums[i] = add(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], lanes));
      }
    }
    if constexpr (kCrossWarp) {
      __shared__ Real shared[kMostThreads / kSpan];
      shared[(threadIdx.y * blockDim.x + threadIdx.x) / kSpan] = sums[0];
      __syncthreads();
      Real sum = 0;
      for (int i = 0; i < num_threads / kSpan; ++i) sum = add(sum, shared[first / kSpan + i]);
      sums[0] = sum;
    }
  }

  // The factor of a row's elements. Of a token a thread has many elements: division and root
  // contain branches, across which the compiler does not move other instructions, and so it needs
  // fewer registers.
  //
  // kEager: the factor has the error of PyTorch's own function.
  template <bool kEager, typename Real>
  static __device__ __forceinline__ Real scale_of(Real mean_square) {
    if constexpr (kEager && sizeof(Real) == 4) {
      return estimate_of_reciprocal_square_root(mean_square);
    } else if constexpr (kPerToken) {
      return divide(static_cast<Real>(1), square_root(mean_square));
    } else {
      return reciprocal_square_root(mean_square);
    }
  }

  // The numbers of a run, multiplied by a scale and by their weights, if there are any.
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

// Replace the sums of a thread's squares, one for each row, by the factors of its rows. All lanes
// of a row take part, or all lanes of a token where tokens are normalised.
template <typename Norm, bool kEager, int kRows, typename Args, typename Real>
__device__ __forceinline__ void find_scales(const Args& args, int which,
                                            unsigned row_groups_of_block, Real (&scales)[kRows]) {
  if constexpr (Norm::kPerToken) {
    Real sum[1] = {scales[0]};
#pragma unroll
    for (int i = 1; i < kRows; ++i) sum[0] = add(sum[0], scales[i]);
    Norm::add_up(sum, 0, row_groups_of_block * blockDim.x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) scales[i] = sum[0];
  } else {
    Norm::add_up(scales, threadIdx.y * blockDim.x, blockDim.x);
  }
  const Real inverse_count = args.inverse_count[which].value, eps = args.eps.value;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Real mean_square = kEager ? add(multiply(scales[i], inverse_count), eps)
                                    : multiply_add(scales[i], inverse_count, eps);
    scales[i] = Norm::template scale_of<kEager>(mean_square);
  }
}
