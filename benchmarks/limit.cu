// Read and write back two arrays in place: the least that a rotation in place can cost.
//
//   q, k    16-byte words, aligned to 16 bytes; each word is read once and written once, unchanged
//           limit_kernel       (q_words,), (k_words,)              dense
//           limit_rows_kernel  (q_rows, words), (k_rows, words)    rows `pitch` words apart
//   zero    is 0, which the compiler does not know
//
// limit_kernel
// Grid   blockIdx.x  = group of blockDim.x words; those of k count on from those of q
// Block  threadIdx.x = word in its group
//
// limit_rows_kernel
// Grid   blockIdx.x  = group of blockDim.y rows; those of k count on from those of q
// Block  threadIdx.x = word of its row, threadIdx.y = row in its group
//
// It is launched as rope_cupy's kernels are, in one launch for q and k, but without programmatic
// dependent launch: it starts when the kernel before it has ended. A rotation that starts earlier
// may take less time than this where the launch is most of the time.
__device__ void write_back(uint4* address, unsigned zero) {
  uint4 value = *address;
  value.x ^= zero;
  value.y ^= zero;
  value.z ^= zero;
  value.w ^= zero;
  *address = value;
}

extern "C" __global__ void limit_kernel(uint4* q, uint4* k, long long q_words, long long k_words,
                                        unsigned zero) {
  const long long word = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= q_words + k_words) return;
  write_back(word < q_words ? q + word : k + (word - q_words), zero);
}

extern "C" __global__ void limit_rows_kernel(uint4* q, uint4* k, long long q_rows, long long k_rows,
                                             long long pitch, unsigned zero) {
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= q_rows + k_rows) return;
  uint4* words = row < q_rows ? q + row * pitch : k + (row - q_rows) * pitch;
  write_back(words + threadIdx.x, zero);
}
