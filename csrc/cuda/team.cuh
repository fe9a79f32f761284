// What the teams of warps of sparse_mlp_kernel.cuh keep in shared memory and tell each other.
#pragma once

#include "finish.cuh"
#include "plan.h"
#include "row_pipe.cuh"

namespace cats {

// Of the kernels with a ring of batches.
struct RingArguments {
    SparseMlpParams mlp;
    RingSizes ring;
    Workspace workspace;
};

constexpr uint32_t kNoRow = 0xffffffff;

// What one warp remembers, its own copy. The queues are rings of kMaxValues: no queue can hold more neurons than there
// are value indices. A row is neuron | value index << 24.
template <int kTokens, int kRows> struct WarpState {
    uint32_t up_queue[kMaxValues], down_queue[kMaxValues]; // rows still to be requested
    uint32_t slot_rows[kMaxSlots][kRows];                  // what the slots hold
    float values[kMaxValues][kTokens];                     // act(g), later h
    uint32_t value_tokens[kMaxValues];                     // which tokens keep the neuron
};

// What the warps of a team tell each other at a gate or up batch: their partial dot products, and the leader the next
// gate batch. There are two exchanges, used in turns: a warp may be one batch ahead of another, never two.
template <int kDots, int kTeamWarps> struct alignas(16) TeamState {
    struct alignas(16) Exchange {
        float dots[kDots][kTeamWarps];
        uint32_t next_batch;
    } exchanges[2];
};

// Until all threads of the team have come here in this turn.
//
// compute-sanitizer's racecheck ignores named barriers and __syncthreads() once teams have synchronised different
// numbers of times. Compiled for it (CATS_FOR_RACECHECK), all threads of the team arrive on an mbarrier, whose phases
// have parity 0 and 1 in turns; that is 0.2 to 0.3 us a launch slower at H 4096, I 14336.
template <int kTeams, int kTeamWarps> class TeamBarrier {
  public:
    __device__ __forceinline__ TeamBarrier() {
#ifdef CATS_FOR_RACECHECK
        if (threadIdx.x < kTeams) init_barrier(barriers() + threadIdx.x, kTeamWarps * 32);
        __syncthreads();
#endif
    }

    __device__ __forceinline__ void synchronise(int team, int turn) const {
#ifdef CATS_FOR_RACECHECK
        arrive(barriers() + team);
        wait(barriers() + team, turn);
#else
        asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamWarps * 32) : "memory");
#endif
    }

  private:
#ifdef CATS_FOR_RACECHECK
    static __device__ uint64_t *barriers() {
        __shared__ uint64_t of_teams[kTeams];
        return of_teams;
    }
#endif
};

// Sums kValues values over the warp. Lane l gets value l * kValues / 32, and every lane of its group the same bits.
// Halving the number of values at each exchange takes kValues - 1 shuffles and a few more, instead of 5 * kValues.
template <int kValues> __device__ __forceinline__ float warp_sum(float (&values)[kValues]) {
    static_assert((kValues & (kValues - 1)) == 0 && kValues <= 32);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = kValues, o = 16; n > 1; n /= 2, o /= 2)
#pragma unroll
        for (int i = 0; i < kValues / 2; i++) { // with n / 2 here, 16 values go to local memory
            if (i >= n / 2) break;
            const bool upper = lane & o;
            const float sent = upper ? values[i] : values[i + n / 2], kept = upper ? values[i + n / 2] : values[i];
            values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, o);
        }
    float sum = values[0];
#pragma unroll
    for (int o = 16 / kValues; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return sum;
}

} // namespace cats
