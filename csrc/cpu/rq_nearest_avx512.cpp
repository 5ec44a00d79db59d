// x86-64 with AVX-512; setup.py compiles this file, and only this one, with -mavx512f.
#if defined(__x86_64__)
#define UNIT nearest_avx512
#define UNIT_NAME "avx512"
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#include "rq_nearest_tile.h"
#endif
