// The activations and their derivatives on a vector of fp32. They are accurate to a few units in the last place,
// because their result is compared with the threshold. cats_ext/ops/reference.py has the formulas as they are usually
// written.
#pragma once

#include "vec.inl.h"

namespace cats::CATS_ISA {

constexpr float kTwoSqrt2OverPi = 1.59576912f, kSqrt1Over2Pi = 0.398942280f, kGeluCubic = 0.044715f;

CATS_INLINE VecF sigmoid(VecF x) { return 1.f / (1.f + exp(-x)); }

// Gelu's tanh form is g * sigmoid(inner(g)), since (1 + tanh(z)) / 2 = sigmoid(2z).
CATS_INLINE VecF gelu_tanh_inner(VecF g) { return kTwoSqrt2OverPi * (g + kGeluCubic * g * g * g); }

struct Normal {
    VecF cdf, bell; // Phi(g), and exp(-g^2 / 2), the density without its factor
};

// Phi(-|g|) = exp(-g^2 / 2) * t * Q(t) with t = 1 / (1 + 0.35 |g|). This has no cancellation in the tail, where 1 + erf
// loses all digits. Q is fitted for the least relative error (3e-8 before rounding) for |g| <= 14.5; Phi(-|g|) is zero
// in fp32 beyond that.
CATS_INLINE Normal normal(VecF g) {
    VecF a = abs(g);
    a = a > 15.f ? broadcast(15.f) : a; // keeps NaN
    const VecF t = 1.f / (1.f + 0.35f * a);
    VecF q = broadcast(-2.91579980e-2f);
    const float coefficients[] = {1.44031450e-1f, -2.55840063e-1f, 1.59320861e-1f, -2.32131146e-2f,
                                  1.05552807e-1f, 1.19821213e-1f,  1.39863521e-1f, 1.39621302e-1f};
    for (float c : coefficients) q = fma(q, t, broadcast(c));
    const VecF bell = exp(-0.5f * a * a);
    const VecF tail = bell * t * q;
    return {g > 0.f ? 1.f - tail : tail, bell};
}

template <Activation A> CATS_INLINE VecF activate(VecF g) {
    if constexpr (A == Activation::kSilu) return g / (1.f + exp(-g));
    if constexpr (A == Activation::kGelu) return g * normal(g).cdf;
    if constexpr (A == Activation::kGeluTanh) return g / (1.f + exp(-gelu_tanh_inner(g)));
    if constexpr (A == Activation::kRelu) return g < 0.f ? (VecF){} : g;
}

template <Activation A> CATS_INLINE VecF activate_grad(VecF g) {
    if constexpr (A == Activation::kSilu) {
        const VecF s = sigmoid(g);
        return s * (1.f + g * (1.f - s));
    }
    if constexpr (A == Activation::kGelu) {
        const Normal n = normal(g);
        return n.cdf + g * kSqrt1Over2Pi * n.bell;
    }
    if constexpr (A == Activation::kGeluTanh) {
        const VecF s = sigmoid(gelu_tanh_inner(g));
        return s + g * s * (1.f - s) * kTwoSqrt2OverPi * (1.f + 3 * kGeluCubic * g * g);
    }
    if constexpr (A == Activation::kRelu) return g > 0.f ? broadcast(1.f) : (VecF){};
}

template <Activation A> struct ActivationTag {
    static constexpr Activation value = A;
};

// Calls f with the activation as a compile-time constant, f(tag) with decltype(tag)::value.
template <class F> CATS_INLINE void with_activation(Activation activation, F f) {
    switch (activation) {
    case Activation::kSilu: return f(ActivationTag<Activation::kSilu>());
    case Activation::kGelu: return f(ActivationTag<Activation::kGelu>());
    case Activation::kGeluTanh: return f(ActivationTag<Activation::kGeluTanh>());
    case Activation::kRelu: return f(ActivationTag<Activation::kRelu>());
    }
}

} // namespace cats::CATS_ISA
