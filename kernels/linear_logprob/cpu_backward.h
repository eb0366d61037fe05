// The backward of the CPU head. Exact: vocabulary slices times chunks of rows, the gradient of the
// logits of one slice and chunk at a time. Sparse: the vocabulary tile is an expert and the kept
// (row, tile) pairs are its tokens, gathered into dense products.
#pragma once

#include <cmath>
#include <numeric>
#include <thread>
#include <tuple>
#include <utility>

#include "cpu_blocks.h"

namespace flowrl::linear_logprob {

constexpr int64_t kRowChunk = 1024;   // rows whose logit gradients exist at a time, exact path
constexpr int64_t kSkew = 32;  // rows a power of two apart would share few lines of the cache
constexpr int64_t kPairChunk = 256;   // rows of one gathered product, sparse path
constexpr int64_t kPairRound = 32;    // their number is padded to this
constexpr int64_t kPairPool = 8192;   // pairs whose logit gradients exist at a time, or one tile's
// Above this share of pairs, padding included, the exact path with a mask takes over. Gathering
// took 0.59 of its time at a share of 0.55 and 0.87 at 0.79, in float32.
constexpr double kDenseShare = 0.7;
constexpr float kMassSlack = 1 + 0x1p-13f;  // as in reference.py
constexpr float kLeastMass = 0x1p-124f;     // tile_masses flushes what is smaller
constexpr float kMinTail = 0x1p-16f;        // as in reference.py

template <typename T>
struct Backward {
  Rows<T>& rows;
  WeightSlices<T>& weight;
  int64_t vocab_size;
  float scale;
  RowGradients gradients;
  WeightGrad weight_grad;
  KeptShares kept;
  const float* tile_lse;  // [T, tiles]
  float* grad_hidden;     // [rows.padded, rows.width], zero at the start

  int64_t tile_width(int64_t tile) const { return std::min(kTile, vocab_size - tile * kTile); }

  // One vocabulary slice and one chunk of rows. Its gradient tasks, one a tile, write the gradients
  // of the logits and of the weight; its product tasks, one a row block, turn the former into the
  // gradient of the hidden states.
  struct Step {
    int64_t tile, count, chunk, size, buffer;
    const T* slice;  // [count * kTile, width], the copy of it if `is_copied`
    T *copied, *packed, *by_row;
    bool is_copied;
    std::atomic<int64_t> gradients_done{0}, products_done{0};
    int64_t num_blocks() const { return size / kLanes; }
    int64_t ld() const { return count * kTile + kSkew; }
  };

  // keep [rows.padded, num_tiles] marks the pairs to compute, nullptr all of them. What the forward
  // kept replaces the product that gives the logits, unless an entropy has a gradient, which needs
  // the logits themselves.
  void exact(const uint8_t* keep) {
    const int64_t width = rows.width, num_tiles = weight.num_tiles();
    const int64_t chunk_rows = std::min(kRowChunk, rows.padded), workers = at::get_num_threads();
    // Tiles of a slice: memory grows with them and time does not fall, measured from 3 to 12.
    const int64_t limit = std::max<int64_t>(2, workers);
    const bool is_kept = kept.is_there() && !gradients.has_entropy;
    const From from = is_kept                 ? From::kShares
                      : gradients.has_entropy ? From::kLogitsWithEntropy
                                              : From::kLogits;
    const auto transposed = is_kept ? Scratch<T>(0) : transposed_blocks(rows);
    // Packed once for all slices; a chunk of rows is the inner dimension of its products.
    Scratch<T> packed_rows(weight_grad.is_wanted() ? rows.padded * width : 0);
    if (weight_grad.is_wanted()) {
      for_each_task(rows.padded / kLanes, [&](int64_t b, int64_t) {
        const int64_t chunk = b * kLanes / kRowChunk * kRowChunk;
        pack_panels(rows.row(chunk), b * kLanes - chunk, kLanes,
                    std::min(kRowChunk, rows.padded - chunk), width,
                    packed_rows.get() + chunk * width);
      });
    }
    rows.release();  // both operands are made of it now
    std::vector<std::pair<int64_t, int64_t>> slices;
    for (int64_t tile = 0; tile < num_tiles; tile += slices.back().second) {
      slices.emplace_back(tile, weight.run(tile, limit));
    }
    const int64_t num_chunks = (rows.padded + kRowChunk - 1) / kRowChunk;
    const auto num_slices = static_cast<int64_t>(slices.size());
    // Two of each, so that the products of one step can overlap the gradients of the next.
    Scratch<T> by_row(chunk_rows * (limit * kTile + kSkew), 2);
    Scratch<T> packed(limit * kTile * width, 2);
    Scratch<T> copied(weight.is_direct(0, num_tiles) ? 0 : limit * kTile * width, 2);
    std::vector<Step> steps(static_cast<size_t>(num_slices * num_chunks));
    for (int64_t s = 0; s < num_slices * num_chunks; ++s) {
      const int64_t i = s / num_chunks;
      Step& step = steps[s];
      std::tie(step.tile, step.count) = slices[i];
      step.chunk = s % num_chunks * kRowChunk;
      step.size = std::min(kRowChunk, rows.padded - step.chunk);
      step.buffer = i % 2;
      step.is_copied = !weight.is_direct(step.tile, step.count);
      step.copied = copied.get(step.buffer);
      step.slice = step.is_copied ? step.copied : weight.direct(step.tile);
      step.packed = packed.get(step.buffer);
      step.by_row = by_row.get(s % 2);
    }
    Scratch<T> by_entry(kTile * (chunk_rows + kSkew), workers);
    Scratch<float> logits(2 * kTile * kLanes, workers);
    // A gradient of the weight that products cannot write directly stays in its block from the
    // first chunk of rows to the last.
    Scratch<float> block(kTile * width, num_chunks == 1 ? workers : 2 * limit);

    const auto gradient_task = [&](Step& step, int64_t j, int64_t worker) {
      const int64_t tile = step.tile + j, size = step.size, ld_entry = size + kSkew;
      const T* plain = step.slice + j * kTile * width;
      if (step.chunk == 0) {
        if (step.is_copied) weight.copy(tile, step.copied + j * kTile * width);
        pack_panels(step.slice, j * kTile, kTile, step.count * kTile, width, step.packed);
      }
      T* entries = by_entry.get(worker);
      float* z = logits.get(worker);
      for (int64_t b = 0; b < size; b += kLanes) {
        const int64_t first = step.chunk + b, real = std::min(kLanes, rows.count - first);
        float* spare = z + kTile * kLanes;
        Lanes lanes;
        for (int64_t r = 0; r < kLanes; ++r) {
          const int64_t row = first + r;
          gradients.load(lanes, r, row, tile, !keep || keep[row * num_tiles + tile]);
        }
        if (is_kept) {
          kept.load(tile, rows.index.data() + first, real, z, spare);
          for (int64_t r = 0; r < kLanes; ++r) {
            lanes.mass[r] =
                r < real ? std::exp(tile_lse[rows.index[first + r] * num_tiles + tile] -
                                    lanes.lse[r])
                         : 0.0f;
          }
        } else {
          multiply(kTile, kLanes, width, plain, width, transposed.get() + first * width, kLanes, z,
                   kLanes, false);
        }
        grad_block(z, tile_width(tile), kLanes, scale, from, lanes, entries + b, ld_entry,
                   step.by_row + b * step.ld() + j * kTile, step.ld(), spare);
      }
      if (!weight_grad.is_wanted()) return;
      const T* panels = packed_rows.get() + step.chunk * width;
      float* sums = block.get(num_chunks == 1 ? worker : step.buffer * limit + j);
      weight_grad.update(tile, step.chunk == 0, step.chunk + size == rows.padded, width, sums,
                         [&](float* to, int64_t ld_to, bool add) {
                           for (int64_t p = 0; p < width / kLanes; ++p) {
                             multiply(kTile, kLanes, size, entries, ld_entry,
                                      panels + p * size * kLanes, kLanes, to + p * kLanes, ld_to,
                                      add);
                           }
                         });
    };
    const auto product_task = [&](Step& step, int64_t b) {
      const int64_t num_entries = step.count * kTile;
      float* to = grad_hidden + (step.chunk + b * kLanes) * width;
      for (int64_t p = 0; p < width / kLanes; ++p) {
        multiply(kLanes, kLanes, num_entries, step.by_row + b * kLanes * step.ld(), step.ld(),
                 step.packed + p * num_entries * kLanes, kLanes, to + p * kLanes, width,
                 step.tile > 0);
      }
    };
    run_steps(steps, gradient_task, product_task);
  }

  // Gradients of step 0, of step 1, products of step 0, gradients of step 2, products of step 1 and
  // so on, handed out in this order in one parallel region. A task waits for what it depends on,
  // which was handed out before it. With a barrier after every phase instead, threads that share
  // their cores with other programs spent 40 % of the time waiting.
  template <typename Gradient, typename Product>
  static void run_steps(std::vector<Step>& steps, const Gradient& gradient_task,
                        const Product& product_task) {
    const auto num_steps = static_cast<int64_t>(steps.size());
    std::vector<int64_t> start{0};  // of phase 2 s, the gradients of step s, and of 2 s + 1, the
    for (int64_t s = 0; s <= num_steps; ++s) {  // products of step s - 1
      start.push_back(start.back() + (s < num_steps ? steps[s].count : 0));
      start.push_back(start.back() + (s > 0 ? steps[s - 1].num_blocks() : 0));
    }
    const auto wait = [](const std::atomic<int64_t>& done, int64_t number) {
      while (done.load(std::memory_order_acquire) < number) std::this_thread::yield();
    };
    struct Done {  // counts when a task throws, too: the others must not wait for it for ever
      std::atomic<int64_t>& counter;
      ~Done() { counter.fetch_add(1, std::memory_order_release); }
    };
    for_each_task(start.back(), [&](int64_t task, int64_t worker) {
      const int64_t phase = std::upper_bound(start.begin(), start.end(), task) - start.begin() - 1;
      const int64_t s = phase / 2 - phase % 2;
      Step& step = steps[s];
      if (phase % 2 == 0) {
        const Done done{step.gradients_done};
        // The buffers of step s - 2 are used again, and chunks of one slice add up in order.
        if (s > 1) wait(steps[s - 2].products_done, steps[s - 2].num_blocks());
        if (step.chunk > 0) wait(steps[s - 1].gradients_done, steps[s - 1].count);
        gradient_task(step, task - start[phase], worker);
      } else {
        const Done done{step.products_done};
        wait(step.gradients_done, step.count);
        if (s > 0) wait(steps[s - 1].products_done, steps[s - 1].num_blocks());
        product_task(step, task - start[phase]);
      }
    });
  }

  // Kept rows of each tile, ascending: those of tile j are list[start[j]] to list[start[j + 1]].
  struct Pairs {
    std::vector<int64_t> start;
    std::vector<int32_t> list;
    int64_t padded(int64_t tile) const {
      return round_up(start[tile + 1] - start[tile], kPairRound);
    }
  };

  void sparse(const Pairs& pairs) {
    const int64_t width = rows.width, num_tiles = weight.num_tiles();
    const int64_t workers = at::get_num_threads();
    const int64_t pool = std::max(kPairPool, rows.padded);
    Scratch<T> by_row(pool * kTile), by_entry(kTile * kPairChunk, workers);
    Scratch<T> gathered(kPairChunk * width, workers), operand(kPairChunk * width, workers);
    Scratch<float> logits(2 * kTile * kLanes, workers), block(kTile * width, workers);
    Scratch<T> packed_weight(kTile * kLanes, workers);
    Scratch<float> product(kPairChunk * kLanes, workers);
    for (int64_t tile = 0, count; tile < num_tiles; tile += count) {
      std::vector<int64_t> offset{0};  // of each tile in the pool of pairs
      for (count = 0; count < weight.run(tile, num_tiles); ++count) {
        const int64_t next = offset.back() + pairs.padded(tile + count);
        if (next > pool) break;
        offset.push_back(next);
      }
      const T* slice = weight.get(tile, count);
      for_each_task(count, [&](int64_t j, int64_t worker) {
        const int64_t first = pairs.start[tile + j], num = pairs.start[tile + j + 1] - first;
        if (num == 0 && weight_grad.is_wanted()) weight_grad.clear(tile + j);
        for (int64_t done = 0; done < num; done += kPairChunk) {
          const int32_t* list = pairs.list.data() + first + done;
          const int64_t real = std::min(kPairChunk, num - done), size = round_up(real, kPairRound);
          T* from = gathered.get(worker);
          for (int64_t i = 0; i < real; ++i) {
            std::memcpy(from + i * width, rows.row(list[i]), width * sizeof(T));
          }
          std::memset(from + real * width, 0, (size - real) * width * sizeof(T));
          gathered_gradients(slice + j * kTile * width, tile + j, list, real, size, from,
                             operand.get(worker), logits.get(worker), by_entry.get(worker),
                             by_row.get() + (offset[j] + done) * kTile);
          if (!weight_grad.is_wanted()) continue;
          pack_panels(from, 0, size, size, width, operand.get(worker));
          weight_grad.update(tile + j, done == 0, done + real == num, width, block.get(worker),
                             [&](float* to, int64_t ld_to, bool add) {
                               for (int64_t p = 0; p < width / kLanes; ++p) {
                                 multiply(kTile, kLanes, size, by_entry.get(worker), size,
                                          operand.get(worker) + p * size * kLanes, kLanes,
                                          to + p * kLanes, ld_to, add);
                               }
                             });
        }
      });
      // Each task owns some columns of all rows, so rows shared by tiles need no lock and are
      // summed in the order of the tiles.
      for_each_task(width / kLanes, [&](int64_t p, int64_t worker) {
        for (int64_t j = 0; j < count; ++j) {
          const int64_t first = pairs.start[tile + j], num = pairs.start[tile + j + 1] - first;
          if (num == 0) continue;
          T* panel = packed_weight.get(worker);
          pack_panel(slice + j * kTile * width + p * kLanes, kTile, width, panel);
          for (int64_t done = 0; done < num; done += kPairChunk) {
            const int64_t real = std::min(kPairChunk, num - done);
            multiply(round_up(real, kPairRound), kLanes, kTile,
                     by_row.get() + (offset[j] + done) * kTile, kTile, panel, kLanes,
                     product.get(worker), kLanes, false);
            for (int64_t i = 0; i < real; ++i) {
              float* to = grad_hidden + pairs.list[first + done + i] * width + p * kLanes;
              const float* values = product.get(worker) + i * kLanes;
              for (int64_t h = 0; h < kLanes; ++h) to[h] += values[h];
            }
          }
        }
      });
    }
  }

 private:
  // Logit gradients of one tile and `size` gathered rows, of which the first `real` exist.
  void gathered_gradients(const T* weight_tile, int64_t tile, const int32_t* list, int64_t real,
                          int64_t size, const T* from, T* operand, float* z, T* by_entry,
                          T* by_row) const {
    for (int64_t b = 0; b < size; b += kLanes) {
      const int64_t num_lanes = std::min(kLanes, size - b);
      // The width of the operand is its leading dimension: one block at a time.
      transpose_rows(from + b * rows.width, num_lanes, rows.width, operand);
      multiply(kTile, num_lanes, rows.width, weight_tile, rows.width, operand, num_lanes, z,
               num_lanes, false);
      Lanes lanes{};
      for (int64_t r = 0; r < kLanes; ++r) {
        lanes.target[r] = -1;
        if (b + r < real) gradients.load(lanes, r, list[b + r], tile, true);
      }
      grad_block(z, tile_width(tile), num_lanes, scale, From::kLogits, lanes, by_entry + b, size,
                 by_row + b * kTile, kTile, z + kTile * kLanes);
    }
  }
};

// Marks the tiles that one row keeps and returns an upper bound of the mass of the others; the rule
// is in __init__.py. logprob: of the row, nullptr if unknown. order: scratch.
inline float select_tiles(const float* tile_lse, int64_t num_tiles, float lse, const float* logprob,
                          int64_t target_tile, double drop_mass, float* mass,
                          std::vector<std::pair<float, int32_t>>& order, uint8_t* keep) {
  std::fill_n(keep, num_tiles, uint8_t{1});
  tile_masses(tile_lse, num_tiles, lse, kMassSlack, kLeastMass, mass);
  double outside = 0;
  for (int64_t j = 0; j < num_tiles; ++j) outside += j == target_tile ? 0.0 : mass[j];
  const float tail = logprob ? -std::expm1(*logprob) : static_cast<float>(outside / kMassSlack);
  // NaN in any of them keeps every tile.
  if (std::isnan(outside) || std::isnan(tail)) return 0;
  const double budget = drop_mass * std::min(1.0f, 8 * std::max(tail, kMinTail));
  // Tiles of at most an equal share of the budget all fit; the others compete in order of mass.
  const double share = budget / static_cast<double>(num_tiles) * (1 - 1e-6);
  double dropped = 0;
  order.clear();
  for (int64_t j = 0; j < num_tiles; ++j) {
    if (j == target_tile) continue;
    if (mass[j] <= share) {
      dropped += mass[j];
      keep[j] = 0;
    } else if (mass[j] <= budget) {
      order.emplace_back(mass[j], static_cast<int32_t>(j));
    }
  }
  std::sort(order.begin(), order.end());
  for (const auto& [value, j] : order) {
    if (dropped + value > budget) break;
    dropped += value;
    keep[j] = 0;
  }
  return static_cast<float>(dropped);
}

}  // namespace flowrl::linear_logprob
