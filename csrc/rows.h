// What a layer does to single rows between its linear layers: norm, RoPE, SiLU. Plain structs only; see attention.h.
#pragma once

#include <cstdint>

#include "attention.h"

namespace kvkern {

struct RowNorm {  // rows [rows, size], strides in bytes; out and sum contiguous
    const char* x;
    const char* residual;  // added first, null for none
    const char* weight;    // [size]
    char* out;
    char* sum;  // x + residual, null without one
    std::int64_t rows, size, stride_x, stride_residual;
    float eps;
    Dtype dtype;
};

struct RowGate {  // silu(gate) * up
    const char *gate, *up;
    char* out;
    std::int64_t rows, size, stride_gate, stride_up;
    Dtype dtype;
};

struct HeadTurn {  // one head: norm where there is a weight, then RoPE
    const char *x, *weight, *cos, *sin;
    char* out;
    std::int64_t head_dim;
    float eps;
    Dtype dtype;
};

struct RowKernels {  // scratch: 4 floats for each element of a row
    const char* name;
    void (*norm)(const RowNorm&, std::int64_t row, float* scratch);
    void (*gate)(const RowGate&, std::int64_t row, float* scratch);
    void (*turn)(const HeadTurn&, float* scratch);
};

extern const RowKernels ROWS_PORTABLE;
#if defined(__x86_64__)
extern const RowKernels ROWS_AVX2, ROWS_AVX512, ROWS_AVX512BF16;
#endif

}  // namespace kvkern
