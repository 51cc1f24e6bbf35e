// The success gate of one row and head: what ../success_gate.py computes by tensor operations.
//
// Shape legend: d width of an answer.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace moshi_ttt {

// A vector's largest number and what its norm is to that; a norm of infinity stands for a vector that is nearly zero.
template <typename T>
std::pair<double, double> size_of(const T* x, int64_t width) {
  double largest = 0, sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    if (!std::isfinite(x[i])) return {NAN, NAN};
    largest = std::max(largest, std::abs(double(x[i])));
  }
  if (largest < std::sqrt(double(std::numeric_limits<T>::min()))) return {1, INFINITY};
  for (int64_t i = 0; i < width; ++i) sum += (x[i] / largest) * (x[i] / largest);
  return {largest, std::sqrt(sum)};
}

// success_gate.similarity of a [d] and b [d], which is zeros where b is null.
template <typename T>
double similarity(const T* a, const T* b, int64_t width) {
  const auto [largest_a, norm_a] = size_of(a, width);
  const auto [largest_b, norm_b] = b ? size_of(b, width) : std::pair<double, double>{1, INFINITY};
  double sum = 0;
  if (b)
    for (int64_t i = 0; i < width; ++i) sum += (a[i] / largest_a) * (b[i] / largest_b);
  return sum / norm_a / norm_b;
}

template <typename T>
struct Gate {  // the parameters a, b and w [taps] of the success gate
  const T* bias;
  const T* slope;
  const T* weights;
  int64_t taps;

  // Of the score of a token and those of the tokens before it, scores [taps - 1], the oldest first.
  T value(double score, const T* scores) const {
    double total = score * weights[0];
    for (int64_t j = 1; j < taps; ++j) total += double(scores[taps - 1 - j]) * weights[j];
    return T(1 / (1 + std::exp(-(double(*bias) + double(*slope) * total))));
  }

  static void remember(double score, int64_t taps, T* scores) {
    if (taps < 2) return;
    std::copy(scores + 1, scores + taps - 1, scores);
    scores[taps - 2] = T(score);
  }
};

}  // namespace moshi_ttt
