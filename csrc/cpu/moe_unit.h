// The experts' products on tiles: rows are gathered while they are read and scattered while they are stored, blocks of an
// expert's weights are packed in cache and used for all its rows, SwiGLU happens between registers and the first store.
#pragma once

#include "moe_backward_unit.h"
#include "moe_route_unit.h"
#include "moe_tile.h"

namespace genrec {
namespace {

template <typename S>
void activate(const Experts<Compute<S>>& all, int64_t expert, int64_t begin, int64_t end, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t width = kWidth<C>;
  const Range rows(all, expert);
  const int64_t panel = kTileColumns<C> * all.dim;
  for_groups(begin, end, rows.count, panel * sizeof(C), [&](int64_t block, int64_t last) {
    for (int64_t b = block; b < last; b++) pack_gate_up<S>(all, expert, b * width, packed + (b - block) * panel);
    for_row_tiles(rows.count, [&](int64_t row, auto count) {
      const int64_t r = rows.first + row;
      const C* x[count.value];
      gather(x, all.x, all.x_stride, all.token + r);
      for (int64_t b = block; b < last; b++) {
        Tile<count.value, C> tile = {};
        multiply(tile, x, 1, packed + (b - block) * panel, kTileColumns<C>, all.dim);
#pragma GCC unroll 16
        for (int i = 0; i < count.value; i++) {
          const Vec<C> gate = tile.sum[i][0];
          store(all.activation + (r + i) * all.hidden_stride + b * width, gate / (1 + exponential(-gate)) * tile.sum[i][1]);
        }
      }
    });
  });
}

template <typename S>
void project(const Experts<Compute<S>>& all, int64_t expert, int64_t begin, int64_t end, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t columns = kTileColumns<C>;
  const Range rows(all, expert);
  const S* down = weights_of<S>(all.down, expert, all.down_expert);
  const int64_t panel = columns * all.hidden;
  for_groups(begin, end, rows.count, panel * sizeof(C), [&](int64_t block, int64_t last) {
    const int64_t beyond = last * columns < all.dim ? last * columns : all.dim;
    pack_transposed(down + block * columns * all.down_row, all.down_row, beyond - block * columns, all.hidden, packed);
    for_row_tiles(rows.count, [&](int64_t row, auto count) {
      const int64_t r = rows.first + row;
      for (int64_t b = block; b < last; b++) {
        Tile<count.value, C> tile = {};
        multiply(tile, all.activation + r * all.hidden_stride, all.hidden_stride, 1, packed + (b - block) * panel, columns,
                 all.hidden);
#pragma GCC unroll 16
        for (int i = 0; i < count.value; i++)
#pragma GCC unroll 4
          for (int h = 0; h < kTileVectors; h++)
            store(all.by_pair + all.pair[r + i] * all.dim_stride + b * columns + h * kWidth<C>,
                  all.weights[all.pair[r + i]] * tile.sum[i][h]);
      }
    });
  });
}

template <typename S>
void combine(const Experts<Compute<S>>& all, int64_t begin, int64_t end, void* out) {
  using C = Compute<S>;
  for (int64_t t = begin; t < end; t++)
    for (int64_t d = 0; d < all.dim; d += kWidth<C>) {
      Vec<C> total = {};
      for (int64_t j = 0; j < all.slots; j++) total += load(all.by_pair + (t * all.slots + j) * all.dim_stride + d);
      store_some(static_cast<S*>(out) + t * all.dim + d, total, all.dim - d);
    }
}

template <typename S>
constexpr MoeExperts<Compute<S>> moe_experts() {
  using C = Compute<S>;
  return {kWidth<C>, kTileColumns<C>, activate<S>, project<S>, differentiate<S>, project_back<S>, gradient_gate_up<S, C>,
          gradient_down<S, C>, gradient_gate_up<C, C>, gradient_down<C, C>, combine<S>};
}

constexpr Moe moe_unit() {
  return {moe_experts<float>(), moe_experts<bfloat16>(), moe_experts<double>(), moe_route<float>(), moe_route<double>()};
}

}  // namespace
}  // namespace genrec
