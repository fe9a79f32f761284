// A row of weights as the kernel reads it. A row format is a type with these members; the kernel knows nothing else,
// and the dtype of x, the biases and y is another type (T in sparse_mlp.inl.h):
//
//     Storage                       what a weight's row stride counts
//     Row(data, hidden_size)        the row that begins at `data`; also default-constructible
//     kOrder                        which columns load() puts into which lanes
//     load(column, n)               kGroup columns as fp32, from a multiple of kGroup on, n of them left; the rest is 0
//     scale()                       factor of the whole row. Scales of single groups are load()'s
//
// x . row is computed in fp32 from load(), unless the instruction set multiplies the stored values itself. Then the
// format specialises DotOperand and overloads dot_group.
#pragma once

#include "../vec.inl.h"

namespace cats::CATS_ISA {

// Elements of T, one after the other.
template <class T> struct DenseRow {
    typedef T Storage;
    // One instruction widens the even columns of bf16, one the odd ones; in order they take two each.
    static constexpr ColumnOrder kOrder =
        std::is_same_v<T, BFloat16> ? ColumnOrder::kEvenOdd : ColumnOrder::kConsecutive;

    const T *data;

    DenseRow() = default;
    DenseRow(const T *data, int64_t /*hidden_size*/) : data(data) {}
    CATS_INLINE_MEMBER Group load(int64_t column, int64_t n) const { return load_group<kOrder>(data + column, n); }
    CATS_INLINE_MEMBER float scale() const { return 1; }
};

// What x of dtype T is copied into, once a call, to be multiplied with rows: fp32 in the row's column order.
template <class Row, class T> struct DotOperand {
    typedef float type;
};

// acc + x . row over kGroup columns, lane by lane.
template <class Row> CATS_INLINE VecF dot_group(VecF acc, const Row &row, int64_t column, int64_t n, const float *x) {
    const Group w = row.load(column, n);
    return fma(w.b, load(x + kLanes), fma(w.a, load(x), acc));
}

#ifdef CATS_DOT_BF16
// x stays bf16 and in its order.
template <> struct DotOperand<DenseRow<BFloat16>, BFloat16> {
    typedef BFloat16 type;
};

CATS_INLINE VecF dot_group(VecF acc, const DenseRow<BFloat16> &row, int64_t column, int64_t n, const BFloat16 *x) {
    BFloat16 last[kGroup] = {};
    const BFloat16 *w = row.data + column;
    if (n < kGroup) w = static_cast<BFloat16 *>(std::memcpy(last, w, n * sizeof(*w)));
    return (VecF)_mm512_dpbf16_ps((__m512)acc, load_bits<__m512bh>(w), load_bits<__m512bh>(x));
}
#endif

} // namespace cats::CATS_ISA
