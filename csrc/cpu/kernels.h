// The CPU kernels as the rest of the library sees them: one table of functions per instruction set, chosen at run time.
// The kernels use neither torch nor OpenMP; the caller supplies the parallel loop.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "sparse_mlp.h"
#include "unpack_rows.h"

namespace cats {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

// for_each calls body(context, i) once for every i in [0, n), on at most `threads` threads. The neurons are split into
// `threads` parts, so results depend on `threads`, but not on which thread runs which part.
struct Parallel {
    int64_t threads;
    void (*for_each)(int64_t n, void (*body)(void *context, int64_t i), void *context);
};

struct CpuKernels {
    const char *isa;
    void (*sparse_mlp)(const SparseMlpParams &, const Parallel &);
    void (*activated_mlp)(const ActivatedMlpParams &, const Parallel &);
    void (*gated_threshold)(const GatedThresholdParams &, const Parallel &); // or its backward; fp32, fp16 and bf16
    void (*unpack_rows)(const UnpackRowsParams &, const Parallel &);
};

// clang-format off
namespace portable { extern const CpuKernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }
namespace avx512vnni { extern const CpuKernels kernels; }
namespace avx512bf16 { extern const CpuKernels kernels; }
#endif
// clang-format on

// The best table for this processor, or the one that CATS_CPU_ISA names; chosen once. Throws std::runtime_error if
// CATS_CPU_ISA names one that is unknown or that this processor cannot run.
const CpuKernels &cpu_kernels();

// For `cats env`: the tables compiled in, those this processor can run, and the one cpu_kernels() chooses.
std::string cpu_kernels_info();

// fp64, for gradcheck: scalar code, the same on every machine.
void gated_threshold_double(const GatedThresholdParams &, const Parallel &);

// Scratch memory of the calling thread, aligned to 64 bytes and kept for its next call; one buffer for each slot.
constexpr int kWorkspaceSlots = 8;
void *cpu_workspace(int slot, size_t bytes);

} // namespace cats
