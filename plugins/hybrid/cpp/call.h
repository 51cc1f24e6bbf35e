// A call of the inner loop: all chunks of one row and head in one thread, where its fast weights stay in the cache.
//
// Shape legend: B streams, H heads, T tokens, N chunks, C tokens a chunk, D head width, L layers.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "head_backward.h"
#include "parallel.h"

namespace hybrid {

using at::Tensor;

// Tensors of the L layers, [B, H, any, any].
struct Layers {
  std::vector<Tensor> weights, biases, inputs, gradients;
};

struct Arguments {
  Tensor q, k, v, lr;               // [B, T, H, D] three times, [B, T, H, 1]
  std::vector<int64_t> position;    // [B], tokens of the first chunk from before the call
  Tensor finite;                    // [B, T] bool; other tokens are taken for zeros
  Tensor applied;                   // [B, N] bool, chunks whose update is applied if they end in the call
  Tensor gamma, beta, token_scale;  // [H, D] twice, [C]
  Layers start;
  bool causal;
  double eps;

  int64_t heads() const { return q.size(2); }
  int64_t rows() const { return q.size(0) * heads(); }
  int64_t chunks() const { return applied.size(1); }
  Sizes sizes() const {
    Sizes found{{q.size(3)}, token_scale.size(0)};
    for (const Tensor& weight : start.weights) found.widths.push_back(weight.size(3));
    return found;
  }
};

// What is kept between the passes: the fast weights at the start of every `stride` chunks, [B H, any, any].
struct Kept {
  Tensor states;
  int64_t stride;  // 0: nothing is kept
};

// Gradients of the arguments; those that heads or rows share are summed over them by the caller.
struct Gradients {
  Tensor q, k, v, lr;               // [B, T, H, D] three times, [B, T, H, 1]
  Tensor gamma, beta, token_scale;  // [B H, D] twice, [B H, C]
  Layers start;
};

template <typename T>
class Call {
 public:
  explicit Call(const Arguments& given) : given_(given), sizes_(given.sizes()) {}

  Kept keep(int64_t stride) const {
    const int64_t states = stride ? (given_.chunks() + stride - 1) / stride : 0;
    return {at::empty({given_.rows(), states, Network<T>::numbers(sizes_)}, given_.q.options()), stride};
  }

  // Into y [B, T, H, D], the state after the call, and what is kept.
  void forward(const Tensor& y, const Layers& after, const Kept& kept) const {
    in_parallel(given_.rows(), [&](int64_t begin, int64_t end) {
      Store<T> store;
      Head<T> head(sizes_, given_.causal, given_.eps);
      const Network<T> net(sizes_, store.numbers(Network<T>::numbers(sizes_)));
      T* const scratch = store.numbers(Values<T>::numbers(sizes_));
      for (int64_t row = begin; row < end; ++row) forward(head, net, scratch, row, y, after, kept);
    });
  }

  // Of the upstream gradients of y [B, T, H, D] and of the state.
  void backward(const Kept& kept, const Tensor& of_y, const Layers& upstream, const Gradients& found) const {
    in_parallel(given_.rows(), [&](int64_t begin, int64_t end) {
      Store<T> store;
      BackwardHead<T> head(sizes_, given_.causal, given_.eps);
      std::vector<Network<T>> nets;
      std::vector<T*> scratch;
      for (int64_t i = 0; i <= kept.stride; ++i)
        nets.emplace_back(sizes_, store.numbers(Network<T>::numbers(sizes_)));
      for (int64_t i = 0; i < kept.stride; ++i)
        scratch.push_back(store.numbers(Values<T>::numbers(sizes_)));
      for (int64_t row = begin; row < end; ++row) backward(head, nets, scratch, row, kept, of_y, upstream, found);
    });
  }

 private:
  void forward(Head<T>& head, const Network<T>& net, T* scratch, int64_t row, const Tensor& y, const Layers& after,
               const Kept& kept) const {
    begin(head, row);
    copy_network<const T>(given_.start, row, net, [](const T* line, T* own, int64_t count) {
      std::copy(line, line + count, own);
    });
    const std::vector<Slots> chunks = slots(row);
    for (size_t n = 0; n < chunks.size(); ++n) {
      if (kept.stride && n % kept.stride == 0)
        std::copy(net.weights[0].data, net.weights[0].data + kept.states.size(2), state(kept, row, n / kept.stride));
      const Values<T> values(sizes_, scratch);
      load_tokens(head, chunks[n], row);
      head.forward(chunks[n], net, values);
      head.output(chunks[n], values, line<T>(y, row));
      if (chunks[n].last < sizes_.chunk) head.unfinished(chunks[n], memory<T>(after, row));
      else if (applied(row, n)) head.update(net, net);
    }
    copy_network<T>(after, row, net, [](T* line, const T* own, int64_t count) { std::copy(own, own + count, line); });
  }

  void backward(BackwardHead<T>& head, const std::vector<Network<T>>& nets, const std::vector<T*>& scratch, int64_t row,
                const Kept& kept, const Tensor& of_y, const Layers& upstream, const Gradients& found) const {
    begin(head, row);
    Sums<T> sums{nets.back(), of_row(found.gamma, row), of_row(found.beta, row), of_row(found.token_scale, row)};
    copy_network<const T>(upstream, row, sums.net, [](const T* line, T* own, int64_t count) {
      std::copy(line, line + count, own);
    });
    const std::vector<Slots> chunks = slots(row);
    const int64_t count = chunks.size(), stride = kept.stride;
    for (int64_t first = (count - 1) / stride * stride; first >= 0; first -= stride) {
      const int64_t last = std::min(first + stride, count);
      again(head, nets, scratch, row, kept, chunks, first, last);
      for (int64_t n = last - 1; n >= first; --n) {
        const Values<T> values(sizes_, scratch[n - first]);
        load_tokens(head, chunks[n], row);
        head.remember(chunks[n], values);
        const bool ends = chunks[n].last == sizes_.chunk;
        const Memory<const T> unfinished = memory<const T>(upstream, row);
        head.begin_chunk(chunks[n], ends ? nullptr : &unfinished);
        head.backward(chunks[n], nets[n - first], values, line<const T>(of_y, row),
                      ends && applied(row, n), sums);
        head.finish_chunk(chunks[n], {line<T>(found.q, row), line<T>(found.k, row), line<T>(found.v, row),
                                      line<T>(found.lr, row)}, finite(row), memory<T>(found.start, row));
      }
    }
    copy_network<T>(found.start, row, sums.net, [](T* line, const T* own, int64_t count) {
      std::copy(own, own + count, line);
    });
  }

  // The fast weights at the start of chunks `first` to `last - 1`, and their values.
  void again(Head<T>& head, const std::vector<Network<T>>& nets, const std::vector<T*>& scratch, int64_t row,
             const Kept& kept, const std::vector<Slots>& chunks, int64_t first, int64_t last) const {
    const T* const kept_state = state(kept, row, first / kept.stride);
    std::copy(kept_state, kept_state + kept.states.size(2), nets[0].weights[0].data);
    for (int64_t n = first; n < last; ++n) {
      const Network<T>& now = nets[n - first];
      load_tokens(head, chunks[n], row);
      head.forward(chunks[n], now, Values<T>(sizes_, scratch[n - first]));
      if (n == last - 1) return;
      const Network<T>& next = nets[n - first + 1];
      if (applied(row, n)) head.update(now, next);
      else std::copy(now.weights[0].data, now.weights[0].data + kept.states.size(2), next.weights[0].data);
    }
  }

  // The chunks of a row, as core.format.ChunkLayout lays them out.
  std::vector<Slots> slots(int64_t row) const {
    const int64_t position = given_.position[row / given_.heads()], size = sizes_.chunk, end = position + given_.q.size(1);
    std::vector<Slots> found;
    for (int64_t begin = 0; begin < end; begin += size)
      found.push_back({begin ? 0 : position, std::min(size, end - begin), begin - position});
    return found;
  }

  void begin(Head<T>& head, int64_t row) const {
    const int64_t h = row % given_.heads(), width = sizes_.width();
    head.begin(given_.gamma.const_data_ptr<T>() + h * width, given_.beta.const_data_ptr<T>() + h * width,
               given_.token_scale.const_data_ptr<T>(), memory<const T>(given_.start, row));
  }

  void load_tokens(Head<T>& head, const Slots& slots, int64_t row) const {
    head.load_tokens(slots, line<const T>(given_.q, row), line<const T>(given_.k, row), line<const T>(given_.v, row),
                     line<const T>(given_.lr, row), finite(row));
  }

  const bool* finite(int64_t row) const {
    return given_.finite.const_data_ptr<bool>() + row / given_.heads() * given_.q.size(1);
  }

  bool applied(int64_t row, int64_t chunk) const {
    return given_.applied.const_data_ptr<bool>()[row / given_.heads() * given_.chunks() + chunk];
  }

  T* state(const Kept& kept, int64_t row, int64_t at) const {
    return kept.states.template data_ptr<T>() + (row * kept.states.size(1) + at) * kept.states.size(2);
  }

  template <typename U>
  static U* pointer(const Tensor& tensor) {
    if constexpr (std::is_const_v<U>) return tensor.const_data_ptr<T>();
    else return tensor.mutable_data_ptr<T>();
  }

  // Of a row and head: what it sums up, of [B H, any].
  static T* of_row(const Tensor& sums, int64_t row) {
    return sums.mutable_data_ptr<T>() + row * sums.stride(0);
  }

  // Of a row and head: the tokens of [B, T, H, any].
  template <typename U>
  Line<U> line(const Tensor& tokens, int64_t row) const {
    const int64_t b = row / given_.heads(), h = row % given_.heads();
    return {pointer<U>(tokens) + b * tokens.stride(0) + h * tokens.stride(2), tokens.stride(1)};
  }

  // Of a row and head: a part of [B, H, any, any].
  template <typename U>
  U* place(const Tensor& part, int64_t row) const {
    return pointer<U>(part) + row / given_.heads() * part.stride(0) + row % given_.heads() * part.stride(1);
  }

  template <typename U>
  Memory<U> memory(const Layers& layers, int64_t row) const {
    Memory<U> found;
    for (const Tensor& each : layers.inputs) found.inputs.push_back(place<U>(each, row));
    for (const Tensor& each : layers.gradients) found.gradients.push_back(place<U>(each, row));
    return found;
  }

  // `copy` of each line of the weights and biases in tensors with that of a network.
  template <typename U, typename Copy>
  void copy_network(const Layers& layers, int64_t row, const Network<T>& net, Copy copy) const {
    for (int64_t i = 0; i < sizes_.layers(); ++i) {
      const int64_t out = sizes_.out(i);
      for (int64_t j = 0; j < sizes_.in(i); ++j)
        copy(place<U>(layers.weights[i], row) + j * out, net.weights[i].row(j), out);
      copy(place<U>(layers.biases[i], row), net.biases[i], out);
    }
  }

  const Arguments& given_;
  const Sizes sizes_;
};

}  // namespace hybrid
