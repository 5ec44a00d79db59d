// The backward pass of ReLU attention, from q, k, v and the gradient alone: the weights are computed again.
//
//     P = mask ⊙ relu(scale · Q Kᵀ + bias)     G = dO / n     dS = (G Vᵀ) ⊙ [P > 0]
//     dV = Pᵀ G     dK = dSᵀ (scale · Q)     dQ = scale · dS K     dbias[distance] += dS
//
// A block of keys stays in cache while all rows pass by; its dK and dV are finished then, and dQ grows from one to the next.
#pragma once

#include "relu_attention_tiles.h"

namespace genrec {
namespace {

template <typename C>
struct BackwardScratch {
  C *q, *grad, *grad_q;                          // all rows
  C *k_panels, *v_panels, *k, *grad_k, *grad_v;  // a block of keys
  C *weights, *grad_scores, *by_distance;
  int64_t size;

  BackwardScratch(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v, C* memory) {
    Scratch<C> scratch{memory};
    q = scratch.take(rows * pitch<C>(dim));
    grad = scratch.take(rows * pitch<C>(dim_v));
    grad_q = scratch.take(rows * pitch<C>(dim));
    by_distance = scratch.take(keys + most(rows, keys + 1) + kTileColumns<C>);
    keys = least(keys, kKeys);
    k_panels = scratch.take(pitch<C>(keys) * dim);
    v_panels = scratch.take(pitch<C>(keys) * dim_v);
    k = scratch.take(keys * pitch<C>(dim));
    grad_k = scratch.take(keys * pitch<C>(dim));
    grad_v = scratch.take(keys * pitch<C>(dim_v));
    weights = scratch.take(least(rows, kRows) * kPitch<C>);
    grad_scores = scratch.take(least(rows, kRows) * kPitch<C>);
    size = scratch.used;
  }
};

template <typename C>
int64_t backward_scratch(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v) {
  return BackwardScratch<C>(rows, keys, dim, dim_v, nullptr).size;
}

// dS of a block in the tiles that have positive weights; the others are not touched.
template <typename C>
inline void score_gradients(const Weights<C>& weights, int64_t rows, int64_t keys, int64_t dim_v, const C* grad, const C* v_panels,
                            C* grad_scores) {
  constexpr int64_t panel = kTileColumns<C>;
  for (int64_t p = 0; p * panel < keys; p++)
    for (uint64_t left = weights.by_panel[p]; left; left &= left - 1) {
      const int64_t i = __builtin_ctzll(left) * TILE_ROWS, at = i * kPitch<C> + p * panel;
      with_rows(least(TILE_ROWS, rows - i), [&](auto count) {
        Tile<count.value, C> tile = {};
        multiply(tile, grad + i * pitch<C>(dim_v), pitch<C>(dim_v), 1, v_panels + p * panel * dim_v, panel, dim_v);
#pragma GCC unroll 16
        for (int r = 0; r < count.value; r++)
#pragma GCC unroll 4
          for (int h = 0; h < kTileVectors; h++) {
            const int64_t lane = at + r * kPitch<C> + h * kWidth<C>;
            store(grad_scores + lane, load(weights.value + lane) <= 0 ? Vec<C>{} : tile.sum[r][h]);
          }
      });
    }
}

// sums (keys, columns) += aᵀ · b, where a is P or dS of a block and b (rows, columns).
template <typename C>
inline void add_by_keys(const Weights<C>& weights, const C* a, int64_t keys, const C* b, int64_t columns, int64_t rows,
                        bool finite, C* sums) {
  constexpr int64_t panel = kTileColumns<C>;
  for (int64_t column = 0; column < columns; column += panel)
    for (int64_t p = 0; p * panel < keys; p++)
      if (weights.by_panel[p])
        for (int64_t j = p * panel; j < least(keys, (p + 1) * panel); j += TILE_ROWS)
          add_product<true>(sums, j, least(TILE_ROWS, least(keys, (p + 1) * panel) - j), column, columns, a, b, rows,
                            weights.by_panel[p], TILE_ROWS, finite);
}

// Sums of dS over equal j - anchor, which run from `low` on.
template <typename C>
struct ByDistance {
  const Block<C>& block;
  C* sums;
  int64_t low, size;

  ByDistance(const Block<C>& block, int64_t first, int64_t last, C* memory) : block(block), sums(memory) {
    int64_t least_anchor = block.rows ? block.anchor[0] : 0, most_anchor = least_anchor;
    for (int64_t i = 1; i < block.rows; i++) {
      least_anchor = least(least_anchor, block.anchor[i]);
      most_anchor = most(most_anchor, block.anchor[i]);
    }
    low = first - most_anchor;
    size = last + kTileColumns<C> - least_anchor - low;
    clear(sums, size);
  }

  void add(const Weights<C>& weights, const C* grad_scores, int64_t row, int64_t rows, int64_t key) {
    for (int64_t i = 0; i < rows; i++)
      for (uint64_t left = weights.by_group[i / TILE_ROWS]; left; left &= left - 1)
        for (int64_t h = 0; h < kTileColumns<C>; h += kWidth<C>) {
          const int64_t j = __builtin_ctzll(left) * kTileColumns<C> + h;
          C* sum = sums + (key + j - block.anchor[row + i] - low);
          store(sum, load(sum) + load(grad_scores + i * kPitch<C> + j));
        }
  }

  void finish(C* grad_bias, int64_t distances) {
    clear(grad_bias, distances);
    for (int64_t s = 0; s < size; s++) {
      const int64_t distance = most(low + s, -low - s);
      grad_bias[least(distance, distances - 1)] += sums[s];
    }
    clear(sums, size);
  }
};

template <typename S>
void attention_backward(const Block<Compute<S>>& block, const Gradients<Compute<S>>& to, int64_t first, int64_t last,
                        Compute<S>* memory) {
  using C = Compute<S>;
  const int64_t dim = block.dim, dim_v = block.dim_v, wide = pitch<C>(dim), wide_v = pitch<C>(dim_v);
  const BackwardScratch<C> scratch(block.rows, block.keys, dim, dim_v, memory);
  const auto same = [](Vec<C> value, int64_t) { return value; };
  const bool finite_q =
      pack_rows<S>(block.q, 0, block.rows, dim, scratch.q, [&](Vec<C> q, int64_t) { return q * block.scale; });
  const bool finite_grad =
      pack_rows<S>(to.grad, 0, block.rows, dim_v, scratch.grad, [&](Vec<C> g, int64_t i) { return g / block.divisor[i]; });
  clear(scratch.grad_q, block.rows * wide);
  ByDistance<C> by_distance(block, first, last, scratch.by_distance);
  Weights<C> weights;
  weights.value = scratch.weights;

  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t keys = least(kKeys, last - key);
    pack_panels<S>(block.k, key, keys, dim, scratch.k_panels);
    pack_panels<S>(block.v, key, keys, dim_v, scratch.v_panels);
    const bool finite_k = pack_rows<S>(block.k, key, keys, dim, scratch.k, same);
    clear(scratch.grad_k, keys * wide);
    clear(scratch.grad_v, keys * wide_v);

    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rows = least(kRows, block.rows - row);
      const Sight sight(block.end + row, rows);
      if (sight.furthest <= key) continue;
      const C *q = scratch.q + row * wide, *grad = scratch.grad + row * wide_v;
      weigh(block, sight, row, rows, key, keys, q, scratch.k_panels, weights);
      score_gradients(weights, rows, keys, dim_v, grad, scratch.v_panels, scratch.grad_scores);
      if (to.grad_k.data) {
        add_by_keys(weights, weights.value, keys, grad, dim_v, rows, finite_grad, scratch.grad_v);
        add_by_keys(weights, scratch.grad_scores, keys, q, dim, rows, finite_q, scratch.grad_k);
      }
      if (to.grad_q.data)
        add_by_rows(weights, scratch.grad_scores, sight, rows, key, keys, scratch.k, dim, finite_k, scratch.grad_q + row * wide);
      if (to.grad_bias) by_distance.add(weights, scratch.grad_scores, row, rows, key);
    }
    if (to.grad_k.data) {
      unpack_rows<S>(scratch.grad_k, to.grad_k, key, keys, dim, same);
      unpack_rows<S>(scratch.grad_v, to.grad_v, key, keys, dim_v, same);
    }
    if (to.grad_bias && ((key + kKeys) % to.span == 0 || key + kKeys >= last))
      by_distance.finish(to.grad_bias + key / to.span * to.distances, to.distances);
  }
  if (to.grad_q.data)
    unpack_rows<S>(scratch.grad_q, to.grad_q, 0, block.rows, dim, [&](Vec<C> sum, int64_t) { return sum * block.scale; });
}

}  // namespace
}  // namespace genrec
