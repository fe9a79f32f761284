// A row format is how the weights of one neuron in one matrix are stored. It is a type, and all that the kernels know
// of it. A new format is a type like DenseRow in dense.cuh, a file of instances like ../sparse_mlp_bf16.cu, and a case
// each in row_layout() (../plan.h) and ../sparse_mlp_launch.cu.
//
// A row is a sequence of tiles. A tile is what a warp reads at a time: first the tile's scales, then one chunk of 16
// bytes for each lane. The last tile may have fewer chunks. A row is contiguous, so one bulk copy brings any tiles of
// it with their scales.
//
//     Storage        the unit of the weights' strides: the element of a dense row, uint8_t of a packed one
//     MmaOperand     the 16-bit type that the tensor cores can read the stored bytes as, one element a column, without
//                    scales; void: none, and plan() has no batched kernel for several tokens
//     kPerChunk      columns of a chunk, a multiple of 4; their values of x are a multiple of 16 bytes
//     kScaleBytes    of a tile, a multiple of 16, up to 512
//     Packed         what a lane holds of its chunk until it is decoded; Packed{} decodes to zeros
//     load(tile, lane)         this lane's chunk, and what scales it, of a tile in shared or global memory
//     decode(packed, out)      its kPerChunk consecutive columns in fp32
//     column(params, kind, row, c)  one column in fp32, for rows of any alignment
//     Bytes(params)            gives the bytes of a row of a kind
#pragma once

#include <type_traits>

#include "../plan.h"

namespace cats {

template <class Row> constexpr int kTileBytes = kTileChunks * kChunkBytes + Row::kScaleBytes;

template <class Row> constexpr RowLayout layout_of() {
    return {Row::kPerChunk, sizeof(typename Row::Storage), Row::kScaleBytes, !std::is_void_v<typename Row::MmaOperand>};
}

enum class RowKind : uint32_t { kGate, kUp, kDown, kEnd }; // kEnd: no row, the end of a queue

// Bytes of a row of any kind, where all matrices have one format.
struct UniformBytes {
    uint32_t bytes;
    __device__ __forceinline__ uint32_t operator()(RowKind) const { return bytes; }
};

// `offset` bytes into a neuron's row. One wide multiply-add: plan() checks that strides are below 4 GiB.
template <class Row>
__device__ __forceinline__ const uint8_t *row_address(const SparseMlpParams &p, RowKind kind, uint32_t neuron,
                                                      int offset = 0) {
    const bool gate = kind == RowKind::kGate, up = kind == RowKind::kUp;
    const void *base = gate ? p.w_gate : (up ? p.w_up : p.w_down_t);
    const int64_t stride = gate ? p.w_gate_stride : (up ? p.w_up_stride : p.w_down_t_stride);
    return static_cast<const uint8_t *>(base) + offset +
           uint64_t(neuron) * uint32_t(stride * int64_t(sizeof(typename Row::Storage)));
}

} // namespace cats
