// What updates that correct add to the step in step.cpp: see corrections.py.
//
// Shape legend: C tokens a chunk, d width, h hidden width.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

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

}  // namespace moshi_ttt
