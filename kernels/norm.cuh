// RMSNorm: elements are divided by the root of the mean of their squares and multiplied by weights.
// LayerNorm: their mean is subtracted first, and biases are added at the end.
//
//   NoNorm                       leaves elements as they are
//   RmsNorm<Weight, 0, ...>      normalises each head, with weights (head_dim,)
//   RmsNorm<Weight, kTokenThreads, ...>
//                                normalises all heads of a token together, with weights
//                                (num_heads * head_dim,), in a block of up to kTokenThreads threads;
//                                if kApart the rows of a thread are of several tensors, of which
//                                each has a norm of its own
//   LayerNorm<Weight, ...>       normalises each head, with weights and biases (head_dim,)
//   AfterRotation<Norm>          normalises what has been rotated, and not what is rotated then
//
// Weight is the type of weights and biases. Without weights all of them are 1, without biases 0.
//
// B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4. J. L. Ba, J.
// R. Kiros and G. E. Hinton, "Layer Normalization" (2016), equation 3.
//
// The threads of a head, or of a token, are neighbours in one block. kSpan of them, a power of two,
// add up their sums by shuffles. kCrossWarp: there are more threads, which add up the spans' sums
// through shared memory. Short spans have many sums, whose roundings are made good: W. Kahan,
// "Further remarks on reducing truncation errors" (1965). Threads without a row have ended before,
// and no thread waits for them.
//
// kRoundings: how often a normalised number is rounded to the tensor's type: never (0), after the
// multiplication by its weight (1), or before it as well (2). Unless it is 0, numbers that have been
// rotated are rounded before they are normalised.
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
  static constexpr bool kIsCentred = false;
  static constexpr bool kIsAfter = false;
  static constexpr bool kPerToken = false;
  static constexpr bool kRounds = false;
  static constexpr int kMostThreads = 640;
};

template <typename Weight_, int kTokenThreads, int kSpan, bool kCrossWarp, int kRoundings,
          bool kApart = false>
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
  static constexpr bool kIsCentred = false;
  static constexpr bool kIsAfter = false;
  static constexpr bool kPerToken = kTokenThreads > 0;
  static constexpr bool kIsOfAllRows = kPerToken && !kApart;
  static constexpr bool kRounds = kRoundings > 0;
  static constexpr int kMostThreads = kPerToken ? kTokenThreads : 512;

  // Replace the sums of each thread by those of all threads of its head, or of its token. These are
  // `num_threads` threads from `first` on.
  template <int kRows, typename Real>
  static __device__ __forceinline__ void add_up(Real (&sums)[kRows], int first, int num_threads) {
    static_assert(kSpan > 0 && kSpan <= 32 && (kSpan & (kSpan - 1)) == 0, "spans halve in a warp");
#pragma unroll
    for (int lanes = kSpan / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sums[i] = add(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], lanes));
      }
    }
    if constexpr (kCrossWarp) {
      __shared__ Real shared[kRows][kMostThreads / kSpan];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        shared[row][(threadIdx.y * blockDim.x + threadIdx.x) / kSpan] = sums[row];
      }
      __syncthreads();
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        Real sum = 0;
        [[maybe_unused]] Real excess = 0;  // of the sum over what has been added to it
        for (int i = 0; i < num_threads / kSpan; ++i) {
          const Real each = shared[row][first / kSpan + i];
          if constexpr (kSpan >= 8) {
            sum = add(sum, each);
          } else {
            const Real rest = subtract(each, excess);
            const Real next = add(sum, rest);
            excess = subtract(subtract(next, sum), rest);
            sum = next;
          }
        }
        sums[row] = sum;
      }
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

// The mean is found first and then the variance around it, both from registers: a sum of squares
// would lose the variance of numbers that are far from 0.
template <typename Weight_, int kSpan, bool kCrossWarp, int kRoundings>
struct LayerNorm : RmsNorm<Weight_, 0, kSpan, kCrossWarp, kRoundings> {
  using Base = RmsNorm<Weight_, 0, kSpan, kCrossWarp, kRoundings>;
  using Weight = Weight_;

  template <typename Real>
  struct Arguments : Base::template Arguments<Real> {
    Weights bias_layout[2];
    const void* biases[2];  // at the rotated slice; null where all are 0
  };

  static constexpr bool kIsCentred = true;

  // Replace the sums of each thread by the means of its rows.
  template <int kRows, typename Real>
  static __device__ __forceinline__ void find_means(Real (&sums)[kRows], Real inverse_count) {
    Base::add_up(sums, threadIdx.y * blockDim.x, blockDim.x);
    if constexpr (kCrossWarp) __syncthreads();  // before shared memory holds other sums
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i] = multiply(sums[i], inverse_count);
  }

  // The numbers of a run, from which the mean has been subtracted, multiplied by a scale and by
  // their weights, plus their biases, which are 0 if there are none.
  template <typename T, int kSize, typename Real>
  static __device__ __forceinline__ Numbers<Real, kSize> normalised(
      Numbers<Real, kSize> numbers, Real scale, const Vec<Weight, kSize>& weights, bool has_weights,
      Real offset, const Vec<Weight, kSize>& biases) {
    const auto weight = widen<Real>(weights), bias = widen<Real>(biases);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      Real number = multiply(numbers.values[i], scale);
      if constexpr (kRoundings == 2) number = widen<Real>(narrow<T>(number));
      const Real factor = has_weights ? add(weight.values[i], offset) : static_cast<Real>(1);
      numbers.values[i] = multiply_add(number, factor, bias.values[i]);
    }
    if constexpr (kRoundings > 0) numbers = widen<Real>(narrow<T>(numbers));
    return numbers;
  }
};

template <typename Norm>
struct AfterRotation : Norm {
  static constexpr bool kIsAfter = true;
};

template <typename Real, int kSize>
__device__ __forceinline__ Real sum_of(const Numbers<Real, kSize>& numbers) {
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = add(sum, numbers.values[i]);
  return sum;
}

// The numbers of a run, from which a mean is subtracted.
template <typename T, int kSize, typename Real>
__device__ __forceinline__ Numbers<Real, kSize> centred(const Vec<T, kSize>& run, Real mean) {
  auto numbers = widen<Real>(run);
#pragma unroll
  for (int i = 0; i < kSize; ++i) numbers.values[i] = subtract(numbers.values[i], mean);
  return numbers;
}

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
  if constexpr (Norm::kIsOfAllRows) {
    Real sum[1] = {scales[0]};
#pragma unroll
    for (int i = 1; i < kRows; ++i) sum[0] = add(sum[0], scales[i]);
    Norm::add_up(sum, 0, row_groups_of_block * blockDim.x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) scales[i] = sum[0];
  } else if constexpr (Norm::kPerToken) {
    Norm::add_up(scales, 0, row_groups_of_block * blockDim.x);
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
