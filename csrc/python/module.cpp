// The Python module of the library: what a call of a block asks before it runs, without Python.
//
//     Watch(types, tables, attributes, tensors).current()
//         whether objects are as they were: watch.py, where its slower twin says what each is
//     Calls(most).keep(x, backend, overload, weights, numbers)
//     Calls(most).repeat(x, backend)
//         the block by the overload and the weights that were settled for such a map, or None

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <string>
#include <vector>

namespace seaattn {
namespace {

// --- Watch -----------------------------------------------------------------------------------

// Owns its four arguments, sequences whose members are borrowed from them.
struct Watch {
  PyObject_HEAD PyObject* watched;  // a tuple of tuples; null once the collector has taken it
  std::vector<int64_t>* versions;
};

const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

bool are_rows(PyObject* rows, Py_ssize_t columns) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rows); ++i) {
    PyObject* row = PyTuple_GET_ITEM(rows, i);
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != columns) return false;
  }
  return true;
}

PyObject* new_watch(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *types, *tables, *attributes, *tensors;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!", &PyTuple_Type, &types, &PyTuple_Type, &tables,
                        &PyTuple_Type, &attributes, &PyTuple_Type, &tensors))
    return nullptr;
  TORCH_CHECK_TYPE(are_rows(types, 2), "types: an object and its type each");
  TORCH_CHECK_TYPE(are_rows(tables, 2), "tables: a dictionary and its values each");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tables); ++i) {
    PyObject* row = PyTuple_GET_ITEM(tables, i);
    TORCH_CHECK_TYPE(PyDict_Check(PyTuple_GET_ITEM(row, 0)), "tables: not a dictionary");
    TORCH_CHECK_TYPE(PyTuple_Check(PyTuple_GET_ITEM(row, 1)), "tables: values are a tuple");
  }
  TORCH_CHECK_TYPE(are_rows(attributes, 3), "attributes: an owner, a name and the value each");
  auto versions = std::make_unique<std::vector<int64_t>>();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    const at::Tensor* tensor = tensor_of(PyTuple_GET_ITEM(tensors, i));
    TORCH_CHECK_TYPE(tensor, "tensors: not a tensor");
    versions->push_back(tensor->_version());
  }
  PyObject* watched = PyTuple_Pack(4, types, tables, attributes, tensors);
  if (!watched) return nullptr;
  auto* self = reinterpret_cast<Watch*>(type->tp_alloc(type, 0));
  if (!self) {
    Py_DECREF(watched);
    return nullptr;
  }
  self->watched = watched;
  self->versions = versions.release();
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

bool has_values(PyObject* table, PyObject* values) {
  const Py_ssize_t count = PyTuple_GET_SIZE(values);
  if (PyDict_GET_SIZE(table) != count) return false;
  Py_ssize_t position = 0;
  PyObject* value;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!PyDict_Next(table, &position, nullptr, &value)) return false;
    if (value != PyTuple_GET_ITEM(values, i)) return false;
  }
  return true;
}

// 1, 0, or -1 with an exception.
int has_attribute(PyObject* owner, PyObject* name, PyObject* expected) {
  if (PyDict_Check(owner)) {
    PyObject* value = PyDict_GetItemWithError(owner, name);
    if (!value && PyErr_Occurred()) return -1;
    return (value ? value : Py_None) == expected;
  }
  PyObject* value = PyObject_GetAttr(owner, name);
  if (!value) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return expected == Py_None;
  }
  Py_DECREF(value);  // its owner has another one
  return value == expected;
}

int is_current(const Watch& self) {
  if (!self.watched) return 0;
  const auto rows = [&](Py_ssize_t kind) { return PyTuple_GET_ITEM(self.watched, kind); };
  PyObject* types = rows(0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
    PyObject* row = PyTuple_GET_ITEM(types, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(row, 0))) != PyTuple_GET_ITEM(row, 1))
      return 0;
  }
  PyObject* tables = rows(1);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tables); ++i) {
    PyObject* row = PyTuple_GET_ITEM(tables, i);
    if (!has_values(PyTuple_GET_ITEM(row, 0), PyTuple_GET_ITEM(row, 1))) return 0;
  }
  PyObject* attributes = rows(2);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(attributes); ++i) {
    PyObject* row = PyTuple_GET_ITEM(attributes, i);
    const int same =
        has_attribute(PyTuple_GET_ITEM(row, 0), PyTuple_GET_ITEM(row, 1), PyTuple_GET_ITEM(row, 2));
    if (same != 1) return same;
  }
  PyObject* tensors = rows(3);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i)
    if (THPVariable_Unpack(PyTuple_GET_ITEM(tensors, i))._version() != (*self.versions)[i])
      return 0;
  return 1;
}

PyObject* watch_current(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  const int current = is_current(*reinterpret_cast<Watch*>(self));
  return current < 0 ? nullptr : PyBool_FromLong(current);
  END_HANDLE_TH_ERRORS
}

int traverse_watch(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<Watch*>(self)->watched);
  return 0;
}

int clear_watch(PyObject* self) {
  Py_CLEAR(reinterpret_cast<Watch*>(self)->watched);
  return 0;
}

void free_watch(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear_watch(self);
  delete reinterpret_cast<Watch*>(self)->versions;
  type->tp_free(self);
  Py_DECREF(type);
}

// --- Calls -----------------------------------------------------------------------------------

using Block = at::Tensor(const at::Tensor&, at::TensorList, int64_t, int64_t, int64_t, double,
                         bool);

// What is settled for a map, and by what it goes.
struct Call {
  c10::DimVector sizes;
  at::ScalarType dtype;
  at::Device device;
  std::string backend;
  at::Float32Precision convolutions;  // "auto" looks at it
  c10::TypedOperatorHandle<Block> overload;
  std::vector<at::Tensor> weights;
  int64_t heads, key_dim, activation;
  double negative_slope;
  bool hard;
};

struct Calls {
  PyObject_HEAD std::vector<std::shared_ptr<const Call>>* calls;  // the last one asked for first
  Py_ssize_t most;
};

at::Float32Precision convolution_precision() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV);
}

// Where a call depends on a map and its block alone: on no mode, no transform, no autocast.
bool is_plain(PyObject* object, const at::Tensor& x) {
  using c10::impl::tls_is_dispatch_key_included;
  const at::DeviceType type = x.device().type();
  return THPVariable_CheckExact(object) && !(x.requires_grad() && at::GradMode::is_enabled()) &&
         (type == at::kCPU || type == at::kCUDA) && !at::autocast::is_autocast_enabled(type) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::impl::torch_function_mode_enabled() && !at::tracer::impl::is_dispatch_enabled() &&
         !tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool is_like(const Call& call, const at::Tensor& x, const char* backend) {
  return x.sizes() == at::IntArrayRef(call.sizes) && x.scalar_type() == call.dtype &&
         x.device() == call.device && call.backend == backend &&
         call.convolutions == convolution_precision();
}

PyObject* new_calls(PyTypeObject* type, PyObject* arguments, PyObject*) {
  Py_ssize_t most;
  if (!PyArg_ParseTuple(arguments, "n", &most)) return nullptr;
  auto* self = reinterpret_cast<Calls*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->calls = new std::vector<std::shared_ptr<const Call>>;
  self->most = most;
  return reinterpret_cast<PyObject*>(self);
}

PyObject* keep_call(PyObject* self, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *object, *weights;
  const char *backend, *overload;
  long long heads, key_dim, activation;
  double negative_slope;
  int hard;
  if (!PyArg_ParseTuple(arguments, "OssO!(LLLdp)", &object, &backend, &overload, &PyTuple_Type,
                        &weights, &heads, &key_dim, &activation, &negative_slope, &hard))
    return nullptr;
  const at::Tensor* x = tensor_of(object);
  TORCH_CHECK_TYPE(x, "x is not a tensor");
  if (!is_plain(object, *x)) Py_RETURN_NONE;
  auto call =
      std::make_shared<Call>(Call{c10::DimVector(x->sizes()),
                                  x->scalar_type(),
                                  x->device(),
                                  backend,
                                  convolution_precision(),
                                  c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("seaattn_kernels::sea_attention", overload)
                                      .typed<Block>(),
                                  {},
                                  heads,
                                  key_dim,
                                  activation,
                                  negative_slope,
                                  hard != 0});
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(weights); ++i) {
    const at::Tensor* weight = tensor_of(PyTuple_GET_ITEM(weights, i));
    TORCH_CHECK_TYPE(weight, "a weight is not a tensor");
    call->weights.push_back(*weight);
  }
  auto& [base, calls, most] = *reinterpret_cast<Calls*>(self);
  calls->insert(calls->begin(), std::move(call));
  if (static_cast<Py_ssize_t>(calls->size()) > most) calls->resize(most);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* repeat_call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "repeat takes a map and a backend");
  const at::Tensor* x = tensor_of(arguments[0]);
  if (!x || !is_plain(arguments[0], *x)) Py_RETURN_NONE;
  const char* backend = PyUnicode_AsUTF8(arguments[1]);
  if (!backend) return nullptr;
  auto& calls = *reinterpret_cast<Calls*>(self)->calls;
  const auto found = std::find_if(calls.begin(), calls.end(),
                                  [&](const auto& call) { return is_like(*call, *x, backend); });
  if (found == calls.end()) Py_RETURN_NONE;
  std::rotate(calls.begin(), found, found + 1);
  const std::shared_ptr<const Call> call = calls.front();  // another thread may drop it meanwhile
  at::Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    out = call->overload.call(*x, call->weights, call->heads, call->key_dim, call->activation,
                              call->negative_slope, call->hard);
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

// A copy starts empty.
PyObject* reduce_calls(PyObject* self, PyObject*) {
  return Py_BuildValue("(O(n))", Py_TYPE(self), reinterpret_cast<Calls*>(self)->most);
}

Py_ssize_t count_calls(PyObject* self) {
  return reinterpret_cast<Calls*>(self)->calls->size();
}

void free_calls(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Calls*>(self)->calls;
  type->tp_free(self);
  Py_DECREF(type);
}

// --- the module ------------------------------------------------------------------------------

template <typename Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

PyMethodDef watch_methods[] = {{"current", watch_current, METH_NOARGS, nullptr}, {}};
PyType_Slot watch_slots[] = {
    {Py_tp_new, slot(new_watch)},     {Py_tp_traverse, slot(traverse_watch)},
    {Py_tp_clear, slot(clear_watch)}, {Py_tp_dealloc, slot(free_watch)},
    {Py_tp_methods, watch_methods},   {}};
PyType_Spec watch_spec = {"seaattn_kernels._C.Watch", sizeof(Watch), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, watch_slots};

PyMethodDef calls_methods[] = {
    {"keep", keep_call, METH_VARARGS, nullptr},
    {"repeat", reinterpret_cast<PyCFunction>(slot(repeat_call)), METH_FASTCALL, nullptr},
    {"__reduce__", reduce_calls, METH_NOARGS, nullptr},
    {}};
PyType_Slot calls_slots[] = {{Py_tp_new, slot(new_calls)},
                             {Py_tp_dealloc, slot(free_calls)},
                             {Py_tp_methods, calls_methods},
                             {Py_sq_length, slot(count_calls)},
                             {}};
PyType_Spec calls_spec = {"seaattn_kernels._C.Calls", sizeof(Calls), 0, Py_TPFLAGS_DEFAULT,
                          calls_slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "seaattn_kernels._C", nullptr, -1, nullptr};

}  // namespace
}  // namespace seaattn

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&seaattn::definition);
  if (!module) return nullptr;
  PyObject* watch = PyType_FromSpec(&seaattn::watch_spec);
  PyObject* calls = PyType_FromSpec(&seaattn::calls_spec);
  if (!watch || !calls || PyModule_AddObject(module, "Watch", watch) < 0 ||
      PyModule_AddObject(module, "Calls", calls) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
