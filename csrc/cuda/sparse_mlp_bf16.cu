// The kernel instances for dense rows of bf16, with x of the same type.
#include "rows/dense.cuh"
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_choice<DenseRow<__nv_bfloat16>, __nv_bfloat16>(const Choice &, const SparseMlpParams &,
                                                                           const Workspace &, const LaunchTarget &);

} // namespace cats
