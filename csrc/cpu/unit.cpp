// Which instruction set runs is decided once, on the machine that runs it.
#include "unit.h"

#include <cstdlib>
#include <string>

namespace genrec {
namespace {

const Unit& choose() {
#if defined(__x86_64__)
  const char* isa = std::getenv("GENREC_CPU_ISA");
  const std::string limit = isa ? isa : "avx512";
  if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return unit_avx512;
  if (limit != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return unit_avx2;
#endif
  return unit_portable;
}

}  // namespace

const Unit& unit() {
  static const Unit& chosen = choose();
  return chosen;
}

}  // namespace genrec

extern "C" __attribute__((visibility("default"))) const char* genrec_cpu_isa() { return genrec::unit().name; }
