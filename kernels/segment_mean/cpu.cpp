// segment_sum on the CPU, forward and backward; see __init__.py for what it computes.
// Work is split by (sequence, block of columns) and each block runs over its rows in order, so one
// long sequence still uses every thread and the number of threads changes no bit.
// Shapes and dtypes are checked by the public Python functions.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../cpu_packed.h"

namespace {

using at::Tensor;

constexpr int64_t kBlock = 256;  // columns; its double accumulators take 2 KiB of the L1 cache

std::tuple<Tensor, Tensor> segment_sum(const Tensor& hidden, const Tensor& cu_seqlens,
                                       const Tensor& mask) {
  const auto hidden_c = hidden.contiguous(), mask_c = mask.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, hidden.size(0));
  const int64_t num_sequences = cu_c.size(0) - 1, width = hidden.size(1);
  const int64_t num_blocks = (width + kBlock - 1) / kBlock;
  const auto sum_type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor sums = at::empty({num_sequences, width}, hidden.options().dtype(sum_type));
  Tensor counts = at::empty({num_sequences}, hidden.options().dtype(at::kLong));
  const auto* m = mask_c.const_data_ptr<bool>();
  const auto* cu = cu_c.const_data_ptr<int64_t>();
  auto* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < num_sequences; ++b) {
    count[b] = std::count(m + cu[b], m + cu[b + 1], true);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "segment_sum", [&] {
    using sum_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* x = hidden_c.const_data_ptr<scalar_t>();
    auto* out = sums.mutable_data_ptr<sum_t>();
    at::parallel_for(0, num_sequences * num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / num_blocks, first = item % num_blocks * kBlock;
        const int64_t size = std::min(kBlock, width - first);
        double acc[kBlock] = {};
        for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
          if (!m[i]) continue;
          const auto* row = x + i * width + first;
          for (int64_t h = 0; h < size; ++h) acc[h] += static_cast<double>(row[h]);
        }
        std::copy(acc, acc + size, out + b * width + first);
      }
    });
  });
  return {sums, counts};
}

Tensor segment_sum_backward(const Tensor& grad_sum, const Tensor& cu_seqlens, const Tensor& mask,
                            at::ScalarType dtype) {
  const auto grad_c = grad_sum.contiguous(), mask_c = mask.contiguous();
  const auto cu_c = flowrl::checked_cu_seqlens(cu_seqlens, mask.size(0));
  const int64_t num_sequences = cu_c.size(0) - 1, width = grad_sum.size(1);
  Tensor grad = at::empty({mask.size(0), width}, grad_sum.options().dtype(dtype));
  // Narrowed once per sequence, then copied to its rows.
  const auto narrow_c = grad_c.to(dtype);
  const auto* m = mask_c.const_data_ptr<bool>();
  const auto* cu = cu_c.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "segment_sum_backward", [&] {
    const auto* g = narrow_c.const_data_ptr<scalar_t>();
    auto* out = grad.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
          auto* row = out + i * width;
          if (m[i]) {
            std::copy(g + b * width, g + (b + 1) * width, row);
          } else {
            std::fill(row, row + width, scalar_t(0));
          }
        }
      }
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(flowrl, CPU, m) {
  m.impl("segment_sum", segment_sum);
  m.impl("segment_sum_backward", segment_sum_backward);
}
