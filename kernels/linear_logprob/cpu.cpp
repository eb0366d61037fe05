// linear_logprob on the CPU; __init__.py says what it computes and reference.py is the oracle.
// Products run on blocks whose sizes do not depend on T, in bfloat16 with float32 sums where the
// processor has instructions for it and in float32 otherwise; see cpu_blocks.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu_backward.h"

namespace flowrl::linear_logprob {
namespace {

using OptTensor = std::optional<Tensor>;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardSignature = ForwardResult(const Tensor&, const Tensor&, const Tensor&, int64_t, double,
                                       int64_t, bool, const OptTensor&);
using BackwardSignature = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, int64_t, double, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, const OptTensor&, double, const OptTensor&, int64_t,
    const OptTensor&, const OptTensor&, const OptTensor&, bool, std::optional<at::ScalarType>);

// float64 has no kernel here: blocks of float32 would narrow it, and it serves only as an oracle.
template <typename Signature>
auto reference(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The twin of checks.py: the operators are public, and nothing below looks at a size again.
void check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                  double temperature) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) > 0,
                    "hidden must be [T, H] with H > 0, got shape ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight must be [V, ",
                    hidden.size(1), "] for hidden of shape ", hidden.sizes(), ", got shape ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.size(0) > 0, "weight has no rows; a rank without a share of the "
                    "vocabulary must leave this op out");
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef{hidden.size(0)} &&
                        target.scalar_type() == at::kLong,
                    "target must be int64 of shape [", hidden.size(0), "], got ",
                    target.scalar_type(), " ", target.sizes());
  TORCH_CHECK_VALUE(hidden.is_floating_point() && weight.scalar_type() == hidden.scalar_type(),
                    "hidden is ", hidden.scalar_type(), " and weight is ", weight.scalar_type(),
                    "; cast one to the other's dtype");
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature) &&
                        std::isfinite(1 / static_cast<float>(temperature)),
                    "temperature must be positive and finite, and so its inverse in float32, got ",
                    temperature);
}

void check_shape(const char* name, const OptTensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(!tensor || tensor->sizes() == shape, name, " must have shape ", shape,
                    ", got ", tensor->sizes());
}

void check_kept(const OptTensor& kept, const Tensor& hidden, const Tensor& weight) {
  if (!kept) return;
  check_shape("kept_logits", kept,
              {hidden.size(0), (weight.size(0) + kTile - 1) / kTile * kTile});
  TORCH_CHECK_VALUE(kept->is_contiguous() && kept->scalar_type() == hidden.scalar_type() &&
                        hidden.scalar_type() != at::kHalf,
                    "kept_logits must be contiguous and have the dtype of hidden, float32 or "
                    "bfloat16; got ", kept->scalar_type(), " for ", hidden.scalar_type());
}

bool uses_bfloat16(const Tensor& hidden) {
  return hidden.scalar_type() == at::kBFloat16 && has_bfloat16_products();
}

template <typename T>
ForwardResult forward_of(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                         int64_t vocab_start, float temperature, int64_t ignore_index, bool entropy,
                         const KeptShares& kept) {
  const int64_t num_rows = hidden.size(0), vocab_size = weight.size(0);
  const auto target_c = target.contiguous();
  const auto* targets = target_c.const_data_ptr<int64_t>();
  std::vector<int64_t> index;
  for (int64_t t = 0; t < num_rows; ++t) {
    if (targets[t] != ignore_index) index.push_back(t);
  }
  const int64_t width = round_up(hidden.size(1), kLanes);
  WeightSlices<T> slices(weight, width);
  const int64_t num_tiles = slices.num_tiles();
  const auto options = hidden.options().dtype(at::kFloat);
  Tensor lse = at::zeros({num_rows}, options), target_logit = at::zeros({num_rows}, options);
  Tensor mean_logit = at::zeros({num_rows}, options);
  Tensor tile_lse = at::zeros({num_rows, num_tiles}, options);
  if (index.empty()) return {lse, target_logit, mean_logit, tile_lse};
  Tensor tile_mean = at::empty({entropy ? num_rows : 0, num_tiles}, options);
  auto* tile_lses = tile_lse.mutable_data_ptr<float>();
  auto* tile_means = tile_mean.mutable_data_ptr<float>();
  auto *lses = lse.mutable_data_ptr<float>(), *means = mean_logit.mutable_data_ptr<float>();
  auto* chosen = target_logit.mutable_data_ptr<float>();
  const auto num_real = static_cast<int64_t>(index.size());
  const float scale = 1 / temperature;
  const auto transposed = transposed_blocks(Rows<T>(hidden, index));

  Scratch<float> logits(kTile * kLanes, num_workers(num_tiles));
  Scratch<float> spare(kept.is_there() ? kTile * kLanes : 0, num_workers(num_tiles));
  for (int64_t tile = 0, count; tile < num_tiles; tile += count) {
    count = slices.run(tile, num_tiles);
    const T* slice = slices.get(tile, count);
    for_each_task(count, [&](int64_t j, int64_t worker) {
      float* z = logits.get(worker);
      const int64_t start = (tile + j) * kTile, real = std::min(kTile, vocab_size - start);
      for (int64_t first = 0; first < num_real; first += kLanes) {
        multiply(kTile, kLanes, width, slice + j * kTile * width, width,
                 transposed.get() + first * width, kLanes, z, kLanes, false);
        const int64_t num_lanes = std::min(kLanes, num_real - first);
        for (int64_t r = 0; r < num_lanes; ++r) {
          const int64_t t = index[first + r], entry = targets[t] - vocab_start - start;
          if (entry >= 0 && entry < real) chosen[t] = z[entry * kLanes + r] * scale;
        }
        float maximum[kLanes], total[kLanes], weighted[kLanes];
        tile_statistics(z, real, scale, entropy, maximum, total, weighted);
        for (int64_t r = 0; r < num_lanes; ++r) {
          const int64_t t = index[first + r];
          tile_lses[t * num_tiles + tile + j] = maximum[r] + std::log(total[r]);
          if (entropy) tile_means[t * num_tiles + tile + j] = maximum[r] + weighted[r] / total[r];
        }
        if (kept.is_there()) {
          kept.store(tile + j, real, index.data() + first, num_lanes, z, total, spare.get(worker));
        }
      }
    });
  }
  at::parallel_for(0, num_real, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = index[i];
      const float* parts = tile_lses + t * num_tiles;
      const double maximum = *std::max_element(parts, parts + num_tiles);
      double total = 0, weighted = 0;
      for (int64_t j = 0; j < num_tiles; ++j) total += std::exp(parts[j] - maximum);
      const double row_lse = maximum + std::log(total);
      // Relative to lse, so that large logits do not cancel in the entropy.
      for (int64_t j = 0; entropy && j < num_tiles; ++j) {
        weighted += std::exp(parts[j] - row_lse) * (tile_means[t * num_tiles + j] - row_lse);
      }
      lses[t] = static_cast<float>(row_lse);
      if (entropy) means[t] = static_cast<float>(row_lse + weighted);
    }
  });
  return {lse, target_logit, mean_logit, tile_lse};
}

ForwardResult forward(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                      int64_t vocab_start, double temperature, int64_t ignore_index, bool entropy,
                      const OptTensor& kept_logits) {
  if (hidden.scalar_type() == at::kDouble) {
    return reference<ForwardSignature>("flowrl::linear_logprob_forward_reference")
        .call(hidden, weight, target, vocab_start, temperature, ignore_index, entropy, kept_logits);
  }
  check_inputs(hidden, weight, target, temperature);
  check_kept(kept_logits, hidden, weight);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = uses_bfloat16(hidden) ? forward_of<BFloat16> : forward_of<float>;
  return run(hidden, weight, target, vocab_start, static_cast<float>(temperature), ignore_index,
             entropy, KeptShares(kept_logits));
}

struct BackwardInputs {
  Tensor hidden, weight, target, lse, mean_logit, tile_lse, grad_logprob;
  OptTensor grad_entropy, logprob, kept_logits;
  int64_t vocab_start, ignore_index;
  float temperature;
  double drop_mass;
};

const float* optional_floats(const OptTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Rows with a gradient: the others give exact zeros and cost nothing.
std::vector<int64_t> live_rows(const BackwardInputs& in) {
  const auto* grad = in.grad_logprob.const_data_ptr<float>();
  const auto* grad_entropy = optional_floats(in.grad_entropy);
  const auto* target = in.target.const_data_ptr<int64_t>();
  std::vector<int64_t> index;
  for (int64_t t = 0; t < in.hidden.size(0); ++t) {
    const bool has_gradient = grad[t] != 0 || (grad_entropy && grad_entropy[t] != 0);
    if (has_gradient && target[t] != in.ignore_index) index.push_back(t);
  }
  return index;
}

template <typename T>
RowGradients row_gradients(const BackwardInputs& in, const Rows<T>& rows) {
  const auto size = static_cast<size_t>(rows.padded);
  const float scale = 1 / in.temperature;
  RowGradients out{std::vector<float>(size), std::vector<float>(size), std::vector<float>(size),
                   std::vector<float>(size), std::vector<float>(size),
                   std::vector<int64_t>(size, -1), in.grad_entropy.has_value()};
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t t = rows.index[i];
    out.lse[i] = in.lse.const_data_ptr<float>()[t];
    out.mean_logit[i] = in.mean_logit.const_data_ptr<float>()[t];
    out.grad_logprob[i] = in.grad_logprob.const_data_ptr<float>()[t] * scale;
    if (out.has_entropy) out.grad_entropy[i] = optional_floats(in.grad_entropy)[t] * scale;
    if (in.logprob) out.tail[i] = -std::expm1(optional_floats(in.logprob)[t]);
    out.target[i] = in.target.const_data_ptr<int64_t>()[t] - in.vocab_start;
  }
  return out;
}

// Selects the pairs and takes the cheaper of the two paths.
template <typename T>
void backward_with_drop(const BackwardInputs& in, Backward<T>& work, float* dropped_mass) {
  const auto& rows = work.rows;
  const int64_t num_tiles = work.weight.num_tiles();
  std::vector<uint8_t> keep(static_cast<size_t>(rows.padded * num_tiles), 0);
  at::parallel_for(0, rows.count, 16, [&](int64_t first, int64_t last) {
    std::vector<float> mass(static_cast<size_t>(num_tiles));
    std::vector<std::pair<float, int32_t>> order;
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = rows.index[i], target = work.gradients.target[i];
      const bool is_here = target >= 0 && target < work.vocab_size;
      const float* logprob = optional_floats(in.logprob);
      const float dropped = select_tiles(
          in.tile_lse.const_data_ptr<float>() + t * num_tiles, num_tiles,
          work.gradients.lse[i], logprob ? logprob + t : nullptr,
          is_here ? target / kTile : -1, in.drop_mass, mass.data(), order,
          keep.data() + i * num_tiles);
      if (dropped_mass) dropped_mass[t] = dropped;
    }
  });
  typename Backward<T>::Pairs pairs;
  pairs.start.assign(static_cast<size_t>(num_tiles + 1), 0);
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t j = 0; j < num_tiles; ++j) pairs.start[j + 1] += keep[i * num_tiles + j];
  }
  std::partial_sum(pairs.start.begin(), pairs.start.end(), pairs.start.begin());
  int64_t num_padded = 0;
  for (int64_t j = 0; j < num_tiles; ++j) num_padded += pairs.padded(j);
  if (static_cast<double>(num_padded) > kDenseShare * static_cast<double>(keep.size())) {
    return work.exact(keep.data());
  }
  pairs.list.resize(static_cast<size_t>(pairs.start.back()));
  auto next = pairs.start;
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t j = 0; j < num_tiles; ++j) {
      if (keep[i * num_tiles + j]) pairs.list[next[j]++] = static_cast<int32_t>(i);
    }
  }
  work.sparse(pairs);
}

template <typename T>
Tensor backward_of(const BackwardInputs& in, const WeightGrad& weight_grad, float* dropped_mass) {
  Rows<T> rows(in.hidden, live_rows(in));
  Tensor grad_hidden = at::zeros(in.hidden.sizes(), in.hidden.options().dtype(at::kFloat));
  if (rows.count == 0) {
    weight_grad.clear();
    return grad_hidden;
  }
  Tensor padded_grad =
      rows.is_whole ? grad_hidden : at::zeros({rows.padded, rows.width}, at::kFloat);
  WeightSlices<T> slices(in.weight, rows.width);
  Backward<T> work{rows, slices, in.weight.size(0), 1 / in.temperature, row_gradients(in, rows),
                   weight_grad, KeptShares(in.kept_logits), in.tile_lse.const_data_ptr<float>(),
                   padded_grad.mutable_data_ptr<float>()};
  if (in.drop_mass > 0 && !in.grad_entropy && !in.kept_logits) {
    backward_with_drop<T>(in, work, dropped_mass);
  } else {
    work.exact(nullptr);
  }
  if (rows.is_whole) return grad_hidden;
  const float* from = padded_grad.const_data_ptr<float>();
  float* to = grad_hidden.mutable_data_ptr<float>();
  const int64_t width = in.hidden.size(1);
  for (int64_t i = 0; i < rows.count; ++i) {
    std::copy_n(from + i * rows.width, width, to + rows.index[i] * width);
  }
  return grad_hidden;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, int64_t vocab_start,
    double temperature, const Tensor& lse, const Tensor& mean_logit, const Tensor& tile_lse,
    const Tensor& grad_logprob, const OptTensor& grad_entropy, double drop_mass,
    const OptTensor& logprob, int64_t ignore_index, const OptTensor& dropped_mass,
    const OptTensor& weight_grad, const OptTensor& kept_logits, bool needs_grad_weight,
    std::optional<at::ScalarType> grad_weight_dtype) {
  if (hidden.scalar_type() == at::kDouble) {
    return reference<BackwardSignature>("flowrl::linear_logprob_backward_reference")
        .call(hidden, weight, target, vocab_start, temperature, lse, mean_logit, tile_lse,
              grad_logprob, grad_entropy, drop_mass, logprob, ignore_index, dropped_mass,
              weight_grad, kept_logits, needs_grad_weight, grad_weight_dtype);
  }
  check_inputs(hidden, weight, target, temperature);
  const int64_t num_rows = hidden.size(0), num_entries = weight.size(0);
  check_shape("lse", lse, {num_rows});
  check_shape("mean_logit", mean_logit, {num_rows});
  check_shape("tile_lse", tile_lse, {num_rows, (num_entries + kTile - 1) / kTile});
  check_shape("grad_logprob", grad_logprob, {num_rows});
  check_shape("grad_entropy", grad_entropy, {num_rows});
  check_shape("logprob", logprob, {num_rows});
  check_shape("dropped_mass", dropped_mass, {num_rows});
  check_shape("weight_grad", weight_grad, weight.sizes());
  check_kept(kept_logits, hidden, weight);
  TORCH_CHECK_VALUE(!kept_logits || logprob,
                    "kept_logits is given without logprob; pass the log-probs of the forward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto floats = [](const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); };
  const auto optional = [&](const OptTensor& tensor) {
    return tensor ? OptTensor(floats(*tensor)) : std::nullopt;
  };
  const BackwardInputs inputs{hidden, weight, target.contiguous(), floats(lse),
                              floats(mean_logit), floats(tile_lse), floats(grad_logprob),
                              optional(grad_entropy), optional(logprob), kept_logits, vocab_start,
                              ignore_index,
                              static_cast<float>(temperature), drop_mass};
  const bool has_result = needs_grad_weight && !weight_grad;
  const auto options = hidden.options().dtype(at::kFloat);
  Tensor grad_weight = at::empty({has_result ? weight.size(0) : 0, weight.size(1)},
                                 options.dtype(grad_weight_dtype.value_or(at::kFloat)));
  const Tensor unwanted;
  const WeightGrad to(weight_grad ? *weight_grad : has_result ? grad_weight : unwanted,
                      weight_grad.has_value());
  Tensor dropped = at::zeros({dropped_mass ? hidden.size(0) : 0}, options);
  float* dropped_data = dropped_mass ? dropped.mutable_data_ptr<float>() : nullptr;
  const auto run = uses_bfloat16(hidden) ? backward_of<BFloat16> : backward_of<float>;
  Tensor grad_hidden = run(inputs, to, dropped_data);
  if (dropped_mass) dropped_mass->copy_(dropped);
  return {grad_hidden, grad_weight};
}

TORCH_LIBRARY_IMPL(flowrl, CPU, m) {
  m.impl("linear_logprob_forward", forward);
  m.impl("linear_logprob_backward", backward);
}

}  // namespace
}  // namespace flowrl::linear_logprob
