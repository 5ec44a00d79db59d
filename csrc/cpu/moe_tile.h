// What the forward and the backward products of the experts share.
#pragma once

#include "moe.h"
#include "product.h"

namespace genrec {
namespace {

// call(begin, end) for as many blocks at a time as their packed weights stay in cache: in L1 where few rows use them.
template <typename Call>
inline void for_groups(int64_t begin, int64_t end, int64_t rows, int64_t block_bytes, Call&& call) {
  const int64_t room = rows > 4 * TILE_ROWS ? kPackedBytes / (block_bytes + 1) : 1, group = room > 1 ? room : 1;
  for (; begin < end; begin += group) call(begin, begin + group < end ? begin + group : end);
}

// The rows of one expert.
struct Range {
  int64_t first, count;
  template <typename C>
  Range(const Experts<C>& all, int64_t expert)
      : first(all.start[expert]), count(all.start[expert + 1] - all.start[expert]) {}
};

template <int ROWS, typename C>
inline void gather(const C* (&rows)[ROWS], const C* matrix, int64_t stride, const int32_t* token) {
  for (int r = 0; r < ROWS; r++) rows[r] = matrix + token[r] * stride;
}

template <typename S>
inline const S* weights_of(const void* weights, int64_t expert, int64_t stride) {
  return static_cast<const S*>(weights) + expert * stride;
}

// A block of kWidth columns of G beside the same columns of U: what one tile multiplies.
template <typename S>
inline void pack_gate_up(const Experts<Compute<S>>& all, int64_t expert, int64_t column, Compute<S>* packed) {
  const S* gate = weights_of<S>(all.gate_up, expert, all.gate_up_expert) + column * all.gate_up_row;
  pack_columns(gate, all.gate_up_row, all.hidden - column, all.dim, packed);
  pack_columns(gate + all.hidden * all.gate_up_row, all.gate_up_row, all.hidden - column, all.dim,
               packed + kWidth<Compute<S>>);
}

}  // namespace
}  // namespace genrec
