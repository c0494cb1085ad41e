// Attention of one step and layer on a CPU: each segment of shared KV is read once for a block of rows that share it.
//
// The layout is that of batchllm/attention/layout.py. The query rows, in its order, are cut into blocks; a task is a
// block and a KV head. Within a task the KV goes by in tiles: first those of the segments, each for the rows of the block
// that read it, then those of each sequence's private part. The softmax is the running one of FlashAttention (Dao et al.
// 2022), which merges the parts by their log-sum-exp as it goes. A tile that enough rows read is packed (keys transposed) and
// multiplied in register tiles; for a few rows, packing would cost more than it saves, and plain dot products are used.

#include <algorithm>
#include <memory>

#include <omp.h>

#include "attention_block.h"

namespace batchllm {
namespace {

constexpr int kMinBlockVectors = 32;
constexpr int kTasksPerThread = 2;

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
        static thread_local const auto work = std::make_unique<Workspace<Scalar, kHeadDim>>();
        work->resize(block_rows * group * task_heads);
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
