// Products of small matrices. Each number of a result is the sum over k in rising order, whatever the shapes are, so that
// it has the same bits in a product of fewer rows.

#pragma once

#include <utility>

#include "matrix.h"

namespace hybrid {

// C [Rows, Wide vectors] = start + A B, of which A(i, k) lies at a[i * row_a + k * column_a].
template <typename T, int Rows, int Wide>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* a, int64_t row_a, int64_t column_a, const T* b,
                                                int64_t pitch_b, const T* start, int64_t pitch_start, T* c,
                                                int64_t pitch_c) {
  using Vector = typename Lanes<T>::type;
  constexpr int64_t lanes = Lanes<T>::count;
  Vector sum[Rows][Wide];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) sum[i][j] = start ? load(start + i * pitch_start + j * lanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector line[Wide];
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) line[j] = load(b + k * pitch_b + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T x = a[i * row_a + k * column_a];
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) sum[i][j] += x * line[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) store(c + i * pitch_c + j * lanes, sum[i][j]);
}

template <typename T, int Rows, int Wide>
void strip(int64_t rows, int64_t depth, const T* a, int64_t row_a, int64_t column_a, const T* b, int64_t pitch_b,
           const T* start, int64_t pitch_start, T* c, int64_t pitch_c) {
  for (; rows >= Rows; rows -= Rows) {
    tile<T, Rows, Wide>(depth, a, row_a, column_a, b, pitch_b, start, pitch_start, c, pitch_c);
    a += Rows * row_a;
    c += Rows * pitch_c;
    if (start) start += Rows * pitch_start;
  }
  if constexpr (Rows > 1)
    if (rows) strip<T, Rows / 2, Wide>(rows, depth, a, row_a, column_a, b, pitch_b, start, pitch_start, c, pitch_c);
}

// C [rows, columns] = start + A B, B [depth, columns]. `start` may be C; with a pitch of 0 it is one row for all; null is
// zero. C is written to the end of its last vector.
template <typename T>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t row_a, int64_t column_a, Matrix<T> b,
             const T* start, int64_t pitch_start, Matrix<T> c) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t j = 0;
  for (; j + lanes < columns; j += 2 * lanes)
    strip<T, kRows, 2>(rows, depth, a, row_a, column_a, b.data + j, b.pitch, start ? start + j : nullptr, pitch_start,
                       c.data + j, c.pitch);
  if (j < columns)
    strip<T, kTall, 1>(rows, depth, a, row_a, column_a, b.data + j, b.pitch, start ? start + j : nullptr, pitch_start,
                       c.data + j, c.pitch);
}

// Vector i of `one` and `other` with every second group of Step numbers exchanged: the first or the second half of it.
template <typename T, int Step, int... I>
inline void exchange(typename Lanes<T>::type& one, typename Lanes<T>::type& other, std::integer_sequence<int, I...>) {
  constexpr int lanes = Lanes<T>::count;
  const auto low = __builtin_shufflevector(one, other, (I & Step ? lanes + I - Step : I)...);
  other = __builtin_shufflevector(one, other, (I & Step ? lanes + I : I + Step)...);
  one = low;
}

template <typename T, int Step>
inline __attribute__((always_inline)) void exchange_all(typename Lanes<T>::type* rows) {
  constexpr int lanes = Lanes<T>::count;
  if constexpr (Step < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & Step)) exchange<T, Step>(rows[i], rows[i | Step], std::make_integer_sequence<int, lanes>());
    exchange_all<T, 2 * Step>(rows);
  }
}

// `to` [columns, rows] = the transpose of `from` [rows, columns], or plus it. Zero up to the last row's last vector.
template <typename T>
void transpose(int64_t rows, int64_t columns, Matrix<const T> from, Matrix<T> to, bool add = false) {
  using Vector = typename Lanes<T>::type;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t j = 0; j < columns; j += lanes)
    for (int64_t i = 0; i < rows; i += lanes) {
      Vector block[lanes];
      for (int64_t r = 0; r < lanes; ++r) block[r] = i + r < rows ? load(from.row(i + r) + j) : Vector{};
      exchange_all<T, 1>(block);
      const int64_t count = std::min(lanes, columns - j);
      for (int64_t r = 0; r < count; ++r) {
        T* place = to.row(j + r) + i;
        store(place, add ? load(place) + block[r] : block[r]);
      }
    }
}

}  // namespace hybrid
