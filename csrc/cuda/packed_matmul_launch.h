// Launches the product of packed rows with many tokens on CUDA. No torch.
#pragma once

#include <cuda_runtime.h>

#include "../packed_matmul.h"

namespace cats {

struct MatmulChoice {
    int tokens; // of a tile, which has 128 outputs: 32, 64, 128 or 256
    int ctas;   // that share the stages of all tiles
    int64_t tiles;

    size_t scratch_bytes() const; // of PackedMatmulParams::scratch
};

// The choice with the least estimated time.
MatmulChoice choose_matmul(int64_t tokens, int64_t inputs, int64_t outputs, int multiprocessors);

// The choice for the current device. cudaErrorNotSupported for devices other than those of compute capability 9.0, for
// x in fp32, for inputs or outputs that are no multiple of 8, and for an x, a y or rows that do not start at multiples
// of 16 bytes.
cudaError_t plan_packed_matmul(const PackedMatmulParams &params, MatmulChoice *choice);

// Runs on the current device, which the choice is for. cudaErrorNotSupported: the kernel is not compiled for it.
cudaError_t packed_matmul_cuda(const PackedMatmulParams &params, const MatmulChoice &choice, cudaStream_t stream);

} // namespace cats
