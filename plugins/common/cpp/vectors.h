// Sums and products over rows of numbers, in an order that no number of threads changes.

#pragma once

#include <cmath>
#include <cstdint>

namespace moshi_ttt {

// Bytes of a vector.
#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif

template <typename T>
struct Lanes {
  static constexpr int64_t count = kBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kBytes)));
};

// Whether every number is between -limit and limit; a nan is not.
template <typename T>
bool below(const T* numbers, int64_t count, T limit) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= std::abs(numbers[i]) < limit;
  return all;
}

// The sum of term(i) over i < count, in as many parts as two vectors have numbers.
template <typename T, typename Term>
inline T total(int64_t count, Term term) {
  constexpr int64_t parts = 2 * Lanes<T>::count;
  T sums[parts] = {};
  int64_t i = 0;
  for (; i + parts <= count; i += parts)
    for (int64_t j = 0; j < parts; ++j) sums[j] += term(i + j);
  T sum = 0;
  for (; i < count; ++i) sum += term(i);
  for (const T part : sums) sum += part;
  return sum;
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  return total<T>(count, [&](int64_t j) { return a[j] * b[j]; });
}

// y [out] += x [rows] W [rows, out], four lines of W at a time.
template <typename T>
void add_product(const T* x, const T* weight, int64_t rows, int64_t out, T* __restrict y) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *w = weight + i * out, a = x[i], b = x[i + 1], c = x[i + 2], d = x[i + 3];
    for (int64_t j = 0; j < out; ++j) y[j] += a * w[j] + b * w[j + out] + c * w[j + 2 * out] + d * w[j + 3 * out];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < out; ++j) y[j] += x[i] * weight[i * out + j];
}

// The same for two vectors, which read W once.
template <typename T>
void add_products(const T* x, const T* other, const T* weight, int64_t rows, int64_t out, T* __restrict y,
                  T* __restrict z) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *w = weight + i * out, *a = x + i, *b = other + i;
    for (int64_t j = 0; j < out; ++j) {
      const T first = w[j], second = w[j + out], third = w[j + 2 * out], fourth = w[j + 3 * out];
      y[j] += a[0] * first + a[1] * second + a[2] * third + a[3] * fourth;
      z[j] += b[0] * first + b[1] * second + b[2] * third + b[3] * fourth;
    }
  }
  add_product(x + i, weight + i * out, rows - i, out, y);
  add_product(other + i, weight + i * out, rows - i, out, z);
}

}  // namespace moshi_ttt
