// The register tile of all matrix products: TILE_ROWS rows by kTileVectors vectors of columns stay in registers while the
// depth runs. Every element is summed over the depth in one order, whatever the tile it falls into, so a row's result does
// not depend on the rows beside it.
#pragma once

#include "simd.h"

namespace genrec {
namespace {

constexpr int kTileVectors = 2;
template <typename C> constexpr int64_t kTileColumns = kTileVectors * kWidth<C>;

template <int ROWS, typename C, int VECTORS = kTileVectors>
struct Tile {
  Vec<C> sum[ROWS][VECTORS];
};

// tile += a · b, where a is (ROWS, depth) with any strides and b is (depth, columns of the tile), contiguous along the
// columns.
template <int ROWS, typename C, int VECTORS>
inline __attribute__((always_inline)) void multiply(Tile<ROWS, C, VECTORS>& tile, const C* a, int64_t a_row, int64_t a_step, const C* b, int64_t b_step,
                     int64_t depth) {
  for (int64_t d = 0; d < depth; d++) {
    Vec<C> columns[VECTORS];
#pragma GCC unroll 4
    for (int h = 0; h < VECTORS; h++) columns[h] = load(b + d * b_step + h * kWidth<C>);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++) {
      const C value = a[r * a_row + d * a_step];
#pragma GCC unroll 4
      for (int h = 0; h < VECTORS; h++) tile.sum[r][h] += value * columns[h];
    }
  }
}

template <int N> struct Constant { static constexpr int value = N; };

// call(Constant<n>()) for n = count ≤ TILE_ROWS: a tile of fewer rows is another instance, not a branch inside it.
template <int N = TILE_ROWS, typename Call>
inline void with_rows(int64_t count, Call&& call) {
  if (count == N) return call(Constant<N>());
  if constexpr (N > 1) with_rows<N - 1>(count, call);
}

// Panels of b (depth, n) given by its transpose b_T (n, depth): panel p holds the columns from p · kTileColumns on, step by
// step, and the last is filled up with zeros. packed has room for depth · n rounded up to kTileColumns.
template <typename S>
inline void pack_transposed(const S* b_T, int64_t stride, int64_t n, int64_t depth, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t columns = kTileColumns<C>;
  for (int64_t p = 0; p < n; p += columns, packed += columns * depth)
    for (int64_t j = 0; j < columns; j++)
      for (int64_t d = 0; d < depth; d++) packed[d * columns + j] = p + j < n ? widen(b_T[(p + j) * stride + d]) : C(0);
}

}  // namespace
}  // namespace genrec
