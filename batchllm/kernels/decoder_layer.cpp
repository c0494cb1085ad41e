// A decoder layer of Llama's kind in one call: the kernels of this folder in the order of the model's code, on buffers of
// a step. Each reads what the one before it wrote while that is in the cache, and nobody goes through Python in between.

#include <cstdint>

#include "functions.h"

extern "C" {

// A layer: its weights, and all that is the same in every step. What a step says is set in copies of these.
struct BatchllmDecoderLayer {
    BatchllmLinear qkv, output, gate_up, down;  // gate_up is gated
    BatchllmAttentionLayer attention;
    const void* input_norm;
    const void* post_norm;
    const void* query_norm;  // of each head's queries, and of its keys; or null
    const void* key_norm;
    float input_epsilon;
    float post_epsilon;
    float query_epsilon;
    float key_epsilon;
    const void* cos_sin_cache;
    int64_t num_positions;
    int32_t rotary_dim;
    int32_t is_neox;
    int64_t element_bytes;
};

// A step. Arrays have `num_rows` entries.
struct BatchllmDecoderStep {
    const BatchllmAttentionStep* attention;
    const int64_t* positions;
    const int64_t* slots;  // where in the pool each row's KV goes
    int64_t num_rows;
    // Buffers of `num_rows` rows; `activated` may be where the two before it are.
    void* normed;
    void* qkv;
    void* attended;
    void* activated;
};
}

namespace {

struct Float32 {
    static constexpr auto linear = batchllm_linear_float32;
    static constexpr auto attention = batchllm_attention_float32;
    static constexpr auto rms_norm = batchllm_rms_norm_float32;
    static constexpr auto rotary_embedding = batchllm_rotary_embedding_float32;
};

struct BFloat16 {
    static constexpr auto linear = batchllm_linear_bfloat16;
    static constexpr auto attention = batchllm_attention_bfloat16;
    static constexpr auto rms_norm = batchllm_rms_norm_bfloat16;
    static constexpr auto rotary_embedding = batchllm_rotary_embedding_bfloat16;
};

template <typename Kernels>
void multiply(BatchllmLinear layer, const void* rows, void* out, int64_t num_rows) {
    layer.rows = rows;
    layer.rows_stride = layer.num_inputs;
    layer.out = out;
    layer.out_stride = layer.is_gated ? layer.num_outputs / 2 : layer.num_outputs;
    layer.num_rows = num_rows;
    Kernels::linear(&layer);
}

// In place, heads of `head_dim` that stand side by side in rows of `stride` bytes.
template <typename Kernels>
void norm_heads(char* rows, int64_t stride, const void* weight, float epsilon, int64_t num_rows, int num_heads, int head_dim) {
#pragma omp parallel for if (num_rows * num_heads * head_dim >= batchllm::kMinParallelElements)
    for (int64_t row = 0; row < num_rows; ++row)
        Kernels::rms_norm(rows + row * stride, nullptr, weight, rows + row * stride, num_heads, head_dim, epsilon);
}

void store_kv(const BatchllmDecoderLayer& layer, const BatchllmDecoderStep& step, const char* key, const char* value) {
    const BatchllmAttentionLayer& heads = layer.attention;
    const int64_t bytes = layer.element_bytes, width = bytes * heads.num_kv_heads * heads.head_dim;
    const int64_t stride = bytes * layer.qkv.num_outputs;
    // The pool is this step's to write; attention only reads it.
    const BatchllmRows keys{key, stride, const_cast<void*>(heads.key_cache), bytes * heads.key_stride, width};
    const BatchllmRows values{value, stride, const_cast<void*>(heads.value_cache), bytes * heads.value_stride, width};
    batchllm_store_kv(&keys, &values, step.slots, step.num_rows);
}

template <typename Kernels>
int decoder_layer(const BatchllmDecoderLayer& layer, const BatchllmDecoderStep& step, void* x, void* residual, void* out) {
    const int64_t num_rows = step.num_rows, hidden_size = layer.qkv.num_inputs;
    BatchllmAttentionLayer attention = layer.attention;
    Kernels::rms_norm(x, residual, layer.input_norm, step.normed, num_rows, hidden_size, layer.input_epsilon);
    if (residual == nullptr) residual = x;
    multiply<Kernels>(layer.qkv, step.normed, step.qkv, num_rows);
    char* query = static_cast<char*>(step.qkv);
    char* key = query + layer.element_bytes * attention.num_heads * attention.head_dim;
    char* value = key + layer.element_bytes * attention.num_kv_heads * attention.head_dim;
    if (layer.query_norm != nullptr) {
        const int64_t stride = layer.element_bytes * layer.qkv.num_outputs;
        norm_heads<Kernels>(query, stride, layer.query_norm, layer.query_epsilon, num_rows, attention.num_heads,
                            attention.head_dim);
        norm_heads<Kernels>(key, stride, layer.key_norm, layer.key_epsilon, num_rows, attention.num_kv_heads,
                            attention.head_dim);
    }
    if (Kernels::rotary_embedding(step.positions, query, key, layer.qkv.num_outputs, layer.qkv.num_outputs,
                                  layer.cos_sin_cache, layer.num_positions, num_rows, attention.num_heads,
                                  attention.num_kv_heads, attention.head_dim, layer.rotary_dim, layer.is_neox))
        return 1;
    store_kv(layer, step, key, value);
    attention.query = query;
    attention.query_stride = layer.qkv.num_outputs;
    attention.output = step.attended;
    attention.output_stride = layer.output.num_inputs;
    if (Kernels::attention(step.attention, &attention)) return 2;
    multiply<Kernels>(layer.output, step.attended, out, num_rows);
    Kernels::rms_norm(out, residual, layer.post_norm, step.normed, num_rows, hidden_size, layer.post_epsilon);
    multiply<Kernels>(layer.gate_up, step.normed, step.activated, num_rows);
    multiply<Kernels>(layer.down, step.activated, out, num_rows);
    return 0;
}

}  // namespace

extern "C" {

// out = what the layer adds to `residual`, to which it has added `x`; without a residual, of the first layer, `x` is it.
// All of [num_rows, hidden_size]; `out` may be `x` where that is not the residual. 0, 1 where the cache of cosines lacks a
// position, or 2 where the shape of the heads is not supported.
int batchllm_decoder_layer_float32(const BatchllmDecoderLayer* layer, const BatchllmDecoderStep* step, void* x,
                                   void* residual, void* out) {
    return decoder_layer<Float32>(*layer, *step, x, residual, out);
}
int batchllm_decoder_layer_bfloat16(const BatchllmDecoderLayer* layer, const BatchllmDecoderStep* step, void* x,
                                    void* residual, void* out) {
    return decoder_layer<BFloat16>(*layer, *step, x, residual, out);
}
}
