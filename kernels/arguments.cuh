// Arguments: the one argument of the kernel, and the numbering of blocks and rows that it
// describes.
//
// rope_cupy/arguments.py has the same structs with the same fields, and packs them.
#pragma once

#include "angles.cuh"
#include "destinations.cuh"
#include "positions.cuh"

struct Tensor {
  long long blocks;  // of a period
  long long num_row_groups;
  Divisor inner;
  Divisor middle;
  View x;
  long long x_step;  // from one row of a group to its next
  View out;
  long long out_step;

  __device__ __forceinline__ Coordinates coordinates(unsigned row_group) const {
    Coordinates at;
    const unsigned outer_and_middle = inner.divide(row_group);
    at.inner = row_group - outer_and_middle * static_cast<unsigned>(inner.value);
    at.outer = middle.divide(outer_and_middle);
    at.middle = outer_and_middle - at.outer * static_cast<unsigned>(middle.value);
    return at;
  }
};

// What dense tensors need comes first: a short launch waits for every line of the block that it
// reads.
template <typename T, typename Table, int kTensors>
struct TensorsAndTable {
  const T* x[kTensors];  // at the rotated slice of the first head
  void* out[kTensors];   // of T or, in a cache, of Element
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
  long long keep_out_of_range;  // a token out of range stays as it is, or else becomes NaN
  long long rotary_offset;
  long long num_pair_lanes;
  View token;  // of an array that would hold the index of every token
  PositionArguments position_arguments;
  long long head_axis;            // of coordinates: 0, 1 or 2
  Divisor table_heads[kTensors];  // of a tensor, to those that one head of the table stands for

  // Where the table has the angles of a row of a tensor.
  __device__ __forceinline__ Coordinates in_table(Coordinates at, int tensor) const {
    const Divisor& heads = table_heads[tensor];
    if (heads.value > 1) {
      const int head = heads.divide(head_axis == 0   ? at.outer
                                    : head_axis == 1 ? at.middle
                                                     : at.inner);
      at.outer = head_axis == 0 ? head : at.outer;
      at.middle = head_axis == 1 ? head : at.middle;
      at.inner = head_axis == 2 ? head : at.inner;
    }
    return at;
  }
};

// The bases lie one behind the other. An empty base takes no place.
template <typename T, typename Table, typename Form, typename Norm, typename Destination,
          int kTensors>
struct Arguments : TensorsAndTable<T, Table, kTensors>,
                   Norm::template Arguments<Compute<T, Table>>,
                   Destination::template Arguments<Compute<T, Table>>,
                   Form::Arguments {};

// What several launches of one kernel are given that are run as one. The blocks of each follow on
// those of the one before.
template <typename Arguments, int kMembers>
struct Joint {
  Arguments members[kMembers];
  long long first_blocks[kMembers];
  long long rotates[kMembers];  // whether it has a table
};

template <typename Arguments, int kMembers>
using Given = typename Conditional<kMembers == 1, Arguments, Joint<Arguments, kMembers>>::Type;

// The launch that a block is of, and the number of the block among all blocks of this launch.
template <typename Arguments>
struct BlockOfLaunch {
  const Arguments& args;
  unsigned number;
  bool rotates;
};

template <typename Arguments>
__device__ __forceinline__ BlockOfLaunch<Arguments> block_of_launch(const Arguments& given) {
  return {given, blockIdx.x, true};
}

template <typename Arguments, int kMembers>
__device__ __forceinline__ BlockOfLaunch<Arguments> block_of_launch(
    const Joint<Arguments, kMembers>& given) {
  int which = 0;
#pragma unroll
  for (int i = 1; i < kMembers; ++i) {
    which += blockIdx.x >= static_cast<unsigned>(given.first_blocks[i]);
  }
  return {given.members[which], blockIdx.x - static_cast<unsigned>(given.first_blocks[which]),
          given.rotates[which] != 0};
}

// The tensor whose rows a block has, and the number of the block among all blocks of this tensor.
struct BlockOfTensor {
  int tensor;
  unsigned number;
};

template <typename T, typename Table, int kTensors>
__device__ __forceinline__ BlockOfTensor
block_of_tensor(const TensorsAndTable<T, Table, kTensors>& args, unsigned block_of_launch) {
  const unsigned period = args.period.divide(block_of_launch);
  const int block = block_of_launch - period * static_cast<unsigned>(args.period.value);
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
  const unsigned blocks = static_cast<unsigned>(args.tensors[which].blocks);
  return {which, period * blocks + block - first_block};
}
