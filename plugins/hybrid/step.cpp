// One streamed token of the inner loop on a CPU: what recurrent.py computes by tensor operations, in one call, for the
// published form (the inner LayerNorm, one step a chunk, no momentum). inner_loop.py says what is computed. Each row and
// head is worked on by one thread (cpp/step_head.h).
//
// Shape legend: B streams, H heads, C tokens a chunk, D head width, L layers.

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "cpp/step_head.h"
#include "parallel.h"

namespace {

using at::Tensor;
using moshi_ttt::below;

struct Layer {
  Tensor weight, bias, input, gradient;  // [B, H, in, out], [B, H, 1, out], [B, H, C, in], [B, H, C, out]
};

struct Shared {
  const Tensor &gamma, &beta, &token_scale;  // [H, D], [H, D], [C]
  double eps;
};

struct Counters {
  int64_t *position, *spoiled, *skipped;  // [B]
};

// The counters of a row after its token; whether its chunk ends, and whether that updates its fast weights.
std::pair<bool, bool> count_token(const Counters& counters, int64_t row, int64_t chunk, bool nonfinite) {
  int64_t &position = counters.position[row], &spoiled = counters.spoiled[row];
  spoiled += nonfinite;
  if (++position < chunk) return {false, false};
  const bool applied = spoiled == 0;
  counters.skipped[row] += !applied;
  position = spoiled = 0;
  return {true, applied};
}

template <typename T>
std::vector<hybrid::StepLayer<T>> of_head(const std::vector<Layer>& layers, int64_t row) {
  const auto at = [&](const Tensor& part) { return part.mutable_data_ptr<T>() + row * part.size(2) * part.size(3); };
  std::vector<hybrid::StepLayer<T>> found;
  for (const Layer& each : layers)
    found.push_back({at(each.weight), at(each.bias), at(each.input), at(each.gradient), each.weight.size(2),
                     each.weight.size(3)});
  return found;
}

// `tokens` are q, k, v [B, 1, H, D] and lr [B, 1, H].
template <typename T>
Tensor run(const std::array<Tensor, 4>& tokens, const std::vector<Layer>& layers, const Counters& counters,
           const Shared& shared, const bool* active, const bool* updated, double limit) {
  const int64_t batch = tokens[0].size(0), heads = tokens[0].size(2), width = tokens[0].size(3);
  const int64_t chunk = shared.token_scale.size(0);
  const T *q = tokens[0].const_data_ptr<T>(), *k = tokens[1].const_data_ptr<T>(), *v = tokens[2].const_data_ptr<T>();
  const T *lr = tokens[3].const_data_ptr<T>(), *scale = shared.token_scale.const_data_ptr<T>();
  const T *gamma = shared.gamma.const_data_ptr<T>(), *beta = shared.beta.const_data_ptr<T>();
  Tensor y = at::zeros({batch, 1, heads * width}, tokens[0].options());
  T* out = y.mutable_data_ptr<T>();
  std::vector<char> finite(batch);
  std::vector<int64_t> positions(batch), rows;
  std::vector<std::pair<bool, bool>> ends(batch);
  for (int64_t row = 0; row < batch; ++row) {
    if (active && !active[row]) continue;
    const int64_t first = row * heads * width, count = heads * width;
    finite[row] = below(q + first, count, T(limit)) && below(k + first, count, T(limit)) &&
                  below(v + first, count, T(limit)) && below(lr + row * heads, heads, T(limit));
    positions[row] = counters.position[row];
    ends[row] = count_token(counters, row, chunk, !finite[row] && (!updated || updated[row]));
    rows.push_back(row);
  }
  std::vector<int64_t> widths{width};
  for (const Layer& each : layers) widths.push_back(each.weight.size(3));
  const std::vector<T> zeros(width);
  moshi_ttt::in_parallel(rows.size() * heads, [&](int64_t begin, int64_t end) {
    hybrid::StepHead<T> head(widths, chunk, shared.eps);
    for (int64_t each = begin; each < end; ++each) {
      const int64_t row = rows[each / heads], h = each % heads, i = row * heads + h;
      const auto [done, applied] = ends[row];
      head.begin(of_head<T>(layers, i), gamma + h * width, beta + h * width);
      const auto given = [&](const T* part) { return finite[row] ? part + i * width : zeros.data(); };
      head.step(given(q), given(k), given(v), finite[row] ? lr[i] : T(0), positions[row], scale[positions[row]],
                applied ? -scale[chunk - 1] : T(0), out + i * width);
      if (done) head.clear();
    }
  });
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
