// Group layer norm, a few rows at a time: its passes (sums, squares, result) find them in the L1 cache, so memory is read once
// and written once, and the latency of one row's sums hides behind the other rows. Every sum runs in an order given by the
// row's length alone.
#pragma once

#include "group_layer_norm.h"
#include "simd.h"

namespace genrec {
namespace {

constexpr int64_t kNormRows = 16;        // in a block at most, or
constexpr int64_t kNormBytes = 4 << 10;  // as many as are not longer than this
constexpr int kNormChains = 4;  // independent partial sums hide the latency of an addition

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
  for (; d + kNormChains * width <= dim; d += kNormChains * width)
#pragma GCC unroll 4
    for (int chain = 0; chain < kNormChains; chain++) body(Span{d + chain * width, 0, width}, chain);
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
inline C sum_of(const Vec<C> (&chains)[kNormChains]) {
  return sum<C>((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

template <typename S>
inline S* row_of(const Rows& rows, int64_t row) {
  if (!rows.data) return nullptr;
  return static_cast<S*>(rows.data) + row * rows.stride;
}

template <typename S>
inline Compute<S> mean(const S* row, int64_t dim) {
  using C = Compute<S>;
  Vec<C> total[kNormChains] = {};
  sweep<C>(dim, [&](Span span, int chain) { total[chain] += within<C>(span, take(row, span)); });
  return sum_of<C>(total) * (1 / C(dim));
}

// s = x + residual, rounded to its type; returns its mean.
template <typename X, typename S>
inline Compute<S> add(const X* x, const S* residual, S* s, int64_t dim) {
  using C = Compute<S>;
  Vec<C> total[kNormChains] = {};
  sweep<C>(dim, [&](Span span, int chain) {
    put(s, span, take(x, span) + take(residual, span));
    total[chain] += within<C>(span, take(s, span));
  });
  return sum_of<C>(total) * (1 / C(dim));
}

inline float inverse_root(float value) { return 1 / __builtin_sqrtf(value); }
inline double inverse_root(double value) { return 1 / __builtin_sqrt(value); }

template <typename S>
inline int64_t block_rows(int64_t dim) {
  const int64_t rows = kNormBytes / (dim * int64_t(sizeof(S)));
  return rows < 1 ? 1 : rows < kNormRows ? rows : kNormRows;
}

// Asks for a row that comes soon. The processor sees by itself how a long row goes on.
template <typename S>
inline void prefetch(const S* row, int64_t dim) {
  if (dim * int64_t(sizeof(S)) > kNormBytes / 2) return;
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t line = 0; line < dim * int64_t(sizeof(S)); line += 64) __builtin_prefetch(bytes + line);
}

// y = (s − mean) / sqrt(variance + eps) · weight + bias, of `count` rows from `first` on
template <typename T, typename S, typename C>
inline void normalize(const Affine<C>& affine, const Rows& from, const Rows& to, int64_t first, int64_t count,
                      const C* means) {
  const int64_t dim = affine.dim;
  const C per_dim = 1 / C(dim);
  C rstds[kNormRows];
  for (int64_t i = 0; i < count; i++) {
    const T* s = row_of<T>(from, first + i);
    prefetch(row_of<T>(from, first + count + i), dim);
    prefetch(row_of<S>(to, first + i), dim);
    const C mean = means[i];
    Vec<C> squares[kNormChains] = {};
    sweep<C>(dim, [&](Span span, int chain) {
      const Vec<C> centred = within<C>(span, take(s, span) - mean);
      squares[chain] += centred * centred;
    });
    rstds[i] = inverse_root(sum_of<C>(squares) * per_dim + affine.eps);
  }
  for (int64_t i = 0; i < count; i++) {
    const T* s = row_of<T>(from, first + i);
    S* y = row_of<S>(to, first + i);
    const int64_t group = affine.groups[first + i];
    const C *weight = affine.weight + group * dim, *bias = affine.bias + group * dim, mean = means[i], rstd = rstds[i];
    sweep<C>(dim, [&](Span span, int) {
      put(y, span, (take(s, span) - mean) * rstd * take(weight, span) + take(bias, span));
    });
  }
}

template <typename X, typename S>
void norm_forward(const Affine<Compute<S>>& affine, const NormForward& rows, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const int64_t dim = affine.dim, block = block_rows<S>(dim);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = first + block < end ? block : end - first;
    C means[kNormRows];
    if (rows.residual.data) {
      for (int64_t i = 0; i < count; i++)
        means[i] = add(row_of<X>(rows.x, first + i), row_of<S>(rows.residual, first + i), row_of<S>(rows.s, first + i), dim);
      normalize<S, S>(affine, rows.s, rows.y, first, count, means);
    } else {
      for (int64_t i = 0; i < count; i++) means[i] = mean(row_of<X>(rows.x, first + i), dim);
      normalize<X, S>(affine, rows.x, rows.y, first, count, means);
    }
  }
}

// The numbers of a row between the passes.
template <typename C>
struct Moments {
  C mean, rstd, mean_g, mean_gx;
};

// Adds dy · x̂ to grad_weight and dy to grad_bias of the row's group. With x̂ = (s − mean) · rstd and g = dy · weight:
//   grad_s = (g − mean(g) − x̂ · mean(g · x̂)) · rstd + grad_sum
template <typename S>
void norm_backward(const Affine<Compute<S>>& affine, const NormBackward& rows, int64_t begin, int64_t end,
                   Compute<S>* grad_affine) {
  using C = Compute<S>;
  const int64_t dim = affine.dim, table = affine.groups.count * dim, block = block_rows<S>(2 * dim);
  const C per_dim = 1 / C(dim);
  for (int64_t i = 0; i < 2 * table; i++) grad_affine[i] = 0;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = first + block < end ? block : end - first;
    Moments<C> moments[kNormRows];
    int64_t groups[kNormRows];
    for (int64_t i = 0; i < count; i++) {
      moments[i].mean = mean(row_of<S>(rows.s, first + i), dim);
      groups[i] = affine.groups[first + i];
    }
    for (int64_t i = 0; i < count; i++) {
      prefetch(row_of<S>(rows.s, first + count + i), dim);
      prefetch(row_of<S>(rows.grad, first + count + i), dim);
      prefetch(row_of<S>(rows.grad_s, first + i), dim);
      const S *s = row_of<S>(rows.s, first + i), *grad = row_of<S>(rows.grad, first + i);
      const C *weight = affine.weight + groups[i] * dim, mean = moments[i].mean;
      Vec<C> squares[kNormChains] = {}, weighted[kNormChains] = {}, projected[kNormChains] = {};
      sweep<C>(dim, [&](Span span, int chain) {
        const Vec<C> centred = within<C>(span, take(s, span) - mean);
        const Vec<C> g = within<C>(span, take(grad, span) * take(weight, span));
        squares[chain] += centred * centred;
        weighted[chain] += g;
        projected[chain] += g * centred;
      });
      const C rstd = inverse_root(sum_of<C>(squares) * per_dim + affine.eps);
      moments[i] = {mean, rstd, sum_of<C>(weighted) * per_dim, sum_of<C>(projected) * per_dim * rstd};
    }
    for (int64_t i = 0; i < count; i++) {
      S* grad_s = row_of<S>(rows.grad_s, first + i);
      const S *s = row_of<S>(rows.s, first + i), *grad = row_of<S>(rows.grad, first + i);
      const S* grad_sum = row_of<S>(rows.grad_sum, first + i);
      const C* weight = affine.weight + groups[i] * dim;
      C *grad_weight = grad_affine + groups[i] * dim, *grad_bias = grad_weight + table;
      const Moments<C> m = moments[i];
      sweep<C>(dim, [&](Span span, int) {
        const Vec<C> normed = (take(s, span) - m.mean) * m.rstd, dy = take(grad, span), own = within<C>(span, dy);
        Vec<C> result = (dy * take(weight, span) - m.mean_g - normed * m.mean_gx) * m.rstd;
        if (grad_sum) result += take(grad_sum, span);
        put(grad_s, span, result);
        put(grad_weight, span, take(grad_weight, span) + own * normed);
        put(grad_bias, span, take(grad_bias, span) + own);
      });
    }
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
