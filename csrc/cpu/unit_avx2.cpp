// x86-64 with AVX2 and FMA; setup.py compiles this file, and only this one, with -mavx2 -mfma.
#if defined(__x86_64__)
#define UNIT unit_avx2
#define UNIT_NAME "avx2"
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#include "all_units.h"
#endif
