// Which kernel serves a shape, and with what sizes. plan() depends on nothing but its arguments, and no CUDA or torch
// header is included, so that the choices can be tested without a GPU: the CPU library has plan.cpp too.
//
// The sizes that plan() and the kernels must agree on stand here once: the instances that are compiled, and the shared
// memory that they use.
#pragma once

#include <cstdint>

#include "../sparse_mlp.h"

namespace cats {

constexpr int kMaxTokensPerLaunch = 8; // more tokens are launched in groups

// ---- What plan() is asked ----

struct DeviceLimits {
    int compute_capability; // 90 for 9.0
    int multiprocessors;
    int shared_bytes; // the most that a CTA can have, after opting in
};

// Data-center architectures have 163 or 227 KiB of shared memory for a CTA, the others 99. arch is as __CUDA_ARCH__.
CATS_HOST_DEVICE constexpr bool has_large_shared_memory(int arch) {
    return arch == 800 || arch == 870 || (arch >= 900 && arch < 1200);
}

// What matters here of a row format (rows/row.cuh). A row is stored in chunks of 16 bytes.
struct RowLayout {
    int columns_per_chunk; // 4, 8, 16 or 32; 0: no such format
    int storage_bytes;     // the unit of row strides
    int scale_bytes;       // before every tile of 32 chunks, a multiple of 16; 0: the format has no scales
    bool mma_operand;      // the tensor cores can multiply the stored bytes with x as they are
};

// Of dense rows. No columns: there are no kernels for such rows.
constexpr RowLayout row_layout(DType dtype) {
    if (dtype == DType::kFloat32) return {4, 4, 0, false};
    if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) return {8, 2, 0, true};
    return {};
}

struct Shape {
    int64_t tokens, hidden_size, intermediate_size;
    RowLayout row;
    bool aligned;              // every row and vector starts at a multiple of 16 bytes; row strides are below 4 GiB
    bool step;                 // the form for a step of decoding, see SparseMlpParams::y_sum
    bool deterministic;        // the same bits in every run
    RowFormat formats[3] = {}; // of gate, up and down: dense, which `row` describes, or packed
    bool exact = false;        // the form of exact_mlp, see SparseMlpParams::exact
    bool kept = false;         // the form that starts from a list of kept neurons, see SparseMlpParams::kept
};

// For benchmarks and tests: kAuto and 0 leave the choice to plan().
enum class SparseMlpKernel : int32_t { kAuto, kBulkCopy, kAsyncCopy, kGeneric };

struct PlanOverrides {
    SparseMlpKernel kernel = SparseMlpKernel::kAuto; // kBulkCopy needs compute capability 9.0
    int slots = 0;                                   // batches of rows in flight
    int first_batches = 0;                           // gate batches that are prefetched into L2
};

// ---- What it answers ----

enum class Kernel : int32_t { kNone, kPipelined, kSmall, kBatched, kGeneric, kPacked };

// What the kernels with a ring of batches are told. With `slots` first, nvcc 13.0 takes 20 instructions more.
struct RingSizes {
    int row_stride;     // batched, packed: bytes between the rows of a batch in shared memory
    int slots;          // batches in the ring: of a team, or of the CTA in the batched kernel
    int segment_chunks; // pipelined: chunks of a row for each warp; the last warps of a team may have fewer or none
    int first_batches;  // gate batches that a team starts with: brought into L2 before the previous kernel ends
    int rows;           // packed: of a batch, 8 or 16
};

// The pipelined kernel's: of sparse_mlp, of sparse_mlp_step, of exact_mlp, of exact_mlp's first launch with a cutoff,
// and of the second launch of sparse_mlp_columns and of sparse_mlp_columns_step.
enum class Form : int32_t { kOrdinary, kStep, kExact, kGates, kKept, kKeptStep };

// Rows of 16-bit elements have instances of kExact and kGates.
constexpr bool has_exact_instance(const RowLayout &row) { return row.mma_operand; }

// Warps of a CTA of the pipelined kernel. A warp has up to `chunks` chunks of a row a lane.
struct TeamShape {
    int teams, team_warps, chunks;
    constexpr int warps() const { return teams * team_warps; }
};

// Plan and _Choice of cats_ext/ops/plan.py have these members in this order.
struct Choice {
    Kernel kernel;
    const char *reason; // why this kernel
    int tokens;         // that this launch takes; the next launch has a choice of its own
    int ctas, threads, shared_bytes;
    bool bulk_copy;     // pipelined, batched, packed: rows are copied by the copy engine, not by the warps
    TeamShape team;     // pipelined; small: chunks only
    int rows_per_batch; // pipelined, batched, packed; small: rows a warp
    int column_groups;  // batched: groups of 32 columns a warp; packed: blocks of 128
    int token_padding;  // of y_sum: 0, or 2, 4 or 8 for the batched kernel
    RingSizes ring;
};

// One launch for the first tokens of the shape. kNone: there is no kernel.
Choice plan(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides = {});

// The most CTAs of a launch that can be deterministic, each of which needs memory for its part of y.
constexpr int64_t max_ctas(int64_t intermediate_size, const DeviceLimits &device) {
    return intermediate_size < device.multiprocessors ? intermediate_size : device.multiprocessors;
}

// ---- The pipelined kernel (sparse_mlp_kernel.cuh) ----

constexpr int kMaxSlots = 16;
constexpr uint32_t kMaxNeurons = 1 << 24; // neuron numbers have 24 bits
constexpr int kMaxValues = 32;            // neurons of a team between their gate row and their down row
constexpr int kMaxSegments = 512;         // of SparseMlpParams::kept

// A batch of rows is up to 4 KiB a warp: what a batch costs beside its columns, some 1,000 cycles of latency, is then
// hidden by the other teams. Where a CTA has less shared memory, single rows.
CATS_HOST_DEVICE constexpr int rows_per_batch(int tokens, int chunks, bool large_shared_memory) {
    const int rows = chunks <= 2 ? 4 : (chunks <= 4 ? 2 : 1), most = large_shared_memory ? 4 / tokens : 1;
    return rows < most ? rows : most;
}

struct TeamShapes {
    TeamShape list[16];
    int count;
};

// All instances for 1 or 2 tokens, in the order in which they are tried. x and the accumulators of a thread take
// tokens * chunks * columns_per_chunk fp32 registers each: up to 32 fit the 128 registers of 16 warps (16 of fp32 rows,
// whose chunks hold half as many columns and need as many addresses), up to 64 the 255 of 8 warps.
//
// Small teams come first. What all warps of a team repeat (waiting, reducing, deciding, asking for the next rows) is
// about 190 instructions a batch and warp: at H 4096, teams of 8 warps and one row a batch issued for 500 of the 600
// cycles that a row takes to arrive.
constexpr TeamShapes team_shapes(int tokens, int columns_per_chunk) {
    constexpr int kTeams[5][2] = {{16, 1}, {16, 2}, {16, 4}, {16, 8}, {8, 8}}; // warps, warps of a team
    constexpr int kChunks[8] = {1, 2, 3, 4, 6, 8, 12, 16};
    TeamShapes shapes{};
    for (const auto &team : kTeams) {
        const int registers = team[0] == 16 ? (columns_per_chunk < 8 ? 16 : 32) : 64;
        const int most = registers / columns_per_chunk / tokens;
        for (int chunks : kChunks) // half as many chunks belong to a team of half the warps
            if (chunks <= most && (team[1] == 1 || 2 * chunks > most))
                shapes.list[shapes.count++] = {team[0] / team[1], team[1], chunks};
    }
    return shapes;
}

CATS_HOST_DEVICE constexpr int warp_state_bytes(int tokens, int rows) {
    return int(sizeof(uint32_t)) * (kMaxValues * (3 + tokens) + kMaxSlots * rows);
}
CATS_HOST_DEVICE constexpr int team_state_bytes(int dots, int team_warps) {
    return 2 * round_up(int(sizeof(float)) * (dots * team_warps + 1), 16);
}

// Shared memory: rings | barriers | warp states | team states. At the end the teams are summed through the rings'
// space.
struct SharedLayout {
    uint32_t barriers, warp_states, team_states, total; // offsets in bytes; the rings start at 0

    CATS_HOST_DEVICE constexpr SharedLayout(int slots, int segment_bytes, int hidden_size, int warps, int teams,
                                            int rows, int barrier_bytes, int warp_state_bytes, int team_state_bytes)
        : barriers(), warp_states(), team_states(), total() {
        const uint32_t rings = warps * slots * rows * segment_bytes;
        const uint32_t team_sums = teams * uint32_t(hidden_size) * uint32_t(sizeof(float));
        barriers = rings > team_sums ? rings : team_sums;
        warp_states = barriers + warps * slots * barrier_bytes;
        team_states = warp_states + warps * warp_state_bytes;
        total = team_states + teams * team_state_bytes;
    }
};

// ---- The kernel for small layers (sparse_mlp_small.cuh) ----

constexpr int kSmallWarps = 8; // and room for two CTAs on a multiprocessor: the next kernel's wait ready beside these
constexpr int kSmallRows = 2;  // neurons a warp

// Whether there is an instance with up to so many chunks a lane. With more columns, or more rows, the registers would
// not do for two CTAs on a multiprocessor.
constexpr bool has_small_instance(int chunks, int columns_per_chunk) {
    const int most = 32 / columns_per_chunk < 3 ? 32 / columns_per_chunk : 3;
    return chunks >= 1 && chunks <= most && (chunks >= 2 || most == 1);
}

// ---- The kernels with a scheduler warp (sparse_mlp_batched.cuh, sparse_mlp_packed.cuh) ----

// What is fixed for a kernel, and decides the memory of its ring. A value is of a token and a row.
struct BatchSizes {
    int rows, tokens, workers; // of a batch; warps beside the scheduler
    int max_pending;           // see Batches::kMaxPending in ring.cuh

    CATS_HOST_DEVICE constexpr int row_state_bytes() const { return 8 + tokens * 4; }
    CATS_HOST_DEVICE constexpr int batch_state_bytes() const {
        return round_up(rows * (row_state_bytes() + 4) + 12, 16);
    }
    CATS_HOST_DEVICE constexpr int partial_bytes() const { return workers * rows * tokens * int(sizeof(float)); }
    CATS_HOST_DEVICE constexpr int scheduler_bytes() const { return 2 * max_pending * row_state_bytes(); }
};

// slot_bytes: of the rows of a batch.
CATS_HOST_DEVICE constexpr int ring_bytes(int slots, int slot_bytes, BatchSizes sizes) {
    return slots * (slot_bytes + sizes.partial_bytes() + sizes.batch_state_bytes() + 4 * int(sizeof(uint64_t)));
}

// Batched: as of the tensor cores' instructions, tokens padded to 8, batches of 8 rows, 32 columns at a time. With the
// scheduler 12 warps, which leaves 168 registers a thread.
constexpr BatchSizes kDenseBatches{8, 8, 11, 64};
constexpr int kGroupColumns = 32;
constexpr int kColumnGroups[] = {3, 6, 9, 12}; // groups of columns a worker warp, one instance each

constexpr int kTwoTokenColumns = 3072; // the shortest rows for which two tokens take this kernel

// The longest rows do not fit where shared memory is small.
CATS_HOST_DEVICE constexpr bool has_batched_instance(int column_groups, int arch) {
    return column_groups < 12 || has_large_shared_memory(arch);
}

// Packed rows: 16 rows a batch, as many as the tensor cores take at a time. Each worker warp has so many blocks of 128
// columns; a thread has room for x and y of 16 blocks in all tokens.
CATS_HOST_DEVICE constexpr BatchSizes packed_batches(int tokens, int workers) { return {16, tokens, workers, 256}; }
constexpr int kDecidingWarps = 2; // one asks for rows, one applies the thresholds
constexpr int kCopierWarps = 2;   // with these and 8 workers 12 warps, which leaves 168 registers a thread
struct PackedInstance {
    int tokens, workers, blocks;
};
constexpr PackedInstance kPackedInstances[] = {{1, 8, 4}, {1, 8, 8}, {2, 8, 4}, {4, 8, 4}};
// Gate and up rows with two scales for 128 columns take more registers.
constexpr bool has_small_groups(PackedInstance instance) { return instance.tokens * instance.blocks <= 8; }

// ---- The gate by columns (gate_columns.cuh) ----

constexpr int kColumnsThreads = 512;

// An input that a token keeps, in shared memory.
struct alignas(8) KeptInput {
    uint32_t input;
    float value;
};

// Segments of KeptNeurons, one for each CTA: whole pieces of 64 bytes of a row, which is what DRAM gives at a time, as
// few of them as the multiprocessors allow, and no more neurons than threads.
CATS_HOST_DEVICE constexpr int segment_size(int64_t intermediate_size, int storage_bytes, int multiprocessors) {
    const int piece = 64 / storage_bytes;
    const int size = ceil_div(ceil_div(intermediate_size, piece), multiprocessors) * piece;
    return size < kColumnsThreads ? size : kColumnsThreads;
}

// The list of inputs, and later the threads' sums, of a chunk each.
CATS_HOST_DEVICE constexpr int64_t columns_shared_bytes(int64_t hidden_size, int columns_per_chunk) {
    const int64_t list = hidden_size * int64_t(sizeof(KeptInput));
    const int64_t sums = int64_t(kColumnsThreads) * columns_per_chunk * int64_t(sizeof(float));
    return list > sums ? list : sums;
}

// ---- The generic kernel (sparse_mlp_generic.cuh) ----

constexpr int kGenericThreads = 256;

} // namespace cats
