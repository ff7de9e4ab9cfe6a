// x86-64 with AVX-512 (F, BW, DQ, VL), for which this file alone is compiled (setup.py).
#if defined(__x86_64__)
#define LANES 16
#define NAME "avx512"
#define TABLE AVX512
#include "attention_impl.h"
#include "rows_impl.h"
#endif
