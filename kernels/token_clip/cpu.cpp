// token_clip on the CPU; formulas are in __init__.py, columns in reference.py.
// A sequence is worked off in blocks of tokens that are first widened to double, with zeros where
// the mask or the end of the sequence leaves a token out; the arithmetic then has no branches and
// runs on vectors. Sums have kLanes partial sums and one thread a sequence, so neither the number
// of threads nor neighbouring sequences change a bit.
// Shapes and dtypes are checked by the public Python function.
//
// Without this, GCC keeps a branch for every choice of the loop in add_block, and no vectors: it
// could otherwise raise a floating-point exception flag that the source does not. It stands before
// the headers, because a function is not inlined into one with other options.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <tuple>

#include "../cpu_packed.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FLOWRL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FLOWRL_CLONES
#endif

namespace {

using at::Tensor;

constexpr int64_t kBlock = 128;  // tokens; the buffers of a block take 7 KiB of the L1 cache
constexpr int64_t kLanes = 8;
constexpr double kMaxExponent = 20;

// In the order of the columns of the sums.
enum Column { kLoss, kTokens, kClipped, kClippedLower, kOldKl, kRefKl, kRatio, kColumns };

struct Options {
  double lower, upper, dual, kl_coef;
};

struct Block {
  double kept[kBlock];  // 1 or 0; the others are 0 where this is
  double log_ratio[kBlock], advantage[kBlock], weight[kBlock];
  double ref_difference[kBlock];  // log pi_ref - log pi
  double grad[kBlock];
};

// exp(x) = scale (1 + rest), with expm1 precision in `rest`; for |x| <= 20 and NaN.
struct Power {
  double scale, rest;

  __attribute__((always_inline)) explicit Power(double x) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const double shifted = x * 1.4426950408889634 + kRound;
    const double n = shifted - kRound;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;  // Taylor: r^14 / 14! < 5e-18 for |r| <= log(2) / 2
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    rest = p * (r * r) + r;
    const uint64_t integer = std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(kRound);
    scale = std::bit_cast<double>((integer + 1023u) << 52);
  }
  __attribute__((always_inline)) double exp() const { return scale * rest + scale; }
  __attribute__((always_inline)) double expm1() const { return scale * rest + (scale - 1); }
};

// Comparisons written so that a NaN passes through and shows in the loss.
__attribute__((always_inline)) inline double bound(double x, double low, double high) {
  const double floored = x < low ? low : x;
  return floored > high ? high : floored;
}

// Fills block.grad and adds the block to sums [kColumns][kLanes].
FLOWRL_CLONES void add_block(Block& __restrict block, const Options& options,
                             double (&__restrict sums)[kColumns][kLanes]) {
  const double lower = options.lower, upper = options.upper, dual = options.dual;
  const double kl_coef = options.kl_coef;
  for (int64_t first = 0; first < kBlock; first += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t t = first + lane;
      const double kept = block.kept[t], advantage = block.advantage[t];
      const double log_ratio = block.log_ratio[t], difference = block.ref_difference[t];
      const double exponent = bound(log_ratio, -kMaxExponent, kMaxExponent);
      const double ratio = Power(exponent).exp();
      // Flags are numbers and the arms of a choice are values: of bool flags and of arithmetic in
      // an arm GCC makes branches, and no vectors.
      const double up = advantage > 0 ? 1.0 : 0.0, down = advantage < 0 ? 1.0 : 0.0;
      const double above = ratio > upper ? 1.0 : 0.0, below = ratio < lower ? 1.0 : 0.0;
      const double clipped = up * above + down * below;
      const double clipped_lower = down * (ratio > dual ? 1.0 : 0.0);
      const double far = std::abs(log_ratio) > kMaxExponent ? 1.0 : 0.0;
      const double full_slope = -advantage * ratio;
      const double slope = clipped + clipped_lower + far > 0 ? 0.0 : full_slope;
      const double low = advantage > 0 ? 0.0 : lower, high = advantage > 0 ? upper : dual;
      const double loss = -advantage * bound(ratio, low, high);

      const double ref_exponent = bound(difference, -kMaxExponent, kMaxExponent);
      const double growth = Power(ref_exponent).expm1();
      const double ref_kl = growth - ref_exponent;
      const double ref_slope = std::abs(difference) > kMaxExponent ? 0.0 : growth;
      const double both_slopes = slope - kl_coef * ref_slope, both_losses = loss + kl_coef * ref_kl;
      // A coefficient of 0 has no effect, even where ref_kl is NaN.
      block.grad[t] = block.weight[t] * (kl_coef == 0 ? slope : both_slopes);
      sums[kLoss][lane] += block.weight[t] * (kl_coef == 0 ? loss : both_losses);
      sums[kTokens][lane] += kept;
      sums[kClipped][lane] += clipped;
      sums[kClippedLower][lane] += clipped_lower;
      sums[kOldKl][lane] -= log_ratio;
      sums[kRefKl][lane] += ref_kl;
      sums[kRatio][lane] += kept * ratio;
    }
  }
}

template <typename scalar_t>
struct Tokens {
  const scalar_t *policy, *old, *advantages, *weights, *ref;  // the last two may be null
  const bool* mask;

  void load(int64_t begin, int64_t size, Block& block) const {
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t t = begin + j;
      const bool is_kept = j < size && mask[t];
      block.kept[j] = is_kept ? 1 : 0;
      block.advantage[j] = is_kept ? advantages[t] : 0;
      block.log_ratio[j] = is_kept ? static_cast<double>(policy[t]) - static_cast<double>(old[t]) : 0;
      block.weight[j] = is_kept ? (weights ? weights[t] : 1) : 0;
      block.ref_difference[j] =
          is_kept && ref ? static_cast<double>(ref[t]) - static_cast<double>(policy[t]) : 0;
    }
  }
};

std::tuple<Tensor, Tensor> token_clip(const Tensor& policy, const Tensor& old,
                                      const Tensor& advantages, const Tensor& mask,
                                      const Tensor& cu_seqlens,
                                      const std::optional<Tensor>& weights,
                                      const std::optional<Tensor>& ref, double clip_low,
                                      double clip_high, double clip_ratio_c, double kl_coef) {
  const auto policy_c = policy.contiguous(), old_c = old.contiguous();
  const auto advantages_c = advantages.contiguous(), mask_c = mask.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, policy.size(0));
  const auto weights_c = weights ? weights->contiguous() : Tensor();
  const auto ref_c = ref ? ref->contiguous() : Tensor();
  const int64_t num_sequences = cu_c.size(0) - 1;
  const Options options{1 - clip_low, 1 + clip_high, clip_ratio_c, kl_coef};
  Tensor sums = at::empty({num_sequences, kColumns}, policy.options().dtype(at::kDouble));
  Tensor token_grad = at::empty(policy.sizes(), policy.options());
  AT_DISPATCH_FLOATING_TYPES(policy.scalar_type(), "token_clip", [&] {
    const Tokens<scalar_t> tokens{policy_c.const_data_ptr<scalar_t>(),
                                  old_c.const_data_ptr<scalar_t>(),
                                  advantages_c.const_data_ptr<scalar_t>(),
                                  weights ? weights_c.const_data_ptr<scalar_t>() : nullptr,
                                  ref ? ref_c.const_data_ptr<scalar_t>() : nullptr,
                                  mask_c.const_data_ptr<bool>()};
    const auto* cu = cu_c.const_data_ptr<int64_t>();
    auto* grad = token_grad.mutable_data_ptr<scalar_t>();
    auto* out = sums.mutable_data_ptr<double>();
    at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
      Block block;
      for (int64_t b = begin; b < end; ++b) {
        double partial[kColumns][kLanes] = {};
        for (int64_t first = cu[b]; first < cu[b + 1]; first += kBlock) {
          const int64_t size = std::min(kBlock, cu[b + 1] - first);
          tokens.load(first, size, block);
          add_block(block, options, partial);
          std::transform(block.grad, block.grad + size, grad + first,
                         [](double value) { return static_cast<scalar_t>(value); });
        }
        for (int64_t column = 0; column < kColumns; ++column) {
          double total = 0;
          for (double value : partial[column]) total += value;
          out[b * kColumns + column] = total;
        }
      }
    });
  });
  return {sums, token_grad};
}

Tensor token_clip_backward(const Tensor& coefficient, const Tensor& token_grad,
                           const Tensor& cu_seqlens) {
  const auto coefficient_c = coefficient.contiguous(), unit_c = token_grad.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, token_grad.size(0));
  Tensor grad = at::empty(token_grad.sizes(), token_grad.options());
  AT_DISPATCH_FLOATING_TYPES(token_grad.scalar_type(), "token_clip_backward", [&] {
    const auto* factor = coefficient_c.const_data_ptr<double>();
    const auto* unit = unit_c.const_data_ptr<scalar_t>();
    const auto* cu = cu_c.const_data_ptr<int64_t>();
    auto* out = grad.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, cu_c.size(0) - 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double scale = factor[b];
        for (int64_t t = cu[b]; t < cu[b + 1]; ++t) {
          out[t] = static_cast<scalar_t>(scale * static_cast<double>(unit[t]));
        }
      }
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(flowrl, CPU, m) {
  m.impl("token_clip", token_clip);
  m.impl("token_clip_backward", token_clip_backward);
}
