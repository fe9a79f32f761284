// csrc/cuda/launch.h on a GPU: from a thread's second launch on the driver launches, also kernels with much shared
// memory, with programmatic dependent launch, and while a stream is captured. tests/ops/test_launchers.py runs it.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cuda/launch.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition), exit(1);             \
    } while (0)

__global__ void count(int *counter, int words) {
    extern __shared__ int shared[];
    for (int i = threadIdx.x; i < words; i += blockDim.x) shared[i] = 1;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(counter, shared[words - 1]);
}

int main() {
    int bytes, major, *counter;
    CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess);
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess);
    CHECK(cudaMallocManaged(&counter, sizeof(int)) == cudaSuccess);
    *counter = 0;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream) == cudaSuccess);
    const cats::LaunchSize size{dim3(3), 64, bytes};
    const cats::LaunchTarget target{stream, 0, major >= 9};
    const auto launch = [&] { return cats::launch_kernel<count>(size, target, counter, bytes / 4); };

    CHECK(!cats::launched_before && launch() == cudaSuccess && cats::launched_before);
    CHECK(launch() == cudaSuccess);
    std::thread([&] { CHECK(!cats::launched_before && launch() == cudaSuccess && launch() == cudaSuccess); }).join();
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess && *counter == 4 * 3);

#if CUDART_VERSION >= 12050
    // Without the runtime to fall back on.
    CUlaunchConfig config{};
    config.gridDimX = 3, config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = 64, config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = unsigned(bytes), config.hStream = stream;
    int words = bytes / 4;
    void *arguments[] = {&counter, &words};
    CHECK(cats::driver_launcher() && cats::driver_function<count>());
    CHECK(cats::driver_launcher()(&config, cats::driver_function<count>(), arguments, nullptr) == CUDA_SUCCESS);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess && *counter == 5 * 3);
#endif

    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    CHECK(launch() == cudaSuccess && launch() == cudaSuccess);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
    CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    *counter = 0;
    CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess && *counter == 2 * 3);

    const cats::LaunchSize too_much{dim3(3), 64, bytes + 1024};
    CHECK(cats::launch_kernel<count>(too_much, target, counter, 1) == cudaErrorInvalidValue);
    printf("ok\n");
    return 0;
}
