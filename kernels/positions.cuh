// Positions: which row of the table a token has or, with three axes, which three rows.
//
//   int, long long      positions[batch, token]
//   TokenIndex          token + position_offset: with frequencies, which have no rows
//   Offset<Index>       token + position_offset + seqlen_offsets[batch]
//   Packed<Index, Begin>
//                       the place of the token in its sequence + position_offset +
//                       seqlen_offsets[i], if there are any: sequence i has the tokens
//                       cu_seqlens[i], a Begin, up to and without cu_seqlens[i + 1]
//   SectionedMrope<Index>
//                       positions[axis, batch, token] of three axes, such as time, height and
//                       width: the first axis has the pairs below section_ends[0], the second one
//                       the other pairs below section_ends[1], and the third one all others
//   InterleavedMrope<Index>
//                       the same, but for the pairs: of every three neighbours, the second pair
//                       belongs to the second axis below section_ends[0], the third pair to the
//                       third axis below section_ends[1], and all others to the first axis
//
// Index and Begin are int or long long. Every position is compared with the size of the table
// before a row is read.
#pragma once

#include "numeric.cuh"

struct TokenIndex;

template <typename Index>
struct Offset;

template <typename Index, typename Begin>
struct Packed;

template <typename Index>
struct SectionedMrope;

template <typename Index>
struct InterleavedMrope;

// What positions need besides the address of the first of them.
struct PositionArguments {
  long long axis;             // from a position to that on the next axis, or of the next sequence
  long long section_ends[2];  // see above
  long long num_sequences;
  long long cu_stride;  // from one of cu_seqlens to the next
  const void* cu_seqlens;
  long long position_offset;  // is added to the index of a token
};

constexpr long long kNowhere = -1;  // of a token in no sequence

// The sum, or kNowhere if it has more than 64 bits. It is added up in two words, the second of
// which counts the carries.
template <typename... Numbers>
__device__ __forceinline__ long long sum_of(Numbers... numbers) {
  unsigned long long low = 0;
  int high = 0;
  const auto take = [&](long long number) {
    low += static_cast<unsigned long long>(number);
    high += (low < static_cast<unsigned long long>(number)) - (number < 0);
  };
  (take(numbers), ...);
  return high == 0 ? static_cast<long long>(low) : kNowhere;
}

// What all kinds have: the number of axes, whether a position is made of the index of its token,
// and whether the sequence of a token is searched for.
template <typename Index_, int kAxes_, bool kCountsTokens_, bool kSearches_>
struct Traits {
  using Index = Index_;
  static constexpr int kAxes = kAxes_;
  static constexpr bool kCountsTokens = kCountsTokens_;
  static constexpr bool kSearches = kSearches_;
};

template <typename Index>
struct PositionsOf : Traits<Index, 1, false, false> {
  static __device__ __forceinline__ long long read(const PositionArguments&, const Index* address,
                                                   int, int) {
    return *address;
  }
};

template <>
struct PositionsOf<void> : Traits<void, 0, false, false> {};

template <>
struct PositionsOf<TokenIndex> : Traits<char, 1, true, false> {
  // The host has checked that the position of the last token fits 64 bits.
  static __device__ __forceinline__ long long read(const PositionArguments& args, const Index*, int,
                                                   int token) {
    return token + args.position_offset;
  }
};

template <typename Index>
struct PositionsOf<Offset<Index>> : Traits<Index, 1, true, false> {
  static __device__ __forceinline__ long long read(const PositionArguments& args,
                                                   const Index* address, int, int token) {
    return sum_of(token, args.position_offset, *address);
  }
};

template <typename Index, typename Begin>
struct PositionsOf<Packed<Index, Begin>> : Traits<Index, 1, true, true> {
  // The last sequence that begins at or before the token holds it, unless it is the end of all.
  static __device__ __forceinline__ long long read(const PositionArguments& args,
                                                   const Index* offsets, int, int token) {
    const auto* begins = static_cast<const Begin*>(args.cu_seqlens);
    const int end = static_cast<int>(args.num_sequences);
    int sequence = 0;
    for (int last = end; sequence < last;) {
      const int middle = (sequence + last + 1) >> 1;
      if (begins[middle * args.cu_stride] <= token) {
        sequence = middle;
      } else {
        last = middle - 1;
      }
    }
    const long long begin = begins[sequence * args.cu_stride];
    if (token < begin || sequence == end) return kNowhere;
    // ~begin is -begin - 1, which exists for every number.
    const long long offset = offsets == nullptr ? 0 : offsets[sequence * args.axis];
    return sum_of(token + 1LL, ~begin, args.position_offset, offset);
  }
};

template <typename Index>
struct PositionsOf<SectionedMrope<Index>> : Traits<Index, 3, false, false> {
  static __device__ __forceinline__ long long read(const PositionArguments& args,
                                                   const Index* address, int axis, int) {
    return address[axis * args.axis];
  }

  static __device__ __forceinline__ int axis_of(const PositionArguments& args, int pair) {
    return (pair >= args.section_ends[0]) + (pair >= args.section_ends[1]);
  }
};

template <typename Index>
struct PositionsOf<InterleavedMrope<Index>> : PositionsOf<SectionedMrope<Index>> {
  static __device__ __forceinline__ int axis_of(const PositionArguments& args, int pair) {
    const int axis = pair % 3;
    return axis > 0 && pair < args.section_ends[axis - 1] ? axis : 0;
  }
};

// Whether neighbouring pairs may belong to different axes.
template <typename Position>
constexpr bool kIsInterleavedMrope = false;

template <typename Index>
constexpr bool kIsInterleavedMrope<InterleavedMrope<Index>> = true;
