// The forward pass of ReLU attention: O = P V / n, block of keys by block of keys.
#pragma once

#include "relu_attention_backward_unit.h"
#include "relu_attention_tiles.h"

namespace genrec {
namespace {

template <typename C>
struct ForwardScratch {
  C *q, *out, *k, *v, *weights;
  int64_t size;

  ForwardScratch(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v, C* memory) {
    Scratch<C> scratch{memory};
    keys = least(keys, kKeys);
    q = scratch.take(rows * pitch<C>(dim));
    out = scratch.take(rows * pitch<C>(dim_v));
    k = scratch.take(pitch<C>(keys) * dim);
    v = scratch.take(keys * pitch<C>(dim_v));
    weights = scratch.take(rows * kPitch<C>);
    size = scratch.used;
  }
};

template <typename C>
int64_t forward_scratch(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v) {
  return ForwardScratch<C>(rows, keys, dim, dim_v, nullptr).size;
}

template <typename S>
void attention_forward(const Block<Compute<S>>& block, const Matrix& out, Compute<S>* memory) {
  using C = Compute<S>;
  const ForwardScratch<C> scratch(block.rows, block.keys, block.dim, block.dim_v, memory);
  const Sight sight(block.end, block.rows);
  Weights<C> weights;
  weights.value = scratch.weights;
  pack_rows<S>(block.q, 0, block.rows, block.dim, scratch.q, [&](Vec<C> q, int64_t) { return q * block.scale; });
  clear(scratch.out, block.rows * pitch<C>(block.dim_v));

  for (int64_t key = 0; key < sight.furthest; key += kKeys) {
    const int64_t keys = least(kKeys, sight.furthest - key);
    pack_panels<S>(block.k, key, keys, block.dim, scratch.k);
    const bool finite = pack_rows<S>(block.v, key, keys, block.dim_v, scratch.v, [](Vec<C> v, int64_t) { return v; });
    weigh(block, sight, 0, block.rows, key, keys, scratch.q, scratch.k, weights);
    add_by_rows(weights, weights.value, sight, block.rows, key, keys, scratch.v, block.dim_v, finite, scratch.out);
  }
  unpack_rows<S>(scratch.out, out, 0, block.rows, block.dim_v,
                 [&](Vec<C> sum, int64_t i) { return sum / block.divisor[i]; });
}

template <typename S>
constexpr Attention<Compute<S>> attention() {
  using C = Compute<S>;
  return {kRows, kKeys, kTileColumns<C>, forward_scratch<C>, backward_scratch<C>, attention_forward<S>, attention_backward<S>};
}

constexpr ReluAttention relu_attention_unit() { return {attention<float>(), attention<bfloat16>(), attention<double>()}; }

}  // namespace
}  // namespace genrec
