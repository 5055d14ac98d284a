// Rotate a slice of every head of q and k (or of one tensor) by the angles of its token's position.
//
//   x, out      (outer, middle, inner, head_dim)   T      strided; a tensor's out may be its x
//   cos, sin    (..., num_pairs * kTableStep)      Table  strided; a pair owns kTableStep elements
//                                                         and its cos is the first; its sin is
//                                                         kSinOffset behind or, if that is 0, the
//                                                         first of another array; or, of type
//                                                         frequency, what angles are made of, and
//                                                         at sin the double they are scaled by
//   positions   (outer, middle, inner)             Position  see positions.cuh; void where tokens
//                                                         are at their own rows
//
// outer, middle and inner are the batch, token and head axes in the order that the host found best.
// A row is one head of one token. A set is kRows rows of one token, whose angles are loaded once:
// heads that lie num_heads / kRows apart. The blocks come in periods: in each, q has its blocks and
// then k its own, in the proportion of their heads, so that both are at a token at about one time.
//
// Grid   blockIdx.x  = group of blockDim.y sets     blockIdx.y  = group of blockDim.x lanes
// Block  threadIdx.y = set in its group             threadIdx.x = lane in its group
// Lane   kPairs neighbouring pairs of every row; the lanes behind those copy kPassRun elements each
//        from outside the slice
#include "pairs.cuh"
#include "pdl.cuh"
#include "positions.cuh"

struct Coordinates {
  int outer;
  int middle;
  int inner;
};

// Every field of the argument block is 8 bytes wide, so the host packs it as an array of 64-bit
// integers. Strides count elements.
struct View {
  long long outer;
  long long middle;
  long long inner;
  long long element;
  long long width;

  template <bool kCommon>
  __device__ __forceinline__ long long offset(const Coordinates& at) const {
    if constexpr (kCommon) {
      const long long rows = multiply_add(at.outer, static_cast<int>(outer), 0);
      return multiply_add(at.inner, static_cast<int>(inner),
                          multiply_add(at.middle, static_cast<int>(middle), rows));
    } else {
      return at.outer * outer + at.middle * middle + at.inner * inner;
    }
  }

  template <typename T, bool kCommon>
  __device__ __forceinline__ Access access() const {
    if constexpr (kCommon) return {1, kWidestAccess<T>};
    return {element, static_cast<int>(width)};
  }
};

// Division of numbers below 2^31: Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication" (1994).
struct Divisor {
  long long value;
  long long multiplier;
  long long shift;

  __device__ __forceinline__ unsigned divide(unsigned number) const {
    const auto product =
        static_cast<unsigned long long>(2 * number) * static_cast<unsigned>(multiplier);
    return static_cast<unsigned>(product >> 32) >> static_cast<unsigned>(shift);
  }
};

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
template <typename T, typename Table>
struct Arguments {
  const T* x[2];  // at the rotated slice of the first head
  T* out[2];
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
  Tensor tensors[2];

  View sin;
  long long sin_row;
  long long keep;  // a token out of range stays as it is, else it becomes NaN
  long long rotary_offset;
  long long num_pair_lanes;
  View token;  // of an array that holds the numbers of tokens
  PositionArguments position_arguments;
};

template <typename T, int kSize>
__device__ __forceinline__ Vec<T, kSize> nans() {
  Numbers<float, kSize> numbers;
#pragma unroll
  for (int i = 0; i < kSize; ++i) numbers.values[i] = bit_cast<float>(0x7fc00000u);
  return narrow<T>(numbers);
}

// How many blocks of a multiprocessor the compiler is told of; 0 tell it nothing. No block has more
// than 512 threads.
//
// Eight pairs and their angles fill 24 registers. Where all of them can be asked for at once, 1,280
// threads are enough: else it asks for some of them late, to hold fewer. Where a row is looked for
// or angles are computed, off the common path, 640 are: else it puts a register or two into local
// memory, to hold fewer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <typename T, typename Table, typename Position, int kPairs, bool kCommon>
constexpr int kFewestBlocks =
    kCommon ? (!kIsDouble<T, Table> && kIsVoid<Position> && kPairs >= 8 ? 2 : 0)
            : (PositionsOf<Position>::kCountsTokens || PositionsOf<Position>::kAxes > 1 ||
                       kIsFrequency<Table>
                   ? 1
                   : 0);
#else
template <typename T, typename Table, typename Position, int kPairs, bool kCommon>
constexpr int kFewestBlocks = 0;
#endif

// kCommon: every access is whole, an output has its input's strides, sin has cos's, the table has
// no heads, and strides fit 32 bits. Dense tensors give this, and it takes the fewest instructions.
// The products of strides stay 64-bit.
//
// kInPlace: an output is its input.
//
// kPastL1: x and out pass L1 by, which the table has for itself.
template <typename T, typename Table, typename Position, bool kInterleaved, bool kConjugate,
          int kRows, int kPairs, int kTableStep, int kSinOffset, int kPassRun, bool kInPlace,
          bool kPastL1, bool kCommon>
__global__ void __launch_bounds__(640, kFewestBlocks<T, Table, Position, kPairs, kCommon>)
    rotary_kernel(const __grid_constant__ Arguments<T, Table> args) {
  using Real = Compute<T, Table>;
  using Positions = PositionsOf<Position>;

  const unsigned period = args.period.divide(blockIdx.x);
  const int block = blockIdx.x - period * static_cast<unsigned>(args.period.value);
  const int q_blocks = static_cast<int>(args.tensors[0].blocks);
  const int which = block >= q_blocks;
  const Tensor& tensor = args.tensors[which];
  const unsigned group = period * static_cast<unsigned>(tensor.blocks) + block - which * q_blocks;
  const unsigned set = group * blockDim.y + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (set >= static_cast<unsigned>(tensor.num_sets) || lane >= static_cast<int>(args.num_lanes)) {
    return;
  }

  Coordinates at;
  const unsigned outer_and_middle = tensor.inner.divide(set);
  at.inner = set - outer_and_middle * static_cast<unsigned>(tensor.inner.value);
  at.outer = tensor.middle.divide(outer_and_middle);
  at.middle = outer_and_middle - at.outer * static_cast<unsigned>(tensor.middle.value);

  const Access x_access = tensor.x.template access<T, kCommon>();
  const Access out_access = tensor.out.template access<T, kCommon>();
  const long long x_offset = tensor.x.template offset<kCommon>(at);
  const long long out_offset =
      kInPlace || kCommon ? x_offset : tensor.out.template offset<kCommon>(at);
  T* out_slice = args.out[which] + out_offset;
  const T* x_slice = kInPlace ? out_slice : args.x[which] + x_offset;
  const long long out_step = kInPlace ? tensor.x_step : tensor.out_step;
  const int num_pairs = static_cast<int>(args.num_pairs);

  const int pair = lane * kPairs;
  const T* x_run = x_slice + run_of<kInterleaved>(pair) * x_access.stride;
  T* out_run = out_slice + run_of<kInterleaved>(pair) * out_access.stride;

  const Access cos_access = args.cos.template access<Table, kCommon>();
  const Access sin_access = args.sin.template access<Table, kCommon>();
  const Table* cos_run = args.cos_data + pair * kTableStep * cos_access.stride;
  const Table* sin_run = args.sin_data + pair * kTableStep * sin_access.stride;
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

  if (any_is_odd(x_run, cos_run, sin_run, position_of_row)) return;
  wait_for_earlier_grids();
  let_later_grids_start();

  // Lanes that pass elements through load them beside those that rotate, and store at the end.
  const int pass_lane = lane - static_cast<int>(args.num_pair_lanes);
  const bool passes = kPassRun > 0 && pass_lane >= 0;
  int element = pass_lane * kPassRun - static_cast<int>(args.rotary_offset);
  if (element >= 0) element += 2 * num_pairs;
  [[maybe_unused]] Vec<T, kPassRun ? kPassRun : 1> passed[kRows];
  if constexpr (kPassRun > 0) {
    if (passes) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T* from = x_slice + i * tensor.x_step + element * x_access.stride;
        passed[i] = load<kPassRun>(from, x_access);
      }
    }
  }

  if (!passes) {
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
    // A search has more registers before the tensors are loaded.
    if constexpr (Positions::kSearches) read_positions();

    Vec<T, 2 * kPairs> pairs[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pairs[i] =
          load_pairs<kInterleaved, kPairs, kPastL1>(x_run + i * tensor.x_step, x_access, num_pairs);
    }
    const auto store_row = [&](int i, const Vec<T, 2 * kPairs>& run) {
      store_pairs<kInterleaved, kPairs, kPastL1>(out_run + i * out_step, out_access, num_pairs,
                                                 run);
    };

    Angles<Real, kPairs> angles;
    if constexpr (Positions::kAxes == 0) {
      angles = load_angles<Real, kPairs, kTableStep, kSinOffset>(cos_run, cos_access, sin_run,
                                                                 sin_access);
    } else {
      if constexpr (!Positions::kSearches) read_positions();
      if (!is_inside) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) store_row(i, args.keep ? pairs[i] : nans<T, 2 * kPairs>());
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
          return load_angles<Real, kPairs, kTableStep, kSinOffset>(
              cos_run + cos_offset, cos_access, sin_run + sin_offset, sin_access);
        };
        if constexpr (kIsMixed<Position>) {
          angles = row_angles(position[0]);
#pragma unroll
          for (int axis = 1; axis < kAxes; ++axis) {
            const auto others = row_angles(position[axis]);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
              const bool is_of_axis = Positions::axis_of(args.position_arguments, pair + i) == axis;
              angles.cos[i] = is_of_axis ? others.cos[i] : angles.cos[i];
              angles.sin[i] = is_of_axis ? others.sin[i] : angles.sin[i];
            }
          }
        } else {
          angles = row_angles(position_of(pair));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      store_row(i, rotate<kInterleaved, kConjugate, kPairs>(pairs[i], angles));
    }
  }

  if constexpr (kPassRun > 0) {
    if (passes) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        T* to = out_slice + i * out_step + element * out_access.stride;
        store(to, out_access, passed[i]);
      }
    }
  }
}
