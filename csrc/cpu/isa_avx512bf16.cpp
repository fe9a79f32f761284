// The kernels for AVX-512 with BF16 and VNNI: as avx512vnni, and bf16 dot products by vdpbf16ps.
#define CATS_ISA avx512bf16
#define CATS_VECTOR_BYTES 64
#define CATS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16"
#define CATS_DOT_BF16
#define CATS_DOT_INT8
#include "isa_x86.inl.h"
