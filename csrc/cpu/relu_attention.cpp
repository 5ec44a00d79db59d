// genrec::relu_attention, its packed form and their backward passes on the CPU: arguments checked, results allocated, and what
// lies between left to Problem.
#include "relu_attention_problem.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace genrec {
namespace {

using Gradient4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using torch::headeronly::IntHeaderOnlyArrayRef;

void check_integer(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
}

void check_shape(const Tensor& tensor, IntHeaderOnlyArrayRef expected, const char* name, const char* layout) {
  STD_TORCH_CHECK(tensor.sizes() == expected, name, " must be ", layout);
}

std::vector<int64_t> offsets(const Tensor& cu_seqlens, int64_t tokens, const char* name) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, name, " must be (B + 1,)");
  check_integer(cu_seqlens, name);
  std::vector<int64_t> values(cu_seqlens.size(0));
  const Integers from(cu_seqlens);
  const int64_t stride = cu_seqlens.stride(0);
  for (size_t b = 0; b < values.size(); b++) values[b] = from[b * stride];
  STD_TORCH_CHECK(values.front() == 0 && std::is_sorted(values.begin(), values.end()) && values.back() <= tokens, name,
                  " must start at 0, never fall and end at most at ", tokens, ", the number of tokens");
  return values;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, int64_t batch, int64_t rows, const Options& options) {
  const bool packed = q.dim() == 3;
  const int64_t heads = q.size(1);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  if (options.key_limit) {
    check_integer(*options.key_limit, "key_limit");
    STD_TORCH_CHECK(!options.causal, "causal and key_limit exclude each other");
    if (packed) check_shape(*options.key_limit, {rows}, "key_limit", "(Tq,)");
    else check_shape(*options.key_limit, {batch, rows}, "key_limit", "(B, Lq)");
  }
  if (options.rel_bias)
    STD_TORCH_CHECK(options.rel_bias->dim() == 2 && options.rel_bias->size(0) == heads && options.rel_bias->size(1) > 0,
                    "rel_bias must be (H, R) with R at least 1");
  if (options.divisors) check_shape(*options.divisors, {batch}, "divisors", "(B,)");
}

std::vector<Sequence> dense_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have 4 dimensions");
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), keys = k.size(2);
  check_shape(k, {batch, heads, keys, q.size(3)}, "k", "(B, H, Lk, D)");
  check_shape(v, {batch, heads, keys, v.size(3)}, "v", "(B, H, Lk, Dv)");
  check(q, k, v, batch, rows, options);
  return std::vector<Sequence>(batch, {0, rows, 0, keys});
}

std::vector<Sequence> packed_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                       const Tensor& cu_k, const Options& options) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must have 3 dimensions");
  const int64_t heads = q.size(1), keys = k.size(0);
  check_shape(k, {keys, heads, q.size(2)}, "k", "(Tk, H, D)");
  check_shape(v, {keys, heads, v.size(2)}, "v", "(Tk, H, Dv)");
  const auto row = offsets(cu_q, q.size(0), "cu_seqlens_q"), key = offsets(cu_k, keys, "cu_seqlens_k");
  STD_TORCH_CHECK(row.size() == key.size(), "cu_seqlens_q and cu_seqlens_k must have one shape");
  check(q, k, v, row.size() - 1, q.size(0), options);
  std::vector<Sequence> sequences(row.size() - 1);
  for (size_t b = 0; b < sequences.size(); b++)
    sequences[b] = {row[b], row[b + 1] - row[b], key[b], key[b + 1] - key[b]};
  return sequences;
}

// Tokens past the last sequence are 0.
void clear_slack(const Tensor& tensor, int64_t used) {
  if (tensor.dim() != 3 || used == tensor.size(0)) return;
  const int64_t token = tensor.stride(0) * tensor.element_size();
  std::memset(static_cast<char*>(tensor.mutable_data_ptr()) + used * token, 0, (tensor.size(0) - used) * token);
}

int64_t used_rows(const std::vector<Sequence>& sequences) {
  return sequences.empty() ? 0 : sequences.back().first_row + sequences.back().rows;
}
int64_t used_keys(const std::vector<Sequence>& sequences) {
  return sequences.empty() ? 0 : sequences.back().first_key + sequences.back().keys;
}

Tensor empty(const Tensor& like, const Tensor& last) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = last.size(-1);
  return new_empty(like, shape, like.scalar_type());
}

// call(kernel) with the kernel of the storage type.
template <typename Call>
auto with_kernel(ScalarType type, const Call& call) {
  const ReluAttention& kernels = unit().relu_attention;
  if (type == ScalarType::Double) return call(kernels.f64);
  if (type == ScalarType::BFloat16) return call(kernels.bf16);
  STD_TORCH_CHECK(type == ScalarType::Float, "q must be float64, float32, bfloat16 or float16");
  return call(kernels.f32);
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Sequence>& sequences, const Options& options) {
  if (q.scalar_type() == ScalarType::Half) {
    constexpr auto wide = ScalarType::Float;
    return as_type(forward(as_type(q, wide), as_type(k, wide), as_type(v, wide), sequences, options), ScalarType::Half);
  }
  Tensor out = empty(q, v);
  with_kernel(q.scalar_type(), [&](const auto& kernel) { Problem(kernel, sequences, options, q, k, v).forward(out); });
  clear_slack(out, used_rows(sequences));
  return out;
}

Gradient4 backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Sequence>& sequences,
                   const Options& options) {
  STD_TORCH_CHECK(grad.dim() == q.dim(), "grad must have the shape of the output");
  for (int64_t d = 0; d < q.dim(); d++)
    STD_TORCH_CHECK(grad.size(d) == (d + 1 < q.dim() ? q : v).size(d), "grad must have the shape of the output");
  if (q.scalar_type() == ScalarType::Half) {
    constexpr auto wide = ScalarType::Float, half = ScalarType::Half;
    auto [grad_q, grad_k, grad_v, grad_bias] =
        backward(as_type(grad, wide), as_type(q, wide), as_type(k, wide), as_type(v, wide), sequences, options);
    return {as_type(grad_q, half), as_type(grad_k, half), as_type(grad_v, half),
            options.rel_bias ? grad_bias : as_type(grad_bias, half)};
  }
  Tensor grad_q = empty(q, q), grad_k = empty(k, k), grad_v = empty(v, v);
  const ScalarType wide = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_bias = options.rel_bias ? new_empty(q, options.rel_bias->sizes(), wide)
                                      : new_empty(q, {0}, q.scalar_type());
  with_kernel(q.scalar_type(), [&](const auto& kernel) {
    Problem problem(kernel, sequences, options, q, k, v);
    problem.backward(as_type(grad, q.scalar_type()), grad_q, grad_k, grad_v,
                     options.rel_bias ? static_cast<decltype(problem.bias.data())>(grad_bias.mutable_data_ptr()) : nullptr);
  });
  clear_slack(grad_q, used_rows(sequences));
  clear_slack(grad_k, used_keys(sequences));
  clear_slack(grad_v, used_keys(sequences));
  return {grad_q, grad_k, grad_v, options.rel_bias ? as_type(grad_bias, options.rel_bias->scalar_type()) : grad_bias};
}

using MaybeTensor = std::optional<Tensor>;

Tensor relu_attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_limit,
                      const MaybeTensor& rel_bias, const MaybeTensor& divisors, bool causal, double scale, double divisor,
                      bool visible) {
  const Options options{key_limit, rel_bias, divisors, causal, scale, divisor, visible};
  return forward(q, k, v, dense_sequences(q, k, v, options), options);
}

Gradient4 relu_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const MaybeTensor& key_limit, const MaybeTensor& rel_bias, const MaybeTensor& divisors,
                                  bool causal, double scale, double divisor, bool visible) {
  const Options options{key_limit, rel_bias, divisors, causal, scale, divisor, visible};
  return backward(grad, q, k, v, dense_sequences(q, k, v, options), options);
}

Tensor relu_attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, int64_t,
                             int64_t, const MaybeTensor& key_limit, const MaybeTensor& rel_bias, const MaybeTensor& divisors,
                             bool causal, double scale, double divisor, bool visible) {
  const Options options{key_limit, rel_bias, divisors, causal, scale, divisor, visible};
  return forward(q, k, v, packed_sequences(q, k, v, cu_q, cu_k, options), options);
}

Gradient4 relu_attention_varlen_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& cu_q, const Tensor& cu_k, int64_t, int64_t,
                                         const MaybeTensor& key_limit, const MaybeTensor& rel_bias,
                                         const MaybeTensor& divisors, bool causal, double scale, double divisor,
                                         bool visible) {
  const Options options{key_limit, rel_bias, divisors, causal, scale, divisor, visible};
  return backward(grad, q, k, v, packed_sequences(q, k, v, cu_q, cu_k, options), options);
}

}  // namespace
}  // namespace genrec

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("relu_attention", TORCH_BOX(&genrec::relu_attention));
  m.impl("relu_attention_backward", TORCH_BOX(&genrec::relu_attention_backward));
  m.impl("relu_attention_varlen", TORCH_BOX(&genrec::relu_attention_varlen));
  m.impl("relu_attention_varlen_backward", TORCH_BOX(&genrec::relu_attention_varlen_backward));
}
