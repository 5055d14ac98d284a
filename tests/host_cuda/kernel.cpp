// One kernel of one source, a library for launch.cpp: -DSOURCE='"rotary.cu"' -DKERNEL='rotary_kernel<...>'
#include "cuda.h"
#include SOURCE

template <typename Arguments>
unsigned long long call(void (*kernel)(Arguments), const void* block) {
  if (block) {
    Arguments arguments;
    __builtin_memcpy(&arguments, block, sizeof arguments);
    kernel(arguments);
  }
  return sizeof(Arguments);
}

// Run one thread of the kernel, or none where there is no block; return how large a block is.
extern "C" unsigned long long run_kernel(const void* block) { return call(KERNEL, block); }
