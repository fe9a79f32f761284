// The kernel instances for bf16 rows.
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_group<DenseRow<__nv_bfloat16>>(const SparseMlpParams &, const DeviceLimits &,
                                                           SparseMlpKernel, const Workspace &, cudaStream_t,
                                                           const SparseMlpLaunchOptions &);

} // namespace cats
