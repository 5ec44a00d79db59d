// Vectors of a unit's width over the compiler's own vector types: loads and stores that convert from and to the storage
// type, and the few functions that the operators +, *, < … do not already give.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace genrec {
namespace {

struct bfloat16 {
  uint16_t bits;
};

// What a storage type is computed in: float for bfloat16 and float, double for double.
template <typename S> struct ComputeOf { using type = S; };
template <> struct ComputeOf<bfloat16> { using type = float; };
template <typename S> using Compute = typename ComputeOf<S>::type;

template <typename C> struct LanesOf;
template <> struct LanesOf<float> {
  typedef float value __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t index __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct LanesOf<double> {
  typedef double value __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t index __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename C> using Vec = typename LanesOf<C>::value;
template <typename C> using Ints = typename LanesOf<C>::index;  // as wide as a number: one mask selects both
template <typename C> constexpr int64_t kWidth = VECTOR_BYTES / int64_t(sizeof(C));

typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

template <typename V, typename T>
inline V load_bits(const T* address) {
  V vector;
  __builtin_memcpy(&vector, address, sizeof(V));
  return vector;
}

template <typename V, typename T>
inline void store_bits(T* address, const V& vector) {
  __builtin_memcpy(address, &vector, sizeof(V));
}

template <typename S>
inline Vec<Compute<S>> load(const S* address) {
  return load_bits<Vec<S>>(address);
}
template <>
inline Vec<float> load(const bfloat16* address) {
#if VECTOR_BYTES == 32 && defined(__AVX2__)  // one instruction behind the load, where g++ 12 makes five of the other form
  const __m256i zero_below = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                              -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (Vec<float>)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)load_bits<Half>(address)), zero_below);
#else
  return (Vec<float>)(__builtin_convertvector(load_bits<Half>(address), Bits) << 16);
#endif
}

template <typename S>
inline void store(S* address, const Vec<Compute<S>>& vector) {
  store_bits(address, vector);
}
// To the nearest, ties to even; a NaN stays one.
template <>
inline void store(bfloat16* address, const Vec<float>& vector) {
  const Bits bits = (Bits)vector, exact = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits rounded = vector == vector ? exact : Bits{} + 0x7fc00000;
#if VECTOR_BYTES == 32 && defined(__AVX2__)  // the upper halves, side by side in each lane
  const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)rounded, upper);
  const __m128i half = _mm_unpacklo_epi64(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  store_bits(address, half);
#else
  store_bits(address, __builtin_convertvector(rounded >> 16, Half));
#endif
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <typename S> inline S narrow(Compute<S> value) { return value; }
template <>
inline bfloat16 narrow<bfloat16>(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return {uint16_t(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0)};
}

// The first `count` lanes, the others 0.
template <typename S>
inline Vec<Compute<S>> load_first(const S* address, int64_t count) {
  Compute<S> lanes[kWidth<Compute<S>>] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = widen(address[i]);
  return load(lanes);
}

template <typename S>
inline void store_first(S* address, const Vec<Compute<S>>& vector, int64_t count) {
  for (int64_t i = 0; i < count; i++) address[i] = narrow<S>(vector[i]);
}

// As many lanes as there are, up to all of them.
template <typename S>
inline Vec<Compute<S>> load_some(const S* address, int64_t count) {
  return count >= kWidth<Compute<S>> ? load(address) : load_first(address, count);
}
template <typename S>
inline void store_some(S* address, const Vec<Compute<S>>& vector, int64_t count) {
  count >= kWidth<Compute<S>> ? store(address, vector) : store_first(address, vector, count);
}

template <typename C>
inline Vec<C> relu(const Vec<C>& vector) {
  return vector > 0 ? vector : Vec<C>{};
}

// eˣ within about one unit in the last place for x ≤ 88, e⁸⁸ above, 0 where it would be denormal: x = n ln 2 + r, a polynomial
// in r by powers of r² so that its parts run side by side, and 2ⁿ put together from bits.
inline Vec<float> exponential(const Vec<float>& vector) {
  const Vec<float> none = {}, x = vector > none + 88.0f ? none + 88.0f : vector;
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 · 2²³: rounds, n in the low bits
  const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;                       // ln 2 = 0.693359375 − 0.000212…
  const Vec<float> square = r * r, low = r * (1 / 6.0f) + 0.5f, middle = r * (1 / 120.0f) + 1 / 24.0f,
                   high = r * (1 / 5040.0f) + 1 / 720.0f;
  const Vec<float> p = ((high * square + middle) * square + low) * square + r + 1.0f;
  const Vec<float> result = p * (Vec<float>)(((Ints<float>)shifted - (0x4b400000 - 127)) << 23);
  return x < none - 87.33f ? none : result;
}
inline Vec<double> exponential(const Vec<double>& vector) {
  Vec<double> result;
  for (int64_t i = 0; i < kWidth<double>; i++) result[i] = __builtin_exp(vector[i]);
  return result;
}

// Sum of the lanes, always in the same order: the halves of the vector, their halves, and so on.
template <typename C, typename V = Vec<C>>
inline C sum(const V& vector) {
  if constexpr (sizeof(V) == 2 * sizeof(C)) {
    return vector[0] + vector[1];
  } else if constexpr (sizeof(V) == 4 * sizeof(float) && sizeof(C) == sizeof(float)) {
    return (vector[0] + vector[2]) + (vector[1] + vector[3]);
  } else {
    typedef C Part __attribute__((vector_size(sizeof(V) / 2)));
    Part parts[2];
    __builtin_memcpy(parts, &vector, sizeof(V));
    return sum<C, Part>(parts[0] + parts[1]);
  }
}

}  // namespace
}  // namespace genrec
