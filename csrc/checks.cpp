// The checks for Python (cats_ext/ops), which has names instead of torch's numbers, and no data while it traces.
#include "checks.h"

#include <iterator>
#include <string>

namespace cats {
namespace {

// What ctypes passes: an argument without its numbers, which follow from the names. An absent argument is left out.
struct NamedTensor {
    TensorArgument argument;
    const char *dtype, *device_type; // "float32", "cuda"
};

template <size_t n> int32_t number_of(std::string_view name, const char *const (&names)[n]) {
    const auto found = std::find(names, names + n, name);
    return found == names + n ? -1 : int32_t(found - names);
}

} // namespace

// formats: of gate, up and down, or of rows; null where the weights are dense. deviations: null where there are none.
// columns: of unpack_rows and packed_matmul; out_dtype: of unpack_rows. flag: relu_up or input_rows.
// The sentence of the check that fails, valid until the thread's next call, or null.
extern "C" __attribute__((visibility("default"))) const char *
cats_check(const char *op_name, const NamedTensor *tensors, int64_t count, const char *activation_name,
           int64_t activation_size, const char *const *formats, const double *deviations, bool flag, int64_t columns,
           const char *out_dtype) {
    const std::string_view op(op_name), activation(activation_name, activation_size);
    const auto argument = [&](const char *name) {
        TensorArgument found{name};
        for (const NamedTensor *t = tensors; t < tensors + count; t++)
            if (t->argument.name == std::string_view(name)) {
                found = t->argument;
                found.dtype = number_of(t->dtype, kDtypeNames);
                found.device_type = number_of(t->device_type, kDeviceNames);
            }
        return found;
    };
    const auto named = [](const char *format) {
        return format ? std::optional<std::string_view>(format) : std::nullopt;
    };
    try {
        const TensorArgument threshold = argument("threshold"), down_threshold = argument("down_threshold");
        if (op.substr(0, 10) == "sparse_mlp") {
            const bool by_columns = op.substr(10, 8) == "_columns";
            SparseMlpArguments arguments{argument("x"),         argument(by_columns ? "w_gate_t" : "w_gate"),
                                         argument("w_up"),      argument("w_down_t"),
                                         argument("counts"),    threshold,
                                         down_threshold,        activation,
                                         argument("gate_bias"), argument("up_bias"),
                                         argument("down_bias"), named(formats[0]),
                                         named(formats[1]),     named(formats[2])};
            if (by_columns) arguments.input_threshold = argument("input_threshold");
            if (op.substr(op.size() - 5) == "_step")
                check_sparse_mlp_step(arguments, argument("norm_weight"), argument("y_sum"));
            else check_sparse_mlp(arguments);
            if (const size_t end = op.rfind("_counted"); end != op.npos)
                check_present(std::string(op.substr(0, end)).c_str(), arguments.counts);
        } else if (op == "exact_mlp") {
            check_exact_mlp({argument("x"), argument("w_gate"), argument("w_up"), argument("w_down_t"), activation,
                             deviations ? std::optional<double>(*deviations) : std::nullopt, flag,
                             argument("gate_bias"), argument("up_bias"), argument("down_bias")});
        } else if (op == "activated_mlp") {
            check_activated_mlp({argument("v"), argument("w_down_t"), argument("down_bias"), argument("x"),
                                 argument("w_up"), argument("up_bias")});
        } else if (op == "unpack_rows") {
            check_unpack_rows(argument("rows"), named(formats[0]).value_or(""), columns,
                              number_of(out_dtype, kDtypeNames));
        } else if (op == "packed_matmul") {
            check_packed_matmul(argument("x"), argument("rows"), named(formats[0]).value_or(""), columns, flag,
                                argument("bias"));
        } else if (op == "packed_linear_step") {
            std::vector<TensorArgument> weights, biases;
            for (const char *name : kPartWeights)
                if (const TensorArgument t = argument(name); t.present()) weights.push_back(t);
            for (const char *name : kPartBiases)
                if (const TensorArgument t = argument(name); t.present()) biases.push_back(t);
            check_packed_linear({argument("x"), argument("delta"), argument("norm_weight"), weights,
                                 named(formats[0]).value_or(""), biases, argument("residual"), argument("largest"),
                                 argument("total"), argument("y"), argument("x_new")});
        } else {
            if (op == "gated_threshold_backward") check_present("gated_threshold", argument("grad_h"));
            if (op == "gated_threshold_counted") check_present("gated_threshold", argument("counts"));
            check_gated_threshold(argument("grad_h"), argument("gate"), argument("up"), argument("counts"), threshold,
                                  down_threshold, activation);
        }
    } catch (const std::runtime_error &error) {
        thread_local std::string sentence;
        sentence = error.what();
        return sentence.c_str();
    }
    return nullptr;
}

} // namespace cats
