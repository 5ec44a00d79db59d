// x86-64 with AVX-512 F and BW; setup.py compiles this file, and only this one, with -mavx512f -mavx512bw.
#if defined(__x86_64__)
#define UNIT unit_avx512
#define UNIT_NAME "avx512"
#define VECTOR_BYTES 64
#define TILE_ROWS 12
#include "all_units.h"
#endif
