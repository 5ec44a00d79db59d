// The kernels once per instruction set: every unit_*.cpp compiles the same *_unit.h files for its registers and offers them
// as one Unit; unit() is the widest that this machine runs. The operators' own files (relu_attention.cpp …) see torch and
// no vectors, the units see vectors and no torch.
#pragma once

#include "group_layer_norm.h"
#include "moe.h"
#include "relu_attention.h"
#include "rq_nearest.h"

namespace genrec {

struct Unit {
  const char* name;
  ReluAttention relu_attention;
  GroupLayerNorm group_layer_norm;
  Moe moe;
  RqNearest rq_nearest;
};

// The widest unit that this CPU has and that the environment variable GENREC_CPU_ISA, if set, does not forbid.
const Unit& unit();

extern const Unit unit_portable;
#if defined(__x86_64__)
extern const Unit unit_avx2;
extern const Unit unit_avx512;
#endif

}  // namespace genrec
