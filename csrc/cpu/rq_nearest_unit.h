// A register tile of a matrix product whose epilogue keeps a running argmin instead of storing the distances.
//
// The vectors' lanes are rows, and the codes' elements are broadcast from where they lie: only the rows are ever packed, and
// each lane finds its own minimum as the codes pass by. A block of codes stays in the L2 cache while all panels of rows pass
// over it, a panel in the L1 cache while it does. Products are summed feature by feature in one order, so equal codes get
// equal distances wherever they lie, and a row's distances do not depend on its neighbours.
#pragma once

#include "product.h"
#include "rq_nearest.h"

namespace genrec {
namespace {

constexpr int64_t kCodeBytes = 192 << 10;  // of codes in cache

// Codes in a block: whole tiles of both forms.
template <typename C>
inline int64_t codes_in_block(int64_t dim) {
  const int64_t tiles = kCodeBytes / (int64_t(sizeof(C)) * 2 * TILE_ROWS * (dim + 1));
  return 2 * TILE_ROWS * (tiles < 1 ? 1 : tiles > 32 ? 32 : tiles);
}

template <typename C>
int64_t scratch_size(int64_t dim) {
  return codes_in_block<C>(dim) * (dim + 1);
}

template <typename S>
inline const S* code_at(const Codes& codes, int64_t k) {
  return static_cast<const S*>(codes.data) + k * codes.stride;
}

template <typename C>
void pack_residuals(const C* x, int64_t row, int64_t column, int64_t rows, int64_t dim, C* panels) {
  constexpr int64_t lanes = kTileColumns<C>;
  for (int64_t i = 0; i < rows; i += lanes, panels += lanes * dim)
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t d = 0; d < dim; d++)
        panels[d * lanes + lane] = i + lane < rows ? x[(i + lane) * row + d * column] : C(0);
}

template <typename C>
inline C squared_norm(const C* code, int64_t dim) {
  Vec<C> total[4] = {};
  int64_t d = 0;
  for (; d + 4 * kWidth<C> <= dim; d += 4 * kWidth<C>)
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      const Vec<C> part = load(code + d + h * kWidth<C>);
      total[h] += part * part;
    }
  C rest = 0;
  for (; d < dim; d++) rest += code[d] * code[d];
  return sum<C>((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

// The running minimum of the rows in VECTORS vectors of a panel.
template <typename C, int VECTORS>
struct Best {
  Vec<C> distance[VECTORS];
  Ints<C> index[VECTORS];
};

// Offers codes first … first + CODES - 1, of which `codes` is the first, to the rows.
template <int CODES, typename C, int VECTORS>
inline void offer(const C* panel, int64_t dim, const C* codes, int64_t stride, const C* squares, int64_t first,
                  Best<C, VECTORS>& best) {
  Tile<CODES, C, VECTORS> dot = {};
  multiply(dot, codes, stride, 1, panel, kTileColumns<C>, dim);
#pragma GCC unroll 32
  for (int k = 0; k < CODES; k++)
#pragma GCC unroll 4
    for (int h = 0; h < VECTORS; h++) {
      const Vec<C> distance = squares[k] - C(2) * dot.sum[k][h];
      const auto closer = distance < best.distance[h];
      best.distance[h] = closer ? distance : best.distance[h];
      best.index[h] = closer ? Ints<C>{} + decltype(+best.index[h][0])(first + k) : best.index[h];
    }
}

// All codes of a block for the first VECTORS vectors of a panel: the fewer vectors, the more codes in a tile.
template <int VECTORS, typename C>
inline void offer_block(const C* panel, int64_t dim, const C* codes, int64_t stride, const C* squares, int64_t first,
                        int64_t count, C* distance, typename IndexOf<C>::type* index) {
  constexpr int tile = TILE_ROWS * kTileVectors / VECTORS;
  Best<C, VECTORS> best;
  for (int h = 0; h < VECTORS; h++) {
    best.distance[h] = load(distance + h * kWidth<C>);
    best.index[h] = load_bits<Ints<C>>(index + h * kWidth<C>);
  }
  int64_t k = 0;
  for (; k + tile <= count; k += tile)
    offer<tile>(panel, dim, codes + k * stride, stride, squares + k, first + k, best);
  with_rows<tile>(count - k, [&](auto rest) {
    offer<rest.value>(panel, dim, codes + k * stride, stride, squares + k, first + k, best);
  });
  for (int h = 0; h < VECTORS; h++) {
    store(distance + h * kWidth<C>, best.distance[h]);
    store_bits(index + h * kWidth<C>, best.index[h]);
  }
}

template <typename S>
void search(const Compute<S>* panels, int64_t rows, const Codes& codes, int64_t first, int64_t last, Compute<S>* scratch,
            Compute<S>* distance, typename IndexOf<Compute<S>>::type* index) {
  using C = Compute<S>;
  constexpr int64_t lanes = kTileColumns<C>;
  const int64_t dim = codes.dim, block = codes_in_block<C>(dim);
  for (int64_t i = 0; i < (rows + lanes - 1) / lanes * lanes; i++) {
    distance[i] = C(__builtin_inf());
    index[i] = first;
  }
  C *squares = scratch, *copy = scratch + block;
  for (int64_t k = first; k < last; k += block) {
    const int64_t count = last - k < block ? last - k : block;
    const C* data;
    int64_t stride = dim;
    if constexpr (sizeof(S) == sizeof(C)) {
      data = code_at<S>(codes, k);
      stride = codes.stride;
    } else {
      for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < dim; d++) copy[j * dim + d] = widen(code_at<S>(codes, k + j)[d]);
      data = copy;
    }
    for (int64_t j = 0; j < count; j++) squares[j] = squared_norm(data + j * stride, dim);
    for (int64_t i = 0; i < rows; i += lanes) {
      if (rows - i > kWidth<C>)
        offer_block<kTileVectors>(panels + i * dim, dim, data, stride, squares, k, count, distance + i, index + i);
      else
        offer_block<1>(panels + i * dim, dim, data, stride, squares, k, count, distance + i, index + i);
    }
  }
}

template <typename S>
void take(const Codes& codes, const int64_t* chosen, int64_t step, int64_t rows, Compute<S>* total, Compute<S>* panels) {
  using C = Compute<S>;
  constexpr int64_t lanes = kTileColumns<C>;
  const int64_t dim = codes.dim;
  for (int64_t i = 0; i < rows; i++) {
    const S* code = code_at<S>(codes, chosen[i * step]);
    for (int64_t d = 0; d < dim; d++) total[i * dim + d] += widen(code[d]);
    if (!panels) continue;
    C* row = panels + i / lanes * lanes * dim + i % lanes;
    for (int64_t d = 0; d < dim; d++) row[d * lanes] -= widen(code[d]);
  }
}

template <typename S>
constexpr Nearest<Compute<S>> nearest() {
  using C = Compute<S>;
  return {kTileColumns<C>, scratch_size<C>, pack_residuals<C>, search<S>, take<S>};
}

constexpr RqNearest rq_nearest_unit() { return {nearest<float>(), nearest<bfloat16>(), nearest<double>()}; }

}  // namespace
}  // namespace genrec
