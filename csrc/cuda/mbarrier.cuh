// Shared-memory barriers (mbarrier) and the copies that complete on them, as thin wrappers of PTX. sm_80 and up; the
// functions that need sm_90 compile to nothing below.
#pragma once

#include <cstdint>

namespace cats {

__device__ __forceinline__ uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// After init_barrier, before the copy engine may complete on the barrier.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint64_t *barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(smem_address(barrier))
                 : "memory");
}

// Arrives when all copies that this thread started with copy_async are complete.
__device__ __forceinline__ void arrive_after_async_copies(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Adds bytes of bulk copies to what the current phase waits for.
__device__ __forceinline__ void expect_bytes(uint64_t *barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Whether the phase with this parity is complete.
__device__ __forceinline__ bool phase_done(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(smem_address(barrier)), "r"(parity)
                 : "memory");
    return done;
}

// Waits until the phase with this parity is complete. On sm_90 the hardware suspends the warp between the tests.
__device__ __forceinline__ void wait(uint64_t *barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(smem_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
#else
    while (!phase_done(barrier, parity)) {
    }
#endif
}

// Starts a copy of 4 or 16 bytes by this thread.
template <int kBytes> __device__ __forceinline__ void copy_async(void *to, const void *from) {
    static_assert(kBytes == 4 || kBytes == 16);
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(to)), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(to)), "l"(from) : "memory");
}

// Starts a copy of any multiple of 16 bytes by the copy engine, which completes on the barrier.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier,
                                          uint64_t policy) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(smem_address(to)),
                 "l"(from), "r"(bytes), "r"(smem_address(barrier)), "l"(policy)
                 : "memory");
#endif
}

__device__ __forceinline__ uint64_t read_once_policy() { // weights are read once
    uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    return policy;
}

// Brings a multiple of 16 bytes into L2. Does not wait, and later reads still see what is written meanwhile.
__device__ __forceinline__ void prefetch_l2(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    if (bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// The next ticket of a counter in global memory, asked for long before it is needed. Not by an addition: ptxas turns
// those of a warp into one and broadcasts the result at once, also of assembly, so that the warp waits for L2. It does
// not do so with an increment, unless that wraps around at 2^32 - 1, where it is an addition.
__device__ __forceinline__ void draw_ticket(uint32_t &ticket, uint32_t *counter) {
    asm volatile("atom.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(ticket) : "l"(counter) : "memory");
}

// Programmatic dependent launch. After launch_dependents() the next kernel may start, as far as it has room. After
// wait_for_previous_kernel() all that the previous kernels have written is seen.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

} // namespace cats
