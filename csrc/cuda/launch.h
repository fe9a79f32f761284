// The one launcher of all kernels. It goes through the driver where it can: this library has its own copy of the
// runtime, whose code is out of the processor's caches between a prompt's layers, and the host then takes twice as long
// for a launch (bench/results/h100/decode_host.log).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <type_traits>

namespace cats {

constexpr int kMaxDevices = 64;

struct LaunchSize {
    dim3 grid;
    unsigned threads;
    int shared_bytes = 0; // dynamic
};

struct LaunchTarget {
    cudaStream_t stream;
    int device = 0;       // the current one; only kernels with dynamic shared memory need to know
    bool overlap = false; // programmatic dependent launch: the kernel may start before the previous one has ended
};

// A thread's first launch goes through the runtime, which gives the thread its context.
inline thread_local bool launched_before = false;

// A kernel has to be allowed its dynamic shared memory, once a device.
template <auto kernel> cudaError_t allow_shared_memory(int device, int bytes) {
    static std::atomic<int> allowed[kMaxDevices];
    if (bytes <= allowed[device].load(std::memory_order_acquire)) return cudaSuccess;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (bytes <= allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) allowed[device].store(bytes, std::memory_order_release);
    return error;
}

#if CUDART_VERSION >= 12050
inline decltype(&cuLaunchKernelEx) driver_launcher() { // or null
    static const auto launch = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        if (cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &found, 12000, cudaEnableDefault, &result) !=
            cudaSuccess)
            cudaGetLastError();
        return reinterpret_cast<decltype(&cuLaunchKernelEx)>(found);
    }();
    return launch;
}

template <auto kernel> CUfunction driver_function() { // of any device; or null
    static const auto function = [] {
        cudaKernel_t found = nullptr;
        if (cudaGetKernel(&found, reinterpret_cast<const void *>(kernel)) != cudaSuccess) cudaGetLastError();
        return reinterpret_cast<CUfunction>(found);
    }();
    return function;
}
#endif

// The arguments have the kernel's own types.
template <auto kernel, class... Arguments>
cudaError_t launch_kernel(const LaunchSize &size, const LaunchTarget &target, const Arguments &...arguments) {
    static_assert(std::is_same_v<decltype(kernel), void (*)(Arguments...)>);
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&arguments))...};
    if (size.shared_bytes)
        if (const cudaError_t error = allow_shared_memory<kernel>(target.device, size.shared_bytes)) return error;
#if CUDART_VERSION >= 12050
    const auto launch = driver_launcher();
    const CUfunction function = driver_function<kernel>();
    if (launched_before && launch && function) {
        CUlaunchAttribute overlap{};
        overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig config{};
        config.gridDimX = size.grid.x, config.gridDimY = size.grid.y, config.gridDimZ = size.grid.z;
        config.blockDimX = size.threads, config.blockDimY = config.blockDimZ = 1;
        config.sharedMemBytes = unsigned(size.shared_bytes);
        config.hStream = target.stream;
        config.attrs = &overlap, config.numAttrs = target.overlap ? 1 : 0;
        if (launch(&config, function, pointers, nullptr) == CUDA_SUCCESS) return cudaSuccess;
    }
#endif
    launched_before = true;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = size.grid;
    config.blockDim = size.threads;
    config.dynamicSmemBytes = size_t(size.shared_bytes);
    config.stream = target.stream;
    config.attrs = &overlap, config.numAttrs = target.overlap ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), pointers);
    if (error != cudaSuccess) cudaGetLastError(); // returned here, not to be found again later
    return error;
}

} // namespace cats
