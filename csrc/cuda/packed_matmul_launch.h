// Launches the product of packed rows with many tokens on CUDA. No torch.
#pragma once

#include <cuda_runtime.h>

#include "../packed_matmul.h"

namespace cats {

struct MatmulChoice {
    int tokens = 0; // of a CTA: 32, 64, 128 or 256; 0: chosen by choose_matmul
    int shares = 1; // CTAs that share the inputs of an output: 1, 2, 4 or 8
};

// The quickest by the time that stages take.
MatmulChoice choose_matmul(int64_t tokens, int64_t inputs, int64_t outputs, int multiprocessors);

// Runs on the current device. cudaErrorNotSupported for devices other than those of compute capability 9.0, for x in
// fp32, for inputs or outputs that are no multiple of 8, and for an x, a y or rows that do not start at multiples of 16
// bytes.
cudaError_t packed_matmul_cuda(const PackedMatmulParams &params, cudaStream_t stream, MatmulChoice choice = {});

} // namespace cats
