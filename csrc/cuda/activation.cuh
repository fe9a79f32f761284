// Activations of a gated MLP and their derivatives, in fp32 or fp64; and the comparison that decides what is kept.
#pragma once

#include "../sparse_mlp.h"
#include "values.cuh"

namespace cats {

template <typename T> __device__ __forceinline__ T activate(T g, Activation activation) {
    constexpr T kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
    if (activation == Activation::kSilu) return g / (T(1) + exp(-g)); // before a jump through a table
    switch (activation) {
    case Activation::kSilu: break;
    case Activation::kGelu: return T(0.5) * g * (T(1) + erf(g * kSqrtHalf));
    case Activation::kGeluTanh: return T(0.5) * g * (T(1) + tanh(kSqrtTwoOverPi * (g + T(0.044715) * g * g * g)));
    case Activation::kRelu: return g < T(0) ? T(0) : g; // NaN stays NaN
    }
    return g;
}

template <typename T> __device__ __forceinline__ T activate_grad(T g, Activation activation) {
    constexpr T kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
    constexpr T kInvSqrtTwoPi = 0.39894228040143267794, kCubic = 0.044715;
    switch (activation) {
    case Activation::kSilu: {
        const T s = T(1) / (T(1) + exp(-g));
        return s * (T(1) + g * (T(1) - s));
    }
    case Activation::kGelu: return T(0.5) * (T(1) + erf(g * kSqrtHalf)) + g * kInvSqrtTwoPi * exp(T(-0.5) * g * g);
    case Activation::kGeluTanh: {
        const T t = tanh(kSqrtTwoOverPi * (g + kCubic * g * g * g));
        return T(0.5) * (T(1) + t) + T(0.5) * g * (T(1) - t * t) * kSqrtTwoOverPi * (T(1) + T(3) * kCubic * g * g);
    }
    case Activation::kRelu: return g > T(0) ? T(1) : T(0);
    }
    return T(1);
}

// Of exact_mlp, whose g has been rounded: act(g), or its square, each rounded to T.
template <typename T> __device__ __forceinline__ float exact_activation(float g, Activation activation, bool squared) {
    const float v = to_float(round_to<T>(activate(g, activation)));
    return squared ? to_float(round_to<T>(v * v)) : v;
}

// |v| >= threshold, and true where either is NaN or the threshold is negative.
template <typename T> __device__ __forceinline__ bool keep(T v, T threshold) { return !(abs(v) < threshold); }

} // namespace cats
