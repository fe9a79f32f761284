// The product of packed rows with many tokens, on Hopper's tensor cores. To unpack a matrix first, and to multiply
// then, writes and reads it once more: of a layer of 4096x14336 that is 0.13 ms, more than the products of 100 tokens.
//
// A tile is 128 outputs of kTokens tokens, a stage of it 128 inputs. One warp asks the copy engine for packed rows and
// x. Two warp groups unpack, each half of the outputs, into registers, from which wgmma takes them. While it
// multiplies they unpack the next. Values are rounded as unpack_rows rounds them, but for zero points
// (rows/packed_fragment.cuh).
//
// Tiles seldom divide by the CTAs of a device, so each CTA has the same number of stages, which may begin and end
// within tiles. The sums of a tile's first stages are left in memory for the CTA that has its last ones, which adds
// them in the same order in every run.
#pragma once

#include <cuda.h>

#include "../packed_matmul.h"
#include "rows/packed_fragment.cuh"
#include "wgmma.cuh"

namespace cats {

constexpr int kOutputs = 128, kDepth = 128;                  // of a tile; inputs of a stage
constexpr int kXDepth = 64;                                  // inputs of a copy of x: lines of 128 bytes
constexpr int kWarpGroup = 128, kConsumers = 2 * kWarpGroup; // threads

template <WeightType kType, int kTokens> struct MatmulShape {
    static constexpr int kThreads = kConsumers + kWarpGroup;
    static constexpr int kCtas = kTokens <= 64 ? 2 : 1; // of a multiprocessor
    // Of threads that multiply and of those that ask, together no more than the kernel is launched with.
    static constexpr int kRegisters = kCtas == 1 ? 240 : 104, kFewRegisters = kCtas == 1 ? 24 : 32;
    static constexpr int kRowsBytes = kOutputs * kDepth / columns_per_chunk(kType) * kChunkBytes;
    static constexpr int kPackedBytes = kRowsBytes + kBoxRows * kChunkBytes;
    static constexpr int kXBytes = kTokens * kXDepth * 2;
    static constexpr int kRoom = 227 * 1024 / kCtas - 2048; // a CTA has 1 KiB of the system's, and 1 KiB to align
    static constexpr int kFit = kRoom / (kPackedBytes + 2 * kXBytes);
    static constexpr int kPackedStages = kFit < 3 ? 3 : (kFit > 6 ? 6 : kFit);
    static constexpr int kXFit = (kRoom - kPackedStages * kPackedBytes) / kXBytes;
    static constexpr int kXStages = kXFit < 2 * kPackedStages ? kXFit : 2 * kPackedStages;
    static constexpr int kSharedBytes = kPackedStages * kPackedBytes + kXStages * kXBytes + 1024;
    static_assert(kXStages >= 4);
};

struct MatmulArguments {
    PackedMatmulParams p;
    int group_shift; // log2 of the group size
    uint32_t *left;  // [CTAs], of CTAs that leave sums in p.scratch, [CTAs][kTokens][kOutputs]; zero between launches
    CUtensorMap x, rows, scales; // boxes of a stage; x and rows swizzled
};

#if CATS_HAS_WGMMA

// Where a CTA is in its stages, which are [begin, end) of those of all tiles, one tile's after another's. It takes the
// last tile first, and of each the stages in order.
struct StageCursor {
    int64_t begin;
    int stages;            // of a whole tile
    int tile, first, last; // stages [first, last) of it

    __device__ StageCursor(int64_t begin, int64_t end, int stages)
        : begin(begin), stages(stages), tile(int((end - 1) / stages)), last(int(end - int64_t(tile) * stages)) {
        first = int(max(begin - int64_t(tile) * stages, int64_t(0)));
    }
    __device__ __forceinline__ bool done() const { return last <= first; }
    __device__ __forceinline__ void next_tile() {
        last = first > 0 || tile == 0 ? 0 : stages;
        tile--;
        first = int(max(begin - int64_t(tile) * stages, int64_t(0)));
    }
};

struct MatmulBarriers {
    uint64_t *x_full, *x_empty, *packed_full, *packed_empty;
};

// A slot of a ring, and the parity of its use.
template <int kSlots> struct RingPlace {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == kSlots) slot = 0, parity ^= 1;
    }
};

// Where columns and their scales are in a row. The columns of a stage have theirs in one tile of the row, and in 16
// bytes that start at a multiple of 16.
template <WeightType kType, bool kZeroPoints> struct RowPlaces {
    static constexpr unsigned kTileColumns = kTileChunks * columns_per_chunk(kType);
    const RowFormat &format;
    const int group_shift;

    __device__ __forceinline__ int tile_at(unsigned columns) const {
        return columns / kTileColumns * (kTileChunks * kChunkBytes + format.scale_bytes);
    }
    __device__ __forceinline__ int data_at(unsigned columns) const {
        return tile_at(columns) + format.scale_bytes + columns % kTileColumns / columns_per_chunk(kType) * kChunkBytes;
    }
    __device__ __forceinline__ int scale_at(unsigned columns) const {
        if (kType == WeightType::kFloat8) return tile_at(columns);
        return tile_at(columns) + (columns % kTileColumns >> group_shift) * (kZeroPoints ? 4 : 2);
    }
};

// By one thread.
template <WeightType kType, bool kZeroPoints, bool kInputRows, int kTokens>
__device__ __forceinline__ void request_stages(const MatmulArguments &args, uint8_t *ring,
                                               const MatmulBarriers &barriers, StageCursor at, int token_tiles) {
    using Shape = MatmulShape<kType, kTokens>;
    const RowPlaces<kType, kZeroPoints> places{args.p.format, args.group_shift};
    RingPlace<Shape::kXStages> x;
    RingPlace<Shape::kPackedStages> packed;
    for (; !at.done(); at.next_tile()) {
        const int token = at.tile % token_tiles * kTokens;
        const int output = at.tile / token_tiles * kOutputs;
        for (int stage = at.first; stage < at.last; stage++) {
            const int row = kInputRows ? stage * kDepth : output;
            const unsigned columns = kInputRows ? output : stage * kDepth;
            uint8_t *const to = ring + Shape::kXStages * Shape::kXBytes + packed.slot * Shape::kPackedBytes;
            uint64_t *const full = barriers.packed_full + packed.slot;
            wait(barriers.packed_empty + packed.slot, packed.parity ^ 1);
            expect_bytes(full, Shape::kPackedBytes);
            arrive(full);
            copy_box(to, &args.rows, places.data_at(columns), row, full);
            copy_box(to + Shape::kRowsBytes, &args.scales, places.scale_at(columns) & ~15, row, full);
            packed.next();
            for (int half = 0; half < kDepth / kXDepth; half++) {
                uint8_t *const x_to = ring + x.slot * Shape::kXBytes;
                uint64_t *const x_full = barriers.x_full + x.slot;
                const int input = stage * kDepth + half * kXDepth;
                wait(barriers.x_empty + x.slot, x.parity ^ 1);
                expect_bytes(x_full, Shape::kXBytes);
                arrive(x_full);
                copy_box(x_to, &args.x, input, token, x_full);
                x.next();
            }
        }
    }
}

// Among the threads that multiply.
__device__ __forceinline__ void synchronise_consumers() {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows, int kTokens> struct Consumer {
    using Shape = MatmulShape<kType, kTokens>;
    using Fragment = PackedFragment<kType, kZeroPoints, T, kInputRows>;

    const MatmulArguments &args;
    uint8_t *const ring;
    const MatmulBarriers &barriers;
    const RowPlaces<kType, kZeroPoints> places;
    const Fragment fragment;
    RingPlace<Shape::kXStages> x;
    RingPlace<Shape::kPackedStages> packed;

    __device__ __forceinline__ Consumer(const MatmulArguments &args, uint8_t *ring, const MatmulBarriers &barriers)
        : args(args), ring(ring), barriers(barriers), places{args.p.format, args.group_shift},
          fragment(args.group_shift) {}

    __device__ __forceinline__ void load(int stage, int output, int slot, int index,
                                         typename Fragment::Unit &unit) const {
        const uint8_t *const rows = ring + Shape::kXStages * Shape::kXBytes + slot * Shape::kPackedBytes;
        fragment.load(rows, rows + Shape::kRowsBytes, places.scale_at(kInputRows ? output : stage * kDepth) & 15, index,
                      unit);
    }

    // d: the sums of stages [first, last) of the tile with this output. Half a stage is unpacked while the products of
    // the half before are under way. Smaller steps, unpacked between the instructions of one group, were slower
    // (bench/NOTES.md).
    __device__ __forceinline__ void multiply(int first, int last, int output, float (&d)[kTokens / 2]) {
#pragma unroll
        for (float &sum : d) sum = 0.f;
        uint32_t a[2][2][2][4]; // of half a stage: two units of two steps
        int before = -1;
        for (int stage = first; stage < last; stage++) {
            wait(barriers.packed_full + packed.slot, packed.parity);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                auto &operand = a[half];
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    typename Fragment::Unit unit;
                    load(stage, output, packed.slot, half * 2 + u, unit);
                    fragment.unpack(unit, operand[u]);
                }
                wait(barriers.x_full + x.slot, x.parity);
                const uint64_t b = matrix_descriptor(smem_address(ring + x.slot * Shape::kXBytes));
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 4; step++) // 16 inputs are 32 bytes of a line
                    wgmma<T>(d, operand[step / 2][step % 2], b + step * 2);
                wgmma_commit();
                if (half == 1) {
                    // Not sooner: it may overtake reads of shared memory whose values have not been used, and then the
                    // next copy comes before them.
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) arrive(barriers.packed_empty + packed.slot);
                }
                wgmma_wait<1>();
                if (before >= 0 && threadIdx.x % 32 == 0) arrive(barriers.x_empty + before);
                before = x.slot;
                x.next();
            }
            packed.next();
        }
        wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) arrive(barriers.x_empty + before);
    }

    // Where a CTA leaves its sums, in the order in which the same threads of another one read them.
    __device__ __forceinline__ float4 *left_sums(int64_t cta) const {
        return static_cast<float4 *>(args.p.scratch) + cta * (kTokens * kOutputs / 4) + threadIdx.x;
    }

    __device__ __forceinline__ void leave(int64_t cta, const float (&d)[kTokens / 2]) const {
        float4 *const to = left_sums(cta);
#pragma unroll
        for (int i = 0; i < kTokens / 8; i++)
            to[i * kConsumers] = make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
        synchronise_consumers();
        if (threadIdx.x == 0)
            asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%0], 1;" ::"l"(args.left + cta) : "memory");
    }

    // Adds what CTAs [first, own) have left of this one's first tile. They have been started before this one, and left
    // it before anything else, so nothing that they wait for can wait for this one.
    __device__ __forceinline__ void add_left(int first, int own, float (&d)[kTokens / 2]) const {
        for (int cta = first + int(threadIdx.x); cta < own; cta += kConsumers) {
            uint32_t *const left = args.left + cta;
            uint32_t there;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(left) : "memory");
            while (!there);
            *left = 0;
        }
        synchronise_consumers();
#pragma unroll(kTokens <= 64 ? 4 : (kTokens == 128 ? 2 : 1)) // as many registers as there are
        for (int cta = first; cta < own; cta++) {
            const float4 *const from = left_sums(cta);
#pragma unroll
            for (int i = 0; i < kTokens / 8; i++) {
                const float4 more = __ldcg(from + i * kConsumers);
                d[4 * i] += more.x, d[4 * i + 1] += more.y, d[4 * i + 2] += more.z, d[4 * i + 3] += more.w;
            }
        }
    }

    __device__ __forceinline__ void store(int64_t token, int output, const float (&d)[kTokens / 2]) const {
        const PackedMatmulParams &p = args.p;
        output += fragment.warp * 16 + fragment.pair * 2;
        if (output >= p.outputs) return;
        const T *const bias = static_cast<const T *>(p.bias) + output;
        const float bias0 = p.bias ? to_float(bias[0]) : 0.f, bias1 = p.bias ? to_float(bias[1]) : 0.f;
        token += fragment.quarter * 2;
        T *to = static_cast<T *>(p.y) + token * p.outputs + output;
#pragma unroll
        for (int i = 0; i < kTokens / 8; i++, token += 8, to += 8 * p.outputs) {
            if (token < p.tokens)
                *reinterpret_cast<uint32_t *>(to) = rounded_pair<T>(d[4 * i] + bias0, d[4 * i + 2] + bias1);
            if (token + 1 < p.tokens)
                *reinterpret_cast<uint32_t *>(to + p.outputs) =
                    rounded_pair<T>(d[4 * i + 1] + bias0, d[4 * i + 3] + bias1);
        }
    }
};

template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows, int kTokens>
__device__ __forceinline__ void packed_matmul_body(const MatmulArguments &args) {
    using Shape = MatmulShape<kType, kTokens>;
    const PackedMatmulParams &p = args.p;
    __shared__ uint64_t of_x[2][Shape::kXStages], of_packed[2][Shape::kPackedStages];
    const MatmulBarriers barriers{of_x[0], of_x[1], of_packed[0], of_packed[1]};
    extern __shared__ uint8_t unaligned[];
    uint8_t *const ring = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
    launch_dependents();
    if (threadIdx.x == 0) {
        for (const CUtensorMap *map : {&args.x, &args.rows, &args.scales}) prefetch_map(map);
        for (int s = 0; s < Shape::kXStages; s++) {
            init_barrier(barriers.x_full + s, 1);
            init_barrier(barriers.x_empty + s, kConsumers / 32);
        }
        for (int s = 0; s < Shape::kPackedStages; s++) {
            init_barrier(barriers.packed_full + s, 1);
            init_barrier(barriers.packed_empty + s, kConsumers / 32);
        }
        publish_barriers();
        fence_for_async_proxy();
    }
    const int stages = ceil_div(p.inputs, kDepth), token_tiles = ceil_div(p.tokens, kTokens);
    const int64_t all = int64_t(token_tiles) * ceil_div(p.outputs, kOutputs) * stages;
    const int64_t ctas = gridDim.x, own = blockIdx.x;
    StageCursor at(all * own / ctas, all * (own + 1) / ctas, stages);
    __syncthreads();
    wait_for_previous_kernel();

    if (threadIdx.x >= kConsumers) {
        give_registers<Shape::kFewRegisters>();
        if (threadIdx.x == kConsumers)
            request_stages<kType, kZeroPoints, kInputRows, kTokens>(args, ring, barriers, at, token_tiles);
    } else {
        take_registers<Shape::kRegisters>();
        Consumer<kType, kZeroPoints, T, kInputRows, kTokens> consumer(args, ring, barriers);
        for (; !at.done(); at.next_tile()) {
            const int output = at.tile / token_tiles * kOutputs;
            float d[kTokens / 2];
            consumer.multiply(at.first, at.last, output, d);
            if (at.last < stages) {
                consumer.leave(own, d);
                continue;
            }
            if (at.first > 0) { // the CTA that has the tile's first stage is the last one that begins no later
                const int64_t first = ((int64_t(at.tile) * stages + 1) * ctas - 1) / all;
                consumer.add_left(int(first), int(own), d);
            }
            consumer.store(int64_t(at.tile % token_tiles) * kTokens, output, d);
        }
    }
}

#endif

template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows, int kTokens>
__global__ void __launch_bounds__(MatmulShape<kType, kTokens>::kThreads, MatmulShape<kType, kTokens>::kCtas)
    packed_matmul_kernel(const __grid_constant__ MatmulArguments args) {
#ifdef __CUDA_ARCH__
#if CATS_HAS_WGMMA
    packed_matmul_body<kType, kZeroPoints, T, kInputRows, kTokens>(args);
#else
    __trap(); // has no static shared memory, by which the host knows it
#endif
#endif
}

} // namespace cats
