// Any CPU: 128-bit vectors are SSE2 on x86-64 and NEON on arm64.
#define UNIT unit_portable
#define UNIT_NAME "portable"
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#include "all_units.h"
