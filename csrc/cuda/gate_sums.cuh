// What the two launches of exact_mlp with a cutoff tell each other beside the gates: the first leaves the sums that it
// has while it has the gates in registers, so that no CTA of the second has to read all gates of a token.
//
// A CTA leaves the sums of the gates that it has written, in a place of its own. Which gates these are is fixed, and
// there are no atomics: the sums have the same bits in every run. In double, the difference between the mean square and
// the squared mean is good to more digits than a gate has.
#pragma once

#include "finish.cuh"

namespace cats {

__device__ __forceinline__ void add_gate(GateSums &to, float gate) { // rounded to the dtype of the gates
    const double g = gate;
    to.sum += g, to.squares = fma(g, g, to.squares);
}

__device__ __forceinline__ void add_gates(GateSums &to, const GateSums &sums) {
    to.sum += sums.sum, to.squares += sums.squares;
}

// Adds those of the lane whose number differs in these bits.
__device__ __forceinline__ void add_gates_of_lane(GateSums &to, int lane_bits) {
    const double sum = __shfl_xor_sync(0xffffffffu, to.sum, lane_bits),
                 squares = __shfl_xor_sync(0xffffffffu, to.squares, lane_bits);
    add_gates(to, {sum, squares});
}

// Called by one thread of every CTA for each token. Places that have no CTA get zeros.
__device__ __forceinline__ void leave_gate_sums(const Workspace &workspace, int token, const GateSums &sums) {
    for (int i = blockIdx.x; i < workspace.gate_places; i += gridDim.x)
        workspace.gate_sums[token * workspace.gate_places + i] = i == int(blockIdx.x) ? sums : GateSums{};
}

// The cutoff of a token, mean(g) + deviations * std(g), each operation rounded to T. Called by a whole warp: all lanes,
// in all CTAs, get the same bits.
template <typename T> __device__ __forceinline__ float find_cutoff(const ActivatedMlpParams &p, int token) {
    constexpr int kAhead = 6; // nothing hides the way to L2: so many loads at a time
    const GateSums *places = p.gate_sums + token * p.gate_places;
    GateSums total{};
#pragma unroll 1
    for (int first = 0; first < p.gate_places; first += kAhead * 32) {
        GateSums sums[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
            const int i = first + a * 32 + int(threadIdx.x % 32);
            sums[a] = {};
            if (i < p.gate_places) sums[a] = places[i];
        }
#pragma unroll
        for (int a = 0; a < kAhead; a++) add_gates(total, sums[a]);
    }
#pragma unroll
    for (int o = 16; o; o /= 2) add_gates_of_lane(total, o);
    const auto rounded = [](float value) { return to_float(round_to<T>(value)); };
    const double mean = total.sum * p.gate_weight;
    float variance = float(fma(-mean, total.sum, total.squares) * p.gate_weight);
    if (variance < 0.f) variance = 0.f; // by rounding; NaN stays NaN
    return rounded(rounded(float(mean)) + rounded(rounded(sqrtf(variance)) * p.deviations));
}

// How far a gate is above its token's cutoff, rounded to T; NaN stays NaN. The activation of 0 is 0.
template <typename T> __device__ __forceinline__ float above_cutoff(float gate, float cutoff) {
    return gate <= cutoff ? 0.f : to_float(round_to<T>(gate - cutoff));
}

} // namespace cats
