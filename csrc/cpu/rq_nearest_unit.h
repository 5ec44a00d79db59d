// A register tile of a matrix product whose epilogue keeps a running argmin instead of storing the distances.
// Products are accumulated feature by feature in one order, so equal codes get equal distances wherever they lie.
#pragma once

#include "rq_nearest.h"
#include "simd.h"

namespace genrec {
namespace {

constexpr int64_t kVectors = 2;     // vectors of codes per panel
constexpr int64_t kPanelBlock = 8;  // panels that stay in the L2 cache while all rows pass over them

template <typename T>
inline void tile(const T* rows, int64_t dim, const T* panel, const T* squares, int64_t first, T* best,
                 typename IndexOf<T>::type* index) {
  using Value = Vec<T>;
  using Index = Ints<T>;
  constexpr int64_t width = kWidth<T>, lanes = kVectors * width;

  Value dot[TILE_ROWS][kVectors] = {};
  for (int64_t d = 0; d < dim; d++) {
    Value code[kVectors];
    for (int64_t h = 0; h < kVectors; h++) code[h] = load(panel + d * lanes + h * width);
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      const T feature = rows[r * dim + d];
#pragma GCC unroll 2
      for (int64_t h = 0; h < kVectors; h++) dot[r][h] += feature * code[h];
    }
  }
#pragma GCC unroll 2
  for (int64_t h = 0; h < kVectors; h++) {
    const Value square = load(squares + h * width);
    Index candidate;
    for (int64_t j = 0; j < width; j++) candidate[j] = first + h * width + j;
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      const int64_t at = r * lanes + h * width;
      const Value distance = square - T(2) * dot[r][h], old = load(best + at);
      const Index old_index = load_bits<Index>(index + at), closer = distance < old;
      store(best + at, closer ? distance : old);
      store_bits(index + at, closer ? candidate : old_index);
    }
  }
}

template <typename T>
void search(const T* rows, int64_t count, int64_t dim, const T* packed, const T* squares, int64_t panels, T* best,
            typename IndexOf<T>::type* index, int64_t* codes, int64_t stride) {
  constexpr int64_t lanes = kVectors * kWidth<T>;
  const int64_t padded = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  for (int64_t i = 0; i < padded * lanes; i++) {
    best[i] = T(__builtin_inf());
    index[i] = 0;
  }
  for (int64_t p0 = 0; p0 < panels; p0 += kPanelBlock) {
    const int64_t p1 = p0 + kPanelBlock < panels ? p0 + kPanelBlock : panels;
    for (int64_t i = 0; i < padded; i += TILE_ROWS)
      for (int64_t p = p0; p < p1; p++)
        tile(rows + i * dim, dim, packed + p * dim * lanes, squares + p * lanes, p * lanes, best + i * lanes,
             index + i * lanes);
  }
  for (int64_t i = 0; i < count; i++) {
    const T* distance = best + i * lanes;
    const auto* candidate = index + i * lanes;
    int64_t winner = 0;
    for (int64_t j = 1; j < lanes; j++)
      if (distance[j] < distance[winner] || (distance[j] == distance[winner] && candidate[j] < candidate[winner]))
        winner = j;
    codes[i * stride] = candidate[winner];
  }
}

template <typename T>
constexpr Nearest<T> nearest() {
  return {kVectors * kWidth<T>, TILE_ROWS, search<T>};
}

constexpr RqNearest rq_nearest_unit() { return {nearest<float>(), nearest<double>()}; }

}  // namespace
}  // namespace genrec
