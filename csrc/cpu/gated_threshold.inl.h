// h = mask * act(gate) * up and its gradients, elementwise, in one pass over memory; PyTorch's own ops take six.
#pragma once

#include "activation.inl.h"
#include "parallel.inl.h"
#include "vec.inl.h"

namespace cats::CATS_ISA {

// Thresholds of a stride above 1. Rare, so out of line: the loops that inline it double in size.
__attribute__((noinline)) static VecF load_strided(const float *threshold, int64_t stride, int64_t n) {
    float values[kLanes] = {};
    for (int64_t i = 0; i < min(n, kLanes); i++) values[i] = threshold[i * stride];
    return load(values);
}

// The thresholds of the neurons from `column` on, of which n are left.
CATS_INLINE VecF load_thresholds(const float *threshold, int64_t stride, int64_t column, int64_t n) {
    if (stride == 0) return broadcast(*threshold);
    if (stride == 1) return load(threshold + column, n);
    return load_strided(threshold + column * stride, stride, n);
}

// |value| < threshold, lane by lane.
CATS_INLINE VecI below(VecF value, const float *threshold, int64_t stride, int64_t column, int64_t n) {
    return abs(value) < load_thresholds(threshold, stride, column, n);
}

// drop_up: of those by `threshold` alone.
CATS_INLINE VecI dropped(const GatedThresholdParams &p, VecF v, VecF h, int64_t column, int64_t n, VecI *drop_up) {
    VecI drop = *drop_up = below(v, p.threshold, p.threshold_stride, column, n);
    if (p.down_threshold) drop |= below(h, p.down_threshold, p.down_threshold_stride, column, n);
    return drop;
}

// How many of the first n lanes are 0.
CATS_INLINE int64_t zeros(VecI lanes, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < min(n, kLanes); i++) count += !lanes[i];
    return count;
}

// Columns [begin, end) of one row.
template <Activation A, class T> struct GatedThreshold {
    const GatedThresholdParams &p;

    void forward(int64_t row, int64_t begin, int64_t end) const {
        const T *gate = static_cast<const T *>(p.gate) + row * p.gate_stride;
        const T *up = static_cast<const T *>(p.up) + row * p.up_stride;
        T *out = static_cast<T *>(p.h) + row * p.intermediate_size;
        int64_t kept = 0, kept_down = 0;
        for (int64_t c = begin; c < end; c += kLanes) {
            const int64_t n = end - c;
            const VecF v = activate<A>(load(gate + c, n)), h = v * load(up + c, n);
            VecI drop_up;
            const VecI drop = dropped(p, v, h, c, n, &drop_up);
            store(out + c, drop ? (VecF){} : h, n);
            if (p.counts) kept += zeros(drop_up, n), kept_down += zeros(drop, n);
        }
        if (!p.counts) return;
        __atomic_fetch_add(p.counts, end - begin, __ATOMIC_RELAXED);
        __atomic_fetch_add(p.counts + 1, kept, __ATOMIC_RELAXED);
        __atomic_fetch_add(p.counts + 2, kept_down, __ATOMIC_RELAXED);
    }

    void backward(int64_t row, int64_t begin, int64_t end) const {
        const T *gate = static_cast<const T *>(p.gate) + row * p.gate_stride;
        const T *up = static_cast<const T *>(p.up) + row * p.up_stride;
        const T *grad_h = static_cast<const T *>(p.grad_h) + row * p.intermediate_size;
        T *grad_gate = static_cast<T *>(p.grad_gate) + row * p.intermediate_size;
        T *grad_up = static_cast<T *>(p.grad_up) + row * p.intermediate_size;
        for (int64_t c = begin; c < end; c += kLanes) {
            const int64_t n = end - c;
            const VecF g = load(gate + c, n), u = load(up + c, n), grad = load(grad_h + c, n);
            const VecF v = activate<A>(g);
            VecI drop_up;
            const VecI drop = dropped(p, v, v * u, c, n, &drop_up);
            store(grad_gate + c, drop ? (VecF){} : grad * u * activate_grad<A>(g), n);
            store(grad_up + c, drop ? (VecF){} : grad * v, n);
        }
    }
};

// Splits all elements evenly into parts and calls f(row, begin, end) for each run of columns within one row.
template <class F> static void over_columns(const GatedThresholdParams &p, const Parallel &parallel, const F &f) {
    const int64_t size = p.rows * p.intermediate_size;
    const int64_t parts = parts_for(parallel, size, 1 << 14);
    for_each(parallel, parts, [&](int64_t part) {
        const int64_t end = size * (part + 1) / parts;
        for (int64_t i = size * part / parts; i < end;) {
            const int64_t row = i / p.intermediate_size, column = i % p.intermediate_size;
            const int64_t n = min(p.intermediate_size - column, end - i);
            f(row, column, column + n);
            i += n;
        }
    });
}

static void gated_threshold(const GatedThresholdParams &p, const Parallel &parallel) {
    const auto run = [&](auto kernel) {
        if (p.grad_h) over_columns(p, parallel, [&](auto... range) { kernel.backward(range...); });
        else over_columns(p, parallel, [&](auto... range) { kernel.forward(range...); });
    };
    with_activation(p.activation, [&](auto activation) {
        constexpr Activation A = decltype(activation)::value;
        switch (p.dtype) {
        case DType::kFloat32: return run(GatedThreshold<A, float>{p});
        case DType::kFloat16: return run(GatedThreshold<A, Half>{p});
        case DType::kBFloat16: return run(GatedThreshold<A, BFloat16>{p});
        case DType::kFloat64: break; // gated_threshold_double
        }
    });
}

} // namespace cats::CATS_ISA
