// The one-pass sparse gated MLP: gate, threshold, and the up and down rows of kept neurons, in one persistent kernel.
//
// At a few tokens the MLP takes as long as its weights take to read, so the kernel keeps weight rows on their way all
// the time. kTeamWarps warps form a team, and each warp has its own segment of the columns. A team treats a batch of
// kRows rows of one kind at a time, which share what a row costs beside its columns: waiting, reducing, deciding,
// asking for the next. Batches pass through the warps' rings (row_pipe.cuh) in the order of their requests. There are
// gate batches of consecutive neurons, and up and down batches of neurons that passed; these go before the next gate
// batch. While a batch is computed the next `slots - 1` are on their way. Down rows are accumulated in registers, and y
// leaves the CTA once, at the end (finish.cuh).
//
// The warps of a team run the same control flow on the same values, each with its own copy of the queues, and sum dot
// products in the same order. They exchange partial dot products only, at one barrier a gate or up batch.
//
// x depends on the previous kernel, the weights do not. With programmatic dependent launch this kernel starts while the
// previous one still runs, and only prefetches its first rows into L2 before it waits. Everything it computes with is
// read after the wait, so what the previous kernel writes (weights, x, thresholds) is always seen. The form for a step
// of decoding asks for its first rows before the wait: its caller guarantees that no kernel writes them.
//
// exact_mlp's form has no thresholds: what is exactly zero is skipped. Without an up matrix gate rows lead to down rows
// at once. The form for gates alone writes them, and in place of y their sums. The form for kept neurons has no gate
// rows: their list was written by the previous kernel (gate_columns.cuh), and its batches are of up rows; in a step it
// asks for none before the wait.
#pragma once

#include "activation.cuh"
#include "gate_sums.cuh"
#include "team.cuh"

namespace cats {

template <class Row, typename T, class Pipe, int kTokens, int kTeams, int kTeamWarps, int kChunks, int kRows,
          Form kForm>
__device__ __forceinline__ void sparse_mlp_body(const RingArguments &args) {
    constexpr bool kStep = kForm == Form::kStep || kForm == Form::kKeptStep, kGates = kForm == Form::kGates;
    constexpr bool kKept = kForm == Form::kKept || kForm == Form::kKeptStep;
    constexpr bool kEarly = kStep && !kKept; // asks for rows before the wait
    constexpr bool kExact = kForm == Form::kExact || kGates;
    using Columns = Values<T, Row::kPerChunk>; // of x
    constexpr int kWarps = kTeams * kTeamWarps, kPerChunk = Row::kPerChunk, kDots = kRows * kTokens;
    constexpr int kLanesPerDot = 32 / kDots; // lane l has dot product l / kLanesPerDot
    constexpr uint32_t kAll = 0xffffffffu;
    using State = WarpState<kTokens, kRows>;
    using Team = TeamState<kDots, kTeamWarps>;
    const SparseMlpParams &p = args.mlp;
    const RingSizes &ring = args.ring;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int team = warp / kTeamWarps, team_warp = warp % kTeamWarps;
    const int my_row = lane / kLanesPerDot / kTokens, my_token = lane / kLanesPerDot % kTokens;
    const bool writes_result = lane % kLanesPerDot == 0; // one of the lanes that have the same dot product
    const int hidden = int(p.hidden_size);
    // Whether something is left to decide after an up row.
    const auto decides_down = [&] { return kExact ? p.relu_up : p.down_threshold != nullptr; };

    extern __shared__ __align__(128) uint8_t smem[];
    static_assert(sizeof(State) == warp_state_bytes(kTokens, kRows));
    static_assert(sizeof(Team) == team_state_bytes(kDots, kTeamWarps));
    const int segment_bytes = row_bytes(ring.segment_chunks, Row::kScaleBytes);
    const SharedLayout layout(ring.slots, segment_bytes, hidden, kWarps, kTeams, kRows, Pipe::kBarrierBytes,
                              sizeof(State), sizeof(Team));
    State &state = reinterpret_cast<State *>(smem + layout.warp_states)[warp];
    Team &team_state = reinterpret_cast<Team *>(smem + layout.team_states)[team];
    const TeamBarrier<kTeams, kTeamWarps> team_barrier;

    // This warp's columns.
    const int row_chunks = hidden / kPerChunk;
    const int first_chunk = min(team_warp * ring.segment_chunks, row_chunks);
    const int chunks = min(ring.segment_chunks, row_chunks - first_chunk);
    const int bytes = row_bytes(chunks, Row::kScaleBytes);
    const auto address = [&](RowKind kind, uint32_t j) {
        return row_address<Row>(p, kind, j, row_bytes(first_chunk, Row::kScaleBytes));
    };

    // Gate batches. A team starts with batches team, team + teams, ..., as many as are prefetched; from then on it
    // draws the next from a counter in global memory. How many rows a batch leads to depends on the input: with fixed
    // batches the CTAs would end up to a tenth of the whole time apart. Gates alone lead to none: their batches are
    // fixed, and so are their sums.
    const uint32_t intermediate = uint32_t(p.intermediate_size);
    const uint32_t gate_batches = (intermediate + kRows - 1) / kRows;
    const uint32_t first_batch = blockIdx.x * kTeams + team;
    const auto teams = [&] { return gridDim.x * kTeams; }; // computed again, to save a register

    launch_dependents();
    if (!kKept && lane < ring.first_batches * kRows) {
        const uint32_t j = (first_batch + lane / kRows * teams()) * kRows + lane % kRows; // one row a lane
        if (j < intermediate) prefetch_l2(address(RowKind::kGate, j), bytes);
    }
    Pipe pipe(smem + warp * ring.slots * kRows * segment_bytes,
              reinterpret_cast<uint64_t *>(smem + layout.barriers) + warp * ring.slots, ring.slots, segment_bytes,
              bytes);
    if constexpr (!kEarly) wait_for_previous_kernel();
    __shared__ uint32_t segment_ends[kKept ? kMaxSegments : 1]; // batches of the segments up to and with each
    if constexpr (kKept) {
        if (warp == 0) {
            const int each = (p.kept.segments + 31) / 32, first = lane * each, end = min(first + each, p.kept.segments);
            // Not __ldg: the previous kernel may write them while this one runs.
            const auto batches_in = [&](int s) { return (p.kept.counts[s] + kRows - 1) / kRows; };
            uint32_t mine = 0;
#pragma unroll 4
            for (int s = first; s < end; s++) mine += batches_in(s);
            uint32_t up_to = mine;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const uint32_t other = __shfl_up_sync(kAll, up_to, o);
                if (lane >= o) up_to += other;
            }
            up_to -= mine;
            for (int s = first; s < end; s++) segment_ends[s] = up_to += batches_in(s);
        }
        __syncthreads();
    }
    const auto batches = [&] { // read again, to save a register
        if constexpr (kKept) return segment_ends[p.kept.segments - 1];
        else return gate_batches;
    };

    // The leader's next draw is always on its way, one batch before it is needed.
    const bool leader = team_warp == 0 && lane == 0;
    uint32_t drawn = 0, next_batch = first_batch;
    bool next_known = true;                                                   // by every warp of the team
    const auto fixed = [&] { return kGates || args.workspace.partial_sums; }; // then nothing is drawn
    const auto draw = [&] {
        if (leader && !fixed()) draw_ticket(drawn, args.workspace.next_batch);
    };
    const auto after_first = [&](uint32_t ticket) { return teams() * ring.first_batches + ticket; };
    if constexpr (!kEarly) draw();

    uint32_t kept = 0, kept_down = 0; // token-neuron pairs
    // The queues. Slots are filled and emptied in ring order.
    uint32_t up_head = 0, ups = 0, down_head = 0, downs = 0; // rows still to be requested
    uint32_t values_used = 0;                                // bit mask
    int head = 0, tail = 0, in_flight = 0, gates_in_flight = 0;
    uint32_t slot_kinds = 0;                                               // two bits a slot
    const auto request = [&](RowKind kind, uint32_t row, uint32_t count) { // lane r has row r of count <= kRows
        if (lane < kRows) state.slot_rows[tail][lane] = lane < count ? row : kNoRow;
        __syncwarp();
        pipe.request(tail, count, [&](int r) { return address(kind, state.slot_rows[tail][r] & (kMaxNeurons - 1)); });
        slot_kinds = (slot_kinds & ~(3u << 2 * tail)) | uint32_t(kind) << 2 * tail;
        tail = tail + 1 == ring.slots ? 0 : tail + 1;
        in_flight++;
    };
    const auto request_gates = [&](uint32_t batch) {
        const uint32_t first = batch * kRows;
        request(RowKind::kGate, first + lane, min(intermediate - first, uint32_t(kRows)));
        gates_in_flight++;
    };
    // kKept: lane r has row r of the next batch, asked for when its number is known.
    KeptNeuron next{};
    const auto look_up = [&] {
        if (!kKept || next_batch >= batches()) return;
        uint32_t before = 0;
        for (int s = lane; s < p.kept.segments; s += 32) before += segment_ends[s] <= next_batch;
        const uint32_t segment = __reduce_add_sync(kAll, before);
        const uint32_t batch = next_batch - (segment ? segment_ends[segment - 1] : 0);
        if (lane < kRows) next = p.kept.neurons[segment * p.kept.size + batch * kRows + lane];
    };
    const auto follow_with_down = [&](uint32_t row, uint32_t count) { // the down rows follow their up rows
        if (decides_down()) return;
        if (lane < count) state.down_queue[(down_head + downs + lane) % kMaxValues] = row;
        downs += count;
        __syncwarp();
    };
    const auto request_kept = [&] {
        const uint32_t count = __popc(__ballot_sync(kAll, lane < kRows && next.neuron != kNoRow));
        uint32_t row = kNoRow;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (r >= count) break;
            const int free = __ffs(~values_used) - 1;
            values_used |= 1u << free;
            if (lane != r) continue;
            state.values[free][0] = next.value, state.value_tokens[free] = 1;
            row = next.neuron | free << 24;
        }
        request(RowKind::kUp, row, count);
        follow_with_down(row, count);
    };
    const auto refill = [&] {
        while (in_flight < ring.slots) {
            const bool last = next_known && next_batch >= batches(); // no more gates: a batch need not be full
            if (!kGates && (downs >= kRows || (last && downs))) {
                const uint32_t count = min(downs, uint32_t(kRows));
                request(RowKind::kDown, state.down_queue[(down_head + lane) % kMaxValues], count);
                down_head += count, downs -= count;
            } else if (!kGates && !kKept && (ups >= kRows || (last && ups))) {
                const uint32_t count = min(ups, uint32_t(kRows)), row = state.up_queue[(up_head + lane) % kMaxValues];
                request(RowKind::kUp, row, count);
                up_head += count, ups -= count;
                follow_with_down(row, count);
            } else if (next_known && !last && __popc(values_used) + (gates_in_flight + 1) * kRows <= kMaxValues) {
                if constexpr (kKept) request_kept();
                else request_gates(next_batch);
                if (fixed() || next_batch < after_first(0) - teams()) next_batch += teams(), look_up();
                else next_known = false;
            } else {
                break;
            }
        }
    };
    look_up();
    refill();
    Columns norm[kChunks];
    if constexpr (kStep) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            norm[i] = {};
            if (i * 32 + lane < chunks)
                norm[i] =
                    Columns::load(static_cast<const T *>(p.norm_weight) + (first_chunk + i * 32 + lane) * kPerChunk);
        }
    }
    if constexpr (kEarly) {
        wait_for_previous_kernel();
        draw();
    }

    float x[kTokens][kChunks][kPerChunk], acc[kTokens][kChunks][kPerChunk];
#pragma unroll
    for (int m = 0; m < kTokens; m++) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int chunk = i * 32 + lane;
            Columns columns{};
            if (m < p.tokens && chunk < chunks)
                columns = Columns::load(static_cast<const T *>(p.x) + m * hidden + (first_chunk + chunk) * kPerChunk);
            columns.decode(x[m][i]);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++) acc[m][i][e] = 0.f;
        }
    }

    GateSums gate_sums{}; // of the gates that this lane has written
    int turn = 0;
    // Sums over the team, and each lane gets its dot product. Also tells the warps the next batch if it is unknown.
    const auto sum_over_team = [&](float (&dots)[kDots]) {
        float sum = warp_sum(dots);
        if constexpr (kTeamWarps == 1) {
            if (!next_known) next_batch = after_first(__shfl_sync(kAll, drawn, 0));
        } else {
            auto &exchange = team_state.exchanges[turn];
            if (writes_result) exchange.dots[lane / kLanesPerDot][team_warp] = sum;
            if (leader && !next_known) exchange.next_batch = after_first(drawn);
            team_barrier.synchronise(team, turn);
            turn ^= 1;
            const float *partial = exchange.dots[lane / kLanesPerDot];
            sum = partial[0];
#pragma unroll
            for (int w = 1; w < kTeamWarps; w++) sum += partial[w];
            if (!next_known) next_batch = exchange.next_batch;
        }
        if (!next_known) {
            if (next_batch < batches()) draw();
            look_up();
        }
        next_known = true;
        return sum;
    };

    if constexpr (kStep) { // normalises x while the first rows are on their way; rounds where separate operations do
        float squares[kDots];
#pragma unroll
        for (int d = 0; d < kDots; d++) {
            squares[d] = 0.f;
#pragma unroll
            for (int i = 0; i < kChunks; i++)
#pragma unroll
                for (int e = 0; e < kPerChunk; e++) squares[d] = fmaf(x[0][i][e], x[0][i][e], squares[d]);
        }
        const float scale = rsqrtf(sum_over_team(squares) / float(hidden) + p.norm_eps);
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            float w[kPerChunk];
            norm[i].decode(w);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++)
                x[0][i][e] = to_float(round_to<T>(to_float(round_to<T>(x[0][i][e] * scale)) * w[e]));
        }
    }

    while (true) {
        if (!in_flight) { // nothing is on its way, and perhaps nothing is left
            if (next_known && next_batch >= batches()) break;
            float none[kDots] = {};
            sum_over_team(none);
            refill();
            continue;
        }
        const RowKind kind = kGates ? RowKind::kGate : RowKind(slot_kinds >> 2 * head & 3);
        const uint32_t row = state.slot_rows[head][my_row], j = row & (kMaxNeurons - 1), v = row >> 24 & 31;
        const bool mine = row != kNoRow && my_token < p.tokens; // this lane's dot product exists
        float bias = 0.f, threshold = 0.f;                      // asked for now, needed after the dot product
        if (!kKept && kind == RowKind::kGate && mine) {
            if constexpr (!kExact) threshold = p.threshold[j * p.threshold_stride];
            if (p.gate_bias) bias = to_float(static_cast<const T *>(p.gate_bias)[j]);
        } else if (kind == RowKind::kUp && mine) {
            if constexpr (!kExact)
                if (p.down_threshold) threshold = p.down_threshold[j * p.down_threshold_stride];
            if (p.up_bias) bias = to_float(static_cast<const T *>(p.up_bias)[j]);
        }
        pipe.wait(head, in_flight);
        // use(r, i, columns of chunk i of row r) for this lane's chunks, with several loads in flight before the first
        // use.
        const auto for_each_chunk = [&](auto use) {
            constexpr int kBatch =
                kChunks % 4 == 0 && kRows == 1 && kPerChunk == 8 ? 4 : (kChunks % 2 == 0 && kPerChunk == 8 ? 2 : 1);
#pragma unroll
            for (int first = 0; first < kChunks; first += kBatch) {
                typename Row::Packed packed[kRows][kBatch];
#pragma unroll
                for (int r = 0; r < kRows; r++)
#pragma unroll
                    for (int b = 0; b < kBatch; b++) {
                        packed[r][b] = {};
                        if ((first + b) * 32 + lane < chunks) packed[r][b] = pipe.load(head, r, first + b);
                    }
#pragma unroll
                for (int b = 0; b < kBatch; b++)
#pragma unroll
                    for (int r = 0; r < kRows; r++) {
                        float w[kPerChunk];
                        Row::decode(packed[r][b], w);
                        use(r, first + b, w);
                    }
            }
        };
        if (kind == RowKind::kDown) {
            float h[kRows][kTokens];
            uint32_t tokens[kRows], freed = 0;
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                const uint32_t other = state.slot_rows[head][r], index = other >> 24 & 31;
                tokens[r] = other == kNoRow ? 0 : state.value_tokens[index];
                if (tokens[r]) freed |= 1u << index;
#pragma unroll
                for (int m = 0; m < kTokens; m++) h[r][m] = state.values[index][m];
            }
            values_used &= ~freed;
            for_each_chunk([&](int r, int i, const float (&w)[kPerChunk]) {
#pragma unroll
                for (int m = 0; m < kTokens; m++) { // a token that dropped the neuron must not see 0 * inf
                    if (!(tokens[r] >> m & 1)) continue;
#pragma unroll
                    for (int e = 0; e < kPerChunk; e++) acc[m][i][e] = fmaf(w[e], h[r][m], acc[m][i][e]);
                }
            });
        } else {
            float dots[kDots];
#pragma unroll
            for (int d = 0; d < kDots; d++) dots[d] = 0.f;
            for_each_chunk([&](int r, int i, const float (&w)[kPerChunk]) {
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    float even = 0.f, odd = 0.f;
#pragma unroll
                    for (int e = 0; e < kPerChunk; e += 2) {
                        even = fmaf(w[e], x[m][i][e], even);
                        odd = fmaf(w[e + 1], x[m][i][e + 1], odd);
                    }
                    dots[r * kTokens + m] += even + odd;
                }
            });
            float result = sum_over_team(dots) + bias; // meaningless for a slot's absent rows, which are not `mine`
            if (!kKept && kind == RowKind::kGate) {
                gates_in_flight--;
                bool kept_here = false;
                if constexpr (kGates) {
                    const T gate = round_to<T>(result);
                    if (mine && writes_result && team_warp == 0) {
                        static_cast<T *>(p.gates)[my_token * p.intermediate_size + j] = gate;
                        add_gate(gate_sums, to_float(gate));
                    }
                } else if constexpr (kExact) {
                    result = exact_activation<T>(to_float(round_to<T>(result)), p.activation, p.squared);
                    kept_here = mine && !(result == 0.f); // NaN is kept
                } else {
                    result = activate(result, p.activation);
                    kept_here = mine && keep(result, threshold);
                }
                const uint32_t keeps = kGates ? 0 : __ballot_sync(kAll, kept_here);
                const bool to_down = kExact && !p.w_up;
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    uint32_t tokens = 0;
#pragma unroll
                    for (int m = 0; m < kTokens; m++) tokens |= (keeps >> (r * kTokens + m) * kLanesPerDot & 1) << m;
                    if (!tokens) continue;
                    const int free = __ffs(~values_used) - 1;
                    values_used |= 1u << free;
                    kept += __popc(tokens);
                    if (my_row == r && writes_result) {
                        state.values[free][my_token] = result;
                        state.value_tokens[free] = tokens;
                        if (to_down) state.down_queue[(down_head + downs) % kMaxValues] = j | free << 24;
                        else state.up_queue[(up_head + ups) % kMaxValues] = j | free << 24;
                    }
                    if (to_down) downs++;
                    else ups++;
                }
            } else {
                if constexpr (kExact)
                    if (p.relu_up && result < 0.f) result = 0.f; // NaN stays NaN
                result *= state.values[v][my_token];
                const bool still = mine && state.value_tokens[v] >> my_token & 1 &&
                                   (!decides_down() || (kExact ? !(result == 0.f) : keep(result, threshold)));
                const uint32_t keeps = __ballot_sync(kAll, still);
                __syncwarp(); // values and value_tokens have been read
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    uint32_t tokens = 0;
#pragma unroll
                    for (int m = 0; m < kTokens; m++) tokens |= (keeps >> (r * kTokens + m) * kLanesPerDot & 1) << m;
                    if constexpr (kForm != Form::kKeptStep) kept_down += __popc(tokens); // a step counts nothing
                    if (my_row == r && row != kNoRow && writes_result) {
                        state.values[v][my_token] = result;
                        state.value_tokens[v] = tokens;
                    }
                    if (!decides_down()) continue;
                    const uint32_t other = state.slot_rows[head][r];
                    if (other == kNoRow) continue;
                    if (tokens) {
                        if (lane == 0) state.down_queue[(down_head + downs) % kMaxValues] = other;
                        downs++;
                    } else {
                        values_used &= ~(1u << (other >> 24 & 31));
                    }
                }
            }
        }
        __syncwarp(); // the slot has been read, the queues have been written
        head = head + 1 == ring.slots ? 0 : head + 1;
        in_flight--;
        refill();
    }

    if (kForm != Form::kKeptStep && p.counts && leader) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        if (first_batch == 0) atomicAdd(counts, (unsigned long long)(p.intermediate_size * p.tokens));
        if constexpr (!kKept) atomicAdd(counts + 1, (unsigned long long)kept); // otherwise the launch before has
        atomicAdd(counts + 2, (unsigned long long)kept_down);
    }

    if constexpr (kGates) { // every sum in a fixed order: of a lane, of the lanes of a token, of the teams
        __shared__ GateSums of_teams[kTeams][kTokens];
#pragma unroll
        for (int o = kTokens * kLanesPerDot; o < 32; o *= 2) add_gates_of_lane(gate_sums, o);
        if (team_warp == 0 && my_row == 0 && writes_result) of_teams[team][my_token] = gate_sums;
        __syncthreads();
        if (tid >= p.tokens) return;
        GateSums sums{};
        for (int t = 0; t < kTeams; t++) add_gates(sums, of_teams[t][tid]);
        leave_gate_sums(args.workspace, tid, sums);
        return;
    }

    // Sum the teams in the rings' space, which is free now, and add to the other CTAs' sums.
    float *team_sums = reinterpret_cast<float *>(smem); // [kTeams][hidden]
    int own_chunks = chunks;
    // So that it is compared again: the compiler spilled a predicate over the loop.
    if constexpr (kForm == Form::kKeptStep) asm volatile("" : "+r"(own_chunks));
    const OutputOrder<0> order{int(p.tokens), hidden};
#pragma unroll
    for (int m = 0; m < kTokens; m++) {
        if (m >= order.tokens) break;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (i * 32 + lane >= own_chunks) break;
            float *to = team_sums + team * hidden + (first_chunk + i * 32 + lane) * kPerChunk;
#pragma unroll
            for (int e = 0; e < kPerChunk; e += 4)
                *reinterpret_cast<float4 *>(to + e) =
                    make_float4(acc[m][i][e], acc[m][i][e + 1], acc[m][i][e + 2], acc[m][i][e + 3]);
        }
        __syncthreads();
        for (int c = tid * 4; c < hidden; c += kWarps * 32 * 4) {
            float4 sum = *reinterpret_cast<const float4 *>(team_sums + c);
#pragma unroll
            for (int t = 1; t < kTeams; t++) {
                const float4 other = *reinterpret_cast<const float4 *>(team_sums + t * hidden + c);
                sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
            }
            add_to_output(args.workspace, order.size(), m * hidden + c, sum);
        }
    }
    if constexpr (!kStep)
        finish_output(args.workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

// Every architecture gets the code of the instances that plan() picks on it; the others would trap. kForm: as a choice
// at run time, that for a step of decoding made the ordinary form 0.3 to 1 us slower.
template <class Row, typename T, class Pipe, int kTokens, int kTeams, int kTeamWarps, int kChunks, int kRows,
          Form kForm>
__global__ void __launch_bounds__(kTeams * kTeamWarps * 32, 1)
    sparse_mlp_kernel(const __grid_constant__ RingArguments args) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= Pipe::kMinArch &&
                  kRows == rows_per_batch(kTokens, kChunks, has_large_shared_memory(__CUDA_ARCH__)))
        sparse_mlp_body<Row, T, Pipe, kTokens, kTeams, kTeamWarps, kChunks, kRows, kForm>(args);
    else __trap();
#endif
}

} // namespace cats
