// Zeroed scratch memory for the kernels, cached so that a call allocates nothing.
//
// One buffer for each device and stream, since calls on one stream never overlap; and for each stream in each graph
// capture, since a graph may later run beside anything. A graph's buffer is handed on when the graph is destroyed.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cats {

// At least `bytes` of memory of the current device for a launch on `stream`, zero unless a kernel left it otherwise.
cudaError_t get_workspace(cudaStream_t stream, size_t bytes, void **workspace);

} // namespace cats
