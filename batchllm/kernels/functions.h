// What linear layers and the operations between them are called with, by batchllm/kernels/cpu.py and decoder_layer.cpp.
#pragma once

#include <cstdint>

#include "attention_step.h"

namespace batchllm {
constexpr int64_t kMinParallelElements = 1 << 17;  // below, waking threads takes longer than the work
}

extern "C" {

// One product. Strides are those of a row, in elements.
struct BatchllmLinear {
    const void* rows;
    int64_t rows_stride;
    const void* weight;     // packed, or [outputs, inputs]
    int64_t weight_stride;  // 0: packed
    const void* bias;       // of the outputs, or null
    void* out;
    int64_t out_stride;
    int64_t num_rows;
    int64_t num_inputs;
    int64_t num_outputs;
    int32_t is_gated;  // packed as such: out = silu(first half of the outputs) * second half
};

// Rows of keys or values, and the pool that they go to. Strides in bytes.
struct BatchllmRows {
    const void* from;
    int64_t stride;
    void* cache;
    int64_t cache_stride;
    int64_t bytes;
};

void batchllm_linear_float32(const BatchllmLinear* layer);
void batchllm_linear_bfloat16(const BatchllmLinear* layer);
int batchllm_attention_float32(const BatchllmAttentionStep* step, const BatchllmAttentionLayer* layer);
int batchllm_attention_bfloat16(const BatchllmAttentionStep* step, const BatchllmAttentionLayer* layer);
void batchllm_rms_norm_float32(const void* x, void* residual, const void* weight, void* out, int64_t num_rows,
                               int64_t size, float epsilon);
void batchllm_rms_norm_bfloat16(const void* x, void* residual, const void* weight, void* out, int64_t num_rows,
                                int64_t size, float epsilon);
int batchllm_rotary_embedding_float32(const int64_t* positions, void* query, void* key, int64_t query_stride,
                                      int64_t key_stride, const void* cos_sin_cache, int64_t num_positions,
                                      int64_t num_tokens, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                                      int32_t rotary_dim, int32_t is_neox);
int batchllm_rotary_embedding_bfloat16(const int64_t* positions, void* query, void* key, int64_t query_stride,
                                       int64_t key_stride, const void* cos_sin_cache, int64_t num_positions,
                                       int64_t num_tokens, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                                       int32_t rotary_dim, int32_t is_neox);
void batchllm_store_kv(const BatchllmRows* keys, const BatchllmRows* values, const int64_t* slots, int64_t num_rows);
}
