// Memory that is written without a page fault for every four kilobytes.

#pragma once

#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks for large pages under a result that is about to be written. Allocators hand out big buffers as fresh pages; at the
// usual size, mapping them one by one takes longer than a sparse product.
inline void use_large_pages(const void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;
    constexpr int64_t LARGE = 1 << 22;
    if (bytes < LARGE) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: nothing is lost where it is refused
#else
    (void)memory, (void)bytes;
#endif
}

// Memory of one thread that outlives the call: a fresh allocation of this size would be mapped and faulted in each time.
class Scratch {
  public:
    ~Scratch() { std::free(memory); }

    // At least `count` floats, aligned to a cache line, with undefined content.
    float* get(int64_t count) {
        if (count > capacity) {
            std::free(memory);
            capacity = (count + 1023) / 1024 * 1024;
            memory = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
            if (!memory) std::abort();  // out of memory inside a team of threads: nobody could be told
        }
        return memory;
    }

  private:
    float* memory = nullptr;
    int64_t capacity = 0;
};

// Two panels, the active entries in another order, and running sums of them.
thread_local Scratch first_panel_memory, second_panel_memory, entry_memory, sum_memory;

}  // namespace
