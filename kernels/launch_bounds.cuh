// Launch bounds: how many blocks a kernel must leave registers for on a multiprocessor.
#pragma once

#include "positions.cuh"

// The number of blocks that the compiler is told of; with 0 it is told nothing. No block has more
// than 512 threads, except blocks of whole tokens.
//
// A thread of a norm waits for all of its row, while others go on: the compiler is told of 1,024
// threads, or of 640 where each needs more registers for its elements. Off the common path it takes
// as many registers as it wants, and so it does where it has biases or rotates before it waits.
//
// Eight pairs and their angles fill 24 registers. On the common path without positions a thread can
// ask for all of them at once, and the compiler is told of 1,280 threads: without this it loads
// some late, to hold fewer registers. Off the common path it is told of 640 where a token's row is
// searched for, angles are computed, or a pair has two angles: without this it spills a register or
// two, to hold fewer.
template <typename T, typename Table, typename Position, typename Norm, int kAngles, int kRows,
          int kPairs, int kCopyWidth, bool kCommon>
__device__ constexpr int fewest_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool kIsNew = true;
#else
  constexpr bool kIsNew = false;
#endif
  if constexpr (Norm::kEnabled) {
    constexpr bool kIsLight = kCommon && !kIsDouble<T, Table> && !kIsFrequency<Table> &&
                              !kIsInterleavedMrope<Position> &&
                              sizeof(typename Norm::Weight) <= 4 && kCopyWidth == 0 &&
                              !Norm::kIsCentred && !Norm::kIsAfter;
    constexpr int kThreads = kRows * 2 * kPairs * sizeof(T) > 80 ? 640 : 1024;
    return kIsNew && kIsLight && Norm::kMostThreads < kThreads ? kThreads / Norm::kMostThreads : 1;
  } else if constexpr (!kIsNew) {
    return 0;
  } else if constexpr (kCommon) {
    if constexpr (kIsDouble<T, Table> && PositionsOf<Position>::kSearches) return 1;
    return !kIsDouble<T, Table> && kIsVoid<Position> && kPairs >= 8 ? 2 : 0;
  } else {
    using Positions = PositionsOf<Position>;
    constexpr bool kHasCostlyAngles = kIsFrequency<Table> || kAngles > 1;
    return Positions::kCountsTokens || Positions::kAxes > 1 || kHasCostlyAngles ? 1 : 0;
  }
}
