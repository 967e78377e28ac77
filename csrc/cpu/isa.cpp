#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "common.h"

namespace sgmim {

static Isa detect() {
#if defined(SGMIM_WIDEST_ONLY)
  return Isa::avx512bf16;
#endif
  Isa best = Isa::baseline;
#if defined(SGMIM_MANY_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512bf16;
#endif
  if (const char* wanted = std::getenv("SGMIM_FAST_CPU_ISA")) {
    for (Isa lower : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16})
      if (std::strcmp(wanted, isa_name(lower)) == 0 && lower < best) best = lower;
  }
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

static std::string current_isa() { return isa_name(isa()); }

STABLE_TORCH_LIBRARY_FRAGMENT(sgmim_fast_cpu, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(sgmim_fast_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&current_isa)); }

}  // namespace sgmim
