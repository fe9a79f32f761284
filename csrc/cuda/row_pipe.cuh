// A warp's queue of batches of weight rows on their way from device memory into its ring of shared-memory slots.
//
// Each warp copies its own columns of a row and is the only one to read them, so a slot needs no synchronisation beyond
// the warp. Batches complete in the order of their requests. There are two implementations of one interface, and every
// lane calls every function. bytes is this warp's part of a row, segment_bytes the space for it:
//     Pipe pipe(ring, barriers, slots, segment_bytes, bytes)
//     pipe.request(slot, count, address)   copy row r of `count` from address(r); the warp has read the slot before
//     pipe.wait(slot, in_flight)           until the oldest of in_flight requests, in this slot, is there
//     pipe.load(slot, r, i)                this lane's chunk of tile i of row r, packed
#pragma once

#include "mbarrier.cuh"
#include "rows/row.cuh"

namespace cats {

// sm_80: every lane copies the chunks that it will read itself, one commit group a batch. Scales are for all lanes.
template <class Row, int kChunks, int kRows> class AsyncCopyPipe {
  public:
    static constexpr int kBarrierBytes = 0; // per slot
    static constexpr int kMinArch = 800;    // as __CUDA_ARCH__

    __device__ AsyncCopyPipe(uint8_t *ring, uint64_t *, int, uint32_t segment_bytes, uint32_t bytes)
        : ring_(ring), segment_bytes_(segment_bytes), bytes_(bytes), lane_offset_(threadIdx.x % 32 * kChunkBytes) {}

    template <typename Address> __device__ __forceinline__ void request(int slot, int count, Address address) {
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (r >= count) break;
            const uint8_t *row = address(r) + lane_offset_;
            uint8_t *to = ring_ + (slot * kRows + r) * segment_bytes_ + lane_offset_;
            const auto copy = [&](uint32_t at) {
                if (at + lane_offset_ < bytes_) copy_async<kChunkBytes>(to + at, row + at);
            };
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                if (int(lane_offset_) < Row::kScaleBytes) copy(i * kTileBytes<Row>);
                copy(i * kTileBytes<Row> + Row::kScaleBytes);
            }
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
        if constexpr (Row::kScaleBytes > 0) __syncwarp(); // other lanes have copied this lane's scales
    }

    __device__ __forceinline__ typename Row::Packed load(int slot, int r, int i) const {
        return Row::load(ring_ + (slot * kRows + r) * segment_bytes_ + i * kTileBytes<Row>, threadIdx.x % 32);
    }

  private:
    template <int kOpen> static __device__ __forceinline__ void wait_group() {
        asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
    }

    uint8_t *ring_;
    uint32_t segment_bytes_, bytes_, lane_offset_;
};

// sm_90: one lane asks the copy engine for the whole part, and the copy completes on the slot's mbarrier.
template <class Row, int kChunks, int kRows> class BulkCopyPipe {
  public:
    static constexpr int kBarrierBytes = sizeof(uint64_t);
    static constexpr int kMinArch = 900;

    __device__ BulkCopyPipe(uint8_t *ring, uint64_t *barriers, int slots, uint32_t segment_bytes, uint32_t bytes)
        : ring_(ring), barriers_(barriers), segment_bytes_(segment_bytes), bytes_(bytes), policy_(read_once_policy()) {
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
            copy_bulk(ring_ + (slot * kRows + lane) * segment_bytes_, address(lane), bytes_, barriers_ + slot, policy_);
    }

    __device__ __forceinline__ void wait(int slot, int) {
        cats::wait(barriers_ + slot, phases_ >> slot & 1);
        phases_ ^= 1u << slot;
    }

    __device__ __forceinline__ typename Row::Packed load(int slot, int r, int i) const {
        return Row::load(ring_ + (slot * kRows + r) * segment_bytes_ + i * kTileBytes<Row>, threadIdx.x % 32);
    }

  private:
    uint8_t *ring_;
    uint64_t *barriers_;
    uint32_t segment_bytes_, bytes_, phases_ = 0;
    uint64_t policy_;
};

} // namespace cats
