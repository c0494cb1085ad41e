// Products of small matrices in registers, and what brings matrices into their layout.
#pragma once

#include <algorithm>

#include "vector.h"

namespace batchllm {

// What a product asks for as it goes, for the next one: a stretch of memory, some cache lines at each `kSteps` of its depth.
struct Fetch {
    static constexpr int kSteps = 32;
    // Of more the processor drops some, and its own prefetching loses the thread in the gaps.
    static constexpr int kMostLines = 32;
    const char* from = nullptr;
    const char* end = nullptr;
    int num_lines = 0;

    // Spreads the stretch over so many steps.
    void spread(int num_steps) {
        const int count = static_cast<int>((end - from + 63) / 64);
        num_lines = std::min(kMostLines, (count + num_steps - 1) / std::max(1, num_steps));
    }

    void some() {
        for (int i = 0; i < num_lines && from < end; ++i, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// What the matrices of a product consist of, 32 bits each: numbers of float32, or pairs of bfloat16.
struct Singles {
    static constexpr int kNumbers = 1;
    static Vec spread(const float* p) { return broadcast(*p); }
    static Vec add_product(Vec sum, Vec left, Vec right) { return sum + left * right; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    static constexpr int kNumbers = 2;
    static Vec spread(const float* p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return (Vec)_mm512_set1_epi32(bits);
    }
    static Vec add_product(Vec sum, Vec left, Vec right) {
        return _mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
    }
    // In place: the numbers of two vectors in pairs of one from each, those of their first halves in `first`.
    static void pair(Vec& first, Vec& second) {
        typedef int16_t Order __attribute__((vector_size(64)));
        Order low, high;
        for (int16_t i = 0; i < kLanes; ++i) {
            low[2 * i] = i, low[2 * i + 1] = 2 * kLanes + i;
            high[2 * i] = kLanes + i, high[2 * i + 1] = 3 * kLanes + i;
        }
        const __m512i a = (__m512i)first, b = (__m512i)second;
        first = (Vec)_mm512_permutex2var_epi16(a, (__m512i)low, b);
        second = (Vec)_mm512_permutex2var_epi16(a, (__m512i)high, b);
    }
};
#endif

// Of matrices of `Scalar`, with `kWhole` where an odd number in a row need not be thought of.
template <typename Scalar, bool kWhole = true>
struct ProductOf {
    using Type = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<BFloat16, true> {
    using Type = Pairs;
};
#endif

// C[rows x columns vectors] (+)= A[rows x depth] B[depth x columns vectors], kept in registers.
template <typename Product, int kRows, int kColumns, bool kAccumulate>
inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth,
                          Fetch* fetch) {
    Vec sum[kRows][kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) sum[i][j] = kAccumulate ? load(c + i * ldc + j * kLanes) : Vec{};
    for (int start = 0; start < depth; start += Fetch::kSteps) {
        if (fetch != nullptr) fetch->some();
        const int end = std::min(depth, start + Fetch::kSteps);
        for (int k = start; k < end; ++k) {
            Vec right[kColumns];
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const Vec left = Product::spread(a + i * lda + k);
#pragma GCC unroll 8
                for (int j = 0; j < kColumns; ++j) sum[i][j] = Product::add_product(sum[i][j], left, right[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

template <typename Product, int kColumns, bool kAccumulate>
inline void multiply_columns(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                             int depth, Fetch* fetch) {
    int i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
        multiply_tile<Product, kTileRows, kColumns, kAccumulate>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, fetch);
    a += i * lda;
    c += i * ldc;
    switch (rows - i) {
        case 5: return multiply_tile<Product, 5, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 4: return multiply_tile<Product, 4, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 3: return multiply_tile<Product, 3, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 2: return multiply_tile<Product, 2, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
        case 1: return multiply_tile<Product, 1, kColumns, kAccumulate>(a, lda, b, ldb, c, ldc, depth, fetch);
    }
}

// C (+)= A B; columns in vectors, `ldb` and `ldc` in elements. An element's products are added up in the order of the
// depth, whatever the numbers of rows and columns.
template <typename Product, bool kAccumulate>
inline void multiply(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth,
                     int columns, Fetch* fetch = nullptr) {
    int j = 0;
    for (; j + kTileColumns <= columns; j += kTileColumns)
        multiply_columns<Product, kTileColumns, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                                    j == 0 ? fetch : nullptr);
    if (j + 2 <= columns && kTileColumns > 2) {
        multiply_columns<Product, 2, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                         j == 0 ? fetch : nullptr);
        j += 2;
    }
    for (; j < columns; ++j)
        multiply_columns<Product, 1, kAccumulate>(rows, a, lda, b + j * kLanes, ldb, c + j * kLanes, ldc, depth,
                                         j == 0 ? fetch : nullptr);
}

template <int kStride>
inline void interleave(Vec& low, Vec& high) {
    IntVec from_low, from_high;
    for (int lane = 0; lane < kLanes; ++lane) {
        bool is_odd = lane & kStride;
        from_low[lane] = is_odd ? lane - kStride + kLanes : lane;
        from_high[lane] = is_odd ? lane + kLanes : lane + kStride;
    }
    const Vec first = __builtin_shuffle(low, high, from_low);
    high = __builtin_shuffle(low, high, from_high);
    low = first;
}
template <int kStride>
inline void interleave_all(Vec* rows) {
    for (int i = 0; i < kLanes; ++i)
        if (!(i & kStride)) interleave<kStride>(rows[i], rows[i + kStride]);
}

// In place: element j of row i becomes element i of row j.
inline void transpose(Vec* rows) {
    interleave_all<1>(rows);
    interleave_all<2>(rows);
    if constexpr (kLanes > 4) interleave_all<4>(rows);
    if constexpr (kLanes > 8) interleave_all<8>(rows);
}

}  // namespace batchllm
