// A row of weights as the kernel reads it. A row format is a type with these members; the kernel knows nothing else,
// and the dtype of x, the biases and y is another type (T in sparse_mlp.inl.h):
//
// - Storage: what a weight's row stride counts
// - Row(data, next): the row that begins at `data`; at `next`, the one after it, to prefetch. Default-constructible too
// - kOrder: which columns load() puts into which lanes
// - kTileColumns: columns that are read after one open(); a multiple of kBlock
// - kBlock: columns of a block; a multiple of kGroup. Rows of packed formats are whole blocks
// - kScaled: whether a block has a factor; kOffset: whether it has an offset
// - open(column): before blocks of the tile that begins at `column` are asked for
// - block(column, n): the block that begins at `column`, with n columns left in the row. It has
//     - load(i): its kGroup columns from i on as fp32; what is beyond the row is 0
//     - scale: factor of what load() gives, in each lane; if kScaled
//     - offset: what is subtracted before; if kOffset
//
// x . row is computed in fp32 from load(), unless the instruction set multiplies the stored values itself. Then the
// format specialises DotOperand and overloads dot_group, or dot_block and make_operand (digits.inl.h).
#pragma once

#include "../vec.inl.h"

namespace cats::CATS_ISA {

// Elements of T, one after the other.
template <class T> struct DenseRow {
    typedef T Storage;
    // One instruction widens the even columns of bf16, one the odd ones; in order they take two each.
    static constexpr ColumnOrder kOrder =
        std::is_same_v<T, BFloat16> ? ColumnOrder::kEvenOdd : ColumnOrder::kConsecutive;
    static constexpr int64_t kTileColumns = int64_t(1) << 62;
    static constexpr int kBlock = kGroup;
    static constexpr bool kScaled = false, kOffset = false;

    struct Block {
        const T *data;
        int64_t n;

        CATS_INLINE_MEMBER Group load(int i) const { return load_group<kOrder>(data + i, n - i); }
    };

    const T *data;

    DenseRow() = default;
    DenseRow(const T *data, const T * /*next*/) : data(data) {}
    CATS_INLINE_MEMBER void open(int64_t /*column*/) {}
    CATS_INLINE_MEMBER Block block(int64_t column, int64_t n) const { return {data + column, n}; }
};

// What x of dtype T is copied into, once a call, to be multiplied with rows: fp32 in the row's column order.
template <class Row, class T> struct DotOperand {
    typedef float type;
};
template <class X> constexpr int kOperandColumns = 1;                  // that one X stands for
template <class Row, class X> constexpr int kDotColumns = Row::kBlock; // that dot_block takes at a time

// n columns of a token, and zeros up to `padded`.
template <class Row, class T> CATS_INLINE void make_operand(float *to, const T *from, int64_t n, int64_t padded) {
    std::memset(to, 0, padded * sizeof(*to));
    for (int64_t c = 0; c < n; c += kGroup)
        store_group<ColumnOrder::kConsecutive>(to + c, load_group<Row::kOrder>(from + c, n - c));
}

// acc + x . block over kGroup columns, lane by lane.
template <class Block> CATS_INLINE VecF dot_group(VecF acc, const Block &block, int i, const float *x) {
    const Group w = block.load(i);
    return fma(w.b, load(x + kLanes), fma(w.a, load(x), acc));
}

#ifdef CATS_DOT_BF16
// x stays bf16 and in its order.
template <> struct DotOperand<DenseRow<BFloat16>, BFloat16> {
    typedef BFloat16 type;
};

template <class Row> CATS_INLINE void make_operand(BFloat16 *to, const BFloat16 *from, int64_t n, int64_t padded) {
    std::memset(to, 0, padded * sizeof(*to));
    std::memcpy(to, from, n * sizeof(*to));
}

CATS_INLINE VecF dot_group(VecF acc, const DenseRow<BFloat16>::Block &block, int i, const BFloat16 *x) {
    BFloat16 last[kGroup] = {};
    const BFloat16 *w = block.data + i;
    if (block.n < kGroup) w = static_cast<BFloat16 *>(std::memcpy(last, w, block.n * sizeof(*w)));
    return (VecF)_mm512_dpbf16_ps((__m512)acc, load_bits<__m512bh>(w), load_bits<__m512bh>(x));
}
#endif

} // namespace cats::CATS_ISA
