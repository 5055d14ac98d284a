// Wide access: one type and two verbs.
//
// A run of kSize elements moves in as few accesses as its address allows. The host finds how many
// elements may move at once, a power of two, from the alignment of the pointer and of every stride;
// where neighbours do not touch it is 1.
#pragma once

#include "numeric.cuh"

constexpr int kAccessBytes = 16;

// A run of elements as it lies in memory. It stays packed until it is computed with.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kAccessBytes ? sizeof(T) * kSize : kAccessBytes) Vec {
  static constexpr bool kTwoToAWord = sizeof(T) == 2 && kSize > 1;
  using Word = typename Conditional<kTwoToAWord, unsigned, T>::Type;
  static constexpr int kWords = kTwoToAWord ? kSize / 2 : kSize;

  Word words[kWords];
};

template <int kSize, typename T>
__device__ __forceinline__ Vec<T, 2 * kSize> join(const Vec<T, kSize>& low,
                                                  const Vec<T, kSize>& high) {
  Vec<T, 2 * kSize> run;
  if constexpr (sizeof(T) == 2 && kSize == 1) {
    run.words[0] = word_of(low.words[0].bits, high.words[0].bits);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T, kSize>::kWords; ++i) {
      run.words[i] = low.words[i];
      run.words[i + Vec<T, kSize>::kWords] = high.words[i];
    }
  }
  return run;
}

// The first or the second half of a run.
template <int kHalf, int kSize, typename T>
__device__ __forceinline__ Vec<T, kSize / 2> half_of(const Vec<T, kSize>& run) {
  if constexpr (sizeof(T) == 2 && kSize == 2) {
    return {static_cast<unsigned short>(run.words[0] >> 16 * kHalf)};
  } else {
    Vec<T, kSize / 2> half;
#pragma unroll
    for (int i = 0; i < Vec<T, kSize / 2>::kWords; ++i) {
      half.words[i] = run.words[i + kHalf * Vec<T, kSize / 2>::kWords];
    }
    return half;
  }
}

struct Access {
  long long stride;  // elements from one neighbour to the next
  int width;         // elements that may move at once
};

template <typename T>
constexpr int kWidestAccess = kAccessBytes / sizeof(T);

// The width at which a run of kSize elements moves whole.
template <typename T, int kSize>
constexpr int kWholeWidth = kSize < kWidestAccess<T> ? kSize : kWidestAccess<T>;

// An access that leaves L1 to others, for what is read or written once.
struct alignas(kAccessBytes) Piece {
  unsigned words[4];
};

template <typename Run>
union Pieces {
  static constexpr int kCount = sizeof(Run) / kAccessBytes;

  Run run;
  Piece pieces[kCount ? kCount : 1];
};

__device__ __forceinline__ Piece load_past_l1(const Piece* address) {
#ifdef __CUDA_ARCH__
  Piece piece;
  auto& to = piece.words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(address));
  return piece;
#else
  return *address;
#endif
}

__device__ __forceinline__ void store_past_l1(Piece* address, const Piece& piece) {
#ifdef __CUDA_ARCH__
  const auto& from = piece.words;
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  *address = piece;
#endif
}

template <int kSize, bool kPastL1 = false, typename T>
__device__ __forceinline__ Vec<T, kSize> load(const T* address, Access access) {
  static_assert((kSize & (kSize - 1)) == 0, "a run halves down to one element");
  using Run = Vec<T, kSize>;
  if constexpr (kSize == 1) {
    return {*address};
  } else if (access.width >= kWholeWidth<T, kSize>) {
    if constexpr (kPastL1 && Pieces<Run>::kCount) {
      Pieces<Run> loaded;
#pragma unroll
      for (int i = 0; i < Pieces<Run>::kCount; ++i) {
        loaded.pieces[i] = load_past_l1(reinterpret_cast<const Piece*>(address) + i);
      }
      return loaded.run;
    }
    return *reinterpret_cast<const Run*>(address);
  } else {
    return join(load<kSize / 2, kPastL1>(address, access),
                load<kSize / 2, kPastL1>(address + kSize / 2 * access.stride, access));
  }
}

template <bool kPastL1 = false, int kSize, typename T>
__device__ __forceinline__ void store(T* address, Access access, const Vec<T, kSize>& run) {
  using Run = Vec<T, kSize>;
  if constexpr (kSize == 1) {
    *address = run.words[0];
  } else if (access.width >= kWholeWidth<T, kSize>) {
    if constexpr (kPastL1 && Pieces<Run>::kCount) {
      const Pieces<Run> stored = {run};
#pragma unroll
      for (int i = 0; i < Pieces<Run>::kCount; ++i) {
        store_past_l1(reinterpret_cast<Piece*>(address) + i, stored.pieces[i]);
      }
    } else {
      *reinterpret_cast<Run*>(address) = run;
    }
  } else {
    store<kPastL1>(address, access, half_of<0>(run));
    store<kPastL1>(address + kSize / 2 * access.stride, access, half_of<1>(run));
  }
}

// The numbers of a run, to compute with.
template <typename Real, int kSize>
struct Numbers {
  Real values[kSize];
};

template <typename Real, int kSize, typename T>
__device__ __forceinline__ Numbers<Real, kSize> widen(const Vec<T, kSize>& run) {
  Numbers<Real, kSize> numbers;
#pragma unroll
  for (int i = 0; i < Vec<T, kSize>::kWords; ++i) {
    if constexpr (Vec<T, kSize>::kTwoToAWord) {
      const auto two = widen_two<T>(run.words[i]);
      numbers.values[2 * i] = widen<Real>(two.first);
      numbers.values[2 * i + 1] = widen<Real>(two.second);
    } else {
      numbers.values[i] = widen<Real>(run.words[i]);
    }
  }
  return numbers;
}

template <typename T, int kSize, typename Real>
__device__ __forceinline__ Vec<T, kSize> narrow(const Numbers<Real, kSize>& numbers) {
  Vec<T, kSize> run;
#pragma unroll
  for (int i = 0; i < Vec<T, kSize>::kWords; ++i) {
    if constexpr (Vec<T, kSize>::kTwoToAWord) {
      run.words[i] = narrow_two<T>(numbers.values[2 * i], numbers.values[2 * i + 1]);
    } else {
      run.words[i] = narrow<T>(numbers.values[i]);
    }
  }
  return run;
}
