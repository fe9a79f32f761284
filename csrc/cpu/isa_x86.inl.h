// What the files of the x86 instruction sets (isa_avx*.cpp) share. Each sets CATS_ISA, CATS_VECTOR_BYTES and
// CATS_TARGET, the compiler's names of the instruction sets.
//
// Headers come before the pragma. The linker keeps one copy of an inline function for the whole library, and that copy
// must run on every x86-64.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define CATS_PRAGMA_(text) _Pragma(#text)
#define CATS_PRAGMA(text) CATS_PRAGMA_(text)
#if defined(__clang__)
CATS_PRAGMA(clang attribute push(__attribute__((target(CATS_TARGET))), apply_to = function))
#else
CATS_PRAGMA(GCC target(CATS_TARGET))
#endif

#include "kernels.inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
