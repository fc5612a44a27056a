// The block of backends "triton" and "cuda" on CUDA tensors: repeats launches that Python recorded.
//
// The first call of a kind runs in Python and brings back a plan: the handles of the kernels, and
// their arguments (kernels/launch.py). A call like it allocates the result and
// the workspace, and launches. The driver is the one that the process has loaded: nothing of CUDA
// is needed to build this.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/hash.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "../cpu/tensors.h"

namespace seaattn {
namespace {

// Functions of the CUDA driver, as cuda.h declares them: results are numbers, handles pointers.
struct Driver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                void** parameters, void** extra) = nullptr;
  int (*current_context)(void** context) = nullptr;
  int (*error_name)(int code, const char** name) = nullptr;
};

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

// The driver; null where there is none, as on AMD's GPUs, which are CUDA devices to torch.
const Driver* find_driver() {
  static const Driver driver = [] {
    Driver found;
    if (void* library = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY)) {
      find(library, "cuLaunchKernel", found.launch);
      find(library, "cuCtxGetCurrent", found.current_context);
      find(library, "cuGetErrorName", found.error_name);
    }
    return found;
  }();
  return driver.launch && driver.current_context && driver.error_name ? &driver : nullptr;
}

// A thread that has not used CUDA yet has no context. Python's launcher gives it one.
bool has_context(const Driver& driver) {
  void* context = nullptr;
  return driver.current_context(&context) == 0 && context != nullptr;
}

constexpr int64_t kMostParameters = 64;

struct Parameter {
  int64_t tensor;  // x, the weights, the result, the workspace; negative for a number
  int64_t value;   // bytes from where the tensor begins; or the number, in its low bytes
};

struct Launch {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared_bytes;
  std::vector<Parameter> parameters;
};

struct Plan {
  int64_t workspace_bytes;
  std::vector<Launch> launches;
};

// From the numbers of `plan` in kernels/launch.py.
std::shared_ptr<const Plan> read_plan(const std::vector<int64_t>& numbers, int64_t tensors) {
  size_t at = 0;
  const auto next = [&] { return numbers.at(at++); };
  auto plan = std::make_shared<Plan>();
  plan->workspace_bytes = next();
  while (at < numbers.size()) {
    Launch& launch = plan->launches.emplace_back();
    launch.function = reinterpret_cast<void*>(next());
    for (unsigned& size : launch.grid) size = static_cast<unsigned>(next());
    launch.threads = static_cast<unsigned>(next());
    launch.shared_bytes = static_cast<unsigned>(next());
    launch.parameters.resize(next());
    TORCH_CHECK(launch.parameters.size() <= kMostParameters, "sea_attention: a kernel with ",
                launch.parameters.size(), " parameters");
    for (Parameter& parameter : launch.parameters) {
      parameter.tensor = next();
      parameter.value = next();
      TORCH_CHECK(parameter.tensor < tensors, "sea_attention: no tensor ", parameter.tensor);
    }
  }
  return plan;
}

void replay(const Plan& plan, const Driver& driver, at::ArrayRef<char*> tensors, void* stream) {
  // The driver copies what the addresses point at. It reads the low bytes of a narrow number.
  std::array<int64_t, kMostParameters> values;
  std::array<void*, kMostParameters> addresses;
  for (const Launch& launch : plan.launches) {
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      const auto [tensor, value] = launch.parameters[i];
      values[i] = tensor < 0 ? value : reinterpret_cast<int64_t>(tensors[tensor] + value);
      addresses[i] = &values[i];
    }
    const auto [x, y, z] = launch.grid;
    const int code = driver.launch(launch.function, x, y, z, launch.threads, 1, 1,
                                   launch.shared_bytes, stream, addresses.data(), nullptr);
    if (code != 0) {
      const char* name = nullptr;
      driver.error_name(code, &name);
      TORCH_CHECK(false, "sea_attention: launch ", &launch - plan.launches.data() + 1, " of ",
                  plan.launches.size(), " (", x, " x ", y, " x ", z, " blocks of ", launch.threads,
                  " threads, ", launch.shared_bytes,
                  " bytes of shared memory) failed: ", name ? name : "unknown error", " (", code,
                  ")");
    }
  }
}

using Key = std::vector<int64_t>;

// What Triton takes a pointer for aligned by.
bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Everything that a plan depends on.
Key key_of(const at::Tensor& x, at::TensorList weights, int64_t heads, int64_t key_dim,
           int64_t activation, double negative_slope, bool hard) {
  Key key;
  key.reserve(128);
  c10::SmallVector<const void*, 16> data;
  const auto add = [&](const at::Tensor& tensor) {
    const at::Device device = tensor.device();
    // Where two are one tensor, a plan may name either.
    const auto first = std::find(data.begin(), data.end(), tensor.const_data_ptr()) - data.begin();
    data.push_back(tensor.const_data_ptr());
    key.insert(key.end(), {tensor.dim(), static_cast<int64_t>(tensor.scalar_type()),
                           static_cast<int64_t>(device.type()), device.index(),
                           aligned(data.back()), static_cast<int64_t>(first)});
    key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
    key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
  };
  add(x);
  for (const at::Tensor& weight : weights) add(weight);
  int64_t slope;
  std::memcpy(&slope, &negative_slope, sizeof slope);
  const auto precision = [](at::Float32Op op) {
    return static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, op));
  };
  key.insert(key.end(), {heads, key_dim, activation, slope, hard, precision(at::Float32Op::CONV),
                         precision(at::Float32Op::MATMUL)});
  return key;
}

// The plans of this process. Few maps are of many kinds: when it is full, it starts anew.
class Plans {
 public:
  std::shared_ptr<const Plan> find(const Key& key) {
    std::shared_lock lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }

  void keep(Key key, std::shared_ptr<const Plan> plan) {
    std::unique_lock lock(mutex_);
    if (plans_.size() >= kMostPlans) plans_.clear();
    plans_.insert_or_assign(std::move(key), std::move(plan));
  }

 private:
  static constexpr size_t kMostPlans = 1024;
  std::shared_mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Plan>, c10::hash<Key>> plans_;
};

using Planner = std::tuple<at::Tensor, std::vector<int64_t>>(const at::Tensor&, at::TensorList,
                                                             int64_t, int64_t, int64_t, double,
                                                             bool);

// The map with the pixels of an image evenly spaced, as the kernels take it.
at::Tensor even(const at::Tensor& x) {
  const bool is = x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.size(3) * x.stride(3);
  return is ? x : x.contiguous();
}

at::Tensor sea_attention(const char* backend, Plans& plans, const at::Tensor& input,
                         at::TensorList weights, int64_t heads, int64_t key_dim, int64_t activation,
                         double negative_slope, bool hard) {
  const c10::DeviceGuard guard(input.device());
  const at::Tensor x = even(input);
  const auto in_python = [&] {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow("seaattn_kernels::sea_attention_plan", backend)
        .typed<Planner>()
        .call(x, weights, heads, key_dim, activation, negative_slope, hard);
  };
  const Driver* driver = find_driver();
  if (!driver || !has_context(*driver)) return std::get<0>(in_python());
  Key key = key_of(x, weights, heads, key_dim, activation, negative_slope, hard);
  const std::shared_ptr<const Plan> plan = plans.find(key);
  if (!plan) {
    auto [out, numbers] = in_python();
    if (!numbers.empty()) {
      plans.keep(std::move(key), read_plan(numbers, static_cast<int64_t>(weights.size()) + 3));
    }
    return out;
  }
  at::Tensor out = at::empty(
      x.sizes(), x.options(),
      is_channels_last(x) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor workspace = at::empty({plan->workspace_bytes}, x.options().dtype(at::kByte));
  c10::SmallVector<char*, 16> tensors;
  const auto add = [&](const void* data) {
    tensors.push_back(static_cast<char*>(const_cast<void*>(data)));
  };
  add(x.const_data_ptr());
  for (const at::Tensor& weight : weights) add(weight.const_data_ptr());
  add(out.mutable_data_ptr());
  add(workspace.mutable_data_ptr());
  // Those of torch are; allocators can be plugged in.
  if (!aligned(out.const_data_ptr()) || !aligned(workspace.const_data_ptr())) {
    return std::get<0>(in_python());
  }
  void* stream = nullptr;
  if (x.is_cuda()) {
    const c10::impl::VirtualGuardImpl device(x.device().type());
    stream = device.getStreamNativeHandle(device.getStream(x.device()));
  }
  replay(*plan, *driver, tensors, stream);
  return out;
}

at::Tensor by_triton(const at::Tensor& x, at::TensorList weights, int64_t heads, int64_t key_dim,
                     int64_t activation, double negative_slope, bool hard) {
  static Plans plans;
  return sea_attention("triton", plans, x, weights, heads, key_dim, activation, negative_slope,
                       hard);
}

at::Tensor by_cuda(const at::Tensor& x, at::TensorList weights, int64_t heads, int64_t key_dim,
                   int64_t activation, double negative_slope, bool hard) {
  static Plans plans;
  return sea_attention("cuda", plans, x, weights, heads, key_dim, activation, negative_slope, hard);
}

}  // namespace

TORCH_LIBRARY_IMPL(seaattn_kernels, CUDA, library) {
  library.impl("sea_attention.triton", by_triton);
  library.impl("sea_attention.cuda", by_cuda);
}

// Without a GPU, under a stand-in for the driver: tests/test_launcher.py brings the schema.
TORCH_LIBRARY_IMPL(seaattn_kernels, CPU, library) {
  library.impl("sea_attention.launched", by_triton);
}

}  // namespace seaattn
