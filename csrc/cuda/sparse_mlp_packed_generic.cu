// The generic kernel for packed rows.
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_packed<WeightType::kDense, float>(const Choice &, const SparseMlpParams &,
                                                              const Workspace &, const LaunchTarget &);
template cudaError_t launch_packed<WeightType::kDense, __half>(const Choice &, const SparseMlpParams &,
                                                               const Workspace &, const LaunchTarget &);
template cudaError_t launch_packed<WeightType::kDense, __nv_bfloat16>(const Choice &, const SparseMlpParams &,
                                                                      const Workspace &, const LaunchTarget &);

} // namespace cats
