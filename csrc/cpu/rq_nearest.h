// Nearest-code search: what a unit offers and rq_nearest.cpp calls.
#pragma once

#include <cstdint>

namespace genrec {

// An index as wide as a number, so that one comparison mask selects both.
template <typename C> struct IndexOf;
template <> struct IndexOf<float> { using type = int32_t; };
template <> struct IndexOf<double> { using type = int64_t; };

// Code k starts at element k * stride; its elements are neighbours, in the storage type of the kernel.
struct Codes {
  const void* data;
  int64_t stride, dim;
};

// Rows are searched in panels, feature by feature: panels[i / panel][d][i % panel] is feature d of row i.
template <typename C>
struct Nearest {
  int64_t panel;
  int64_t (*scratch)(int64_t dim);  // elements that search needs

  // Packs rows, feature (i, d) at x[i * row + d * column]; panels are filled up with zeros.
  void (*pack)(const C* x, int64_t row, int64_t column, int64_t rows, int64_t dim, C* panels);

  // For every row the nearest of the codes first ≤ k < last, the lowest of equals, and ‖c‖² − 2 r·c. distance and index have
  // an entry for every lane of the panels.
  void (*search)(const C* panels, int64_t rows, const Codes& codes, int64_t first, int64_t last, C* scratch, C* distance,
                 typename IndexOf<C>::type* index);

  // total[i] += c, row -= c, where c is the code chosen[i * step] of row i; without panels only the first.
  void (*take)(const Codes& codes, const int64_t* chosen, int64_t step, int64_t rows, C* total, C* panels);
};

struct RqNearest {
  Nearest<float> f32, bf16;
  Nearest<double> f64;
};

}  // namespace genrec
