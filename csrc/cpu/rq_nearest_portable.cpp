// Any CPU: 128-bit vectors are SSE2 on x86-64 and NEON on arm64.
#define UNIT nearest_portable
#define UNIT_NAME "portable"
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#include "rq_nearest_tile.h"
