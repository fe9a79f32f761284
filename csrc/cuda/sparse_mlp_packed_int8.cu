// The kernel instances for packed gate and up rows of int8, with x of fp16 and bf16.
#include "sparse_mlp_dispatch.cuh"

namespace cats {

template cudaError_t launch_packed<WeightType::kInt8, __half>(const Choice &, const SparseMlpParams &,
                                                              const Workspace &, const LaunchTarget &);
template cudaError_t launch_packed<WeightType::kInt8, __nv_bfloat16>(const Choice &, const SparseMlpParams &,
                                                                     const Workspace &, const LaunchTarget &);

} // namespace cats
