// The kernels for AVX-512 (F, BW, VL).
#define CATS_ISA avx512
#define CATS_VECTOR_BYTES 64
#define CATS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl"
#include "isa_x86.inl.h"
