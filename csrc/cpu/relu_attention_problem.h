// The whole of an attention call on the CPU: its sequences cut into work items, and threads that take them from one queue.
//
// Both layouts are a list of sequences, and a work item is a block of rows (or, backward, of keys) of one head of one
// sequence. Who computes an item, and how sequences are cut into items, changes no bit of the result: all sums run in an
// order that only the sequence itself decides.
#pragma once

#include "tensor.h"
#include "unit.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <vector>

namespace genrec {

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

// The problem in the types of the kernel: C is what it computes in.
template <typename C>
struct Problem {
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
    if (options.divisors) divisors = dense(as_type(*options.divisors, kType<C>));
    if (options.rel_bias) spread(dense(as_type(*options.rel_bias, kType<C>)));
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
      const Buffer<C> scratch = buffer<C>(scratch_size(rows, keys, dim, dim_v));
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
    const Buffer<C> parts = buffer<C>(grad_bias ? part.back() : 0);
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

}  // namespace genrec
