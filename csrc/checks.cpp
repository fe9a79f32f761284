// The checks for Python (cats_ext/ops), which has names instead of torch's numbers, and no data while it traces.
#include "checks.h"

#include <iterator>
#include <string>

namespace {

// What ctypes passes; an absent argument is left out.
struct NamedTensor {
    const char *name, *dtype, *device_type; // "w_up", "float32", "cuda"
    const int64_t *sizes, *strides;
    int64_t dim, device_index;
};

template <size_t n> int32_t number_of(std::string_view name, const char *const (&names)[n]) {
    const auto found = std::find(names, names + n, name);
    return found == names + n ? -1 : int32_t(found - names);
}

struct NamedTensors {
    const NamedTensor *tensors;
    int64_t count;

    cats::TensorArgument operator[](const char *name) const {
        for (const NamedTensor *t = tensors; t < tensors + count; t++)
            if (t->name == std::string_view(name))
                return {name,
                        nullptr,
                        t->sizes,
                        t->strides,
                        t->dim,
                        number_of(t->dtype, cats::kDtypeNames),
                        number_of(t->device_type, cats::kDeviceNames),
                        int32_t(t->device_index)};
        return {name, nullptr, nullptr, nullptr, -1, -1, -1, -1};
    }
};

} // namespace

// The sentence of the check that fails, valid until the thread's next call, or null.
extern "C" __attribute__((visibility("default"))) const char *
cats_check(const char *op_name, const NamedTensor *tensors, int64_t count, const char *activation) {
    const std::string_view op(op_name);
    const NamedTensors t{tensors, count};
    try {
        if (op.substr(0, 10) == "sparse_mlp") {
            const cats::SparseMlpArguments arguments{t["x"],         t["w_gate"],    t["w_up"],           t["w_down_t"],
                                                     t["counts"],    t["threshold"], t["down_threshold"], activation,
                                                     t["gate_bias"], t["up_bias"],   t["down_bias"]};
            if (op == "sparse_mlp_step") cats::check_sparse_mlp_step(arguments, t["norm_weight"], t["y_sum"]);
            else cats::check_sparse_mlp(arguments);
        } else {
            cats::check_gated_threshold(
                {t["grad_h"], t["gate"], t["up"], t["threshold"], t["down_threshold"], activation});
        }
    } catch (const std::runtime_error &error) {
        thread_local std::string sentence;
        sentence = error.what();
        return sentence.c_str();
    }
    return nullptr;
}
