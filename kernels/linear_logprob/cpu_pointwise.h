// Element-wise loops of the CPU head, each compiled for AVX-512, AVX2 and the baseline, and chosen
// at run time. Blocks of logits are transposed, [vocabulary][row]: rows are the SIMD lanes, so a
// sum over the vocabulary runs in one order for every row, whatever the width of the vectors and
// whichever rows share the block.
#pragma once

#include <bit>
#include <cstdint>

namespace flowrl::linear_logprob {

constexpr int64_t kTile = 128;  // vocabulary entries; the TILE of reference.py
constexpr int64_t kLanes = 64;  // rows of a block, and columns of a panel of a matrix product

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define FLOWRL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define FLOWRL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif

enum class Simd { kBaseline, kAvx2, kAvx512 };

inline Simd simd() {
  static const Simd level = [] {
    const bool has_avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (has_avx512) return Simd::kAvx512;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has_avx2 ? Simd::kAvx2 : Simd::kBaseline;
  }();
  return level;
}

// NAME(PARAMS) from an always-inlined NAME_body: inlining happens before vectorisation, so the
// loops of the body take the instruction set of the function that they land in.
#define FLOWRL_MULTIVERSION(NAME, PARAMS, ARGS)                                         \
  __attribute__((target(FLOWRL_AVX512))) inline void NAME##_avx512 PARAMS {            \
    NAME##_body ARGS;                                                                  \
  }                                                                                    \
  __attribute__((target("avx2,fma"))) inline void NAME##_avx2 PARAMS { NAME##_body ARGS; } \
  inline void NAME PARAMS {                                                            \
    if (simd() == Simd::kAvx512) return NAME##_avx512 ARGS;                            \
    if (simd() == Simd::kAvx2) return NAME##_avx2 ARGS;                                \
    NAME##_body ARGS;                                                                  \
  }
#else
#define FLOWRL_MULTIVERSION(NAME, PARAMS, ARGS) \
  inline void NAME PARAMS { NAME##_body ARGS; }
#endif
#define FLOWRL_INLINE static inline __attribute__((always_inline))

// exp(x) to 2 units in the last place, NaN for NaN, 0 for x < lowest >= -87: the default, 2^-100,
// keeps denormals, which are slow, out of the products that follow, and no float32 sum of
// probabilities can tell the difference.
FLOWRL_INLINE float exp_flushed(float x, float lowest = -69.3f) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > 88.0f ? 88.0f : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = (p * (r * r) + r) + 1.0f;
  const uint32_t integer = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
  const float result = value * std::bit_cast<float>((integer + 127u) << 23);
  return x < lowest ? 0.0f : result;
}

// Rounds to nearest even; the carry of the rounding would turn some NaNs into zeros.
FLOWRL_INLINE uint32_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? 0x7fc0u : rounded;
}

// Per lane of logits [width][kLanes]: maximum, sum of exp(z - maximum) and, with entropy, that of
// exp(z - maximum) (z - maximum), where z = logits * scale. logits becomes exp(z - maximum).
FLOWRL_INLINE void tile_statistics_body(float* __restrict logits, int64_t width, float scale,
                                        bool entropy, float* __restrict maximum,
                                        float* __restrict total, float* __restrict weighted) {
  for (int64_t r = 0; r < kLanes; ++r) maximum[r] = logits[r];
  for (int64_t v = 1; v < width; ++v) {
    for (int64_t r = 0; r < kLanes; ++r) {
      const float logit = logits[v * kLanes + r];
      maximum[r] = maximum[r] > logit ? maximum[r] : logit;
    }
  }
  for (int64_t r = 0; r < kLanes; ++r) {
    maximum[r] *= scale;
    total[r] = weighted[r] = 0.0f;
  }
  for (int64_t v = 0; v < width; ++v) {
    float* row = logits + v * kLanes;
    if (entropy) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const float centred = row[r] * scale - maximum[r];
        const float e = exp_flushed(centred);
        row[r] = e;
        total[r] += e;
        weighted[r] += e * centred;
      }
    } else {
      for (int64_t r = 0; r < kLanes; ++r) {
        const float e = exp_flushed(row[r] * scale - maximum[r]);
        row[r] = e;
        total[r] += e;
      }
    }
  }
}
FLOWRL_MULTIVERSION(tile_statistics,
                    (float* logits, int64_t width, float scale, bool entropy, float* maximum,
                     float* total, float* weighted),
                    (logits, width, scale, entropy, maximum, total, weighted))

// exps [kTile][kLanes] over the total of their lane; zeros in rows >= width.
FLOWRL_INLINE void tile_shares_body(float* __restrict exps, int64_t width,
                                    const float* __restrict total) {
  float inverse[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) inverse[r] = 1.0f / total[r];
  for (int64_t v = 0; v < kTile; ++v) {
    float* row = exps + v * kLanes;
    for (int64_t r = 0; r < kLanes; ++r) row[r] = v < width ? row[r] * inverse[r] : 0.0f;
  }
}
FLOWRL_MULTIVERSION(tile_shares, (float* exps, int64_t width, const float* total),
                    (exps, width, total))

// What the gradient of a block of logits needs of its rows.
struct Lanes {
  float lse[kLanes], mean_logit[kLanes];
  float grad_logprob[kLanes], grad_entropy[kLanes];  // divided by the temperature; 0: skip the row
  int32_t target[kLanes];                            // entry of this tile, -1 if it is not here
  float mass[kLanes], tail[kLanes];  // of kept shares: exp(tile_lse - lse), 1 - p of the target
};

// The gradient of a block of logits, from the logits or from the shares that the forward kept.
enum class From { kLogits, kLogitsWithEntropy, kShares };

FLOWRL_INLINE float grad_logit(float value, float scale, const Lanes& lanes, int64_t v, int64_t r,
                               From from) {
  const bool is_target = lanes.target[r] == static_cast<int32_t>(v);
  if (from == From::kShares) {  // a share is rounded relative to p, which leaves nothing of 1 - p
    return lanes.grad_logprob[r] * (is_target ? lanes.tail[r] : -value * lanes.mass[r]);
  }
  const float z = value * scale;
  const float p = exp_flushed(z - lanes.lse[r]);
  // One-hot minus p before any product: subtracting g p from g would lose the small 1 - p.
  const float grad = lanes.grad_logprob[r] * ((is_target ? 1.0f : 0.0f) - p);
  if (from == From::kLogits) return grad;
  return grad - lanes.grad_entropy[r] * (p * (z - lanes.mean_logit[r]));
}

// Gradient of logits [kTile][lanes] in float32; zeros in rows >= width.
FLOWRL_INLINE void grad_float_body(const float* __restrict values, int64_t width, int64_t num_lanes,
                                   float scale, From from, const Lanes& lanes,
                                   float* __restrict out, int64_t ld_out) {
  for (int64_t v = 0; v < kTile; ++v) {
    float* to = out + v * ld_out;
    const float* row = values + v * num_lanes;
    if (v >= width) {
      for (int64_t r = 0; r < num_lanes; ++r) to[r] = 0.0f;
    } else if (from == From::kLogits) {
      for (int64_t r = 0; r < num_lanes; ++r) {
        to[r] = grad_logit(row[r], scale, lanes, v, r, From::kLogits);
      }
    } else if (from == From::kLogitsWithEntropy) {
      for (int64_t r = 0; r < num_lanes; ++r) {
        to[r] = grad_logit(row[r], scale, lanes, v, r, From::kLogitsWithEntropy);
      }
    } else {
      for (int64_t r = 0; r < num_lanes; ++r) {
        to[r] = grad_logit(row[r], scale, lanes, v, r, From::kShares);
      }
    }
  }
}
FLOWRL_MULTIVERSION(grad_float,
                    (const float* values, int64_t width, int64_t num_lanes, float scale, From from,
                     const Lanes& lanes, float* out, int64_t ld_out),
                    (values, width, num_lanes, scale, from, lanes, out, ld_out))

// out [vocabulary][lanes] in bfloat16, and words [kTile / 2][lanes] with entries v and v + 1 in the
// low and high half of a word.
FLOWRL_INLINE void narrow_body(const float* __restrict grad, int64_t num_lanes,
                               uint16_t* __restrict out, int64_t ld_out,
                               uint32_t* __restrict words) {
  for (int64_t v = 0; v < kTile; v += 2) {
    const float* even = grad + v * num_lanes;
    const float* odd = even + num_lanes;
    uint16_t* to = out + v * ld_out;
    for (int64_t r = 0; r < num_lanes; ++r) {
      const uint32_t low = bfloat16_bits(even[r]), high = bfloat16_bits(odd[r]);
      to[r] = static_cast<uint16_t>(low);
      to[r + ld_out] = static_cast<uint16_t>(high);
      words[v / 2 * num_lanes + r] = low | high << 16;
    }
  }
}
FLOWRL_MULTIVERSION(narrow,
                    (const float* grad, int64_t num_lanes, uint16_t* out, int64_t ld_out,
                     uint32_t* words),
                    (grad, num_lanes, out, ld_out, words))

// words [kTile / 2][kLanes] of two bfloat16 each -> out [kTile][kLanes]
FLOWRL_INLINE void widen_body(const uint32_t* __restrict words, float* __restrict out) {
  for (int64_t v = 0; v < kTile; v += 2) {
    const uint32_t* from = words + v / 2 * kLanes;
    float* to = out + v * kLanes;
    for (int64_t r = 0; r < kLanes; ++r) {
      to[r] = std::bit_cast<float>(from[r] << 16);
      to[r + kLanes] = std::bit_cast<float>(from[r] & 0xffff0000u);
    }
  }
}
FLOWRL_MULTIVERSION(widen, (const uint32_t* words, float* out), (words, out))

// out[c][r] = in[r][c] for 32-bit words; rows is a multiple of 16.
FLOWRL_INLINE void transpose_body(const uint32_t* __restrict in, int64_t rows, int64_t columns,
                                  int64_t ld_in, uint32_t* __restrict out, int64_t ld_out) {
  for (int64_t first = 0; first < rows; first += 16) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < 16; ++r) out[c * ld_out + first + r] = in[(first + r) * ld_in + c];
    }
  }
}
FLOWRL_MULTIVERSION(transpose,
                    (const uint32_t* in, int64_t rows, int64_t columns, int64_t ld_in,
                     uint32_t* out, int64_t ld_out),
                    (in, rows, columns, ld_in, out, ld_out))

// out[k / 2][j] holds in[k][j] and in[k + 1][j]: the layout that bfloat16 dot products read.
FLOWRL_INLINE void interleave_body(const uint16_t* __restrict in, int64_t rows, int64_t ld_in,
                                   uint32_t* __restrict out) {
  for (int64_t k = 0; k < rows; k += 2) {
    const uint16_t* even = in + k * ld_in;
    const uint16_t* odd = even + ld_in;
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint32_t low = even[j], high = odd[j];
      out[k / 2 * kLanes + j] = low | high << 16;
    }
  }
}
FLOWRL_MULTIVERSION(interleave,
                    (const uint16_t* in, int64_t rows, int64_t ld_in, uint32_t* out),
                    (in, rows, ld_in, out))

// mass[i] = exp(tile_lse[i] - lse) * slack, but at least `least`, which keeps it an upper bound.
FLOWRL_INLINE void tile_masses_body(const float* __restrict tile_lse, int64_t count, float lse,
                                    float slack, float least, float* __restrict mass) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = exp_flushed(tile_lse[i] - lse, -86.0f) * slack;
    mass[i] = value < least ? least : value;
  }
}
FLOWRL_MULTIVERSION(tile_masses,
                    (const float* tile_lse, int64_t count, float lse, float slack, float least,
                     float* mass),
                    (tile_lse, count, lse, slack, least, mass))

}  // namespace flowrl::linear_logprob
