// Between sparse_mlp_launch.cu, which knows formats and dtypes, and the kernel instances of one row format and dtype,
// each compiled in a file of its own.
#pragma once

#include "finish.cuh"
#include "launch.h"
#include "plan.h"

namespace cats {

// Launches what plan() chose for params.tokens tokens. Row: how weights are stored. T: the type of x, y and biases.
template <class Row, typename T>
cudaError_t launch_choice(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target);

// Likewise for packed rows, whose gate and up rows have this type. kDense: the generic kernel, for all types.
template <WeightType kDotType, typename T>
cudaError_t launch_packed(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target);

} // namespace cats
