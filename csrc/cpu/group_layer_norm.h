// Group layer norm of a range of rows: what a unit offers and group_layer_norm.cpp calls.
#pragma once

#include <cstdint>

namespace genrec {

// Row i starts at element i * stride of data; its elements are neighbours.
struct Rows {
  void* data;
  int64_t stride;
};

// The group of row i is entry i * stride of ids, int64 or int32; it is one of `count`.
struct Groups {
  const void* ids;
  int64_t stride;
  bool wide;
  int64_t count;

  int64_t operator[](int64_t row) const {
    const int64_t at = row * stride;
    return wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
  }
};

template <typename C>
struct Affine {
  const C *weight, *bias;  // (groups, dim); the backward pass needs no bias
  Groups groups;
  int64_t dim;
  C eps;
};

struct NormForward {
  Rows x, residual;  // without residual.data, x is s
  Rows s, y;         // with it, s = x + residual is written, rounded to its type, before it is normed
};

struct NormBackward {
  Rows grad, grad_sum, s;  // of y, of s itself (null: none), and s
  Rows grad_s;
};

template <typename C>
struct Norm {
  void (*forward)(const Affine<C>& affine, const NormForward& rows, int64_t begin, int64_t end);
  // Clears grad_affine (2, groups, dim), then adds the weights' and the biases' gradients row by row.
  void (*backward)(const Affine<C>& affine, const NormBackward& rows, int64_t begin, int64_t end, C* grad_affine);
};

struct GroupLayerNorm {
  Norm<float> f32, bf16;
  Norm<float> bf16_f32;  // x in bfloat16, everything else in float32
  Norm<double> f64;
};

}  // namespace genrec
