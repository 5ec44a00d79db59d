// Nearest-code search: what a unit offers and rq_nearest.cpp calls.
#pragma once

#include <cstdint>

namespace genrec {

// An index as wide as a number, so that one comparison mask selects both.
template <typename T> struct IndexOf;
template <> struct IndexOf<float> { using type = int32_t; };
template <> struct IndexOf<double> { using type = int64_t; };

template <typename T>
struct Nearest {
  int64_t panel;  // codes side by side in the packed codebook: packed[k / panel][feature][k % panel]
  int64_t tile;   // rows computed together; `rows` is readable up to the next multiple of it

  // codes[i * stride] = argmin_k squares[k] - 2 rows[i]·codebook[k], the lowest k among equals.
  // best and index are scratch of (count rounded up to tile) * panel elements.
  void (*search)(const T* rows, int64_t count, int64_t dim, const T* packed, const T* squares, int64_t panels, T* best,
                 typename IndexOf<T>::type* index, int64_t* codes, int64_t stride);
};

struct RqNearest {
  Nearest<float> f32;
  Nearest<double> f64;
};

}  // namespace genrec
