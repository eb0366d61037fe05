// What every op over packed sequences checks, once a call: a direct call of an operator stays within
// its tensors too. The public Python functions have checked more by then.
#pragma once

#include <ATen/core/Tensor.h>

namespace flowrl {

// cu_seqlens in contiguous memory, from 0 to the number of tokens without a decrease.
inline at::Tensor checked_cu_seqlens(const at::Tensor& cu_seqlens, int64_t num_tokens) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 &&
                        cu_seqlens.scalar_type() == at::kLong,
                    "cu_seqlens must be int64 of shape [B + 1], got ", cu_seqlens.scalar_type(),
                    " ", cu_seqlens.sizes());
  at::Tensor result = cu_seqlens.contiguous();
  const auto* cu = result.const_data_ptr<int64_t>();
  const int64_t num_sequences = result.size(0) - 1;
  TORCH_CHECK_VALUE(cu[0] == 0 && cu[num_sequences] == num_tokens,
                    "cu_seqlens must run from 0 to the number of tokens ", num_tokens, ", got ",
                    cu[0], " to ", cu[num_sequences]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    TORCH_CHECK_VALUE(cu[b] <= cu[b + 1], "cu_seqlens must not decrease, got ", cu[b], " before ",
                      cu[b + 1]);
  }
  return result;
}

}  // namespace flowrl
