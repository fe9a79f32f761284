// The kernels for AVX-512 with BF16: as avx512, and bf16 dot products by vdpbf16ps.
#define CATS_ISA avx512bf16
#define CATS_VECTOR_BYTES 64
#define CATS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16"
#define CATS_DOT_BF16
#include "isa_x86.inl.h"
