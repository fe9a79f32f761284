// The kernels for AVX-512 (F, BW, VL).
// Headers come before the pragma. The linker keeps one copy of an inline function for the whole library, and that copy
// must run on every x86-64.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")
#endif

#define CATS_ISA avx512
#define CATS_VECTOR_BYTES 64
#include "kernels.inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
