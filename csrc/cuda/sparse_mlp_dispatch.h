// Between the launcher, which knows dtypes, and the kernel instances of one row format, which are compiled apart.
#pragma once

#include <algorithm>

#include "finish.cuh"
#include "row_format.cuh"
#include "sparse_mlp_launch.h"

namespace cats {

struct DeviceLimits {
    int index;
    int compute_capability; // 90 for 9.0
    int multiprocessors;
    int shared_bytes;         // per CTA, after opting in
    bool large_shared_memory; // see has_large_shared_memory
};

// The most CTAs that a launch has.
inline int max_ctas(const SparseMlpParams &params, const DeviceLimits &device) {
    return int(std::min<int64_t>(device.multiprocessors, params.intermediate_size));
}

// One launch for a group of up to kMaxTokensPerLaunch tokens; kernel is not kAuto. cudaErrorNotSupported: no instance
// has registers for so many tokens of so long a row. Instantiated in sparse_mlp_{bf16,fp16,fp32}.cu.
template <class Row>
cudaError_t launch_group(const SparseMlpParams &params, const DeviceLimits &device, SparseMlpKernel kernel,
                         const Workspace &workspace, cudaStream_t stream, const SparseMlpLaunchOptions &options);

} // namespace cats
