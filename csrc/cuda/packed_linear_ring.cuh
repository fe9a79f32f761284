// The product of packed rows with one row, for a step of decoding: ../packed_linear.h.
//
// Each CTA has an equal share of the rows, in batches of 8. One warp copies them into a ring of slots in shared memory,
// and 8 warps multiply them on the tensor cores, each with its own blocks of 128 columns:
//
//     D[8 rows of block b, then of block b + 1; 8] += W[8 + 8 rows, 16 columns] B[16 columns, 8]
//
// A lane multiplies the words of 16 bytes of a row as they are (unpack.cuh), since the order of the columns in a dot
// product does not matter. Each column of B has x in one group of columns and zeros elsewhere, so that the groups of a
// warp share its registers and each sum in D has one scale; of the sums of a block only those of its own groups are
// used.
//
// A launch takes as long as its chain of dependent steps: from sm_90 on launches overlap (programmatic dependent
// launch), the rows are asked for before the previous kernel has ended, and registers and shared memory leave room for
// the kernels before and after on the same multiprocessor.
#pragma once

#include "packed_linear_input.cuh"
#include "unpack.cuh"

namespace cats {

constexpr int kLinearWarps = 8, kLinearThreads = kLinearWarps * 32;
constexpr int kLinearRows = 8; // of a batch
constexpr int kSumBatches = 8; // whose partial sums are added at a time
constexpr int kSumRows = kSumBatches * kLinearRows;

struct LinearRing {
    int32_t slots, row_bytes, row_stride; // row_stride: of a slot's rows
};

// Shared memory: slots | x of the workers | partial sums, twice | barriers
CATS_HOST_DEVICE constexpr int linear_x_bytes(int64_t inputs) { return round_up(inputs, kPackedColumns) * 2; }
CATS_HOST_DEVICE constexpr int linear_slot_bytes(const LinearRing &ring) { return kLinearRows * ring.row_stride; }
constexpr int linear_shared_bytes(const LinearRing &ring, int64_t inputs) {
    return ring.slots * (linear_slot_bytes(ring) + 16) + linear_x_bytes(inputs) +
           2 * kLinearWarps * kSumRows * int(sizeof(float));
}

__device__ __forceinline__ float half_bits(uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

// kGroup: columns that share a scale; 128 of rows with one scale. kBlocks: the most blocks of a warp.
template <WeightType kType, int kGroup, typename T, int kBlocks> class RingLinear {
    using Unpack = cats::Unpack<kType>;
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr bool kInt4 = kType == WeightType::kInt4, kFloat8 = kType == WeightType::kFloat8;
    static constexpr int kLoads = kInt4 ? 1 : 2;                                      // of 16 bytes, of a lane's row
    static constexpr int kRun = 32 / kLoads;                                          // columns of a load
    static constexpr int kTileBlocks = kInt4 ? 8 : 4, kBlockBytes = kInt4 ? 64 : 128; // of a row
    static constexpr int kGroups = kPackedColumns / kGroup;                           // of a block
    static constexpr int kSets = (kBlocks * kGroups + 7) / 8;                         // of 8 groups
    static_assert(kBlocks % 2 == 0);

  public:
    __device__ RingLinear(const PackedLinearParams &p, const LinearRing &ring, uint8_t *smem)
        : p_(p), ring_(ring), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32), quad_(lane_ % 4), row_(lane_ / 4),
          slots_(smem) {
        int rows = 0;
#pragma unroll
        for (int part = 0; part < kMaxParts; part++)
            if (part < p.parts) rows += int(p.outputs[part]);
        // As many for each CTA, or one more: of n CTAs the first rows % n.
        const int more = rows % int(gridDim.x), cta = int(blockIdx.x);
        rows_ = rows / int(gridDim.x) + (cta < more);
        first_row_ = rows / int(gridDim.x) * cta + min(cta, more);
        batches_ = ceil_div(rows_, kLinearRows);
        uint8_t *at = smem + ring.slots * linear_slot_bytes(ring);
        x_ready_ = reinterpret_cast<uint4 *>(at);
        partials_ = reinterpret_cast<float *>(at + linear_x_bytes(p.inputs));
        barriers_ = reinterpret_cast<uint64_t *>(partials_ + 2 * kLinearWarps * kSumRows);
    }

    __device__ __forceinline__ void run() {
        if (copies()) {
            for (int s = lane_; s < ring_.slots; s += 32) {
                init_barrier(full(s), kBulk ? 1 : 32);
                init_barrier(done(s), kLinearWarps);
            }
            publish_barriers();
            __syncwarp();
            const int batches = min(batches_, ring_.slots);
            for (int s = lane_; s < batches; s += 32) expect(s, s);
            __syncwarp();
            copy_rows(0, 0, min(rows_, batches * kLinearRows));
        }
        const int blocks = ceil_div(p_.inputs, kPackedColumns), each = ceil_div(blocks, kLinearWarps);
        first_ = min(warp_ * each, blocks);
        count_ = min(each, blocks - first_);
        {
            LinearInput<T, kBlocks / 2> input(p_, first_, count_);
            input.load_norm();
            __syncthreads(); // the barriers are there
            wait_for_previous_kernel();
            unscale_ = input.template prepare<kInt4>(x_ready_ + first_ * (kPackedColumns / 8));
        }
        keep_x();
        Additions additions = load_additions(0);
        int slot = 0, previous = 0;
        uint32_t parity = 0, previous_parity = 0;
        for (int batch = 0; batch < batches_; batch++) {
            if (batch && copies()) refill(batch - 1 + ring_.slots, previous, previous_parity);
            wait(full(slot), parity);
            const float dot = product(slots_ + slot * linear_slot_bytes(ring_) + row_ * ring_.row_stride);
            __syncwarp();
            if (lane_ == 0) arrive(done(slot));
            const int of_sums = batch % kSumBatches;
            float *sums = partials_ + batch / kSumBatches % 2 * (kLinearWarps * kSumRows);
            if (quad_ == 0) sums[warp_ * kSumRows + of_sums * kLinearRows + row_] = dot;
            if (of_sums + 1 == kSumBatches || batch + 1 == batches_) {
                __syncthreads();
                add_up(sums, additions);
                additions = load_additions((batch + 1) * kLinearRows);
            }
            previous = slot, previous_parity = parity;
            if (++slot == ring_.slots) slot = 0, parity ^= 1;
        }
    }

  private:
#if __CUDA_ARCH__ >= 900
    static constexpr bool kBulk = true;
#else
    static constexpr bool kBulk = false;
#endif

    __device__ __forceinline__ uint64_t *full(int slot) const { return barriers_ + 2 * slot; }
    __device__ __forceinline__ uint64_t *done(int slot) const { return barriers_ + 2 * slot + 1; }

    // --- copies ------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ bool copies() const { return warp_ == kLinearWarps - 1; }

    __device__ __forceinline__ const uint8_t *row_address(int row) const { // of this CTA
        row += first_row_;
        int part = 0;
#pragma unroll
        for (int k = 0; k < kMaxParts - 1; k++)
            if (part == k && k + 1 < p_.parts && row >= p_.outputs[k]) row -= int(p_.outputs[k]), part++;
        return static_cast<const uint8_t *>(p_.weights[part]) + int64_t(row) * p_.strides[part];
    }

    // Rows r, r + step, ... of `count` rows from `first` on, which lie in consecutive slots from `slot` on.
    __device__ __forceinline__ void copy_rows(int first, int slot, int count) const {
        uint8_t *to = slots_ + slot * linear_slot_bytes(ring_);
        if constexpr (kBulk) {
            const uint64_t policy = read_once_policy();
#pragma unroll 1
            for (int r = lane_; r < count; r += 32)
                copy_bulk(to + r * ring_.row_stride, row_address(first + r), uint32_t(ring_.row_bytes),
                          full(slot + r / kLinearRows), policy);
        } else {
            for (int r = 0; r < count; r++) {
                const uint8_t *from = row_address(first + r);
                for (int i = lane_ * kChunkBytes; i < ring_.row_bytes; i += 32 * kChunkBytes)
                    copy_async<kChunkBytes>(to + r * ring_.row_stride + i, from + i);
                if ((r + 1) % kLinearRows == 0 || r + 1 == count)
                    arrive_after_async_copies(full(slot + r / kLinearRows));
            }
        }
    }

    __device__ __forceinline__ void expect(int batch, int slot) const {
        if constexpr (kBulk) {
            expect_bytes(full(slot), min(kLinearRows, rows_ - batch * kLinearRows) * ring_.row_bytes);
            arrive(full(slot));
        }
    }

    // The slot of the batch before, when all warps have read it.
    __device__ __forceinline__ void refill(int batch, int slot, uint32_t parity) const {
        if (batch >= batches_) return;
        wait(done(slot), parity);
        if (lane_ == 0) expect(batch, slot);
        __syncwarp();
        copy_rows(batch * kLinearRows, slot, min(kLinearRows, rows_ - batch * kLinearRows));
    }

    // --- sums --------------------------------------------------------------------------------------------------------

    // What is added to the product of a row; at: its place in y, -1: none.
    struct Additions {
        int at;
        T bias, residual;
    };

    // Of this thread's row, from `first` of this CTA's on.
    __device__ __forceinline__ Additions load_additions(int first) const {
        Additions a{-1, round_to<T>(0.f), round_to<T>(0.f)};
        int row = first + int(threadIdx.x);
        if (int(threadIdx.x) >= kSumRows || row >= rows_) return a;
        row += first_row_, a.at = row;
        if (p_.residual) a.residual = static_cast<const T *>(p_.residual)[row];
        int part = 0;
#pragma unroll
        for (int k = 0; k < kMaxParts - 1; k++)
            if (part == k && k + 1 < p_.parts && row >= p_.outputs[k]) row -= int(p_.outputs[k]), part++;
        if (p_.biases[part]) a.bias = static_cast<const T *>(p_.biases[part])[row];
        return a;
    }

    __device__ __forceinline__ void add_up(const float *sums, const Additions &a) const {
        if (a.at < 0) return;
        float y = to_float(a.bias);
#pragma unroll
        for (int w = 0; w < kLinearWarps; w++) y += sums[w * kSumRows + threadIdx.x];
        T result = round_to<T>(y);
        if (p_.residual) result = round_to<T>(to_float(result) + to_float(a.residual));
        static_cast<T *>(p_.y)[a.at] = result;
    }

    // --- products ----------------------------------------------------------------------------------------------------

    // The registers of B: in this lane's column row_, of each set, what its loads meet. And the sums of x in D's
    // columns, which offsets are multiplied by: products with ones.
    __device__ __forceinline__ void keep_x() {
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            const int group = s * 8 + row_, block = group / kGroups;
#pragma unroll
            for (int load = 0; load < kLoads; load++) {
                const int column = (load * 4 + quad_) * kRun;
                const bool there = block < count_ && column / kGroup == group % kGroups;
                const uint4 *from = x_ready_ + ((first_ + block) * kPackedColumns + column) / 8;
#pragma unroll
                for (int i = 0; i < kRun / 8; i++) {
                    const uint4 x = there ? from[i] : uint4{};
                    uint32_t *to = x_[s] + (load * kRun / 8 + i) * 4;
                    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
                }
            }
            if constexpr (kFloat8) continue;
            float c[2][4] = {};
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                constexpr uint32_t kOnes = 0x3c003c00, kOdd = kInt4 ? 0x4c004c00 : kOnes; // 16: an odd operand's weight
                mma<__half>(c[i / 2 % 2], kOnes, kOnes, kOdd, kOdd, x_[s][i], x_[s][i + 1]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) x_sums_[s][e] = c[0][e] + c[1][e];
        }
    }

    // Where block b of this warp begins in a row.
    __device__ __forceinline__ uint32_t block_at(int b, int scale_bytes) const {
        const uint32_t block = first_ + b;
        return block / kTileBlocks * (kTileChunks * kChunkBytes + scale_bytes) + scale_bytes +
               block % kTileBlocks * kBlockBytes;
    }

    // The same value. What follows from it is computed after this point, and takes no registers before.
    static __device__ __forceinline__ int computed_here(int value) {
        asm volatile("" : "+r"(value));
        return value;
    }

    // The dot product of this warp's columns, in the lanes of the row.
    __device__ __forceinline__ float product(const uint8_t *row) const {
        const int scale_bytes = computed_here(p_.format.scale_bytes);
        float d[kSets][2] = {}; // [set][column of D]
#pragma unroll
        for (int b = 0; b < kBlocks; b += 2) {
            if (b >= count_) break;
            // Of an odd number of blocks the last is there twice: no column of the second one is used.
            const uint32_t lower = block_at(b, scale_bytes) + quad_ * kChunkBytes,
                           upper = block_at(min(b + 1, count_ - 1), scale_bytes) + quad_ * kChunkBytes;
            const int set = b * kGroups / 8, column = b * kGroups % 8;
            float c[2][4] = {}; // two chains of products
#pragma unroll
            for (int load = 0; load < kLoads; load++) {
                const uint4 both[2] = {*reinterpret_cast<const uint4 *>(row + lower + load * 64),
                                       *reinterpret_cast<const uint4 *>(row + upper + load * 64)};
                const uint32_t low[4] = {both[0].x, both[0].y, both[0].z, both[0].w},
                               high[4] = {both[1].x, both[1].y, both[1].z, both[1].w};
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int o = 0; o < Unpack::kOperands; o += 2) {
                        const uint32_t *x = x_[set] + (load * 4 + i) * Unpack::kOperands + o;
                        mma<__half>(c[(i * Unpack::kOperands + o) / 2 % 2], Unpack::operand(low[i], o),
                                    Unpack::operand(high[i], o), Unpack::operand(low[i], o + 1),
                                    Unpack::operand(high[i], o + 1), x[0], x[1]);
                    }
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int group = quad_ * 2 + e - column; // of both blocks
                if (group >= 0 && group < kGroups) d[set][e] = c[0][e] + c[1][e];
                if (group >= kGroups && group < 2 * kGroups) d[set][e] = c[0][2 + e] + c[1][2 + e];
            }
        }
        float dot = 0.f;
        if constexpr (kFloat8) {
#pragma unroll
            for (int s = 0; s < kSets; s++) dot += d[s][0] + d[s][1];
            dot *= *reinterpret_cast<const float *>(row) * Unpack::kFactor;
        } else {
            constexpr uint32_t kTileGroups = kTileBlocks * kGroups;
            const int last =
                computed_here(int(p_.inputs)) / kGroup - 1; // groups that do not exist: all that they multiply is zero
#pragma unroll
            for (int s = 0; s < kSets; s++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint32_t group = min(first_ * kGroups + s * 8 + quad_ * 2 + e, last);
                    const uint8_t *at = row + group / kTileGroups * (kTileChunks * kChunkBytes + scale_bytes) +
                                        group % kTileGroups * (p_.format.zero_points ? 4 : 2);
                    const float scale = half_bits(*reinterpret_cast<const uint16_t *>(at));
                    const float offset = kInt4 && p_.format.zero_points
                                             ? half_bits(*reinterpret_cast<const uint16_t *>(at + 2))
                                             : Unpack::kOffset;
                    dot = fmaf(scale, fmaf(d[s][e], Unpack::kFactor, -offset * x_sums_[s][e]), dot);
                }
        }
        dot += __shfl_xor_sync(kAll, dot, 1);
        dot += __shfl_xor_sync(kAll, dot, 2);
        return dot * unscale_;
    }

    const PackedLinearParams &p_;
    const LinearRing &ring_;
    const int lane_, warp_, quad_, row_; // row_: of a batch, or the column of B
    uint8_t *slots_;
    uint4 *x_ready_; // operands of B for 8 columns each
    float *partials_;
    uint64_t *barriers_;
    int first_row_, rows_, batches_; // of this CTA
    int first_ = 0, count_ = 0;      // blocks of this warp
    uint32_t x_[kSets][16];
    float x_sums_[kSets][2], unscale_ = 1.f;
};

template <WeightType kType, int kGroup, typename T, int kBlocks>
__global__ void __launch_bounds__(kLinearThreads, (kBlocks * (kPackedColumns / kGroup) > 8 ? 2 : 3))
    ring_linear_kernel(const __grid_constant__ PackedLinearParams p, const __grid_constant__ LinearRing ring) {
    extern __shared__ __align__(128) uint8_t smem[];
    launch_dependents();
    RingLinear<kType, kGroup, T, kBlocks>(p, ring, smem).run();
}

} // namespace cats
