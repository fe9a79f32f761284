// The kernel instances for fp32 rows.
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_group<DenseRow<float>>(const SparseMlpParams &, const DeviceLimits &, SparseMlpKernel,
                                                   const Workspace &, cudaStream_t, const SparseMlpLaunchOptions &);

} // namespace cats
