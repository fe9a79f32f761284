// See workspace.h. Only the first call allocates. That is legal while a stream is being captured: the thread is in
// relaxed capture mode meanwhile, and the memory is zeroed on another stream.
#include "workspace.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace cats {

namespace {

struct Buffer {
    int device;
    Contents contents;
    void *memory;
    size_t bytes;
};

using Key = std::tuple<int, Contents, cudaStream_t, unsigned long long>; // the last: the capture's id, or 0

std::mutex mutex;
std::map<Key, Buffer *> in_use;
std::vector<Buffer *> free_buffers; // of destroyed graphs

cudaError_t allocate(int device, Contents contents, size_t bytes, Buffer **buffer) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode)) return error;
    void *memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream) cudaStreamDestroy(stream);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error == cudaSuccess) *buffer = new Buffer{device, contents, memory, bytes};
    else if (memory) cudaFree(memory);
    return error;
}

// Called when a graph's last reference is gone. CUDA calls are not allowed here.
void CUDART_CB release_from_graph(void *user_data) {
    Buffer *buffer = static_cast<Buffer *>(user_data);
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = in_use.begin(); it != in_use.end(); ++it)
        if (it->second == buffer) {
            in_use.erase(it);
            break;
        }
    free_buffers.push_back(buffer);
}

cudaError_t tie_to_graph(cudaGraph_t graph, Buffer *buffer) {
    cudaUserObject_t object;
    const cudaError_t error =
        cudaUserObjectCreate(&object, buffer, release_from_graph, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) return error;
    return cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
}

Buffer *take_free(int device, Contents contents, size_t bytes) {
    for (auto it = free_buffers.begin(); it != free_buffers.end(); ++it)
        if ((*it)->device == device && (*it)->contents == contents && (*it)->bytes >= bytes) {
            Buffer *buffer = *it;
            free_buffers.erase(it);
            return buffer;
        }
    return nullptr;
}

} // namespace

cudaError_t get_workspace(cudaStream_t stream, size_t bytes, Contents contents, void **workspace) {
    int device;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    cudaStreamCaptureStatus status;
    unsigned long long capture = 0;
    cudaGraph_t graph = nullptr;
    if (const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture, &graph)) return error;
    const bool capturing = status == cudaStreamCaptureStatusActive;
    const Key key{device, contents, stream, capturing ? capture : 0};

    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = in_use.find(key);
    if (found != in_use.end() && found->second->bytes >= bytes) {
        *workspace = found->second->memory;
        return cudaSuccess;
    }
    // A larger buffer. The smaller one stays allocated: earlier launches may still be using it.
    Buffer *buffer = take_free(device, contents, bytes);
    if (!buffer) {
        size_t rounded = 64 * 1024;
        while (rounded < bytes) rounded *= 2;
        if (const cudaError_t error = allocate(device, contents, rounded, &buffer)) return error;
    }
    if (capturing)
        if (const cudaError_t error = tie_to_graph(graph, buffer)) {
            free_buffers.push_back(buffer);
            return error;
        }
    in_use[key] = buffer;
    *workspace = buffer->memory;
    return cudaSuccess;
}

} // namespace cats
