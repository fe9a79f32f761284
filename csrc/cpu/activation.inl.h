// The activations and their derivatives on a vector of fp32, accurate to a few units in the last place, because the
// threshold is compared with the result. cats_ext/reference.py has the formulas as they are usually written.
#pragma once

namespace cats::CATS_ISA {

CATS_INLINE VecF sigmoid(VecF x) { return 1.f / (1.f + exp(-x)); }

template <class F> CATS_INLINE VecF map(F f, VecF v) {
    float lanes[kLanes];
    store(lanes, v);
    for (float &lane : lanes) lane = f(lane);
    return load(lanes);
}

constexpr float kSqrt2OverPi = 0.797884561f, kSqrtHalf = 0.707106781f, kSqrt1Over2Pi = 0.398942280f;

// Gelu's tanh form is g * sigmoid(inner(g)), since (1 + tanh(z)) / 2 = sigmoid(2z).
CATS_INLINE VecF gelu_tanh_inner(VecF g) { return 2 * kSqrt2OverPi * (g + 0.044715f * g * g * g); }

template <Activation A> CATS_INLINE VecF activate(VecF g) {
    if constexpr (A == Activation::kSilu) return g / (1.f + exp(-g));
    if constexpr (A == Activation::kGelu)
        return 0.5f * g * map([](float x) { return std::erfc(x); }, g * -kSqrtHalf); // erfc(-x) = 1 + erf(x)
    if constexpr (A == Activation::kGeluTanh) return g / (1.f + exp(-gelu_tanh_inner(g)));
    if constexpr (A == Activation::kRelu) return g < 0.f ? (VecF){} : g;
}

template <Activation A> CATS_INLINE VecF activate_grad(VecF g) {
    if constexpr (A == Activation::kSilu) {
        const VecF s = sigmoid(g);
        return s * (1.f + g * (1.f - s));
    }
    if constexpr (A == Activation::kGelu)
        return 0.5f * map([](float x) { return std::erfc(x); }, g * -kSqrtHalf) +
               g * kSqrt1Over2Pi * exp(-0.5f * g * g);
    if constexpr (A == Activation::kGeluTanh) {
        const VecF s = sigmoid(gelu_tanh_inner(g));
        return s + g * s * (1.f - s) * (2 * kSqrt2OverPi) * (1.f + 3 * 0.044715f * g * g);
    }
    if constexpr (A == Activation::kRelu) return g > 0.f ? broadcast(1.f) : (VecF){};
}

// Calls f with the activation as a compile-time constant: f(std::integral_constant-like tag).
template <Activation A> struct ActivationTag {
    static constexpr Activation value = A;
};

template <class F> CATS_INLINE void with_activation(Activation activation, F f) {
    switch (activation) {
    case Activation::kSilu: return f(ActivationTag<Activation::kSilu>());
    case Activation::kGelu: return f(ActivationTag<Activation::kGelu>());
    case Activation::kGeluTanh: return f(ActivationTag<Activation::kGeluTanh>());
    case Activation::kRelu: return f(ActivationTag<Activation::kRelu>());
    }
}

} // namespace cats::CATS_ISA
