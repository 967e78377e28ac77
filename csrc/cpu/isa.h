// The instruction set the CPU kernels run with, chosen once per process.
#pragma once

#include <cstdint>

// SGMIM_BASELINE_ONLY leaves the others out: for ThreadSanitizer, since threads share the same with each of them.
// SGMIM_WIDEST_ONLY leaves out what is between it and the widest: for AddressSanitizer where a machine runs that one.
#if defined(__x86_64__) && !defined(SGMIM_BASELINE_ONLY)
#define SGMIM_MANY_ISAS
#endif

namespace sgmim {

// bfloat16 as stored: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The best set this machine has; SGMIM_FAST_CPU_ISA=baseline|avx2|avx512|avx512bf16 lowers it (never raises it).
Isa isa();

const char* isa_name(Isa isa);

}  // namespace sgmim

// The kernel for this machine. Its name goes into parentheses of its own, for the commas of templates: SGMIM_SELECT((name<A, B>)).
#define SGMIM_UNWRAP(...) __VA_ARGS__
#if defined(SGMIM_WIDEST_ONLY)
#define SGMIM_SELECT(kernel)                                                              \
  (::sgmim::isa() == ::sgmim::Isa::avx512bf16 ? &::sgmim::avx512bf16::SGMIM_UNWRAP kernel \
                                              : &::sgmim::baseline::SGMIM_UNWRAP kernel)
#elif defined(SGMIM_MANY_ISAS)
#define SGMIM_SELECT(kernel)                                                                     \
  (::sgmim::isa() == ::sgmim::Isa::avx512bf16 ? &::sgmim::avx512bf16::SGMIM_UNWRAP kernel        \
   : ::sgmim::isa() == ::sgmim::Isa::avx512   ? &::sgmim::avx512::SGMIM_UNWRAP kernel            \
   : ::sgmim::isa() == ::sgmim::Isa::avx2     ? &::sgmim::avx2::SGMIM_UNWRAP kernel              \
                                              : &::sgmim::baseline::SGMIM_UNWRAP kernel)
#else
#define SGMIM_SELECT(kernel) (&::sgmim::baseline::SGMIM_UNWRAP kernel)
#endif
