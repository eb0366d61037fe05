// The flow-balance ops on the CPU; formulas and columns are in __init__.py and reference.py.
// Sums are double and run in token order within one thread, so the number of threads changes no
// bit. Shapes and dtypes are checked by the public Python functions.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "../cpu_packed.h"

namespace {

using at::Tensor;

constexpr int64_t kColumns = 5;  // policy, ref, log ratio, tokens, dropped

struct DropRule {
  bool is_active;
  double low, high;

  DropRule(std::string_view weighting, double clip_low, double clip_high)
      : is_active(weighting == "cispo"), low(std::log1p(-clip_low)), high(std::log1p(clip_high)) {}

  bool drops(double log_ratio, double reward) const {
    return is_active && ((reward > 0 && log_ratio > high) || (reward < 0 && log_ratio < low));
  }
};

Tensor sequence_sums(const Tensor& policy, const Tensor& old, const Tensor& ref, const Tensor& mask,
                     const Tensor& cu_seqlens, const Tensor& rewards, std::string_view weighting,
                     double clip_low, double clip_high) {
  const auto policy_c = policy.contiguous(), old_c = old.contiguous(), ref_c = ref.contiguous();
  const auto mask_c = mask.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, policy.size(0));
  const auto rewards_c = rewards.contiguous();
  const int64_t num_sequences = cu_c.size(0) - 1;
  const DropRule rule(weighting, clip_low, clip_high);
  Tensor sums = at::empty({num_sequences, kColumns}, policy.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(policy.scalar_type(), "sequence_sums", [&] {
    const auto* p = policy_c.const_data_ptr<scalar_t>();
    const auto* o = old_c.const_data_ptr<scalar_t>();
    const auto* r = ref_c.const_data_ptr<scalar_t>();
    const auto* m = mask_c.const_data_ptr<bool>();
    const auto* cu = cu_c.const_data_ptr<int64_t>();
    const auto* reward = rewards_c.const_data_ptr<scalar_t>();
    auto* out = sums.mutable_data_ptr<double>();
    at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double policy_sum = 0, ref_sum = 0, log_ratio_sum = 0;
        int64_t kept = 0, dropped = 0;
        for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
          if (!m[i]) continue;
          const double log_ratio = static_cast<double>(p[i]) - static_cast<double>(o[i]);
          if (rule.drops(log_ratio, reward[b])) {
            ++dropped;
            continue;
          }
          policy_sum += p[i];
          ref_sum += r[i];
          log_ratio_sum += log_ratio;
          ++kept;
        }
        double* row = out + b * kColumns;
        row[0] = policy_sum;
        row[1] = ref_sum;
        row[2] = log_ratio_sum;
        row[3] = static_cast<double>(kept);
        row[4] = static_cast<double>(dropped);
      }
    });
  });
  return sums;
}

Tensor sequence_sums_backward(const Tensor& coefficient, const Tensor& policy, const Tensor& old,
                              const Tensor& mask, const Tensor& cu_seqlens, const Tensor& rewards,
                              std::string_view weighting, double clip_low, double clip_high) {
  const auto coefficient_c = coefficient.contiguous();
  const auto policy_c = policy.contiguous(), old_c = old.contiguous();
  const auto mask_c = mask.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, policy.size(0));
  const auto rewards_c = rewards.contiguous();
  const int64_t num_sequences = cu_c.size(0) - 1;
  const DropRule rule(weighting, clip_low, clip_high);
  Tensor grad = at::empty(policy.sizes(), policy.options());
  AT_DISPATCH_FLOATING_TYPES(policy.scalar_type(), "sequence_sums_backward", [&] {
    const auto* c = coefficient_c.const_data_ptr<double>();
    const auto* p = policy_c.const_data_ptr<scalar_t>();
    const auto* o = old_c.const_data_ptr<scalar_t>();
    const auto* m = mask_c.const_data_ptr<bool>();
    const auto* cu = cu_c.const_data_ptr<int64_t>();
    const auto* reward = rewards_c.const_data_ptr<scalar_t>();
    auto* out = grad.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto value = static_cast<scalar_t>(c[b]);
        for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
          const double log_ratio = static_cast<double>(p[i]) - static_cast<double>(o[i]);
          out[i] = m[i] && !rule.drops(log_ratio, reward[b]) ? value : scalar_t(0);
        }
      }
    });
  });
  return grad;
}

struct Bounds {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();

  Bounds(std::string_view weighting, double clip_low, double clip_high, double weight_cap) {
    if (weighting == "clip" || weighting == "cispo") {
      low = std::log1p(-clip_low);
      high = std::log1p(clip_high);
    } else if (weighting == "cap") {
      high = std::log(weight_cap);
    }
  }

  // Comparisons written so that a NaN passes through and shows in the loss.
  double apply(double x) const { return x < low ? low : x > high ? high : x; }
};

// Whether S, S d^2 or 2 S d is not finite in the result's type, unless d itself is not.
template <typename scalar_t>
bool overflows(double weight, double residual) {
  const auto is_finite = [](double x) { return std::isfinite(static_cast<scalar_t>(x)); };
  if (!is_finite(weight)) return true;
  return is_finite(residual) &&
         !(is_finite(weight * residual * residual) && is_finite(2 * weight * residual));
}

using Residuals = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Residuals residual_from_sums(const Tensor& sums, const Tensor& log_z, const Tensor& rewards,
                             double beta, std::string_view weighting, double clip_low,
                             double clip_high, double weight_cap) {
  const auto sums_c = sums.contiguous(), log_z_c = log_z.contiguous();
  const auto rewards_c = rewards.contiguous();
  const int64_t num_sequences = log_z.size(0);
  const Bounds bounds(weighting, clip_low, clip_high, weight_cap);
  const bool is_one = weighting == "one", is_raw = weighting == "raw";
  const auto make = [&](at::ScalarType type) {
    return at::empty({num_sequences}, log_z.options().dtype(type));
  };
  const auto type = log_z.scalar_type();
  Tensor loss = make(type), residual = make(type), log_weight = make(type), weight = make(type);
  Tensor mean_logprob = make(type), coefficient = make(type);
  Tensor clipped = make(at::kBool), skipped = make(at::kBool);
  AT_DISPATCH_FLOATING_TYPES(type, "residual_from_sums", [&] {
    const auto* sum = sums_c.const_data_ptr<double>();
    const auto* z = log_z_c.const_data_ptr<scalar_t>();
    const auto* reward = rewards_c.const_data_ptr<scalar_t>();
    for (int64_t b = 0; b < num_sequences; ++b, sum += kColumns) {
      const bool is_empty = sum[3] == 0;
      const double count = is_empty ? 1 : sum[3];
      const double mean = sum[0] / count;
      const double d = is_empty ? 0 : z[b] + mean - beta * reward[b] - sum[1] / count;
      const double log_w = sum[2], bounded = bounds.apply(log_w);
      double w = is_one ? 1 : std::exp(bounded);
      const bool is_skipped = is_raw && !is_empty && overflows<scalar_t>(w, d);
      const double live = is_skipped ? 0 : d;
      if (is_empty || is_skipped) w = 0;
      loss.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(w * live * live);
      residual.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(d);
      log_weight.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(log_w);
      weight.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(w);
      mean_logprob.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(mean);
      coefficient.mutable_data_ptr<scalar_t>()[b] = static_cast<scalar_t>(2 * w * live / count);
      clipped.mutable_data_ptr<bool>()[b] =
          !is_empty && !is_one && (log_w < bounds.low || log_w > bounds.high);
      skipped.mutable_data_ptr<bool>()[b] = is_skipped;
    }
  });
  return {loss, residual, log_weight, weight, mean_logprob, coefficient, clipped, skipped};
}

}  // namespace

TORCH_LIBRARY_IMPL(flowrl, CPU, m) {
  m.impl("sequence_sums", sequence_sums);
  m.impl("sequence_sums_backward", sequence_sums_backward);
  m.impl("residual_from_sums", residual_from_sums);
}
