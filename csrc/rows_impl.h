// Norm, RoPE and SiLU of a row, rounded to the storage's dtype where the modules of transformers round. Included once by each
// isa_*.cpp, after LANES, NAME and TABLE are said.
//
// A sum is 16 sums, of the elements that leave the same rest by 16, added in a fixed tree; all else is done to each element
// alone, and no product is joined with a sum. So bits follow neither the width of vectors nor fma, but for SiLU's exponential
// without fma (portable on x86-64).
//
// No function of the standard library is used here, and all has internal linkage; see attention.h.
#include <cstdint>

#include "rows.h"
#include "vectors.h"

namespace kvkern {
namespace {

// Through storage and back.
inline void round_row(Dtype dtype, float* x, std::int64_t count) {
    if (dtype == BF16)
        for (std::int64_t i = 0; i < count; ++i) x[i] = float_of(static_cast<std::uint32_t>(narrow_brain(x[i])) << 16);
    else if (dtype == FP16)
        for (std::int64_t i = 0; i < count; ++i) x[i] = widen_half(narrow_half(x[i]));
}

inline float sum_of_squares(const float* x, std::int64_t count) {
    constexpr int PARTS = 16 / LANES;
    alignas(64) float lane[16] = {};
    Vec sum[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sum[p] = Vec{};
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) {
            Vec v;
            __builtin_memcpy(&v, x + i + p * LANES, sizeof v);
            sum[p] = sum[p] + v * v;
        }
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) at<Vec>(lane + p * LANES) = sum[p];
    for (int j = 0; i + j < count; ++j) lane[j] = lane[j] + x[i + j] * x[i + j];
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
    return lane[0];
}

// x -> x / rms(x) * weight, in fp32; the two products are rounded to storage.
inline void norm_row(Dtype dtype, float* x, const char* weight, float* wide_weight, std::int64_t size, float eps) {
    const float mean = sum_of_squares(x, size) / static_cast<float>(size);
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    widen(dtype, weight, wide_weight, size);
    for (std::int64_t i = 0; i < size; ++i) x[i] = x[i] * factor;
    round_row(dtype, x, size);
    for (std::int64_t i = 0; i < size; ++i) x[i] = x[i] * wide_weight[i];
}

void row_norm(const RowNorm& call, std::int64_t row, float* scratch) {
    const std::int64_t size = call.size, bytes = size * size_of(call.dtype);
    float *x = scratch, *other = scratch + size;
    widen(call.dtype, call.x + row * call.stride_x, x, size);
    if (call.residual != nullptr) {
        widen(call.dtype, call.residual + row * call.stride_residual, other, size);
        for (std::int64_t i = 0; i < size; ++i) x[i] = x[i] + other[i];
        round_row(call.dtype, x, size);
        narrow(call.dtype, x, call.sum + row * bytes, size);
    }
    norm_row(call.dtype, x, call.weight, other, size, call.eps);
    narrow(call.dtype, x, call.out + row * bytes, size);
}

// e^x to two units in the last place up to its overflow; 1 + e^x is exact enough below -87, where it is cut.
inline Vec exp_of(Vec x) {
    const Vec bounded = max(set1(-87.0f), x);
    const Vec magic = set1(12582912.0f);
    const Vec t = bounded * set1(0x1.715476p+0f) + magic;
    const Vec n = t - magic;
    const Vec rest = (bounded - n * set1(0x1.63p-1f)) + n * set1(0x1.bd0106p-13f);  // ln 2, whose first part is exact times n
    // t holds n in its lowest bits. Two factors: n may be 128.
    const Vec half = (Vec)(((IVec)t + 126) << 23);
    const Vec e = exp2(rest * set1(0x1.715476p+0f)) * half * set1(2.0f);
    return x > set1(88.72283f) ? set1(INF) : e;
}

void row_gate(const RowGate& call, std::int64_t row, float* scratch) {
    const std::int64_t size = call.size, whole = (size + 15) / 16 * 16;
    float *gate = scratch, *up = scratch + whole;
    widen(call.dtype, call.gate + row * call.stride_gate, gate, size);
    widen(call.dtype, call.up + row * call.stride_up, up, size);
    for (std::int64_t i = size; i < whole; ++i) gate[i] = 0.0f;
    for (std::int64_t i = 0; i < whole; i += LANES) {
        Vec& x = at<Vec>(gate + i);
        x = x / (set1(1.0f) + exp_of(-x));
    }
    round_row(call.dtype, gate, size);
    for (std::int64_t i = 0; i < size; ++i) gate[i] = gate[i] * up[i];
    narrow(call.dtype, gate, call.out + row * size * size_of(call.dtype), size);
}

void head_turn(const HeadTurn& call, float* scratch) {
    const std::int64_t size = call.head_dim, half = size / 2;
    float *x = scratch, *cos = scratch + size, *sin = scratch + 2 * size, *turned = scratch + 3 * size;
    widen(call.dtype, call.x, x, size);
    if (call.weight != nullptr) {
        norm_row(call.dtype, x, call.weight, cos, size, call.eps);
        round_row(call.dtype, x, size);
    }
    widen(call.dtype, call.cos, cos, size);
    widen(call.dtype, call.sin, sin, size);
    for (std::int64_t i = 0; i < half; ++i) turned[i] = -x[i + half] * sin[i];
    for (std::int64_t i = half; i < size; ++i) turned[i] = x[i - half] * sin[i];
    for (std::int64_t i = 0; i < size; ++i) x[i] = x[i] * cos[i];
    round_row(call.dtype, x, size);
    round_row(call.dtype, turned, size);
    for (std::int64_t i = 0; i < size; ++i) x[i] = x[i] + turned[i];
    narrow(call.dtype, x, call.out, size);
}

}  // namespace

#define ROWS_OF(table) ROWS_##table
#define ROWS(table) ROWS_OF(table)
const RowKernels ROWS(TABLE) = {NAME, row_norm, row_gate, head_turn};

}  // namespace kvkern
