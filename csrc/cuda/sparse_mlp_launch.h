// Launches the sparse gated MLP on CUDA. No torch: the torch op and the benchmark binaries both call this.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../sparse_mlp.h"
#include "../unpack_rows.h"
#include "plan.h"

namespace cats {

struct SparseMlpLaunchOptions : PlanOverrides {
    bool programmatic_launch = true; // overlap with the end of the previous kernel (9.0 and up)
    void *partial_sums = nullptr;    // of sparse_mlp_partial_sums_bytes: the same bits in every run, but slower
    GateSums *gate_sums = nullptr;   // [tokens, max_ctas], with SparseMlpParams::gates
};

// Bytes of workspace for one launch of sparse_mlp_cuda with these parameters. It must be zero before the first use, is
// left zero, and must not be shared by launches that can overlap.
size_t sparse_mlp_workspace_bytes(const SparseMlpParams &params);

// Bytes of memory, of any contents, for deterministic results of one launch on the current device.
cudaError_t sparse_mlp_partial_sums_bytes(const SparseMlpParams &params, size_t *bytes);

// Runs on the current device. Any number of tokens, any sizes; see sparse_mlp.h. On failure returns the CUDA error,
// cudaErrorNotSupported where plan() has no kernel.
cudaError_t sparse_mlp_cuda(const SparseMlpParams &params, void *workspace, cudaStream_t stream,
                            const SparseMlpLaunchOptions &options = {});

// sparse_mlp_columns and its step, with the workspace and the options of sparse_mlp, token by token. kept:
// sparse_mlp_kept_bytes of memory of any contents, a multiple of 256, for one launch at a time on the current device; 0
// for other forms. cudaErrorNotSupported where a row is no multiple of 16 bytes, or one is too long.
cudaError_t sparse_mlp_kept_bytes(const SparseMlpParams &params, size_t *bytes);
cudaError_t sparse_mlp_columns_cuda(const SparseMlpParams &params, void *workspace, void *kept, cudaStream_t stream,
                                    const SparseMlpLaunchOptions &options = {});

// exact_mlp, with the workspace and the options of sparse_mlp. gates: exact_mlp_gates_bytes of memory of any contents,
// a multiple of 256, for one launch at a time on the current device; 0 without a cutoff.
cudaError_t exact_mlp_gates_bytes(const SparseMlpParams &params, size_t *bytes);
cudaError_t exact_mlp_cuda(const SparseMlpParams &params, void *workspace, void *gates, cudaStream_t stream,
                           const SparseMlpLaunchOptions &options = {});

// As the three above it, of activated_mlp. partial_sums: null, or for the same bits in every run.
size_t activated_mlp_workspace_bytes(const ActivatedMlpParams &params);
cudaError_t activated_mlp_partial_sums_bytes(const ActivatedMlpParams &params, size_t *bytes);
cudaError_t activated_mlp_cuda(const ActivatedMlpParams &params, void *workspace, void *partial_sums,
                               cudaStream_t stream);

// The current device and what plan() is told of it.
cudaError_t device_limits(int *device, DeviceLimits *limits);

// Forward, or backward where the params have grad_h.
cudaError_t gated_threshold_cuda(const GatedThresholdParams &params, cudaStream_t stream);

cudaError_t unpack_rows_cuda(const UnpackRowsParams &params, cudaStream_t stream);

} // namespace cats
