// Group layer norm, one row after the other: its passes (sum, squares, result) find the row in the L1 cache, so memory is
// read once and written once. Every sum runs in an order given by the row's length alone.
#pragma once

#include "group_layer_norm.h"
#include "simd.h"

namespace genrec {
namespace {

constexpr int kChains = 4;  // independent partial sums hide the latency of an addition

// Lanes skip ≤ l < count of the vector that starts at element `at` of a row.
struct Span {
  int64_t at, skip, count;
};

// body(span, chain) for all vectors of a row. Where the last is not full it starts earlier, and skips what was done before;
// only a row shorter than a vector is loaded element by element.
template <typename C, typename Body>
inline __attribute__((always_inline)) void sweep(int64_t dim, const Body& body) {
  constexpr int64_t width = kWidth<C>;
  int64_t d = 0;
  for (; d + kChains * width <= dim; d += kChains * width)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; chain++) body(Span{d + chain * width, 0, width}, chain);
  for (; d + width <= dim; d += width) body(Span{d, 0, width}, 0);
  if (d == dim) return;
  if (dim > width) body(Span{dim - width, d + width - dim, width}, 1);
  else body(Span{0, 0, dim}, 1);
}

template <typename S>
inline __attribute__((always_inline)) Vec<Compute<S>> take(const S* row, Span span) {
  return span.count == kWidth<Compute<S>> ? load(row + span.at) : load_first(row + span.at, span.count);
}

template <typename S>
inline __attribute__((always_inline)) void put(S* row, Span span, const Vec<Compute<S>>& vector) {
  if (span.count == kWidth<Compute<S>>) return store(row + span.at, vector);
  store_first(row + span.at, vector, span.count);
}

// 0 in the lanes outside the span.
template <typename C>
inline __attribute__((always_inline)) Vec<C> within(Span span, const Vec<C>& vector) {
  if (span.skip == 0 && span.count == kWidth<C>) return vector;
  Ints<C> lane;
  for (int64_t i = 0; i < kWidth<C>; i++) lane[i] = i;
  using Lane = decltype(+lane[0]);
  return (lane >= Lane(span.skip)) & (lane < Lane(span.count)) ? vector : Vec<C>{};
}

template <typename C>
inline C sum_of(const Vec<C> (&chains)[kChains]) {
  return sum<C>((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

template <typename S>
inline S* row_of(const Rows& rows, int64_t row) {
  if (!rows.data) return nullptr;
  return static_cast<S*>(rows.data) + row * rows.stride;
}

// -1 for a group that does not exist.
inline int64_t group_of(const Groups& groups, int64_t row) {
  const int64_t at = row * groups.stride;
  const int64_t group = groups.wide ? static_cast<const int64_t*>(groups.ids)[at] : static_cast<const int32_t*>(groups.ids)[at];
  return group >= 0 && group < groups.count ? group : -1;
}

template <typename S>
inline void fill_with_nan(S* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) row[d] = narrow<S>(Compute<S>(__builtin_nan("")));
}

template <typename S>
inline Compute<S> mean(const S* row, int64_t dim) {
  using C = Compute<S>;
  Vec<C> total[kChains] = {};
  sweep<C>(dim, [&](Span span, int chain) { total[chain] += within<C>(span, take(row, span)); });
  return sum_of<C>(total) * (1 / C(dim));
}

// s = x + residual, rounded to its type; returns its mean.
template <typename X, typename S>
inline Compute<S> add(const X* x, const S* residual, S* s, int64_t dim) {
  using C = Compute<S>;
  Vec<C> total[kChains] = {};
  sweep<C>(dim, [&](Span span, int chain) {
    put(s, span, take(x, span) + take(residual, span));
    total[chain] += within<C>(span, take(s, span));
  });
  return sum_of<C>(total) * (1 / C(dim));
}

inline float inverse_root(float value) { return 1 / __builtin_sqrtf(value); }
inline double inverse_root(double value) { return 1 / __builtin_sqrt(value); }

// y = (s − mean) / sqrt(variance + eps) · weight + bias
template <typename T, typename S, typename C>
inline void normalize(const T* s, C mean, C eps, const C* weight, const C* bias, S* y, int64_t dim) {
  const C per_dim = 1 / C(dim);
  Vec<C> squares[kChains] = {};
  sweep<C>(dim, [&](Span span, int chain) {
    const Vec<C> centred = within<C>(span, take(s, span) - mean);
    squares[chain] += centred * centred;
  });
  const C rstd = inverse_root(sum_of<C>(squares) * per_dim + eps);
  sweep<C>(dim, [&](Span span, int) {
    put(y, span, (take(s, span) - mean) * rstd * take(weight, span) + take(bias, span));
  });
}

template <typename X, typename S>
void norm_forward(const Affine<Compute<S>>& affine, const NormForward& rows, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const int64_t dim = affine.dim;
  for (int64_t row = begin; row < end; row++) {
    const X* x = row_of<X>(rows.x, row);
    S *s = row_of<S>(rows.s, row), *y = row_of<S>(rows.y, row);
    const S* residual = row_of<S>(rows.residual, row);
    const C centre = residual ? add(x, residual, s, dim) : mean(x, dim);
    const int64_t group = group_of(affine.groups, row);
    if (group < 0) {
      fill_with_nan(y, dim);
      continue;
    }
    const C *weight = affine.weight + group * dim, *bias = affine.bias + group * dim;
    if (residual) normalize(s, centre, affine.eps, weight, bias, y, dim);
    else normalize(x, centre, affine.eps, weight, bias, y, dim);
  }
}

// Adds dy · x̂ to grad_weight and dy to grad_bias. With x̂ = (s − mean) · rstd and g = dy · weight:
//   grad_s = (g − mean(g) − x̂ · mean(g · x̂)) · rstd + grad_sum
template <typename S, typename C>
inline void differentiate(const S* grad, const S* grad_sum, const S* s, C eps, const C* weight, S* grad_s, C* grad_weight,
                          C* grad_bias, int64_t dim) {
  const C centre = mean(s, dim);
  const C per_dim = 1 / C(dim);
  Vec<C> squares[kChains] = {}, weighted[kChains] = {}, projected[kChains] = {};
  sweep<C>(dim, [&](Span span, int chain) {
    const Vec<C> centred = within<C>(span, take(s, span) - centre);
    const Vec<C> g = within<C>(span, take(grad, span) * take(weight, span));
    squares[chain] += centred * centred;
    weighted[chain] += g;
    projected[chain] += g * centred;
  });
  const C rstd = inverse_root(sum_of<C>(squares) * per_dim + eps), mean_g = sum_of<C>(weighted) * per_dim;
  const C mean_gx = sum_of<C>(projected) * per_dim * rstd;
  sweep<C>(dim, [&](Span span, int) {
    const Vec<C> normed = (take(s, span) - centre) * rstd, dy = take(grad, span), own = within<C>(span, dy);
    Vec<C> result = (dy * take(weight, span) - mean_g - normed * mean_gx) * rstd;
    if (grad_sum) result += take(grad_sum, span);
    put(grad_s, span, result);
    put(grad_weight, span, take(grad_weight, span) + own * normed);
    put(grad_bias, span, take(grad_bias, span) + own);
  });
}

template <typename S>
void norm_backward(const Affine<Compute<S>>& affine, const NormBackward& rows, int64_t begin, int64_t end,
                   Compute<S>* grad_affine) {
  using C = Compute<S>;
  const int64_t dim = affine.dim, table = affine.groups.count * dim;
  for (int64_t i = 0; i < 2 * table; i++) grad_affine[i] = 0;
  for (int64_t row = begin; row < end; row++) {
    S* grad_s = row_of<S>(rows.grad_s, row);
    const int64_t group = group_of(affine.groups, row);
    if (group < 0) {
      fill_with_nan(grad_s, dim);
      continue;
    }
    C* grad_weight = grad_affine + group * dim;
    differentiate(row_of<S>(rows.grad, row), row_of<S>(rows.grad_sum, row), row_of<S>(rows.s, row), affine.eps,
                  affine.weight + group * dim, grad_s, grad_weight, grad_weight + table, dim);
  }
}

constexpr GroupLayerNorm group_layer_norm_unit() {
  return {{norm_forward<float, float>, norm_backward<float>},
          {norm_forward<bfloat16, bfloat16>, norm_backward<bfloat16>},
          {norm_forward<bfloat16, float>, norm_backward<float>},
          {norm_forward<double, double>, norm_backward<double>}};
}

}  // namespace
}  // namespace genrec
