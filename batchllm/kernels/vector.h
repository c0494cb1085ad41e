// Vectors of the width that this file is compiled for, through the compiler's vector extension: one source for AVX-512,
// AVX2, NEON and whatever else.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace batchllm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileColumns = 4;  // vectors of a register tile: kTileRows x kTileColumns accumulators, of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileColumns = 2;  // of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileColumns = 4;
#endif
constexpr int kTileRows = 6;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

typedef uint32_t UnsignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));

// bfloat16 is the upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
// The compiler makes several instructions of a conversion between vectors of 16 and 32 bits.
inline UnsignedVec widen(const BFloat16* p) {
#if defined(__AVX512F__)
    return (UnsignedVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (UnsignedVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UnsignedVec);
#endif
}
inline void narrow(BFloat16* p, UnsignedVec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)v));
#else
    *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector(v, HalfVec);
#endif
}
inline Vec load(const BFloat16* p) {
    UnsignedVec bits = widen(p) << 16;
    return reinterpret_cast<Vec&>(bits);
}
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline void store(BFloat16* p, Vec v) {  // rounded as by `from_float`, numbers below 1.2e-38 perhaps to 0
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    const UnsignedVec bits = reinterpret_cast<UnsignedVec&>(v);
    const UnsignedVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UnsignedVec is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    narrow(p, is_nan ? UnsignedVec{} + 0x7fc0u : rounded);
#endif
}
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Each lane beside the one `kStride` away.
template <int kStride>
inline Vec swap_lanes(Vec x) {
    IntVec from;
    for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane ^ kStride;
    return __builtin_shuffle(x, from);
}

// Sum of all lanes.
inline float total(Vec x) {
    if constexpr (kLanes > 8) x += swap_lanes<8>(x);
    if constexpr (kLanes > 4) x += swap_lanes<4>(x);
    x += swap_lanes<2>(x);
    x += swap_lanes<1>(x);
    return x[0];
}

// The largest lane.
inline float highest(Vec x) {
    if constexpr (kLanes > 8) x = max(x, swap_lanes<8>(x));
    if constexpr (kLanes > 4) x = max(x, swap_lanes<4>(x));
    x = max(x, swap_lanes<2>(x));
    x = max(x, swap_lanes<1>(x));
    return x[0];
}

// Whether any lane of `x` is above `limit`.
inline bool exceeds(Vec x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
    return highest(x) > limit;
#endif
}

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};               // NaN stays NaN
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};  // nearest, ties to even
}

// 1 / x of normal numbers, to the last place but one.
inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
    const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

// 2 to the x for x <= 0, with a relative error below 4e-7; 0 for -infinity, NaN for NaN.
inline Vec exp2_negative(Vec x) {
    x = max(broadcast(-160.0f), x);  // in this order NaN stays NaN
#if defined(__AVX512F__)
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec magic = broadcast(12582912.0f);  // rounds to the nearest integer, in its low bits
    const Vec shifted = x + magic;
    const Vec n = shifted - magic;
#endif
    const Vec r = x - n;
    Vec p = broadcast(1.3390863e-3f);
    p = p * r + 9.6760318e-3f;
    p = p * r + 5.5503570e-2f;
    p = p * r + 2.4022107e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    UnsignedVec exponent = (reinterpret_cast<const UnsignedVec&>(shifted) << 23) + 0x3f800000u;
    const Vec result = p * reinterpret_cast<Vec&>(exponent);
    return n < broadcast(-126.0f) ? Vec{} : result;
#endif
}

// 1 / (1 + e^-x), for any x, with an error below 4e-7.
inline Vec sigmoid(Vec x) {
    const Vec below = exp2_negative(max(x, -x) * -kLog2E);  // e^-|x|
    const Vec high = inverse(below + 1.0f);
    return x < Vec{} ? below * high : high;
}

}  // namespace batchllm
