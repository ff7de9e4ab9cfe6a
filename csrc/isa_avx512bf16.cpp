// x86-64 with AVX-512 and its products of bf16, for which this file alone is compiled (setup.py).
#if defined(__x86_64__)
#define LANES 16
#define NAME "avx512bf16"
#define TABLE AVX512BF16
#include "attention_impl.h"
#include "rows_impl.h"
#endif
