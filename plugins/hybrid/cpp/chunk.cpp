// The chunk form of the inner loop on a CPU, forward and backward: the published form (the inner LayerNorm, one step a
// chunk, no momentum), in float32 and float64. inner_loop.py says what is computed, chunk_passes.py and chunk_backward.py
// have the same arithmetic by tensor operations. Rows and heads are shared out over threads; each is computed by one, so
// that the number of threads changes no bit.
//
// Shape legend: B streams, H heads, T tokens, N chunks, C tokens a chunk, D head width, L layers.

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "call.h"

namespace {

using at::Tensor;
using hybrid::Arguments;
using hybrid::Call;
using hybrid::Gradients;
using hybrid::Kept;
using hybrid::Layers;

using Tensors = std::vector<Tensor>;

void check(const char* name, const Tensor& given, const Tensor& like, at::IntArrayRef sizes) {
  TORCH_CHECK(given.sizes() == sizes && given.scalar_type() == like.scalar_type(), "The inner loop's '", name, "' is ",
              given.scalar_type(), " ", given.sizes(), ", and it takes ", like.scalar_type(), " ", sizes, ".");
}

// [B, T, H, any], with the numbers of a token and head beside one another.
Tensor in_lines(const Tensor& tokens) { return tokens.stride(-1) == 1 ? tokens : tokens.contiguous(); }

// [B, H, any, any], of which each matrix is contiguous: rows may share one.
Tensor in_matrices(const Tensor& part) {
  const bool contiguous = part.stride(3) == 1 && part.stride(2) == part.size(3);
  return contiguous ? part : part.contiguous();
}

std::vector<int64_t> positions(const std::optional<Tensor>& offset, const Tensor& applied, int64_t batch, int64_t length,
                               int64_t chunk) {
  std::vector<int64_t> found(batch, 0);
  if (offset) {
    TORCH_CHECK(offset->sizes() == at::IntArrayRef({batch}) && offset->scalar_type() == at::kLong,
                "The inner loop's 'offset' is ", offset->scalar_type(), " ", offset->sizes(), ", and it takes Long [",
                batch, "].");
    const Tensor values = offset->contiguous();
    for (int64_t row = 0; row < batch; ++row) {
      found[row] = values.const_data_ptr<int64_t>()[row];
      TORCH_CHECK(0 <= found[row] && found[row] < chunk, "The state's 'position' is ", found[row], " in row ", row,
                  ", and a chunk has ", chunk, " tokens.");
    }
  }
  const int64_t chunks = (length + (offset ? chunk - 1 : 0) + chunk - 1) / chunk;
  TORCH_CHECK(applied.sizes() == at::IntArrayRef({batch, chunks}) && applied.scalar_type() == at::kBool,
              "The inner loop's 'applied' is ", applied.scalar_type(), " ", applied.sizes(), ", and it takes Bool [",
              batch, ", ", chunks, "].");
  return found;
}

Arguments arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
                    const std::optional<Tensor>& offset, const Tensor& finite, const Tensor& applied, const Tensor& gamma, const Tensor& beta,
                    const Tensor& token_scale, const Tensors& weights, const Tensors& biases, const Tensors& inputs,
                    const Tensors& gradients, bool causal, double eps) {
  TORCH_CHECK(q.dim() == 4 && q.numel() > 0 && token_scale.dim() == 1 && token_scale.numel() > 0,
              "The inner loop takes q [B, T, H, D] and token_scale [C] with at least one token each; they are ",
              q.sizes(), " and ", token_scale.sizes(), ".");
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), width = q.size(3), chunk = token_scale.size(0);
  for (const Tensor& each : {k, v}) check("k or v", each, q, {batch, length, heads, width});
  check("lr", lr, q, {batch, length, heads});
  TORCH_CHECK(finite.sizes() == at::IntArrayRef({batch, length}) && finite.scalar_type() == at::kBool,
              "The inner loop's 'finite' is ", finite.scalar_type(), " ", finite.sizes(), ", and it takes Bool [", batch,
              ", ", length, "].");
  check("gamma", gamma, q, {heads, width});
  check("beta", beta, q, {heads, width});
  check("token_scale", token_scale, q, {chunk});
  const size_t layers = weights.size();
  TORCH_CHECK(layers > 0 && biases.size() == layers && inputs.size() == layers && gradients.size() == layers,
              "The inner loop has ", layers, " weights, ", biases.size(), " biases, ", inputs.size(), " inputs and ",
              gradients.size(), " gradients, and it takes one of each for a layer.");
  Layers start;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t in = i ? weights[i - 1].size(3) : width;
    const int64_t out = i + 1 < layers && weights[i].dim() == 4 ? weights[i].size(3) : width;
    check("weight", weights[i], q, {batch, heads, in, out});
    check("bias", biases[i], q, {batch, heads, 1, out});
    check("input", inputs[i], q, {batch, heads, chunk, in});
    check("gradient", gradients[i], q, {batch, heads, chunk, out});
    start.weights.push_back(in_matrices(weights[i]));
    start.biases.push_back(in_matrices(biases[i]));
    start.inputs.push_back(in_matrices(inputs[i]));
    start.gradients.push_back(in_matrices(gradients[i]));
  }
  return {in_lines(q), in_lines(k), in_lines(v), lr.unsqueeze(3), positions(offset, applied, batch, length, chunk),
          finite.contiguous(), applied.contiguous(), gamma.contiguous(), beta.contiguous(), token_scale.contiguous(), start, causal, eps};
}

Layers like(const Layers& start) {
  Layers found;
  for (const Tensor& each : start.weights) found.weights.push_back(at::empty(each.sizes(), each.options()));
  for (const Tensor& each : start.biases) found.biases.push_back(at::empty(each.sizes(), each.options()));
  for (const Tensor& each : start.inputs) found.inputs.push_back(at::zeros(each.sizes(), each.options()));
  for (const Tensor& each : start.gradients) found.gradients.push_back(at::zeros(each.sizes(), each.options()));
  return found;
}

void append(Tensors& found, const Layers& layers) {
  for (const Tensors& part : {layers.weights, layers.biases, layers.inputs, layers.gradients})
    found.insert(found.end(), part.begin(), part.end());
}

// y [B, T, H D], the weights, biases, inputs and gradients of each layer after the call, and what is kept (`Kept`).
Tensors forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
                const std::optional<Tensor>& offset, const Tensor& finite, const Tensor& applied, const Tensor& gamma, const Tensor& beta,
                const Tensor& token_scale, const Tensors& weights, const Tensors& biases, const Tensors& inputs,
                const Tensors& gradients, bool causal, double eps, int64_t stride) {
  const Arguments given = arguments(q, k, v, lr, offset, finite, applied, gamma, beta, token_scale, weights, biases, inputs,
                                    gradients, causal, eps);
  TORCH_CHECK(stride >= 0, "The inner loop's 'stride' is ", stride, "; give 0 (nothing is kept) or more.");
  const Tensor y = at::empty({q.size(0), q.size(1), q.size(2) * q.size(3)}, q.options());
  const Layers after = like(given.start);
  Tensors found{y};
  append(found, after);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "hybrid_chunk_forward", [&] {
    const Call<scalar_t> call(given);
    const Kept kept = call.keep(stride);
    call.forward(y.view(q.sizes()), after, kept);
    found.push_back(kept.states);
  });
  return found;
}

// Into how many parts work is shared out.
int64_t parts(int64_t count) {
  std::atomic<int64_t> found{0};
  moshi_ttt::in_parallel(count, [&](int64_t, int64_t) { ++found; });
  return found;
}

// The gradients of the tensors that `forward` takes, in its order, `upstream` those of its results but for what is kept.
Tensors backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
                 const std::optional<Tensor>& offset, const Tensor& finite, const Tensor& applied, const Tensor& gamma, const Tensor& beta,
                 const Tensor& token_scale, const Tensors& weights, const Tensors& biases, const Tensors& inputs,
                 const Tensors& gradients, bool causal, double eps, const Tensor& states, int64_t stride,
                 const Tensors& upstream) {
  const Arguments given = arguments(q, k, v, lr, offset, finite, applied, gamma, beta, token_scale, weights, biases, inputs,
                                    gradients, causal, eps);
  const size_t layers = weights.size();
  TORCH_CHECK(stride > 0 && upstream.size() == 1 + 4 * layers, "The backward pass of the inner loop takes a stride above 0 ",
              "and ", 1 + 4 * layers, " gradients, and was given ", stride, " and ", upstream.size(), ".");
  Layers of;
  Tensors* parts[] = {&of.weights, &of.biases, &of.inputs, &of.gradients};
  for (size_t i = 0; i < 4 * layers; ++i) {
    const Tensors* starts[] = {&weights, &biases, &inputs, &gradients};
    check("upstream", upstream[1 + i], q, (*starts[i / layers])[i % layers].sizes());
    parts[i / layers]->push_back(in_matrices(upstream[1 + i]));
  }
  check("upstream", upstream[0], q, {q.size(0), q.size(1), q.size(2) * q.size(3)});
  const auto options = q.options();
  const int64_t rows = given.rows(), width = q.size(3);
  const Gradients found{at::empty(q.sizes(), options), at::empty(q.sizes(), options), at::empty(q.sizes(), options),
                        at::empty(given.lr.sizes(), options), at::zeros({rows, width}, options),
                        at::zeros({rows, width}, options), at::zeros({rows, token_scale.size(0)}, options),
                        like(given.start)};
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "hybrid_chunk_backward", [&] {
    const Call<scalar_t> call(given);
    call.backward({states, stride}, upstream[0].contiguous().view(q.sizes()), of, found);
  });
  const auto over_rows = [&](const Tensor& each) { return each.view({q.size(0), q.size(2), width}).sum(0); };
  Tensors all{found.q, found.k, found.v, found.lr.squeeze(3), over_rows(found.gamma), over_rows(found.beta),
              found.token_scale.sum(0)};
  append(all, found.start);
  return all;
}

// How many numbers a head's fast weights take, as they are kept.
int64_t numbers(at::IntArrayRef widths, int64_t chunk, bool wide) {
  const hybrid::Sizes sizes{widths.vec(), chunk};
  return wide ? hybrid::Network<double>::numbers(sizes) : hybrid::Network<float>::numbers(sizes);
}

// Which tokens have q, k, v [B, T, H, D] and lr [B, T, H] between -limit and limit, [B, T]; a nan is not.
Tensor finite_tokens(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, double limit) {
  const int64_t length = q.size(1);
  const Tensor found = at::empty({q.size(0), length}, q.options().dtype(at::kBool));
  const Tensor tokens[] = {in_lines(q), in_lines(k), in_lines(v), in_lines(lr).unsqueeze(2)};
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "hybrid_chunk_finite", [&] {
    struct Lines {  // asking a tensor for each line takes longer than to go through one
      const scalar_t* data;
      int64_t row, token, head, heads, width;
    };
    std::vector<Lines> parts;
    for (const Tensor& each : tokens)
      parts.push_back({each.const_data_ptr<scalar_t>(), each.stride(0), each.stride(1), each.stride(2), each.size(2), each.size(3)});
    bool* const to = found.mutable_data_ptr<bool>();
    moshi_ttt::in_parallel(found.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int all = 1;
        for (const Lines& part : parts)
          for (int64_t h = 0; h < part.heads; ++h) {
            const scalar_t* line = part.data + i / length * part.row + i % length * part.token + h * part.head;
            for (int64_t j = 0; j < part.width; ++j) all &= std::abs(line[j]) < scalar_t(limit);
          }
        to[i] = all != 0;
      }
    });
  });
  return found;
}

}  // namespace

#define GIVEN                                                                                                  \
  "(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? offset, Tensor finite, Tensor applied, Tensor gamma, Tensor beta, "      \
  "Tensor token_scale, Tensor[] weights, Tensor[] biases, Tensor[] inputs, Tensor[] gradients, bool causal, float eps, "

TORCH_LIBRARY(moshi_ttt_hybrid_chunk, library) {
  library.def("numbers(int[] widths, int chunk, bool wide) -> int", &numbers);
  library.def("parts(int count) -> int", &parts);
  library.def("finite(Tensor q, Tensor k, Tensor v, Tensor lr, float limit) -> Tensor");
  library.def("forward" GIVEN "int stride) -> Tensor[]");
  library.def("backward" GIVEN "Tensor states, int stride, Tensor[] upstream) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moshi_ttt_hybrid_chunk, CPU, library) {
  library.impl("finite", &finite_tokens);
  library.impl("forward", &forward);
  library.impl("backward", &backward);
}
