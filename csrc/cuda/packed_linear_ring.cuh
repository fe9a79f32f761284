// The product of packed rows with one row, for a step of decoding: ../packed_linear.h.
//
// Each CTA has an equal share of the rows, in batches of 8. One warp copies them into a ring of slots in shared memory,
// 8 warps multiply them on the tensor cores, each with its own blocks of 128 columns:
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

constexpr int kLinearWorkers = 8, kLinearThreads = (kLinearWorkers + 1) * 32;
constexpr int kLinearRows = 8;                 // of a batch
constexpr int kSumBatches = 8;                 // whose partial sums are added at a time
constexpr int kSumRows = kSumBatches * kLinearRows;

struct LinearRing {
    int32_t slots, row_bytes, row_stride; // row_stride: of a slot's rows
};

// Shared memory: slots | x of the workers | partial sums, twice | barriers
CATS_HOST_DEVICE constexpr int linear_x_bytes(int64_t inputs) { return round_up(inputs, kPackedColumns) * 2; }
CATS_HOST_DEVICE constexpr int linear_slot_bytes(const LinearRing &ring) { return kLinearRows * ring.row_stride; }
constexpr int linear_shared_bytes(const LinearRing &ring, int64_t inputs) {
    return ring.slots * (linear_slot_bytes(ring) + 16) + linear_x_bytes(inputs) +
           2 * kLinearWorkers * kSumRows * int(sizeof(float));
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
        first_row_ = int(int64_t(rows) * blockIdx.x / gridDim.x);
        rows_ = int(int64_t(rows) * (blockIdx.x + 1) / gridDim.x) - first_row_;
        batches_ = ceil_div(rows_, kLinearRows);
        uint8_t *at = smem + ring.slots * linear_slot_bytes(ring);
        x_ready_ = reinterpret_cast<uint4 *>(at);
        partials_ = reinterpret_cast<float *>(at + linear_x_bytes(p.inputs));
        barriers_ = reinterpret_cast<uint64_t *>(partials_ + 2 * kLinearWorkers * kSumRows);
    }

    __device__ __forceinline__ void run() {
        if (warp_ == kLinearWorkers) {
            for (int s = lane_; s < ring_.slots; s += 32) {
                init_barrier(full(s), kBulk ? 1 : 32);
                init_barrier(done(s), kLinearWorkers);
            }
            publish_barriers();
            __syncwarp();
            copy_first();
        }
        __syncthreads(); // the barriers are there
        if (warp_ == kLinearWorkers) copy_rest();
        else work();
    }

  private:
#if __CUDA_ARCH__ >= 900
    static constexpr bool kBulk = true;
#else
    static constexpr bool kBulk = false;
#endif

    __device__ __forceinline__ uint64_t *full(int slot) const { return barriers_ + 2 * slot; }
    __device__ __forceinline__ uint64_t *done(int slot) const { return barriers_ + 2 * slot + 1; }

    // --- the warp that copies ----------------------------------------------------------------------------------------

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
            for (int r = lane_; r < count; r += 32)
                copy_bulk(to + r * ring_.row_stride, row_address(first + r), uint32_t(ring_.row_bytes),
                          full(slot + r / kLinearRows), policy);
        } else {
            for (int r = 0; r < count; r++) {
                const uint8_t *from = row_address(first + r);
                for (int i = lane_ * kChunkBytes; i < ring_.row_bytes; i += 32 * kChunkBytes)
                    copy_async<kChunkBytes>(to + r * ring_.row_stride + i, from + i);
                if ((r + 1) % kLinearRows == 0 || r + 1 == count) arrive_after_async_copies(full(slot + r / kLinearRows));
            }
        }
    }

    __device__ __forceinline__ void expect(int batch, int slot) const {
        if constexpr (kBulk) {
            expect_bytes(full(slot), min(kLinearRows, rows_ - batch * kLinearRows) * ring_.row_bytes);
            arrive(full(slot));
        }
    }

    __device__ __forceinline__ void copy_first() const {
        const int batches = min(batches_, ring_.slots);
        for (int s = lane_; s < batches; s += 32) expect(s, s);
        __syncwarp();
        copy_rows(0, 0, min(rows_, batches * kLinearRows));
    }

    __device__ __forceinline__ void copy_rest() const {
        int slot = 0;
        uint32_t parity = 0;
        for (int batch = ring_.slots; batch < batches_; batch++) {
            wait(done(slot), parity);
            if (lane_ == 0) expect(batch, slot);
            __syncwarp();
            copy_rows(batch * kLinearRows, slot, min(kLinearRows, rows_ - batch * kLinearRows));
            if (++slot == ring_.slots) slot = 0, parity ^= 1;
        }
    }

    // --- the warps that multiply -------------------------------------------------------------------------------------

    __device__ __forceinline__ void work() {
        const int blocks = ceil_div(p_.inputs, kPackedColumns), each = ceil_div(blocks, kLinearWorkers);
        first_ = min(warp_ * each, blocks);
        count_ = min(each, blocks - first_);
        {
            LinearInput<T, kBlocks / 2> input(p_, first_, count_);
            input.load_norm();
            wait_for_previous_kernel();
            unscale_ = input.template prepare<kInt4>(x_ready_ + first_ * (kPackedColumns / 8));
        }
        keep_x();
        Additions additions = load_additions(0);
        int slot = 0;
        uint32_t parity = 0;
        for (int batch = 0; batch < batches_; batch++) {
            wait(full(slot), parity);
            const float dot = product(slots_ + slot * linear_slot_bytes(ring_) + row_ * ring_.row_stride);
            __syncwarp();
            if (lane_ == 0) arrive(done(slot));
            const int of_sums = batch % kSumBatches;
            float *sums = partials_ + batch / kSumBatches % 2 * (kLinearWorkers * kSumRows);
            if (quad_ == 0) sums[warp_ * kSumRows + of_sums * kLinearRows + row_] = dot;
            if (of_sums + 1 == kSumBatches || batch + 1 == batches_) {
                asm volatile("bar.sync 1, %0;" ::"n"(kLinearWorkers * 32) : "memory");
                add_up(sums, additions);
                additions = load_additions((batch + 1) * kLinearRows);
            }
            if (++slot == ring_.slots) slot = 0, parity ^= 1;
        }
    }

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
        for (int w = 0; w < kLinearWorkers; w++) y += sums[w * kSumRows + threadIdx.x];
        T result = round_to<T>(y);
        if (p_.residual) result = round_to<T>(to_float(result) + to_float(a.residual));
        static_cast<T *>(p_.y)[a.at] = result;
    }

    // The registers of B: in this lane's column row_, of each set, what its loads meet. The rest is the sums of x.
    __device__ __forceinline__ void keep_x() {
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            const int group = s * 8 + row_, block = group / kGroups;
            float sum = 0.f;
#pragma unroll
            for (int load = 0; load < kLoads; load++) {
                const int column = (load * 4 + quad_) * kRun;
                const bool there = block < count_ && column / kGroup == group % kGroups;
                const uint4 *from = x_ready_ + ((first_ + block) * kPackedColumns + column) / 8;
#pragma unroll
                for (int i = 0; i < kRun / 8; i++) {
                    const uint4 x = there ? from[i] : uint4{};
                    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        x_[s][(load * kRun / 8 + i) * 4 + k] = pairs[k];
                        const float2 both = __half22float2(reinterpret_cast<const __half2 &>(pairs[k]));
                        sum = fmaf(both.x + both.y, kInt4 && k % 2 ? 16.f : 1.f, sum);
                    }
                }
            }
            sum += __shfl_xor_sync(kAll, sum, 1);
            sum += __shfl_xor_sync(kAll, sum, 2);
#pragma unroll
            for (int e = 0; e < 2; e++) x_sums_[s][e] = __shfl_sync(kAll, sum, quad_ * 8 + e * 4);
        }
    }

    // Where block b of this warp begins in a row.
    __device__ __forceinline__ uint32_t block_at(int b) const {
        const int block = first_ + b;
        return block / kTileBlocks * (kTileChunks * kChunkBytes + p_.format.scale_bytes) + p_.format.scale_bytes +
               block % kTileBlocks * kBlockBytes;
    }

    // The dot product of this warp's columns, in the lanes of the row.
    __device__ __forceinline__ float product(const uint8_t *row) const {
        float d[kSets][2] = {}; // [set][column of D]
#pragma unroll
        for (int b = 0; b < kBlocks; b += 2) {
            if (b >= count_) break;
            // Of an odd number of blocks the last is there twice: no column of the second one is used.
            const uint32_t lower = block_at(b) + quad_ * kChunkBytes,
                           upper = block_at(min(b + 1, count_ - 1)) + quad_ * kChunkBytes;
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
            constexpr int kTileGroups = kTileBlocks * kGroups;
            const int last = int(p_.inputs) / kGroup - 1; // groups that do not exist: all that they multiply is zero
#pragma unroll
            for (int s = 0; s < kSets; s++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int group = min(first_ * kGroups + s * 8 + quad_ * 2 + e, last);
                    const uint8_t *at = row +
                                        group / kTileGroups * (kTileChunks * kChunkBytes + p_.format.scale_bytes) +
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
