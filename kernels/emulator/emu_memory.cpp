// The parts of the emulator that touch memory for the kernels: compiled with the sanitizer, as the kernels are.
#include <cstddef>
#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

void copy_bytes(unsigned char* to, const unsigned char* from, int bytes, int bytes_read) {
  for (int i = 0; i < bytes; i++) to[i] = i < bytes_read ? from[i] : 0;
}

#if defined(EMU_ASAN)
void poison(void* p, size_t size) { __asan_poison_memory_region(p, size); }
void unpoison(void* p, size_t size) { __asan_unpoison_memory_region(p, size); }
#else
void poison(void*, size_t) {}
void unpoison(void*, size_t) {}
#endif

}  // namespace emu

// The bytes around a block of device memory, which only a faulty kernel touches.
extern "C" void emu_guard(void* p, size_t size, int on) { on ? emu::poison(p, size) : emu::unpoison(p, size); }
