// One streamed token of one row and head: its fast network, the slots of its unfinished chunk, and room to work in.
//
// How often the fast weights are read from memory is what a step costs. The first layer is read once, for the key and the
// query together. The second is read twice: its gradient for the key and its product for the query go through its rows
// together, because a row gives one number of the first layer's gradient, and that one number of the query. Later layers
// are read three times. Weights are written to at a chunk's end alone, those of the second layer while they are read.
//
// Shape legend: C tokens a chunk, D head width, L layers, `in` and `out` of a layer.

#pragma once

#include "activations.h"
#include "norm.h"
#include "products.h"

namespace hybrid {

template <typename T>
struct StepLayer {
  T *weight, *bias, *input, *gradient;  // [in, out], [out], [C, in], [C, out]
  int64_t in, out;
};

template <typename T>
class StepHead {
 public:
  StepHead(const std::vector<int64_t>& widths, int64_t chunk, double eps) : chunk_(chunk) {
    const int64_t width = widths[0], widest = *std::max_element(widths.begin(), widths.end());
    norm_ = {nullptr, nullptr, width, eps, store_.numbers(width), store_.numbers(width), store_.numbers(width)};
    for (T** each : {&bias_, &output_, &query_, &x_}) *each = store_.numbers(widest);
    for (size_t i = 0; i + 1 < widths.size(); ++i) slopes_.push_back(store_.numbers(widths[i]));
    affinity_ = store_.numbers(chunk);
    scaled_ = store_.numbers(chunk * widest);
  }

  void begin(std::vector<StepLayer<T>> layers, const T* gamma, const T* beta) {
    layers_ = std::move(layers);
    norm_.gamma = gamma, norm_.beta = beta;
  }

  // y [D] of q, k, v [D] and lr in slot `position`, where a query reads with `scale`. A token that is not finite has
  // zeros. `factor`: of the update at the chunk's end; 0: there is none.
  void step(const T* q, const T* k, const T* v, T lr, int64_t position, T scale, T factor, T* y) {
    const int64_t count = layers_.size();
    position_ = position, scale_ = scale, factor_ = factor;
    key_pass(q, k, v, lr);
    for (int64_t i = count - 1; i > 1; --i)
      for (int64_t j = 0; j < layers_[i].in; ++j) through_row(i, j);
    affinities(0, q);
    add_chunk(0, position, query_);
    if (count > 1) second_layer();
    else add_slot(0, position, query_);
    for (int64_t i = 2; i < count; ++i) {
      const StepLayer<T>& layer = layers_[i];
      gelu(query_, layer.in, x_);
      std::copy(layer.bias, layer.bias + layer.out, query_);
      add_product(x_, layer.weight, layer.in, layer.out, query_);
      affinities(i, x_);
      add_chunk(i, position + 1, query_);
    }
    norm_.output(q, query_, y);
    if (factor != 0) update();
  }

  // No slot holds a token any more.
  void clear() const {
    for (const StepLayer<T>& layer : layers_) {
      std::fill(layer.input, layer.input + chunk_ * layer.in, T(0));
      std::fill(layer.gradient, layer.gradient + chunk_ * layer.out, T(0));
    }
  }

 private:
  T* input(int64_t layer, int64_t slot) const { return layers_[layer].input + slot * layers_[layer].in; }
  T* gradient(int64_t layer, int64_t slot) const { return layers_[layer].gradient + slot * layers_[layer].out; }

  // The key's inputs of each layer, the gradient at the last one's output, and the query's product with the first.
  void key_pass(const T* q, const T* k, const T* v, T lr) {
    const int64_t count = layers_.size(), width = norm_.width;
    const StepLayer<T>& first = layers_[0];
    std::copy(first.bias, first.bias + first.out, output_);
    std::copy(first.bias, first.bias + first.out, query_);
    add_products(k, q, first.weight, first.in, first.out, output_, query_);
    std::copy(k, k + width, input(0, position_));
    for (int64_t i = 1; i < count; ++i) {
      const StepLayer<T>& layer = layers_[i];
      gelu(output_, layer.in, input(i, position_), slopes_[i]);
      std::copy(layer.bias, layer.bias + layer.out, output_);
      add_product(input(i, position_), layer.weight, layer.in, layer.out, output_);
    }
    for (int64_t j = 0; j < width; ++j) bias_[j] = norm_.beta[j] - (v[j] - k[j]);
    norm_.loss_gradient(output_, bias_, lr, gradient(count - 1, position_));
  }

  // Number j of g_{i-1} = gelu'(o_{i-1}) * (g_i W_i^T).
  void through_row(int64_t i, int64_t j) const {
    const StepLayer<T>& layer = layers_[i];
    gradient(i - 1, position_)[j] = slopes_[i][j] * dot(layer.weight + j * layer.out, gradient(i, position_), layer.out);
  }

  // -token_scale * (x . a(t) + 1) of the chunk's tokens t so far.
  void affinities(int64_t layer, const T* x) const {
    for (int64_t t = 0; t <= position_; ++t)
      affinity_[t] = -scale_ * (dot(x, input(layer, t), layers_[layer].in) + 1);
  }

  // u += the affinity times g(t), of the first `count` tokens t; of one.
  void add_chunk(int64_t layer, int64_t count, T* u) const {
    add_product(affinity_, layers_[layer].gradient, count, layers_[layer].out, u);
  }
  void add_slot(int64_t layer, int64_t slot, T* u) const {
    add_product(affinity_ + slot, gradient(layer, slot), 1, layers_[layer].out, u);
  }

  // From the first layer's query, which has this token's gradient to come, to the second's.
  void second_layer() {
    const StepLayer<T>& layer = layers_[1];
    constexpr int64_t kLines = 16;
    std::copy(layer.bias, layer.bias + layer.out, output_);
    if (factor_ != 0) scale_gradients(1);
    for (int64_t j = 0; j < layer.in; j += kLines) {
      const int64_t count = std::min(kLines, layer.in - j);
      T *g = gradient(0, position_) + j, *lines = layer.weight + j * layer.out;
      for (int64_t i = j; i < j + count; ++i) through_row(1, i);
      for (int64_t i = 0; i < count; ++i) query_[j + i] += affinity_[position_] * g[i];
      gelu(query_ + j, count, x_ + j);
      add_product(x_ + j, lines, count, layer.out, output_);
      if (factor_ != 0) update_lines(1, j, count);
    }
    std::swap(query_, output_);
    affinities(1, x_);
    add_chunk(1, position_ + 1, query_);
  }

  void scale_gradients(int64_t i) const {
    const int64_t numbers = chunk_ * layers_[i].out;
    for (int64_t j = 0; j < numbers; ++j) scaled_[j] = factor_ * layers_[i].gradient[j];
  }

  // Lines of W_i plus the factor times a^T g, `scale_gradients` first.
  void update_lines(int64_t i, int64_t first, int64_t count) const {
    const StepLayer<T>& layer = layers_[i];
    const Matrix<T> weight{layer.weight + first * layer.out, layer.out};
    if (layer.out % Lanes<T>::count == 0) {
      product<T>(count, layer.out, chunk_, layer.input + first, 1, layer.in, {scaled_, layer.out}, weight.data,
                 layer.out, weight);
      return;
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t t = 0; t < chunk_; ++t)
        add_product(layer.input + t * layer.in + first + j, scaled_ + t * layer.out, 1, layer.out, weight.row(j));
  }

  void update() const {
    for (int64_t i = 0; i < int64_t(layers_.size()); ++i) {
      scale_gradients(i);
      if (i != 1) update_lines(i, 0, layers_[i].in);
      for (int64_t t = 0; t < chunk_; ++t)
        for (int64_t j = 0; j < layers_[i].out; ++j) layers_[i].bias[j] += scaled_[t * layers_[i].out + j];
    }
  }

  const int64_t chunk_;
  Store<T> store_;
  Norm<T> norm_;
  std::vector<StepLayer<T>> layers_;
  std::vector<T*> slopes_;  // gelu' at o_{i-1}, [in]
  T *bias_, *output_, *query_, *x_, *affinity_, *scaled_;
  int64_t position_ = 0;
  T scale_ = 0, factor_ = 0;
};

}  // namespace hybrid
