// What the forward and both backwards of the CPU head share: matrix products of blocks, the layouts
// that they read, row compaction, and a task loop.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <type_traits>
#include <vector>

#include "cpu_pointwise.h"

namespace flowrl::linear_logprob {

using at::BFloat16;
using at::Tensor;

template <typename T>
constexpr bool is_narrow = std::is_same_v<T, BFloat16>;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// C [M, N] (+)= A [M, K] B [K, N] in float32 sums. ATen's brgemm is oneDNN's run-time generated
// kernel (AVX2, AVX-512, AVX512-BF16 or AMX) and elsewhere the BLAS. A bfloat16 B is interleaved,
// at most kLanes wide, of leading dimension 32 or 64, which is what oneDNN's kernels for packed
// operands promise to take; K is a multiple of 32.
template <typename T>
inline void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, is_narrow<T>);
}

// Whether brgemm takes bfloat16: ONEDNN_MAX_CPU_ISA can forbid what the processor could do, and
// that is answered with an error only, ATen's or, where AVX-512 is allowed without BF16, oneDNN's.
inline bool takes_bfloat16() {
  const BFloat16 zeros[kTile * kLanes] = {};
  float sums[kTile * kLanes];
  try {
    multiply(kTile, kLanes, kLanes, zeros, kLanes, zeros, kLanes, sums, kLanes, false);
  } catch (const std::exception&) {
    return false;
  }
  at::native::cpublas::brgemm_release();
  return true;
}

// Products of bfloat16 without rounding in between need instructions of the processor and oneDNN;
// without them bfloat16 takes the float32 path, as float16 always does.
inline bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (!at::globalContext().userEnabledMkldnn() || !__builtin_cpu_supports("avx512bf16")) {
    return false;
  }
  static const bool is_taken = takes_bfloat16();
  return is_taken;
#else
  return false;
#endif
}

inline int64_t num_workers(int64_t num_tasks) {
  return std::max<int64_t>(1, std::min<int64_t>(num_tasks, at::get_num_threads()));
}

// Calls run(task, worker) for every task, in any order and on any thread: results may depend on the
// task only. Tasks are handed out one by one, so a thread that loses its core delays nobody else.
template <typename Run>
void for_each_task(int64_t num_tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_workers(num_tasks), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // a guard is of its thread only
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < num_tasks;) run(task, worker);
    }
    at::native::cpublas::brgemm_release();  // AMX state belongs to the thread
  });
}

// Uninitialised memory of one kind, a region per worker.
template <typename T>
struct Scratch {
  Tensor storage;
  int64_t size;
  explicit Scratch(int64_t size_, int64_t workers = 1)
      : storage(at::empty({workers, size_}, c10::CppTypeToScalarType<T>::value)), size(size_) {}
  T* get(int64_t worker = 0) const { return storage.mutable_data_ptr<T>() + worker * size; }
};

// The rows that take part as [padded, width] of type T with zero padding; not a copy if all of them
// do and need no padding.
template <typename T>
struct Rows {
  std::vector<int64_t> index;
  int64_t count, padded, width;
  bool is_whole;  // all rows of `hidden`, without padding
  Tensor values;

  Rows(const Tensor& hidden, std::vector<int64_t> index_)
      : index(std::move(index_)),
        count(static_cast<int64_t>(index.size())),
        padded(round_up(count, kLanes)),
        width(round_up(hidden.size(1), kLanes)) {
    const auto type = c10::CppTypeToScalarType<T>::value;
    is_whole = count == hidden.size(0) && count == padded && width == hidden.size(1);
    if (is_whole) {
      values = hidden.to(type).contiguous();  // no copy when there is nothing to change
      return;
    }
    values = at::zeros({padded, width}, type);
    auto real = values.narrow(0, 0, count).narrow(1, 0, hidden.size(1));
    if (count == hidden.size(0)) {
      real.copy_(hidden);
    } else {
      real.copy_(hidden.index_select(0, at::tensor(index, at::kLong)));
    }
  }
  const T* row(int64_t i) const { return values.const_data_ptr<T>() + i * width; }
  void release() { values = Tensor(); }
};

// in [lanes rows][width] -> out [width][lanes], in words of 32 bits: a transposed matrix for
// float32, the interleaved transposed one for bfloat16.
template <typename T>
inline void transpose_rows(const T* in, int64_t lanes, int64_t width, T* out) {
  const int64_t words = width * static_cast<int64_t>(sizeof(T)) / 4;
  transpose(reinterpret_cast<const uint32_t*>(in), lanes, words, words,
            reinterpret_cast<uint32_t*>(out), lanes);
}

// All row blocks transposed, one after the other.
template <typename T>
Scratch<T> transposed_blocks(const Rows<T>& rows) {
  Scratch<T> out(rows.padded * rows.width);
  for_each_task(rows.padded / kLanes, [&](int64_t block, int64_t) {
    transpose_rows(rows.row(block * kLanes), kLanes, rows.width,
                   out.get() + block * kLanes * rows.width);
  });
  return out;
}

// Runs of whole tiles of the weight, in place where a product can read it there; otherwise (another
// dtype, strides, a width or a last tile with a ragged end) copied to a zero-padded buffer.
template <typename T>
class WeightSlices {
 public:
  WeightSlices(const Tensor& weight, int64_t width)
      : weight_(weight), width_(width), copied_(std::max(2, at::get_num_threads())) {
    is_direct_ = weight.is_contiguous() && weight.size(1) == width &&
                 weight.scalar_type() == c10::CppTypeToScalarType<T>::value;
  }
  int64_t num_tiles() const { return (weight_.size(0) + kTile - 1) / kTile; }
  // Number of tiles from `tile` on, at most `limit`, that one call of get can give.
  int64_t run(int64_t tile, int64_t limit) const {
    const int64_t whole = is_direct_ ? weight_.size(0) / kTile - tile : 0;
    return std::min(limit, whole > 0 ? whole : std::min(num_tiles() - tile, copied_));
  }
  bool is_direct(int64_t tile, int64_t count) const {
    return is_direct_ && (tile + count) * kTile <= weight_.size(0);
  }
  const T* direct(int64_t tile) const {
    return weight_.const_data_ptr<T>() + tile * kTile * width_;
  }
  // One tile to [kTile, width], padded with zeros; thread-safe.
  void copy(int64_t tile, T* to) const {
    const auto options = weight_.options().dtype(c10::CppTypeToScalarType<T>::value);
    const Tensor out = at::from_blob(to, {kTile, width_}, options).zero_();
    const int64_t begin = tile * kTile, real = std::min(kTile, weight_.size(0) - begin);
    out.narrow(0, 0, real).narrow(1, 0, weight_.size(1)).copy_(weight_.narrow(0, begin, real));
  }
  // Tiles [tile, tile + count) in place or copied; valid until the next call.
  const T* get(int64_t tile, int64_t count) {
    if (is_direct(tile, count)) return direct(tile);
    if (!buffer_.defined()) {
      buffer_ = at::empty({copied_ * kTile, width_}, c10::CppTypeToScalarType<T>::value);
    }
    T* to = buffer_.mutable_data_ptr<T>();
    for_each_task(count, [&](int64_t j, int64_t) { copy(tile + j, to + j * kTile * width_); });
    return to;
  }

 private:
  Tensor weight_, buffer_;
  int64_t width_, copied_;  // copied_: tiles that a copy holds, some for each thread
  bool is_direct_;
};

// The gradient of the weight, of any dtype and strides. Products write a tile directly where they
// can; elsewhere they sum it up in a padded float32 block, which then is rounded once.
class WeightGrad {
 public:
  // to: [V, H], undefined if not wanted. is_accumulated: add to what is there; otherwise every tile
  // is overwritten.
  WeightGrad(Tensor to, bool is_accumulated) : to_(std::move(to)), is_accumulated_(is_accumulated) {
    const bool is_direct = is_wanted() && to_.is_contiguous() &&
                           to_.scalar_type() == at::kFloat && to_.size(1) % kLanes == 0;
    if (is_direct) direct_ = to_.mutable_data_ptr<float>();
  }
  bool is_wanted() const { return to_.defined(); }

  // Adds one of the sums that make up a tile: sum(pointer, leading dimension, add) adds it to what
  // the pointer holds or overwrites that. `block` is the tile's from its first sum to its last.
  template <typename Sum>
  void update(int64_t tile, bool is_first, bool is_last, int64_t padded_width, float* block,
              const Sum& sum) const {
    if (direct_ && (tile + 1) * kTile <= to_.size(0)) {
      return sum(direct_ + tile * kTile * padded_width, padded_width, is_accumulated_ || !is_first);
    }
    sum(block, padded_width, !is_first);
    if (!is_last) return;
    const Tensor to = rows_of(tile);
    const Tensor from = at::from_blob(block, {to.size(0), padded_width}, at::kFloat);
    const Tensor real = from.narrow(1, 0, to.size(1));
    is_accumulated_ ? to.add_(real) : to.copy_(real);
  }
  // For a tile without sums.
  void clear(int64_t tile) const {
    if (!is_accumulated_) rows_of(tile).zero_();
  }
  void clear() const {
    if (is_wanted() && !is_accumulated_) to_.zero_();
  }

 private:
  Tensor rows_of(int64_t tile) const {
    return to_.narrow(0, tile * kTile, std::min(kTile, to_.size(0) - tile * kTile));
  }

  Tensor to_;
  bool is_accumulated_;
  float* direct_ = nullptr;
};

// kLanes columns of `rows` rows of a matrix, contiguous, as the right operand of products; for
// bfloat16 interleaved. In place, rows lie a page apart and the TLB misses at each.
template <typename T>
void pack_panel(const T* in, int64_t rows, int64_t ld, T* out) {
  if constexpr (is_narrow<T>) {
    interleave(reinterpret_cast<const uint16_t*>(in), rows, ld, reinterpret_cast<uint32_t*>(out));
  } else {
    for (int64_t k = 0; k < rows; ++k) std::copy_n(in + k * ld, kLanes, out + k * kLanes);
  }
}

// Rows [first, first + rows) of a [k, width] matrix into its panels, [width / kLanes][k][kLanes].
template <typename T>
void pack_panels(const T* plain, int64_t first, int64_t rows, int64_t k, int64_t width, T* packed) {
  for (int64_t p = 0; p < width / kLanes; ++p) {
    pack_panel(plain + first * width + p * kLanes, rows, width,
               packed + p * k * kLanes + first * kLanes);
  }
}

// The softmax of each tile, [tiles, T, kTile] in float32 or bfloat16, which a forward keeps for its
// backward. Tile by tile, since rows as long as the vocabulary would be a page apart. `spare` has
// kTile * kLanes floats.
class KeptShares {
 public:
  explicit KeptShares(const std::optional<Tensor>& buffer) {
    if (!buffer) return;
    data_ = static_cast<char*>(buffer->mutable_data_ptr());
    num_rows_ = buffer->size(0);
    is_narrow_ = buffer->scalar_type() == at::kBFloat16;
  }
  bool is_there() const { return data_ != nullptr; }

  // From exps [kTile][kLanes], whose first `width` rows exist, and their totals; exps is used up.
  void store(int64_t tile, int64_t width, const int64_t* rows, int64_t count, float* exps,
             const float* total, float* spare) const {
    tile_shares(exps, width, total);
    const float* by_row = spare;
    if (is_narrow_) {
      auto* words = reinterpret_cast<uint32_t*>(spare) + kTile / 2 * kLanes;
      narrow(exps, kLanes, reinterpret_cast<uint16_t*>(spare), kLanes, words);
      transpose(words, kTile / 2, kLanes, kLanes, reinterpret_cast<uint32_t*>(exps), kTile / 2);
      by_row = exps;
    } else {
      transpose(reinterpret_cast<const uint32_t*>(exps), kTile, kLanes, kLanes,
                reinterpret_cast<uint32_t*>(spare), kTile);
    }
    const auto* from = reinterpret_cast<const char*>(by_row);
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(place(tile, rows[r]), from + r * tile_bytes(), tile_bytes());
    }
  }

  // To shares [kTile][kLanes], with zeros in lanes >= count.
  void load(int64_t tile, const int64_t* rows, int64_t count, float* shares, float* spare) const {
    auto* by_row = reinterpret_cast<char*>(spare);
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(by_row + r * tile_bytes(), place(tile, rows[r]), tile_bytes());
    }
    std::memset(by_row + count * tile_bytes(), 0, (kLanes - count) * tile_bytes());
    const auto* from = reinterpret_cast<const uint32_t*>(spare);
    if (is_narrow_) {
      auto* words = reinterpret_cast<uint32_t*>(spare) + kTile / 2 * kLanes;
      transpose(from, kLanes, kTile / 2, kTile / 2, words, kLanes);
      widen(words, shares);
    } else {
      transpose(from, kLanes, kTile, kTile, reinterpret_cast<uint32_t*>(shares), kLanes);
    }
  }

 private:
  int64_t tile_bytes() const { return kTile * (is_narrow_ ? 2 : 4); }
  char* place(int64_t tile, int64_t row) const {
    return data_ + (tile * num_rows_ + row) * tile_bytes();
  }

  char* data_ = nullptr;
  int64_t num_rows_ = 0;
  bool is_narrow_ = false;
};

// Per-row inputs of the backward, compacted and padded so that padding gives zero gradients.
struct RowGradients {
  std::vector<float> lse, mean_logit, grad_logprob, grad_entropy, tail;
  std::vector<int64_t> target;  // entry of this shard; anything outside it matches no tile
  bool has_entropy;

  void load(Lanes& lanes, int64_t lane, int64_t row, int64_t tile, bool keep) const {
    lanes.lse[lane] = lse[row];
    lanes.mean_logit[lane] = mean_logit[row];
    lanes.grad_logprob[lane] = keep ? grad_logprob[row] : 0.0f;
    lanes.grad_entropy[lane] = has_entropy ? grad_entropy[row] : 0.0f;
    lanes.tail[lane] = tail[row];
    const int64_t entry = target[row] - tile * kTile;
    lanes.target[lane] = entry >= 0 && entry < kTile ? static_cast<int32_t>(entry) : -1;
  }
};

// Gradient of a block of logits [kTile][lanes]: `by_entry` [kTile][ld_entry] feeds the gradient of
// the weight, `by_row` [lanes][ld_row] that of the hidden states. `values` is overwritten.
template <typename T>
void grad_block(float* values, int64_t width, int64_t lanes, float scale, From from,
                const Lanes& rows, T* by_entry, int64_t ld_entry, T* by_row, int64_t ld_row,
                float* spare) {
  if constexpr (is_narrow<T>) {
    grad_float(values, width, lanes, scale, from, rows, spare, lanes);
    auto* words = reinterpret_cast<uint32_t*>(values);
    narrow(spare, lanes, reinterpret_cast<uint16_t*>(by_entry), ld_entry, words);
    transpose(words, kTile / 2, lanes, lanes, reinterpret_cast<uint32_t*>(by_row), ld_row / 2);
  } else {
    grad_float(values, width, lanes, scale, from, rows, by_entry, ld_entry);
    transpose(reinterpret_cast<const uint32_t*>(by_entry), kTile, lanes, ld_entry,
              reinterpret_cast<uint32_t*>(by_row), ld_row);
  }
}

}  // namespace flowrl::linear_logprob
