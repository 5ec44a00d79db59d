// genrec::moe_route and its backward pass on the CPU: token by token, shared out by the number of logits.
#include "tensor.h"
#include "unit.h"

#include <optional>
#include <tuple>
#include <vector>

namespace {

using namespace genrec;

// call(first, count) with scratch for one thread, over tokens of `experts` logits.
template <typename C, typename Call>
void for_tokens(int64_t tokens, int64_t experts, Call&& call) {
  torch::stable::parallel_for(0, tokens, 1 + 16384 / (experts + 1), [&](int64_t begin, int64_t end) {
    std::vector<C> scratch(3 * (experts + 64));
    call(begin, end - begin, scratch.data());
  });
}

template <typename C>
std::tuple<Tensor, Tensor> route(const MoeRoute<C>& unit, const Tensor& logits_, int64_t top_k,
                                 const std::optional<Tensor>& bias_, bool renormalize) {
  const Tensor logits = dense(as_type(logits_, kType<C>));
  const Tensor bias = bias_ ? dense(as_type(*bias_, kType<C>)) : logits;
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  Tensor weights = new_empty(logits, {tokens, top_k}, kType<C>);
  Tensor indices = new_empty(logits, {tokens, top_k}, ScalarType::Int);
  for_tokens<C>(tokens, experts, [&](int64_t first, int64_t count, C* scratch) {
    unit.forward(read<C>(logits) + first * experts, bias_ ? read<C>(bias) : nullptr, count, experts, top_k, renormalize,
                 write<C>(weights) + first * top_k, write<int32_t>(indices) + first * top_k, scratch);
  });
  return {weights, indices};
}

template <typename C>
Tensor route_backward(const MoeRoute<C>& unit, const Tensor& grad_, const Tensor& logits_, const Tensor& indices_,
                      bool renormalize) {
  const Tensor grad = dense(as_type(grad_, kType<C>)), logits = dense(as_type(logits_, kType<C>));
  const Tensor indices = dense(as_type(indices_, ScalarType::Int));
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = grad.size(1);
  const int32_t* index = read<int32_t>(indices);
  for (int64_t i = 0; i < tokens * top_k; i++)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < experts, "moe_route_backward: indices holds ", index[i], "; expected 0 … ",
                    experts - 1);
  Tensor grad_logits = new_empty(logits, {tokens, experts}, kType<C>);
  for_tokens<C>(tokens, experts, [&](int64_t first, int64_t count, C* scratch) {
    unit.backward(read<C>(grad) + first * top_k, read<C>(logits) + first * experts, index + first * top_k, count, experts,
                  top_k, renormalize, write<C>(grad_logits) + first * experts, scratch);
  });
  return as_type(grad_logits, logits_.scalar_type());
}

std::tuple<Tensor, Tensor> moe_route(const Tensor& logits, int64_t top_k, std::optional<Tensor> bias, bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 2, "moe_route: logits must be (T, E)");
  STD_TORCH_CHECK(1 <= top_k && top_k <= logits.size(1), "moe_route: top_k is ", top_k, "; expected 1 … ", logits.size(1));
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == logits.size(1)), "moe_route: bias must be (E,)");
  const Moe& moe = unit().moe;
  if (logits.scalar_type() == ScalarType::Double) return route(moe.route_f64, logits, top_k, bias, renormalize);
  return route(moe.route_f32, logits, top_k, bias, renormalize);
}

Tensor moe_route_backward(const Tensor& grad, const Tensor& logits, const Tensor& indices, bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 2 && grad.dim() == 2 && indices.dim() == 2 && grad.size(0) == logits.size(0) &&
                      indices.size(0) == grad.size(0) && indices.size(1) == grad.size(1) && grad.size(1) <= logits.size(1),
                  "moe_route_backward: expected grad (T, k), logits (T, E) and indices (T, k)");
  const Moe& moe = unit().moe;
  if (logits.scalar_type() == ScalarType::Double)
    return route_backward(moe.route_f64, grad, logits, indices, renormalize);
  return route_backward(moe.route_f32, grad, logits, indices, renormalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}
