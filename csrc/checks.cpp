// The checks for Python (cats_ext/ops), which has names instead of torch's numbers, and no data while it traces.
#include "checks.h"

#include <iterator>
#include <string>

namespace {

// What ctypes passes: an argument without its numbers, which follow from the names. An absent argument is left out.
struct NamedTensor {
    cats::TensorArgument argument;
    const char *dtype, *device_type; // "float32", "cuda"
};

template <size_t n> int32_t number_of(std::string_view name, const char *const (&names)[n]) {
    const auto found = std::find(names, names + n, name);
    return found == names + n ? -1 : int32_t(found - names);
}

struct NamedTensors {
    const NamedTensor *tensors;
    int64_t count;

    cats::TensorArgument operator[](const char *name) const {
        cats::TensorArgument found{name};
        for (const NamedTensor *t = tensors; t < tensors + count; t++)
            if (t->argument.name == std::string_view(name)) {
                found = t->argument;
                found.dtype = number_of(t->dtype, cats::kDtypeNames);
                found.device_type = number_of(t->device_type, cats::kDeviceNames);
            }
        return found;
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
            cats::check_gated_threshold(t["grad_h"], t["gate"], t["up"], t["threshold"], t["down_threshold"],
                                        activation);
        }
    } catch (const std::runtime_error &error) {
        thread_local std::string sentence;
        sentence = error.what();
        return sentence.c_str();
    }
    return nullptr;
}
