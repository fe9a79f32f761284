// The kernel instances for dense rows of fp32, with x of the same type.
#include "rows/dense.cuh"
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_choice<DenseRow<float>, float>(const Choice &, const SparseMlpParams &, const Workspace &,
                                                           const LaunchTarget &);

} // namespace cats
