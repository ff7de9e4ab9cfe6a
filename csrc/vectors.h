// Vectors of floats, exp2, and 16 bits to 32 and back. Included once by each isa_*.cpp, after LANES is said.
//
// No function of the standard library is used here, and all has internal linkage; see attention.h.
#pragma once

#include <cstdint>

#include "attention.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvkern {
namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef std::int32_t IVec __attribute__((vector_size(4 * LANES)));
// Where 512 bits are one operation and 256 bits two at a time, half a vector serves few rows twice as fast.
#if LANES == 16
typedef float Half __attribute__((vector_size(32)));
typedef std::int32_t IHalf __attribute__((vector_size(32)));
#else
typedef Vec Half;
typedef IVec IHalf;
#endif

// The vector of integers, and the number of lanes, of a vector of floats.
template <class V>
struct Integers {
    typedef IVec Type;
};
#if LANES == 16
template <>
struct Integers<Half> {
    typedef IHalf Type;
};
#endif
template <class V>
using Int = typename Integers<V>::Type;
template <class V>
constexpr int lanes = static_cast<int>(sizeof(V) / sizeof(float));
// The vectors that hold a row of a block side by side.
template <class V, int N>
using Vecs = V[static_cast<unsigned>(N)];

constexpr float INF = __builtin_inff();

template <class V = Vec>
inline V set1(float x) {
    return x - V{};
}

// 32 bits, whatever they mean, in every lane.
template <class V>
inline V broadcast(const char* from) {
    std::int32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return (V)(word + Int<V>{});
}

template <class V = Vec>
inline V& at(float* data) {
    return *reinterpret_cast<V*>(data);
}

template <class V = Vec>
inline V at(const float* data) {
    return *reinterpret_cast<const V*>(data);
}

// a * b + c: one rounding where the instruction set has it, two where it has not. Never left to the compiler.
// max: b where the two are equal or one is NaN.
#if LANES == 16
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#endif
#if defined(__FMA__)
inline Half fma(Half a, Half b, Half c) { return (Half)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Half max(Half a, Half b) { return (Half)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// 2^x for x < 128: within 1.2 parts in 2^24 (1.6 without fma) from -126 up, whole numbers exact; 0 below -126.5, and between
// the two a subnormal; NaN where x is.
template <class V>
inline V exp2(V x) {
    // The magic number leaves x rounded to an integer in its lowest bits, and 127 more: an exponent, 0 for -127.
    const V magic = set1<V>(12582912.0f + 127.0f);
    const V bounded = max(set1<V>(-127.0f), x);
    const V t = bounded + magic;
    const V f = bounded - (t - magic);
    const V scale = (V)((Int<V>)t << 23);

    V y = set1<V>(0x1.44175ep-13f);
    y = fma(y, f, set1<V>(0x1.5ef5d0p-10f));
    y = fma(y, f, set1<V>(0x1.3b2a54p-7f));
    y = fma(y, f, set1<V>(0x1.c6af9cp-5f));
    y = fma(y, f, set1<V>(0x1.ebfbe0p-3f));
    y = fma(y, f, set1<V>(0x1.62e430p-1f));
    y = fma(y, f, set1<V>(1.0f));
    return y * scale;
}

// A state that has seen no key has m = -inf; a finite pivot keeps -inf - -inf (NaN) out of exp2.
template <class V>
inline V pivot_of(V m) {
    return m == set1<V>(-INF) ? set1<V>(0.0f) : m;
}

// -- 16 bits to 32 and back --------------------------------------------------------------------------------------------

union Bits {
    float f;
    std::uint32_t u;
};

inline float float_of(std::uint32_t u) {
    Bits bits;
    bits.u = u;
    return bits.f;
}

inline std::uint32_t bits_of(float f) {
    Bits bits;
    bits.f = f;
    return bits.u;
}

inline float widen_half(std::uint16_t h) {
    const std::uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
    // The exponent's bias is 15 there and 127 here: a product by 2^112 is exact and makes subnormals normal.
    const std::uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

__attribute__((always_inline)) inline void widen(Dtype dtype, const char* from, float* to, std::int64_t count) {
    if (dtype == FP32) {
        __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
        return;
    }
    const auto* source = reinterpret_cast<const std::uint16_t*>(from);
    if (dtype == BF16) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = float_of(static_cast<std::uint32_t>(source[i]) << 16);
        return;
    }
    std::int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
    for (; i < count; ++i) to[i] = widen_half(source[i]);
}

// To nearest, ties to even, as torch does it; every NaN becomes the quiet one.
inline std::uint16_t narrow_brain(float x) {
    const std::uint32_t u = bits_of(x);
    return static_cast<std::uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline std::uint16_t narrow_half(float x) {
    const std::uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    std::uint32_t h;
    if (magnitude > 0x7f800000u) {
        h = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
        h = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum rounds at 2^-24, the step of subnormals
        h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        h = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<std::uint16_t>(sign | h);
}

inline void narrow(Dtype dtype, const float* from, char* to, std::int64_t count) {
    auto* target = reinterpret_cast<std::uint16_t*>(to);
    if (dtype == FP32)
        __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    else if (dtype == BF16)
        for (std::int64_t i = 0; i < count; ++i) target[i] = narrow_brain(from[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) target[i] = narrow_half(from[i]);
}

inline std::int64_t size_of(Dtype dtype) { return dtype == FP32 ? 4 : 2; }

}  // namespace
}  // namespace kvkern
