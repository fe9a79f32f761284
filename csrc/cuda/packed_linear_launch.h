// Launches the product of packed rows with one row on CUDA. No torch.
#pragma once

#include <cuda_runtime.h>

#include "../packed_linear.h"

namespace cats {

// Columns that a row may have.
constexpr int64_t kMaxPackedInputs = 8192;

// Runs on the current device. cudaErrorNotSupported for more than kMaxPackedInputs columns, for columns or heads that
// are no multiple of 8, and for vectors that do not start at multiples of 16 bytes.
cudaError_t packed_linear_cuda(const PackedLinearParams &params, cudaStream_t stream);

} // namespace cats
