// Products of small matrices in registers, and what brings matrices into their layout.
#pragma once

#include <algorithm>

#include "vector.h"

namespace batchllm {

// What a product brings into the cache as it goes, for the next one: at each `kFetchSteps` of its depth, some pieces.
struct Fetch {
    static constexpr int kSteps = 32;  // of the depth
    const char* from = nullptr;
    int64_t step_bytes = 0;
    int64_t piece_stride = 0;  // bytes
    int piece_bytes = 0;
    int num_pieces = 0;

    // Brought in at step `k`, a multiple of `kSteps`.
    void at(int k) const {
        const char* piece = from + k / kSteps * step_bytes;
        for (int i = 0; i < num_pieces; ++i, piece += piece_stride)
            for (int byte = 0; byte < piece_bytes; byte += 64) __builtin_prefetch(piece + byte, 0, 2);
    }
};

// C[rows x columns vectors] (+)= A[rows x depth] B[depth x columns vectors], kept in registers.
template <int kRows, int kColumns, bool kAccumulate>
inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth,
                          const Fetch& fetch) {
    Vec sum[kRows][kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) sum[i][j] = kAccumulate ? load(c + i * ldc + j * kLanes) : Vec{};
    for (int start = 0; start < depth; start += Fetch::kSteps) {
        fetch.at(start);
        const int end = std::min(depth, start + Fetch::kSteps);
        for (int k = start; k < end; ++k) {
            Vec right[kColumns];
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                Vec left = broadcast(a[i * lda + k]);
#pragma GCC unroll 8
                for (int j = 0; j < kColumns; ++j) sum[i][j] += left * right[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int kColumns, bool kAccumulate>
inline void multiply_columns(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                             int depth, const Fetch& fetch) {
    int i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
        multiply_tile<kTileRows, kColumns, kAccumulate>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, fetch);
    a += i * lda;
    c += i * ldc;
    switch (rows - i) {
        case 5: return multiply_tile<5, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 4: return multiply_tile<4, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 3: return multiply_tile<3, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 2: return multiply_tile<2, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 1: return multiply_tile<1, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
    }
}

// C (+)= A B; columns in vectors, `ldb` and `ldc` in elements. An element's products are added up in the order of the
// depth, whatever the numbers of rows and columns.
template <bool kAccumulate>
inline void multiply(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth,
                     int columns, const Fetch& fetch = {}) {
    int j = 0;
    for (; j + kTileColumns <= columns; j += kTileColumns)
        multiply_columns<kTileColumns, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                                    j == 0 ? fetch : Fetch{});
    if (j + 2 <= columns && kTileColumns > 2) {
        multiply_columns<2, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                         j == 0 ? fetch : Fetch{});
        j += 2;
    }
    for (; j < columns; ++j)
        multiply_columns<1, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                         j == 0 ? fetch : Fetch{});
}

template <int kStride>
inline void interleave(Vec* rows) {
    for (int i = 0; i < kLanes; ++i) {
        if (i & kStride) continue;
        Vec low = rows[i], high = rows[i + kStride];
        IntVec from_low, from_high;
        for (int lane = 0; lane < kLanes; ++lane) {
            bool is_odd = lane & kStride;
            from_low[lane] = is_odd ? lane - kStride + kLanes : lane;
            from_high[lane] = is_odd ? lane + kLanes : lane + kStride;
        }
        rows[i] = __builtin_shuffle(low, high, from_low);
        rows[i + kStride] = __builtin_shuffle(low, high, from_high);
    }
}

// In place: element j of row i becomes element i of row j.
inline void transpose(Vec* rows) {
    interleave<1>(rows);
    interleave<2>(rows);
    if constexpr (kLanes > 4) interleave<4>(rows);
    if constexpr (kLanes > 8) interleave<8>(rows);
}

}  // namespace batchllm
