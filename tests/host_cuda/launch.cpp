// Launch one kernel on the CPU: a launch comes on stdin, the memory as it is then leaves on stdout.
//
// argv[1]  the library that kernel.cpp makes of the kernel
// stdin    a Header, its argument block, its ranges of memory, then what each range holds
// stdout   what each range holds when all threads are done
//
// The ranges lie at the very addresses that the argument block names. Everything else there is
// poisoned for AddressSanitizer, and full of 1 bits, which are NaN and the position -1: what is read
// beside the ranges is reported, or where AddressSanitizer's 8 bytes are too coarse spoils a result,
// and what is written there is found.
//
// A thread of the kernel is a fiber with a stack of its own. It runs until it ends or waits for
// others; when no thread can go on, those whose partners have all arrived are released. The order
// is drawn at random, and the launch repeated in the opposite one: two threads that race for an
// element give two results.
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda.h"

Dim3 threadIdx, blockIdx, blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::size_t kStackBytes = 64 << 10;  // of which the largest kernels take 12
constexpr unsigned char kCanary = 0xff;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "host_cuda: %s\n", message.c_str());
  std::exit(1);
}

// Memory.

using Bytes = std::vector<unsigned char>;

struct Range {
  std::uint64_t address, bytes;

  unsigned char* begin() const { return reinterpret_cast<unsigned char*>(address); }
};

std::vector<Range> pages_of(const std::vector<Range>& ranges) {
  std::vector<Range> pages;
  for (const Range& range : ranges) {
    const std::uint64_t first = range.address / kPage * kPage;
    const std::uint64_t end = (range.address + range.bytes + kPage - 1) / kPage * kPage;
    if (!pages.empty() && first <= pages.back().address + pages.back().bytes)
      pages.back().bytes = std::max(pages.back().bytes, end - pages.back().address);
    else
      pages.push_back({first, end - first});
  }
  return pages;
}

void map(const Range& pages) {
  void* const memory =
      mmap(pages.begin(), pages.bytes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (memory != pages.begin()) fail("the addresses of the arrays are taken here");
  std::memset(pages.begin(), kCanary, pages.bytes);
  ASAN_POISON_MEMORY_REGION(pages.begin(), pages.bytes);
}

void fill(const std::vector<Range>& ranges, const Bytes& contents) {
  auto from = contents.begin();
  for (const Range& range : ranges) {
    std::copy_n(from, range.bytes, range.begin());
    from += static_cast<std::ptrdiff_t>(range.bytes);
  }
}

Bytes contents_of(const std::vector<Range>& ranges) {
  Bytes contents;
  for (const Range& range : ranges)
    contents.insert(contents.end(), range.begin(), range.begin() + range.bytes);
  return contents;
}

// Report what was written beside the ranges, whose own bytes become canaries too.
void check_canaries(const std::vector<Range>& pages, const std::vector<Range>& ranges) {
  for (const Range& page : pages) ASAN_UNPOISON_MEMORY_REGION(page.begin(), page.bytes);
  for (const Range& range : ranges) std::memset(range.begin(), kCanary, range.bytes);
  for (const Range& page : pages)
    if (std::any_of(page.begin(), page.begin() + page.bytes,
                    [](unsigned char byte) { return byte != kCanary; }))
      fail("memory beside the arrays has been written");
}

// Threads.

// Where a fiber goes on. The C library's functions save the mask of signals with two system calls,
// and AddressSanitizer's forget all that it knows of the stack: that takes longer than most steps.
using Place = void* [5];

// A stack with the fiber on it, which runs one thread of the kernel after the other.
struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  Place place;
};

struct Thread {
  Dim3 index;
  std::unique_ptr<Fiber> fiber;  // from its first step to its last
  bool done;
  const char* waits;  // for what, or null
  unsigned mask;      // whom a warp's operation waits for; 0 is the whole block
  unsigned long long bits;
};

std::vector<Thread> threads;
std::vector<std::unique_ptr<Fiber>> free_fibers;  // of ended threads, for the next ones
std::size_t current;
Place scheduler;
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
unsigned long long (*run_kernel)(const void* block);
const void* argument_block;

std::size_t warp_of(std::size_t thread) { return thread / warpSize * warpSize; }

std::string name_of(const Thread& thread) {
  return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) +
         ") of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
}

[[gnu::noinline, gnu::no_sanitize("address")]] void go_to(Place& place) {
  __builtin_longjmp(place, 1);
}

[[gnu::noinline, gnu::no_sanitize("address")]] void change(Place& from, Place& to) {
  if (!__builtin_setjmp(from)) go_to(to);
}

void to_scheduler() {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
  change(threads[current].fiber->place, scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void run_threads() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  while (true) {
    run_kernel(argument_block);
    threads[current].done = true;
    to_scheduler();
  }
}

[[gnu::noinline, gnu::no_sanitize("address")]] void start(Fiber& fiber) {
  static ucontext_t first, before;
  getcontext(&first);
  first.uc_stack.ss_sp = fiber.stack.get();
  first.uc_stack.ss_size = kStackBytes;
  first.uc_link = nullptr;
  makecontext(&first, run_threads, 0);
  if (!__builtin_setjmp(scheduler)) swapcontext(&before, &first);
}

void resume(std::size_t number) {
  Thread& thread = threads[number];
  const bool starts = !thread.fiber && free_fibers.empty();
  if (starts) {
    thread.fiber = std::make_unique<Fiber>();
  } else if (!thread.fiber) {
    thread.fiber = std::move(free_fibers.back());
    free_fibers.pop_back();
  }
  current = number;
  threadIdx = thread.index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.fiber->stack.get(), kStackBytes);
  if (starts)
    start(*thread.fiber);
  else
    change(scheduler, thread.fiber->place);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  if (thread.done) free_fibers.push_back(std::move(thread.fiber));
}

void wait(unsigned mask, const char* what) {
  Thread& thread = threads[current];
  if (mask && !(mask >> host::lane() & 1u))
    fail(name_of(thread) + " is not in its mask of " + what);
  thread.waits = what;
  thread.mask = mask;
  to_scheduler();
}

// Let go those that this thread waits for, itself among them, if all wait with it or have ended.
void release(std::size_t waiting, std::vector<std::size_t>& released) {
  const Thread& thread = threads[waiting];
  const std::size_t warp = warp_of(waiting), before = released.size();
  const std::size_t begin = thread.mask ? warp : 0;
  const std::size_t end = thread.mask ? std::min(warp + warpSize, threads.size()) : threads.size();
  for (std::size_t other = begin; other < end; ++other) {
    const Thread& partner = threads[other];
    if (partner.done || (thread.mask && !(thread.mask >> (other - warp) & 1u))) continue;
    if (!partner.waits || std::strcmp(partner.waits, thread.waits) || partner.mask != thread.mask)
      return released.resize(before);
    released.push_back(other);
  }
  for (std::size_t i = before; i < released.size(); ++i) threads[released[i]].waits = nullptr;
}

void run_block(std::mt19937& random, bool backward) {
  for (unsigned i = 0; i < threads.size(); ++i) {
    threads[i].index = {i % blockDim.x, i / blockDim.x, 0};
    threads[i].done = false;
    threads[i].waits = nullptr;
  }
  std::vector<std::size_t> ready(threads.size());
  std::iota(ready.begin(), ready.end(), 0);
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), random);
    if (backward) std::reverse(ready.begin(), ready.end());
    for (const std::size_t thread : ready) resume(thread);
    ready.clear();
    const Thread* waiting = nullptr;
    for (std::size_t i = 0; i < threads.size(); ++i) {
      if (threads[i].waits) waiting = &threads[i];
      if (threads[i].waits) release(i, ready);
    }
    if (ready.empty() && waiting)
      fail(name_of(*waiting) + " waits at " + waiting->waits + " for threads that never come");
  }
}

// A launch.

void run_grid(bool backward) {
  std::vector<std::uint32_t> blocks(std::uint64_t{gridDim.x} * gridDim.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(gridDim.x));
  if (backward) std::reverse(blocks.begin(), blocks.end());
  for (const std::uint32_t block : blocks) {
    blockIdx = {block % gridDim.x, block / gridDim.x, 0};
    std::mt19937 random(block);
    run_block(random, backward);
  }
}

struct Header {
  std::uint32_t grid_x, grid_y, block_x, block_y, argument_bytes, num_ranges;
};

void receive(void* data, std::size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) fail("the launch ends too soon");
}

}  // namespace

namespace host {

int lane() { return static_cast<int>(current % warpSize); }

void wait_for_block() { wait(0, "__syncthreads"); }

void wait_for_warp(unsigned mask, const char* what) { wait(mask, what); }

unsigned long long exchange(unsigned mask, unsigned long long bits, int source, const char* what) {
  threads[current].bits = bits;
  wait(mask, what);
  const std::size_t from = warp_of(current) + static_cast<std::size_t>(source);
  if (source < 0 || source >= warpSize || from >= threads.size() || !(mask >> source & 1u) ||
      threads[from].done)
    fail(name_of(threads[current]) + " reads a lane that takes no part in " + what);
  const unsigned long long read = threads[from].bits;
  wait(mask, what);  // until all have read
  return read;
}

unsigned ballot(unsigned mask, bool vote, const char* what) {
  threads[current].bits = vote;
  wait(mask, what);
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    const std::size_t other = warp_of(current) + static_cast<std::size_t>(lane);
    if (mask >> lane & 1u && other < threads.size() && !threads[other].done)
      votes |= static_cast<unsigned>(threads[other].bits) << lane;
  }
  wait(mask, what);
  return votes;
}

}  // namespace host

int main(int, char** arguments) {
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (!library) fail(dlerror());
  run_kernel = reinterpret_cast<decltype(run_kernel)>(dlsym(library, "run_kernel"));
  Header header;
  receive(&header, sizeof header);
  Bytes block(header.argument_bytes);
  receive(block.data(), block.size());
  std::vector<Range> ranges(header.num_ranges);
  receive(ranges.data(), ranges.size() * sizeof(Range));
  const std::vector<Range> pages = pages_of(ranges);
  for (const Range& page : pages) map(page);
  for (const Range& range : ranges) ASAN_UNPOISON_MEMORY_REGION(range.begin(), range.bytes);
  Bytes before = contents_of(ranges);
  receive(before.data(), before.size());

  if (run_kernel(nullptr) != block.size())
    fail("the kernel takes " + std::to_string(run_kernel(nullptr)) + " bytes of arguments, got " +
         std::to_string(block.size()));
  argument_block = block.data();
  gridDim = {header.grid_x, header.grid_y, 1};
  blockDim = {header.block_x, header.block_y, 1};
  threads.resize(std::size_t{header.block_x} * header.block_y);
  fill(ranges, before);
  run_grid(false);
  const Bytes after = contents_of(ranges);
  fill(ranges, before);
  run_grid(true);
  if (contents_of(ranges) != after) fail("the result depends on the order of the threads");

  std::fwrite(after.data(), 1, after.size(), stdout);
  check_canaries(pages, ranges);
  return 0;
}
