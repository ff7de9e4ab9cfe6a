// x86-64 with AVX2, FMA and F16C, for which this file alone is compiled (setup.py).
#if defined(__x86_64__)
#define LANES 8
#define NAME "avx2"
#define TABLE AVX2
#include "attention_impl.h"
#include "rows_impl.h"
#endif
