// ReLU attention of one head of one sequence: what a unit offers and relu_attention_problem.h calls.
#pragma once

#include <cstdint>

namespace genrec {

// Element (i, j) is data[i * row + j * column], in the storage type of the kernel.
struct Matrix {
  void* data;
  int64_t row, column;
};

// Rows of one head of one sequence, and all keys of that sequence. The arrays have one entry per row.
template <typename C>
struct Block {
  int64_t rows, keys, dim, dim_v;
  Matrix q, k, v;         // (rows, dim), (keys, dim), (keys, dim_v)
  const int64_t* end;     // row i sees the keys j < end[i] ≤ keys
  const int64_t* anchor;  // and adds bias[j - anchor[i]] to its scores
  const C* bias;          // readable `panel` entries past the last key of the first anchor; null without
  const C* divisor;
  C scale;
};

// Gradients of a block. Without grad_q.data, or without grad_k.data and grad_v.data, those are not computed.
template <typename C>
struct Gradients {
  Matrix grad;  // of the output, (rows, dim_v)
  Matrix grad_q, grad_k, grad_v;
  // With grad_k, the sums over distances of the scores' gradients, one row of `distances` for every `span` keys;
  // distances from distances - 1 on share the last entry. Null without a bias.
  C* grad_bias;
  int64_t distances, span;
};

template <typename C>
struct Attention {
  int64_t rows;   // of the blocks that forward takes
  int64_t keys;   // spans are a multiple of it
  int64_t panel;  // keys computed together

  // Elements of scratch for a block of these sizes.
  int64_t (*forward_scratch)(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v);
  int64_t (*backward_scratch)(int64_t rows, int64_t keys, int64_t dim, int64_t dim_v);

  void (*forward)(const Block<C>& block, const Matrix& out, C* scratch);
  // The part that the keys first ≤ j < last have in the gradients.
  void (*backward)(const Block<C>& block, const Gradients<C>& gradients, int64_t first, int64_t last, C* scratch);
};

struct ReluAttention {
  Attention<float> f32, bf16;
  Attention<double> f64;
};

}  // namespace genrec
