// What attention is called with, by batchllm/kernels/cpu.py.
#pragma once

#include <cstdint>

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
