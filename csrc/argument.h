// One argument of an op: its description as plain data, the checks that ops have in common, and how values appear in
// their sentences. No torch here.
//
// A failed check throws std::runtime_error with a sentence that names the argument and the value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "sparse_mlp.h"

namespace cats {

// Names in Python, by the numbers of c10::ScalarType and c10::DeviceType, which are part of torch's stable ABI.
// clang-format off
constexpr const char *kDtypeNames[] = {
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64", "complex128",
    "bool", "qint8", "quint8", "qint32", "bfloat16", "quint4x2", "quint2x4", "bits1x8", "bits2x4", "bits4x2", "bits8",
    "bits16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "uint16", "uint32", "uint64",
    "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "int1", "int2", "int3", "int4", "int5", "int6",
    "int7", "float8_e8m0fnu", "float4_e2m1fn_x2"};
constexpr const char *kDeviceNames[] = {
    "cpu", "cuda", "mkldnn", "opengl", "opencl", "ideep", "hip", "fpga", "maia", "xla", "vulkan", "metal", "xpu", "mps",
    "meta", "hpu", "ve", "lazy", "ipu", "mtia", "privateuseone"};
// clang-format on
constexpr int32_t kCpu = 0;                                                                  // index of kDeviceNames
enum : int32_t { kUInt8 = 0, kInt64 = 4, kHalf = 5, kFloat = 6, kDouble = 7, kBFloat = 15 }; // indices of kDtypeNames

// A tensor argument of an op. _NamedTensor of cats_ext/ops/checks.py begins with these members.
struct TensorArgument {
    const char *name;
    const void *data;                         // null where only the checks are wanted
    const int64_t *sizes, *strides;           // in elements
    int64_t dim = -1;                         // -1: absent; None in Python
    int32_t dtype, device_type, device_index; // index -1: of the CPU
    int32_t freed = 0;                        // it has elements, and its storage has 0 bytes, as FSDP leaves it

    bool present() const { return dim >= 0; }
    int64_t last_size() const { return sizes[dim - 1]; }
    int64_t numel() const {
        int64_t product = 1;
        for (int64_t d = 0; d < dim; d++) product *= sizes[d];
        return product;
    }
    bool on_same_device(const TensorArgument &t) const {
        return device_type == t.device_type && device_index == t.device_index;
    }
};

// --- how values appear in the sentences ------------------------------------------------------------------------------

inline std::string list(const int64_t *values, int64_t size) {
    std::string out = "[";
    for (int64_t i = 0; i < size; i++) out += (i ? ", " : "") + std::to_string(values[i]);
    return out + "]";
}

template <size_t n> std::string name_of(int32_t number, const char *const (&names)[n], const char *otherwise) {
    return number >= 0 && number < int32_t(n) ? names[number] : otherwise;
}

inline std::string shape(const TensorArgument &t) { return list(t.sizes, t.dim); }
inline std::string strides(const TensorArgument &t) { return list(t.strides, t.dim); }
inline std::string dtype(const TensorArgument &t) { return "torch." + name_of(t.dtype, kDtypeNames, "(unknown)"); }
inline std::string device(const TensorArgument &t) {
    const bool numbered = t.device_type != 0 && t.device_index >= 0;
    return name_of(t.device_type, kDeviceNames, "unknown device") +
           (numbered ? ":" + std::to_string(t.device_index) : "");
}

template <class... Parts> [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts &...parts) {
    std::ostringstream out;
    (out << ... << parts);
    throw std::runtime_error(out.str());
}

// A macro, so that the parts of the sentence are made only if it is needed: decoding is bound by the host.
#define CATS_REQUIRE(condition, ...)                                                                                   \
    do {                                                                                                               \
        if (!(condition)) fail(__VA_ARGS__);                                                                           \
    } while (0)

// --- checks of one argument ------------------------------------------------------------------------------------------

// Torch takes None for any tensor.
inline void check_present(const char *op, const TensorArgument &t) {
    CATS_REQUIRE(t.present(), op, ": ", t.name, " must be a tensor, got None");
    CATS_REQUIRE(!t.freed, op, ": ", t.name, " must have memory, its storage has 0 bytes");
}

// allow_squared: the caller takes relu2, too, which is not computed by all kernels.
inline Activation check_activation(const char *op, std::string_view name, bool allow_squared = false) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    std::string shown(name);
    std::replace(shown.begin(), shown.end(), '\0', '?'); // where the sentence would end
    fail(op, ": activation must be one of silu, gelu, gelu_tanh, relu", allow_squared ? ", relu2" : "", ", got '",
         shown, "'");
}

// number: an index of kDtypeNames, of what the argument `name` is or has.
inline DType check_dtype(const char *op, const char *name, int32_t number, bool allow_double) {
    if (number == kFloat) return DType::kFloat32;
    if (number == kHalf) return DType::kFloat16;
    if (number == kBFloat) return DType::kBFloat16;
    if (number == kDouble && allow_double) return DType::kFloat64;
    const char *dtypes = allow_double ? "float32, float16, bfloat16 or float64" : "float32, float16 or bfloat16";
    fail(op, ": ", name, " must be ", dtypes, ", got torch.", name_of(number, kDtypeNames, "(unknown)"));
}

inline DType check_dtype(const char *op, const TensorArgument &t, bool allow_double) {
    check_present(op, t);
    return check_dtype(op, t.name, t.dtype, allow_double);
}

// Same dtype and device as `like`.
inline void check_like(const char *op, const TensorArgument &t, const TensorArgument &like) {
    check_present(op, t);
    CATS_REQUIRE(t.dtype == like.dtype, op, ": ", t.name, " must have ", like.name, "'s dtype ", dtype(like), ", got ",
                 dtype(t));
    CATS_REQUIRE(t.on_same_device(like), op, ": ", t.name, " must be on ", like.name, "'s device ", device(like),
                 ", got ", device(t));
}

inline void check_same_shape(const char *op, const TensorArgument &t, const TensorArgument &like) {
    check_like(op, t, like);
    CATS_REQUIRE(std::equal(t.sizes, t.sizes + t.dim, like.sizes, like.sizes + like.dim), op, ": ", t.name,
                 " must have ", like.name, "'s shape ", shape(like), ", got ", shape(t));
}

// What the counted ops add to, beside their first argument.
inline void check_counts(const char *op, const TensorArgument &counts, const TensorArgument &like,
                         int size = kNumCounts) {
    if (!counts.present()) return;
    check_present(op, counts);
    CATS_REQUIRE(counts.dtype == kInt64 && counts.dim == 1 && counts.sizes[0] == size && counts.strides[0] == 1 &&
                     counts.on_same_device(like),
                 op, ": counts must be contiguous int64 of shape [", size, "] on ", device(like), ", got ",
                 dtype(counts), " of shape ", shape(counts), " on ", device(counts));
}

inline bool is_contiguous(const TensorArgument &t) {
    int64_t expected = 1;
    for (int64_t d = t.dim - 1; d >= 0; expected *= t.sizes[d], d--)
        if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    return true;
}

// Row stride of [..., I] if its last dimension has unit stride and the leading ones collapse to one; else -1.
inline int64_t collapsed_row_stride(const TensorArgument &t) {
    const int64_t last = t.dim - 1;
    if (t.sizes[last] > 1 && t.strides[last] != 1) return -1;
    int64_t row_stride = t.sizes[last], expected = -1;
    for (int64_t d = last - 1; d >= 0; d--) {
        if (t.sizes[d] == 1) continue;
        if (expected < 0) row_stride = t.strides[d];
        else if (t.strides[d] != expected) return -1;
        expected = t.strides[d] * t.sizes[d];
    }
    return row_stride;
}

// The checks below return what the kernels' parameters need: the data, and the stride through a pointer.

inline const void *check_weight(const char *op, const TensorArgument &w, const TensorArgument &x, int64_t rows,
                                int64_t columns, int64_t *stride) {
    check_like(op, w, x);
    CATS_REQUIRE(w.dim == 2 && w.sizes[0] == rows && w.sizes[1] == columns, op, ": ", w.name, " must have shape [",
                 rows, ", ", columns, "], got ", shape(w));
    CATS_REQUIRE(columns == 1 || w.strides[1] == 1, op, ": ", w.name,
                 " must have unit stride in its last dimension, got strides ", strides(w),
                 std::string_view(w.name) == "w_down_t" ? "; lay down_proj.weight out with one contiguous row a neuron"
                                                        : "");
    *stride = w.strides[0];
    return w.data;
}

// Packed rows. They must start at multiples of 16 bytes, as all kernels read them so.
inline const void *check_packed_weight(const char *op, const TensorArgument &w, const TensorArgument &x, int64_t rows,
                                       int64_t columns, const char *format_name, std::string_view name,
                                       RowFormat *format, int64_t *stride) {
    CATS_REQUIRE(parse_row_format(name, format), op, ": ", format_name, " must be one of ", kRowFormatNames, ", got '",
                 name, "'");
    check_present(op, w);
    CATS_REQUIRE(w.dtype == kUInt8, op, ": ", w.name, " must be torch.uint8, got ", dtype(w));
    CATS_REQUIRE(w.on_same_device(x), op, ": ", w.name, " must be on ", x.name, "'s device ", device(x), ", got ",
                 device(w));
    const int64_t bytes = format->row_bytes(columns);
    CATS_REQUIRE(w.dim == 2 && w.sizes[0] == rows && w.sizes[1] == bytes, op, ": ", w.name, " must have shape [", rows,
                 ", ", bytes, "], the bytes of rows of ", columns, " columns in ", name, ", got ", shape(w));
    CATS_REQUIRE(w.strides[1] == 1 && w.strides[0] % 16 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0, op, ": ",
                 w.name, " must have rows that start at multiples of 16 bytes and unit stride in its last dimension, ",
                 "got strides ", strides(w));
    *stride = w.strides[0];
    return w.data;
}

// Optional. A vector must be contiguous: biases are small, and the caller owns their layout.
inline const void *check_vector(const char *op, const TensorArgument &t, const TensorArgument &like, int64_t size) {
    if (!t.present()) return nullptr;
    check_like(op, t, like);
    CATS_REQUIRE(t.dim == 1 && t.sizes[0] == size, op, ": ", t.name, " must have shape [", size, "], got ", shape(t));
    CATS_REQUIRE(size == 1 || t.strides[0] == 1, op, ": ", t.name, " must be contiguous, got stride ", t.strides[0]);
    return t.data;
}

// An absent threshold is null; the first one must be there. intermediate_size 0: one value only.
inline const float *check_threshold(const char *op, const TensorArgument &t, const TensorArgument &like,
                                    int64_t intermediate_size, int64_t *stride) {
    if (!t.present()) return nullptr;
    check_present(op, t);
    CATS_REQUIRE(t.dtype == kFloat, op, ": ", t.name, " must be float32, got ", dtype(t));
    CATS_REQUIRE(t.on_same_device(like), op, ": ", t.name, " must be on the device ", device(like),
                 " of the other arguments, got ", device(t));
    const bool one_each = intermediate_size && t.dim == 1 && t.sizes[0] == intermediate_size;
    CATS_REQUIRE(t.dim == 0 || one_each, op, ": ", t.name, " must have shape []",
                 intermediate_size ? " or [" + std::to_string(intermediate_size) + "]" : std::string(), ", got ",
                 shape(t));
    *stride = t.dim == 0 ? 0 : t.strides[0];
    return static_cast<const float *>(t.data);
}

} // namespace cats
