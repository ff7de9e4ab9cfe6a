// Any machine: vectors of four, which every compiler knows how to lower. On x86-64 without fma, on aarch64 with it.
#define LANES 4
#define NAME "portable"
#define TABLE PORTABLE
#include "attention_impl.h"
#include "rows_impl.h"
