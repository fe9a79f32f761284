// Scratch memory for the kernels, cached so that a call allocates nothing.
//
// There is one buffer for each device and stream, because calls on one stream never overlap. Each graph capture has its
// own, one for each stream, because a graph may later run beside anything. When the graph is destroyed they are reused.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cats {

// What a buffer holds between launches.
enum class Contents { kZero, kAnything };

// At least `bytes` of memory of the current device for a launch on `stream`.
cudaError_t get_workspace(cudaStream_t stream, size_t bytes, Contents contents, void **workspace);

} // namespace cats
