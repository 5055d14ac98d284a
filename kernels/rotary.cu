// Rotate a slice of every head of q and k (or of one tensor) by the angles of its token's position.
//
//   x, out      (outer, middle, inner, head_dim)   T      strided; a tensor's out may be its x
//   cos, sin    (..., num_pairs * kTableStep)      Table  strided; a pair owns kTableStep elements
//                                                         and its cos is the first; its sin is
//                                                         kSinOffset behind or, if that is 0, the
//                                                         first of another array
//   positions   (outer, middle, inner)             int    4 or 8 bytes, strided; none when
//                                                         position_bytes is 0
//
// outer, middle and inner are the batch, token and head axes in the order that the host found best.
// The heads of the two tensors count through: k's first follows q's last. A row is one head of one
// token.
//
// Grid   blockIdx.x  = group of blockDim.y rows     blockIdx.y  = group of blockDim.x lanes
// Block  threadIdx.y = row in its group             threadIdx.x = lane in its group
// Lane   kPairs neighbouring pairs; the lanes behind those copy kPassRun elements each from outside
//        the slice
#include "pairs.cuh"

struct Coordinates {
  int outer;
  int middle;
  int inner;
};

// Every field of the argument block is 8 bytes wide, so the host packs it as an array of 64-bit
// integers. Strides count elements.
struct View {
  long long origin;  // where coordinates (0, 0, 0) lie, from the pointer
  long long outer;
  long long middle;
  long long inner;
  long long element;
  long long width;

  template <bool kCommon>
  __device__ __forceinline__ long long offset(const Coordinates& at) const {
    using Stride = typename Conditional<kCommon, int, long long>::Type;
    return origin + static_cast<long long>(at.outer) * static_cast<Stride>(outer) +
           static_cast<long long>(at.middle) * static_cast<Stride>(middle) +
           static_cast<long long>(at.inner) * static_cast<Stride>(inner);
  }

  template <typename T, bool kCommon>
  __device__ __forceinline__ Access access() const {
    if constexpr (kCommon) return {1, kWidestAccess<T>};
    return {element, static_cast<int>(width)};
  }
};

struct Tensor {
  View x;
  View out;
};

// Division of numbers below 2^31: Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication" (1994).
struct Divisor {
  long long value;
  long long multiplier;
  long long shift;

  __device__ __forceinline__ unsigned divide(unsigned number) const {
    return static_cast<unsigned>(static_cast<unsigned long long>(number) *
                                     static_cast<unsigned>(multiplier) >>
                                 static_cast<unsigned>(shift));
  }
};

template <typename T, typename Table>
struct Arguments {
  const T* x[2];
  T* out[2];
  const Table* cos_data;
  const Table* sin_data;
  const void* positions;

  Tensor tensors[2];  // origins lie at the rotated slice
  View cos;
  View sin;
  long long cos_of_k;  // elements from the row of q's first head to that of k's, in a table by head
  long long sin_of_k;

  View position;
  long long position_bytes;
  long long num_positions;
  long long cos_row;  // from one position to the next
  long long sin_row;
  long long keep;  // a token out of range stays as it is, else it becomes NaN

  long long num_rows;
  Divisor inner;
  Divisor middle;
  long long head_axis;  // 0 outer, 1 middle, 2 inner
  long long num_q_heads;

  long long rotary_offset;
  long long num_pairs;
  long long num_pair_lanes;
  long long num_lanes;
};

template <typename T, typename Table>
__device__ __forceinline__ long long load_position(const Arguments<T, Table>& args,
                                                   const Coordinates& at) {
  const long long index = args.position.template offset<false>(at);
  if (args.position_bytes == 8) return static_cast<const long long*>(args.positions)[index];
  return static_cast<const int*>(args.positions)[index];
}

template <typename Real, int kPairs, int kTableStep, int kSinOffset, typename Table>
__device__ __forceinline__ Angles<Real, kPairs> load_angles(const Table* cos_row, Access cos_access,
                                                            const Table* sin_row, Access sin_access,
                                                            int pair) {
  static_assert(kSinOffset == 0 || kSinOffset < kTableStep,
                "sin must lie in the run that holds cos");
  const auto cos_run =
      load<kPairs * kTableStep>(cos_row + pair * kTableStep * cos_access.stride, cos_access);
  auto sin_run = cos_run;
  if constexpr (kSinOffset == 0) {
    sin_run =
        load<kPairs * kTableStep>(sin_row + pair * kTableStep * sin_access.stride, sin_access);
  }
  Angles<Real, kPairs> angles;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    angles.cos[i] = widen<Real>(cos_run.values[i * kTableStep]);
    angles.sin[i] = widen<Real>(sin_run.values[i * kTableStep + kSinOffset]);
  }
  return angles;
}

// kCommon: every access is whole, an output has its input's strides, sin has cos's, the table has
// no heads, and strides fit 32 bits. Dense tensors give this, and it takes the fewest instructions.
// The products of strides stay 64-bit.
template <typename T, typename Table, bool kInterleaved, bool kConjugate, int kPairs,
          int kTableStep, int kSinOffset, int kPassRun, bool kCommon>
__global__ void rotary_kernel(const __grid_constant__ Arguments<T, Table> args) {
  using Real = Compute<T, Table>;

  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= static_cast<int>(args.num_rows) || lane >= static_cast<int>(args.num_lanes)) return;

  Coordinates at;
  const int outer_and_middle = args.inner.divide(row);
  at.inner = row - outer_and_middle * static_cast<int>(args.inner.value);
  at.outer = args.middle.divide(outer_and_middle);
  at.middle = outer_and_middle - at.outer * static_cast<int>(args.middle.value);
  const int head = args.head_axis == 2 ? at.inner : args.head_axis == 1 ? at.middle : at.outer;
  const int which = head >= static_cast<int>(args.num_q_heads);

  const View& x_view = args.tensors[which].x;
  const View& out_view = args.tensors[which].out;
  const Access x_access = x_view.template access<T, kCommon>();
  const Access out_access = out_view.template access<T, kCommon>();
  const long long x_offset = x_view.template offset<kCommon>(at);
  const T* x_slice = args.x[which] + x_offset;
  T* out_slice = args.out[which] + (kCommon ? x_offset : out_view.template offset<kCommon>(at));

  const int num_pairs = static_cast<int>(args.num_pairs);
  if constexpr (kPassRun > 0) {
    const int pass_lane = lane - static_cast<int>(args.num_pair_lanes);
    if (pass_lane >= 0) {
      int element = pass_lane * kPassRun - static_cast<int>(args.rotary_offset);
      if (element >= 0) element += 2 * num_pairs;
      store(out_slice + element * out_access.stride, out_access,
            load<kPassRun>(x_slice + element * x_access.stride, x_access));
      return;
    }
  }
  const int pair = lane * kPairs;
  auto pairs = load_pairs<kInterleaved, kPairs>(x_slice, x_access, pair, num_pairs);

  bool in_range = true;
  long long cos_offset, sin_offset;
  if (args.position_bytes) {
    const long long position = load_position(args, at);
    in_range = static_cast<unsigned long long>(position) <
               static_cast<unsigned long long>(args.num_positions);
    cos_offset = in_range ? position * args.cos_row : 0;
    sin_offset = kCommon ? cos_offset : in_range ? position * args.sin_row : 0;
  } else {
    cos_offset = args.cos.template offset<kCommon>(at) + (kCommon ? 0 : which * args.cos_of_k);
    sin_offset =
        kCommon ? cos_offset : args.sin.template offset<kCommon>(at) + which * args.sin_of_k;
  }
  if (in_range) {
    const auto angles = load_angles<Real, kPairs, kTableStep, kSinOffset>(
        args.cos_data + cos_offset, args.cos.template access<Table, kCommon>(),
        args.sin_data + sin_offset, args.sin.template access<Table, kCommon>(), pair);
    pairs = rotate<kConjugate>(pairs, angles);
  } else if (!args.keep) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs.first.values[i] = pairs.second.values[i] = narrow<T>(bit_cast<float>(0x7fc00000u));
    }
  }
  store_pairs<kInterleaved>(out_slice, out_access, pair, num_pairs, pairs);
}
