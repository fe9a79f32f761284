// The product of packed rows with many tokens, on Hopper's tensor cores. To unpack a matrix first, and to multiply
// then, writes and reads it once more: of a layer of 4096x14336 that is 0.13 ms, more than the products of 100 tokens.
//
// A CTA has a tile of y: kOutputs outputs of kTokens tokens. The copy engine brings packed rows and x. Producer warps
// unpack the rows and write the values, rounded as unpack_rows rounds them, where wgmma wants its operand. Two warp
// groups multiply, each with half of the outputs. Where rows are those of inputs, the operand lies transposed. The
// inputs can be shared by the CTAs of a cluster, which add their sums in the end, always in the same order.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "../packed_matmul.h"
#include "rows/packed.cuh"
#include "values.cuh"
#include "wgmma.cuh"

namespace cats {

constexpr int kOutputs = 128, kDepth = 64;           // of a tile; inputs of a stage: 128 bytes of x
constexpr int kLineBytes = 128, kUnitColumns = 32;   // a producer unpacks 32 columns of a row at a time
constexpr int kWeightBytes = kOutputs * kDepth * 2;  // of a stage
constexpr int kWarpGroup = 128, kConsumerGroups = 2; // threads; each group has 64 outputs
constexpr int kSumStride = kOutputs + 4;             // floats from token to token in the end; free of bank conflicts

template <WeightType kType, int kTokens> struct MatmulShape {
    static constexpr int kProducerGroups = kTokens == 256 ? 1 : 2, kProducers = kProducerGroups * kWarpGroup;
    static constexpr int kThreads = kConsumerGroups * kWarpGroup + kProducers;
    static constexpr int kUnits = kOutputs * kDepth / kUnitColumns / kProducers; // a producer has so many of a stage
    static constexpr int kCtas = kTokens <= 64 ? 2 : 1;                          // of a multiprocessor
    // Shared memory: stages of operands, and stages of packed rows and of 16 bytes of each row that its scales stand
    // in, which are further ahead.
    static constexpr int kStageBytes = kWeightBytes + kTokens * kLineBytes;
    static constexpr int kStages = kTokens <= 64 ? 3 : (kTokens == 128 ? 5 : 4);
    static constexpr int kRowsBytes = kOutputs * kDepth / columns_per_chunk(kType) * kChunkBytes;
    static constexpr int kPackedBytes = kRowsBytes + kOutputs * kChunkBytes;
    static constexpr int kRoom = 227 * 1024 / kCtas - 2048; // a CTA has 1 KiB of the system's, and 1 KiB to align
    static constexpr int kAhead =
        (kRoom - kStages * kStageBytes) / kPackedBytes < 8 ? (kRoom - kStages * kStageBytes) / kPackedBytes : 8;
    static constexpr int kSharedBytes = kStages * kStageBytes + kAhead * kPackedBytes + 1024;
    static_assert(kAhead >= 3 && kTokens * kSumStride * 4 <= kStages * kStageBytes);
};

struct MatmulArguments {
    PackedMatmulParams p;
    int group_shift;             // log2 of the group size
    CUtensorMap x, rows, scales; // boxes of a stage; x swizzled
};

// Of a stage's packed rows: how many, and columns of each.
CATS_HOST_DEVICE constexpr int box_rows(bool input_rows) { return input_rows ? kDepth : kOutputs; }
CATS_HOST_DEVICE constexpr int box_columns(bool input_rows) { return input_rows ? kOutputs : kDepth; }

// 32 columns of a packed row as they are stored. Their groups are multiples of 32: one scale.
template <WeightType kType> struct PackedUnit {
    static constexpr int kChunks = kUnitColumns / columns_per_chunk(kType);
    static constexpr int kTileColumns = kTileChunks * columns_per_chunk(kType);

    uint4 bits[kChunks];
    float scale, zero;

    __device__ __forceinline__ void load(const uint8_t *chunks) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) bits[i] = reinterpret_cast<const uint4 *>(chunks)[i];
    }

    // From where the scale stands, and after it the zero point.
    __device__ __forceinline__ void set_scale(const uint8_t *of_group, bool zero_points) {
        if constexpr (kType == WeightType::kFloat8) {
            scale = *reinterpret_cast<const float *>(of_group);
        } else {
            scale = PackedRow::half_at(of_group);
            zero = kType == WeightType::kInt4 && zero_points ? PackedRow::half_at(of_group + 2) : 8.f;
        }
    }

    // What the columns are computed with.
    struct Factors {
        float scale, offsets[2];
    };
    __device__ __forceinline__ Factors factors() const {
        if constexpr (kType == WeightType::kInt4) return {scale, {-(128.f + zero) * scale, -(2048.f + zero) * scale}};
        return {scale, {-(32768.f + 128.f) * scale}};
    }

    // Eight of the columns, from 8 * part on. The bits of an integer weight become the last places of an fp32 number of
    // a power of two, and one multiply-add takes that off again: exact before it is rounded, except that with a zero
    // point the product that is taken off is rounded, too, to 2^-13 of the scale.
    __device__ __forceinline__ void values(const Factors &factors, int part, float (&out)[8]) const {
        const auto word = [&](int i) { return reinterpret_cast<const uint32_t *>(bits)[i]; };
        if constexpr (kType == WeightType::kInt4) {
            const uint32_t w = word(part), views[4] = {w << 12, w << 4, w >> 4, w >> 12};
#pragma unroll
            for (int i = 0; i < 4; i++) { // two weights, in bits 12 to 15 and 16 to 19
                const float lower = __uint_as_float(masked(views[i], 0x0000f000, 0x45000000)), // 2048
                    upper = __uint_as_float(masked(views[i], 0x000f0000, 0x43000000));         // 128
                out[2 * i] = fmaf(lower, factors.scale, factors.offsets[1]);
                out[2 * i + 1] = fmaf(upper, factors.scale, factors.offsets[0]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t four = word(2 * part + i / 4);
                if constexpr (kType == WeightType::kInt8) { // plus 128, in bits 8 to 15 of 32768
                    const uint32_t number = __byte_perm(four ^ 0x80808080, 0x47000000, 0x7604 | i % 4 << 4);
                    out[i] = fmaf(__uint_as_float(number), factors.scale, factors.offsets[0]);
                } else {
                    __nv_fp8_e4m3 code;
                    code.__x = uint8_t(four >> 8 * (i % 4));
                    out[i] = float(code) * factors.scale;
                }
            }
        }
    }

    // (word & mask) | rest in one instruction: with constants that the compiler knows it takes two.
    static __device__ __forceinline__ uint32_t masked(uint32_t word, uint32_t mask, uint32_t rest) {
        asm("mov.b32 %0, %0;" : "+r"(mask));
        asm("mov.b32 %0, %0;" : "+r"(rest));
        uint32_t result;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(rest));
        return result;
    }
};

#if CATS_HAS_WGMMA

struct MatmulBarriers {
    uint64_t *full, *empty;      // of stages: operands are written; they are multiplied with
    uint64_t *packed, *unpacked; // of stages of packed rows: they have arrived; they are read
};

template <WeightType kType, typename T, bool kInputRows, int kTokens>
__device__ __forceinline__ void produce(const MatmulArguments &args, uint8_t *ring, const MatmulBarriers &barriers,
                                        int first, int last) {
    using Shape = MatmulShape<kType, kTokens>;
    using Unit = PackedUnit<kType>;
    uint8_t *const packed = ring + Shape::kStages * Shape::kStageBytes;
    constexpr int kUnits = Shape::kUnits, kWarps = Shape::kProducers / 32;
    constexpr int kAhead = Shape::kAhead, kRequest = kAhead - 2; // a slot is asked for two stages after it was read
    const RowFormat &format = args.p.format;
    const int thread = threadIdx.x - kConsumerGroups * kWarpGroup, lane = threadIdx.x % 32;
    const int tile = blockIdx.y * kOutputs, token = blockIdx.x * kTokens;
    // A line of a stage's operand is an output or an input. Eight lanes have two units of four lines, and no bank twice
    // where they write.
    const int unit = kInputRows ? thread % 2 + thread / 8 % 2 * 2 : thread % 2;
    const int line = kInputRows ? thread / 2 % 4 + thread / 16 * 4 : thread / 2;
    constexpr int kLinesApart = box_rows(kInputRows) / kUnits; // of a thread's units
    constexpr int kColumnsBytes = box_columns(kInputRows) / columns_per_chunk(kType) * kChunkBytes;

    // Where columns and their scales are in a row. The columns of a stage have theirs in one tile of the row, and in 16
    // bytes that start at a multiple of 16.
    const int tile_bytes = kTileChunks * kChunkBytes + format.scale_bytes;
    const int group_bytes = kType == WeightType::kFloat8 ? 0 : (format.zero_points ? 4 : 2);
    const auto columns_of = [&](int stage) -> unsigned { return kInputRows ? tile : stage * kDepth; };
    const auto data_at = [&](unsigned columns) -> int {
        return columns / Unit::kTileColumns * tile_bytes + format.scale_bytes +
               columns % Unit::kTileColumns / columns_per_chunk(kType) * kChunkBytes;
    };
    const auto scale_at = [&](unsigned columns) -> int {
        return columns / Unit::kTileColumns * tile_bytes +
               (columns % Unit::kTileColumns >> args.group_shift) * group_bytes;
    };
    const int scale_of_unit = (unit * kUnitColumns >> args.group_shift) * group_bytes;

    const auto request = [&](int i) { // stage first + i; by one lane
        const int slot = i % kAhead, row = kInputRows ? (first + i) * kDepth : tile;
        const unsigned columns = columns_of(first + i);
        if (i >= kAhead) wait(barriers.unpacked + slot, i / kAhead - 1 & 1);
        uint8_t *const to = packed + slot * Shape::kPackedBytes;
        expect_bytes(barriers.packed + slot, box_rows(kInputRows) * (kColumnsBytes + kChunkBytes));
        arrive(barriers.packed + slot);
        copy_box(to, &args.rows, data_at(columns), row, barriers.packed + slot);
        copy_box(to + Shape::kRowsBytes, &args.scales, scale_at(columns) & ~15, row, barriers.packed + slot);
    };
    if (thread == 0)
        for (int i = 0; i < min(kRequest, last - first); i++) request(i);

    int slot = 0, packed_slot = 0;
    uint32_t parity = 1, packed_parity = 0;
    for (int stage = first; stage < last; stage++) {
        uint8_t *const weights = ring + slot * Shape::kStageBytes;
        wait(barriers.empty + slot, parity);
        if (lane == 0 && stage % kWarps == thread / 32) { // in turns
            expect_bytes(barriers.full + slot, kTokens * kLineBytes);
            copy_box(weights + kWeightBytes, &args.x, stage * kDepth, token, barriers.full + slot);
            if (stage + kRequest < last) request(stage - first + kRequest);
        }
        wait(barriers.packed + packed_slot, packed_parity);
        const uint8_t *const from = packed + packed_slot * Shape::kPackedBytes;
        const int of_group = (scale_at(columns_of(stage)) & 15) + scale_of_unit;
        Unit units[kUnits]; // all are read before the first is unpacked
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
            const int own = line + u * kLinesApart;
            units[u].load(from + own * kColumnsBytes + unit * Unit::kChunks * kChunkBytes);
            units[u].set_scale(from + Shape::kRowsBytes + own * kChunkBytes + of_group, format.zero_points);
        }
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
            const int own = line + u * kLinesApart;
            const typename Unit::Factors factors = units[u].factors();
            // Transposed, a warp group's 64 outputs are lines of their own.
            uint8_t *const to = weights + (kInputRows ? unit / 2 * (kWeightBytes / 2) : 0) + own * kLineBytes;
#pragma unroll
            for (int part = 0; part < 4; part++) {
                float values[8];
                units[u].values(factors, part, values);
                alignas(16) T rounded[8];
#pragma unroll
                for (int e = 0; e < 8; e++) rounded[e] = round_to<T>(values[e]);
                *reinterpret_cast<uint4 *>(to + ((unit % 2 * 4 + part) ^ line % 8) * kChunkBytes) =
                    *reinterpret_cast<const uint4 *>(rounded);
            }
        }
        __syncwarp();
        if (lane == 0) {
            arrive(barriers.full + slot);
            arrive(barriers.unpacked + packed_slot);
        }
        if (++slot == Shape::kStages) slot = 0, parity ^= 1;
        if (++packed_slot == kAhead) packed_slot = 0, packed_parity ^= 1;
    }
}

template <WeightType kType, typename T, bool kInputRows, int kTokens>
__device__ __forceinline__ void consume(uint8_t *ring, const MatmulBarriers &barriers, int stages,
                                        float (&d)[kTokens / 2]) {
    using Shape = MatmulShape<kType, kTokens>;
    const int lane = threadIdx.x % 32, group = threadIdx.x / kWarpGroup;
    int slot = 0, before = 0;
    uint32_t parity = 0;
    for (int stage = 0; stage < stages; stage++) {
        wait(barriers.full + slot, parity);
        const uint32_t weights = smem_address(ring + slot * Shape::kStageBytes);
        const uint64_t a = matrix_descriptor(weights + group * (kWeightBytes / 2)),
                       b = matrix_descriptor(weights + kWeightBytes);
        // By those who read: it waits for a thread's reads of global memory, too (bench/NOTES.md), and these have none.
        fence_for_async_proxy();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; k++) // 16 inputs are 16 lines, or 32 bytes of each line
            wgmma<T, kInputRows>(d, a + k * (kInputRows ? 16 * kLineBytes / 16 : 2), b + k * 2);
        wgmma_commit();
        wgmma_wait<1>();
        if (stage > 0 && lane == 0) arrive(barriers.empty + before);
        before = slot;
        if (++slot == Shape::kStages) slot = 0, parity ^= 1;
    }
    wgmma_wait<0>();
}

__device__ __forceinline__ float4 load_of_cluster(const float *own, uint32_t rank) {
    float4 v;
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(own)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void synchronise_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <WeightType kType, typename T, bool kInputRows, int kTokens>
__device__ __forceinline__ void packed_matmul_body(const MatmulArguments &args) {
    using Shape = MatmulShape<kType, kTokens>;
    const PackedMatmulParams &p = args.p;
    __shared__ uint64_t of_stages[2][Shape::kStages], of_packed[2][Shape::kAhead];
    const MatmulBarriers barriers{of_stages[0], of_stages[1], of_packed[0], of_packed[1]};
    extern __shared__ uint8_t unaligned[];
    uint8_t *const ring = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
    const int stages = ceil_div(p.inputs, kDepth), share = blockIdx.z, shares = gridDim.z;
    const int first = stages * share / shares, last = stages * (share + 1) / shares;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int s = 0; s < Shape::kStages; s++) {
            init_barrier(barriers.full + s, Shape::kProducers / 32);
            init_barrier(barriers.empty + s, kConsumerGroups * kWarpGroup / 32);
        }
        for (int s = 0; s < Shape::kAhead; s++) {
            init_barrier(barriers.packed + s, 1);
            init_barrier(barriers.unpacked + s, Shape::kProducers / 32);
        }
        publish_barriers();
        fence_for_async_proxy();
    }
    __syncthreads();
    wait_for_previous_kernel();

    float *const sums = reinterpret_cast<float *>(ring); // [kTokens][kSumStride], when all is multiplied
    if (threadIdx.x >= kConsumerGroups * kWarpGroup) {
        produce<kType, T, kInputRows, kTokens>(args, ring, barriers, first, last);
    } else {
        float d[kTokens / 2];
#pragma unroll
        for (float &sum : d) sum = 0.f;
        consume<kType, T, kInputRows, kTokens>(ring, barriers, last - first, d);
        // Both groups have read all stages before sums take their place.
        asm volatile("bar.sync 1, %0;" ::"n"(kConsumerGroups * kWarpGroup) : "memory");
        const int output = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < kTokens / 2; i++)
            sums[(i / 4 * 8 + column + i % 2) * kSumStride + output + i % 4 / 2 * 8] = d[i];
    }
    if (shares > 1) synchronise_cluster();
    else __syncthreads();

    // A line of y a warp. The CTAs of a cluster share the tokens.
    const int lane = threadIdx.x % 32, output = blockIdx.y * kOutputs + lane * 4, each = kTokens / shares;
    if (output < p.outputs) {
        float bias[4] = {};
        if (p.bias) {
#pragma unroll
            for (int e = 0; e < 4; e++) bias[e] = to_float(static_cast<const T *>(p.bias)[output + e]);
        }
        for (int t = threadIdx.x / 32; t < each; t += Shape::kThreads / 32) {
            const int64_t token = int64_t(blockIdx.x) * kTokens + share * each + t;
            if (token >= p.tokens) break;
            const float *from = sums + (share * each + t) * kSumStride + lane * 4;
            float4 sum = shares == 1 ? *reinterpret_cast<const float4 *>(from) : load_of_cluster(from, 0);
            for (int other = 1; other < shares; other++) {
                const float4 more = load_of_cluster(from, other);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            alignas(8) const T rounded[4] = {round_to<T>(sum.x + bias[0]), round_to<T>(sum.y + bias[1]),
                                             round_to<T>(sum.z + bias[2]), round_to<T>(sum.w + bias[3])};
            *reinterpret_cast<uint2 *>(static_cast<T *>(p.y) + token * p.outputs + output) =
                *reinterpret_cast<const uint2 *>(rounded);
        }
    }
    // Others may still read this CTA's sums. What they read they have, so nothing has to be released.
    if (shares > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

#endif

template <WeightType kType, typename T, bool kInputRows, int kTokens>
__global__ void __launch_bounds__(MatmulShape<kType, kTokens>::kThreads, MatmulShape<kType, kTokens>::kCtas)
    packed_matmul_kernel(const __grid_constant__ MatmulArguments args) {
#ifdef __CUDA_ARCH__
#if CATS_HAS_WGMMA
    packed_matmul_body<kType, T, kInputRows, kTokens>(args);
#else
    __trap(); // has no static shared memory, by which the host knows it
#endif
#endif
}

} // namespace cats
