// The small operations between a model's matrix products, each one pass over its data: RMS norm with the residual added,
// SwiGLU's activation, rotary embedding, and writing KV into the pool.

#include <cmath>
#include <initializer_list>

#include "functions.h"
#include "vector.h"

namespace batchllm {
namespace {

template <typename Scalar>
void rms_norm_row(const Scalar* x, Scalar* residual, const Scalar* weight, Scalar* out, int64_t size, float epsilon) {
    const int64_t whole = size / kLanes * kLanes;
    Vec squares = Vec{};
    float square_rest = 0;
    // The sum is kept exact in `residual` for float32; for bfloat16 it is rounded there only.
    for (int64_t i = 0; i < whole; i += kLanes) {
        Vec v = load(x + i);
        if (residual != nullptr) v += load(residual + i);
        squares += v * v;
    }
    for (int64_t i = whole; i < size; ++i) {
        float v = to_float(x[i]) + (residual != nullptr ? to_float(residual[i]) : 0.0f);
        square_rest += v * v;
    }
    const float scale = 1.0f / std::sqrt((total(squares) + square_rest) / static_cast<float>(size) + epsilon);
    for (int64_t i = 0; i < whole; i += kLanes) {
        Vec v = load(x + i);
        if (residual != nullptr) {
            v += load(residual + i);
            store(residual + i, v);
        }
        store(out + i, v * scale * load(weight + i));
    }
    for (int64_t i = whole; i < size; ++i) {
        float v = to_float(x[i]);
        if (residual != nullptr) {
            v += to_float(residual[i]);
            residual[i] = from_float<Scalar>(v);
        }
        out[i] = from_float<Scalar>(v * scale * to_float(weight[i]));
    }
}

template <typename Scalar>
void rms_norm(const void* x, void* residual, const void* weight, void* out, int64_t num_rows, int64_t size,
              float epsilon) {
#pragma omp parallel for if (num_rows * size >= kMinParallelElements)
    for (int64_t row = 0; row < num_rows; ++row)
        rms_norm_row(static_cast<const Scalar*>(x) + row * size,
                     residual == nullptr ? nullptr : static_cast<Scalar*>(residual) + row * size,
                     static_cast<const Scalar*>(weight), static_cast<Scalar*>(out) + row * size, size, epsilon);
}

template <typename Scalar>
void silu_and_mul(const void* x, void* out, int64_t num_rows, int64_t size) {
#pragma omp parallel for if (num_rows * size >= kMinParallelElements)
    for (int64_t row = 0; row < num_rows; ++row) {
        const Scalar* gate = static_cast<const Scalar*>(x) + row * 2 * size;
        const Scalar* up = gate + size;
        Scalar* to = static_cast<Scalar*>(out) + row * size;
        const int64_t whole = size / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) {
            const Vec g = load(gate + i);
            store(to + i, g * sigmoid(g) * load(up + i));
        }
        for (int64_t i = whole; i < size; ++i) {
            const float g = to_float(gate[i]);
            to[i] = from_float<Scalar>(g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    }
}

// One head: pairs (i, i + half) or, interleaved, (2 i, 2 i + 1), turned by the angle of their frequency.
template <typename Scalar>
void rotate_head(Scalar* head, const Scalar* cos, const Scalar* sin, int half, bool is_neox) {
    const int stride = is_neox ? 1 : 2;
    const int second = is_neox ? half : 1;
    int i = 0;
    if (is_neox)
        for (; i + kLanes <= half; i += kLanes) {
            const Vec c = load(cos + i), s = load(sin + i);
            const Vec a = load(head + i), b = load(head + half + i);
            store(head + i, a * c - b * s);
            store(head + half + i, b * c + a * s);
        }
    for (; i < half; ++i) {
        const float c = to_float(cos[i]), s = to_float(sin[i]);
        const float a = to_float(head[i * stride]), b = to_float(head[i * stride + second]);
        head[i * stride] = from_float<Scalar>(a * c - b * s);
        head[i * stride + second] = from_float<Scalar>(b * c + a * s);
    }
}

template <typename Scalar>
int rotary_embedding(const int64_t* positions, void* query, void* key, int64_t query_stride, int64_t key_stride,
                     const void* cos_sin_cache, int64_t num_positions, int64_t num_tokens, int num_heads, int num_kv_heads,
                     int head_dim, int rotary_dim, int is_neox) {
    for (int64_t token = 0; token < num_tokens; ++token)
        if (positions[token] < 0 || positions[token] >= num_positions) return 1;
    const int half = rotary_dim / 2;
#pragma omp parallel for if (num_tokens * num_heads * head_dim >= kMinParallelElements)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Scalar* cos = static_cast<const Scalar*>(cos_sin_cache) + positions[token] * rotary_dim;
        Scalar* q = static_cast<Scalar*>(query) + token * query_stride;
        Scalar* k = static_cast<Scalar*>(key) + token * key_stride;
        for (int head = 0; head < num_heads; ++head) rotate_head(q + head * head_dim, cos, cos + half, half, is_neox);
        for (int head = 0; head < num_kv_heads; ++head)
            rotate_head(k + head * head_dim, cos, cos + half, half, is_neox);
    }
    return 0;
}

}  // namespace
}  // namespace batchllm

extern "C" {

// out = norm(x) * weight, or, with a residual, residual += x and out = norm(residual) * weight. Rows are contiguous.
void batchllm_rms_norm_float32(const void* x, void* residual, const void* weight, void* out, int64_t num_rows,
                               int64_t size, float epsilon) {
    batchllm::rms_norm<float>(x, residual, weight, out, num_rows, size, epsilon);
}
void batchllm_rms_norm_bfloat16(const void* x, void* residual, const void* weight, void* out, int64_t num_rows,
                                int64_t size, float epsilon) {
    batchllm::rms_norm<batchllm::BFloat16>(x, residual, weight, out, num_rows, size, epsilon);
}

// out[r, i] = silu(x[r, i]) * x[r, size + i].
void batchllm_silu_and_mul_float32(const void* x, void* out, int64_t num_rows, int64_t size) {
    batchllm::silu_and_mul<float>(x, out, num_rows, size);
}
void batchllm_silu_and_mul_bfloat16(const void* x, void* out, int64_t num_rows, int64_t size) {
    batchllm::silu_and_mul<batchllm::BFloat16>(x, out, num_rows, size);
}

// In place. Strides are those of a token, in elements; heads are contiguous. 0, or 1 where the cache lacks a position;
// nothing is turned then.
int batchllm_rotary_embedding_float32(const int64_t* positions, void* query, void* key, int64_t query_stride,
                                       int64_t key_stride, const void* cos_sin_cache, int64_t num_positions, int64_t num_tokens,
                                       int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t rotary_dim,
                                       int32_t is_neox) {
    return batchllm::rotary_embedding<float>(positions, query, key, query_stride, key_stride, cos_sin_cache, num_positions,
                                             num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, is_neox);
}
int batchllm_rotary_embedding_bfloat16(const int64_t* positions, void* query, void* key, int64_t query_stride,
                                        int64_t key_stride, const void* cos_sin_cache, int64_t num_positions, int64_t num_tokens,
                                        int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t rotary_dim,
                                        int32_t is_neox) {
    return batchllm::rotary_embedding<batchllm::BFloat16>(positions, query, key, query_stride, key_stride, cos_sin_cache,
                                                          num_positions, num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, is_neox);
}

// cache[slots[t]] = rows[t] of keys and of values, rows of `bytes` bytes; strides in bytes.
void batchllm_store_kv(const BatchllmRows* keys, const BatchllmRows* values, const int64_t* slots, int64_t num_rows) {
#pragma omp parallel for if (num_rows * (keys->bytes + values->bytes) >= batchllm::kMinParallelElements * 4)
    for (int64_t t = 0; t < num_rows; ++t)
        for (const BatchllmRows* rows : {keys, values})
            std::memcpy(static_cast<char*>(rows->cache) + slots[t] * rows->cache_stride,
                        static_cast<const char*>(rows->from) + t * rows->stride, rows->bytes);
}
}
