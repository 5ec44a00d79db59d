// Gradients of the experts. G, U and the activations are computed again, tile by tile: nothing is kept from the forward pass.
#pragma once

#include "moe_tile.h"

namespace genrec {
namespace {

// One block of columns at a time: G and U recomputed, B = dY Wd, and all that SwiGLU's backward pass makes of them.
template <typename S>
void differentiate(const Experts<Compute<S>>& all, int64_t expert, int64_t begin, int64_t end, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t width = kWidth<C>, columns = kTileColumns<C>;
  const Range rows(all, expert);
  const S* down = weights_of<S>(all.down, expert, all.down_expert);
  const int64_t panel = columns * all.dim, three = panel * (kTileVectors + 1);
  for_groups(begin, end, rows.count, three * sizeof(C), [&](int64_t block, int64_t last) {
    for (int64_t b = block; b < last; b++) {
      C* to = packed + (b - block) * three;
#pragma GCC unroll 4
      for (int h = 0; h < kTileVectors; h++) pack_gate_up<S>(all, expert, b * columns + h * width, to + h * panel);
      pack_rows([&](int64_t d) { return down + d * all.down_row + b * columns; }, all.dim,
                all.hidden - b * columns < columns ? all.hidden - b * columns : columns, to + kTileVectors * panel);
    }
    for_row_tiles(rows.count, [&](int64_t row, auto count) {
      const int64_t r = rows.first + row;
      const C *x[count.value], *grad[count.value];
      gather(x, all.x, all.x_stride, all.token + r);
      gather(grad, all.grad, all.grad_stride, all.token + r);
      for (int64_t b = block; b < last; b++) {
        const C* from = packed + (b - block) * three;
        Tile<count.value, C> product[kTileVectors + 1];  // in memory: together they are more than the registers hold
        for (int h = 0; h <= kTileVectors; h++) {
          Tile<count.value, C> tile = {};
          multiply(tile, h < kTileVectors ? x : grad, 1, from + h * panel, columns, all.dim);
          product[h] = tile;
        }
        for (int i = 0; i < count.value; i++) {
          const C weight = all.weights[all.pair[r + i]];
          Vec<C> dot = {};
          for (int h = 0; h < kTileVectors; h++) {
            const int64_t at = (r + i) * all.hidden_stride + b * columns + h * width;
            const Vec<C> gate = product[h].sum[i][0], up = product[h].sum[i][1];
            const Vec<C> sigmoid = 1 / (1 + exponential(-gate)), silu = gate * sigmoid, active = silu * up;
            const Vec<C> unweighted = product[kTileVectors].sum[i][h], grad_active = weight * unweighted;
            dot += unweighted * active;
            store(all.activation + at, weight * active);
            store(all.grad_up + at, grad_active * silu);
            store(all.grad_gate + at, grad_active * up * (sigmoid + silu * (1 - sigmoid)));
          }
          all.dots[all.pair[r + i] * (all.hidden_stride / columns) + b] = sum<C>(dot);
        }
      }
    });
  });
}

template <typename S>
void project_back(const Experts<Compute<S>>& all, int64_t expert, int64_t begin, int64_t end, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t columns = kTileColumns<C>;
  const Range rows(all, expert);
  const S* gate_up = weights_of<S>(all.gate_up, expert, all.gate_up_expert);
  const int64_t panel = columns * 2 * all.hidden;
  for_groups(begin, end, rows.count, panel * sizeof(C), [&](int64_t block, int64_t last) {
    const int64_t beyond = last * columns < all.dim ? last * columns : all.dim;
    pack_rows([&](int64_t f) { return gate_up + f * all.gate_up_row + block * columns; }, 2 * all.hidden,
              beyond - block * columns, packed);
    for_row_tiles(rows.count, [&](int64_t row, auto count) {
      const int64_t r = rows.first + row, at = r * all.hidden_stride;
      for (int64_t b = block; b < last; b++) {
        const C* gate = packed + (b - block) * panel;
        Tile<count.value, C> tile = {};
        multiply(tile, all.grad_gate + at, all.hidden_stride, 1, gate, columns, all.hidden);
        multiply(tile, all.grad_up + at, all.hidden_stride, 1, gate + columns * all.hidden, columns, all.hidden);
#pragma GCC unroll 16
        for (int i = 0; i < count.value; i++)
#pragma GCC unroll 4
          for (int h = 0; h < kTileVectors; h++)
            store(all.by_pair + all.pair[r + i] * all.dim_stride + b * columns + h * kWidth<C>, tile.sum[i][h]);
      }
    });
  });
}

// TILE_ROWS columns of a from `column` on, step by step: packed[d * TILE_ROWS + i] = a(d)[column + i], i < count.
template <typename C, typename Row>
inline void pack_columns_of_tile(Row&& a, int64_t depth, int64_t column, int64_t count, int64_t columns, C* packed) {
  constexpr int64_t width = kWidth<C>, vectors = (TILE_ROWS + width - 1) / width;
  if (column + vectors * width <= columns) {  // whole vectors; what they hold beyond the tile is overwritten by the next step
    for (int64_t d = 0; d < depth; d++)
      for (int64_t v = 0; v < vectors; v++) store(packed + d * TILE_ROWS + v * width, load(a(d) + column + v * width));
  } else {
    for (int64_t d = 0; d < depth; d++)
      for (int64_t i = 0; i < count; i++) packed[d * TILE_ROWS + i] = a(d)[column + i];
  }
}

// Stores the first `columns` columns of the tile, or adds them to what is there.
template <typename G, int ROWS, typename C>
inline __attribute__((always_inline)) void put(const Tile<ROWS, C>& tile, G* to, int64_t stride, int64_t columns, bool first) {
  constexpr int64_t width = kWidth<C>;
  if (columns >= kTileColumns<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int h = 0; h < kTileVectors; h++) {
        G* at = to + i * stride + h * width;
        store(at, first ? tile.sum[i][h] : load(at) + tile.sum[i][h]);
      }
  } else {
    const Tile<ROWS, C> copy = tile;  // so that the tile itself may stay in registers
    C sums[ROWS][kTileColumns<C>];
    __builtin_memcpy(sums, &copy, sizeof(sums));
    for (int i = 0; i < ROWS; i++)
      for (int64_t j = 0; j < columns; j++) {
        G& at = to[i * stride + j];
        at = narrow<G>(first ? sums[i][j] : widen(at) + sums[i][j]);
      }
  }
}

// out (m, n) = Σ_r a(r)ᵀ b(r), or added to out, over the rows in their order; a(r) has m numbers, b(r) has n.
template <typename G, typename C, typename A, typename B>
inline void outer_products(A&& a, int64_t m, B&& b, int64_t n, int64_t rows, bool first, G* out, int64_t stride, C* packed) {
  constexpr int64_t columns = kTileColumns<C>;
  const int64_t room = (n + columns - 1) / columns * columns * (rows < kDepthBlock ? rows : kDepthBlock);
  C* packed_a = packed + room;
  for (int64_t block = 0; block < rows; block += kDepthBlock, first = false) {
    const int64_t depth = rows - block < kDepthBlock ? rows - block : kDepthBlock;
    pack_rows([&](int64_t d) { return b(block + d); }, depth, n, packed);
    for_row_tiles(m, [&](int64_t i0, auto count) {
      pack_columns_of_tile([&](int64_t d) { return a(block + d); }, depth, i0, count.value, m, packed_a);
      for (int64_t p = 0; p < n; p += columns) {
        Tile<count.value, C> tile = {};
        G* to = out + i0 * stride + p;
        for (int i = 0; i < count.value; i++) __builtin_prefetch(to + i * stride, 1);  // or the stores wait at the end
        multiply(tile, packed_a, 1, TILE_ROWS, packed + p * depth, columns, depth);
        put(tile, to, stride, n - p, first);
      }
    });
  }
}

// Blocks of D; what is packed of x serves all 2F rows.
template <typename G, typename C>
void gradient_gate_up(const Experts<C>& all, int64_t expert, int64_t begin, int64_t end, C* packed) {
  constexpr int64_t columns = kTileColumns<C>;
  const Range rows(all, expert);
  const int64_t size = all.hidden * all.dim;
  G* out = static_cast<G*>(all.grad_gate_up) + expert * 2 * size;
  for_groups(begin, end, 1 << 20, columns * kDepthBlock * sizeof(C), [&](int64_t block, int64_t last) {
    const int64_t column = block * columns, n = (last * columns < all.dim ? last * columns : all.dim) - column;
    const auto x = [&](int64_t r) { return all.x + all.token[rows.first + r] * all.x_stride + column; };
    const auto half = [&](const C* grad, G* to) {
      outer_products([&](int64_t r) { return grad + (rows.first + r) * all.hidden_stride; }, all.hidden, x, n, rows.count,
                     all.first, to + column, all.dim, packed);
    };
    half(all.grad_gate, out);
    half(all.grad_up, out + size);
  });
}

// Blocks of F.
template <typename G, typename C>
void gradient_down(const Experts<C>& all, int64_t expert, int64_t begin, int64_t end, C* packed) {
  constexpr int64_t columns = kTileColumns<C>;
  const Range rows(all, expert);
  G* out = static_cast<G*>(all.grad_down) + expert * all.hidden * all.dim;
  for_groups(begin, end, 1 << 20, columns * kDepthBlock * sizeof(C), [&](int64_t block, int64_t last) {
    const int64_t column = block * columns, n = (last * columns < all.hidden ? last * columns : all.hidden) - column;
    outer_products([&](int64_t r) { return all.grad + all.token[rows.first + r] * all.grad_stride; }, all.dim,
                   [&](int64_t r) { return all.activation + (rows.first + r) * all.hidden_stride + column; }, n, rows.count,
                   all.first, out + column, all.hidden, packed);
  });
}

}  // namespace
}  // namespace genrec
