// Linear layers: products of rows with a weight of [outputs, inputs], added up in float32 whatever their type.
//
// A task is a block of rows and a panel of outputs. The product wants a panel's weights as [inputs, outputs]: in float32,
// or in bfloat16 with two inputs side by side where the processor multiplies these. Packed weights are kept that way, in
// their own type; elsewhere those of bfloat16, half as many bytes to read, are widened in the cache. A weight that others
// read too, an embedding's, stays as it is, and is brought into that layout panel by panel.
// A row's products are added up in the order of its inputs, whatever rows are beside it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <omp.h>

#include "functions.h"
#include "multiply.h"

namespace batchllm {
namespace {

constexpr int kPanel = 64;              // outputs
constexpr int kGate = kPanel / 2;       // of a gated panel the first half is of the gate, the second what it lets through
constexpr int kDepth = 512;             // inputs, or pairs of them, of a panel that are in the cache at a time
constexpr int kBlockBytes = 768 << 10;  // of a block's rows
constexpr int kMaxBlockRows = 240;
constexpr int kMinBlockRows = 24;
constexpr int kTasksPerThread = 4;
constexpr int64_t kMinParallelProducts = 1 << 22;  // below, waking threads takes longer than the work

inline int num_parts(int whole, int part) { return (whole + part - 1) / part; }

// The weight's row that is column `column` of a panel; beyond the last one, any.
inline int source_row(int panel, int column, int num_outputs, bool is_gated) {
    if (!is_gated) return std::min(panel * kPanel + column, num_outputs - 1);
    const int half = num_outputs / 2, output = std::min(panel * kGate + column % kGate, half - 1);
    return column < kGate ? output : half + output;
}
inline int num_panels(int num_outputs, bool is_gated) {
    return is_gated ? num_parts(num_outputs / 2, kGate) : num_parts(num_outputs, kPanel);
}

// A vector's worth of weights' rows, `depth` numbers of each, to columns.
inline void pack_rows(const float* const* rows, int depth, float* to) {
    int k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(rows[i] + k);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(to + (k + i) * kPanel, block[i]);
    }
    for (; k < depth; ++k)
        for (int i = 0; i < kLanes; ++i) to[k * kPanel + i] = rows[i][k];
}

// Of bfloat16 two numbers of a row stay side by side.
inline void pack_rows(const BFloat16* const* rows, int depth, BFloat16* to) {
    int k = 0;
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(reinterpret_cast<const float*>(rows[i] + k));
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + (k + 2 * i) * kPanel), block[i]);
    }
    for (; k < depth; ++k)
        for (int i = 0; i < kLanes; ++i) to[k / 2 * 2 * kPanel + 2 * i + k % 2] = rows[i][k];
    if (depth % 2 != 0)
        for (int i = 0; i < kLanes; ++i) to[(depth - 1) * kPanel + 2 * i + 1] = {0};
}

template <typename Scalar>
constexpr int kVectorStride = kLanes * (sizeof(float) / sizeof(Scalar));  // between vectors of a packed row of a panel

// Inputs [k, k + depth) of a panel.
template <typename Scalar>
void pack_panel(const Scalar* weight, int64_t stride, int panel, int k, int depth, int num_outputs, bool is_gated,
                Scalar* to) {
    for (int column = 0; column < kPanel; column += kLanes) {
        const Scalar* rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
            rows[i] = weight + source_row(panel, column + i, num_outputs, is_gated) * stride + k;
        pack_rows(rows, depth, to + column / kLanes * kVectorStride<Scalar>);
    }
}

template <typename Scalar>
using Product = typename ProductOf<Scalar>::Type;

// What a thread works with.
template <typename Scalar>
struct Workspace {
    std::vector<float> rows;
    alignas(64) Scalar packed[(kDepth * Product<Scalar>::kNumbers + 1) * kPanel];
    alignas(64) float panel[(kDepth + 1) * kPanel];
    alignas(64) float sum[kMaxBlockRows * kPanel];
};

template <typename Scalar>
class Linear {
   public:
    explicit Linear(const BatchllmLinear& layer)
        : layer_(layer),
          num_rows_(layer.num_rows),
          num_inputs_(layer.num_inputs),
          num_outputs_(layer.num_outputs),
          num_panels_(num_panels(num_outputs_, layer.is_gated)),
          packed_inputs_((num_inputs_ + 1) / 2 * 2) {
        const int most = std::clamp<int>(kBlockBytes / sizeof(float) / row_len(), kMinBlockRows, kMaxBlockRows);
        const int num_depths = num_parts(num_inputs_, kDepth * kNumbers);
        constexpr int kUnit = Fetch::kSteps * kNumbers;
        depth_ = num_parts(num_parts(num_inputs_, num_depths), kUnit) * kUnit;
        const bool is_parallel = num_rows_ * layer.num_inputs * num_outputs_ >= kMinParallelProducts;
        num_threads_ = is_parallel ? omp_get_max_threads() : 1;
        block_rows_ = num_parts(num_rows_, num_parts(num_rows_, most));
        const int min_tasks = num_threads_ == 1 ? 1 : kTasksPerThread * num_threads_;
        while (num_tasks() < min_tasks && block_rows_ > 2 * kMinBlockRows) block_rows_ = num_parts(block_rows_, 2);
        block_rows_ = std::min(num_parts(block_rows_, kTileRows) * kTileRows, kMaxBlockRows);
        if (!layer.is_gated)
            while (num_tasks() < min_tasks && width_ > kLanes) width_ /= 2;
    }

    void run() {
        std::atomic<int> next{0};
#pragma omp parallel num_threads(num_threads_)
        {
            static thread_local const auto work = std::make_unique<Workspace<Scalar>>();
            int block = -1;
            for (int task = next++, ahead; task < num_tasks(); task = ahead) {
                ahead = next++;  // is known now, so that its weights can be fetched meanwhile
                if (task / num_slices() != block) {
                    block = task / num_slices();
                    read_rows(block, *work);
                }
                run_task(task, ahead, *work);
            }
        }
    }

   private:
    static constexpr int kNumbers = Product<Scalar>::kNumbers;
    static constexpr bool kIsWidened = kNumbers * sizeof(Scalar) != sizeof(float);

    // A slice is `width_` columns of a panel.
    int num_slices() const { return num_panels_ * (kPanel / width_); }
    int num_tasks() const { return num_parts(num_rows_, block_rows_) * num_slices(); }
    // 32-bit numbers of a row; those a power of two apart would share few lines of the cache.
    int64_t row_len() const { return num_parts(num_inputs_, kNumbers) + 16; }

    void read_rows(int block, Workspace<Scalar>& work) const {
        const int first = block * block_rows_, count = std::min(block_rows_, num_rows_ - first);
        const size_t size = count * row_len();
        if (work.rows.size() < size) work.rows.resize(size);
        for (int row = 0; row < count; ++row) {
            const Scalar* from = static_cast<const Scalar*>(layer_.rows) + (first + row) * layer_.rows_stride;
            float* to = work.rows.data() + row * row_len();
            if constexpr (kIsWidened) {
                int k = 0;
                for (; k + kLanes <= num_inputs_; k += kLanes) store(to + k, load(from + k));
                for (; k < num_inputs_; ++k) to[k] = to_float(from[k]);
            } else {
                to[num_parts(num_inputs_, kNumbers) - 1] = 0;  // beside the last of an odd number
                std::memcpy(to, from, num_inputs_ * sizeof(Scalar));
            }
        }
    }

    const Scalar* packed(int panel, int k) const {
        return static_cast<const Scalar*>(layer_.weight) + (static_cast<int64_t>(panel) * packed_inputs_ + k) * kPanel;
    }

    // Inputs [k, k + depth) of a slice as the product takes them, kPanel apart.
    const float* weights(int panel, int column, int k, int depth, Workspace<Scalar>& work) const {
        const Scalar* from;
        if (layer_.weight_stride == 0) {
            from = packed(panel, k);
        } else {
            pack_panel(static_cast<const Scalar*>(layer_.weight), layer_.weight_stride, panel, k, depth, num_outputs_,
                       layer_.is_gated, work.packed);
            from = work.packed;
        }
        if constexpr (!kIsWidened) {
            return reinterpret_cast<const float*>(from) + column;
        } else {
            for (int i = 0; i < depth; i += 2)
                for (int j = column; j < column + width_; j += kLanes) {
                    const Vec pairs = load(reinterpret_cast<const float*>(from + i * kPanel + 2 * j));
                    const UnsignedVec bits = reinterpret_cast<const UnsignedVec&>(pairs);
                    UnsignedVec first = bits << 16, second = bits & 0xffff0000u;
                    store(work.panel + i * kPanel + j, reinterpret_cast<Vec&>(first));
                    store(work.panel + (i + 1) * kPanel + j, reinterpret_cast<Vec&>(second));
                }
            return work.panel + column;
        }
    }

    // What the product of these inputs asks for: packed weights that come next.
    Fetch fetch_after(int task, int ahead, int k) const {
        const bool is_last = k + depth_ >= num_inputs_;
        if (layer_.weight_stride != 0 || width_ < kPanel || (is_last && ahead >= num_tasks())) return {};
        const int slice = (is_last ? ahead : task) % num_slices(), start = is_last ? 0 : k + depth_;
        const int count = std::min(depth_, packed_inputs_ - start);
        return {reinterpret_cast<const char*>(packed(slice, start)), reinterpret_cast<const char*>(packed(slice, start + count))};
    }

    void run_task(int task, int ahead, Workspace<Scalar>& work) const {
        const int first = task / num_slices() * block_rows_, count = std::min(block_rows_, num_rows_ - first);
        const int slice = task % num_slices(), panel = slice / (kPanel / width_);
        const int column = slice % (kPanel / width_) * width_;
        for (int k = 0; k < num_inputs_; k += depth_) {
            const int depth = std::min(depth_, num_inputs_ - k);
            const float* weight = weights(panel, column, k, depth, work);
            const int units = num_parts(depth, kNumbers);
            Fetch fetch = fetch_after(task, ahead, k);
            fetch.spread((num_parts(count, kTileRows) - 1) * num_parts(units, Fetch::kSteps));
            for (int row = 0; row < count; row += kTileRows) {
                const int rows = std::min(kTileRows, count - row);
                const bool is_last = k + depth_ >= num_inputs_;
                if (is_last) fetch_out(first + row, rows, panel, column);
                const float* x = work.rows.data() + row * row_len() + k / kNumbers;
                float* sum = work.sum + row * kPanel;
                // The first rows' product waits for its own weights, as fast as memory gives them.
                Fetch* next = row == 0 ? nullptr : &fetch;
                const int columns = width_ / kLanes;
                if (k == 0)
                    multiply<Product<Scalar>, false>(rows, x, row_len(), weight, kPanel, sum, kPanel, units, columns, next);
                else
                    multiply<Product<Scalar>, true>(rows, x, row_len(), weight, kPanel, sum, kPanel, units, columns, next);
                if (is_last)  // at once: the processor writes them while it multiplies the next rows
                    for (int i = 0; i < rows; ++i) write(first + row + i, panel, column, sum + i * kPanel);
            }
        }
    }

    Scalar* out(int row, int panel, int column) const {
        const int first = layer_.is_gated ? panel * kGate : panel * kPanel + column;
        return static_cast<Scalar*>(layer_.out) + row * layer_.out_stride + first;
    }

    // Brings in what `write` will overwrite, or the processor would wait for it then.
    void fetch_out(int row, int num_rows, int panel, int column) const {
        const int bytes = (layer_.is_gated ? kGate : width_) * sizeof(Scalar);
        for (int i = 0; i < num_rows; ++i)
            for (int byte = 0; byte < bytes; byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(out(row + i, panel, column)) + byte, 1);
    }

    void write(int row, int panel, int column, float* sum) const {
        const Scalar* bias = static_cast<const Scalar*>(layer_.bias);
        if (bias != nullptr)
            for (int i = 0; i < width_; ++i)
                sum[i] += to_float(bias[source_row(panel, column + i, num_outputs_, layer_.is_gated)]);
        int count = std::min(width_, num_outputs_ - panel * kPanel - column);
        if (layer_.is_gated) {
            count = std::min(kGate, num_outputs_ / 2 - panel * kGate);
            for (int i = 0; i < kGate; i += kLanes) {
                const Vec gate = load(sum + i);
                store(sum + i, gate * sigmoid(gate) * load(sum + kGate + i));
            }
        }
        Scalar* to = out(row, panel, column);
        int i = 0;
        for (; i + kLanes <= count; i += kLanes) store(to + i, load(sum + i));
        for (; i < count; ++i) to[i] = from_float<Scalar>(sum[i]);
    }

    const BatchllmLinear& layer_;
    const int num_rows_, num_inputs_, num_outputs_, num_panels_;
    const int packed_inputs_;
    int depth_, block_rows_, num_threads_;
    int width_ = kPanel;
};

template <typename Scalar>
void pack(const void* weight, int64_t stride, void* to, int64_t num_outputs, int64_t num_inputs, bool is_gated) {
    const int64_t size = (num_inputs + 1) / 2 * 2 * kPanel;
#pragma omp parallel for
    for (int panel = 0; panel < num_panels(num_outputs, is_gated); ++panel)
        pack_panel(static_cast<const Scalar*>(weight), stride, panel, 0, num_inputs, num_outputs, is_gated,
                   static_cast<Scalar*>(to) + panel * size);
}

template <typename Scalar>
void unpack(const void* packed, void* weight, int64_t stride, int64_t num_outputs, int64_t num_inputs, bool is_gated) {
    constexpr int kSide = sizeof(float) / sizeof(Scalar);  // inputs side by side
    const int64_t size = (num_inputs + 1) / 2 * 2 * kPanel;
#pragma omp parallel for
    for (int panel = 0; panel < num_panels(num_outputs, is_gated); ++panel)
        for (int column = 0; column < kPanel; ++column) {
            const Scalar* from = static_cast<const Scalar*>(packed) + panel * size + column * kSide;
            Scalar* to = static_cast<Scalar*>(weight) + source_row(panel, column, num_outputs, is_gated) * stride;
            for (int k = 0; k < num_inputs; ++k) to[k] = from[k / kSide * kSide * kPanel + k % kSide];
        }
}

}  // namespace
}  // namespace batchllm

extern "C" {

void batchllm_linear_float32(const BatchllmLinear* layer) { batchllm::Linear<float>(*layer).run(); }
void batchllm_linear_bfloat16(const BatchllmLinear* layer) { batchllm::Linear<batchllm::BFloat16>(*layer).run(); }

// Elements of a packed weight.
int64_t batchllm_packed_size(int64_t num_outputs, int64_t num_inputs, int32_t is_gated) {
    return batchllm::num_panels(num_outputs, is_gated) * ((num_inputs + 1) / 2 * 2) * batchllm::kPanel;
}

// A weight of [outputs, inputs], its rows `stride` elements apart, to what the product reads.
void batchllm_pack_float32(const void* weight, int64_t stride, void* to, int64_t num_outputs, int64_t num_inputs,
                           int32_t is_gated) {
    batchllm::pack<float>(weight, stride, to, num_outputs, num_inputs, is_gated);
}
void batchllm_pack_bfloat16(const void* weight, int64_t stride, void* to, int64_t num_outputs, int64_t num_inputs,
                            int32_t is_gated) {
    batchllm::pack<batchllm::BFloat16>(weight, stride, to, num_outputs, num_inputs, is_gated);
}

// And back.
void batchllm_unpack_float32(const void* packed, void* weight, int64_t stride, int64_t num_outputs, int64_t num_inputs,
                             int32_t is_gated) {
    batchllm::unpack<float>(packed, weight, stride, num_outputs, num_inputs, is_gated);
}
void batchllm_unpack_bfloat16(const void* packed, void* weight, int64_t stride, int64_t num_outputs, int64_t num_inputs,
                              int32_t is_gated) {
    batchllm::unpack<batchllm::BFloat16>(packed, weight, stride, num_outputs, num_inputs, is_gated);
}
}
