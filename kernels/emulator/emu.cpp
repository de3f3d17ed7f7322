// The scheduler: runs the blocks of a launch one after the other, the threads of a block as fibers that switch only at
// barriers and collectives. See emu.h for what is checked. Compiled without sanitizers of its own accesses; it tells
// AddressSanitizer about its stacks. x86-64 only.
#include "emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#if defined(EMU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers of the running fiber and continues another.
extern "C" void emu_switch(void** save_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {

// emu_memory.cpp: what touches the kernels' memory for them.
void copy_bytes(unsigned char* to, const unsigned char* from, int bytes, int bytes_read);
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

namespace {

enum Order { FORWARD, REVERSE, SHUFFLED };

struct Launch {
  dim3 grid, block;
  size_t smem;
  Order order;
  uint64_t seed;
  Thunk thunk;
  void** arguments;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, bytes_read;
  bool done;
};

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t PAGE_BYTES = 4096;

// Stacks of this OS thread, kept between launches.
struct Stacks {
  std::vector<char*> free;
  char* take() {
    if (!free.empty()) {
      char* stack = free.back();
      free.pop_back();
      return stack;
    }
    void* stack =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, PAGE_BYTES, PROT_NONE)) fail("no memory for a fiber's stack");
    return static_cast<char*>(stack);
  }
  ~Stacks() {
    for (char* stack : free) munmap(stack, STACK_BYTES);
  }
};
thread_local Stacks stacks;

// One CUDA thread.
struct Fiber {
  ThreadContext context;
  int id = 0;
  bool done = true;
  const char* waits = nullptr;  // what it waits at
  std::vector<Copy> copies;     // cp.async in flight, and where each committed group ends
  std::vector<size_t> groups;
  std::vector<Copy> unpublished;  // waited for, but no barrier since: others may not see them yet
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = STACK_BYTES;
  void* sanitizer_stack = nullptr;
};

// A collective that lanes of a warp are meeting at, or whose results some have not read yet.
struct Collective {
  unsigned mask = 0, arrived = 0, unread = 0;
  const char* kind = nullptr;
  bool open = false;
  Slot slots[32];
  std::vector<int> waiting;
};
struct Warp {
  Collective collectives[8];
};

struct Block {
  const Launch* launch = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready, at_barrier;
  const char* barrier = nullptr;
  Fiber main;
  Fiber* running = nullptr;
  int threads = 0, done = 0;
  size_t unpublished = 0;  // of all fibers
  unsigned char* smem = nullptr;
  uint64_t random = 1;
};
thread_local Block* block = nullptr;
thread_local Fiber* came_from = nullptr;

}  // namespace

thread_local ThreadContext* current = nullptr;

void fail(const char* format, ...) {
  fflush(stdout);
  fputs("emulator: ", stderr);
  if (block && block->running && block->running != &block->main) {
    auto& c = block->running->context;
    fprintf(stderr, "block (%u,%u,%u) thread (%u,%u,%u): ", c.block.x, c.block.y, c.block.z, c.thread.x, c.thread.y,
            c.thread.z);
  }
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  if (block) {
    std::map<std::string, int> states;
    for (auto& f : block->fibers) states[f.done ? "returned" : f.waits ? f.waits : "ready"]++;
    for (auto& state : states) fprintf(stderr, "emulator:   %d threads: %s\n", state.second, state.first.c_str());
  }
  abort();
}

namespace {

void arrived() {
#if defined(EMU_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(block->running->sanitizer_stack, &bottom, &size);
  if (came_from == &block->main) {
    block->main.stack = static_cast<char*>(const_cast<void*>(bottom));
    block->main.stack_bytes = size;
  }
#endif
}

void switch_to(Fiber* to) {
  Fiber* from = block->running;
  if (from == to) return;
  came_from = from;
  block->running = to;
  current = &to->context;
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(&from->sanitizer_stack, to->stack, to->stack_bytes);
#endif
  emu_switch(&from->stack_pointer, to->stack_pointer);
  arrived();
}

uint64_t random_number() {
  uint64_t& x = block->random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

// When an asynchronous copy is made: as late as hardware may in forward order, at once in reverse order, else by
// chance. Late copies show waits that are missing, early ones memory that is overwritten while others still read it.
bool copy_at_once() {
  if (block->launch->order == SHUFFLED) return random_number() >> 32 & 1;
  return block->launch->order == REVERSE;
}

// A barrier lies behind the fiber's copies.
void publish(Fiber& fiber) {
  block->unpublished -= fiber.unpublished.size();
  fiber.unpublished.clear();
}

// The fiber that runs next, none if all wait.
Fiber* next() {
  auto& ready = block->ready;
  if (ready.empty()) return nullptr;
  size_t k = 0;
  if (block->launch->order == REVERSE) k = ready.size() - 1;
  if (block->launch->order == SHUFFLED) k = random_number() % ready.size();
  int id = ready[k];
  ready.erase(ready.begin() + static_cast<long>(k));
  return &block->fibers[static_cast<size_t>(id)];
}

void wait_here(const char* what) {
  Fiber* me = block->running;
  me->waits = what;
  Fiber* to = next();
  if (!to) fail("deadlock: no thread of the block can go on");
  switch_to(to);
  me->waits = nullptr;
}

// Whoever completes a barrier goes on first, unless the order is shuffled.
void after_completion() {
  if (block->launch->order != SHUFFLED) return;
  block->ready.push_back(block->running->id);
  switch_to(next());
}

}  // namespace

int lane() { return block->running->id % 32; }
void* dynamic_smem() { return block->smem; }

void block_barrier(const char* where) {
  Block& b = *block;
  if (b.done) fail("%s while %d threads of the block have already returned", where, b.done);
  if (!b.at_barrier.empty() && b.barrier != where)
    fail("threads of one block meet at different barriers: %s and %s", where, b.barrier);
  b.barrier = where;
  if (static_cast<int>(b.at_barrier.size()) + 1 < b.threads) {
    b.at_barrier.push_back(b.running->id);
    wait_here(where);
    return;
  }
  b.ready.insert(b.ready.end(), b.at_barrier.begin(), b.at_barrier.end());
  b.at_barrier.clear();
  for (auto& fiber : b.fibers) publish(fiber);
  after_completion();
}

const Slot* warp_gather(unsigned mask, const char* kind, const void* in, size_t size, bool orders_memory) {
  Block& b = *block;
  const int id = b.running->id, lane = id % 32;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", kind, lane, mask);
  if ((id | 31) >= b.threads && mask == ~0u && b.threads % 32) mask = (1u << b.threads % 32) - 1;
  Collective *mine = nullptr, *spare = nullptr;
  for (auto& c : b.warps[static_cast<size_t>(id / 32)].collectives) {
    // This lane has read its earlier results; a table is used again once all lanes have.
    if (!c.open) c.unread &= ~(1u << lane);
    if (c.open && c.mask & mask && !mine) mine = &c;
    if (!c.open && !c.unread && !spare) spare = &c;
  }
  if (!mine) {
    mine = spare;
    if (!mine) fail("too many collectives in flight");
    mine->open = true;
    mine->mask = mask;
    mine->arrived = 0;
    mine->kind = kind;
    mine->waiting.clear();
  }
  if (mine->mask != mask || mine->kind != kind)
    fail("lanes of one warp meet at different operations: %s (mask %08x) and %s (mask %08x)", kind, mask, mine->kind,
         mine->mask);
  if (size) copy_bytes(mine->slots[lane].bytes, static_cast<const unsigned char*>(in), int(size), int(size));
  mine->arrived |= 1u << lane;
  if (mine->arrived != mask) {
    mine->waiting.push_back(id);
    wait_here(kind);
  } else {
    mine->open = false;
    mine->unread = mask;
    const size_t first = static_cast<size_t>(id / 32 * 32);
    for (size_t l = 0; orders_memory && l < 32 && first + l < b.fibers.size(); l++)
      if (mask >> l & 1) publish(b.fibers[first + l]);
    b.ready.insert(b.ready.end(), mine->waiting.begin(), mine->waiting.end());
    after_completion();
  }
  return mine->slots;
}

void cp_async(void* to, const void* from, int bytes, int bytes_read) {
  auto misaligned = [bytes](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0;
  };
  if (misaligned(to) || (bytes_read && misaligned(from))) fail("cp.async: a copy of %d bytes is not aligned", bytes);
  Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, bytes_read,
            copy_at_once()};
  if (copy.done) copy_bytes(copy.to, copy.from, bytes, bytes_read);
  block->running->copies.push_back(copy);
}
void cp_async_commit() { block->running->groups.push_back(block->running->copies.size()); }
void cp_async_wait(int newest_left) {
  Fiber& f = *block->running;
  if (static_cast<int>(f.groups.size()) <= newest_left) return;
  const size_t count = f.groups[f.groups.size() - 1 - static_cast<size_t>(newest_left)];
  for (size_t i = 0; i < count; i++) {
    const Copy& copy = f.copies[i];
    if (!copy.done) copy_bytes(copy.to, copy.from, copy.bytes, copy.bytes_read);
  }
  f.unpublished.insert(f.unpublished.end(), f.copies.begin(), f.copies.begin() + static_cast<long>(count));
  block->unpublished += count;
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<long>(count));
  f.groups.erase(f.groups.begin(), f.groups.end() - newest_left);
  for (auto& group : f.groups) group -= count;
}

void check_published(const void* p, int bytes, const char* kind) {
  if (!block->unpublished) return;
  auto from = static_cast<const unsigned char*>(p);
  for (auto& fiber : block->fibers)
    for (auto& copy : fiber.unpublished)
      if (&fiber != block->running && copy.to < from + bytes && from < copy.to + copy.bytes)
        fail("%s reads what thread %d brought with cp.async, and no barrier lies between", kind, fiber.id);
}

namespace {

// Where a fiber begins; it runs the same thread index of one block after the other.
void fiber_main() {
  arrived();
  for (;;) {
    block->launch->thunk(block->launch->arguments);
    Fiber& me = *block->running;
    if (!me.copies.empty()) fail("returned with cp.async copies that were never waited for");
    me.groups.clear();
    publish(me);
    me.done = true;
    block->done++;
    if (!block->at_barrier.empty()) fail("returned while others wait at %s", block->barrier);
    Fiber* to = next();
    if (!to && block->done < block->threads) fail("deadlock: no thread of the block can go on");
    switch_to(to ? to : &block->main);
  }
}

void start_fibers(Block& b) {
  const dim3 dim = b.launch->block;
  for (int id = 0; id < b.threads; id++) {
    Fiber& f = b.fibers[static_cast<size_t>(id)];
    const unsigned i = static_cast<unsigned>(id);
    f.id = id;
    f.stack = stacks.take();
    void** top = reinterpret_cast<void**>(f.stack + STACK_BYTES - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    f.stack_pointer = top - 6;  // emu_switch pops six registers
    f.context.block_dim = dim;
    f.context.grid_dim = b.launch->grid;
    f.context.thread = uint3{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
  }
}

void run_block(Block& b, uint64_t index) {
  const Launch& l = *b.launch;
  // Fresh for each block, and NaN in every float format: reads of what nobody wrote show.
  const size_t room = (l.smem + 1023) / 1024 * 1024 + 1024;
  b.smem = static_cast<unsigned char*>(aligned_alloc(1024, room));
  memset(b.smem, 0xFF, room);
  poison(b.smem + l.smem, room - l.smem);
  b.done = 0;
  b.ready.clear();
  for (auto& f : b.fibers) {
    f.done = false;
    f.context.block = uint3{unsigned(index % l.grid.x), unsigned(index / l.grid.x % l.grid.y),
                            unsigned(index / (uint64_t(l.grid.x) * l.grid.y))};
    b.ready.push_back(f.id);
  }
  switch_to(next());
  for (auto& w : b.warps)
    for (auto& c : w.collectives) c.open = false, c.unread = 0;
  unpoison(b.smem, room);
  free(b.smem);
}

void run(const Launch& l) {
  Block b;
  block = &b;
  b.launch = &l;
  b.threads = int(l.block.x * l.block.y * l.block.z);
  if (b.threads < 1 || b.threads > 1024) fail("a block of %d threads", b.threads);
  b.random = l.seed * 0x9E3779B97F4A7C15ull | 1;
  b.running = &b.main;
  b.fibers.resize(size_t(b.threads));
  b.warps.resize(size_t(b.threads + 31) / 32);
  start_fibers(b);
  const uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  for (uint64_t i = 0; i < blocks; i++) run_block(b, l.order == REVERSE ? blocks - 1 - i : i);
  for (auto& f : b.fibers) stacks.free.push_back(f.stack);
  block = nullptr;
  current = nullptr;
}

struct Kernel {
  Thunk thunk;
  std::vector<size_t> argument_bytes;
};

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> table;
  return table;
}

}  // namespace

Registrar::Registrar(const char* name, Thunk thunk, std::vector<size_t> argument_bytes) {
  if (!kernels().emplace(name, Kernel{thunk, std::move(argument_bytes)}).second)
    fail("kernel %s is registered twice", name);
}

}  // namespace emu

// cuLaunchKernel for Rust: dimensions, bytes of shared memory, addresses of the arguments; then the order of threads (0
// forward, 1 reverse, 2 shuffled) and its seed. 0: done, 1: no such kernel.
extern "C" int emu_launch(const char* name, const unsigned* grid, const unsigned* block, size_t smem, void** arguments,
                          int order, uint64_t seed) {
  auto found = emu::kernels().find(name);
  if (found == emu::kernels().end()) return 1;
  emu::run(emu::Launch{dim3{grid[0], grid[1], grid[2]}, dim3{block[0], block[1], block[2]}, smem,
                       static_cast<emu::Order>(order), seed, found->second.thunk, arguments});
  return 0;
}

// Bytes of each argument of a kernel, up to `most`; how many there are, or -1: no such kernel.
extern "C" int emu_argument_bytes(const char* name, size_t* bytes, int most) {
  auto found = emu::kernels().find(name);
  if (found == emu::kernels().end()) return -1;
  const auto& all = found->second.argument_bytes;
  for (size_t i = 0; i < all.size() && static_cast<int>(i) < most; i++) bytes[i] = all[i];
  return static_cast<int>(all.size());
}
