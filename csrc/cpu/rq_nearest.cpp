// genrec::rq_nearest on the CPU: every row block goes through all levels while its residuals are in cache.
#include "unit.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using genrec::IndexOf;
using genrec::Nearest;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowBlock = 384;  // a multiple of every tile

template <typename T>
struct Codebook {
  const T* codes;  // (size, dim)
  int64_t size, panels;
  std::vector<T> packed, squares;
};

// The codes as panels, and their squared norms; the codes that fill up the last panel are infinitely far away.
template <typename T>
Codebook<T> pack(const T* codes, int64_t size, int64_t dim, int64_t lanes) {
  const int64_t panels = (size + lanes - 1) / lanes;
  Codebook<T> book{codes, size, panels, std::vector<T>(panels * lanes * dim),
                   std::vector<T>(panels * lanes, std::numeric_limits<T>::infinity())};
  torch::stable::parallel_for(0, panels, std::max<int64_t>(1, 65536 / (lanes * std::max<int64_t>(dim, 1))),
                              [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * lanes; k < std::min(end * lanes, size); k++) {
      const T* code = codes + k * dim;
      T* column = book.packed.data() + (k / lanes) * lanes * dim + k % lanes;
      T square = 0;
      for (int64_t d = 0; d < dim; d++) {
        column[d * lanes] = code[d];
        square += code[d] * code[d];
      }
      book.squares[k] = square;
    }
  });
  return book;
}

template <typename T>
void search(const Nearest<T>& nearest, const T* x, int64_t rows, int64_t dim, const std::vector<Codebook<T>>& books,
            int64_t* codes, T* quantized) {
  const int64_t levels = books.size(), blocks = (rows + kRowBlock - 1) / kRowBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t room = std::min(kRowBlock, (rows + nearest.tile - 1) / nearest.tile * nearest.tile);
    std::vector<T> residual(room * dim), best(room * nearest.panel);
    std::vector<typename IndexOf<T>::type> index(room * nearest.panel);
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * kRowBlock, count = std::min(kRowBlock, rows - first);
      std::memcpy(residual.data(), x + first * dim, count * dim * sizeof(T));
      for (int64_t level = 0; level < levels; level++) {
        const auto& book = books[level];
        nearest.search(residual.data(), count, dim, book.packed.data(), book.squares.data(), book.panels, best.data(),
                       index.data(), codes + first * levels + level, levels);
        for (int64_t i = 0; i < count; i++) {
          const T* code = book.codes + codes[(first + i) * levels + level] * dim;
          T *left = residual.data() + i * dim, *sum = quantized + (first + i) * dim;
          for (int64_t d = 0; d < dim; d++) {
            left[d] -= code[d];
            sum[d] = level ? sum[d] + code[d] : code[d];
          }
        }
      }
    }
  });
}

template <typename T>
std::tuple<Tensor, Tensor> run(const Nearest<T>& nearest, const Tensor& x, const std::vector<Tensor>& codebooks,
                               ScalarType wide) {
  const int64_t rows = x.size(0), dim = x.size(1), levels = codebooks.size();
  const ScalarType out_type = codebooks[0].scalar_type();
  const Tensor input = contiguous(to(x, wide));
  std::vector<Tensor> keep;  // the codebooks in `wide`, alive while `books` points into them
  std::vector<Codebook<T>> books;
  for (const Tensor& codebook : codebooks) {
    STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) > 0 && codebook.size(1) == dim,
                    "rq_nearest: every codebook must be (K, D) with K at least 1 and the D of x");
    keep.push_back(contiguous(to(codebook, wide)));
    books.push_back(pack(static_cast<const T*>(keep.back().const_data_ptr()), codebook.size(0), dim, nearest.panel));
  }
  Tensor codes = torch::stable::new_empty(x, {rows, levels}, ScalarType::Long);
  Tensor quantized = torch::stable::new_empty(x, {rows, dim}, wide);
  search(nearest, static_cast<const T*>(input.const_data_ptr()), rows, dim, books,
         static_cast<int64_t*>(codes.mutable_data_ptr()), static_cast<T*>(quantized.mutable_data_ptr()));
  return {wide == out_type ? quantized : to(quantized, out_type), codes};
}

std::tuple<Tensor, Tensor> rq_nearest(const Tensor& x, std::vector<Tensor> codebooks) {
  STD_TORCH_CHECK(x.dim() == 2 && !codebooks.empty(), "rq_nearest: x must be (N, D) and codebooks not empty");
  const genrec::RqNearest& unit = genrec::unit().rq_nearest;
  if (x.scalar_type() == ScalarType::Double || codebooks[0].scalar_type() == ScalarType::Double)
    return run(unit.f64, x, codebooks, ScalarType::Double);
  return run(unit.f32, x, codebooks, ScalarType::Float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("rq_nearest", TORCH_BOX(&rq_nearest)); }
