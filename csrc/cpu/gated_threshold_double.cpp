// gated_threshold in fp64, one element at a time. Only gradcheck needs it, so it is written for clarity.
#include "kernels.h"

namespace cats {
namespace {

constexpr double kSqrt2OverPi = 0.79788456080286535588, kSqrtHalf = 0.70710678118654752440,
                 kSqrt1Over2Pi = 0.39894228040143267794;

struct ValueAndGrad {
    double value, grad;
};

ValueAndGrad activate(Activation activation, double g) {
    switch (activation) {
    case Activation::kSilu: {
        const double s = 1 / (1 + std::exp(-g));
        return {g * s, s * (1 + g * (1 - s))};
    }
    case Activation::kGelu: {
        const double cdf = 0.5 * std::erfc(-g * kSqrtHalf);
        return {g * cdf, cdf + g * kSqrt1Over2Pi * std::exp(-0.5 * g * g)};
    }
    case Activation::kGeluTanh: {
        const double s = 1 / (1 + std::exp(-2 * kSqrt2OverPi * (g + 0.044715 * g * g * g)));
        return {g * s, s + g * s * (1 - s) * 2 * kSqrt2OverPi * (1 + 3 * 0.044715 * g * g)};
    }
    case Activation::kRelu: return {g < 0 ? 0 : g, g > 0 ? 1. : 0.};
    }
    return {};
}

} // namespace

void gated_threshold_double(const GatedThresholdParams &p, const Parallel &parallel) {
    auto row = [&](int64_t i) {
        const double *gate = static_cast<const double *>(p.gate) + i * p.gate_stride;
        const double *up = static_cast<const double *>(p.up) + i * p.up_stride;
        int64_t kept = 0, kept_down = 0;
        for (int64_t j = 0; j < p.intermediate_size; j++) {
            const ValueAndGrad v = activate(p.activation, gate[j]);
            const double h = v.value * up[j];
            bool keep = !(std::fabs(v.value) < p.threshold[j * p.threshold_stride]);
            kept += keep;
            if (p.down_threshold) keep = keep && !(std::fabs(h) < p.down_threshold[j * p.down_threshold_stride]);
            kept_down += keep;
            const int64_t at = i * p.intermediate_size + j;
            if (p.grad_h) {
                const double grad = static_cast<const double *>(p.grad_h)[at];
                static_cast<double *>(p.grad_gate)[at] = keep ? grad * up[j] * v.grad : 0;
                static_cast<double *>(p.grad_up)[at] = keep ? grad * v.value : 0;
            } else {
                static_cast<double *>(p.h)[at] = keep ? h : 0;
            }
        }
        if (!p.counts) return;
        __atomic_fetch_add(p.counts, p.intermediate_size, __ATOMIC_RELAXED);
        __atomic_fetch_add(p.counts + 1, kept, __ATOMIC_RELAXED);
        __atomic_fetch_add(p.counts + 2, kept_down, __ATOMIC_RELAXED);
    };
    parallel.for_each(p.rows, [](void *context, int64_t i) { (*static_cast<decltype(row) *>(context))(i); }, &row);
}

} // namespace cats
