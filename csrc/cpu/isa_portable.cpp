// The kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define CATS_ISA portable
#define CATS_VECTOR_BYTES 16
#include "kernels.inl.h"
