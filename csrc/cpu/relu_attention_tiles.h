// What both passes of ReLU attention share: packing into cache, the weights P of a block, and sums that skip zero weights.
//
// A block is at most kRows rows by kKeys keys. Its weights are computed in register tiles, a group of TILE_ROWS rows by a
// panel of kTileColumns keys; one bit per tile remembers whether anything in it is positive. Whatever the blocks and tiles,
// every sum runs over keys, rows or features in ascending order, so how the work is cut never shows in a result.
#pragma once

#include "product.h"
#include "relu_attention.h"

namespace genrec {
namespace {

constexpr int64_t kRows = 96;
constexpr int64_t kKeys = 64;
constexpr int64_t kGroups = kRows / TILE_ROWS;
template <typename C> constexpr int64_t kPanels = kKeys / kTileColumns<C>;
static_assert(kRows % TILE_ROWS == 0 && kGroups < 64, "a bit per group");

// Distance of the rows of a packed matrix: one panel more than needed, or a power of two would put all into a few cache sets.
template <typename C>
constexpr int64_t pitch(int64_t columns) {
  return (columns + 2 * kTileColumns<C> - 1) / kTileColumns<C> * kTileColumns<C>;
}
template <typename C> constexpr int64_t kPitch = pitch<C>(kKeys);  // of the weights of a block

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of the scratch; without memory it only counts.
template <typename C>
struct Scratch {
  C* memory;
  int64_t used = 0;

  C* take(int64_t size) {
    C* piece = memory ? memory + used : nullptr;
    used += (size + kTileColumns<C> - 1) / kTileColumns<C> * kTileColumns<C>;
    return piece;
  }
};

// A vector from row i, column j on; 0 past the last column.
template <typename S>
inline Vec<Compute<S>> part(Matrix matrix, int64_t i, int64_t j, int64_t columns) {
  using C = Compute<S>;
  const S* at = static_cast<const S*>(matrix.data) + i * matrix.row + j * matrix.column;
  if (matrix.column == 1 && j + kWidth<C> <= columns) return load(at);
  C lanes[kWidth<C>] = {};
  for (int64_t l = 0; l < kWidth<C> && j + l < columns; l++) lanes[l] = widen(at[l * matrix.column]);
  return load(lanes);
}

// packed[i][j] = change(matrix[first + i][j], i), filled up to whole tiles with zeros. Returns whether all is finite.
template <typename S, typename Change>
inline bool pack_rows(Matrix matrix, int64_t first, int64_t count, int64_t columns, Compute<S>* packed,
                      const Change& change) {
  using C = Compute<S>;
  const int64_t wide = pitch<C>(columns);
  Vec<C> zeros = {};
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < wide - kTileColumns<C>; j += kWidth<C>) {
      const Vec<C> value = change(part<S>(matrix, first + i, j, columns), i);
      zeros += value * C(0);
      store(packed + i * wide + j, value);
    }
  return sum<C>(zeros) == 0;
}

// Panels of the transposed matrix, step by step the columns of kTileColumns rows; rows past `count` are 0.
template <typename S>
inline void pack_panels(Matrix matrix, int64_t first, int64_t count, int64_t columns, Compute<S>* packed) {
  using C = Compute<S>;
  constexpr int64_t width = kWidth<C>, panel = kTileColumns<C>;
  for (int64_t p = 0; p < count; p += panel, packed += panel * columns)
    for (int64_t h = 0; h < panel; h += width)
      for (int64_t d = 0; d < columns; d += width) {
        Vec<C> square[width];
#pragma GCC unroll 16
        for (int64_t j = 0; j < width; j++)
          square[j] = p + h + j < count ? part<S>(matrix, first + p + h + j, d, columns) : Vec<C>{};
        transpose<C>(square);
#pragma GCC unroll 16
        for (int64_t l = 0; l < width; l++)
          if (d + l < columns) store(packed + (d + l) * panel + h, square[l]);
      }
}

template <typename C>
inline Ints<C> lanes() {
  Ints<C> numbers;
  for (int64_t i = 0; i < kWidth<C>; i++) numbers[i] = i;
  return numbers;
}

// What a block of rows sees, group by group.
struct Sight {
  int64_t last[kGroups];   // the largest end in a group
  int64_t whole[kGroups];  // the smallest
  int64_t furthest = 0;    // the largest of all

  Sight(const int64_t* end, int64_t rows) {
    for (int64_t g = 0; g * TILE_ROWS < rows; g++) {
      last[g] = whole[g] = end[g * TILE_ROWS];
      for (int64_t i = g * TILE_ROWS + 1; i < least(rows, (g + 1) * TILE_ROWS); i++) {
        last[g] = most(last[g], end[i]);
        whole[g] = least(whole[g], end[i]);
      }
      furthest = most(furthest, last[g]);
    }
  }
};

// The weights of a block: weights[i * kPitch + j], defined in the tiles that have a positive one.
template <typename C>
struct Weights {
  C* value;
  uint64_t by_group[kGroups];     // bit p: rows of the group have positive weights in panel p
  uint64_t by_panel[kPanels<C>];  // bit g: the same, seen from the keys
};

// One tile of weights from its scores: bias, mask, ReLU. Returns whether one is positive; a NaN counts and stays.
template <int ROWS, typename C>
inline bool weigh(const Tile<ROWS, C>& scores, const Block<C>& block, int64_t row, int64_t key, bool masked, C* weights) {
  Ints<C> found = {};
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int h = 0; h < kTileVectors; h++) {
      const int64_t j = key + h * kWidth<C>;
      Vec<C> score = scores.sum[r][h];
      if (block.bias) score += load(block.bias + (j - block.anchor[row + r]));
      score = score <= 0 ? Vec<C>{} : score;
      if (masked) {
        const auto seen = decltype(found[0] + found[0])(least(most(block.end[row + r] - j, 0), kWidth<C>));
        score = lanes<C>() < seen ? score : Vec<C>{};
      }
      store(weights + r * kPitch<C> + h * kWidth<C>, score);
      found |= (Ints<C>)score;
    }
  bool positive = false;
  for (int64_t i = 0; i < kWidth<C>; i++) positive |= found[i] != 0;
  return positive;
}

// The weights of packed rows q, `row` being the first of them, and of packed keys k from `key` on.
template <typename C>
inline void weigh(const Block<C>& block, const Sight& sight, int64_t row, int64_t rows, int64_t key, int64_t keys, const C* q,
                  const C* k, Weights<C>& weights) {
  constexpr int64_t panel = kTileColumns<C>;
  for (int64_t g = 0; g * TILE_ROWS < rows; g++) weights.by_group[g] = 0;
  for (int64_t p = 0; p * panel < keys; p++) {
    weights.by_panel[p] = 0;
    const int64_t first = key + p * panel;
    for (int64_t g = 0; g * TILE_ROWS < rows; g++) {
      if (sight.last[g] <= first) continue;
      const int64_t i = g * TILE_ROWS;
      with_rows(least(TILE_ROWS, rows - i), [&](auto count) {
        Tile<count.value, C> scores = {};
        multiply(scores, q + i * pitch<C>(block.dim), pitch<C>(block.dim), 1, k + p * panel * block.dim, panel, block.dim);
        if (!weigh(scores, block, row + i, first, sight.whole[g] < first + panel, weights.value + i * kPitch<C> + p * panel))
          return;
        weights.by_group[g] |= uint64_t(1) << p;
        weights.by_panel[p] |= uint64_t(1) << g;
      });
    }
  }
}

// sum[row …][column …] += Σ_d a(row, d) · b[d][column …] for `count` rows and the columns of one tile, where
// a(r, d) = a[r][d], or a[d][r] if TRANSPOSED. Only those d count whose bit d / unit is in `mask`.
// A block is summed by itself before it is added: rounding errors grow with the length of a block, not of a sequence.
// A zero weight times a value that is not finite is nothing: it belongs to a key that the row does not use.
template <bool TRANSPOSED, typename C>
inline void add_product(C* sum, int64_t row, int64_t count, int64_t column, int64_t columns, const C* a, const C* b,
                        int64_t depth, uint64_t mask, int64_t unit, bool finite) {
  constexpr int64_t a_row = TRANSPOSED ? 1 : kPitch<C>, a_step = TRANSPOSED ? kPitch<C> : 1;
  const int64_t wide = pitch<C>(columns);
  with_rows(count, [&](auto number) {
    constexpr int rows = number.value;
    C* out = sum + row * wide + column;
    Tile<rows, C> tile = {};
    for (uint64_t left = mask; left;) {
      const int64_t begin = __builtin_ctzll(left), end = begin + __builtin_ctzll(~(left >> begin));
      left &= ~uint64_t(0) << end;
      const int64_t first = begin * unit, steps = least(depth, end * unit) - first;
      const C* weight = a + row * a_row + first * a_step;
      const C* value = b + first * wide + column;
      if (finite) {
        multiply(tile, weight, a_row, a_step, value, wide, steps);
        continue;
      }
      for (int64_t d = 0; d < steps; d++)
        for (int r = 0; r < rows; r++)
          for (int h = 0; h < kTileVectors; h++)
            if (const C w = weight[r * a_row + d * a_step]; w != 0)
              tile.sum[r][h] += w * load(value + d * wide + h * kWidth<C>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int h = 0; h < kTileVectors; h++) store(out + r * wide + h * kWidth<C>, load(out + r * wide + h * kWidth<C>) + tile.sum[r][h]);
  });
}

// sums (rows, columns) += a · b, where a is P or dS of a block whose first key is `key`, and b (keys, columns).
template <typename C>
inline void add_by_rows(const Weights<C>& weights, const C* a, const Sight& sight, int64_t rows, int64_t key, int64_t keys,
                        const C* b, int64_t columns, bool finite, C* sums) {
  for (int64_t column = 0; column < columns; column += kTileColumns<C>)
    for (int64_t i = 0, g = 0; i < rows; i += TILE_ROWS, g++)
      if (weights.by_group[g])
        add_product<false>(sums, i, least(TILE_ROWS, rows - i), column, columns, a, b, least(keys, sight.last[g] - key),
                           weights.by_group[g], kTileColumns<C>, finite);
}

template <typename C>
inline void clear(C* memory, int64_t size) {
  for (int64_t i = 0; i < size; i++) memory[i] = 0;
}

// matrix[first + i][j] = change(packed[i][j], i); the columns of what we write are contiguous.
template <typename S, typename Change>
inline void unpack_rows(const Compute<S>* packed, Matrix matrix, int64_t first, int64_t count, int64_t columns,
                        const Change& change) {
  using C = Compute<S>;
  for (int64_t i = 0; i < count; i++) {
    S* out = static_cast<S*>(matrix.data) + (first + i) * matrix.row;
    const C* row = packed + i * pitch<C>(columns);
    int64_t j = 0;
    for (; j + kWidth<C> <= columns; j += kWidth<C>) store(out + j, change(load(row + j), i));
    if (j < columns) store_first(out + j, change(load(row + j), i), columns - j);
  }
}

}  // namespace
}  // namespace genrec
