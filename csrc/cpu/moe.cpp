// genrec::moe_experts and its backward pass on the CPU: a counting sort of the (token, slot) pairs by expert, then one parallel
// step after another, each shared out by the multiplications it takes.
#include "tensor.h"
#include "unit.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace genrec;

constexpr int64_t kRowsPerExpert = 256;  // a batch has this many on average: scratch stays small, packing stays cheap
constexpr int64_t kPackingRows = 8;      // reading and packing weights costs about as much as so many rows
constexpr int64_t kShare = 1 << 19;      // multiplications below which another thread costs more than it saves

int64_t blocks(int64_t columns, int64_t block) { return (columns + block - 1) / block; }

// In `type`, contiguous along the last dimension.
Tensor rows_of(const Tensor& tensor, ScalarType type) {
  const Tensor typed = as_type(tensor, type);
  const int64_t last = typed.dim() - 1;
  return typed.stride(last) == 1 || typed.size(last) <= 1 ? typed : torch::stable::contiguous(typed);
}

// Uninitialised arrays, every one on its own cache lines.
template <typename C>
class Scratch {
 public:
  explicit Scratch(std::initializer_list<std::pair<C**, int64_t>> arrays) {
    int64_t lines = 0;
    for (auto [array, size] : arrays) lines += lines_of(size);
    memory_.reset(new Line[lines]);
    Line* line = memory_.get();
    for (auto [array, size] : arrays) {
      *array = reinterpret_cast<C*>(line);
      line += lines_of(size);
    }
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  static int64_t lines_of(int64_t size) { return (size * int64_t(sizeof(C)) + 63) / 64; }
  std::unique_ptr<Line[]> memory_;
};

// Which rows every expert gets, batch by batch.
class Assignment {
 public:
  Assignment(const Tensor& indices, int64_t experts)
      : experts_(experts), slots_(indices.size(1)), indices_(dense(indices)), start_(experts + 1) {
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long,
                    "moe_experts: indices must be int32 or int64");
    const int64_t tokens = indices.size(0), pairs = tokens * slots_;
    batch_ = std::max<int64_t>(1, std::min(tokens, kRowsPerExpert * experts / std::max<int64_t>(1, slots_)));
    pair_.resize(batch_ * slots_);
    token_.resize(batch_ * slots_);
    with_indices([&](const auto* index) {
      for (int64_t i = 0; i < pairs; i++)
        STD_TORCH_CHECK(index[i] >= 0 && index[i] < experts_, "moe_experts: indices holds ", int64_t(index[i]),
                        "; expected 0 … ", experts_ - 1, ", one of ", experts_, " experts");
    });
  }

  int64_t batch() const { return batch_; }

  // Counting sort of the pairs of tokens [first, first + tokens) into start, pair and token; stable.
  template <typename C>
  void sort(int64_t first, int64_t tokens, Experts<C>& all) {
    std::fill(start_.begin(), start_.end(), 0);
    with_indices([&](const auto* index) {
      index += first * slots_;
      for (int64_t i = 0; i < tokens * slots_; i++) start_[index[i]]++;
      int64_t sum = 0;
      for (int64_t& start : start_) start = std::exchange(sum, sum + start);
      for (int64_t t = 0, i = 0; t < tokens; t++)
        for (int64_t j = 0; j < slots_; j++, i++) {
          const int64_t row = start_[index[i]]++;
          pair_[row] = int32_t(i);
          token_[row] = int32_t(t);
        }
      std::copy_backward(start_.begin(), start_.end() - 1, start_.end());
      start_[0] = 0;
    });
    all.start = start_.data();
    all.pair = pair_.data();
    all.token = token_.data();
  }

  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t e = 0; e < experts_; e++) most = std::max(most, start_[e + 1] - start_[e]);
    return most;
  }

 private:
  template <typename Call>
  void with_indices(Call&& call) const {
    if (indices_.scalar_type() == ScalarType::Int) return call(read<int32_t>(indices_));
    call(read<int64_t>(indices_));
  }

  int64_t experts_, slots_, batch_;
  Tensor indices_;
  std::vector<int64_t> start_;
  std::vector<int32_t> pair_, token_;
};

// A step, how many blocks of columns it has per expert, and what a row of a block costs.
template <typename C>
struct Work {
  ExpertStep<C> step;
  int64_t blocks, cost;
};

int64_t most_shares() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// All blocks of all experts, cut into shares of equal cost. Nothing that is computed depends on where the cuts are.
template <typename C>
void run(const Experts<C>& all, int64_t experts, std::initializer_list<Work<C>> works, C* packed, int64_t packed_size) {
  const auto cost_of = [&](const Work<C>& work, int64_t expert) {
    const int64_t rows = all.start[expert + 1] - all.start[expert];
    return rows ? (rows + kPackingRows) * work.cost : 0;
  };
  int64_t total = 0;
  for (const auto& work : works)
    for (int64_t e = 0; e < experts; e++) total += work.blocks * cost_of(work, e);
  const int64_t shares = std::clamp<int64_t>(total / kShare, 1, most_shares());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t low = total * begin / shares, high = total * end / shares;
    int64_t at = 0;
    for (const auto& work : works)
      for (int64_t e = 0; e < experts; e++) {
        const int64_t cost = cost_of(work, e);
        if (cost == 0) continue;
        const auto block = [&](int64_t limit) {
          return std::clamp<int64_t>((limit - at + cost - 1) / cost, 0, work.blocks);
        };
        if (block(low) < block(high)) work.step(all, e, block(low), block(high), packed + begin * packed_size);
        at += work.blocks * cost;
      }
  });
}

// The arguments as the kernels read them: what had to be converted, and pointers into it.
template <typename C>
struct Arguments {
  Tensor x, weights, gate_up, down;
  int64_t tokens, experts;
  Experts<C> all = {};

  Arguments(const MoeExperts<C>& unit, ScalarType storage, const Tensor& x_, const Tensor& weights_, const Tensor& indices,
            const Tensor& gate_up_, const Tensor& down_)
      : x(rows_of(x_, kType<C>)),
        weights(dense(as_type(weights_, kType<C>))),
        gate_up(rows_of(gate_up_, storage)),
        down(rows_of(down_, storage)),
        tokens(x_.size(0)),
        experts(gate_up_.size(0)) {
    all.dim = x.size(1);
    all.hidden = down.size(2);
    all.slots = indices.size(1);
    all.dim_stride = (blocks(all.dim, unit.block) | 1) * unit.block;
    all.hidden_stride = (blocks(all.hidden, unit.block) | 1) * unit.block;
    all.x = read<C>(x);
    all.x_stride = x.stride(0);
    all.weights = read<C>(weights);
    all.gate_up = gate_up.const_data_ptr();
    all.gate_up_expert = gate_up.stride(0);
    all.gate_up_row = gate_up.stride(1);
    all.down = down.const_data_ptr();
    all.down_expert = down.stride(0);
    all.down_row = down.stride(1);
  }

  // What one thread packs: as much as stays in cache, or one block, and a tile of a gradient's rows.
  int64_t packed_size(const MoeExperts<C>& unit) const {
    const int64_t block = unit.block * std::max(3 * all.dim, 2 * all.hidden);
    return std::max<int64_t>(kPackedBytes / sizeof(C), block) + 17 * kDepthBlock;
  }
};

template <typename C>
void combine(const MoeExperts<C>& unit, const Experts<C>& all, int64_t tokens, char* out) {
  const int64_t grain = 1 + 65536 / (1 + all.slots * all.dim);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { unit.combine(all, begin, end, out); });
}

// An expert that no token chose in the first batch starts from gradients of zero.
template <typename C>
void clear_idle(const Experts<C>& all, int64_t experts, const Tensor& gate_up, const Tensor& down) {
  if (experts == 0) return;
  for (const Tensor& gradient : {gate_up, down}) {
    const int64_t bytes = gradient.numel() / experts * gradient.element_size();
    char* memory = static_cast<char*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, experts, 1 + (1 << 18) / (bytes + 1), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e++)
        if (all.start[e] == all.start[e + 1]) std::memset(memory + e * bytes, 0, bytes);
    });
  }
}

template <typename C>
Tensor forward(const MoeExperts<C>& unit, ScalarType storage, const Tensor& x, const Tensor& weights, const Tensor& indices,
               const Tensor& gate_up, const Tensor& down) {
  Assignment pairs(indices, gate_up.size(0));
  Arguments<C> a(unit, storage, x, weights, indices, gate_up, down);
  Experts<C>& all = a.all;
  const int64_t rows = pairs.batch() * all.slots, packed_size = a.packed_size(unit);
  C* packed;
  const Scratch<C> scratch{{&all.activation, rows * all.hidden_stride},
                           {&all.by_pair, rows * all.dim_stride},
                           {&packed, packed_size * most_shares()}};
  const Tensor y = new_empty(x, {a.tokens, all.dim}, storage);
  for (int64_t t = 0; t < a.tokens; t += pairs.batch()) {
    const int64_t tokens = std::min(pairs.batch(), a.tokens - t);
    pairs.sort(t, tokens, all);
    run(all, a.experts, {Work<C>{unit.activate, blocks(all.hidden, unit.vector), 2 * all.dim * unit.vector}}, packed,
        packed_size);
    run(all, a.experts, {Work<C>{unit.project, blocks(all.dim, unit.block), all.hidden * unit.block}}, packed, packed_size);
    combine(unit, all, tokens, static_cast<char*>(y.mutable_data_ptr()) + t * all.dim * y.element_size());
    all.x += tokens * all.x_stride;
    all.weights += tokens * all.slots;
  }
  return as_type(y, x.scalar_type());
}

template <typename C>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const MoeExperts<C>& unit, ScalarType storage, const Tensor& grad_,
                                                    const Tensor& x, const Tensor& weights, const Tensor& indices,
                                                    const Tensor& gate_up, const Tensor& down) {
  Assignment pairs(indices, gate_up.size(0));
  Arguments<C> a(unit, storage, x, weights, indices, gate_up, down);
  Experts<C>& all = a.all;
  const Tensor grad = rows_of(grad_, kType<C>);
  all.grad = read<C>(grad);
  all.grad_stride = grad.stride(0);
  const int64_t rows = pairs.batch() * all.slots, packed_size = a.packed_size(unit);
  const int64_t dim_blocks = blocks(all.dim, unit.block), hidden_blocks = blocks(all.hidden, unit.block);
  const int64_t dots_stride = all.hidden_stride / unit.block;
  C* packed;
  const Scratch<C> scratch{{&all.activation, rows * all.hidden_stride}, {&all.grad_gate, rows * all.hidden_stride},
                           {&all.grad_up, rows * all.hidden_stride},    {&all.by_pair, rows * all.dim_stride},
                           {&all.dots, rows * dots_stride},                  {&packed, packed_size * most_shares()}};
  pairs.sort(0, std::min(pairs.batch(), a.tokens), all);
  // A gradient that is stored more than once keeps the precision of its sum between.
  const bool once = a.tokens <= pairs.batch() && pairs.most_rows() <= kDepthBlock;
  const ScalarType sums = once ? storage : kType<C>;
  const auto step_gate_up = once ? unit.gradient_gate_up : unit.accumulate_gate_up;
  const auto step_down = once ? unit.gradient_down : unit.accumulate_down;
  const Tensor grad_x = new_empty(x, {a.tokens, all.dim}, storage);
  const Tensor grad_weights = new_empty(x, {a.tokens, all.slots}, kType<C>);
  const Tensor grad_gate_up = new_empty(x, {a.experts, 2 * all.hidden, all.dim}, sums);
  const Tensor grad_down = new_empty(x, {a.experts, all.dim, all.hidden}, sums);
  all.grad_gate_up = grad_gate_up.mutable_data_ptr();
  all.grad_down = grad_down.mutable_data_ptr();
  all.first = true;
  for (int64_t t = 0; t < std::max<int64_t>(a.tokens, 1); t += pairs.batch(), all.first = false) {
    const int64_t tokens = std::min(pairs.batch(), a.tokens - t);
    if (t) pairs.sort(t, tokens, all);
    if (all.first) clear_idle(all, a.experts, grad_gate_up, grad_down);
    run(all, a.experts, {Work<C>{unit.differentiate, hidden_blocks, 3 * all.dim * unit.block}}, packed, packed_size);
    run(all, a.experts,
        {Work<C>{unit.project_back, dim_blocks, 2 * all.hidden * unit.block},
         Work<C>{step_gate_up, dim_blocks, 2 * all.hidden * unit.block},
         Work<C>{step_down, hidden_blocks, all.dim * unit.block}},
        packed, packed_size);
    combine(unit, all, tokens, static_cast<char*>(grad_x.mutable_data_ptr()) + t * all.dim * grad_x.element_size());
    C* grad_weight = write<C>(grad_weights) + t * all.slots;
    for (int64_t i = 0; i < tokens * all.slots; i++) {
      grad_weight[i] = 0;
      for (int64_t b = 0; b < hidden_blocks; b++) grad_weight[i] += all.dots[i * dots_stride + b];
    }
    all.x += tokens * all.x_stride;
    all.grad += tokens * all.grad_stride;
    all.weights += tokens * all.slots;
  }
  const ScalarType type = x.scalar_type();
  return {as_type(grad_x, type), as_type(grad_weights, weights.scalar_type()), as_type(grad_gate_up, type),
          as_type(grad_down, type)};
}

void check(const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& gate_up, const Tensor& down) {
  STD_TORCH_CHECK(x.dim() == 2 && weights.dim() == 2 && indices.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3,
                  "moe_experts: expected x (T, D), weights (T, k), indices (T, k), w_gate_up (E, 2F, D), w_down (E, D, F)");
  STD_TORCH_CHECK(gate_up.size(2) == x.size(1) && down.size(0) == gate_up.size(0) && down.size(1) == x.size(1) &&
                      2 * down.size(2) == gate_up.size(1),
                  "moe_experts: w_gate_up must be (E, 2F, D) and w_down (E, D, F) with the D of x");
  STD_TORCH_CHECK(weights.size(0) == x.size(0) && indices.size(0) == x.size(0) && weights.size(1) == indices.size(1),
                  "moe_experts: weights and indices must be (T, k) with the T of x");
  STD_TORCH_CHECK(gate_up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type(),
                  "moe_experts: x, w_gate_up and w_down must have one dtype");
}

// call(unit, storage type) for the type that tensors of x's dtype are kept in.
template <typename Call>
auto with_unit(const Tensor& x, Call&& call) {
  const Moe& moe = unit().moe;
  if (x.scalar_type() == ScalarType::Double) return call(moe.f64, ScalarType::Double);
  if (x.scalar_type() == ScalarType::BFloat16) return call(moe.bf16, ScalarType::BFloat16);
  return call(moe.f32, ScalarType::Float);
}

Tensor moe_experts(const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& gate_up,
                   const Tensor& down) {
  check(x, weights, indices, gate_up, down);
  return with_unit(x, [&](const auto& unit, ScalarType storage) {
    return forward(unit, storage, x, weights, indices, gate_up, down);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_backward(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                                                const Tensor& indices, const Tensor& gate_up,
                                                                const Tensor& down) {
  check(x, weights, indices, gate_up, down);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1),
                  "moe_experts_backward: grad must be (T, D), the shape of x");
  return with_unit(x, [&](const auto& unit, ScalarType storage) {
    return backward(unit, storage, grad, x, weights, indices, gate_up, down);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}
