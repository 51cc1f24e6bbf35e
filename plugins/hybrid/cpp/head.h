// One row and head: its fast weights, its tokens, and one chunk of the inner loop, forward.
//
// chunk_passes.py says what a chunk computes: with a_i the input of layer i for the chunk's keys, o_i = a_i W_i + b_i, g_i
// the gradient of the inner loss there, x_i and u_i the same for the queries, and P_i = g_i W_i^T.
//
// Shape legend: C tokens a chunk, D head width, L layers, `in` and `out` of a layer. A chunk's slots from `first` to
// `last` hold tokens of the call; those before `first` hold tokens from before it.

#pragma once

#include "activations.h"
#include "matrix.h"
#include "norm.h"
#include "products.h"

namespace hybrid {

struct Sizes {
  std::vector<int64_t> widths;  // of the L layers' inputs, and D
  int64_t chunk;

  int64_t layers() const { return int64_t(widths.size()) - 1; }
  int64_t in(int64_t layer) const { return widths[layer]; }
  int64_t out(int64_t layer) const { return widths[layer + 1]; }
  int64_t width() const { return widths[0]; }
  int64_t widest() const { return *std::max_element(widths.begin(), widths.end()); }
};

struct Slots {
  int64_t first, last;
  int64_t token;  // of slot 0; below zero where the chunk began before the call

  int64_t count() const { return last - first; }
};

// W_i [in, out] and b_i [out] of each layer, in one piece of memory.
template <typename T>
struct Network {
  std::vector<Matrix<T>> weights;
  std::vector<T*> biases;

  Network(const Sizes& sizes, T* memory) {
    for (int64_t i = 0; i < sizes.layers(); ++i) {
      weights.push_back({memory, pitch_of<T>(sizes.out(i))});
      memory += sizes.in(i) * weights[i].pitch;
      biases.push_back(memory);
      memory += padded<T>(sizes.out(i));
    }
  }

  static int64_t numbers(const Sizes& sizes) {
    int64_t count = 0;
    for (int64_t i = 0; i < sizes.layers(); ++i)
      count += sizes.in(i) * pitch_of<T>(sizes.out(i)) + padded<T>(sizes.out(i));
    return count;
  }
};

// What a chunk's backward pass needs of its forward pass, in one piece of memory: o_i and below it u_i [2 C, out] of each
// layer, and P_i [C, in] of layers 1 and up.
template <typename T>
struct Values {
  std::vector<Matrix<T>> outputs, products;
  int64_t chunk;

  Values(const Sizes& sizes, T* memory) : chunk(sizes.chunk) {
    for (int64_t i = 0; i < sizes.layers(); ++i) {
      outputs.push_back({memory, pitch_of<T>(sizes.out(i))});
      memory += 2 * chunk * outputs[i].pitch;
      products.push_back({memory, i ? pitch_of<T>(sizes.in(i)) : 0});
      memory += chunk * products[i].pitch;
    }
  }

  T* query(int64_t layer, int64_t slot) const { return outputs[layer].row(chunk + slot); }

  static int64_t numbers(const Sizes& sizes) {
    int64_t count = 0;
    for (int64_t i = 0; i < sizes.layers(); ++i)
      count += sizes.chunk * (2 * pitch_of<T>(sizes.out(i)) + (i ? pitch_of<T>(sizes.in(i)) : 0));
    return count;
  }
};

// A call's tokens of one row and head: rows of D numbers, and one, `stride` apart.
template <typename T>
struct Line {
  T* data;
  int64_t stride;

  T* at(int64_t token) const { return data + token * stride; }
};

// Lines of numbers of one row and head that lie together: [C, in] and [C, out] of each layer.
template <typename T>
struct Memory {
  std::vector<T*> inputs, gradients;
};

template <typename T>
class Head {
 public:
  Head(const Sizes& sizes, bool causal, double eps)
      : sizes_(sizes), causal_(causal), chunk_(sizes.chunk), layers_(sizes.layers()) {
    const int64_t width = sizes.width(), flipped = sizes.widest() * padded<T>(2 * chunk_);
    norm_ = {nullptr, nullptr, width, eps, store_.numbers(width), store_.numbers(width), store_.numbers(width)};
    for (int64_t i = 0; i < layers_; ++i) {
      left_.push_back(store_.matrix(3 * chunk_, sizes.in(i)));
      right_.push_back(store_.matrix(3 * chunk_, sizes.out(i)));
      slopes_.push_back(store_.matrix(i ? chunk_ : 0, sizes.in(i)));
    }
    bias_ = store_.matrix(chunk_, width);
    affinity_ = store_.matrix(chunk_, chunk_);
    scaled_ = store_.matrix(chunk_, sizes.widest());
    for (T*& each : flipped_) each = store_.numbers(flipped);
    rate_.resize(chunk_);
  }

  // Of the next row and head: gamma and beta [D], token_scale [C], and what its unfinished chunk held before the call.
  void begin(const T* gamma, const T* beta, const T* token_scale, Memory<const T> earlier) {
    norm_.gamma = gamma, norm_.beta = beta, token_scale_ = token_scale, earlier_ = std::move(earlier);
  }

  // Tokens that are not `finite` are taken for zeros.
  void load_tokens(const Slots& slots, Line<const T> q, Line<const T> k, Line<const T> v, Line<const T> lr,
                   const bool* finite) {
    const int64_t width = sizes_.width();
    for (int64_t c = slots.first; c < slots.last; ++c) {
      if (!finite[slots.token + c]) {
        for (T* each : {input(0, c), query_input(0, c)}) std::fill(each, each + width, T(0));
        std::copy(norm_.beta, norm_.beta + width, bias_.row(c));
        rate_[c] = 0;
        continue;
      }
      const T *key = k.at(slots.token + c), *value = v.at(slots.token + c), *query = q.at(slots.token + c);
      std::copy(key, key + width, input(0, c));
      std::copy(query, query + width, query_input(0, c));
      for (int64_t j = 0; j < width; ++j) bias_.row(c)[j] = norm_.beta[j] - (value[j] - key[j]);
      rate_[c] = *lr.at(slots.token + c);
    }
    for (int64_t c = 0; c < slots.first; ++c)
      std::copy(earlier_.inputs[0] + c * width, earlier_.inputs[0] + (c + 1) * width, input(0, c));
  }

  // The values of the loaded chunk at the weights of its start; a_i and g_i stay here until the next chunk.
  void forward(const Slots& slots, const Network<T>& net, const Values<T>& values) {
    const int64_t first = slots.first, count = slots.count();
    if (count == chunk_) {
      linear(2 * count, left_[0], net, 0, values.outputs[0]);
    } else {
      linear(count, from(left_[0], first), net, 0, from(values.outputs[0], first));
      linear(count, from(left_[0], chunk_ + first), net, 0, from(values.outputs[0], chunk_ + first));
    }
    for (int64_t i = 1; i < layers_; ++i) {
      key_activations(slots, values, i);
      linear(count, from(left_[i], first), net, i, from(values.outputs[i], first));
    }
    loss_gradients(slots, values);
    for (int64_t i = layers_ - 1; i > 0; --i) {
      back(count, from(gradients(i), first), net, i, from(values.products[i], first), false);
      times_slopes(slots, values, i);
    }
    put_earlier(slots);
    for (int64_t i = 0; i < layers_; ++i) {
      const Matrix<T> x = from(left_[i], chunk_ + first), u = from(values.outputs[i], chunk_ + first);
      if (i) {
        for (int64_t c = first; c < slots.last; ++c) gelu(values.query(i - 1, c), sizes_.in(i), query_input(i, c));
        linear(count, x, net, i, u);
      }
      affinities(slots, i);
      product<T>(count, sizes_.out(i), slots.last, affinity_.row(first), affinity_.pitch, 1, gradients(i), u.data,
                 u.pitch, u);
    }
  }

  void output(const Slots& slots, const Values<T>& values, Line<T> y) const {
    for (int64_t c = slots.first; c < slots.last; ++c)
      norm_.output(left_[0].row(chunk_ + c), values.query(layers_ - 1, c), y.at(slots.token + c));
  }

  // a_i, g_i and gelu' at o_i of the loaded chunk again, from its values.
  void remember(const Slots& slots, const Values<T>& values) {
    for (int64_t i = 1; i < layers_; ++i) key_activations(slots, values, i);
    loss_gradients(slots, values);
    for (int64_t i = layers_ - 1; i > 0; --i) times_slopes(slots, values, i);
    put_earlier(slots);
  }

  // The fast weights after a whole chunk, `into` another network or the same.
  void update(const Network<T>& net, const Network<T>& into) {
    const T factor = -token_scale_[chunk_ - 1];
    for (int64_t i = 0; i < layers_; ++i) {
      const int64_t out = padded<T>(sizes_.out(i));
      if (into.biases[i] != net.biases[i]) std::copy(net.biases[i], net.biases[i] + out, into.biases[i]);
      const Matrix<T> scaled = scaled_gradients(i, factor);
      add_rows(chunk_, scaled, out, into.biases[i]);
      product<T>(sizes_.in(i), sizes_.out(i), chunk_, left_[i].data, 1, left_[i].pitch, scaled, net.weights[i].data,
                 net.weights[i].pitch, into.weights[i]);
    }
  }

  // a_i and g_i [C, any] of an unfinished chunk; no other slot is written to.
  void unfinished(const Slots& slots, const Memory<T>& to) const {
    for (int64_t i = 0; i < layers_; ++i)
      for (int64_t c = 0; c < slots.last; ++c) {
        const T *a = left_[i].row(c), *g = right_[i].row(2 * chunk_ + c);
        std::copy(a, a + sizes_.in(i), to.inputs[i] + c * sizes_.in(i));
        std::copy(g, g + sizes_.out(i), to.gradients[i] + c * sizes_.out(i));
      }
  }

 protected:
  // Of layer i, one below the other: a_i, x_i and (backward) the gradient of P_i, [3 C, in]; the gradients of o_i and
  // u_i, and g_i, [3 C, out]. The weights' gradient is the product of the two.
  std::vector<Matrix<T>> left_, right_;

  static Matrix<T> from(const Matrix<T>& matrix, int64_t row) { return {matrix.row(row), matrix.pitch}; }
  static Matrix<const T> constant(const Matrix<T>& matrix) { return {matrix.data, matrix.pitch}; }
  T* input(int64_t layer, int64_t slot) const { return left_[layer].row(slot); }
  T* query_input(int64_t layer, int64_t slot) const { return left_[layer].row(chunk_ + slot); }
  Matrix<T> gradients(int64_t layer) const { return from(right_[layer], 2 * chunk_); }

  // out = x W + b, x [count, in].
  void linear(int64_t count, Matrix<T> x, const Network<T>& net, int64_t layer, Matrix<T> out) const {
    product<T>(count, sizes_.out(layer), sizes_.in(layer), x.data, x.pitch, 1, net.weights[layer], net.biases[layer], 0,
               out);
  }

  // `found` [count, in] = g W^T, or plus it, g [count, out].
  void back(int64_t count, Matrix<T> g, const Network<T>& net, int64_t layer, Matrix<T> found, bool add) const {
    const int64_t pitch = padded<T>(count), in = sizes_.in(layer), out = sizes_.out(layer);
    const Matrix<T> flipped{flipped_[0], pitch}, result{flipped_[1], pitch};
    transpose<T>(count, out, constant(g), flipped);
    product<T>(in, count, out, net.weights[layer].data, net.weights[layer].pitch, 1, flipped, nullptr, 0, result);
    transpose<T>(in, count, constant(result), found, add);
  }

  // `found` [rows, columns] = x y^T, of x [rows, depth] and y [columns, depth].
  void inner_products(int64_t rows, int64_t columns, int64_t depth, Matrix<T> x, Matrix<T> y, Matrix<T> found) const {
    const Matrix<T> flipped{flipped_[0], padded<T>(columns)};
    transpose<T>(columns, depth, constant(y), flipped);
    product<T>(rows, columns, depth, x.data, x.pitch, 1, flipped, nullptr, 0, found);
  }

  // M * (x a^T + 1) of the chunk's queries and of its keys so far, [C, C]; M is -token_scale of the query, or zero.
  void affinities(const Slots& slots, int64_t layer) const {
    const int64_t first = slots.first;
    inner_products(slots.count(), slots.last, sizes_.in(layer), from(left_[layer], chunk_ + first), left_[layer],
                   from(affinity_, first));
    for (int64_t c = first; c < slots.last; ++c)
      for (int64_t t = 0; t < slots.last; ++t) affinity_.row(c)[t] = mask(c, t) * (affinity_.row(c)[t] + 1);
  }

  T mask(int64_t query, int64_t key) const { return causal_ && key > query ? T(0) : -token_scale_[query]; }

  Matrix<T> scaled_gradients(int64_t layer, T factor) const {
    const int64_t out = padded<T>(sizes_.out(layer));
    const Matrix<T> g = gradients(layer), scaled{scaled_.data, pitch_of<T>(sizes_.out(layer))};
    for (int64_t c = 0; c < chunk_; ++c)
      for (int64_t j = 0; j < out; ++j) scaled.row(c)[j] = factor * g.row(c)[j];
    return scaled;
  }

  static void add_rows(int64_t count, Matrix<T> rows, int64_t columns, T* sum) {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t j = 0; j < columns; ++j) sum[j] += rows.row(c)[j];
  }

  const Sizes& sizes_;
  const bool causal_;
  const int64_t chunk_, layers_;
  Store<T> store_;
  Norm<T> norm_;
  const T* token_scale_ = nullptr;
  Memory<const T> earlier_;
  std::vector<Matrix<T>> slopes_;         // gelu' at o_{i-1}, [C, in]
  Matrix<T> bias_, affinity_, scaled_;    // beta - target [C, D], [C, C], [C, out]
  std::vector<T> rate_;                   // lr [C]
  T* flipped_[2];                         // [any, 2 C]

 private:
  void key_activations(const Slots& slots, const Values<T>& values, int64_t layer) {
    for (int64_t c = slots.first; c < slots.last; ++c)
      gelu(values.outputs[layer - 1].row(c), sizes_.in(layer), input(layer, c), slopes_[layer].row(c));
  }

  void loss_gradients(const Slots& slots, const Values<T>& values) {
    const Matrix<T> g = gradients(layers_ - 1);
    for (int64_t c = slots.first; c < slots.last; ++c)
      norm_.loss_gradient(values.outputs[layers_ - 1].row(c), bias_.row(c), rate_[c], g.row(c));
  }

  // g_{i-1} = gelu'(o_{i-1}) * P_i.
  void times_slopes(const Slots& slots, const Values<T>& values, int64_t layer) {
    const Matrix<T> g = gradients(layer - 1);
    for (int64_t c = slots.first; c < slots.last; ++c) {
      const T *slope = slopes_[layer].row(c), *product = values.products[layer].row(c);
      for (int64_t j = 0; j < sizes_.in(layer); ++j) g.row(c)[j] = slope[j] * product[j];
    }
  }

  void put_earlier(const Slots& slots) {
    for (int64_t i = 0; i < layers_; ++i)
      for (int64_t c = 0; c < slots.first; ++c) {
        const T *a = earlier_.inputs[i] + c * sizes_.in(i), *g = earlier_.gradients[i] + c * sizes_.out(i);
        std::copy(a, a + sizes_.in(i), input(i, c));
        std::copy(g, g + sizes_.out(i), gradients(i).row(c));
      }
  }
};

}  // namespace hybrid
