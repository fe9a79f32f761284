// The kernels for AVX2 with FMA and F16C.
#define CATS_ISA avx2
#define CATS_VECTOR_BYTES 32
#define CATS_TARGET "avx2,fma,f16c"
#include "isa_x86.inl.h"
