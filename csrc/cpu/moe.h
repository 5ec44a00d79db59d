// Mixture of experts: what a unit offers, and moe.cpp and moe_route.cpp call.
#pragma once

#include <cstdint>

namespace genrec {

// A batch of tokens with its T · k (token, slot) pairs sorted by expert: row r of the sorted rows is pair[r] = t · k + slot,
// and expert e has the rows start[e] … start[e + 1]. Arrays of rows are `hidden_stride` or `dim_stride` wide: F and D
// rounded up to blocks, so that whole vectors can be stored, and to an odd number of them, so that the rows of a power of
// two do not all fall into the same cache sets.
template <typename C>
struct Experts {
  int64_t dim, hidden, slots;         // D, F, k
  int64_t dim_stride, hidden_stride;
  const int64_t* start;               // (E + 1,)
  const int32_t *pair, *token;        // (rows,)
  const C *x, *weights, *grad;        // (T, D), (T, k), (T, D); grad in the backward pass only
  int64_t x_stride, grad_stride;
  const void *gate_up, *down;         // (E, 2F, D), (E, D, F) of the storage type, contiguous along the last dimension
  int64_t gate_up_expert, gate_up_row, down_expert, down_row;  // their strides
  C* activation;                      // (rows, F) silu(G) ⊙ U; in the backward pass times the routing weight
  C* by_pair;                         // (T · k, D) what every pair adds to its token's output or gradient
  C *grad_gate, *grad_up;             // (rows, F)
  C* dots;                            // (T · k, hidden_stride / block): the routing weights' gradients in parts
  void *grad_gate_up, *grad_down;     // as gate_up and down, contiguous; in C if `accumulate` says so
  bool first;                         // gradients of the weights start here; otherwise they are added to
};

// Does the share [begin, end) of an expert's work, counted in blocks of columns; packed is scratch for packed weights.
template <typename C>
using ExpertStep = void (*)(const Experts<C>&, int64_t expert, int64_t begin, int64_t end, C* packed);

// The kernels for one storage type of the weights, which is computed in C.
template <typename C>
struct MoeExperts {
  int64_t vector, block;  // columns that belong together: of `activate`, of all others

  ExpertStep<C> activate;                                 // blocks of F: activation
  ExpertStep<C> project;                                  // blocks of D: by_pair = weight · activation Wdᵀ
  ExpertStep<C> differentiate;                            // blocks of F: activation, grad_gate, grad_up, dots
  ExpertStep<C> project_back;                             // blocks of D: by_pair = [grad_gate, grad_up] Wgu
  ExpertStep<C> gradient_gate_up, gradient_down;          // blocks of D, of F; in the storage type
  ExpertStep<C> accumulate_gate_up, accumulate_down;      // the same in C

  // (tokens, D) of the storage type: the sum over every token's pairs, in their order.
  void (*combine)(const Experts<C>&, int64_t begin, int64_t end, void* out);
};

// Routing of `tokens` rows of logits, (T, E) contiguous; bias may be null. scratch holds 3 (E + 64) numbers.
template <typename C>
struct MoeRoute {
  void (*forward)(const C* logits, const C* bias, int64_t tokens, int64_t experts, int64_t top_k, bool renormalize,
                  C* weights, int32_t* indices, C* scratch);
  void (*backward)(const C* grad, const C* logits, const int32_t* indices, int64_t tokens, int64_t experts, int64_t top_k,
                   bool renormalize, C* grad_logits, C* scratch);
};

struct Moe {
  MoeExperts<float> f32, bf16;
  MoeExperts<double> f64;
  MoeRoute<float> route_f32;
  MoeRoute<double> route_f64;
};

// Packed weights that a thread holds in its L2 cache at a time, and rows that a gradient sums in registers.
constexpr int64_t kPackedBytes = 128 << 10;
constexpr int64_t kDepthBlock = 256;

}  // namespace genrec
