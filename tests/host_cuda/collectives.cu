// What the threads of a block do together, to hold host_cuda against CUDA's definitions and a GPU.
//
//   out   (kNumResults, blockDim.x)   unsigned   what each operation gave each thread
//
// Grid   1        Block   threadIdx.x, whole warps

struct Arguments {
  unsigned* out;
};

__global__ void collectives_kernel(const Arguments args) {
  __shared__ unsigned numbers[1024];
  const unsigned all = 0xffffffffu;
  const unsigned thread = threadIdx.x;
  const unsigned lane = thread % warpSize;
  unsigned* out = args.out + thread;
  const auto give = [&out](unsigned result) {
    *out = result;
    out += blockDim.x;
  };

  numbers[thread] = thread * thread;
  __syncthreads();
  give(numbers[blockDim.x - 1 - thread]);
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (thread < half) numbers[thread] += numbers[thread + half];
    __syncthreads();
  }
  give(numbers[0]);

  give(__shfl_sync(all, thread, 5));
  give(__shfl_sync(all, thread, 35));
  give(__shfl_sync(all, thread, 3, 8));
  give(__shfl_up_sync(all, thread, 3));
  give(__shfl_up_sync(all, thread, 3, 16));
  give(__shfl_down_sync(all, thread, 3));
  give(__shfl_down_sync(all, thread, 3, 16));
  give(__shfl_xor_sync(all, thread, 17));
  give(__shfl_xor_sync(all, thread, 9, 8));
  give(static_cast<unsigned>(__shfl_xor_sync(all, 1ull << (32 + lane % 32) % 64, 1) >> 32));
  unsigned sum = thread;
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(all, sum, lanes);
  give(sum);
  give(__ballot_sync(all, thread % 3 == 0));
  give(__any_sync(all, thread == 40));
  give(__all_sync(all, thread < 40));
  if (lane % 2) {  // the two halves of a warp apart
    give(__shfl_sync(0xaaaaaaaau, thread, 7) + __ballot_sync(0xaaaaaaaau, lane < 8));
  } else {
    give(__shfl_sync(0x55555555u, thread, 6) + __ballot_sync(0x55555555u, lane < 8));
  }
  __syncwarp();
  if (thread >= 32) return;  // who has left is waited for no more
  __syncthreads();
  give(__shfl_sync(all, thread, 31));
}

enum Mistake {
  kNone,
  kDivergentBarrier,
  kOutsideMask,
  kAbsentLane,
  kEndedLane,
  kPastTheEnd,
  kRace
};

// Each mistake is undefined in CUDA: a hang or any number.
template <int kMistake>
__global__ void mistaken_kernel(const Arguments args) {
  __shared__ unsigned numbers[32];
  const unsigned thread = threadIdx.x;
  const unsigned all = 0xffffffffu;
  numbers[thread % 32] = 1;
  if (kMistake == kDivergentBarrier) {
    if (thread < 7)
      __syncthreads();
    else
      __syncwarp();
  }
  if (kMistake == kOutsideMask) numbers[0] = __shfl_sync(0xfffffffeu, thread, 1);
  if (kMistake == kAbsentLane && thread < 16) numbers[0] = __shfl_sync(0xffffu, thread, 20);
  if (kMistake == kEndedLane) {
    if (thread == 3) return;
    numbers[thread % 32] = __shfl_sync(all, thread, 3);
  }
  if (kMistake == kPastTheEnd) numbers[thread + 1] = 1;
  if (kMistake == kRace) numbers[0] = thread;
  if (thread == 0 || kMistake == kRace) *args.out = numbers[0];
}
