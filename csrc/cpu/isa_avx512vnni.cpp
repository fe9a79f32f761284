// The kernels for AVX-512 with VNNI: as avx512, and dot products of int4 and int8 rows by vpdpbusd.
#define CATS_ISA avx512vnni
#define CATS_VECTOR_BYTES 64
#define CATS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"
#define CATS_DOT_INT8
#include "isa_x86.inl.h"
