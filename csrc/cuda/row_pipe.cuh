// A warp's queue of batches of weight rows on their way from device memory into its ring of shared-memory slots.
//
// Each warp copies just its own columns of a row and is the only one to read them, so a slot needs no synchronisation
// beyond the warp. Batches complete in the order of their requests. Two implementations of one interface, of which
// every lane calls everything; bytes is this warp's part of a row, row_bytes the space for it:
//     Pipe pipe(ring, barriers, slots, row_bytes, bytes)
//     pipe.request(slot, count, address)   copy row r of `count` from address(r), for a slot that the warp has read
//     pipe.wait(slot, in_flight)           until the oldest of in_flight requests, in this slot, is there
//     pipe.chunk(slot, r, i)               this lane's i-th 16-byte chunk of row r
#pragma once

#include "mbarrier.cuh"

namespace cats {

constexpr int kMaxSlots = 16;

// sm_80: every lane copies the chunks that it will read itself, one commit group a batch.
template <int kChunks, int kRows> class AsyncCopyPipe {
  public:
    static constexpr int kBarrierBytes = 0; // per slot
    static constexpr int kMinArch = 800;    // as __CUDA_ARCH__

    __device__ AsyncCopyPipe(uint8_t *ring, uint64_t *, int, uint32_t row_bytes, uint32_t bytes)
        : ring_(ring), row_bytes_(row_bytes), bytes_(bytes), lane_offset_(threadIdx.x % 32 * 16) {}

    template <typename Address> __device__ __forceinline__ void request(int slot, int count, Address address) {
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (r >= count) break;
            const uint8_t *row = address(r) + lane_offset_;
            uint8_t *to = ring_ + (slot * kRows + r) * row_bytes_ + lane_offset_;
#pragma unroll
            for (int i = 0; i < kChunks; i++)
                if (i * 512 + lane_offset_ < bytes_) copy_async<16>(to + i * 512, row + i * 512);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ __forceinline__ void wait(int, int in_flight) {
        switch (in_flight - 1) { // the number of younger groups that may stay open has to be an immediate
        case 0: wait_group<0>(); break;
        case 1: wait_group<1>(); break;
        case 2: wait_group<2>(); break;
        case 3: wait_group<3>(); break;
        case 4: wait_group<4>(); break;
        case 5: wait_group<5>(); break;
        case 6: wait_group<6>(); break;
        case 7: wait_group<7>(); break;
        case 8: wait_group<8>(); break;
        case 9: wait_group<9>(); break;
        case 10: wait_group<10>(); break;
        case 11: wait_group<11>(); break;
        case 12: wait_group<12>(); break;
        case 13: wait_group<13>(); break;
        case 14: wait_group<14>(); break;
        default: wait_group<kMaxSlots - 1>(); break;
        }
    }

    __device__ __forceinline__ uint4 chunk(int slot, int r, int i) const {
        return *reinterpret_cast<const uint4 *>(ring_ + (slot * kRows + r) * row_bytes_ + i * 512 + lane_offset_);
    }

  private:
    template <int kOpen> static __device__ __forceinline__ void wait_group() {
        asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
    }

    uint8_t *ring_;
    uint32_t row_bytes_, bytes_, lane_offset_;
};

// sm_90: one lane asks the copy engine for the whole part; it completes on the slot's mbarrier.
template <int kChunks, int kRows> class BulkCopyPipe {
  public:
    static constexpr int kBarrierBytes = 8;
    static constexpr int kMinArch = 900;

    __device__ BulkCopyPipe(uint8_t *ring, uint64_t *barriers, int slots, uint32_t row_bytes, uint32_t bytes)
        : ring_(ring), barriers_(barriers), row_bytes_(row_bytes), bytes_(bytes), policy_(read_once_policy()) {
        const int lane = threadIdx.x % 32;
        if (lane < slots) init_barrier(barriers + lane, 1);
        publish_barriers();
        __syncwarp();
    }

    template <typename Address> __device__ __forceinline__ void request(int slot, int count, Address address) {
        const int lane = threadIdx.x % 32;
        if (lane == 0) {
            expect_bytes(barriers_ + slot, count * bytes_);
            arrive(barriers_ + slot);
        }
        __syncwarp();
        if (lane < count && bytes_)
            copy_bulk(ring_ + (slot * kRows + lane) * row_bytes_, address(lane), bytes_, barriers_ + slot, policy_);
    }

    __device__ __forceinline__ void wait(int slot, int) {
        cats::wait(barriers_ + slot, phases_ >> slot & 1);
        phases_ ^= 1u << slot;
    }

    __device__ __forceinline__ uint4 chunk(int slot, int r, int i) const {
        return *reinterpret_cast<const uint4 *>(ring_ + (slot * kRows + r) * row_bytes_ + i * 512 +
                                                threadIdx.x % 32 * 16);
    }

  private:
    uint8_t *ring_;
    uint64_t *barriers_;
    uint32_t row_bytes_, bytes_, phases_ = 0;
    uint64_t policy_;
};

} // namespace cats
