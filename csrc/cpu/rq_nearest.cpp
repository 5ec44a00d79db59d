// genrec::rq_nearest and its backward pass on the CPU. A level is searched by rows and by codes at once, whichever there are
// more of: the nearest of a range of codes is merged in the order of the ranges, so the cut shows in no result.
#include "tensor.h"
#include "unit.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace {

using genrec::as_type;
using genrec::Buffer;
using genrec::buffer;
using genrec::Codes;
using genrec::IndexOf;
using genrec::Nearest;
using genrec::read;
using genrec::ScalarType;
using genrec::Tensor;
using genrec::write;
using torch::stable::parallel_for;

constexpr int64_t kRows = 256;       // searched together: a multiple of every panel
constexpr int64_t kCodes = 48;       // a range is a multiple of it: whole tiles in every unit
constexpr int64_t kWork = 1 << 20;   // multiplications that are worth a thread
constexpr int64_t kGrain = 32768;    // elements that are

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Tasks that are worth a thread, each of them this much work.
int64_t grain(int64_t worth, int64_t work) { return std::max<int64_t>(1, worth / std::max<int64_t>(1, work)); }

template <typename C>
struct Search {
  const Nearest<C>& unit;
  int64_t rows, dim;
  int64_t groups = pieces(rows, kRows);
  Buffer<C> panels = buffer<C>(groups * kRows * dim);  // the residuals

  C* group(int64_t g) const { return panels.get() + g * kRows * dim; }
  int64_t rows_of(int64_t g) const { return std::min(kRows, rows - g * kRows); }

  void start(const Tensor& x, C* total) const {
    const C* data = read<C>(x);
    const int64_t row = x.stride(0), column = x.stride(1);
    parallel_for(0, groups, grain(kGrain, kRows * dim), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) unit.pack(data + g * kRows * row, row, column, rows_of(g), dim, group(g));
      std::fill(total + begin * kRows * dim, total + std::min(end * kRows, rows) * dim, C(0));
    });
  }

  // chosen[i * step] = the code nearest to row i.
  void search(const Codes& codes, int64_t size, int64_t* chosen, int64_t step) const {
    const int64_t wanted = pieces(16 * torch::stable::get_num_threads(), groups);
    const int64_t range = pieces(pieces(size, wanted), kCodes) * kCodes, ranges = pieces(size, range);
    const auto distance = buffer<C>(ranges * groups * kRows);
    const auto index = buffer<typename IndexOf<C>::type>(ranges * groups * kRows);
    const auto task = [&](int64_t r, int64_t g) { return (r * groups + g) * kRows; };

    const int64_t work = std::min(rows, kRows) * range * dim;
    parallel_for(0, ranges * groups, grain(kWork, work), [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<C>(unit.scratch(dim));
      for (int64_t i = begin; i < end; i++) {
        const int64_t r = i / groups, g = i % groups, at = task(r, g);
        unit.search(group(g), rows_of(g), codes, r * range, std::min(size, (r + 1) * range), scratch.get(),
                    distance.get() + at, index.get() + at);
      }
    });
    for (int64_t i = 0; i < rows; i++) {
      int64_t best = i;
      for (int64_t r = 1; r < ranges; r++)
        if (const int64_t at = task(r, 0) + i; distance[at] < distance[best]) best = at;
      chosen[i * step] = index[best];
    }
  }

  void take(const Codes& codes, const int64_t* chosen, int64_t step, C* total, bool last) const {
    parallel_for(0, groups, grain(kGrain, kRows * dim), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++)
        unit.take(codes, chosen + g * kRows * step, step, rows_of(g), total + g * kRows * dim, last ? nullptr : group(g));
    });
  }
};

template <typename C>
std::tuple<Tensor, Tensor> run(const Nearest<C>& unit, const Tensor& x, const std::vector<Tensor>& codebooks,
                               ScalarType wide, ScalarType storage) {
  const int64_t rows = x.size(0), dim = x.size(1), levels = codebooks.size();
  Tensor codes = genrec::new_empty(x, {rows, levels}, ScalarType::Long);
  Tensor quantized = genrec::new_empty(x, {rows, dim}, wide);
  if (rows == 0) return {as_type(quantized, codebooks[0].scalar_type()), codes};
  int64_t* chosen = write<int64_t>(codes);
  C* total = write<C>(quantized);
  const Search<C> search{unit, rows, dim};
  search.start(as_type(x, wide), total);
  for (int64_t level = 0; level < levels; level++) {
    Tensor book = as_type(codebooks[level], storage);
    if (book.stride(1) != 1) book = torch::stable::contiguous(book);
    const Codes all{book.const_data_ptr(), book.stride(0), dim};
    search.search(all, book.size(0), chosen + level, levels);
    search.take(all, chosen + level, levels, total, level + 1 == levels);
  }
  return {as_type(quantized, codebooks[0].scalar_type()), codes};
}

std::tuple<Tensor, Tensor> rq_nearest(const Tensor& x, std::vector<Tensor> codebooks) {
  STD_TORCH_CHECK(x.dim() == 2 && !codebooks.empty(), "rq_nearest: x must be (N, D) and codebooks not empty");
  const ScalarType type = codebooks[0].scalar_type();
  for (const Tensor& book : codebooks)
    STD_TORCH_CHECK(book.dim() == 2 && book.size(0) > 0 && book.size(0) < int64_t(1) << 31 && book.size(1) == x.size(1) &&
                        book.scalar_type() == type,
                    "rq_nearest: every codebook must be (K, D) with K at least 1, the D of x and one dtype");
  const genrec::RqNearest& unit = genrec::unit().rq_nearest;
  if (x.scalar_type() == ScalarType::Double || type == ScalarType::Double)
    return run(unit.f64, x, codebooks, ScalarType::Double, ScalarType::Double);
  if (type == ScalarType::BFloat16) return run(unit.bf16, x, codebooks, ScalarType::Float, ScalarType::BFloat16);
  return run(unit.f32, x, codebooks, ScalarType::Float, ScalarType::Float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("rq_nearest", TORCH_BOX(&rq_nearest)); }
