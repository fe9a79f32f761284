// The kernel instances for fp16 rows.
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_group<DenseRow<__half>>(const SparseMlpParams &, const DeviceLimits &, SparseMlpKernel,
                                                    const Workspace &, cudaStream_t, const SparseMlpLaunchOptions &);

} // namespace cats
