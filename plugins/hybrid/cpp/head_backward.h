// One chunk of the inner loop, backward: the lines of head.h in reverse, as chunk_backward.py has them.

#pragma once

#include "head.h"

namespace hybrid {

// Sums over the chunks of one row and head. `net`: of the fast weights after a chunk, and then of those before it.
template <typename T>
struct Sums {
  Network<T> net;
  T *gamma, *beta, *token_scale;  // [D], [D], [C]
};

// The gradients of a call's tokens of one row and head, written to.
template <typename T>
struct TokenGradients {
  Line<T> q, k, v, lr;
};

template <typename T>
class BackwardHead : public Head<T> {
  using Base = Head<T>;
  using Base::chunk_, Base::layers_, Base::sizes_, Base::norm_, Base::left_, Base::right_, Base::slopes_, Base::bias_;
  using Base::affinity_, Base::rate_, Base::store_, Base::token_scale_;

 public:
  BackwardHead(const Sizes& sizes, bool causal, double eps) : Base(sizes, causal, eps) {
    for (int64_t i = 0; i < layers_; ++i) {
      of_inputs_.push_back(store_.matrix((i ? 1 : 2) * chunk_, sizes.in(i)));
      of_gradients_.push_back(store_.matrix(chunk_, sizes.out(i)));
      curves_.push_back(store_.matrix(i ? chunk_ : 0, sizes.in(i)));
      query_slopes_.push_back(store_.matrix(i ? chunk_ : 0, sizes.in(i)));
    }
    of_bias_ = store_.matrix(chunk_, sizes.width());
    of_affinity_ = store_.matrix(chunk_, chunk_);
    room_ = store_.matrix(chunk_, sizes.widest());
    of_rate_.resize(chunk_);
  }

  // The gradients of a_i and g_i of an unfinished chunk, [C, any], as the call's result gets them; null: none.
  void begin_chunk(const Slots& slots, const Memory<const T>* unfinished) {
    for (int64_t i = 0; i < layers_; ++i)
      for (int64_t c = 0; c < chunk_; ++c) {
        const bool given = unfinished && c < slots.last;
        fill(of_inputs_[i].row(c), given ? unfinished->inputs[i] + c * sizes_.in(i) : nullptr, sizes_.in(i));
        fill(of_gradients_[i].row(c), given ? unfinished->gradients[i] + c * sizes_.out(i) : nullptr, sizes_.out(i));
      }
  }

  // Through all of the loaded chunk, whose a_i and g_i are remembered. `updated`: its update was applied at its end.
  void backward(const Slots& slots, const Network<T>& net, const Values<T>& values, Line<const T> of_y, bool updated,
                Sums<T>& sums) {
    curve(slots, values);
    of_output(slots, values, of_y, sums);
    if (updated) through_update(sums);
    for (int64_t i = layers_ - 1; i >= 0; --i) through_queries(slots, net, values, i, sums);
    for (int64_t i = 1; i < layers_; ++i) through_gradients(slots, net, values, i);
    through_loss(slots, values, sums);
    for (int64_t i = layers_ - 1; i >= 0; --i) through_keys(slots, net, i, sums);
  }

  // The tokens' gradients, zero where they are not `finite`, and those of what the chunk held before the call.
  void finish_chunk(const Slots& slots, const TokenGradients<T>& tokens, const bool* finite,
                    const Memory<T>& earlier) const {
    const int64_t width = sizes_.width();
    for (int64_t c = slots.first; c < slots.last; ++c) {
      const int64_t token = slots.token + c;
      if (!finite[token]) {
        for (T* each : {tokens.q.at(token), tokens.k.at(token), tokens.v.at(token)}) fill(each, nullptr, width);
        *tokens.lr.at(token) = 0;
        continue;
      }
      const T *key = of_inputs_[0].row(c), *query = of_inputs_[0].row(chunk_ + c), *bias = of_bias_.row(c);
      T *k = tokens.k.at(token), *v = tokens.v.at(token);
      std::copy(query, query + width, tokens.q.at(token));
      for (int64_t j = 0; j < width; ++j) {  // bias = beta - (v - k)
        k[j] = key[j] + bias[j];
        v[j] = -bias[j];
      }
      *tokens.lr.at(token) = of_rate_[c];
    }
    for (int64_t i = 0; i < layers_; ++i)
      for (int64_t c = 0; c < slots.first; ++c) {
        const T *a = of_inputs_[i].row(c), *g = of_gradients_[i].row(c);
        std::copy(a, a + sizes_.in(i), earlier.inputs[i] + c * sizes_.in(i));
        std::copy(g, g + sizes_.out(i), earlier.gradients[i] + c * sizes_.out(i));
      }
  }

 private:
  static void fill(T* to, const T* with, int64_t count) {
    if (with) std::copy(with, with + count, to);
    else std::fill(to, to + count, T(0));
  }

  Matrix<T> of_outputs(int64_t layer) const { return right_[layer]; }
  Matrix<T> of_queries(int64_t layer) const { return Base::from(right_[layer], chunk_); }
  Matrix<T> of_products(int64_t layer) const { return Base::from(left_[layer], 2 * chunk_); }

  // x_i, and the derivatives of gelu at o_{i-1} and u_{i-1}.
  void curve(const Slots& slots, const Values<T>& values) {
    for (int64_t i = 1; i < layers_; ++i)
      for (int64_t c = slots.first; c < slots.last; ++c) {
        gelu(values.outputs[i - 1].row(c), sizes_.in(i), room_.row(c), slopes_[i].row(c), curves_[i].row(c));
        gelu(values.query(i - 1, c), sizes_.in(i), Base::query_input(i, c), query_slopes_[i].row(c));
      }
  }

  void of_output(const Slots& slots, const Values<T>& values, Line<const T> of_y, Sums<T>& sums) {
    for (int64_t c = slots.first; c < slots.last; ++c) {
      const T* upstream = of_y.at(slots.token + c);
      std::copy(upstream, upstream + sizes_.width(), of_inputs_[0].row(chunk_ + c));
      norm_.output_backward(values.query(layers_ - 1, c), upstream, of_queries(layers_ - 1).row(c), sums.gamma,
                            sums.beta);
    }
  }

  // W += f a^T g and b += f sum g, with f = -token_scale[C - 1].
  void through_update(Sums<T>& sums) {
    const T factor = -token_scale_[chunk_ - 1];
    for (int64_t i = 0; i < layers_; ++i) {
      const Matrix<T> g = Base::gradients(i), of_scaled{room_.data, pitch_of<T>(sizes_.out(i))};
      Base::linear(chunk_, left_[i], sums.net, i, of_scaled);
      for (int64_t c = 0; c < chunk_; ++c) {
        const T *of = of_scaled.row(c), *of_g = g.row(c);
        sums.token_scale[chunk_ - 1] -= total<T>(sizes_.out(i), [&](int64_t j) { return of[j] * of_g[j]; });
        for (int64_t j = 0; j < sizes_.out(i); ++j) of_gradients_[i].row(c)[j] += factor * of[j];
      }
      Base::back(chunk_, Base::scaled_gradients(i, factor), sums.net, i, of_inputs_[i], true);
    }
  }

  // u_i = x_i W_i + b_i + M * (x_i a_i^T + 1) g_i, and x_i = gelu(u_{i-1}). The weights' gradients are for later.
  void through_queries(const Slots& slots, const Network<T>& net, const Values<T>& values, int64_t i, Sums<T>& sums) {
    const int64_t first = slots.first, count = slots.count(), last = slots.last, in = sizes_.in(i);
    const Matrix<T> of_u = Base::from(of_queries(i), first), x = Base::from(left_[i], chunk_ + first);
    const Matrix<T> of_affinity = Base::from(of_affinity_, first), affinity = Base::from(affinity_, first);
    Base::inner_products(count, last, sizes_.out(i), of_u, Base::gradients(i), of_affinity);
    Base::inner_products(count, last, in, x, left_[i], affinity);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t t = 0; t < last; ++t) {
        const T mask = Base::mask(first + c, t), sum = affinity.row(c)[t] + 1;
        if (!Base::causal_ || t <= first + c) sums.token_scale[first + c] -= of_affinity.row(c)[t] * sum;
        affinity.row(c)[t] = mask * sum;
        of_affinity.row(c)[t] *= mask;
      }
    add_flipped(last, sizes_.out(i), count, affinity, of_u, of_gradients_[i]);
    add_flipped(last, in, count, of_affinity, x, of_inputs_[i]);
    const Matrix<T> of_x = i ? Base::from(room_of(in), first) : Base::from(of_inputs_[0], chunk_ + first);
    if (i) Base::back(count, of_u, net, i, of_x, false);
    product<T>(count, in, last, of_affinity.data, of_affinity.pitch, 1, left_[i], of_x.data, of_x.pitch, of_x);
    for (int64_t c = 0; i && c < count; ++c)
      for (int64_t j = 0; j < in; ++j)
        of_queries(i - 1).row(first + c)[j] = of_x.row(c)[j] * query_slopes_[i].row(first + c)[j];
  }

  // g_{i-1} = gelu'(o_{i-1}) * P_i, P_i = g_i W_i^T.
  void through_gradients(const Slots& slots, const Network<T>& net, const Values<T>& values, int64_t i) {
    const int64_t first = slots.first, in = sizes_.in(i);
    for (int64_t c = first; c < slots.last; ++c) {
      const T *upstream = of_gradients_[i - 1].row(c), *value = values.products[i].row(c);
      const T *slope = slopes_[i].row(c), *curved = curves_[i].row(c);
      T *of_product = of_products(i).row(c), *of_o = of_outputs(i - 1).row(c);
      for (int64_t j = 0; j < in; ++j) {
        of_product[j] = slope[j] * upstream[j];
        of_o[j] = curved[j] * value[j] * upstream[j];
      }
    }
    const Matrix<T> of_p = Base::from(of_products(i), first), of_g = Base::from(of_gradients_[i], first);
    product<T>(slots.count(), sizes_.out(i), in, of_p.data, of_p.pitch, 1, net.weights[i], of_g.data, of_g.pitch, of_g);
  }

  void through_loss(const Slots& slots, const Values<T>& values, Sums<T>& sums) {
    const int64_t i = layers_ - 1;
    for (int64_t c = slots.first; c < slots.last; ++c) {
      of_rate_[c] = norm_.loss_backward(values.outputs[i].row(c), bias_.row(c), rate_[c], Base::gradients(i).row(c),
                                        of_gradients_[i].row(c), of_outputs(i).row(c), of_bias_.row(c), sums.gamma);
      for (int64_t j = 0; j < sizes_.width(); ++j) sums.beta[j] += of_bias_.row(c)[j];
    }
  }

  // o_i = a_i W_i + b_i and a_i = gelu(o_{i-1}); and the gradients of W_i and b_i by all that they are used for.
  void through_keys(const Slots& slots, const Network<T>& net, int64_t i, Sums<T>& sums) {
    const int64_t first = slots.first, count = slots.count(), in = sizes_.in(i), out = sizes_.out(i);
    const bool whole = count == chunk_;
    if (i == 0 && whole) {
      Base::back(2 * chunk_, right_[0], net, 0, of_inputs_[0], true);
    } else {
      Base::back(count, Base::from(of_outputs(i), first), net, i, Base::from(of_inputs_[i], first), true);
      const Matrix<T> of_u = Base::from(of_queries(0), first), of_q = Base::from(of_inputs_[0], chunk_ + first);
      if (i == 0) Base::back(count, of_u, net, 0, of_q, true);
    }
    for (int64_t c = first; i && c < slots.last; ++c)
      for (int64_t j = 0; j < in; ++j) of_outputs(i - 1).row(c)[j] += slopes_[i].row(c)[j] * of_inputs_[i].row(c)[j];
    const int64_t parts = i ? 3 : 2;
    const Matrix<T> sum = sums.net.weights[i];
    for (int64_t part = 0; part < (whole ? 1 : parts); ++part) {
      const int64_t row = part * chunk_ + first;
      product<T>(in, out, whole ? parts * chunk_ : count, left_[i].row(row), 1, left_[i].pitch,
                 Base::from(right_[i], row), sum.data, sum.pitch, sum);
    }
    for (const Matrix<T>& each : {of_outputs(i), of_queries(i)})
      Base::add_rows(count, Base::from(each, first), padded<T>(out), sums.net.biases[i]);
  }

  // to [rows, columns] += a^T b, of a [depth, rows] and b [depth, columns].
  static void add_flipped(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, Matrix<T> to) {
    product<T>(rows, columns, depth, a.data, 1, a.pitch, b, to.data, to.pitch, to);
  }

  Matrix<T> room_of(int64_t columns) const { return {room_.data, pitch_of<T>(columns)}; }

  std::vector<Matrix<T>> of_inputs_, of_gradients_;  // [C, in], of layer 0 then those of q, [2 C, D]; [C, out]
  std::vector<Matrix<T>> curves_, query_slopes_;     // gelu'' at o_{i-1}, gelu' at u_{i-1}, [C, in]
  Matrix<T> of_bias_, of_affinity_, room_;           // [C, D], [C, C], [C, any]
  std::vector<T> of_rate_;                           // [C]
};

}  // namespace hybrid
