// One streamed token of in-place TTT on a CPU: what streaming.py computes by tensor operations, in one call. The state
// is described in memory.py, the order of work in schedule.py. Each row has its own place in its chunk, so what has
// nothing to do at that place (channels that are folded already, keys of a chunk that is folded whole) is not read.
//
// Shape legend: B streams, C tokens a chunk, d width, h hidden width, K taps, R of them looking ahead, S tokens staged,
// w channels folded a step.

#include <ATen/Dispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "corrections.h"
#include "success_gate.h"
#include "vectors.h"

namespace {

using at::Tensor;
using moshi_ttt::below;
using moshi_ttt::Gate;

struct Plan {  // FoldSchedule and the filter's place in it
  int64_t chunk, staged, moves, slice, look_ahead, first_tap, taps;
};

struct State {
  Tensor position, delta, keys, values, open, scale, spoiled, skipped, enabled;
  std::optional<Tensor> norm, factor, answer, scores;
};

template <typename T>
T* row_of(const Tensor& tensor, int64_t row) {
  return tensor.data_ptr<T>() + row * tensor.stride(0);
}

template <typename T>
class Row {
 public:
  Row(const Plan& plan, const State& state, int64_t row)
      : plan_(plan), state_(state), row_(row), hidden_(state.keys.size(2)), width_(state.values.size(2)),
        keys_(state.keys[row]), values_(state.values[row]), position_(row_of<int64_t>(state.position, row)[0]),
        folded_(std::min(hidden_, position_ * plan.slice)), end_(std::min(hidden_, folded_ + plan.slice)),
        made_an_update_(row_of<T>(state.scale, row)[0] != 0) {
    TORCH_CHECK(0 <= position_ && position_ < plan.chunk, "The state's 'position' is ", position_, " in row ", row,
                ", and a chunk has ", plan.chunk, " tokens. Take the state from the block's allocate_state.");
  }

  bool is_finite(const T* key, const T* target, T rate, T limit) const {
    return below(key, hidden_, limit) && below(target, width_, limit) && std::abs(rate) < limit;
  }

  bool has_unfolded() const { return folded_ < hidden_; }

  // The query that the dense update is asked: what is not folded yet has not decayed in it either.
  void ask(const T* query, T* kept, T decay) const {
    if (!made_an_update_) decay = 0;
    std::copy(query, query + folded_, kept);
    std::transform(query + folded_, query + hidden_, kept + folded_, [decay](T x) { return (1 - decay) * x; });
  }

  // left [1 + w, C]: the last finished chunk's scores for the query, and its keys in the channels to fold, all scaled.
  void ask_finished(const Tensor& query, const Tensor& left) const {
    const T scale = row_of<T>(state_.scale, row_)[0];
    const int64_t unfolded = hidden_ - folded_, size = plan_.chunk;
    Tensor scores = left[0];
    at::mv_out(scores, keys_.narrow(0, 0, size).narrow(1, folded_, unfolded), query.narrow(0, folded_, unfolded));
    const T* keys = keys_.template data_ptr<T>();
    T* score = left.data_ptr<T>();
    T* part = score + size;
    for (int64_t token = 0; token < size; ++token) score[token] *= scale;
    for (int64_t token = 0; token < size; ++token)
      for (int64_t channel = folded_; channel < end_; ++channel)
        part[(channel - folded_) * size + token] = scale * keys[token * hidden_ + channel];
  }

  void fold(const T* slices, T decay) const {
    if (!made_an_update_) decay = 0;
    T* delta = row_of<T>(state_.delta, row_) + folded_ * width_;
    for (int64_t i = 0; i < (end_ - folded_) * width_; ++i) delta[i] = (1 - decay) * delta[i] + slices[i];
  }

  // What the unfinished chunk's tokens add to the filter's output at K tokens from R before this one on, with rates.
  // Less the answer to this one, where there is one to correct.
  void hear(bool finite, const T* target, T rate, const T* conv, int64_t kernel, const T* answer, T* sums) const {
    const int64_t wide = width_ + 1, earlier = (plan_.taps - 1) * wide;
    const T* open = row_of<T>(state_.open, row_);
    std::copy(open, open + earlier, sums);
    std::fill(sums + earlier, sums + earlier + wide, T(0));
    if (finite)
      for (int64_t channel = 0; channel < width_; ++channel)
        for (int64_t i = 0; i < plan_.taps; ++i)
          sums[i * wide + channel] +=
              conv[channel * kernel + plan_.first_tap + plan_.taps - 1 - i] * target[channel];
    sums[plan_.look_ahead * wide + width_] = finite ? rate : T(0);
    const int64_t before_the_chunk = std::max<int64_t>(0, plan_.look_ahead - position_);
    std::fill(sums, sums + before_the_chunk * wide, T(0));
    if (answer)
      for (int64_t channel = 0; channel < width_; ++channel) sums[plan_.look_ahead * wide + channel] -= answer[channel];
  }

  // Moves the staged tokens whose turn it is, and writes the step's key (null for none) and the values it changes.
  // With l of a ridge step, what is written are rows of Q and Y, and the rates are roots.
  void write(const T* key, const T* sums, std::optional<double> ridge) const {
    T* keys = keys_.template data_ptr<T>();
    T* values = values_.template data_ptr<T>();
    if (position_ >= plan_.staged) {
      const int64_t late = position_ - plan_.staged;
      for (int64_t token = late * plan_.moves; token < std::min(plan_.staged, (late + 1) * plan_.moves); ++token) {
        const int64_t from = plan_.chunk + token;
        std::copy(keys + from * hidden_, keys + (from + 1) * hidden_, keys + token * hidden_);
        std::copy(values + from * width_, values + (from + 1) * width_, values + token * width_);
      }
    }
    T* place = keys + slot(position_) * hidden_;
    if (key) std::copy(key, key + hidden_, place);
    else std::fill(place, place + hidden_, T(0));
    const int64_t first = std::max<int64_t>(0, position_ - plan_.look_ahead);
    if (ridge) return write_solved(first, place, sums, *ridge);
    for (int64_t token = first; token <= position_; ++token)
      scale_values(sums, token, values + slot(token) * width_);
  }

  // The gate [0, 1] for the answer [d] to the token, and its score; target null for zeros.
  std::pair<T, double> judge(const Gate<T>& gate, const T* target) const {
    const double score = moshi_ttt::similarity(row_of<T>(*state_.answer, row_), target, width_);
    return {gate.value(score, row_of<T>(*state_.scores, row_)), score};
  }

  void remember_answer(const T* answer, double score, int64_t taps) const {
    std::copy(answer, answer + width_, row_of<T>(*state_.answer, row_));
    Gate<T>::remember(score, taps, row_of<T>(*state_.scores, row_));
  }

  // The unfinished update's squared norm over the settled tokens, and if the chunk ended now: see ops.squared_norm.
  std::pair<double, double> square(const Tensor& projection) const {
    const int64_t size = plan_.chunk, first = std::max<int64_t>(0, position_ - plan_.look_ahead);
    const T* keys = keys_.template data_ptr<T>();
    const T* values = values_.template data_ptr<T>();
    std::vector<double> projected(width_), changed(width_);
    double settled = 0, total = 0;
    const T* part = row_of<T>(*state_.norm, row_);
    for (int64_t i = 0; i < state_.norm->size(1); ++i) settled += part[i];
    settled *= settled;
    for (int64_t token = first; token <= position_; ++token) {
      const T* key = keys + slot(token) * hidden_;
      project(values + slot(token) * width_, projection, projected, changed);
      double added = 0;
      for (int64_t other = 0; other <= token; ++other) {
        const double product = dot(key, keys + slot(other) * hidden_, hidden_) *
                               dot(changed.data(), values + slot(other) * width_, width_);
        added += (other < token ? 2 : 1) * product;  // a pair counts with its later token
      }
      (token == position_ - plan_.look_ahead ? settled : total) += added;
    }
    return {settled, settled + total};
  }

  void advance(bool finite, bool updated, const T* sums, std::optional<std::pair<double, double>> square,
               double clip) const {
    const bool ends = position_ + 1 == plan_.chunk;
    const int64_t wide = width_ + 1, earlier = (plan_.taps - 1) * wide;
    T* open = row_of<T>(state_.open, row_);
    if (ends && state_.factor) std::fill_n(row_of<T>(*state_.factor, row_), plan_.chunk * plan_.chunk, T(0));
    if (ends) std::fill(open, open + earlier, T(0));
    else std::copy(sums + wide, sums + wide + earlier, open);
    int64_t& spoiled = *row_of<int64_t>(state_.spoiled, row_);
    spoiled += !finite;
    int64_t& enabled = *row_of<int64_t>(state_.enabled, row_);
    enabled += updated;
    if (square) {
      double rest = ends ? 0 : std::sqrt(std::max(0.0, square->first));
      T* part = row_of<T>(*state_.norm, row_);
      for (int64_t i = 0; i < state_.norm->size(1); ++i) {
        part[i] = T(rest);
        rest -= part[i];
      }
    }
    if (ends) {
      T scale = spoiled == 0 && enabled > 0 ? 1 : 0;
      if (square) scale *= clip_scale(square->second, clip);
      *row_of<T>(state_.scale, row_) = scale;
      *row_of<int64_t>(state_.skipped, row_) += scale == 0 && enabled > 0;
      spoiled = enabled = 0;
    }
    *row_of<int64_t>(state_.position, row_) = ends ? 0 : position_ + 1;
  }

 private:
  void scale_values(const T* sums, int64_t token, T* scaled) const {
    const T* sum = sums + (token - position_ + plan_.look_ahead) * (width_ + 1);
    std::transform(sum, sum + width_, scaled, [sum, this](T x) { return x * sum[width_]; });
  }

  // place [h]: the step's key, which becomes its row of Q; the rows of Y from the token `first` on.
  void write_solved(int64_t first, T* place, const T* sums, double ridge) const {
    const moshi_ttt::RidgeRows<T> rows(plan_.chunk, plan_.staged, keys_, values_, (*state_.factor)[row_]);
    const T root = sums[plan_.look_ahead * (width_ + 1) + width_];
    std::transform(place, place + hidden_, place, [root](T x) { return x * root; });
    rows.make_key(position_, keys_[slot(position_)], ridge);
    const Tensor errors = at::empty({position_ + 1 - first, width_}, keys_.options());  // [n, d]
    T* numbers = errors.data_ptr<T>();
    for (int64_t token = first; token <= position_; ++token)
      scale_values(sums, token, numbers + (token - first) * width_);
    rows.make_values(first, errors);
    T* values = values_.template data_ptr<T>();
    for (int64_t token = first; token <= position_; ++token)
      std::copy_n(numbers + (token - first) * width_, width_, values + slot(token) * width_);
  }

  // Where a token lies while its value can change, and until it moves.
  int64_t slot(int64_t token) const { return token >= plan_.staged ? token : plan_.chunk + token; }

  static T clip_scale(double square, double clip) {
    if (!std::isfinite(square)) return 0;
    return square > 0 ? T(std::min(1.0, clip / std::sqrt(square))) : T(1);
  }

  template <typename A>
  static double dot(const A* a, const T* b, int64_t count) {
    double sums[8] = {};  // apart, so that the compiler can add them side by side
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += double(a[i + lane]) * double(b[i + lane]);
    for (; i < count; ++i) sums[0] += double(a[i]) * double(b[i]);
    double sum = 0;
    for (double each : sums) sum += each;
    return sum;
  }

  // changed [d] = v P P^T for values v [d] and the projection P [d, d], by way of projected [d].
  void project(const T* value, const Tensor& projection, std::vector<double>& projected,
               std::vector<double>& changed) const {
    const T* rows = projection.data_ptr<T>();
    std::fill(projected.begin(), projected.end(), 0.0);
    for (int64_t i = 0; i < width_; ++i)
      for (int64_t j = 0; j < width_; ++j) projected[j] += double(value[i]) * double(rows[i * width_ + j]);
    for (int64_t i = 0; i < width_; ++i) changed[i] = dot(projected.data(), rows + i * width_, width_);
  }

  const Plan& plan_;
  const State& state_;
  const int64_t row_, hidden_, width_;
  const Tensor keys_, values_;
  const int64_t position_, folded_, end_;
  const bool made_an_update_;  // the last finished chunk: without one nothing decays
};

struct Token {
  Tensor key, target, rate;  // [B, 1, h], [B, 1, d], [B, 1, 1]
  const bool* active;        // [B], or null for all
  const bool* updated;  // [batch], or null for all: nothing is learned from a row that is not
};

struct Options {
  double decay, limit;
  std::optional<double> clip, ridge;
  bool corrects;
};

template <typename T>
Tensor run(const Plan& plan, const State& state, const Token& token, const Tensor& conv, const Tensor& projection,
           const Options& options, const std::vector<Tensor>& success) {
  const int64_t batch = token.key.size(0), hidden = token.key.size(2), width = token.target.size(2);
  const T decay = options.decay;
  std::vector<Row<T>> rows;
  for (int64_t b = 0; b < batch; ++b) rows.emplace_back(plan, state, b);
  const bool any_unfolded =
      std::any_of(rows.begin(), rows.end(), [](const Row<T>& row) { return row.has_unfolded(); });

  // A token that is not finite is given nothing: its key is replaced by zeros.
  std::vector<bool> finite(batch);
  for (int64_t b = 0; b < batch; ++b)
    finite[b] = rows[b].is_finite(row_of<T>(token.key, b), row_of<T>(token.target, b), row_of<T>(token.rate, b)[0],
                                  T(options.limit));
  Tensor keys = token.key;  // [B, 1, h]
  if (std::find(finite.begin(), finite.end(), false) != finite.end()) {
    keys = keys.clone();
    for (int64_t b = 0; b < batch; ++b)
      if (!finite[b]) std::fill_n(row_of<T>(keys, b), hidden, T(0));
  }
  Tensor kept = decay == 0 ? keys : at::empty_like(keys);
  Tensor left = any_unfolded ? at::zeros({batch, 1 + plan.slice, plan.chunk}, keys.options()) : Tensor();
  for (int64_t b = 0; b < batch; ++b) {
    if (decay != 0) rows[b].ask(row_of<T>(keys, b), row_of<T>(kept, b), decay);
    if (rows[b].has_unfolded()) rows[b].ask_finished(keys[b][0], left[b]);
  }
  Tensor given = at::bmm(kept, state.delta.narrow(1, 0, hidden));
  Tensor slices;  // [B, 1 + w, d]: what the last finished chunk gives, and what is to be folded
  if (any_unfolded) {
    slices = at::bmm(left, state.values.narrow(1, 0, plan.chunk));
    for (int64_t b = 0; b < batch; ++b) {
      const T* factored = row_of<T>(slices, b);
      T* sum = row_of<T>(given, b);
      for (int64_t channel = 0; channel < width; ++channel) sum[channel] += factored[channel];
    }
  }

  std::optional<Gate<T>> gate;
  if (!success.empty())
    gate = Gate<T>{success[0].data_ptr<T>(), success[1].data_ptr<T>(), success[2].data_ptr<T>(), success[2].numel()};
  Tensor buffer = at::empty({plan.taps, width + 1}, keys.options());
  T* sums = buffer.data_ptr<T>();
  for (int64_t b = 0; b < batch; ++b) {
    const Row<T>& row = rows[b];
    const T* key = row_of<T>(keys, b);
    const T* target = row_of<T>(token.target, b);
    T* answer = row_of<T>(given, b);
    std::pair<T, double> judged{1, 0};
    if (gate) judged = row.judge(*gate, finite[b] ? target : nullptr);
    if (!token.active || token.active[b]) {
      if (row.has_unfolded()) row.fold(row_of<T>(slices, b) + width, decay);
      row.hear(finite[b], target, row_of<T>(token.rate, b)[0], conv.data_ptr<T>(), conv.size(2),
               options.corrects ? answer : nullptr, sums);
      const bool updated = !token.updated || token.updated[b];
      row.write(finite[b] && updated ? key : nullptr, sums, options.ridge);
      std::optional<std::pair<double, double>> square;
      if (options.clip) square = row.square(projection);
      const bool sane = finite[b] && (!options.corrects || below(answer, width, T(options.limit)));
      row.advance(sane, updated, sums, square, options.clip.value_or(0));
      if (gate) row.remember_answer(answer, judged.second, gate->taps);
    }
    if (gate) std::transform(answer, answer + width, answer, [&judged](T x) { return x * judged.first; });
  }
  return at::mm(given.view({batch, width}), projection).unsqueeze(1);
}

void check(const char* name, const Tensor& part, at::IntArrayRef sizes) {
  TORCH_CHECK(part.sizes() == sizes && part.is_contiguous(), "The state's '", name, "' has shape ", part.sizes(),
              part.is_contiguous() ? "" : ", not contiguous", ", and this block's has ", sizes,
              ". Take the state from the block's allocate_state.");
}

void check_optional(const char* name, const std::optional<Tensor>& part, bool wanted, const char* where,
                    at::IntArrayRef sizes) {
  TORCH_CHECK(part.has_value() == wanted, "The state has '", name, "' where ", where, ", and only there. ",
              "Take the state from the block's allocate_state.");
  if (part) check(name, *part, sizes);
}

// What recurrent.Stepper.step computes; the parts of the state are changed in place. `success` has the success gate's
// bias [1], slope [1] and weights [1, taps], or nothing.
Tensor step(const Tensor& key, const Tensor& target, const Tensor& rate, Tensor position, Tensor delta, Tensor keys,
            Tensor values, Tensor open, Tensor scale, Tensor spoiled, Tensor skipped, Tensor enabled,
            std::optional<Tensor> norm,
            std::optional<Tensor> factor, std::optional<Tensor> answer, std::optional<Tensor> scores,
            const Tensor& conv, const Tensor& projection, const std::optional<Tensor>& active,
            const std::optional<Tensor>& updated, const std::optional<Tensor>& ridge,
            const std::vector<Tensor>& success, at::IntArrayRef plan, double decay, double limit,
            std::optional<double> clip, bool corrects) {
  const Plan places{plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6]};
  const int64_t batch = key.size(0), hidden = key.size(2), width = target.size(2);
  const int64_t slots = places.chunk + places.staged + 1;
  check("delta", delta, {batch, hidden + 1, width});
  check("keys", keys, {batch, slots, hidden});
  check("values", values, {batch, slots, width});
  check("open", open, {batch, places.taps - 1, width + 1});
  check("position", position, {batch});
  check("scale", scale, {batch});
  check("spoiled", spoiled, {batch});
  check("skipped", skipped, {batch});
  check("enabled", enabled, {batch});
  const bool gated = !success.empty();
  const int64_t taps = gated ? success[2].numel() : 1;
  check_optional("norm", norm, clip.has_value(), "updates are clipped",
                 {batch, key.scalar_type() == at::kDouble ? 1 : 2});
  check_optional("factor", factor, ridge.has_value(), "update is ridge", {batch, places.chunk, places.chunk});
  check_optional("answer", answer, gated, "there is a success gate", {batch, 1, width});
  check_optional("scores", scores, gated, "there is a success gate", {batch, 1, taps - 1});
  const Tensor mask = active ? active->contiguous() : Tensor(), taught = updated ? updated->contiguous() : Tensor();
  const Token token{key.contiguous(), target.contiguous(), rate.contiguous(),
                    active ? mask.data_ptr<bool>() : nullptr, updated ? taught.data_ptr<bool>() : nullptr};
  const State state{position, delta, keys, values, open, scale, spoiled, skipped, enabled, norm, factor, answer, scores};
  std::optional<double> l;
  if (ridge) l = *ridge->data_ptr<double>();
  std::vector<Tensor> gate;
  for (const Tensor& part : success) gate.push_back(part.contiguous());
  Tensor given;
  AT_DISPATCH_FLOATING_TYPES(key.scalar_type(), "in_place_step", [&] {
    given = run<scalar_t>(places, state, token, conv.contiguous(), projection.contiguous(),
                          {decay, limit, clip, l, corrects}, gate);
  });
  return given;
}

}  // namespace

TORCH_LIBRARY(moshi_ttt_gating_mlp, library) {
  library.def(
      "step(Tensor key, Tensor target, Tensor rate, Tensor(a!) position, Tensor(b!) delta, Tensor(c!) keys, "
      "Tensor(d!) values, Tensor(e!) open, Tensor(f!) scale, Tensor(g!) spoiled, Tensor(h!) skipped, "
      "Tensor(i!) enabled, Tensor(j!)? norm, Tensor(k!)? factor, Tensor(l!)? answer, Tensor(m!)? scores, Tensor conv, "
      "Tensor projection, Tensor? active, Tensor? updated, Tensor? ridge, Tensor[] success, int[] plan, float decay, "
      "float limit, float? clip, bool corrects) -> Tensor");
}

TORCH_LIBRARY_IMPL(moshi_ttt_gating_mlp, CPU, library) { library.impl("step", &step); }
