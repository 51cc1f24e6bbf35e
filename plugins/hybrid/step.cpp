// One streamed token of the inner loop on a CPU: what recurrent.py computes by tensor operations, in one call, for the
// published form (the inner LayerNorm, one step a chunk, no momentum). inner_loop.py says what is computed.
//
// Each row and head is worked on by one thread. Its first layer is read once, for the key and the query together, and
// each further layer three times. The fast weights are written to at the end of a chunk alone.
//
// Shape legend: B streams, H heads, C tokens a chunk, D head width, L layers.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

// exp(x) by 2^n times a polynomial, in loops that compilers turn into vector instructions. n is rounded by adding a
// number whose last digit is 1; its bits are then those of a small integer.
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

// gelu(x), and its derivative where it is asked for: x / 2 (1 + t), with t the tanh of r (x + c x^3).
template <typename T>
void gelu(const T* x, int64_t count, T* value, T* derivative) {
  const T root = T(0.79788456080286535588), cubic = T(0.044715);
  for (int64_t i = 0; i < count; ++i) {
    const T square = x[i] * x[i];
    const T t = 1 - 2 / (exponential(2 * root * x[i] * (1 + cubic * square)) + 1);
    value[i] = T(0.5) * x[i] * (1 + t);
    if (derivative) derivative[i] = T(0.5) * (1 + t) + T(0.5) * x[i] * (1 - t * t) * root * (1 + 3 * cubic * square);
  }
}

// y [out] += x [in] W [in, out], four lines of W at a time.
template <typename T>
void add_product(const T* x, const T* weight, int64_t in, int64_t out, T* __restrict y) {
  int64_t i = 0;
  for (; i + 4 <= in; i += 4) {
    const T *w = weight + i * out, a = x[i], b = x[i + 1], c = x[i + 2], d = x[i + 3];
    for (int64_t j = 0; j < out; ++j) y[j] += a * w[j] + b * w[j + out] + c * w[j + 2 * out] + d * w[j + 3 * out];
  }
  for (; i < in; ++i)
    for (int64_t j = 0; j < out; ++j) y[j] += x[i] * weight[i * out + j];
}

// The same for two vectors, which read W once.
template <typename T>
void add_products(const T* x, const T* other, const T* weight, int64_t in, int64_t out, T* __restrict y,
                  T* __restrict z) {
  int64_t i = 0;
  for (; i + 2 <= in; i += 2) {
    const T *w = weight + i * out, a = x[i], b = x[i + 1], c = other[i], d = other[i + 1];
    for (int64_t j = 0; j < out; ++j) {
      y[j] += a * w[j] + b * w[j + out];
      z[j] += c * w[j] + d * w[j + out];
    }
  }
  if (i < in) {
    const T* w = weight + i * out;
    for (int64_t j = 0; j < out; ++j) y[j] += x[i] * w[j];
    for (int64_t j = 0; j < out; ++j) z[j] += other[i] * w[j];
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  T parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t j = 0; j < 16; ++j) parts[j] += a[i + j] * b[i + j];
  T sum = 0;
  for (; i < count; ++i) sum += a[i] * b[i];
  for (const T part : parts) sum += part;
  return sum;
}

template <typename T>
bool below(const T* numbers, int64_t count, T limit) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= std::abs(numbers[i]) < limit;  // a nan is not below
  return all;
}

// The mean of x [count] and 1 / sqrt(variance + eps).
template <typename T>
std::pair<double, double> moments(const T* x, int64_t count, double eps) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  const double mean = sum / count;
  for (int64_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1 / std::sqrt(squares / count + eps)};
}

struct Layer {
  Tensor weight, bias, input, gradient;  // [B, H, in, out], [B, H, 1, out], [B, H, C, in], [B, H, C, out]
};

struct Shared {
  const Tensor &gamma, &beta, &token_scale;  // [H, D], [H, D], [C]
  double eps;
};

// One row and head: its fast network, the slots of its unfinished chunk, and room to work in.
template <typename T>
class Head {
 public:
  Head(const std::vector<Layer>& layers, const Shared& shared, int64_t row, int64_t head, int64_t position)
      : layers_(layers), shared_(shared), row_(row), head_(head), position_(position) {}

  // y [D] of q, k, v [D] and lr. A token that is not finite has zeros.
  void step(const T* q, const T* k, const T* v, T lr, T* y) {
    const int64_t count = layers_.size();
    std::vector<std::vector<T>> outputs(count), slopes(count);
    std::vector<T> query(bias(0), bias(0) + out(0));
    outputs[0] = query;
    add_products(k, q, weight(0), in(0), out(0), outputs[0].data(), query.data());
    std::copy(k, k + in(0), input(0, position_));
    for (int64_t i = 1; i < count; ++i) {
      slopes[i].resize(in(i));
      gelu(outputs[i - 1].data(), in(i), input(i, position_), slopes[i].data());
      outputs[i].assign(bias(i), bias(i) + out(i));
      add_product(input(i, position_), weight(i), in(i), out(i), outputs[i].data());
    }
    loss_gradient(outputs[count - 1].data(), k, v, lr, gradient(count - 1, position_));
    for (int64_t i = count - 1; i > 0; --i)
      for (int64_t j = 0; j < in(i); ++j)
        gradient(i - 1, position_)[j] = slopes[i][j] * dot(weight(i) + j * out(i), gradient(i, position_), out(i));
    add_chunk(0, q, query.data());
    for (int64_t i = 1; i < count; ++i) {
      std::vector<T> x(in(i));
      gelu<T>(query.data(), in(i), x.data(), nullptr);
      query.assign(bias(i), bias(i) + out(i));
      add_product(x.data(), weight(i), in(i), out(i), query.data());
      add_chunk(i, x.data(), query.data());
    }
    const auto [mean, rstd] = moments(query.data(), width(), shared_.eps);
    for (int64_t j = 0; j < width(); ++j) y[j] = q[j] + T((query[j] - mean) * rstd) * gamma()[j] + beta()[j];
  }

 private:
  // u -= token_scale[n] * sum over the chunk's tokens t up to this one, n, of (x . a(t) + 1) g(t).
  void add_chunk(int64_t layer, const T* x, T* u) {
    const T scale = shared_.token_scale.template data_ptr<T>()[position_];
    for (int64_t t = 0; t <= position_; ++t) {
      const T affinity = scale * (dot(x, input(layer, t), in(layer)) + 1);
      const T* g = gradient(layer, t);
      for (int64_t j = 0; j < out(layer); ++j) u[j] -= affinity * g[j];
    }
  }

  // d/dz of lr / 2 |LN(z) - (v - k)|^2.
  void loss_gradient(const T* z, const T* k, const T* v, T lr, T* found) {
    const auto [mean, rstd] = moments(z, width(), shared_.eps);
    std::vector<double> normal(width()), error(width());
    double sum = 0, along = 0;
    for (int64_t j = 0; j < width(); ++j) {
      normal[j] = (z[j] - mean) * rstd;
      error[j] = (normal[j] * gamma()[j] + beta()[j] - (v[j] - k[j])) * gamma()[j] * lr;
      sum += error[j];
      along += error[j] * normal[j];
    }
    for (int64_t j = 0; j < width(); ++j)
      found[j] = T(rstd * (error[j] - sum / width() - normal[j] * along / width()));
  }

  T* place(const Tensor& part, int64_t line) const {
    return part.data_ptr<T>() + row_ * part.stride(0) + head_ * part.stride(1) + line * part.stride(2);
  }
  int64_t in(int64_t layer) const { return layers_[layer].weight.size(2); }
  int64_t out(int64_t layer) const { return layers_[layer].weight.size(3); }
  int64_t width() const { return shared_.gamma.size(1); }
  const T* weight(int64_t layer) const { return place(layers_[layer].weight, 0); }
  const T* bias(int64_t layer) const { return place(layers_[layer].bias, 0); }
  T* input(int64_t layer, int64_t token) const { return place(layers_[layer].input, token); }
  T* gradient(int64_t layer, int64_t token) const { return place(layers_[layer].gradient, token); }
  const T* gamma() const { return shared_.gamma.template data_ptr<T>() + head_ * width(); }
  const T* beta() const { return shared_.beta.template data_ptr<T>() + head_ * width(); }

  const std::vector<Layer>& layers_;
  const Shared& shared_;
  int64_t row_, head_, position_;
};

// The fast weights of a row after its chunk.
void update(const std::vector<Layer>& layers, int64_t row, double scale) {
  for (const Layer& layer : layers) {
    const Tensor gradient = layer.gradient[row];  // [H, C, out]
    layer.weight[row].baddbmm_(layer.input[row].mT(), gradient, 1, -scale);
    layer.bias[row].sub_(gradient.sum(1, true), scale);
  }
}

struct Counters {
  int64_t *position, *spoiled, *skipped;  // [B]
};

// `tokens` are q, k, v [B, 1, H, D] and lr [B, 1, H].
template <typename T>
Tensor run(const std::array<Tensor, 4>& tokens, const std::vector<Layer>& layers, const Counters& counters,
           const Shared& shared, const bool* active, const bool* updated, double limit) {
  const int64_t batch = tokens[0].size(0), heads = tokens[0].size(2), width = tokens[0].size(3);
  const int64_t chunk = shared.token_scale.size(0);
  const T *q = tokens[0].data_ptr<T>(), *k = tokens[1].data_ptr<T>(), *v = tokens[2].data_ptr<T>();
  const T* lr = tokens[3].data_ptr<T>();
  Tensor y = at::zeros({batch, 1, heads * width}, tokens[0].options());
  T* out = y.data_ptr<T>();
  std::vector<char> finite(batch);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t first = row * heads * width, count = heads * width;
    finite[row] = below(q + first, count, T(limit)) && below(k + first, count, T(limit)) &&
                  below(v + first, count, T(limit)) && below(lr + row * heads, heads, T(limit));
  }
  const std::vector<T> zeros(width);
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads;
      if (active && !active[row]) continue;
      Head<T> head(layers, shared, row, i % heads, counters.position[row]);
      if (finite[row]) head.step(q + i * width, k + i * width, v + i * width, lr[i], out + i * width);
      else head.step(zeros.data(), zeros.data(), zeros.data(), T(0), out + i * width);
    }
  });
  for (int64_t row = 0; row < batch; ++row) {
    if (active && !active[row]) continue;
    int64_t &position = counters.position[row], &spoiled = counters.spoiled[row];
    spoiled += !finite[row] && (!updated || updated[row]);
    if (++position < chunk) continue;
    if (spoiled == 0) update(layers, row, double(shared.token_scale.template data_ptr<T>()[chunk - 1]));
    counters.skipped[row] += spoiled > 0;
    position = spoiled = 0;
    for (const Layer& layer : layers) {
      layer.input[row].zero_();
      layer.gradient[row].zero_();
    }
  }
  return y;
}

void check(const char* name, size_t layer, const Tensor& part, const Tensor& like, at::IntArrayRef sizes) {
  TORCH_CHECK(part.sizes() == sizes && part.is_contiguous() && part.scalar_type() == like.scalar_type(),
              "The state's '", name, ".", layer, "' is ", part.scalar_type(), " ", part.sizes(),
              part.is_contiguous() ? "" : ", not contiguous", ", and this block's is ", like.scalar_type(), " ", sizes,
              ". Take the state from the block's allocate_state.");
}

// What recurrent.recurrent_inner_loop computes; the parts of the state are changed in place.
Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, Tensor position, Tensor spoiled,
            Tensor skipped, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
            const std::vector<Tensor>& inputs, const std::vector<Tensor>& gradients, const Tensor& gamma,
            const Tensor& beta, const Tensor& token_scale, const std::optional<Tensor>& active,
            const std::optional<Tensor>& updated, double eps, double limit) {
  const int64_t batch = q.size(0), heads = q.size(2), chunk = token_scale.size(0);
  std::vector<Layer> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t in = weights[i].size(2), out = weights[i].size(3);
    check("weight", i, weights[i], q, {batch, heads, in, out});
    check("bias", i, biases[i], q, {batch, heads, 1, out});
    check("input", i, inputs[i], q, {batch, heads, chunk, in});
    check("gradient", i, gradients[i], q, {batch, heads, chunk, out});
    layers.push_back({weights[i], biases[i], inputs[i], gradients[i]});
  }
  for (const Tensor& part : {position, spoiled, skipped})
    TORCH_CHECK(part.sizes() == at::IntArrayRef({batch}) && part.scalar_type() == at::kLong && part.is_contiguous(),
                "A counter of the state is ", part.scalar_type(), " ", part.sizes(), ", and this block's are Long [",
                batch, "]. Take the state from the block's allocate_state.");
  const Counters counters{position.data_ptr<int64_t>(), spoiled.data_ptr<int64_t>(), skipped.data_ptr<int64_t>()};
  for (int64_t row = 0; row < batch; ++row)
    TORCH_CHECK(0 <= counters.position[row] && counters.position[row] < chunk, "The state's 'position' is ",
                counters.position[row], " in row ", row, ", and a chunk has ", chunk,
                " tokens. Take the state from the block's allocate_state.");
  const Tensor mask = active ? active->contiguous() : Tensor(), taught = updated ? updated->contiguous() : Tensor();
  const std::array<Tensor, 4> tokens{q.contiguous(), k.contiguous(), v.contiguous(), lr.contiguous()};
  const Tensor scale = gamma.contiguous(), shift = beta.contiguous(), steps = token_scale.contiguous();
  Tensor y;
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "hybrid_step", [&] {
    y = run<scalar_t>(tokens, layers, counters, {scale, shift, steps, eps}, active ? mask.data_ptr<bool>() : nullptr,
                      updated ? taught.data_ptr<bool>() : nullptr, limit);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(moshi_ttt_hybrid, library) {
  library.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor(a!) position, Tensor(b!) spoiled, Tensor(c!) skipped, "
      "Tensor(d!)[] weights, Tensor(e!)[] biases, Tensor(f!)[] inputs, Tensor(g!)[] gradients, Tensor gamma, "
      "Tensor beta, Tensor token_scale, Tensor? active, Tensor? updated, float eps, float limit) -> Tensor");
}

TORCH_LIBRARY_IMPL(moshi_ttt_hybrid, CPU, library) { library.impl("step", &step); }
