// See plan.h. Every number that decides stands here with the measurement that it comes from.
#include "plan.h"

#include <algorithm>

namespace cats {

namespace {

constexpr int kStaticSharedBytes = 1024; // room for what the kernels declare statically

int shared_limit(const DeviceLimits &device) { return device.shared_bytes - kStaticSharedBytes; }
bool large_shared_memory(const DeviceLimits &device) { return has_large_shared_memory(10 * device.compute_capability); }

// Why every kernel but the generic one is out of the question; or null.
const char *why_generic(const Shape &shape, const PlanOverrides &overrides) {
    if (overrides.kernel == SparseMlpKernel::kGeneric) return "the generic kernel was asked for";
    if (!shape.aligned) return "a row or vector does not start at a multiple of 16 bytes";
    if (!shape.formats[0].packed() && shape.hidden_size % shape.row.columns_per_chunk)
        return "a row is no whole number of 16-byte chunks";
    if (shape.intermediate_size >= kMaxNeurons) return "neuron numbers have 24 bits";
    return nullptr;
}

// Chunks a lane of the instance for a layer so small that every warp gets at most kSmallRows neurons; or 0.
int small_chunks(const Shape &shape, const DeviceLimits &device) {
    const int64_t row_chunks = shape.hidden_size / shape.row.columns_per_chunk;
    if (shape.intermediate_size > int64_t(device.multiprocessors) * kSmallWarps * kSmallRows) return 0;
    for (int chunks = 1; chunks <= 3; chunks++)
        if (has_small_instance(chunks, shape.row.columns_per_chunk) && row_chunks <= chunks * kTileChunks)
            return chunks;
    return 0;
}

Choice small(const Shape &shape, const DeviceLimits &device, int chunks) {
    Choice choice{Kernel::kSmall,
                  "one token, and every warp gets at most 2 neurons: reading all rows is faster than asking twice"};
    choice.ctas = int(max_ctas(shape.intermediate_size, device));
    choice.threads = kSmallWarps * 32;
    choice.shared_bytes = int(kSmallWarps * shape.hidden_size * sizeof(float));
    choice.team.chunks = chunks;
    choice.rows_per_batch = kSmallRows;
    return choice;
}

// The pipelined kernel with these warps, or kNone if its shared memory does not fit.
Choice pipelined(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides, bool bulk_copy,
                 int tokens, TeamShape team) {
    const int row_chunks = int(shape.hidden_size / shape.row.columns_per_chunk);
    Choice choice{Kernel::kPipelined, "the smallest team whose registers hold its columns"};
    choice.bulk_copy = bulk_copy;
    choice.team = team;
    choice.rows_per_batch = rows_per_batch(tokens, team.chunks, large_shared_memory(device));
    choice.threads = team.warps() * 32;
    // One CTA a multiprocessor, for the shared memory. Fewer where there are fewer neurons than teams.
    choice.ctas = std::min(device.multiprocessors, ceil_div(shape.intermediate_size, team.teams));
    RingSizes &ring = choice.ring;
    // Equal segments of whole 128-byte lines, or of whole tiles where each has its scales.
    ring.segment_chunks = round_up(ceil_div(row_chunks, team.team_warps), shape.row.scale_bytes ? kTileChunks : 8);
    // Two slots of up to 64 KiB a CTA keep enough on its way. With more, up and down rows queue behind more gate rows
    // and the end of the launch gets longer: bench/results/h100/microbench_plan.csv. A step asks for its first rows
    // before the previous kernel has ended, and fills a third slot meanwhile, where there is room for it.
    ring.slots = overrides.slots ? std::min({overrides.slots, kMaxValues / choice.rows_per_batch, kMaxSlots})
                                 : (shape.step && !shape.kept ? 3 : 2);
    // The more is in L2 when the previous kernel ends, the less the start costs: 1 / 2 / 4 batches a team take 83.0 /
    // 82.2 / 81.4 us (same file), 6 / 8 / 10 / 12 take 80.3 / 80.3 / 80.4 / 81.8 at 50 % sparsity and 51.4 / 51.1
    // / 51.0 / 52.0 at 90 % (kernel_experiments.csv). A team's first batches are fixed, not drawn. A step was tuned
    // with 6.
    ring.first_batches = overrides.first_batches ? overrides.first_batches : (shape.kept ? 4 : (shape.step ? 6 : 8));
    ring.first_batches = std::clamp(ring.first_batches, 1, 32 / choice.rows_per_batch);
    const auto shared_bytes = [&] {
        const int rows = choice.rows_per_batch, barrier_bytes = bulk_copy ? int(sizeof(uint64_t)) : 0;
        return int(SharedLayout(ring.slots, row_bytes(ring.segment_chunks, shape.row.scale_bytes),
                                int(shape.hidden_size), team.warps(), team.teams, rows, barrier_bytes,
                                warp_state_bytes(tokens, rows), team_state_bytes(rows * tokens, team.team_warps))
                       .total);
    };
    const int limit = shared_limit(device) - (shape.kept ? kMaxSegments * int(sizeof(uint32_t)) : 0); // also static
    if (shape.step && !overrides.slots && shared_bytes() > limit) ring.slots = 2;
    choice.shared_bytes = shared_bytes();
    return choice.shared_bytes <= limit ? choice : Choice{};
}

// team_shapes(), computed once.
const TeamShapes &known_team_shapes(int tokens, int columns_per_chunk) {
    static constexpr TeamShapes kKnown[][2] = {{team_shapes(1, 4), team_shapes(2, 4)},
                                               {team_shapes(1, 8), team_shapes(2, 8)},
                                               {team_shapes(1, 16), team_shapes(2, 16)},
                                               {team_shapes(1, 32), team_shapes(2, 32)}};
    return kKnown[columns_per_chunk <= 4 ? 0 : (columns_per_chunk <= 8 ? 1 : (columns_per_chunk <= 16 ? 2 : 3))]
                 [tokens - 1];
}

// The first team that covers the row and fits the shared memory; or kNone.
Choice pipelined(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides, bool bulk_copy,
                 int tokens) {
    const int64_t row_chunks = shape.hidden_size / shape.row.columns_per_chunk;
    const TeamShapes &shapes = known_team_shapes(tokens, shape.row.columns_per_chunk);
    TeamShape tried{};
    for (int i = 0; i < shapes.count; i++) {
        const TeamShape &team = shapes.list[i];
        if (row_chunks > int64_t(team.team_warps) * team.chunks * kTileChunks) continue;
        if (team.teams == tried.teams && team.team_warps == tried.team_warps) continue; // more chunks take no less
        tried = team;
        const Choice choice = pipelined(shape, device, overrides, bulk_copy, tokens, team);
        if (choice.kernel != Kernel::kNone) return choice;
    }
    return {};
}

// Rows that the tensor cores take as they are, and whose y fits the workers' registers; otherwise kNone.
Choice batched(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides, bool bulk_copy,
               int tokens) {
    constexpr BatchSizes sizes = kDenseBatches;
    if (!shape.row.mma_operand || shape.hidden_size % kGroupColumns) return {};
    Choice choice{Kernel::kBatched, "several tokens: the CUDA cores would take longer than the rows to arrive"};
    for (int groups : kColumnGroups)
        if (!choice.column_groups && shape.hidden_size <= sizes.workers * groups * kGroupColumns &&
            has_batched_instance(groups, 10 * device.compute_capability))
            choice.column_groups = groups;
    if (!choice.column_groups) return {};
    choice.bulk_copy = bulk_copy;
    choice.rows_per_batch = sizes.rows;
    choice.token_padding = tokens <= 2 ? 2 : (tokens <= 4 ? 4 : 8);
    choice.threads = (sizes.workers + 1) * 32;
    choice.ctas = std::min(device.multiprocessors, ceil_div(shape.intermediate_size, sizes.rows));
    RingSizes &ring = choice.ring;
    ring.row_stride =
        row_bytes(int(shape.hidden_size / shape.row.columns_per_chunk), 0) + 16; // ldmatrix: 8 rows from all banks
    ring.first_batches = std::max(1, overrides.first_batches ? overrides.first_batches : 2);
    // On an H200 two tokens of 4096x14336 take 79.1 us at 50 % with 3 slots; with 2, and decisions before further gate
    // rows, they took 84.5 (bench/results/h200/packed_kernel.log).
    ring.slots = std::min(overrides.slots ? overrides.slots : 3, sizes.max_pending / sizes.rows - 1);
    const auto shared_bytes = [&] {
        return ring_bytes(ring.slots, sizes.rows * ring.row_stride, sizes) + sizes.scheduler_bytes();
    };
    while (ring.slots > 2 && shared_bytes() > shared_limit(device)) ring.slots--;
    choice.shared_bytes = shared_bytes();
    return choice.shared_bytes <= shared_limit(device) ? choice : Choice{};
}

// Whether two tokens go to the tensor cores, too. On an H200, 4096x14336, they take 88 / 76 / 60 us at 50 / 70 / 90 %
// sparsity, and on the CUDA cores 104 / 89 / 69 (bench/results/h200/launch_ends.log). Shorter rows have not been
// measured.
bool batches_two_tokens(const Shape &shape, int64_t tokens, bool bulk_copy) {
    return tokens == 2 && bulk_copy && !shape.exact && shape.hidden_size >= kTwoTokenColumns;
}

// Packed rows, of which the tensor cores take groups of 64 and 128 columns; otherwise kNone.
Choice packed(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides) {
    const RowFormat &gate = shape.formats[0], &up = shape.formats[1], &down = shape.formats[2];
    const bool fp8 = gate.type == WeightType::kFloat8;
    if (device.compute_capability < 90 || shape.row.storage_bytes != 2 || shape.hidden_size % 8 ||
        gate.type != up.type || fp8 != (down.type == WeightType::kFloat8))
        return {};
    int64_t row_bytes = 0;
    for (const RowFormat &format : shape.formats) {
        if (format.group_size == 32) return {};
        row_bytes = std::max(row_bytes, format.row_bytes(shape.hidden_size));
    }
    Choice choice{Kernel::kPacked, "packed rows: the tensor cores, in batches of 16 rows"};
    choice.tokens = int(std::min<int64_t>(shape.tokens, 4));
    const bool small_groups = gate.group_size == 64 || up.group_size == 64;
    const PackedInstance *instance = nullptr;
    while (choice.tokens && !instance) {
        const int tokens = choice.tokens == 3 ? 4 : choice.tokens;
        for (const PackedInstance &i : kPackedInstances)
            if (!instance && i.tokens == tokens && (!small_groups || has_small_groups(i)) &&
                shape.hidden_size <= int64_t(i.workers) * i.blocks * kPackedColumns)
                instance = &i;
        if (!instance) choice.tokens /= 2;
    }
    if (!instance) return {};
    choice.bulk_copy = true;
    choice.threads = (instance->workers + kDecidingWarps + kCopierWarps) * 32;
    choice.column_groups = instance->blocks;
    RingSizes &ring = choice.ring;
    ring.row_stride = round_up(row_bytes, 128) + 16; // ldmatrix: 8 rows from all banks
    const BatchSizes sizes = packed_batches(instance->tokens, instance->workers);
    const auto shared_bytes = [&] {
        return ring_bytes(ring.slots, ring.rows * ring.row_stride, sizes) + sizes.scheduler_bytes();
    };
    // On an H200 4 slots take 29.3 / 24.1 / 19.6 us at 0 / 50 / 90 % sparsity, 5 slots 29.6 / 24.2 / 19.7 and 6 slots
    // 31.4 / 24.7 / 20.0 (bench/results/h200/packed_kernel.log). 8 rows a batch took 63 us where 16 took 38
    // (bench/results/h100/packed_plan.log): what a batch costs beside its columns decides. Rows too long for 3 slots of
    // 16 come in batches of 8.
    for (int rows : {16, 8}) {
        ring.rows = rows;
        ring.slots = std::min({overrides.slots ? overrides.slots : 4, sizes.max_pending / rows - 1, kMaxSlots});
        while (ring.slots > 2 && shared_bytes() > shared_limit(device)) ring.slots--;
        if (shared_bytes() <= shared_limit(device) && (ring.slots > 2 || rows == 8)) break;
    }
    choice.shared_bytes = shared_bytes();
    if (choice.shared_bytes > shared_limit(device)) return {};
    choice.rows_per_batch = ring.rows;
    choice.ctas = std::min(device.multiprocessors, ceil_div(shape.intermediate_size, ring.rows));
    // A CTA's first batches are in L2 when the previous kernel ends, and are not drawn. All CTAs together ask for about
    // 14 MiB, about what memory brings while a kernel ends. int8 rows take 50.4 / 28.6 us at 0 / 90 % with one batch,
    // 48.3 / 28.2 with two and 49.5 / 29.3 with seven (same file): the CTA that starts last waits for what all others
    // have asked for.
    const int64_t round_bytes = choice.ctas * ring.rows * row_bytes;
    ring.first_batches = overrides.first_batches
                             ? overrides.first_batches
                             : int(std::clamp<int64_t>(((28 << 20) / round_bytes + 1) / 2, 1, 7 * 16 / ring.rows));
    return choice;
}

Choice generic(const Shape &shape, const DeviceLimits &device, const char *reason) {
    Choice choice{Kernel::kGeneric, reason};
    choice.tokens = int(std::min<int64_t>(kMaxTokensPerLaunch, shape.tokens));
    choice.threads = kGenericThreads;
    choice.ctas = int(shape.deterministic ? max_ctas(shape.intermediate_size, device)
                                          : std::min<int64_t>(8 * device.multiprocessors, shape.intermediate_size));
    return choice;
}

Choice none(const char *reason) { return {Kernel::kNone, reason}; }

} // namespace

Choice plan(const Shape &shape, const DeviceLimits &device, const PlanOverrides &overrides) {
    if (shape.tokens < 1 || shape.hidden_size < 1 || shape.intermediate_size < 1 || shape.row.columns_per_chunk < 1)
        return none("there is nothing to compute, or no such row format");
    if (shape.step && (shape.tokens != 1 || shape.deterministic))
        return none("a step has one token, and its sum is not deterministic");
    const bool has_bulk_copy = device.compute_capability >= 90;
    if (overrides.kernel == SparseMlpKernel::kBulkCopy && !has_bulk_copy)
        return none("the copy engine needs compute capability 9.0");
    const bool bulk_copy = has_bulk_copy && overrides.kernel != SparseMlpKernel::kAsyncCopy;

    const bool is_packed = shape.formats[0].packed();
    const char *reason = why_generic(shape, overrides);
    if (is_packed && !reason) {
        const Choice choice = packed(shape, device, overrides);
        if (choice.kernel != Kernel::kNone) return choice;
        reason =
            "the kernel for packed rows needs compute capability 9.0, x of 16 bits, and groups of 64 or 128 columns";
    }
    if ((shape.step || shape.kept) && reason) return none(reason);
    if (shape.step && !shape.kept && small_chunks(shape, device))
        return none("the kernel for small layers is faster, and has no step");
    for (int64_t most = kMaxTokensPerLaunch; !reason && most; most /= 2) {
        const int tokens = int(std::min(most, shape.tokens));
        if (shape.exact && (tokens > 2 || !has_exact_instance(shape.row))) continue;
        if (shape.kept && tokens > 1) continue;
        const bool may_be_small = tokens == 1 && !shape.step && !shape.exact && !shape.kept;
        const int chunks = may_be_small ? small_chunks(shape, device) : 0;
        Choice choice{};
        if (chunks) choice = small(shape, device, chunks);
        else if (tokens > 2 || batches_two_tokens(shape, tokens, bulk_copy))
            choice = batched(shape, device, overrides, bulk_copy, tokens);
        if (choice.kernel == Kernel::kNone && tokens <= 2)
            choice = pipelined(shape, device, overrides, bulk_copy, tokens);
        choice.tokens = tokens;
        if (choice.kernel != Kernel::kNone) return choice;
    }
    if (!reason)
        reason = shape.exact && !has_exact_instance(shape.row)
                     ? "exact_mlp has its kernel for 16-bit rows only"
                     : "the row is too long for the registers or the shared memory";
    return shape.step || shape.kept ? none(reason) : generic(shape, device, reason);
}

// For Python (cats_ext/ops/plan.py). formats: names of packed ones, of gate, up and down, or null. False: no such name.
extern "C" __attribute__((visibility("default"))) bool
cats_plan(int64_t tokens, int64_t hidden_size, int64_t intermediate_size, DType dtype, bool aligned, bool step,
          bool deterministic, bool exact, bool kept, const char *const *formats, int compute_capability,
          int multiprocessors, int shared_bytes, Choice *choice) {
    Shape shape{tokens, hidden_size, intermediate_size, row_layout(dtype), aligned, step, deterministic};
    shape.exact = exact;
    shape.kept = kept;
    for (int i = 0; formats && i < 3; i++)
        if (!parse_row_format(formats[i], &shape.formats[i])) return false;
    *choice = plan(shape, {compute_capability, multiprocessors, shared_bytes});
    return true;
}

} // namespace cats
