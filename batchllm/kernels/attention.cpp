// Attention of one step and layer on a CPU: each segment of shared KV is read once for a block of rows that share it.
//
// The layout is that of batchllm/attention/layout.py. The query rows, in its order, are cut into blocks; a task is a
// block and a KV head. Within a task the KV goes by in tiles: first those of the segments, each for the rows of the block
// that read it, then those of each sequence's private part. The softmax is the running one of FlashAttention (Dao et al.
// 2022), which merges the parts by their log-sum-exp as it goes. A tile that enough rows read is packed (keys transposed) and
// multiplied in register tiles; for a few rows, packing would cost more than it saves, and plain dot products are used.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <omp.h>

#include "multiply.h"

extern "C" {

// One step. All sizes in elements; the arrays without a comment are those of AttentionLayout.
struct BatchllmAttentionStep {
    int64_t num_segments;
    int64_t num_rows;
    const int32_t* table;  // slot of (row, position): table[row * table_stride + position]
    int64_t table_stride;
    // The query rows in the layout's order: where the sequence of each stands in the order, its query token in the batch,
    // and one beyond the last position that it reads.
    const int32_t* row_place;
    const int32_t* row_token;
    const int32_t* row_visible_end;
    const int32_t* table_rows;
    const int32_t* order;
    const int32_t* private_start;
    const int32_t* segment_readers;
    const int32_t* segment_span;
    const int32_t* segment_table_row;
};

// One layer. Strides are those of a token; heads and head elements are contiguous.
struct BatchllmAttentionLayer {
    const void* query;
    int64_t query_stride;
    const void* key_cache;
    const void* value_cache;
    int64_t key_stride;
    int64_t value_stride;
    void* output;
    int64_t output_stride;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    float scale;
    float logit_cap;  // a score s becomes cap * tanh(s / cap); 0: no cap
    int32_t window;   // tokens that a row sees, its own included; 0: all before it
};
}

namespace batchllm {
namespace {

constexpr int kTileTokens = 64;    // KV tokens of a tile
constexpr int kBlockVectors = 96;  // query vectors of a block: rows times query heads of a KV head
constexpr int kMinPackedVectors = 8;
constexpr int kMinComputeBound = 64;  // vectors; with as many, memory keeps up whatever the order of reading
constexpr int kMinBlockVectors = 32;
constexpr int kTasksPerThread = 2;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a task works with: the query vectors of its rows for each of its KV heads, and their running softmax.
template <int kHeadDim>
class Workspace {
   public:
    explicit Workspace(int num_vectors)
        : query(num_vectors * kHeadDim), sum(num_vectors * kHeadDim), maximum(num_vectors), weight(num_vectors) {}

    std::vector<float> query;
    std::vector<float> sum;
    std::vector<float> maximum;
    std::vector<float> weight;
    alignas(64) float score[kBlockVectors * kTileTokens];
    alignas(64) float key[kHeadDim * kTileTokens];  // transposed
    alignas(64) float value[kTileTokens * kHeadDim];
};

template <typename Scalar, int kHeadDim>
class BlockAttention {
   public:
    BlockAttention(const BatchllmAttentionStep& step, const BatchllmAttentionLayer& layer,
                   Workspace<kHeadDim>& work)
        : step_(step), layer_(layer), work_(work), group_(layer.num_heads / layer.num_kv_heads) {}

    // Query rows [begin, end) for KV heads [first_head, last_head).
    void run(int begin, int end, int first_head, int last_head) {
        begin_ = begin;
        num_vectors_ = (end - begin) * group_;
        first_head_ = first_head;
        last_head_ = last_head;
        read_queries(end);
        const int32_t* place_of = step_.row_place;
        const int first = place_of[begin], last = place_of[end - 1];
        for (int64_t g = 0; g < step_.num_segments; ++g) {
            const int from = std::max(step_.segment_readers[2 * g], first);
            const int to = std::min(step_.segment_readers[2 * g + 1] - 1, last);
            if (from > to) continue;
            int row = begin, row_end = end;
            while (place_of[row] < from) ++row;
            while (place_of[row_end - 1] > to) --row_end;
            if (row >= row_end) continue;  // its readers in this block have no query tokens
            attend(row, row_end, step_.segment_table_row[g], step_.segment_span[2 * g], step_.segment_span[2 * g + 1]);
        }
        for (int row = begin; row < end;) {
            int row_end = row;
            while (row_end < end && place_of[row_end] == place_of[row]) ++row_end;
            const int32_t sequence = step_.order[place_of[row]];
            attend(row, row_end, step_.table_rows[sequence], step_.private_start[sequence],
                   step_.row_visible_end[row_end - 1]);
            row = row_end;
        }
        write_outputs(end);
    }

   private:
    float* query(int head, int vector) { return work_.query.data() + at(head, vector) * kHeadDim; }
    float* sum(int head, int vector) { return work_.sum.data() + at(head, vector) * kHeadDim; }
    int at(int head, int vector) const { return (head - first_head_) * num_vectors_ + vector; }

    void read_queries(int end) {
        for (int head = first_head_; head < last_head_; ++head)
            for (int row = begin_; row < end; ++row) {
                const Scalar* from = static_cast<const Scalar*>(layer_.query) + step_.row_token[row] * layer_.query_stride +
                                     static_cast<int64_t>(head) * group_ * kHeadDim;
                float* to = query(head, (row - begin_) * group_);
                for (int i = 0; i < group_ * kHeadDim; i += kLanes) store(to + i, load(from + i) * layer_.scale);
            }
        const int num_vectors = num_vectors_ * (last_head_ - first_head_);
        std::fill_n(work_.sum.begin(), num_vectors * kHeadDim, 0.0f);
        std::fill_n(work_.maximum.begin(), num_vectors, kMinusInfinity);
        std::fill_n(work_.weight.begin(), num_vectors, 0.0f);
    }

    void write_outputs(int end) {
        for (int head = first_head_; head < last_head_; ++head)
            for (int row = begin_; row < end; ++row) {
                Scalar* to = static_cast<Scalar*>(layer_.output) + step_.row_token[row] * layer_.output_stride +
                             static_cast<int64_t>(head) * group_ * kHeadDim;
                for (int h = 0; h < group_; ++h) {
                    const int vector = (row - begin_) * group_ + h;
                    const float inverse = 1.0f / work_.weight[at(head, vector)];
                    const float* from = sum(head, vector);
                    for (int i = 0; i < kHeadDim; i += kLanes) store(to + h * kHeadDim + i, load(from + i) * inverse);
                }
            }
    }

    // Rows [row, row_end) read positions [start, end) of a table row, each as far as it sees.
    void attend(int row, int row_end, int32_t table_row, int start, int end) {
        const int32_t* slots = step_.table + table_row * step_.table_stride;
        const bool is_packed = (row_end - row) * group_ >= kMinPackedVectors;
        if (layer_.window > 0) start = std::max(start, first_in_window(row, row_end));
        for (int position = start; position < end; position += kTileTokens) {
            // The first rows of a prompt see nothing of its last tiles.
            while (step_.row_visible_end[row] <= position) ++row;
            const Tile tile = {row, row_end, position, std::min(kTileTokens, end - position), slots + position};
            if ((row_end - row) * group_ < kMinComputeBound) fetch(tile);
            if (is_packed)
                attend_packed(tile);
            else
                attend_plainly(tile);
        }
    }

    // Before this position none of the rows sees anything.
    int first_in_window(int row, int row_end) const {
        const int32_t* end = step_.row_visible_end;
        return *std::min_element(end + row, end + row_end) - layer_.window;
    }

    // KV tokens, and the rows that read them.
    struct Tile {
        int row, row_end;
        int position, num_tokens;
        const int32_t* slots;
    };

    // Reads a word of each cache line, all heads of a token after one another: head by head, as they are worked on, the
    // processor sees no stream, and memory gives a third of its speed. Prefetch instructions do not help as much.
    void fetch(const Tile& tile) {
        const int bytes = (last_head_ - first_head_) * kHeadDim * sizeof(Scalar);
        const auto touch = [bytes](const Scalar* row) {
            for (int i = 0; i < bytes; i += 64) static_cast<void>(reinterpret_cast<const volatile char*>(row)[i]);
        };
        for (int t = 0; t < tile.num_tokens; ++t) touch(key(first_head_, tile.slots[t]));
        for (int t = 0; t < tile.num_tokens; ++t) touch(value(first_head_, tile.slots[t]));
    }

    void attend_packed(const Tile& tile) {
        const int vector = (tile.row - begin_) * group_, num_vectors = (tile.row_end - tile.row) * group_;
        for (int head = first_head_; head < last_head_; ++head) {
            pack_keys(head, tile);
            multiply<false>(num_vectors, query(head, vector), kHeadDim, work_.key, kTileTokens, work_.score, kTileTokens,
                            kHeadDim, (tile.num_tokens + kLanes - 1) / kLanes);
            cap(num_vectors, work_.score);
            hide(tile, work_.score);
            for (int v = 0; v < num_vectors; ++v) weigh(head, vector + v, work_.score + v * kTileTokens);
            pack_values(head, tile);
            multiply<true>(num_vectors, work_.score, kTileTokens, work_.value, kHeadDim, sum(head, vector), kHeadDim,
                           tile.num_tokens, kHeadDim / kLanes);
        }
    }

    void attend_plainly(const Tile& tile) {
        const int vector = (tile.row - begin_) * group_, num_vectors = (tile.row_end - tile.row) * group_;
        for (int head = first_head_; head < last_head_; ++head) {
            for (int t = 0; t < tile.num_tokens; ++t)
                score_token(head, vector, num_vectors, tile.slots[t], work_.score + t);
            cap(num_vectors, work_.score);
            hide(tile, work_.score);
            for (int v = 0; v < num_vectors; ++v) weigh(head, vector + v, work_.score + v * kTileTokens);
            add_values(head, vector, num_vectors, tile);
        }
    }

    const Scalar* key(int head, int32_t slot) const {
        return static_cast<const Scalar*>(layer_.key_cache) + slot * layer_.key_stride + head * kHeadDim;
    }
    const Scalar* value(int head, int32_t slot) const {
        return static_cast<const Scalar*>(layer_.value_cache) + slot * layer_.value_stride + head * kHeadDim;
    }

    void pack_keys(int head, const Tile& tile) {
        for (int t = 0; t < tile.num_tokens; t += kLanes)
            for (int d = 0; d < kHeadDim; d += kLanes) {
                Vec block[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    block[i] = t + i < tile.num_tokens ? load(key(head, tile.slots[t + i]) + d) : Vec{};
                transpose(block);
                for (int i = 0; i < kLanes; ++i) store(work_.key + (d + i) * kTileTokens + t, block[i]);
            }
    }

    void pack_values(int head, const Tile& tile) {
        for (int t = 0; t < tile.num_tokens; ++t) {
            const Scalar* v = value(head, tile.slots[t]);
            for (int d = 0; d < kHeadDim; d += kLanes) store(work_.value + t * kHeadDim + d, load(v + d));
        }
    }

    void score_token(int head, int vector, int num_vectors, int32_t slot, float* score) {
        const Scalar* k = key(head, slot);
        Vec part[kHeadDim / kLanes];
        for (int j = 0; j < kHeadDim / kLanes; ++j) part[j] = load(k + j * kLanes);
        for (int v = 0; v < num_vectors; ++v) {
            const float* q = query(head, vector + v);
            Vec products = part[0] * load(q);
            for (int j = 1; j < kHeadDim / kLanes; ++j) products += part[j] * load(q + j * kLanes);
            score[v * kTileTokens] = total(products);
        }
    }

    void add_values(int head, int vector, int num_vectors, const Tile& tile) {
        for (int v = 0; v < num_vectors; ++v) {
            const float* weight = work_.score + v * kTileTokens;
            float* to = sum(head, vector + v);
            Vec part[kHeadDim / kLanes];
            for (int j = 0; j < kHeadDim / kLanes; ++j) part[j] = load(to + j * kLanes);
            for (int t = 0; t < tile.num_tokens; ++t) {
                const Scalar* from = value(head, tile.slots[t]);
                const Vec w = broadcast(weight[t]);
                for (int j = 0; j < kHeadDim / kLanes; ++j) part[j] += w * load(from + j * kLanes);
            }
            for (int j = 0; j < kHeadDim / kLanes; ++j) store(to + j * kLanes, part[j]);
        }
    }

    void cap(int num_vectors, float* score) {
        if (layer_.logit_cap <= 0) return;
        const Vec high = broadcast(layer_.logit_cap), inverse = broadcast(1.0f / layer_.logit_cap);
        for (int t = 0; t < num_vectors * kTileTokens; t += kLanes) {
            const Vec s = load(score + t) * inverse, size = max(s, -s);
            const Vec e = exp_negative(-2.0f * size);
            const Vec capped = high * (1.0f - e) / (1.0f + e);
            store(score + t, s < Vec{} ? -capped : capped);
        }
    }

    // Scores of the positions that a row does not see, and of those beyond the tile's end.
    void hide(const Tile& tile, float* score) {
        for (int row = tile.row; row < tile.row_end; ++row) {
            const int end = step_.row_visible_end[row] - tile.position, visible = std::min(end, tile.num_tokens);
            const int first = layer_.window > 0 ? std::clamp(end - layer_.window, 0, kTileTokens) : 0;
            if (visible == kTileTokens && layer_.window <= 0) break;  // later rows see more
            for (int h = 0; h < group_; ++h, score += kTileTokens) {
                std::fill(score, score + first, kMinusInfinity);
                std::fill(score + visible, score + kTileTokens, kMinusInfinity);
            }
        }
    }

    // Scores of a tile to weights relative to the running maximum.
    void weigh(int head, int vector, float* score) {
        Vec high = load(score);
        for (int t = kLanes; t < kTileTokens; t += kLanes) high = max(high, load(score + t));
        float& before = work_.maximum[at(head, vector)];
        float& weight = work_.weight[at(head, vector)];
        const float maximum = std::max(before, highest(high));
        if (maximum == kMinusInfinity) {  // the row's window begins behind this tile
            std::fill_n(score, kTileTokens, 0.0f);
            return;
        }
        if (maximum > before) {
            const float shrink = std::exp(before - maximum);
            before = maximum;
            weight *= shrink;
            float* to = sum(head, vector);
            for (int d = 0; d < kHeadDim; ++d) to[d] *= shrink;
        }
        Vec weights = Vec{};
        for (int t = 0; t < kTileTokens; t += kLanes) {
            const Vec w = exp_negative(load(score + t) - broadcast(maximum));
            store(score + t, w);
            weights += w;
        }
        weight += total(weights);
    }

    const BatchllmAttentionStep& step_;
    const BatchllmAttentionLayer& layer_;
    Workspace<kHeadDim>& work_;
    const int group_;  // query heads of a KV head
    int begin_ = 0;
    int num_vectors_ = 0;  // of each KV head
    int first_head_ = 0;
    int last_head_ = 0;
};

template <typename Scalar, int kHeadDim>
void attention(const BatchllmAttentionStep& step, const BatchllmAttentionLayer& layer) {
    const int num_rows = static_cast<int>(step.num_rows);
    const int group = layer.num_heads / layer.num_kv_heads;
    // Large blocks read a shared segment fewer times, and memory is fastest where a task reads all heads of a token.
    int block_rows = std::max(1, kBlockVectors / group);
    int task_heads = layer.num_kv_heads;
    const int min_tasks = omp_get_max_threads() == 1 ? 1 : kTasksPerThread * omp_get_max_threads();
    const auto num_parts = [](int whole, int part) { return (whole + part - 1) / part; };
    const auto num_tasks = [&] { return num_parts(num_rows, block_rows) * num_parts(layer.num_kv_heads, task_heads); };
    while (num_tasks() < min_tasks && block_rows * group > kMinBlockVectors) block_rows = (block_rows + 1) / 2;
    while (num_tasks() < min_tasks && task_heads > 1) task_heads = (task_heads + 1) / 2;
    const int num_blocks = num_parts(num_rows, block_rows);
    const int num_heads = layer.num_kv_heads;
    const int num_head_parts = num_parts(num_heads, task_heads);
#pragma omp parallel
    {
        auto work = std::make_unique<Workspace<kHeadDim>>(block_rows * group * task_heads);
        BlockAttention<Scalar, kHeadDim> block_attention(step, layer, *work);
#pragma omp for schedule(dynamic) collapse(2)
        for (int block = 0; block < num_blocks; ++block)
            for (int part = 0; part < num_head_parts; ++part)
                block_attention.run(block * block_rows, std::min(num_rows, (block + 1) * block_rows), part * task_heads,
                                    std::min(num_heads, (part + 1) * task_heads));
    }
}

template <typename Scalar>
int dispatch(const BatchllmAttentionStep& step, const BatchllmAttentionLayer& layer) {
    if (layer.num_heads / layer.num_kv_heads > kBlockVectors) return 1;
    switch (layer.head_dim) {
        case 32: attention<Scalar, 32>(step, layer); return 0;
        case 64: attention<Scalar, 64>(step, layer); return 0;
        case 80: attention<Scalar, 80>(step, layer); return 0;
        case 96: attention<Scalar, 96>(step, layer); return 0;
        case 128: attention<Scalar, 128>(step, layer); return 0;
        case 256: attention<Scalar, 256>(step, layer); return 0;
        default: return 1;
    }
}

}  // namespace
}  // namespace batchllm

extern "C" {

// 0, or 1 where the shape of the heads is not supported; nothing is written then.
int batchllm_attention_float32(const BatchllmAttentionStep* step, const BatchllmAttentionLayer* layer) {
    return batchllm::dispatch<float>(*step, *layer);
}

int batchllm_attention_bfloat16(const BatchllmAttentionStep* step, const BatchllmAttentionLayer* layer) {
    return batchllm::dispatch<batchllm::BFloat16>(*step, *layer);
}
}
