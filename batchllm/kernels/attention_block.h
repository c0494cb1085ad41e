// Attention of a block of query rows on a CPU; see attention.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_step.h"
#include "multiply.h"

namespace batchllm {

constexpr int kTileTokens = 64;    // KV tokens of a tile
constexpr int kBlockVectors = 96;  // query vectors of a block: rows times query heads of a KV head
constexpr int kMinComputeBound = 64;  // vectors; with as many, memory keeps up whatever the order of reading
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// KV tokens, and the rows that read them.
struct Tile {
    int row, row_end;
    int position, num_tokens;
    const int32_t* slots;
};

// What a task works with: the query vectors of its rows for each of its KV heads, and their running softmax.
template <typename Scalar, int kHeadDim>
struct Workspace {
    // Products are of pairs of bfloat16 where the processor has them, else of float32.
    using Product = typename ProductOf<Scalar, kHeadDim % (2 * kLanes) == 0>::Type;
    static constexpr int kNumbers = Product::kNumbers;
    using Number = std::conditional_t<kNumbers == 1, float, Scalar>;

    void resize(size_t num_vectors) {
        if (num_vectors <= maximum.size()) return;
        query.resize(num_vectors * kHeadDim);
        sum.resize(num_vectors * kHeadDim);
        maximum.resize(num_vectors);
        weight.resize(num_vectors * kLanes);
    }

    std::vector<Tile> tiles;
    std::vector<Number> query;
    std::vector<float> sum;
    std::vector<float> maximum;
    std::vector<float> weight;  // sums in as many parts as a vector has
    alignas(64) float score[kBlockVectors * kTileTokens];
    alignas(64) Scalar rounded[kNumbers == 1 ? 1 : kBlockVectors * kTileTokens];  // weights, in pairs
    alignas(64) float key[kHeadDim / kNumbers * kTileTokens];  // transposed
    alignas(64) float value[kTileTokens / kNumbers * kHeadDim];
};

template <typename Scalar, int kHeadDim>
class BlockAttention {
    using Work = Workspace<Scalar, kHeadDim>;
    using Product = typename Work::Product;
    using Number = typename Work::Number;
    static constexpr int kNumbers = Work::kNumbers;
    static constexpr int kUnits = kHeadDim / kNumbers;        // 32-bit units of a head
    static constexpr int kLines = 2 * kHeadDim * sizeof(Scalar) / 64;  // cache lines of a token's key and value
    static constexpr int kMinPackedVectors = kNumbers == 1 ? 8 : 4;
    static constexpr int kTileUnits = kTileTokens / kNumbers;  // of a row of weights

   public:
    BlockAttention(const BatchllmAttentionStep& step, const BatchllmAttentionLayer& layer, Work& work)
        : step_(step), layer_(layer), work_(work), group_(layer.num_heads / layer.num_kv_heads) {}

    // Query rows [begin, end) for KV heads [first_head, last_head).
    void run(int begin, int end, int first_head, int last_head) {
        begin_ = begin;
        num_vectors_ = (end - begin) * group_;
        first_head_ = first_head;
        last_head_ = last_head;
        read_queries(end);
        find_tiles(end);
        const std::vector<Tile>& tiles = work_.tiles;
        for (size_t i = 0; i < tiles.size(); ++i) {
            if ((tiles[i].row_end - tiles[i].row) * group_ < kMinComputeBound) touch(tiles[i]);
            fetch_from(tiles[std::min(i + 1, tiles.size() - 1)]);
            attend(tiles[i]);
        }
        write_outputs(end);
    }

   private:
    Number* query(int head, int vector) { return work_.query.data() + at(head, vector) * kHeadDim; }
    float* sum(int head, int vector) { return work_.sum.data() + at(head, vector) * kHeadDim; }
    float* weight(int head, int vector) { return work_.weight.data() + at(head, vector) * kLanes; }
    int at(int head, int vector) const { return (head - first_head_) * num_vectors_ + vector; }

    void read_queries(int end) {
        for (int head = first_head_; head < last_head_; ++head)
            for (int row = begin_; row < end; ++row) {
                const Scalar* from = static_cast<const Scalar*>(layer_.query) + step_.row_token[row] * layer_.query_stride +
                                     static_cast<int64_t>(head) * group_ * kHeadDim;
                Number* to = query(head, (row - begin_) * group_);
                for (int i = 0; i < group_ * kHeadDim; i += kLanes) store(to + i, load(from + i));
            }
        const int num_vectors = num_vectors_ * (last_head_ - first_head_);
        std::fill_n(work_.sum.begin(), num_vectors * kHeadDim, 0.0f);
        std::fill_n(work_.maximum.begin(), num_vectors, kMinusInfinity);
        std::fill_n(work_.weight.begin(), num_vectors * kLanes, 0.0f);
    }

    void write_outputs(int end) {
        for (int head = first_head_; head < last_head_; ++head)
            for (int row = begin_; row < end; ++row) {
                Scalar* to = static_cast<Scalar*>(layer_.output) + step_.row_token[row] * layer_.output_stride +
                             static_cast<int64_t>(head) * group_ * kHeadDim;
                for (int h = 0; h < group_; ++h) {
                    const int vector = (row - begin_) * group_ + h;
                    const float inverse = 1.0f / total(load(weight(head, vector)));
                    const float* from = sum(head, vector);
                    for (int i = 0; i < kHeadDim; i += kLanes) store(to + h * kHeadDim + i, load(from + i) * inverse);
                }
            }
    }

    // All tiles of the block: of the segments that its rows read, then of each sequence's private part.
    void find_tiles(int end) {
        work_.tiles.clear();
        const int32_t* place_of = step_.row_place;
        const int first = place_of[begin_], last = place_of[end - 1];
        for (int64_t g = 0; g < step_.num_segments; ++g) {
            const int from = std::max(step_.segment_readers[2 * g], first);
            const int to = std::min(step_.segment_readers[2 * g + 1] - 1, last);
            if (from > to) continue;
            int row = begin_, row_end = end;
            while (place_of[row] < from) ++row;
            while (place_of[row_end - 1] > to) --row_end;
            if (row >= row_end) continue;  // its readers in this block have no query tokens
            add_tiles(row, row_end, step_.segment_table_row[g], step_.segment_span[2 * g], step_.segment_span[2 * g + 1]);
        }
        for (int row = begin_; row < end;) {
            int row_end = row;
            while (row_end < end && place_of[row_end] == place_of[row]) ++row_end;
            const int32_t sequence = step_.order[place_of[row]];
            add_tiles(row, row_end, step_.table_rows[sequence], step_.private_start[sequence],
                      step_.row_visible_end[row_end - 1]);
            row = row_end;
        }
    }

    // Rows [row, row_end) read positions [start, end) of a table row, each as far as it sees.
    void add_tiles(int row, int row_end, int32_t table_row, int start, int end) {
        const int32_t* slots = step_.table + table_row * step_.table_stride;
        if (layer_.window > 0) start = std::max(start, first_in_window(row, row_end));
        for (int position = start; position < end; position += kTileTokens) {
            // The first rows of a prompt see nothing of its last tiles.
            while (step_.row_visible_end[row] <= position) ++row;
            work_.tiles.push_back({row, row_end, position, std::min(kTileTokens, end - position), slots + position});
        }
    }

    // Before this position none of the rows sees anything.
    int first_in_window(int row, int row_end) const {
        const int32_t* end = step_.row_visible_end;
        return *std::min_element(end + row, end + row_end) - layer_.window;
    }

    // The KV that is asked for while the tile before it is computed, a cache line at a time: all heads of a token after one
    // another. Head by head, as they are worked on, memory gives a third of its speed.
    struct Ahead {
        const int32_t* slots = nullptr;
        int num_rows = 0;  // keys of the tokens, then their values
        int row = 0;
        const char* line = nullptr;
        const char* end = nullptr;
    };

    void fetch_from(const Tile& tile) {
        ahead_ = {tile.slots, 2 * tile.num_tokens, -1};
        fetch_row();
    }

    void fetch_row() {
        if (ahead_.row < ahead_.num_rows - 1) ++ahead_.row;
        const int num_tokens = ahead_.num_rows / 2, token = ahead_.row % num_tokens;
        const int32_t slot = ahead_.slots[token];
        ahead_.line = reinterpret_cast<const char*>(ahead_.row < num_tokens ? key(first_head_, slot) : value(first_head_, slot));
        ahead_.end = ahead_.line + (last_head_ - first_head_) * kHeadDim * sizeof(Scalar);
    }

    void fetch() {
        __builtin_prefetch(ahead_.line);
        ahead_.line += 64;
        if (ahead_.line >= ahead_.end) fetch_row();
    }

    // Reads a word of each cache line, in the order in which memory is fastest: waits for what has not come yet.
    void touch(const Tile& tile) {
        const int bytes = (last_head_ - first_head_) * kHeadDim * sizeof(Scalar);
        const auto touch = [bytes](const Scalar* row) {
            for (int i = 0; i < bytes; i += 64) static_cast<void>(reinterpret_cast<const volatile char*>(row)[i]);
        };
        for (int t = 0; t < tile.num_tokens; ++t) touch(key(first_head_, tile.slots[t]));
        for (int t = 0; t < tile.num_tokens; ++t) touch(value(first_head_, tile.slots[t]));
    }

    void attend(const Tile& tile) {
        const int vector = (tile.row - begin_) * group_, num_vectors = (tile.row_end - tile.row) * group_;
        for (int head = first_head_; head < last_head_; ++head)
            if (num_vectors >= kMinPackedVectors)
                attend_packed(head, vector, num_vectors, tile);
            else
                attend_plainly(head, vector, num_vectors, tile);
    }

    void attend_packed(int head, int vector, int num_vectors, const Tile& tile) {
        pack_keys(head, tile);
        multiply<Product, false>(num_vectors, reinterpret_cast<const float*>(query(head, vector)), kUnits, work_.key,
                                 kTileTokens, work_.score, kTileTokens, kUnits, (tile.num_tokens + kLanes - 1) / kLanes);
        if constexpr (kNumbers == 1)
            weigh(head, vector, num_vectors, tile, work_.score);
        else
            weigh(head, vector, num_vectors, tile, work_.rounded);
        pack_values(head, tile);
        const float* weights = kNumbers == 1 ? work_.score : reinterpret_cast<const float*>(work_.rounded);
        multiply<Product, true>(num_vectors, weights, kTileUnits, work_.value, kHeadDim, sum(head, vector), kHeadDim,
                                (tile.num_tokens + kNumbers - 1) / kNumbers, kHeadDim / kLanes);
    }

    void attend_plainly(int head, int vector, int num_vectors, const Tile& tile) {
        for (int t = 0; t < tile.num_tokens; ++t) {
            score_token(head, vector, num_vectors, tile.slots[t], work_.score + t);
            for (int line = 0; line < kLines; ++line) fetch();
        }
        weigh(head, vector, num_vectors, tile, work_.score);
        add_values(head, vector, num_vectors, tile);
    }

    const Scalar* key(int head, int32_t slot) const {
        return static_cast<const Scalar*>(layer_.key_cache) + slot * layer_.key_stride + head * kHeadDim;
    }
    const Scalar* value(int head, int32_t slot) const {
        return static_cast<const Scalar*>(layer_.value_cache) + slot * layer_.value_stride + head * kHeadDim;
    }

    // A vector of 32-bit units of a head.
    static Vec load_units(const Scalar* head, int unit) {
        if constexpr (kNumbers == 1)
            return load(head + unit);
        else
            return load(reinterpret_cast<const float*>(head) + unit);
    }

    void pack_keys(int head, const Tile& tile) {
        const Scalar* rows[kTileTokens];
        for (int t = 0; t < kTileTokens; ++t) rows[t] = key(head, tile.slots[std::min(t, tile.num_tokens - 1)]);
        for (int t = 0; t < tile.num_tokens; t += kLanes) {
            for (int d = 0; d < kUnits; d += kLanes) {
                Vec block[kLanes];
                for (int i = 0; i < kLanes; ++i) block[i] = load_units(rows[t + i], d);
                transpose(block);
                for (int i = 0; i < kLanes; ++i) {
                    store(work_.key + (d + i) * kTileTokens + t, block[i]);
                    fetch();
                }
            }
        }
    }

    void pack_values(int head, const Tile& tile) {
        for (int t = 0; t < tile.num_tokens; t += kNumbers) {
            const Scalar* v = value(head, tile.slots[t]);
            float* to = work_.value + t / kNumbers * kHeadDim;
            if constexpr (kNumbers == 1) {
                for (int d = 0; d < kHeadDim; d += kLanes) {
                    store(to + d, load(v + d));
                    fetch();
                }
            } else {
                const bool has_next = t + 1 < tile.num_tokens;
                const Scalar* next = has_next ? value(head, tile.slots[t + 1]) : v;
                for (int d = 0; d < kUnits; d += kLanes) {
                    Vec first = load_units(v, d), second = has_next ? load_units(next, d) : Vec{};
                    Product::pair(first, second);
                    store(to + 2 * d, first);
                    store(to + 2 * d + kLanes, second);
                    fetch();
                    fetch();
                }
            }
        }
    }

    void score_token(int head, int vector, int num_vectors, int32_t slot, float* score) {
        const Scalar* k = key(head, slot);
        Vec part[kUnits / kLanes];
        for (int j = 0; j < kUnits / kLanes; ++j) part[j] = load_units(k, j * kLanes);
        for (int v = 0; v < num_vectors; ++v) {
            const float* q = reinterpret_cast<const float*>(query(head, vector + v));
            Vec products = {};
            for (int j = 0; j < kUnits / kLanes; ++j)
                products = Product::add_product(products, part[j], load(q + j * kLanes));
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

    // Scores of a tile to weights relative to the running maximum.
    template <typename Weight>
    void weigh(int head, int vector, int num_vectors, const Tile& tile, Weight* to) {
        float factor = layer_.scale * kLog2E;
        if (layer_.logit_cap > 0) {
            for (int t = 0; t < num_vectors * kTileTokens; t += kLanes)
                store(work_.score + t, capped(load(work_.score + t) * layer_.scale));
            factor = kLog2E;
        }
        hide(tile, work_.score);
        for (int v = 0; v < num_vectors; ++v)
            weigh_row(head, vector + v, work_.score + v * kTileTokens, factor, to + v * kTileTokens);
    }

    Vec capped(Vec score) const {
        const Vec s = score * (1.0f / layer_.logit_cap), size = max(s, -s);
        const Vec e = exp2_negative(-2.0f * kLog2E * size);
        const Vec result = layer_.logit_cap * (1.0f - e) / (1.0f + e);
        return s < Vec{} ? -result : result;
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

    // Times `factor` the scores are to the base of 2.
    template <typename Weight>
    void weigh_row(int head, int vector, const float* score, float factor, Weight* to) {
        Vec high = load(score);
        for (int t = kLanes; t < kTileTokens; t += kLanes) high = max(high, load(score + t));
        float& maximum = work_.maximum[at(head, vector)];
        Vec weights = load(weight(head, vector));
        if (exceeds(high, maximum)) {
            const float higher = highest(high), shrink = std::exp2((maximum - higher) * factor);
            maximum = higher;
            weights *= shrink;
            float* values = sum(head, vector);
            for (int d = 0; d < kHeadDim; d += kLanes) store(values + d, load(values + d) * shrink);
        }
        // Nothing is seen yet of a row whose window begins behind this tile.
        const Vec from = broadcast(maximum == kMinusInfinity ? 0.0f : -maximum * factor);
        for (int t = 0; t < kTileTokens; t += kLanes) {
            const Vec w = exp2_negative(load(score + t) * factor + from);
            store(to + t, w);
            weights += w;
        }
        store(weight(head, vector), weights);
    }

    const BatchllmAttentionStep& step_;
    const BatchllmAttentionLayer& layer_;
    Work& work_;
    const int group_;  // query heads of a KV head
    Ahead ahead_ = {};
    int begin_ = 0;
    int num_vectors_ = 0;  // of each KV head
    int first_head_ = 0;
    int last_head_ = 0;
};

}  // namespace batchllm
