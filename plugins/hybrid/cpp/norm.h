// The LayerNorm of the inner loss and of the output, a row of D numbers at a time, and the gradients through them.

#pragma once

#include <cmath>

#include "matrix.h"

namespace hybrid {

// (x - mean) / sqrt(variance + eps); that factor.
template <typename T>
T normalize(const T* x, int64_t width, double eps, T* __restrict normal) {
  const T mean = total<T>(width, [&](int64_t j) { return x[j]; }) / T(width);
  const T squares = total<T>(width, [&](int64_t j) { return (x[j] - mean) * (x[j] - mean); });
  const T factor = 1 / std::sqrt(squares / T(width) + T(eps));
  for (int64_t j = 0; j < width; ++j) normal[j] = (x[j] - mean) * factor;
  return factor;
}

// The gradient of x through `normal`, its LayerNorm with `factor`; `found` may be `upstream`.
template <typename T>
void normalize_backward(const T* upstream, const T* normal, T factor, int64_t width, T* found) {
  const T mean = total<T>(width, [&](int64_t j) { return upstream[j]; }) / T(width);
  const T along = total<T>(width, [&](int64_t j) { return upstream[j] * normal[j]; }) / T(width);
  for (int64_t j = 0; j < width; ++j) found[j] = factor * (upstream[j] - mean - normal[j] * along);
}

// A head's part of the LayerNorm, gamma and beta [D], and room for rows.
template <typename T>
struct Norm {
  const T *gamma, *beta;
  int64_t width;
  double eps;
  T *normal, *error, *room;  // [D]

  // d/dz of lr / 2 |gamma LN(z) + beta - target|^2; `bias` is beta - target.
  void loss_gradient(const T* z, const T* bias, T lr, T* found) const {
    const T factor = normalize(z, width, eps, normal);
    for (int64_t j = 0; j < width; ++j) error[j] = (normal[j] * gamma[j] + bias[j]) * (gamma[j] * lr);
    normalize_backward(error, normal, factor, width, found);
  }

  // The gradients through `loss_gradient`, which gave `gradient`: `of_z` and `of_bias` [D], those of gamma added to
  // `of_gamma`, and that of lr. With n the LayerNorm of z, r its factor, e = gamma lr (gamma n + bias), G = `upstream`
  // and m a mean over D: gradient = r (e - m(e) - n m(e n)), de = r (G - m(G) - n m(G n)),
  // dn = -r (G m(e n) + e m(G n)) + gamma^2 lr de, dz = r (dn - m(dn) - n m(dn n)) - r n m(G gradient).
  T loss_backward(const T* z, const T* bias, T lr, const T* gradient, const T* upstream, T* of_z, T* of_bias,
                  T* of_gamma) const {
    const T factor = normalize(z, width, eps, normal);
    normalize_backward(upstream, normal, factor, width, room);  // of e
    T of_rate = 0;
    for (int64_t j = 0; j < width; ++j) error[j] = normal[j] * gamma[j] + bias[j];
    of_rate = total<T>(width, [&](int64_t j) { return room[j] * error[j] * gamma[j]; });
    for (int64_t j = 0; j < width; ++j) {
      of_bias[j] = room[j] * (gamma[j] * lr);
      of_gamma[j] += room[j] * error[j] * lr + normal[j] * of_bias[j];
      error[j] *= gamma[j] * lr;
    }
    const T scale = -factor / T(width);
    const T of_error = scale * total<T>(width, [&](int64_t j) { return error[j] * normal[j]; });
    const T of_upstream = scale * total<T>(width, [&](int64_t j) { return upstream[j] * normal[j]; });
    const T moved = scale * total<T>(width, [&](int64_t j) { return upstream[j] * gradient[j]; });
    for (int64_t j = 0; j < width; ++j)
      room[j] = of_bias[j] * gamma[j] + upstream[j] * of_error + error[j] * of_upstream;
    normalize_backward(room, normal, factor, width, of_z);
    for (int64_t j = 0; j < width; ++j) of_z[j] += normal[j] * moved;
    return of_rate;
  }

  // q + gamma LN(u) + beta.
  void output(const T* q, const T* u, T* y) const {
    normalize(u, width, eps, normal);
    for (int64_t j = 0; j < width; ++j) y[j] = q[j] + normal[j] * gamma[j] + beta[j];
  }

  // The gradient of u through `output`; those of gamma and beta are added.
  void output_backward(const T* u, const T* upstream, T* of_u, T* of_gamma, T* of_beta) const {
    const T factor = normalize(u, width, eps, normal);
    for (int64_t j = 0; j < width; ++j) {
      of_gamma[j] += upstream[j] * normal[j];
      of_beta[j] += upstream[j];
      room[j] = upstream[j] * gamma[j];
    }
    normalize_backward(room, normal, factor, width, of_u);
  }
};

}  // namespace hybrid
