// One streamed token of the least-squares memory on a CPU: what recurrent.py computes by tensor operations, in one call.
// memory.py says what is computed. Each row and head is worked on by one thread, in passes over its matrices. At heads of
// 128 these stay in the cache from one pass to the next. A token that is not written is read and changes nothing; a row
// that is not active is neither read nor changed.
//
// The library is compiled without contraction of products and sums: P[i, j] and P[j, i] are then changed by the same
// roundings wherever they lie, and P stays symmetric to the last bit.
//
// Shape legend: B streams, H heads, C tokens a chunk, m key width, d value width.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "success_gate.h"
#include "vectors.h"

namespace {

using at::Tensor;

constexpr int64_t kLines = 8;  // of a matrix that are changed and then multiplied, while they are in the nearest cache

// y [width] += x [rows] M' of the matrix M' [rows, width] that change(i, row) makes of each row of M.
template <typename T, typename Change>
void change_and_multiply(T* matrix, int64_t rows, int64_t width, Change change, const T* x, T* y) {
  for (int64_t first = 0; first < rows; first += kLines) {
    const int64_t count = std::min(kLines, rows - first);
    for (int64_t i = first; i < first + count; ++i) change(i, matrix + i * width);
    moshi_ttt::add_product(x + first, matrix + first * width, count, width, y);
  }
}

template <typename T>
struct Rule {
  bool decays;
  T grown, regrown;  // 1 / gamma - 1; (1 - gamma) m, the weight over lambda of the prior that comes back
  const T *regularization, *offset, *slope;  // [H]; the last two null without novelty
};

// One row and head: the state, changed in place, and its token.
template <typename T>
struct Part {
  T *solution, *pending;             // [m, d]
  T *covariance, *covariance_read;  // [m, m]; the last is null without variance
  const T *q, *k, *v;               // [m], [m], [d]
  T strength;
  T *read, *variance;  // [d], [1]: the results; `read` is zeros before
};

template <typename T>
class Head {
 public:
  Head(int64_t key, int64_t value) : key_(key), value_(value), spread_(key), root_(key), known_(value), error_(value) {}

  void step(const Part<T>& part, const Rule<T>& rule, int64_t head, bool written, int64_t coordinate, bool done) {
    const T weight = weight_of(part, rule, head, written);
    if (part.covariance_read)
      for (int64_t i = 0; i < key_; ++i)
        *part.variance += part.q[i] * moshi_ttt::dot(part.covariance_read + i * key_, part.q, key_);
    if (written && (weight > 0 || rule.decays)) {
      std::fill(spread_.begin(), spread_.end(), T(0));
      std::fill(known_.begin(), known_.end(), T(0));
      if (rule.decays) age(part, rule, coordinate);
      else {
        moshi_ttt::add_product(part.k, part.covariance, key_, key_, spread_.data());
        moshi_ttt::add_product(part.k, part.pending, key_, value_, known_.data());
      }
      if (weight > 0) observe(part, weight, rule.regularization[head]);
    }
    if (!done) return;
    std::copy(part.pending, part.pending + key_ * value_, part.solution);
    if (part.covariance_read) std::copy(part.covariance, part.covariance + key_ * key_, part.covariance_read);
  }

 private:
  // The read of q, and the weight of the write; zero where there is none.
  T weight_of(const Part<T>& part, const Rule<T>& rule, int64_t head, bool written) {
    if (!written || !rule.offset) {
      moshi_ttt::add_product(part.q, part.solution, key_, value_, part.read);
      return written ? part.strength : T(0);
    }
    std::fill(known_.begin(), known_.end(), T(0));
    moshi_ttt::add_products(part.q, part.k, part.solution, key_, value_, part.read, known_.data());
    const double similar = moshi_ttt::similarity(known_.data(), part.v, value_);
    return part.strength * T(1 / (1 + std::exp(double(rule.slope[head]) * similar - double(rule.offset[head]))));
  }

  // Decay: what was known over gamma, and the prior back along the coordinate. Then `spread_` is P k, `known_` S^T k.
  void age(const Part<T>& part, const Rule<T>& rule, int64_t coordinate) {
    const T factor = T(1) + rule.grown;
    T* covariance = part.covariance + coordinate * key_;
    const T own = factor * covariance[coordinate];
    const T scale = std::sqrt(rule.regrown / (1 + rule.regrown * std::max(own, T(0))));
    for (int64_t j = 0; j < key_; ++j) root_[j] = factor * covariance[j] * scale;
    for (int64_t j = 0; j < value_; ++j) error_[j] = -part.pending[coordinate * value_ + j] * scale;
    const auto aged = [&](int64_t i, T* row) { scale_and_subtract(factor, root_[i], root_.data(), key_, row); };
    change_and_multiply(part.covariance, key_, key_, aged, part.k, spread_.data());
    const auto less = [&](int64_t i, T* row) { add(root_[i], error_.data(), value_, row); };
    change_and_multiply(part.pending, key_, value_, less, part.k, known_.data());
  }

  // S += c u (v - S^T k)^T and P -= c u u^T with u = P k, where the two products are known.
  void observe(const Part<T>& part, T weight, T regularization) {
    const T along = std::max(moshi_ttt::dot(spread_.data(), part.k, key_), T(0));
    const T scale = std::sqrt(weight / (regularization + weight * along));
    for (int64_t j = 0; j < key_; ++j) root_[j] = spread_[j] * scale;
    for (int64_t j = 0; j < value_; ++j) error_[j] = (part.v[j] - known_[j]) * scale;
    for (int64_t i = 0; i < key_; ++i) {
      add(root_[i], error_.data(), value_, part.pending + i * value_);
      add(-root_[i], root_.data(), key_, part.covariance + i * key_);
    }
  }

  static void scale_and_subtract(T scale, T factor, const T* __restrict x, int64_t count, T* __restrict y) {
    for (int64_t j = 0; j < count; ++j) y[j] = scale * y[j] - factor * x[j];
  }

  static void add(T factor, const T* __restrict x, int64_t count, T* __restrict y) {
    for (int64_t j = 0; j < count; ++j) y[j] += factor * x[j];
  }

  const int64_t key_, value_;
  std::vector<T> spread_, root_, known_, error_;
};

struct Counters {
  int64_t *position, *coordinate;  // [B]; the last is null without decay
};

struct Memory {
  Tensor solution, pending, covariance;
  std::optional<Tensor> covariance_read;
};

struct Token {
  Tensor q, k, v, strength;       // [B, 1, H, m] twice, [B, 1, H, d], [B, 1, H]
  const bool *written, *active;  // [B], the last null for all
};

template <typename T>
std::pair<Tensor, Tensor> run(const Token& token, const Memory& memory, const Counters& counters, const Tensor& prior,
                              const std::vector<Tensor>& novelty, double keep, int64_t chunk) {
  const int64_t batch = token.q.size(0), heads = token.q.size(2), key = token.q.size(3), value = token.v.size(3);
  Tensor read = at::zeros({batch, 1, heads, value}, token.q.options());
  Tensor variance = at::zeros({memory.covariance_read ? batch : 0, 1, heads}, token.q.options());
  const auto numbers = [](const Tensor& part) { return part.const_data_ptr<T>(); };
  const Rule<T> rule{keep != 1, T(1 / keep - 1), T((1 - keep) * double(key)), numbers(prior),
                     novelty.empty() ? nullptr : numbers(novelty[0]), novelty.empty() ? nullptr : numbers(novelty[1])};
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < batch; ++row)
    if (!token.active || token.active[row]) rows.push_back(row);
  T *solution = memory.solution.data_ptr<T>(), *pending = memory.pending.data_ptr<T>();
  T *covariance = memory.covariance.data_ptr<T>(), *out = read.data_ptr<T>(), *spread = variance.data_ptr<T>();
  T* covariance_read = memory.covariance_read ? memory.covariance_read->data_ptr<T>() : nullptr;
  moshi_ttt::in_parallel(int64_t(rows.size()) * heads, [&](int64_t begin, int64_t end) {
    Head<T> head(key, value);
    for (int64_t each = begin; each < end; ++each) {
      const int64_t row = rows[each / heads], h = each % heads, i = row * heads + h;
      const int64_t matrix = i * key * value, square = i * key * key;
      const Part<T> part{solution + matrix, pending + matrix, covariance + square,
                         covariance_read ? covariance_read + square : nullptr, numbers(token.q) + i * key,
                         numbers(token.k) + i * key, numbers(token.v) + i * value, numbers(token.strength)[i],
                         out + i * value, covariance_read ? spread + i : nullptr};
      head.step(part, rule, h, token.written[row], counters.coordinate ? counters.coordinate[row] : 0,
                counters.position[row] + 1 == chunk);
    }
  });
  for (const int64_t row : rows) {
    counters.position[row] = (counters.position[row] + 1) % chunk;
    if (counters.coordinate && token.written[row]) counters.coordinate[row] = (counters.coordinate[row] + 1) % key;
  }
  return {read, variance};
}

constexpr auto kAdvice = ". Take the state from the block's allocate_state.";

void check(const char* name, const Tensor& part, const Tensor& like, at::IntArrayRef sizes) {
  TORCH_CHECK(part.sizes() == sizes && part.is_contiguous() && part.scalar_type() == like.scalar_type(),
              "The state's '", name, "' is ", part.scalar_type(), " ", part.sizes(),
              part.is_contiguous() ? "" : ", not contiguous", ", and this block's is ", like.scalar_type(), " ", sizes,
              kAdvice);
}

void check_counter(const char* name, const Tensor& part, int64_t batch, int64_t limit) {
  TORCH_CHECK(part.sizes() == at::IntArrayRef({batch}) && part.scalar_type() == at::kLong && part.is_contiguous(),
              "The state's '", name, "' is ", part.scalar_type(), " ", part.sizes(), ", and this block's is Long [",
              batch, "]", kAdvice);
  const int64_t* numbers = part.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < batch; ++row)
    TORCH_CHECK(0 <= numbers[row] && numbers[row] < limit, "The state's '", name, "' is ", numbers[row], " in row ", row,
                ", and this block's is below ", limit, kAdvice);
}

void check_optional(const char* name, bool there, bool wanted, const char* where) {
  TORCH_CHECK(there == wanted, "The state has '", name, "' where ", where, ", and only there", kAdvice);
}

// What recurrent.recurrent_ridge computes: the value and the variance [B, 1, H] (empty without); the parts of the state
// are changed in place. `novelty` has offset and slope [H], or nothing.
std::tuple<Tensor, Tensor> step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& strength,
                                const Tensor& written, Tensor position, Tensor solution, Tensor pending,
                                Tensor covariance, std::optional<Tensor> coordinate,
                                std::optional<Tensor> covariance_read, const Tensor& regularization,
                                const std::vector<Tensor>& novelty, const std::optional<Tensor>& active, double keep,
                                bool variance, int64_t chunk) {
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kDouble, "The compiled step of ttt_ridge is for ",
              "float32 and float64, and was given ", q.scalar_type(),
              ". Stream by tensor operations: backend: {step: torch}.");
  const int64_t batch = q.size(0), heads = q.size(2), key = q.size(3), value = v.size(3);
  check("solution", solution, q, {batch, heads, key, value});
  check("pending", pending, q, {batch, heads, key, value});
  check("covariance", covariance, q, {batch, heads, key, key});
  check_optional("coordinate", coordinate.has_value(), keep != 1, "the memory decays");
  check_optional("covariance_read", covariance_read.has_value(), variance, "there is a variance gate");
  if (covariance_read) check("covariance_read", *covariance_read, q, {batch, heads, key, key});
  check_counter("position", position, batch, chunk);
  if (coordinate) check_counter("coordinate", *coordinate, batch, key);
  const Tensor taught = written.contiguous(), mask = active ? active->contiguous() : Tensor();
  const Token token{q.contiguous(), k.contiguous(), v.contiguous(), strength.contiguous(),
                    taught.const_data_ptr<bool>(), active ? mask.const_data_ptr<bool>() : nullptr};
  const Counters counters{position.data_ptr<int64_t>(), coordinate ? coordinate->data_ptr<int64_t>() : nullptr};
  std::vector<Tensor> weights;
  for (const Tensor& part : novelty) weights.push_back(part.contiguous());
  std::pair<Tensor, Tensor> found;
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "ridge_step", [&] {
    found = run<scalar_t>(token, {solution, pending, covariance, covariance_read}, counters,
                          regularization.contiguous(), weights, keep, chunk);
  });
  return {found.first, found.second};
}

}  // namespace

TORCH_LIBRARY(moshi_ttt_ridge, library) {
  library.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor strength, Tensor written, Tensor(a!) position, Tensor(b!) solution, "
      "Tensor(c!) pending, Tensor(d!) covariance, Tensor(e!)? coordinate, Tensor(f!)? covariance_read, "
      "Tensor regularization, Tensor[] novelty, Tensor? active, float keep, bool variance, int chunk) "
      "-> (Tensor value, Tensor variance)");
}

TORCH_LIBRARY_IMPL(moshi_ttt_ridge, CPU, library) { library.impl("step", &step); }
