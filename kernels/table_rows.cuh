// Rows of a table: where the angles of a thread's pairs lie in it.
#pragma once

#include "angles.cuh"

// Where the angles of a thread's pairs lie: in the row of its token or, with positions, in row 0.
template <typename Table>
struct TableRun {
  const Table* cos;
  Access cos_access;
  const Table* sin;
  Access sin_access;
};

// The angles in one row of the table.
template <typename Form, bool kInterleaved, bool kCommon, int kPairs, typename Real, typename Args,
          typename Table>
__device__ __forceinline__ Angles<Real, kPairs, Form::kAngles> angles_of_row(
    const Args& args, const TableRun<Table>& run, long long row, int num_pairs) {
  long long cos_offset, sin_offset;
  if constexpr (kCommon) {
    cos_offset = multiply_add(static_cast<int>(row), static_cast<int>(args.cos_row), 0);
    sin_offset = cos_offset;
  } else {
    cos_offset = row * args.cos_row;
    sin_offset = row * args.sin_row;
  }
  return Form::template load_angles<kInterleaved, kPairs, Real>(
      args, run.cos + cos_offset, run.cos_access, run.sin + sin_offset, run.sin_access, num_pairs);
}
