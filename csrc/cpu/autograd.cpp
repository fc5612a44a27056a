// First derivatives of the CPU operators. In C++, because these operators take less time than the
// Python around a registered backward. The backward operators have theirs in Python
// (overloads.py): only a second derivative needs it.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "tensors.h"

namespace seaattn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The overload "cpu" of an operator, called through the dispatcher: tracers and fakes see it.
template <typename Signature>
class Operator;

template <typename Result, typename... Arguments>
class Operator<Result(Arguments...)> {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(name, "cpu")
                    .template typed<Result(Arguments...)>()) {}

  Result below_autograd(Arguments... arguments) const {
    at::AutoDispatchBelowADInplaceOrView guard;
    return handle_.call(std::forward<Arguments>(arguments)...);
  }

  // Recorded where a derivative of this derivative may be asked for, and without a detour through
  // Python where not.
  Result backward(Arguments... arguments) const {
    if (at::GradMode::is_enabled()) return handle_.call(std::forward<Arguments>(arguments)...);
    return below_autograd(std::forward<Arguments>(arguments)...);
  }

 private:
  c10::TypedOperatorHandle<Result(Arguments...)> handle_;
};

struct AxialSqueeze : torch::autograd::Function<AxialSqueeze> {
  static variable_list forward(AutogradContext* context, const Tensor& x) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&)> squeeze(
        "seaattn_kernels::axial_squeeze");
    context->saved_data["channels_last"] = is_channels_last(x);
    auto [row, column] = squeeze.below_autograd(x);
    return {row, column};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const Operator<Tensor(const Tensor&, const Tensor&, bool)> spread(
        "seaattn_kernels::axial_squeeze_backward");
    return {
        spread.backward(gradients[0], gradients[1], context->saved_data["channels_last"].toBool())};
  }
};

std::tuple<Tensor, Tensor> axial_squeeze(const Tensor& x) {
  variable_list out = AxialSqueeze::apply(x);
  return {out[0], out[1]};
}

struct BroadcastAdd : torch::autograd::Function<BroadcastAdd> {
  static Tensor forward(AutogradContext* context, const Tensor& v, const Tensor& row,
                        const Tensor& column, int64_t activation, double slope) {
    static const Operator<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, double)> add(
        "seaattn_kernels::broadcast_add");
    context->save_for_backward({v, row, column});
    context->saved_data["activation"] = activation;
    context->saved_data["slope"] = slope;
    return add.below_autograd(v, row, column, activation, slope);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double)>
        add_backward("seaattn_kernels::broadcast_add_backward");
    const variable_list saved = context->get_saved_variables();
    auto [v, row, column] = add_backward.backward(gradients[0], saved[0], saved[1], saved[2],
                                                  context->saved_data["activation"].toInt(),
                                                  context->saved_data["slope"].toDouble());
    return {v, row, column, Tensor(), Tensor()};
  }
};

Tensor broadcast_add(const Tensor& v, const Tensor& row, const Tensor& column, int64_t activation,
                     double slope) {
  return BroadcastAdd::apply(v, row, column, activation, slope);
}

struct Gate : torch::autograd::Function<Gate> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& y, bool hard) {
    static const Operator<Tensor(const Tensor&, const Tensor&, bool)> gate("seaattn_kernels::gate");
    context->save_for_backward({x, y});
    context->saved_data["hard"] = hard;
    return gate.below_autograd(x, y, hard);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                     bool)>
        gate_backward("seaattn_kernels::gate_backward");
    const variable_list saved = context->get_saved_variables();
    auto [x, y] = gate_backward.backward(gradients[0], saved[0], saved[1],
                                         context->saved_data["hard"].toBool());
    return {x, y, Tensor()};
  }
};

Tensor gate(const Tensor& x, const Tensor& y, bool hard) {
  return Gate::apply(x, y, hard);
}

struct AxialAttentionPair : torch::autograd::Function<AxialAttentionPair> {
  static variable_list forward(AutogradContext* context, const Tensor& row, const Tensor& column,
                               const Tensor& row_q, const Tensor& row_k, const Tensor& column_q,
                               const Tensor& column_k, int64_t heads, int64_t key_dim,
                               double scale) {
    static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, const Tensor&,
                                                     int64_t, int64_t, double)>
        attend("seaattn_kernels::axial_attention_pair");
    context->save_for_backward({row, column, row_q, row_k, column_q, column_k});
    context->saved_data["heads"] = heads;
    context->saved_data["key_dim"] = key_dim;
    context->saved_data["scale"] = scale;
    auto [of_row, of_column] =
        attend.below_autograd(row, column, row_q, row_k, column_q, column_k, heads, key_dim, scale);
    return {of_row, of_column};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const Tensor&, int64_t, int64_t, double)>
        attend_backward("seaattn_kernels::axial_attention_pair_backward");
    const variable_list saved = context->get_saved_variables();
    auto [row, column, row_q, row_k, column_q, column_k] = attend_backward.backward(
        gradients[0], gradients[1], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
        context->saved_data["heads"].toInt(), context->saved_data["key_dim"].toInt(),
        context->saved_data["scale"].toDouble());
    return {row, column, row_q, row_k, column_q, column_k, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> axial_attention_pair(const Tensor& row, const Tensor& column,
                                                const Tensor& row_q, const Tensor& row_k,
                                                const Tensor& column_q, const Tensor& column_k,
                                                int64_t heads, int64_t key_dim, double scale) {
  variable_list out = AxialAttentionPair::apply(row, column, row_q, row_k, column_q, column_k,
                                                heads, key_dim, scale);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(seaattn_kernels, AutogradCPU, library) {
  library.impl("axial_squeeze.cpu", axial_squeeze);
  library.impl("axial_attention_pair.cpu", axial_attention_pair);
  library.impl("broadcast_add.cpu", broadcast_add);
  library.impl("gate.cpu", gate);
}

}  // namespace seaattn
