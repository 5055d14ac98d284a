// Normalise every head of q and k (or of one tensor), rotate a slice of it by the angles of its
// token's position, or normalise it then, and write it: to a tensor of its own or, of k, with v
// beside it, to a cache, or to both.
//
//   x, out      (outer, middle, inner, head_dim)   T      strided; a tensor's out may be its x; a
//                                                         third tensor is copied
//   cos, sin    (..., num_pairs) or more           Table  strided; of a Form: see angles.cuh. With
//                                                         frequencies cos holds these, and sin the
//                                                         double that scales sines and cosines.
//                                                         With NoTable there are none
//   positions   (outer, middle, inner)             Position  see positions.cuh; void where every
//                                                         token has a row of its own in the table
//   weights, biases                                Norm   see norm.cuh
//   slots                                          Destination  see destinations.cuh
//
// outer, middle and inner are the batch, token and head axes in the order that the host found best.
// A row is one head of one token. A row group is kRows rows of one token, num_heads / kRows heads
// apart, for which a thread loads the angles once: of one tensor or, where each head has angles of
// its own, of two that the launch takes for one, whose steps are the distances between them. The
// blocks of q and k are interleaved: every period has blocks of q and then blocks of k, in the
// proportion of their heads, so that both tensors come to a token at about the same time.
//
// Grid   blockIdx.x  = blockDim.y row groups       blockIdx.y  = blockDim.x lanes
// Block  threadIdx.y = row group                   threadIdx.x = lane
// Lane   kPairs neighbouring pairs of every row. The lanes behind these copy kCopyWidth elements
//        each from outside the slice.
#include "arguments.cuh"
#include "launch_bounds.cuh"
#include "pairs.cuh"
#include "pdl.cuh"
#include "table_rows.cuh"

template <typename T, int kSize>
__device__ __forceinline__ Vec<T, kSize> nans() {
  Numbers<float, kSize> numbers;
#pragma unroll
  for (int i = 0; i < kSize; ++i) numbers.values[i] = bit_cast<float>(0x7fc00000u);
  return narrow<T>(numbers);
}

// kEager: every product and every sum is rounded as PyTorch's operations round them one by one: to
// T where cosines and sines are of this type, else to the type that is computed in.
//
// kCommon: every access is whole, an output of T has the strides of its input, sin has those of
// cos, the table has no heads, and strides fit 32 bits. Dense tensors fulfil this, and their
// kernels have the fewest instructions. Products of strides stay 64-bit.
//
// kInPlace: an output is its input.
//
// kPastL1: x and out are not kept in L1, which is left to the table.
//
// kMembers: how many launches, each over tensors and a table of its own, are run as one.
template <typename T, typename Table, typename Position, typename Norm, typename Destination,
          int kTensors, bool kInterleaved, bool kConjugate, bool kEager, int kRows, int kPairs,
          typename Form, int kCopyWidth, bool kInPlace, bool kPastL1, bool kCommon, int kMembers>
__global__ void __launch_bounds__(
    Norm::kMostThreads,
    fewest_blocks<T, Table, Position, Norm, Form::kAngles, kRows, kPairs, kCopyWidth, kCommon>())
    rotary_kernel(const __grid_constant__
                      Given<Arguments<T, Table, Form, Norm, Destination, kTensors>, kMembers>
                          given) {
  using Real = Compute<T, Table>;
  using Positions = PositionsOf<Position>;
  using Product =
      typename Conditional<kEager, typename Conditional<kIsSame<T, Table>, T, Real>::Type,
                           void>::Type;
  constexpr bool kComplex = kEager && Form::kIsComplex;

  const auto of_launch = block_of_launch(given);
  const auto& args = of_launch.args;
  const BlockOfTensor block = block_of_tensor(args, of_launch.number);
  const int which = block.tensor;
  const Tensor& tensor = args.tensors[which];
  const unsigned row_groups_of_block =
      Norm::kPerToken ? static_cast<unsigned>(tensor.inner.value) : blockDim.y;
  const unsigned row_group = block.number * row_groups_of_block + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (row_group >= static_cast<unsigned>(tensor.num_row_groups) ||
      lane >= static_cast<int>(args.num_lanes)) {
    return;
  }
  if (Norm::kPerToken && threadIdx.y >= row_groups_of_block) return;

  const Coordinates at = tensor.coordinates(row_group);
  const Access x_access = tensor.x.template access<T, kCommon>();
  Access out_access = tensor.out.template access<T, kCommon>();
  const long long x_offset = tensor.x.template offset<kCommon>(at);
  const long long out_offset = kInPlace || (kCommon && !Destination::kScatters)
                                   ? x_offset
                                   : tensor.out.template offset<kCommon>(at);
  T* out_slice = static_cast<T*>(args.out[which]) + out_offset;
  const T* x_slice = kInPlace ? out_slice : args.x[which] + x_offset;
  long long out_step = kInPlace ? tensor.x_step : tensor.out_step;
  const int num_pairs = static_cast<int>(args.num_pairs);

  const int pair = lane * kPairs;
  const T* x_run = x_slice + run_of<kInterleaved>(pair) * x_access.stride;
  T* out_run = out_slice + run_of<kInterleaved>(pair) * out_access.stride;

  const Access cos_access = args.cos.template access<Table, kCommon>();
  const Access sin_access = args.sin.template access<Table, kCommon>();
  const int to_pair = Form::template offset_of<kInterleaved>(pair);
  TableRun<Table> table_run = {args.cos_data + to_pair * cos_access.stride, cos_access,
                               args.sin_data + to_pair * sin_access.stride, sin_access};
  [[maybe_unused]] const typename Positions::Index* position_of_row = nullptr;
  [[maybe_unused]] int token = 0;
  if constexpr (Positions::kAxes == 0) {
    const Coordinates in_table = kCommon ? at : args.in_table(at, which);
    const long long cos_offset = args.cos.template offset<kCommon>(in_table);
    table_run.cos += cos_offset;
    table_run.sin += kCommon ? cos_offset : args.sin.template offset<kCommon>(in_table);
  } else {
    position_of_row = static_cast<const typename Positions::Index*>(args.positions) +
                      args.position.template offset<kCommon>(at);
    if constexpr (Positions::kCountsTokens) {
      token = static_cast<int>(args.token.template offset<kCommon>(at));
    }
  }
  [[maybe_unused]] const typename Destination::Index* slot_of_row = nullptr;
  [[maybe_unused]] bool has_slot = true;
  if constexpr (Destination::kScatters) {
    const long long slot_offset = args.slot.template offset<kCommon>(at);
    slot_of_row = args.slots + slot_offset;
    has_slot = slot_offset < args.end_of_slots;
  }

  if (address_barrier(x_run, table_run.cos, table_run.sin, position_of_row, slot_of_row)) return;
  wait_for_earlier_grids();
  let_later_grids_start();

  using Element = typename Destination::template ElementOf<T>;
  constexpr bool kScales = !kIsSame<Element, T>;
  // Whether a thread may write T and Element: each to a place of its own.
  constexpr bool kHasBoth = kScales || Destination::kKeepsK;
  [[maybe_unused]] const bool keeps = Destination::kKeepsK && which == 1;
  [[maybe_unused]] bool is_cached = false;
  [[maybe_unused]] Element* cache_slice = nullptr;
  [[maybe_unused]] Element* cache_run = nullptr;
  [[maybe_unused]] const Access cache_access = out_access;
  [[maybe_unused]] const long long cache_step = out_step;
  [[maybe_unused]] float scale = 1, reciprocal_scale = 1;
  if constexpr (Destination::kScatters) {
    if (which > 0) {
      const typename Destination::template Arguments<Real>& cache = args;
      const long long given_slot = has_slot ? *slot_of_row : -1;
      is_cached = static_cast<unsigned long long>(given_slot) <
                  static_cast<unsigned long long>(cache.num_slots);
      if (!is_cached && !keeps) return;
      const long long slot = is_cached ? given_slot : 0;
      const unsigned block_of_slot = cache.block_size.divide(static_cast<unsigned>(slot));
      const long long place = slot - block_of_slot * cache.block_size.value;
      cache_slice = static_cast<Element*>(args.out[which]) + out_offset +
                    block_of_slot * cache.block[which - 1] + place * cache.place[which - 1];
      cache_run = cache_slice + run_of<kInterleaved>(pair) * cache_access.stride;
      if constexpr (kScales) {
        scale = Destination::template scale_of<Real>(cache, which - 1);
        reciprocal_scale = reciprocal(scale);
      }
      if constexpr (!kHasBoth) {
        out_slice = cache_slice;
        out_run = cache_run;
      } else if constexpr (Destination::kKeepsK) {
        out_access = cache.k_out.template access<T, kCommon>();
        out_step = cache.k_step;
        out_slice = static_cast<T*>(cache.k_data) + cache.k_out.template offset<kCommon>(at);
        out_run = out_slice + run_of<kInterleaved>(pair) * out_access.stride;
      }
    }
  }

  // The lanes behind those that rotate copy elements from outside the slice.
  const int copy_lane = lane - static_cast<int>(args.num_pair_lanes);
  const bool copies = kIsSame<Form, NoTable> || (kCopyWidth > 0 && copy_lane >= 0);
  int element = copy_lane * kCopyWidth - static_cast<int>(args.rotary_offset);
  if (element >= 0) element += 2 * num_pairs;
  constexpr int kCopied = kCopyWidth ? kCopyWidth : 1;
  [[maybe_unused]] Vec<T, kCopied> copied[kRows];
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

  if (copies) {
    if constexpr (kCopyWidth > 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T* from = x_slice + i * tensor.x_step + element * x_access.stride;
        copied[i] = load<kCopyWidth>(from, x_access);
      }
    }
  } else {
    // A search for the token's sequence has more registers before the tensors are loaded.
    if constexpr (Positions::kSearches) {
      if (of_launch.rotates) read_positions();
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pairs[i] =
          load_pairs<kInterleaved, kPairs, kPastL1>(x_run + i * tensor.x_step, x_access, num_pairs);
    }
  }

  // A row's pairs, or the elements that a lane copies of it, are written from numbers that were
  // computed, or as they were loaded.
  const auto write_pairs = [&](int i, const Numbers<Real, 2 * kPairs>& numbers) {
    if constexpr (kHasBoth) {
      if (is_cached) {
        store_pairs<kInterleaved, kPairs, kPastL1>(
            cache_run + i * cache_step, cache_access, num_pairs,
            for_cache<kEager, T, Element>(numbers, scale, reciprocal_scale));
        if (!keeps) return;
      }
    }
    store_pairs<kInterleaved, kPairs, kPastL1>(out_run + i * out_step, out_access, num_pairs,
                                               narrow_by<kEager, T>(numbers));
  };
  const auto copy_pairs = [&](int i, const Vec<T, 2 * kPairs>& run) {
    if constexpr (kHasBoth) {
      if (is_cached) {
        store_pairs<kInterleaved, kPairs, kPastL1>(
            cache_run + i * cache_step, cache_access, num_pairs,
            copied_to_cache<Real, Element>(run, scale, reciprocal_scale));
        if (!keeps) return;
      }
    }
    store_pairs<kInterleaved, kPairs, kPastL1>(out_run + i * out_step, out_access, num_pairs, run);
  };
  [[maybe_unused]] const auto write_elements = [&](int i, const Numbers<Real, kCopied>& numbers) {
    if constexpr (kHasBoth) {
      if (is_cached) {
        store(cache_slice + i * cache_step + element * cache_access.stride, cache_access,
              for_cache<kEager, T, Element>(numbers, scale, reciprocal_scale));
        if (!keeps) return;
      }
    }
    store(out_slice + i * out_step + element * out_access.stride, out_access,
          narrow_by<kEager, T>(numbers));
  };
  [[maybe_unused]] const auto copy_elements = [&](int i) {
    if constexpr (kHasBoth) {
      if (is_cached) {
        store(cache_slice + i * cache_step + element * cache_access.stride, cache_access,
              copied_to_cache<Real, Element>(copied[i], scale, reciprocal_scale));
        if (!keeps) return;
      }
    }
    store(out_slice + i * out_step + element * out_access.stride, out_access, copied[i]);
  };
  if (kTensors > 2 && which == 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (copies) {
        copy_elements(i);
      } else {
        copy_pairs(i, pairs[i]);
      }
    }
    return;
  }

  // The angles of the lane's pairs, at positions that the table holds.
  [[maybe_unused]] const auto find_angles = [&] {
    if constexpr (Positions::kAxes == 0) {
      return Form::template load_angles<kInterleaved, kPairs, Real>(
          args, table_run.cos, table_run.cos_access, table_run.sin, table_run.sin_access,
          num_pairs);
    } else {
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
        return angles_at<Real, kPairs>(
            load<kPairs>(table_run.cos, table_run.cos_access), narrow<Real>(scale),
            [&](int i) { return position_of(kIsInterleavedMrope<Position> ? pair + i : pair); });
      } else {
        const auto row_angles = [&](long long row) {
          return angles_of_row<Form, kInterleaved, kCommon, kPairs, Real>(args, table_run, row,
                                                                          num_pairs);
        };
        if constexpr (kIsInterleavedMrope<Position>) {
          auto angles = row_angles(position[0]);
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
          return angles;
        } else {
          return row_angles(position_of(pair));
        }
      }
    }
  };

  // A norm is that of the pairs as they were loaded, or as they have been rotated.
  using Rotated = typename Conditional<Norm::kRounds, T, Real>::Type;
  [[maybe_unused]] Vec<Rotated, 2 * kPairs> rotated[kRows];
  if constexpr (Norm::kIsAfter) {
    if (!copies) {
      if constexpr (kAxes > 0 && !Positions::kSearches) {
        if (of_launch.rotates) read_positions();
      }
      if (of_launch.rotates && is_inside) {
        const auto angles = find_angles();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const auto numbers =
              rotate<kInterleaved, kConjugate, Product, kComplex>(widen<Real>(pairs[i]), angles);
          if constexpr (kEager && !Norm::kRounds) {  // sums are rounded as products are
            rotated[i] = narrow<Rotated>(widen<Real>(narrow<Product>(numbers)));
          } else {
            rotated[i] = narrow_by<kEager, Rotated>(numbers);
          }
        }
      } else {
        const bool keeps = !of_launch.rotates || args.keep_out_of_range;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          rotated[i] = keeps ? narrow<Rotated>(widen<Real>(pairs[i])) : nans<Rotated, 2 * kPairs>();
        }
      }
    }
  }
  [[maybe_unused]] const auto normal_pairs = [&](int i) {
    if constexpr (Norm::kIsAfter) {
      return rotated[i];
    } else {
      return pairs[i];
    }
  };

  // A norm of whole tokens waits at a barrier, past which no load moves: what is read for the
  // rotation is asked for before. Angles at a position are not, for they would wait for it.
  constexpr bool kAsksFirst = Norm::kPerToken && !Norm::kIsAfter;
  constexpr bool kPositionsFirst = kAxes > 0 && (kAsksFirst || Positions::kSearches);
  constexpr bool kAnglesFirst = kAxes == 0 && kAsksFirst;
  [[maybe_unused]] decltype(find_angles()) first_angles;
  if (kAsksFirst && of_launch.rotates && !copies) {
    if constexpr (kPositionsFirst && !Positions::kSearches) read_positions();
    if constexpr (kAnglesFirst) first_angles = find_angles();
  }

  // Every lane of a row takes part in its norm. The weights are loaded beside the elements.
  using Weight = typename Norm::Weight;
  constexpr int kWeights = Norm::kPerToken ? kRows : 1;
  [[maybe_unused]] Vec<Weight, 2 * kPairs> pair_weights[kWeights] = {};
  [[maybe_unused]] Vec<Weight, kCopied> copied_weights[kWeights] = {};
  [[maybe_unused]] Vec<Weight, 2 * kPairs> pair_biases = {};
  [[maybe_unused]] Vec<Weight, kCopied> copied_biases = {};
  [[maybe_unused]] Real means[kRows];
  [[maybe_unused]] Real scales[kRows];
  [[maybe_unused]] bool has_weights = false;
  if constexpr (Norm::kEnabled) {
    const auto* weights = static_cast<const Weight*>(args.weights[which]);
    has_weights = weights != nullptr;
    if (has_weights) {
      const Weights& layout = args.layout[which];
      const Access access = layout.template access<Weight, kCommon>();
      weights += (copies ? element : run_of<kInterleaved>(pair)) * access.stride;
      if constexpr (Norm::kPerToken) weights += at.inner * layout.head;
#pragma unroll
      for (int i = 0; i < kWeights; ++i) {
        const Weight* from = weights + i * layout.step;
        if (copies) {
          copied_weights[i] = load<kCopied>(from, access);
        } else {
          pair_weights[i] = load_pairs<kInterleaved, kPairs, false>(from, access, num_pairs);
        }
      }
    }
    if constexpr (Norm::kIsCentred) {
      const auto* biases = static_cast<const Weight*>(args.biases[which]);
      if (biases != nullptr) {
        const Access access = args.bias_layout[which].template access<Weight, kCommon>();
        if (copies) {
          copied_biases = load<kCopied>(biases + element * access.stride, access);
        } else {
          biases += run_of<kInterleaved>(pair) * access.stride;
          pair_biases = load_pairs<kInterleaved, kPairs, false>(biases, access, num_pairs);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        means[i] = copies ? sum_of(widen<Real>(copied[i])) : sum_of(widen<Real>(normal_pairs(i)));
      }
      Norm::find_means(means, args.inverse_count[which].value);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        scales[i] = copies ? sum_of_squares(centred(copied[i], means[i]))
                           : sum_of_squares(centred(normal_pairs(i), means[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        scales[i] = copies ? sum_of_squares(widen<Real>(copied[i]))
                           : sum_of_squares(widen<Real>(normal_pairs(i)));
      }
    }
    find_scales<Norm, kEager>(args, which, row_groups_of_block, scales);
  }
  const auto numbers_of = [&](int i) {
    if constexpr (Norm::kIsCentred) {
      return Norm::template normalised<T>(centred(normal_pairs(i), means[i]), scales[i],
                                          pair_weights[0], has_weights, args.weight_offset.value,
                                          pair_biases);
    } else if constexpr (Norm::kEnabled) {
      return Norm::normalised(normal_pairs(i), scales[i], pair_weights[i % kWeights], has_weights,
                              args.weight_offset.value);
    } else {
      return widen<Real>(pairs[i]);
    }
  };

  if (!copies) {
    if constexpr (Norm::kIsAfter) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) write_pairs(i, numbers_of(i));
    } else {
      if (!of_launch.rotates) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if constexpr (Norm::kEnabled) {
            write_pairs(i, numbers_of(i));
          } else {
            copy_pairs(i, pairs[i]);
          }
        }
        return;
      }
      if constexpr (kAxes > 0) {
        if constexpr (!kPositionsFirst) read_positions();
        if (!is_inside) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (Norm::kEnabled && args.keep_out_of_range) {
              write_pairs(i, numbers_of(i));
            } else {
              copy_pairs(i, args.keep_out_of_range ? pairs[i] : nans<T, 2 * kPairs>());
            }
          }
          return;
        }
      }
      const auto angles = [&] {
        if constexpr (kAnglesFirst) {
          return first_angles;
        } else {
          return find_angles();
        }
      }();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        write_pairs(i, rotate<kInterleaved, kConjugate, Product, kComplex>(numbers_of(i), angles));
      }
    }
  }

  if constexpr (kCopyWidth > 0) {
    if (copies) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if constexpr (Norm::kIsCentred) {
          write_elements(i, Norm::template normalised<T>(centred(copied[i], means[i]), scales[i],
                                                         copied_weights[0], has_weights,
                                                         args.weight_offset.value, copied_biases));
        } else if constexpr (Norm::kEnabled) {
          write_elements(i, Norm::normalised(copied[i], scales[i], copied_weights[i % kWeights],
                                             has_weights, args.weight_offset.value));
        } else {
          copy_elements(i);
        }
      }
    }
  }
}
