// genrec::group_layer_norm, add_group_layer_norm and group_layer_norm_backward on the CPU: which rows, in which type, and
// how they are split. The split depends on the shape alone, so no result depends on the number of threads.
#include "tensor.h"
#include "unit.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

namespace {

using genrec::Affine;
using genrec::as_type;
using genrec::dense;
using genrec::Groups;
using genrec::new_empty;
using genrec::Norm;
using genrec::NormBackward;
using genrec::NormForward;
using genrec::read;
using genrec::Rows;
using genrec::ScalarType;
using genrec::Tensor;
using genrec::write;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr int64_t kChunks = 64;    // of the backward pass, at most: each has affine gradients of its own

// The distance of neighbours where the first `dims` dimensions are evenly spaced as one, -1 where they are not.
int64_t spacing(const Tensor& tensor, int64_t dims) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t first = -1, next = -1;  // stride of the innermost dimension, and the one that continues it
  for (int64_t i = dims - 1; i >= 0; i--) {
    if (sizes[i] == 1) continue;
    if (first < 0) first = strides[i];
    else if (strides[i] != next) return -1;
    next = strides[i] * sizes[i];
  }
  return first < 0 ? 0 : first;
}

// The rows of (…, D); the tensor is replaced by a contiguous one where they are not evenly spaced or their elements apart.
Rows rows_of(Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, dim = tensor.size(last);
  int64_t stride = tensor.stride(last) == 1 || dim == 1 ? spacing(tensor, last) : -1;
  if (stride < 0) {
    tensor = torch::stable::contiguous(tensor);
    stride = dim;
  }
  return {const_cast<void*>(tensor.const_data_ptr()), stride};
}

// The groups of `rows` tokens, all of which exist.
Groups groups_of(Tensor& ids, int64_t rows, int64_t count) {
  int64_t stride = spacing(ids, ids.dim());
  if (stride < 0) {
    ids = torch::stable::contiguous(ids);
    stride = 1;
  }
  const Groups groups{ids.const_data_ptr(), stride, ids.scalar_type() == ScalarType::Long, count};
  for (int64_t i = 0; i < rows; i++)
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < count, "group_layer_norm: group_ids holds ", groups[i], "; expected 0 … ",
                    count - 1, ", one of ", count, " groups");
  return groups;
}

bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  return a.dim() >= dims && b.dim() >= dims && std::equal(a.sizes().begin(), a.sizes().begin() + dims, b.sizes().begin());
}

void check(const char* name, const Tensor& x, const Tensor& ids, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, name, ": x must be (…, D) with D at least 1");
  STD_TORCH_CHECK(ids.dim() == x.dim() - 1 && same_shape(ids, x, ids.dim()),
                  name, ": group_ids must have the shape of x without D");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long,
                  name, ": group_ids must be int32 or int64");
  for (const Tensor* table : {&weight, &bias})
    STD_TORCH_CHECK(table->dim() == 2 && table->size(0) == weight.size(0) && table->size(1) == x.size(x.dim() - 1),
                    name, ": weight and bias must be (G, D) with the D of x");
}

void check_beside(const char* name, const char* what, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == x.dim() && same_shape(tensor, x, x.dim()), name, ": ", what, " must have the shape of x");
}

bool native(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double;
}

ScalarType wider(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename C>
std::pair<Tensor, Tensor> norm(const Norm<C>& unit, ScalarType wide, Tensor x, std::optional<Tensor> residual, Tensor ids,
                               const Tensor& weight, const Tensor& bias, double eps) {
  const ScalarType type = residual ? residual->scalar_type() : x.scalar_type();
  const int64_t dim = x.size(x.dim() - 1), rows = x.numel() / dim;
  Tensor y = new_empty(x, x.sizes(), type), s = residual ? new_empty(x, x.sizes(), type) : x;
  if (rows == 0) return {y, s};
  const Tensor scale = as_type(dense(weight), wide), shift = as_type(dense(bias), wide);
  const Affine<C> affine{read<C>(scale), read<C>(shift), groups_of(ids, rows, weight.size(0)), dim, C(eps)};
  NormForward forward{rows_of(x), {}, {}, {y.mutable_data_ptr(), dim}};
  if (residual) {
    forward.residual = rows_of(*residual);
    forward.s = {s.mutable_data_ptr(), dim};
  }
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    unit.forward(affine, forward, begin, end);
  });
  return {y, s};
}

// norm(s) and s, which is x where there is no residual.
std::pair<Tensor, Tensor> forward(Tensor x, std::optional<Tensor> residual, const Tensor& ids, const Tensor& weight,
                                  const Tensor& bias, double eps) {
  const ScalarType type = residual ? wider(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  if (!native(type)) {  // float16 is converted around the kernel, and so is the sum before it is normed
    if (residual) {
      const Tensor added = as_type(*residual, ScalarType::Float);
      x = as_type(forward(as_type(x, ScalarType::Float), added, ids, weight, bias, eps).second, type);
    }
    const Tensor y = forward(as_type(x, ScalarType::Float), std::nullopt, ids, weight, bias, eps).first;
    return {as_type(y, type), x};
  }
  const auto& unit = genrec::unit().group_layer_norm;
  if (residual) {
    if (x.scalar_type() == type) std::swap(x, *residual);
    *residual = as_type(*residual, type);
    if (type == ScalarType::Float && x.scalar_type() == ScalarType::BFloat16)
      return norm(unit.bf16_f32, ScalarType::Float, x, residual, ids, weight, bias, eps);
    x = as_type(x, type);
  }
  if (type == ScalarType::Double) return norm(unit.f64, ScalarType::Double, x, residual, ids, weight, bias, eps);
  return norm(type == ScalarType::Float ? unit.f32 : unit.bf16, ScalarType::Float, x, residual, ids, weight, bias, eps);
}

Tensor group_layer_norm(const Tensor& x, const Tensor& ids, const Tensor& weight, const Tensor& bias, double eps) {
  check("group_layer_norm", x, ids, weight, bias);
  return forward(x, std::nullopt, ids, weight, bias, eps).first;
}

std::tuple<Tensor, Tensor> add_group_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& ids,
                                                const Tensor& weight, const Tensor& bias, double eps) {
  check("add_group_layer_norm", x, ids, weight, bias);
  check_beside("add_group_layer_norm", "residual", residual, x);
  return forward(x, residual, ids, weight, bias, eps);
}

// table[i] = Σ over the chunks of partials[chunk][offset + i], in their order.
template <typename C>
void reduce(const C* partials, int64_t chunks, int64_t offset, Tensor& table) {
  const int64_t size = table.numel();
  C* total = write<C>(table);
  torch::stable::parallel_for(0, size, std::max<int64_t>(1, kGrain / chunks), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const C* part = partials + chunk * 2 * size + offset;
      for (int64_t i = begin; i < end; i++) total[i] = chunk ? total[i] + part[i] : part[i];
    }
  });
}

template <typename C>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Norm<C>& unit, ScalarType wide, Tensor grad, Tensor s, Tensor ids,
                                                 const Tensor& weight, const Tensor& bias, double eps,
                                                 std::optional<Tensor> grad_sum) {
  const int64_t dim = s.size(s.dim() - 1), rows = s.numel() / dim, groups = weight.size(0);
  Tensor grad_s = new_empty(s, s.sizes(), s.scalar_type());
  Tensor grad_weight = new_empty(weight, weight.sizes(), wide);
  Tensor grad_bias = new_empty(bias, bias.sizes(), wide);
  const Tensor scale = as_type(dense(weight), wide);
  const Affine<C> affine{read<C>(scale), nullptr, groups_of(ids, rows, groups), dim, C(eps)};
  const NormBackward backward{rows_of(grad), grad_sum ? rows_of(*grad_sum) : Rows{}, rows_of(s),
                              {grad_s.mutable_data_ptr(), dim}};

  const int64_t least = std::max(4 * groups, std::max<int64_t>(1, kGrain / 2 / dim));  // rows that are worth a chunk
  const int64_t chunks = std::max<int64_t>(1, std::min(kChunks, rows / least)), table = groups * dim;
  const auto partials = genrec::buffer<C>(chunks * 2 * table);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++)
      unit.backward(affine, backward, rows * chunk / chunks, rows * (chunk + 1) / chunks, partials.get() + chunk * 2 * table);
  });
  reduce(partials.get(), chunks, 0, grad_weight);
  reduce(partials.get(), chunks, table, grad_bias);
  return {grad_s, as_type(grad_weight, weight.scalar_type()), as_type(grad_bias, bias.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& s, const Tensor& ids, const Tensor& weight,
                                            const Tensor& bias, double eps, std::optional<Tensor> grad_sum) {
  check("group_layer_norm_backward", s, ids, weight, bias);
  check_beside("group_layer_norm_backward", "grad", grad, s);
  if (grad_sum) check_beside("group_layer_norm_backward", "grad_sum", *grad_sum, s);
  const ScalarType type = s.scalar_type(), used = native(type) ? type : ScalarType::Float;
  if (grad_sum) *grad_sum = as_type(*grad_sum, used);
  const auto& unit = genrec::unit().group_layer_norm;
  const auto run = [&](const auto& norm, ScalarType wide) {
    return differentiate(norm, wide, as_type(grad, used), as_type(s, used), ids, weight, bias, eps, grad_sum);
  };
  auto [grad_s, grad_weight, grad_bias] = used == ScalarType::Double ? run(unit.f64, ScalarType::Double)
                                          : used == ScalarType::Float ? run(unit.f32, ScalarType::Float)
                                                                      : run(unit.bf16, ScalarType::Float);
  return {as_type(grad_s, type), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("group_layer_norm", TORCH_BOX(&group_layer_norm));
  m.impl("add_group_layer_norm", TORCH_BOX(&add_group_layer_norm));
  m.impl("group_layer_norm_backward", TORCH_BOX(&backward));
}
