// Rotate a slice of every head of q and k (or of one tensor) by the angles of its token's position.
//
//   x, out      (outer, middle, inner, head_dim)   T      strided; a tensor's out may be its x
//   cos, sin    (..., num_pairs * kTableStep)      Table  strided; a pair owns kTableStep elements and reads the first;
//                                                         with kSinOffset > 0 its sin lies that far behind its cos
//   positions   (outer, middle, inner)             int    4 or 8 bytes, strided; none when position_bytes is 0
//
// outer, middle and inner are the batch, token and head axes in the order that the host found best. The heads of the
// two tensors count through: k's first head follows q's last. A row is one head of one token.
//
// Grid   blockIdx.x  = group of blockDim.y rows     blockIdx.y  = group of blockDim.x lanes
// Block  threadIdx.y = row in its group             threadIdx.x = lane in its group
// Lane   kPairs neighbouring pairs; the lanes behind those copy kPassRun elements each from outside the slice
#include "pairs.cuh"

struct Coordinates {
  unsigned outer;
  unsigned middle;
  unsigned inner;
};

// Every field of the argument block is 8 bytes wide, so the host packs it as an array of 64-bit integers.
// Strides count elements.
struct View {
  long long origin;  // where coordinates (0, 0, 0) lie, from the pointer
  long long outer;
  long long middle;
  long long inner;
  long long element;
  long long width;

  __device__ __forceinline__ long long offset(const Coordinates& at) const {
    return origin + at.outer * outer + at.middle * middle + at.inner * inner;
  }

  template <typename T, bool kWide>
  __device__ __forceinline__ Access access() const {
    if constexpr (kWide) return {1, kWidestAccess<T>};
    return {element, static_cast<int>(width)};
  }
};

struct Tensor {
  View x;
  View out;
  View cos;
  View sin;
};

// Division of numbers below 2^31: Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
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
  const Table* cos;
  const Table* sin;
  const void* positions;

  Tensor tensors[2];
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
  const long long index = args.position.offset(at);
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

// kWide: every access of the launch is whole, so none needs a test at run time.
template <typename T, typename Table, bool kInterleaved, bool kConjugate, int kPairs,
          int kTableStep, int kSinOffset, int kPassRun, bool kWide>
__global__ void rotary_kernel(const __grid_constant__ Arguments<T, Table> args) {
  using Real = Compute<T, Table>;

  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= args.num_rows || lane >= args.num_lanes) return;

  Coordinates at;
  const unsigned outer_and_middle = args.inner.divide(row);
  at.inner = row - outer_and_middle * static_cast<unsigned>(args.inner.value);
  at.outer = args.middle.divide(outer_and_middle);
  at.middle = outer_and_middle - at.outer * static_cast<unsigned>(args.middle.value);

  const unsigned head = args.head_axis == 2 ? at.inner : args.head_axis == 1 ? at.middle : at.outer;
  const int which = head >= args.num_q_heads;
  const Tensor& tensor = args.tensors[which];
  const Access x_access = tensor.x.access<T, kWide>();
  const Access out_access = tensor.out.access<T, kWide>();
  const T* x_row = args.x[which] + tensor.x.offset(at);
  T* out_row = args.out[which] + tensor.out.offset(at);

  const long long position = args.position_bytes ? load_position(args, at) : 0;
  const bool in_range = static_cast<unsigned long long>(position) <
                        static_cast<unsigned long long>(args.num_positions);
  const long long table_row = in_range ? position : 0;
  const Table* cos_row = args.cos + tensor.cos.offset(at) + table_row * args.cos_row;
  const Table* sin_row = args.sin + tensor.sin.offset(at) + table_row * args.sin_row;

  const int num_pairs = static_cast<int>(args.num_pairs);
  if constexpr (kPassRun > 0) {
    const int pass_lane = lane - static_cast<int>(args.num_pair_lanes);
    if (pass_lane >= 0) {
      int element = pass_lane * kPassRun;
      if (element >= args.rotary_offset) element += 2 * num_pairs;
      store(out_row + element * out_access.stride, out_access,
            load<kPassRun>(x_row + element * x_access.stride, x_access));
      return;
    }
  }
  const int pair = lane * kPairs;
  const T* x_slice = x_row + args.rotary_offset * x_access.stride;
  T* out_slice = out_row + args.rotary_offset * out_access.stride;
  auto pairs = load_pairs<kInterleaved, kPairs>(x_slice, x_access, pair, num_pairs);
  if (in_range) {
    const auto angles = load_angles<Real, kPairs, kTableStep, kSinOffset>(
        cos_row, tensor.cos.access<Table, kWide>(), sin_row, tensor.sin.access<Table, kWide>(),
        pair);
    pairs = rotate<kConjugate>(pairs, angles);
  } else if (!args.keep) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs.first.values[i] = pairs.second.values[i] = narrow<T>(bit_cast<float>(0x7fc00000u));
    }
  }
  store_pairs<kInterleaved>(out_slice, out_access, pair, num_pairs, pairs);
}
