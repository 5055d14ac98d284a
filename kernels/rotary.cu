// Normalise every head of q and k (or of one tensor), rotate a slice of it by the angles of its
// token's position, and write it: to a tensor of its own or, of k, with v beside it, to a cache.
//
//   x, out      (outer, middle, inner, head_dim)   T      strided; a tensor's out may be its x; a
//                                                         third tensor is copied
//   cos, sin    (..., num_pairs) or more           Table  strided; of a Form: see angles.cuh; or, of
//                                                         type frequency, what angles are made of,
//                                                         and at sin the double they are scaled by
//   positions   (outer, middle, inner)             Position  see positions.cuh; void where tokens
//                                                         are at their own rows
//   weights                                        Norm   see norm.cuh
//   slots                                          Destination  see destinations.cuh
//
// outer, middle and inner are the batch, token and head axes in the order that the host found best.
// A row is one head of one token. A set is kRows rows of one token, whose angles are loaded once:
// heads that lie num_heads / kRows apart. The blocks come in periods: in each, q has its blocks and
// then k its own, in the proportion of their heads, so that both are at a token at about one time.
//
// Grid   blockIdx.x  = group of blockDim.y sets     blockIdx.y  = group of blockDim.x lanes
// Block  threadIdx.y = set in its group             threadIdx.x = lane in its group
// Lane   kPairs neighbouring pairs of every row; the lanes behind those have kPassRun elements each
//        from outside the slice
#include "destinations.cuh"
#include "pairs.cuh"
#include "pdl.cuh"
#include "positions.cuh"

struct Tensor {
  long long blocks;  // of a period
  long long num_sets;
  Divisor inner;
  Divisor middle;
  View x;
  long long x_step;  // from one row of a set to its next
  View out;
  long long out_step;
};

// What dense tensors need comes first: every line of it is one more to wait for in a short launch.
template <typename T, typename Table, int kTensors>
struct TensorsAndTable {
  const T* x[kTensors];  // at the rotated slice of the first head
  void* out[kTensors];   // of T, but for a cache's Element
  const Table* cos_data;
  const Table* sin_data;
  const void* positions;

  Divisor period;
  long long num_lanes;
  long long num_pairs;
  View cos;
  View position;
  long long num_positions;
  long long cos_row;  // from one position to the next
  Tensor tensors[kTensors];

  View sin;
  long long sin_row;
  long long keep;  // a token out of range stays as it is, else it becomes NaN
  long long rotary_offset;
  long long num_pair_lanes;
  View token;  // of an array that holds the numbers of tokens
  PositionArguments position_arguments;
};

// One base behind the other; one that is empty takes no place.
template <typename T, typename Table, typename Form, typename Norm, typename Destination,
          int kTensors>
struct Arguments : TensorsAndTable<T, Table, kTensors>,
                   Norm::template Arguments<Compute<T, Table>>,
                   Destination::template Arguments<Compute<T, Table>>,
                   Form::Arguments {};

template <typename T, int kSize>
__device__ __forceinline__ Vec<T, kSize> nans() {
  Numbers<float, kSize> numbers;
#pragma unroll
  for (int i = 0; i < kSize; ++i) numbers.values[i] = bit_cast<float>(0x7fc00000u);
  return narrow<T>(numbers);
}

// How many blocks of a multiprocessor the compiler is told of; 0 tell it nothing. No block has more
// than 512 threads, but those of whole tokens.
//
// A norm waits for all of a row, and other threads go on meanwhile: 1,024, or 640 where each has so
// much that it needs more registers. Off the common path it takes as many as it wants.
//
// Eight pairs and their angles fill 24 registers. Where all of them can be asked for at once, 1,280
// threads are enough: else it asks for some of them late, to hold fewer. Where a row is looked for,
// angles are computed, or a pair has two of them, off the common path, 640 are: else it puts a
// register or two into local memory, to hold fewer.
template <typename T, typename Table, typename Position, typename Norm, int kAngles, int kRows,
          int kPairs, int kPassRun, bool kCommon>
__device__ constexpr int fewest_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool kIsNew = true;
#else
  constexpr bool kIsNew = false;
#endif
  if constexpr (Norm::kIsThere) {
    constexpr bool kIsLight = kCommon && !kIsDouble<T, Table> && !kIsFrequency<Table> &&
                              !kIsMixed<Position> && sizeof(typename Norm::Weight) <= 4 &&
                              kPassRun == 0;
    constexpr int kThreads = kRows * 2 * kPairs * sizeof(T) > 80 ? 640 : 1024;
    return kIsNew && kIsLight && Norm::kMostThreads < kThreads ? kThreads / Norm::kMostThreads : 1;
  } else if constexpr (!kIsNew) {
    return 0;
  } else if constexpr (kCommon) {
    return !kIsDouble<T, Table> && kIsVoid<Position> && kPairs >= 8 ? 2 : 0;
  } else {
    using Positions = PositionsOf<Position>;
    constexpr bool kIsDear = kIsFrequency<Table> || kAngles > 1;
    return Positions::kCountsTokens || Positions::kAxes > 1 || kIsDear ? 1 : 0;
  }
}

// kEager: every product and every sum is rounded, to T where cosines and sines are 16-bit numbers of
// this type, as PyTorch's operations do one by one.
//
// kCommon: every access is whole, an output of T has its input's strides, sin has cos's, the table
// has no heads, and strides fit 32 bits. Dense tensors give this, and it takes the fewest
// instructions. The products of strides stay 64-bit.
//
// kInPlace: an output is its input.
//
// kPastL1: x and out pass L1 by, which the table has for itself.
template <typename T, typename Table, typename Position, typename Norm, typename Destination,
          int kTensors, bool kInterleaved, bool kConjugate, bool kEager, int kRows, int kPairs,
          typename Form, int kPassRun, bool kInPlace, bool kPastL1, bool kCommon>
__global__ void __launch_bounds__(
    Norm::kMostThreads,
    fewest_blocks<T, Table, Position, Norm, Form::kAngles, kRows, kPairs, kPassRun, kCommon>())
    rotary_kernel(
        const __grid_constant__ Arguments<T, Table, Form, Norm, Destination, kTensors> args) {
  using Real = Compute<T, Table>;
  using Positions = PositionsOf<Position>;
  using Product =
      typename Conditional<kEager, typename Conditional<kIsSame<T, Table>, T, Real>::Type,
                           void>::Type;
  constexpr bool kComplex = kEager && Form::kIsComplex;

  const unsigned period = args.period.divide(blockIdx.x);
  const int block = blockIdx.x - period * static_cast<unsigned>(args.period.value);
  const int q_blocks = static_cast<int>(args.tensors[0].blocks);
  int which = block >= q_blocks;
  int first_block = which * q_blocks;
  if constexpr (kTensors > 2) {
    const int q_and_k_blocks = q_blocks + static_cast<int>(args.tensors[1].blocks);
    if (block >= q_and_k_blocks) {
      which = 2;
      first_block = q_and_k_blocks;
    }
  }
  const Tensor& tensor = args.tensors[which];
  const unsigned group = period * static_cast<unsigned>(tensor.blocks) + block - first_block;
  const unsigned sets_of_block =
      Norm::kOfToken ? static_cast<unsigned>(tensor.inner.value) : blockDim.y;
  const unsigned set = group * sets_of_block + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (set >= static_cast<unsigned>(tensor.num_sets) || lane >= static_cast<int>(args.num_lanes)) {
    return;
  }
  if (Norm::kOfToken && threadIdx.y >= sets_of_block) return;

  Coordinates at;
  const unsigned outer_and_middle = tensor.inner.divide(set);
  at.inner = set - outer_and_middle * static_cast<unsigned>(tensor.inner.value);
  at.outer = tensor.middle.divide(outer_and_middle);
  at.middle = outer_and_middle - at.outer * static_cast<unsigned>(tensor.middle.value);

  const Access x_access = tensor.x.template access<T, kCommon>();
  const Access out_access = tensor.out.template access<T, kCommon>();
  const long long x_offset = tensor.x.template offset<kCommon>(at);
  const long long out_offset = kInPlace || (kCommon && !Destination::kScatters)
                                   ? x_offset
                                   : tensor.out.template offset<kCommon>(at);
  T* out_slice = static_cast<T*>(args.out[which]) + out_offset;
  const T* x_slice = kInPlace ? out_slice : args.x[which] + x_offset;
  const long long out_step = kInPlace ? tensor.x_step : tensor.out_step;
  const int num_pairs = static_cast<int>(args.num_pairs);

  const int pair = lane * kPairs;
  const T* x_run = x_slice + run_of<kInterleaved>(pair) * x_access.stride;
  T* out_run = out_slice + run_of<kInterleaved>(pair) * out_access.stride;

  const Access cos_access = args.cos.template access<Table, kCommon>();
  const Access sin_access = args.sin.template access<Table, kCommon>();
  const int to_pair = Form::template offset_of<kInterleaved>(pair);
  const Table* cos_run = args.cos_data + to_pair * cos_access.stride;
  const Table* sin_run = args.sin_data + to_pair * sin_access.stride;
  [[maybe_unused]] const typename Positions::Index* position_of_row = nullptr;
  [[maybe_unused]] int token = 0;
  if constexpr (Positions::kAxes == 0) {
    const long long cos_offset = args.cos.template offset<kCommon>(at);
    cos_run += cos_offset;
    sin_run += kCommon ? cos_offset : args.sin.template offset<kCommon>(at);
  } else {
    position_of_row = static_cast<const typename Positions::Index*>(args.positions) +
                      args.position.template offset<kCommon>(at);
    if constexpr (Positions::kCountsTokens) {
      token = static_cast<int>(args.token.template offset<kCommon>(at));
    }
  }
  [[maybe_unused]] const typename Destination::Index* slot_of_row = nullptr;
  if constexpr (Destination::kScatters) {
    slot_of_row = args.slots + args.slot.template offset<kCommon>(at);
  }

  if (any_is_odd(x_run, cos_run, sin_run, position_of_row, slot_of_row)) return;
  wait_for_earlier_grids();
  let_later_grids_start();

  using Element = typename Destination::template ElementOf<T>;
  constexpr bool kScales = !kIsSame<Element, T>;
  [[maybe_unused]] const bool is_cached = Destination::kScatters && which > 0;
  [[maybe_unused]] Element* cache_slice = nullptr;
  [[maybe_unused]] Element* cache_run = nullptr;
  [[maybe_unused]] float scale = 1, reciprocal_scale = 1;
  if constexpr (Destination::kScatters) {
    if (which > 0) {
      const typename Destination::template Arguments<Real>& cache = args;
      const long long slot = *slot_of_row;
      if (static_cast<unsigned long long>(slot) >=
          static_cast<unsigned long long>(cache.num_slots)) {
        return;
      }
      const unsigned block_of_slot = cache.block_size.divide(static_cast<unsigned>(slot));
      const long long place = slot - block_of_slot * cache.block_size.value;
      cache_slice = static_cast<Element*>(args.out[which]) + out_offset +
                    block_of_slot * cache.block[which - 1] + place * cache.place[which - 1];
      cache_run = cache_slice + run_of<kInterleaved>(pair) * out_access.stride;
      if constexpr (kScales) {
        const auto* scale_address = cache.scales[which - 1];
        scale = scale_address == nullptr ? cache.scale[which - 1].value
                                         : narrow<float>(widen<Real>(*scale_address));
        reciprocal_scale = reciprocal(scale);
      } else {
        out_slice = cache_slice;
        out_run = cache_run;
      }
    }
  }

  // Lanes behind those that rotate have elements from outside the slice.
  const int pass_lane = lane - static_cast<int>(args.num_pair_lanes);
  const bool passes = kPassRun > 0 && pass_lane >= 0;
  int element = pass_lane * kPassRun - static_cast<int>(args.rotary_offset);
  if (element >= 0) element += 2 * num_pairs;
  constexpr int kPassed = kPassRun ? kPassRun : 1;
  [[maybe_unused]] Vec<T, kPassed> passed[kRows];
  Vec<T, 2 * kPairs> pairs[kRows];

  constexpr int kAxes = Positions::kAxes;
  [[maybe_unused]] long long position[kAxes ? kAxes : 1];
  [[maybe_unused]] bool is_inside = true;
  [[maybe_unused]] const auto read_positions = [&] {
    if constexpr (kAxes > 0) {
#pragma unroll
      for (int axis = 0; axis < kAxes; ++axis) {
        position[axis] = Positions::read(args.position_arguments, position_of_row, axis, token);
        is_inside &= static_cast<unsigned long long>(position[axis]) <
                     static_cast<unsigned long long>(args.num_positions);
      }
    }
  };

  if (passes) {
    if constexpr (kPassRun > 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T* from = x_slice + i * tensor.x_step + element * x_access.stride;
        passed[i] = load<kPassRun>(from, x_access);
      }
    }
  } else {
    // A search has more registers before the tensors are loaded.
    if constexpr (Positions::kSearches) read_positions();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pairs[i] =
          load_pairs<kInterleaved, kPairs, kPastL1>(x_run + i * tensor.x_step, x_access, num_pairs);
    }
  }

  // A row's pairs, or what a lane passes of it, are written as numbers or as they came.
  const auto write_pairs = [&](int i, const Numbers<Real, 2 * kPairs>& numbers) {
    if constexpr (kScales) {
      if (is_cached) {
        store_pairs<kInterleaved, kPairs, kPastL1>(
            cache_run + i * out_step, out_access, num_pairs,
            scaled<Element>(numbers, scale, reciprocal_scale));
        return;
      }
    }
    store_pairs<kInterleaved, kPairs, kPastL1>(out_run + i * out_step, out_access, num_pairs,
                                               narrow_by<kEager, T>(numbers));
  };
  const auto copy_pairs = [&](int i, const Vec<T, 2 * kPairs>& run) {
    if constexpr (kScales) {
      if (is_cached) return write_pairs(i, widen<Real>(run));
    }
    store_pairs<kInterleaved, kPairs, kPastL1>(out_run + i * out_step, out_access, num_pairs, run);
  };
  const long long to_element = element * out_access.stride;
  [[maybe_unused]] const auto write_passed = [&](int i, const Numbers<Real, kPassed>& numbers) {
    if constexpr (kScales) {
      if (is_cached) {
        store(cache_slice + i * out_step + to_element, out_access,
              scaled<Element>(numbers, scale, reciprocal_scale));
        return;
      }
    }
    store(out_slice + i * out_step + to_element, out_access, narrow_by<kEager, T>(numbers));
  };
  [[maybe_unused]] const auto copy_passed = [&](int i) {
    if constexpr (kScales) {
      if (is_cached) return write_passed(i, widen<Real>(passed[i]));
    }
    store(out_slice + i * out_step + to_element, out_access, passed[i]);
  };
  if (kTensors > 2 && which == 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (passes) {
        copy_passed(i);
      } else {
        copy_pairs(i, pairs[i]);
      }
    }
    return;
  }

  // Every lane of a row takes part in its norm. Weights come beside the rows.
  using Weight = typename Norm::Weight;
  constexpr int kWeights = Norm::kOfToken ? kRows : 1;
  [[maybe_unused]] Vec<Weight, 2 * kPairs> pair_weights[kWeights] = {};
  [[maybe_unused]] Vec<Weight, kPassed> passed_weights[kWeights] = {};
  [[maybe_unused]] Real scales[kRows];
  [[maybe_unused]] bool has_weights = false;
  if constexpr (Norm::kIsThere) {
    const auto* weights = static_cast<const Weight*>(args.weights[which]);
    has_weights = weights != nullptr;
    if (has_weights) {
      const Weights& layout = args.layout[which];
      const Access access = layout.template access<Weight, kCommon>();
      weights += (passes ? element : run_of<kInterleaved>(pair)) * access.stride;
      if constexpr (Norm::kOfToken) weights += at.inner * layout.head;
#pragma unroll
      for (int i = 0; i < kWeights; ++i) {
        const Weight* from = weights + i * layout.step;
        if (passes) {
          passed_weights[i] = load<kPassed>(from, access);
        } else {
          pair_weights[i] = load_pairs<kInterleaved, kPairs, false>(from, access, num_pairs);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scales[i] =
          passes ? sum_of_squares(widen<Real>(passed[i])) : sum_of_squares(widen<Real>(pairs[i]));
    }
    if constexpr (Norm::kOfToken) {
      Real sum[1] = {scales[0]};
#pragma unroll
      for (int i = 1; i < kRows; ++i) sum[0] = add(sum[0], scales[i]);
      Norm::add_up(sum, 0, sets_of_block * blockDim.x);
#pragma unroll
      for (int i = 0; i < kRows; ++i) scales[i] = sum[0];
    } else {
      Norm::add_up(scales, threadIdx.y * blockDim.x, blockDim.x);
    }
    const Real share = args.share[which].value, eps = args.eps.value;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Real mean_square =
          kEager ? add(multiply(scales[i], share), eps) : multiply_add(scales[i], share, eps);
      scales[i] = Norm::template scale_of<kEager>(mean_square);
    }
  }
  const auto numbers_of = [&](int i) {
    if constexpr (Norm::kIsThere) {
      return Norm::normalised(pairs[i], scales[i], pair_weights[i % kWeights], has_weights,
                              args.offset.value);
    } else {
      return widen<Real>(pairs[i]);
    }
  };

  if (!passes) {
    Angles<Real, kPairs, Form::kAngles> angles;
    if constexpr (Positions::kAxes == 0) {
      angles = Form::template load_angles<kInterleaved, kPairs, Real>(
          args, cos_run, cos_access, sin_run, sin_access, num_pairs);
    } else {
      if constexpr (!Positions::kSearches) read_positions();
      if (!is_inside) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (Norm::kIsThere && args.keep) {
            write_pairs(i, numbers_of(i));
          } else {
            copy_pairs(i, args.keep ? pairs[i] : nans<T, 2 * kPairs>());
          }
        }
        return;
      }
      const auto position_of = [&](int of) {
        if constexpr (kAxes == 1) {
          return position[0];
        } else {
          const int axis = Positions::axis_of(args.position_arguments, of);
          return axis == 0 ? position[0] : axis == 1 ? position[1] : position[2];
        }
      };
      if constexpr (kIsFrequency<Table>) {
        const auto scale = bit_cast<double>(*args.sin_data);
        angles = angles_at<Real, kPairs>(
            load<kPairs>(cos_run, cos_access), narrow<Real>(scale),
            [&](int i) { return position_of(kIsMixed<Position> ? pair + i : pair); });
      } else {
        const auto row_angles = [&](long long row) {
          long long cos_offset, sin_offset;
          if constexpr (kCommon) {
            cos_offset = multiply_add(static_cast<int>(row), static_cast<int>(args.cos_row), 0);
            sin_offset = cos_offset;
          } else {
            cos_offset = row * args.cos_row;
            sin_offset = row * args.sin_row;
          }
          return Form::template load_angles<kInterleaved, kPairs, Real>(
              args, cos_run + cos_offset, cos_access, sin_run + sin_offset, sin_access, num_pairs);
        };
        if constexpr (kIsMixed<Position>) {
          angles = row_angles(position[0]);
#pragma unroll
          for (int axis = 1; axis < kAxes; ++axis) {
            const auto others = row_angles(position[axis]);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
              const bool is_of_axis = Positions::axis_of(args.position_arguments, pair + i) == axis;
#pragma unroll
              for (int of = i; of < Form::kAngles * kPairs; of += kPairs) {
                angles.cos[of] = is_of_axis ? others.cos[of] : angles.cos[of];
                angles.sin[of] = is_of_axis ? others.sin[of] : angles.sin[of];
              }
            }
          }
        } else {
          angles = row_angles(position_of(pair));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      write_pairs(i, rotate<kInterleaved, kConjugate, Product, kComplex>(numbers_of(i), angles));
    }
  }

  if constexpr (kPassRun > 0) {
    if (passes) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if constexpr (Norm::kIsThere) {
          write_passed(i, Norm::normalised(passed[i], scales[i], passed_weights[i % kWeights],
                                           has_weights, args.offset.value));
        } else {
          copy_passed(i);
        }
      }
    }
  }
}
