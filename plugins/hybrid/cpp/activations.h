// gelu (its tanh form) and its derivatives, in loops that compilers turn into vector instructions.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hybrid {

// exp(x) by 2^n times a polynomial. n is rounded by adding a number whose last digit is 1; its bits are then those of a
// small integer.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline double exponential(double x) {
  x = std::min(std::max(x, -708.0), 709.0);
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 87178291200.0;
  for (const double c : {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                         1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    p = p * r + c;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4338000000000000 + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

template <typename T>
struct Gelu {
  T value, slope, curve;  // gelu(x), and its first and second derivative
};

// x / 2 (1 + t), with t the tanh of y = r (x + c x^3). With p = dy/dx: the second derivative is
// (1 - t^2) (p + 3 r c x^2 - x t p^2).
template <typename T>
inline Gelu<T> gelu_at(T x) {
  const T root = T(0.79788456080286535588), cubic = T(0.044715);
  const T square = x * x;
  const T part = 1 / (exponential(2 * root * x * (1 + cubic * square)) + 1);  // (1 - t) / 2
  const T rest = 4 * part * (1 - part);                                       // 1 - t^2
  const T p = root + 3 * root * cubic * square;
  return {x * (1 - part), (1 - part) + T(0.5) * x * rest * p,
          rest * (p + 3 * root * cubic * square - x * (1 - 2 * part) * p * p)};
}

template <typename T>
void gelu(const T* x, int64_t count, T* __restrict value) {
  for (int64_t i = 0; i < count; ++i) value[i] = gelu_at(x[i]).value;
}

template <typename T>
void gelu(const T* x, int64_t count, T* __restrict value, T* __restrict slope) {
  for (int64_t i = 0; i < count; ++i) {
    const Gelu<T> found = gelu_at(x[i]);
    value[i] = found.value;
    slope[i] = found.slope;
  }
}

template <typename T>
void gelu(const T* x, int64_t count, T* __restrict value, T* __restrict slope, T* __restrict curve) {
  for (int64_t i = 0; i < count; ++i) {
    const Gelu<T> found = gelu_at(x[i]);
    value[i] = found.value;
    slope[i] = found.slope;
    curve[i] = found.curve;
  }
}

}  // namespace hybrid
