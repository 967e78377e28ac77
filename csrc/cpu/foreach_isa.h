// Compiles the file named by SGMIM_THIS_FILE once per instruction set, from one source.
//
// A kernel file puts its kernels into namespace sgmim::SGMIM_ISA and starts like this:
//     #undef SGMIM_THIS_FILE
//     #define SGMIM_THIS_FILE "cpu/linear_l1.cpp"
//     #include "cpu/foreach_isa.h"
//     #include "cpu/vec.h"
// This header includes the file again for AVX-512 (with and without bfloat16 instructions) and AVX2, and then defines
// the macros of the baseline for the rest of the outer pass. Code that must exist once (launchers, registration) is
// under `#ifdef SGMIM_ONCE` and calls the kernels through SGMIM_SELECT(kernel), which selects what the machine can run.
// No -march flag is needed.
//
// Standard headers must be included before this one, outside any instruction set: otherwise the linker might keep, for
// all callers, a copy of one of their inline functions that was compiled for AVX-512.
#ifndef SGMIM_FOREACH_ISA
#define SGMIM_FOREACH_ISA

#include "cpu/isa.h"

#if defined(SGMIM_MANY_ISAS)

#include <immintrin.h>

#if defined(__clang__)
#define SGMIM_PRAGMA(x) _Pragma(#x)
#define SGMIM_TARGET(t) SGMIM_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define SGMIM_TARGET_END _Pragma("clang attribute pop")
#else
#define SGMIM_PRAGMA(x) _Pragma(#x)
#define SGMIM_TARGET(t) _Pragma("GCC push_options") SGMIM_PRAGMA(GCC target(t))
#define SGMIM_TARGET_END _Pragma("GCC pop_options")
#endif

#define SGMIM_ISA avx512bf16
#define SGMIM_HAS_BF16
#define SGMIM_VECTOR_BYTES 64
#if !defined(SGMIM_WIDEST_ONLY)
SGMIM_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include SGMIM_THIS_FILE
SGMIM_TARGET_END
#undef SGMIM_ISA
#undef SGMIM_HAS_BF16
#undef SGMIM_VECTOR_BYTES

#define SGMIM_ISA avx512
#define SGMIM_VECTOR_BYTES 64
SGMIM_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include SGMIM_THIS_FILE
SGMIM_TARGET_END
#undef SGMIM_ISA
#undef SGMIM_VECTOR_BYTES

#define SGMIM_ISA avx2
#define SGMIM_VECTOR_BYTES 32
SGMIM_TARGET("avx2,fma")
#include SGMIM_THIS_FILE
SGMIM_TARGET_END
#undef SGMIM_ISA
#undef SGMIM_VECTOR_BYTES
#endif
#endif

#if !defined(SGMIM_WIDEST_ONLY)  // other machines than x86-64 have the baseline only, 16-byte vectors
#define SGMIM_ISA baseline
#define SGMIM_VECTOR_BYTES 16
#endif
#define SGMIM_ONCE

#endif
