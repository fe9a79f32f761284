// The kernels for one instruction set: included by each isa_*.cpp, which sets CATS_ISA and CATS_VECTOR_BYTES.
// No template of the standard library may be instantiated from here on (see isa_x86.inl.h).
#pragma once

#include "activation.inl.h"
#include "gated_threshold.inl.h"
#include "sparse_mlp.inl.h"
#include "unpack_rows.inl.h"
#include "vec.inl.h"

#define CATS_STRING_(x) #x
#define CATS_STRING(x) CATS_STRING_(x)

namespace cats::CATS_ISA {

const CpuKernels kernels = {CATS_STRING(CATS_ISA), sparse_mlp, activated_mlp, gated_threshold, unpack_rows};

} // namespace cats::CATS_ISA
