// Products of block-sparse int8 matrices on the CPU: the functions that `hf_dynsparse/ops/int8.py` calls.
//
// Compiled once per instruction set into a library of its own (setup.py). Plain C interface: no PyTorch, no Python.

#include "int8.hpp"
#include "processor.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Grows with every change of the functions below: a library from an older build is refused.
EXPORT int interface_version() { return 1; }

// Whether weights must be packed for sums in pairs of 16 bits.
EXPORT int adds_pairs() { return ADDS_PAIRS; }

// Whether this CPU runs a variant: 4 for x86-64-v4 with AVX512-VNNI, 3 for x86-64-v4, 2 for x86-64-v3 with AVX-VNNI, 1
// for x86-64-v3, 0 for the portable one.
EXPORT int runs(int variant) {
    if (variant == 0) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = runs_v3(), v4 = runs_v4();
    if (variant == 1) return v3;
    if (variant == 2) return v3 && __builtin_cpu_supports("avxvnni");
    if (variant == 3) return v4;
    if (variant == 4) return v4 && __builtin_cpu_supports("avx512vnni");
#endif
    return 0;
}

// output [tokens, out] from input [tokens, in], both float32: that of `layer` or, if `next` is not null, of
// `next(gelu(layer(input)))`, and of what `ending` says of it, if that is not null. Returns 0; 1 for a height of strips that
// is not compiled; 2 if a number is not finite, which no integer stands for: `output` holds nothing of use then.
EXPORT int int8_linear(const Int8Layer* layer, const Int8Layer* next, const Ending* ending, int threads, int64_t tokens,
                       const float* input, float* output) {
    return Call{*layer, next, ending, tokens, input, output}.run(threads);
}
