// Vectors of CATS_VECTOR_BYTES bytes in the compiler's own vector extension: one source for every instruction set, with
// intrinsics only for what the extension cannot express (half conversion, bf16 dot product).
//
// There are two ways to read elements. load() keeps their order. load_group() reads kGroup = 2 * kLanes of them into
// two vectors in a chosen order (ColumnOrder): for bf16 even and odd elements take one instruction each, where widening
// in order takes two. Sums over neurons or columns may use any order, as long as x, y and the rows share it.
#pragma once

#define CATS_INLINE_MEMBER inline __attribute__((always_inline))
#define CATS_INLINE static CATS_INLINE_MEMBER

namespace cats::CATS_ISA {

constexpr int kLanes = CATS_VECTOR_BYTES / 4;
constexpr int kGroup = 2 * kLanes;

typedef float VecF __attribute__((vector_size(CATS_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(CATS_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(CATS_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(CATS_VECTOR_BYTES / 2)));

template <class V, class T> CATS_INLINE V load_bits(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

// --- one vector of fp32 from or to kLanes elements, in order -------------------------------------------------------

CATS_INLINE VecF load(const float *p) { return load_bits<VecF>(p); }
CATS_INLINE void store(float *p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

CATS_INLINE VecF load(const BFloat16 *p) { return (VecF)(__builtin_convertvector(load_bits<VecH>(p), VecU) << 16); }

// Bits of v rounded to bf16, to nearest even, in the upper half of each lane; the lower half is undefined.
CATS_INLINE VecU round_to_bfloat16(VecF v) {
    const VecU bits = (VecU)v;
    const VecU rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return v != v ? bits | 0x400000 : rounded; // rounding could turn a NaN into infinity
}

CATS_INLINE void store(BFloat16 *p, VecF v) {
    const VecH bits = __builtin_convertvector(round_to_bfloat16(v) >> 16, VecH);
    std::memcpy(p, &bits, sizeof(bits));
}

#if CATS_VECTOR_BYTES == 64
// Masked with all lanes: gcc 12 warns about an undefined register in the forms without a mask.
CATS_INLINE VecF load(const Half *p) { return (VecF)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p)); }
CATS_INLINE void store(Half *p, VecF v) {
    const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof(bits));
}
#elif CATS_VECTOR_BYTES == 32
CATS_INLINE VecF load(const Half *p) { return (VecF)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
CATS_INLINE void store(Half *p, VecF v) {
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof(bits));
}
#else
// Multiplying by 2^112 moves the exponent: it is exact, and makes subnormal halves normal.
CATS_INLINE VecF load(const Half *p) {
    const VecU h = __builtin_convertvector(load_bits<VecH>(p), VecU);
    const VecF magnitude = (VecF)((h & 0x7fff) << 13) * 0x1p112f;
    const VecU infinite = magnitude >= 65536.f ? (VecU){} + 0x7f800000 : (VecU){};
    return (VecF)((VecU)magnitude | infinite | (h & 0x8000) << 16);
}
CATS_INLINE void store(Half *p, VecF v) {
    const VecU bits = (VecU)v, magnitude = bits & 0x7fffffff;
    // Normal halves: round to nearest even at bit 13, then move the exponent by 112. 65520 and above become infinity.
    const VecU normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Subnormal halves: adding 0.5 shifts their bits to the end of the mantissa, rounded to nearest even.
    const VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000;
    VecU h = magnitude < 0x38800000 ? subnormal : normal; // 2^-14
    h = magnitude >= 0x477ff000 ? (VecU){} + 0x7c00 : h;  // 65520
    h = magnitude > 0x7f800000 ? (VecU){} + 0x7e00 : h;
    const VecH out = __builtin_convertvector(h | (bits >> 16 & 0x8000), VecH);
    std::memcpy(p, &out, sizeof(out));
}
#endif

// --- kLanes bytes, in order ------------------------------------------------------------------------------------------

// Intrinsics, because gcc 12 widens bytes one by one. load_e4m3() gives fp8 divided by kE4m3Factor: a code's bits at
// the place of those of a half are that half.
constexpr float kE4m3Factor = 256;

#if CATS_VECTOR_BYTES == 64
CATS_INLINE VecU load_bytes(const uint8_t *p) {
    return (VecU)_mm512_maskz_cvtepu8_epi32(0xffff, load_bits<__m128i>(p));
}
CATS_INLINE VecI load_signed_bytes(const uint8_t *p) {
    return (VecI)_mm512_maskz_cvtepi8_epi32(0xffff, load_bits<__m128i>(p));
}
CATS_INLINE VecF load_e4m3(const uint8_t *p) {
    const __m256i codes = _mm256_cvtepi8_epi16(load_bits<__m128i>(p));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    return (VecF)_mm512_maskz_cvtph_ps(0xffff, halves);
}
#elif CATS_VECTOR_BYTES == 32
CATS_INLINE VecU load_bytes(const uint8_t *p) {
    return (VecU)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
CATS_INLINE VecI load_signed_bytes(const uint8_t *p) {
    return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
CATS_INLINE VecF load_e4m3(const uint8_t *p) {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
    const __m128i halves = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(int16_t(0xbf80)));
    return (VecF)_mm256_cvtph_ps(halves);
}
#elif defined(__SSE2__)
CATS_INLINE VecU four_of_each_byte(const uint8_t *p) {
    const __m128i bytes = _mm_cvtsi32_si128(load_bits<int32_t>(p)), pairs = _mm_unpacklo_epi8(bytes, bytes);
    return (VecU)_mm_unpacklo_epi16(pairs, pairs);
}
CATS_INLINE VecU load_bytes(const uint8_t *p) { return four_of_each_byte(p) >> 24; }
CATS_INLINE VecI load_signed_bytes(const uint8_t *p) { return (VecI)four_of_each_byte(p) >> 24; }
#else
CATS_INLINE VecU load_bytes(const uint8_t *p) { return (load_bits<uint32_t>(p) >> (VecU){0, 8, 16, 24}) & 255; }
CATS_INLINE VecI load_signed_bytes(const uint8_t *p) {
    return (VecI)(load_bits<uint32_t>(p) << (VecU){24, 16, 8, 0}) >> 24;
}
#endif
#if CATS_VECTOR_BYTES == 16
CATS_INLINE VecF load_e4m3(const uint8_t *p) { // moves the exponent, as load(const Half *)
    return (VecF)((VecU)load_signed_bytes(p) << 20 & 0x87f00000) * 0x1p112f;
}
#endif

// As load() and store() where fewer than kLanes elements are left; missing ones read as zero.
template <class T> CATS_INLINE VecF load(const T *p, int64_t n) {
    if (n >= kLanes) return load(p);
    T buffer[kLanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <class T> CATS_INLINE void store(T *p, VecF v, int64_t n) {
    if (n >= kLanes) return store(p, v);
    T buffer[kLanes];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
}

// v, rounded to T.
template <class T> CATS_INLINE VecF rounded(VecF v) {
    T buffer[kLanes];
    store(buffer, v);
    return load(buffer);
}

// --- kGroup elements -----------------------------------------------------------------------------------------------

// kConsecutive: a holds the first kLanes elements, b the others. kEvenOdd: a holds those of even index, b of odd index.
enum class ColumnOrder { kConsecutive, kEvenOdd };

struct Group {
    VecF a, b;
};

template <ColumnOrder order, class T> CATS_INLINE Group load_group(const T *p) {
    if constexpr (order == ColumnOrder::kConsecutive) return {load(p), load(p + kLanes)};
    if constexpr (std::is_same_v<T, BFloat16>) {
        const VecU pairs = load_bits<VecU>(p); // little-endian: the even element is the lower half
        return {(VecF)(pairs << 16), (VecF)(pairs & 0xffff0000)};
    }
    T even[kLanes], odd[kLanes];
    for (int i = 0; i < kLanes; i++) even[i] = p[2 * i], odd[i] = p[2 * i + 1];
    return {load(even), load(odd)};
}

template <ColumnOrder order, class T> CATS_INLINE void store_group(T *p, Group g) {
    if constexpr (order == ColumnOrder::kConsecutive) {
        store(p, g.a), store(p + kLanes, g.b);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        const VecU pairs = round_to_bfloat16(g.a) >> 16 | (round_to_bfloat16(g.b) & 0xffff0000);
        std::memcpy(p, &pairs, sizeof(pairs));
    } else {
        T even[kLanes], odd[kLanes];
        store(even, g.a), store(odd, g.b);
        for (int i = 0; i < kLanes; i++) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
    }
}

// The same where fewer than kGroup elements are left; missing ones read as zero.
template <ColumnOrder order, class T> CATS_INLINE Group load_group(const T *p, int64_t n) {
    if (n >= kGroup) return load_group<order>(p);
    T buffer[kGroup] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load_group<order>(buffer);
}

template <ColumnOrder order, class T> CATS_INLINE void store_group(T *p, Group g, int64_t n) {
    if (n >= kGroup) return store_group<order>(p, g);
    T buffer[kGroup];
    store_group<order>(buffer, g);
    std::memcpy(p, buffer, n * sizeof(T));
}

// --- arithmetic ----------------------------------------------------------------------------------------------------

// a * b + c: the compiler fuses it where the instruction set has the instruction.
CATS_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }

CATS_INLINE VecF abs(VecF v) { return (VecF)((VecU)v & 0x7fffffff); }

CATS_INLINE VecF broadcast(float v) { return (VecF){} + v; }

CATS_INLINE float sum(VecF v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x to about one unit in the last place, from the polynomial of Cephes' expf on [-ln2/2, ln2/2].
CATS_INLINE VecF exp(VecF x) {
    x = x < -104.f ? broadcast(-104.f) : x; // e^x is 0 below and infinite above; NaN passes through
    x = x > 89.f ? broadcast(89.f) : x;
    const VecF shifted = fma(x, broadcast(1.44269504f), broadcast(0x1.8p23f)); // the sum rounds x / ln2 to an integer,
    const VecF n = shifted - 0x1.8p23f;                                        // held in the last bits of `shifted`
    const VecI power = (VecI)shifted - 0x4b400000;
    VecF r = fma(n, broadcast(-0.693359375f), x); // ln2 in two parts: n times the first, of few bits, is exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    VecF p = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.f;
    const VecI half = power >> 1; // in two steps: 2^power alone overflows and underflows earlier
    return p * (VecF)((half + 127) << 23) * (VecF)((power - half + 127) << 23);
}

} // namespace cats::CATS_ISA
