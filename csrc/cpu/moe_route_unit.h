// Routing: softmax over the experts, the top_k best by insertion, softmax over those.
#pragma once

#include "moe.h"
#include "simd.h"

namespace genrec {
namespace {

// Copies `count` numbers and fills up with -inf, which a softmax does not see; returns the length, a multiple of kWidth.
template <typename C>
inline int64_t pad(const C* from, int64_t count, C* to) {
  const int64_t length = (count + kWidth<C> - 1) / kWidth<C> * kWidth<C>;
  for (int64_t i = 0; i < count; i++) to[i] = from[i];
  for (int64_t i = count; i < length; i++) to[i] = C(-__builtin_inf());
  return length;
}

template <typename C>
inline void softmax(C* values, int64_t length) {
  Vec<C> highest = load(values), total = {};
  for (int64_t i = kWidth<C>; i < length; i += kWidth<C>) {
    const Vec<C> value = load(values + i);
    highest = value > highest ? value : highest;
  }
  C top = highest[0];
  for (int64_t j = 1; j < kWidth<C>; j++) top = highest[j] > top ? highest[j] : top;
  for (int64_t i = 0; i < length; i += kWidth<C>) {
    const Vec<C> value = exponential(load(values + i) - top);
    total += value;
    store(values + i, value);
  }
  const C scale = 1 / sum<C>(total);
  for (int64_t i = 0; i < length; i += kWidth<C>) store(values + i, scale * load(values + i));
}

// The highest top_k of `count` scores, falling; the first stays first among equals, and a NaN never moves.
template <typename C>
inline void select(const C* scores, int64_t count, int64_t top_k, C* kept, int32_t* indices) {
  for (int64_t i = 0; i < count; i++) {
    const C score = scores[i];
    int64_t at = i < top_k ? i : top_k - 1;
    if (i >= top_k && !(score > kept[at])) continue;
    for (; at > 0 && score > kept[at - 1]; at--) {
      kept[at] = kept[at - 1];
      indices[at] = indices[at - 1];
    }
    kept[at] = score;
    indices[at] = int32_t(i);
  }
}

template <typename C>
void route(const C* logits, const C* bias, int64_t tokens, int64_t experts, int64_t top_k, bool renormalize, C* weights,
           int32_t* indices, C* scratch) {
  C *probability = scratch, *score = probability + experts + kWidth<C>, *kept = score + experts + kWidth<C>;
  for (int64_t t = 0; t < tokens; t++, logits += experts, weights += top_k, indices += top_k) {
    softmax(probability, pad(logits, experts, probability));
    for (int64_t i = 0; i < experts; i++) score[i] = bias ? probability[i] + bias[i] : probability[i];
    select(score, experts, top_k, kept, indices);
    for (int64_t j = 0; j < top_k; j++) weights[j] = (renormalize ? logits : probability)[indices[j]];
    if (!renormalize) continue;
    softmax(kept, pad(weights, top_k, kept));  // p_j / Σ p over the kept, and never 0 / 0
    for (int64_t j = 0; j < top_k; j++) weights[j] = kept[j];
  }
}

// A softmax backward: over the kept logits, or over all of them with no gradient where nothing was kept.
template <typename C>
void route_backward(const C* grad, const C* logits, const int32_t* indices, int64_t tokens, int64_t experts, int64_t top_k,
                    bool renormalize, C* grad_logits, C* scratch) {
  C *probability = scratch, *kept = scratch + experts + kWidth<C>;
  for (int64_t t = 0; t < tokens; t++, grad += top_k, logits += experts, indices += top_k, grad_logits += experts) {
    for (int64_t i = 0; i < experts; i++) grad_logits[i] = 0;
    C dot = 0;
    if (renormalize) {
      for (int64_t j = 0; j < top_k; j++) kept[j] = logits[indices[j]];
      softmax(kept, pad(kept, top_k, kept));
      for (int64_t j = 0; j < top_k; j++) dot += grad[j] * kept[j];
      for (int64_t j = 0; j < top_k; j++) grad_logits[indices[j]] = kept[j] * (grad[j] - dot);
    } else {
      softmax(probability, pad(logits, experts, probability));
      for (int64_t j = 0; j < top_k; j++) {
        dot += grad[j] * probability[indices[j]];
        grad_logits[indices[j]] = grad[j];
      }
      for (int64_t i = 0; i < experts; i++) grad_logits[i] = probability[i] * (grad_logits[i] - dot);
    }
  }
}

template <typename C>
constexpr MoeRoute<C> moe_route() {
  return {route<C>, route_backward<C>};
}

}  // namespace
}  // namespace genrec
