// The body of a unit_*.cpp, which has defined UNIT, UNIT_NAME, VECTOR_BYTES and TILE_ROWS.
//
// Everything it includes has internal linkage and takes nothing from the standard library: a shared template compiled for
// AVX-512 could be the copy that the linker keeps for the whole program. Compilers emulate vectors wider than the unit's
// registers very slowly, hence one unit per width.
#include "unit.h"

#include "group_layer_norm_unit.h"
#include "moe_unit.h"
#include "relu_attention_unit.h"
#include "rq_nearest_unit.h"

namespace genrec {

const Unit UNIT = {UNIT_NAME, relu_attention_unit(), group_layer_norm_unit(), moe_unit(), rq_nearest_unit()};

}  // namespace genrec
