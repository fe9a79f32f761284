// Scratch memory for the kernels, cached so that a call allocates nothing.
//
// One buffer for each device and stream, since calls on one stream never overlap; and for each stream in each graph
// capture, since a graph may later run beside anything. A graph's buffer is handed on when the graph is destroyed.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cats {

// What the users of a buffer leave to each other.
enum class Contents { kZero, kAnything };

// At least `bytes` of memory of the current device for a launch on `stream`.
cudaError_t get_workspace(cudaStream_t stream, size_t bytes, Contents contents, void **workspace);

} // namespace cats
