// What updates that correct and the success gate add to the step in step.cpp: see corrections.py and
// ../common/success_gate.py.
//
// Shape legend: C tokens a chunk, d width, h hidden width.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

namespace moshi_ttt {

using at::Tensor;

struct Part {  // tokens of the unfinished chunk that lie side by side
  int64_t token, slot, count;
};

// Where the first `count` tokens of the unfinished chunk lie: the staged ones stay there until the chunk's end.
inline std::array<Part, 2> places(int64_t chunk, int64_t staged, int64_t count) {
  return {{{0, chunk, std::min(count, staged)}, {staged, staged, std::max<int64_t>(0, count - staged)}}};
}

// One row's unfinished chunk: L [C, C], Q in keys [slots, h], Y in values [slots, d], with L L^T = K' K'^T + l I,
// L Q = K', L Y = E'. Only the rows of tokens that have come are read.
template <typename T>
class RidgeRows {
 public:
  RidgeRows(int64_t chunk, int64_t staged, const Tensor& keys, const Tensor& values, const Tensor& factor)
      : chunk_(chunk), staged_(staged), keys_(keys), values_(values), factor_(factor) {}

  // Makes the row of L of the token at `position`, and key [h] of K' into its row of Q.
  void make_key(int64_t position, const Tensor& key, double ridge) const {
    const Tensor row = factor_[position];
    row.zero_();
    const auto parts = places(chunk_, staged_, position);
    for (const Part& part : parts)
      if (part.count) {
        Tensor products = row.narrow(0, part.token, part.count);
        at::mv_out(products, keys_.narrow(0, part.slot, part.count), key);
      }
    T* numbers = row.data_ptr<T>();
    T* own = key.data_ptr<T>();
    const double left = square(own, key.size(0)) + ridge - square(numbers, position);
    const double pivot = std::sqrt(std::max(ridge, left));
    for (const Part& part : parts)
      if (part.count)
        key.addmv_(keys_.narrow(0, part.slot, part.count).t(), row.narrow(0, part.token, part.count), 1, -1);
    for (int64_t i = 0; i < key.size(0); ++i) own[i] /= T(pivot);
    numbers[position] = T(pivot);
  }

  // errors [n, d] of E' of the tokens from `first` on, of which all before it are settled, into their rows of Y.
  void make_values(int64_t first, const Tensor& errors) const {
    const int64_t count = errors.size(0), width = errors.size(1);
    const Tensor rows = factor_.narrow(0, first, count);  // [n, C]
    for (const Part& part : places(chunk_, staged_, first))
      if (part.count)
        errors.addmm_(rows.narrow(1, part.token, part.count), values_.narrow(0, part.slot, part.count), 1, -1);
    const T* numbers = rows.data_ptr<T>();
    T* found = errors.data_ptr<T>();
    for (int64_t i = 0; i < count; ++i) {
      const T* row = numbers + i * chunk_ + first;
      for (int64_t j = 0; j < i; ++j)
        for (int64_t channel = 0; channel < width; ++channel)
          found[i * width + channel] -= row[j] * found[j * width + channel];
      for (int64_t channel = 0; channel < width; ++channel) found[i * width + channel] /= row[i];
    }
  }

 private:
  static double square(const T* numbers, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += double(numbers[i]) * double(numbers[i]);
    return sum;
  }

  const int64_t chunk_, staged_;
  const Tensor keys_, values_, factor_;
};

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
