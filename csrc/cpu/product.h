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

// tile += a · b, where row r of a starts at a[r], its elements a_step apart, and b is (depth, columns of the tile), contiguous
// along the columns.
template <int ROWS, typename C, int VECTORS>
inline __attribute__((always_inline)) void multiply(Tile<ROWS, C, VECTORS>& tile, const C* const (&a)[ROWS], int64_t a_step,
                                                    const C* b, int64_t b_step, int64_t depth) {
  for (int64_t d = 0; d < depth; d++) {
    Vec<C> columns[VECTORS];
#pragma GCC unroll 4
    for (int h = 0; h < VECTORS; h++) columns[h] = load(b + d * b_step + h * kWidth<C>);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++) {
      const C value = a[r][d * a_step];
#pragma GCC unroll 4
      for (int h = 0; h < VECTORS; h++) tile.sum[r][h] += value * columns[h];
    }
  }
}

// The same for rows of a that are a_row apart.
template <int ROWS, typename C, int VECTORS>
inline __attribute__((always_inline)) void multiply(Tile<ROWS, C, VECTORS>& tile, const C* a, int64_t a_row, int64_t a_step,
                                                    const C* b, int64_t b_step, int64_t depth) {
  const C* rows[ROWS];
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; r++) rows[r] = a + r * a_row;
  multiply(tile, rows, a_step, b, b_step, depth);
}

template <int N> struct Constant { static constexpr int value = N; };

// call(Constant<n>()) for n = count ≤ TILE_ROWS: a tile of fewer rows is another instance, not a branch inside it.
template <int N = TILE_ROWS, typename Call>
inline void with_rows(int64_t count, Call&& call) {
  if (count == N) return call(Constant<N>());
  if constexpr (N > 1) with_rows<N - 1>(count, call);
}

// call(first, Constant<n>()) for tiles that cover `rows` rows. What is left beside high tiles is cut as evenly as it can be: a
// tile of one or two rows waits for its own sums longer than it computes.
template <typename Call>
inline void for_row_tiles(int64_t rows, Call&& call) {
  constexpr int64_t most = TILE_ROWS < 6 ? TILE_ROWS : 6;  // every other size is another instance to compile
  int64_t first = 0;
  if constexpr (TILE_ROWS > most)
    for (; first + TILE_ROWS <= rows; first += TILE_ROWS) call(first, Constant<TILE_ROWS>());
  const int64_t left = rows - first, tiles = (left + most - 1) / most;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t begin = left * i / tiles;
    with_rows<most>(left * (i + 1) / tiles - begin, [&](auto count) { call(first + begin, count); });
  }
}

template <int... I> struct Lanes {};
template <int N, int... I> struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I> struct FirstLanes<0, I...> { using type = Lanes<I...>; };

// Swaps the lanes of a whose number has the bit DISTANCE with the lanes of b, DISTANCE lower, that have not.
template <typename C, int DISTANCE, int... I>
inline __attribute__((always_inline)) void exchange(Vec<C>& a, Vec<C>& b, Lanes<I...>) {
  constexpr int width = sizeof...(I);
  const Vec<C> low = __builtin_shufflevector(a, b, ((I & DISTANCE) ? I - DISTANCE + width : I)...);
  b = __builtin_shufflevector(a, b, ((I & DISTANCE) ? I + width : I + DISTANCE)...);
  a = low;
}

// A square of kWidth vectors transposed in registers: its quarters, then the quarters' quarters …
template <typename C, int DISTANCE = kWidth<C> / 2>
inline __attribute__((always_inline)) void transpose(Vec<C> (&square)[kWidth<C>]) {
  if constexpr (DISTANCE > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<C>; i++)
      if (!(i & DISTANCE))
        exchange<C, DISTANCE>(square[i], square[i + DISTANCE], typename FirstLanes<kWidth<C>>::type());
    transpose<C, DISTANCE / 2>(square);
  }
}

// A vector register read from one row of b_T is one step of the depth in each lane, or two of them in bfloat16.
template <typename S> constexpr int64_t kSteps = sizeof(Compute<S>) / sizeof(S);

// packed[d * kTileColumns + j] = b_T[j][d] for j < kWidth, 0 for j ≥ n: one vector of a panel's columns.
template <typename S>
inline void pack_columns(const S* b_T, int64_t stride, int64_t n, int64_t depth, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t width = kWidth<C>, step = kTileColumns<C>;
  const S* rows[width];
  Ints<C> used = {};
  for (int64_t j = 0; j < width; j++) {
    rows[j] = b_T + (j < n ? j : 0) * stride;
    used[j] = j < n ? -1 : 0;
  }
  if (n <= 0) {
    for (int64_t d = 0; d < depth; d++) store(packed + d * step, Vec<C>{});
    return;
  }
  int64_t d = 0;
  for (; d + width * kSteps<S> <= depth; d += width * kSteps<S>) {
    Vec<C> square[width];
#pragma GCC unroll 16
    for (int64_t j = 0; j < width; j++) {
      square[j] = load_bits<Vec<C>>(rows[j] + d);
      __builtin_prefetch(rows[j] + d + width * stride);  // the next columns: a matrix from memory arrives twice as fast
    }
    transpose<C>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < width; i++) {
      const Ints<C> bits = (Ints<C>)square[i] & used;
      C* to = packed + (d + i * kSteps<S>) * step;
      if constexpr (kSteps<S> == 1) {
        store_bits(to, bits);
      } else {  // a pair of bfloat16, the lower half first
        store_bits(to, bits << 16);
        store_bits(to + step, bits & int32_t(0xffff0000));
      }
    }
  }
  for (; d < depth; d++)
    for (int64_t j = 0; j < width; j++) packed[d * step + j] = j < n ? widen(rows[j][d]) : C(0);
}

// Panels of b (depth, n) given by its transpose b_T (n, depth): panel p holds the columns from p · kTileColumns on, step by
// step, and the last is filled up with zeros. packed has room for depth · n rounded up to kTileColumns.
template <typename S>
inline void pack_transposed(const S* b_T, int64_t stride, int64_t n, int64_t depth, Compute<S>* packed) {
  using C = Compute<S>;
  for (int64_t p = 0; p < n; p += kTileColumns<C>, packed += kTileColumns<C> * depth)
    for (int64_t j = p; j < p + kTileColumns<C>; j += kWidth<C>)
      pack_columns(b_T + j * stride, stride, n - j, depth, packed + (j - p));
}

// The same panels from b itself: row(d) is where its n columns of step d start.
template <typename C, typename Row>
inline void pack_rows(Row&& row, int64_t depth, int64_t n, C* packed) {
  constexpr int64_t width = kWidth<C>, columns = kTileColumns<C>;
  for (int64_t d = 0; d < depth; d++) {
    const auto* from = row(d);
    C* to = packed + d * columns;
    for (int64_t p = 0; p < n; p += columns) __builtin_prefetch(from + n + p);  // the next panels of this step
    for (int64_t p = 0; p < n; p += columns, to += depth * columns)
#pragma GCC unroll 4
      for (int64_t j = 0; j < columns; j += width)
        store(to + j, load_some(from + p + j, n - p - j));
  }
}

}  // namespace
}  // namespace genrec
