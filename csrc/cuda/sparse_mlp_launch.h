// Launches the sparse gated MLP on CUDA. No torch: the torch op and the benchmark binaries both call this.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../sparse_mlp.h"

namespace cats {

// Tokens that one launch takes; more are launched in groups of this many.
constexpr int kMaxTokensPerLaunch = 8;

enum class SparseMlpKernel { kAuto, kBulkCopy, kAsyncCopy, kGeneric };

struct SparseMlpLaunchOptions {
    SparseMlpKernel kernel = SparseMlpKernel::kAuto; // kBulkCopy needs compute capability 9.0
    int slots = 0;                                   // batches of rows in flight per team; 0: as planned
    int first_batches = 0;                           // gate batches per team prefetched into L2; 0: as planned
    bool programmatic_launch = true;                 // overlap with the end of the previous kernel (9.0 and up)
    void *shares = nullptr; // of sparse_mlp_shares_bytes: the same bits in every run, at some cost in time
};

// Bytes of workspace for one launch of sparse_mlp_cuda with these parameters. It must be zero before the first use, is
// left zero, and must not be shared by launches that can overlap.
size_t sparse_mlp_workspace_bytes(const SparseMlpParams &params);

// Bytes of memory, of any contents, for deterministic results of one launch on the current device.
cudaError_t sparse_mlp_shares_bytes(const SparseMlpParams &params, size_t *bytes);

// Runs on the current device. Any number of tokens, any sizes; see sparse_mlp.h. On failure returns the CUDA error.
cudaError_t sparse_mlp_cuda(const SparseMlpParams &params, void *workspace, cudaStream_t stream,
                            const SparseMlpLaunchOptions &options = {});

cudaError_t gated_threshold_cuda(const GatedThresholdParams &params, cudaStream_t stream);
cudaError_t gated_threshold_backward_cuda(const GatedThresholdParams &params, cudaStream_t stream);

} // namespace cats
