// genrec::relu_attention, its packed form and their backward passes on the CPU.
//
// Both layouts are a list of sequences, and a work item is a block of rows (or, backward, of keys) of one head of one
// sequence. Threads take items from one queue. Who computes an item, and how sequences are cut into items, changes no bit of
// the result: all sums run in an order that only the sequence itself decides.
#include "tensor.h"
#include "unit.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

namespace genrec {
namespace {

using Gradient4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kWorkPerThread = 1 << 20;  // multiplications that are worth waking up another thread

struct Options {
  const std::optional<Tensor>&key_limit, &rel_bias, &divisors;
  bool causal;
  double scale, divisor;
  bool visible;
};

struct Sequence {
  int64_t first_row, rows, first_key, keys;
};

// Rows and keys of one sequence, for all heads: the item of head h is task · heads + h.
struct Task {
  int64_t sequence, first_row, rows, first_key, keys;

  int64_t cost() const { return rows * keys; }
};

// One tensor of (B, H, L, D) or (T, H, D).
struct Operand {
  char* data;
  int64_t element, batch, head, row, column;

  Operand(const Tensor& tensor, bool packed)
      : data(static_cast<char*>(tensor.data_ptr())), element(tensor.element_size()), batch(packed ? 0 : tensor.stride(0)),
        head(tensor.stride(1)), row(tensor.stride(packed ? 0 : 2)), column(tensor.stride(packed ? 2 : 3)) {}

  Matrix at(int64_t b, int64_t h, int64_t i) const { return {data + (b * batch + h * head + i * row) * element, row, column}; }
};

template <typename T>
struct FreeAligned {
  void operator()(T* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename T> using Memory = std::unique_ptr<T[], FreeAligned<T>>;
template <typename T>
Memory<T> allocate(int64_t size) {
  return Memory<T>(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64))));
}

// The elements of an int32 or int64 tensor, by their place in memory.
struct Integers {
  const void* data;
  bool wide;

  explicit Integers(const Tensor& tensor)
      : data(tensor.const_data_ptr()), wide(tensor.scalar_type() == ScalarType::Long) {}
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

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

// The problem in the types of the kernel: C is what it computes in.
template <typename C>
struct Problem {
  static constexpr ScalarType wide = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

  const Attention<C>& kernel;
  const std::vector<Sequence>& sequences;
  const Options& options;
  int64_t heads, dim, dim_v;
  Operand q, k, v;
  std::optional<Integers> limit;
  int64_t limit_batch = 0, limit_row = 0;
  std::optional<Tensor> divisors;

  std::vector<C> bias;  // of every head by j - anchor, from -reach to reach + panel
  int64_t distances = 0, reach = 0;

  Problem(const Attention<C>& kernel, const std::vector<Sequence>& sequences, const Options& options, const Tensor& q,
          const Tensor& k, const Tensor& v)
      : kernel(kernel), sequences(sequences), options(options), heads(q.size(1)), dim(q.size(-1)), dim_v(v.size(-1)),
        q(q, q.dim() == 3), k(k, q.dim() == 3), v(v, q.dim() == 3) {
    if (options.key_limit) {
      limit.emplace(*options.key_limit);
      limit_row = options.key_limit->stride(-1);
      limit_batch = q.dim() == 3 ? 0 : options.key_limit->stride(0);
    }
    if (options.divisors) divisors = dense(as_type(*options.divisors, wide));
    if (options.rel_bias) spread(dense(as_type(*options.rel_bias, wide)));
  }

  void spread(const Tensor& rel_bias) {
    distances = rel_bias.size(1);
    for (const Sequence& s : sequences) reach = std::max({reach, s.rows, s.keys});
    const C* table = read<C>(rel_bias);
    bias.reserve(heads * (2 * reach + kernel.panel + 1));
    for (int64_t h = 0; h < heads; h++, table += distances)
      for (int64_t x = -reach; x <= reach + kernel.panel; x++) bias.push_back(table[std::min(std::abs(x), distances - 1)]);
  }

  // Room for what a block says about each of its rows.
  struct Rows {
    std::vector<int64_t> end, anchor;
    std::vector<C> divisor;

    explicit Rows(int64_t count) : end(count), anchor(count), divisor(count) {}
  };

  void describe(const Task& task, Rows& rows) const {
    const Sequence& s = sequences[task.sequence];
    const bool masked = options.causal || limit;
    if (divisors) std::fill_n(rows.divisor.data(), task.rows, read<C>(*divisors)[task.sequence]);
    for (int64_t i = 0; i < task.rows; i++) {
      const int64_t row = task.first_row + i, diagonal = row + s.keys - s.rows;
      int64_t seen = options.causal ? diagonal + 1 : s.keys;
      if (limit) seen = (*limit)[task.sequence * limit_batch + (s.first_row + row) * limit_row];
      rows.end[i] = std::clamp<int64_t>(seen, 0, s.keys);
      rows.anchor[i] = masked ? rows.end[i] - 1 : diagonal;
      if (divisors) continue;
      const double count = std::max<int64_t>(options.visible ? rows.end[i] : s.keys, 1);
      rows.divisor[i] = C(options.divisor > 0 && !options.visible ? options.divisor : count);
    }
  }

  Block<C> block(const Task& task, int64_t h, const Rows& rows) const {
    const Sequence& s = sequences[task.sequence];
    const int64_t b = task.sequence;
    return {task.rows, s.keys, dim, dim_v,
            q.at(b, h, s.first_row + task.first_row), k.at(b, h, s.first_key), v.at(b, h, s.first_key),
            rows.end.data(), rows.anchor.data(),
            bias.empty() ? nullptr : bias.data() + h * (2 * reach + kernel.panel + 1) + reach,
            rows.divisor.data(), C(options.scale)};
  }

  // run(task, head, rows of the task, scratch) for every head of every task.
  template <typename Run>
  void for_each(std::vector<Task>& tasks, int64_t (*scratch_size)(int64_t, int64_t, int64_t, int64_t), const Run& run) const {
    int64_t cost = 0, rows = 0, keys = 0;
    for (const Task& task : tasks) {
      cost += task.cost() * heads * (dim + dim_v);
      rows = std::max(rows, task.rows);
      keys = std::max(keys, sequences[task.sequence].keys);
    }
    const int64_t items = tasks.size() * heads;
    const int64_t workers = std::min<int64_t>({items, torch::stable::get_num_threads(), 1 + cost / kWorkPerThread});
    if (workers > 1)
      std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
    const int64_t step = std::max<int64_t>(1, items / (32 * std::max<int64_t>(1, workers)));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      const Memory<C> scratch = allocate<C>(scratch_size(rows, keys, dim, dim_v));
      Rows room(rows);
      int64_t described = -1;
      for (int64_t begin; (begin = next.fetch_add(step)) < items;)
        for (int64_t item = begin; item < std::min(items, begin + step); item++) {
          const Task& task = tasks[item / heads];
          if (described != item / heads) describe(task, room);
          described = item / heads;
          run(task, item % heads, room, scratch.get());
        }
    });
  }

  void forward(const Tensor& out) const {
    const Operand to(out, out.dim() == 3);
    std::vector<Task> tasks;
    tasks.reserve(sequences.size());
    for (size_t b = 0; b < sequences.size(); b++)
      for (int64_t row = 0; row < sequences[b].rows; row += kernel.rows)
        tasks.push_back({int64_t(b), row, std::min(kernel.rows, sequences[b].rows - row), 0, sequences[b].keys});
    for_each(tasks, kernel.forward_scratch, [&](const Task& task, int64_t h, const Rows& rows, C* scratch) {
      const Sequence& s = sequences[task.sequence];
      kernel.forward(block(task, h, rows), to.at(task.sequence, h, s.first_row + task.first_row), scratch);
    });
  }

  // Keys whose part of the bias gradient is summed by itself: up to 16 parts of a sequence.
  int64_t span(int64_t keys) const {
    const int64_t size = std::max(2 * kernel.keys, (keys + 15) / 16);
    return (size + kernel.keys - 1) / kernel.keys * kernel.keys;
  }

  // One pass over a whole sequence takes five products. Cut into pieces of rows, which give the gradient of q, and pieces of
  // keys, which give the others, it takes seven: only where a sequence is too long to be one thread's share.
  std::vector<Task> backward_tasks() const {
    int64_t total = 0;
    for (const Sequence& s : sequences) total += s.rows * s.keys * heads;
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<Task> tasks;
    tasks.reserve(sequences.size());
    for (int64_t b = 0; b < int64_t(sequences.size()); b++) {
      const auto [first_row, rows, first_key, keys] = sequences[b];
      const int64_t piece = span(keys);
      if (5 * threads * rows * keys <= 7 * total || keys <= piece) {
        tasks.push_back({b, 0, rows, 0, keys});
        continue;
      }
      for (int64_t key = 0; key < keys; key += piece) tasks.push_back({b, 0, rows, key, std::min(piece, keys - key)});
      for (int64_t row = 0; row < rows; row += piece) tasks.push_back({b, row, std::min(piece, rows - row), 0, keys});
    }
    return tasks;
  }

  void backward(const Tensor& grad, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, C* grad_bias) const {
    const bool packed = grad.dim() == 3;
    const Operand from(grad, packed), to_q(grad_q, packed), to_k(grad_k, packed), to_v(grad_v, packed);

    // Every head, sequence and span has its own sums by distance, as many as it has distances: no more than keys in all.
    std::vector<int64_t> part(sequences.size() + 1), size(sequences.size());
    for (size_t b = 0; b < sequences.size(); b++) {
      const auto [first_row, rows, first_key, keys] = sequences[b];
      size[b] = std::min(distances, std::max(rows, keys));
      part[b + 1] = part[b] + heads * ((keys + span(keys) - 1) / span(keys)) * size[b];
    }
    const Memory<C> parts = allocate<C>(grad_bias ? part.back() : 0);
    const auto part_of = [&](int64_t b, int64_t h) {
      return parts.get() + part[b] + h * ((part[b + 1] - part[b]) / heads);
    };

    std::vector<Task> tasks = backward_tasks();
    for_each(tasks, kernel.backward_scratch, [&](const Task& task, int64_t h, const Rows& rows, C* scratch) {
      const int64_t b = task.sequence;
      const Sequence& s = sequences[b];
      const bool all_rows = task.rows == s.rows, all_keys = task.keys == s.keys;
      Gradients<C> gradients = {from.at(b, h, s.first_row + task.first_row), {}, {}, {}, nullptr, size[b], span(s.keys)};
      if (all_keys) gradients.grad_q = to_q.at(b, h, s.first_row + task.first_row);
      if (all_rows) {
        gradients.grad_k = to_k.at(b, h, s.first_key);
        gradients.grad_v = to_v.at(b, h, s.first_key);
        if (grad_bias) gradients.grad_bias = part_of(b, h);
      }
      kernel.backward(block(task, h, rows), gradients, task.first_key, task.first_key + task.keys, scratch);
    });

    if (!grad_bias) return;
    std::fill(grad_bias, grad_bias + heads * distances, C(0));
    for (int64_t b = 0; b < int64_t(sequences.size()); b++)
      for (int64_t h = 0; h < heads; h++)
        for (const C *p = part_of(b, h), *end = part_of(b, h + 1); p < end; p += size[b])
          for (int64_t d = 0; d < size[b]; d++) grad_bias[h * distances + d] += p[d];
  }
};

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
