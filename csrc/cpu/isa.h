// The instruction set of the CPU kernels, chosen once per process.
#pragma once

#include <cstdint>

// SGMIM_BASELINE_ONLY compiles the baseline alone: for ThreadSanitizer, since threads share memory in the same way with
// every set. SGMIM_WIDEST_ONLY compiles the widest set alone, and needs the compiler's flags for it: for
// AddressSanitizer where a machine has that set.
#if defined(__x86_64__) && !defined(SGMIM_BASELINE_ONLY)
#define SGMIM_MANY_ISAS
#endif

namespace sgmim {

// Storage of a bfloat16: the upper half of a float's bits.
struct Bf16 {
  uint16_t bits;
};

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Returns the best set of this machine, or a lower one: SGMIM_FAST_CPU_ISA=baseline|avx2|avx512|avx512bf16.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace sgmim

// SGMIM_SELECT((name<A, B>)) selects the kernel for this machine. The inner parentheses protect commas of templates.
#define SGMIM_UNWRAP(...) __VA_ARGS__
#if defined(SGMIM_WIDEST_ONLY)
#define SGMIM_SELECT(kernel) (&::sgmim::avx512bf16::SGMIM_UNWRAP kernel)
#elif defined(SGMIM_MANY_ISAS)
#define SGMIM_SELECT(kernel)                                                                     \
  (::sgmim::isa() == ::sgmim::Isa::avx512bf16 ? &::sgmim::avx512bf16::SGMIM_UNWRAP kernel        \
   : ::sgmim::isa() == ::sgmim::Isa::avx512   ? &::sgmim::avx512::SGMIM_UNWRAP kernel            \
   : ::sgmim::isa() == ::sgmim::Isa::avx2     ? &::sgmim::avx2::SGMIM_UNWRAP kernel              \
                                              : &::sgmim::baseline::SGMIM_UNWRAP kernel)
#else
#define SGMIM_SELECT(kernel) (&::sgmim::baseline::SGMIM_UNWRAP kernel)
#endif
