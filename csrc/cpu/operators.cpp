// Tensor checks and registration of the CPU operators. The schemas are defined in ops.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "block.h"
#include "simd.h"
#include "squeeze.h"

#define SEAATTN_TEXT(x) #x
#define SEAATTN_EXPAND(x) SEAATTN_TEXT(x)

#ifdef _OPENMP
#define SEAATTN_THREADS "openmp"
#elif AT_PARALLEL_OPENMP
#define SEAATTN_THREADS "none"
#else
#define SEAATTN_THREADS "torch"
#endif

// Read by native.py from the file, before it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char seaattn_build[] =
    "seaattn_kernels build: torch=" TORCH_VERSION "; compiler=" __VERSION__
    "; c++=" SEAATTN_EXPAND(__cplusplus) "; simd=" SEAATTN_SIMD "; threads=" SEAATTN_THREADS
                                         "; backends=cpu";

namespace seaattn {
namespace {

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

#define SEAATTN_DISPATCH(dtype, name, ...)                                       \
  AT_DISPATCH_SWITCH(dtype, name,                                                \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// What one thread sums into.
struct Scratch {
  explicit Scratch(int64_t columns) : run(columns), total(columns) {}
  SqueezeScratch view() {
    return {run.data(), total.data()};
  }
  std::vector<float> run;
  std::vector<double> total;
};

bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

std::tuple<at::Tensor, at::Tensor> axial_squeeze(const at::Tensor& input) {
  TORCH_CHECK(input.dim() == 4, "axial_squeeze: x must be (B, C, H, W), got ", input.sizes());
  TORCH_CHECK(input.size(2) > 0 && input.size(3) > 0, "axial_squeeze: empty H or W in ",
              input.sizes());
  const bool channels_last = is_channels_last(input);
  // Rows of adjacent elements are read where they lie, however far apart the rows are.
  const at::Tensor x =
      channels_last || input.stride(3) == 1 || input.size(3) == 1 ? input : input.contiguous();
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  at::Tensor row = at::empty({batch, channels, height}, x.options());
  at::Tensor column = at::empty({batch, channels, width}, x.options());

  SEAATTN_DISPATCH(x.scalar_type(), "axial_squeeze", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to_row = row.mutable_data_ptr<scalar_t>();
    scalar_t* to_column = column.mutable_data_ptr<scalar_t>();
    if (channels_last) {
      const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
      const int64_t grain = std::max<int64_t>(1, kGrain / (height * width * kChannelBlock));
      at::parallel_for(0, batch * blocks, grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(width * std::min(kChannelBlock, channels));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / blocks, c = task % blocks * kChannelBlock;
          squeeze_channels(from + b * height * width * channels + c, height, width,
                           std::min(kChannelBlock, channels - c), channels,
                           to_row + (b * channels + c) * height,
                           to_column + (b * channels + c) * width, scratch.view());
        }
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kGrain / (height * width));
      at::parallel_for(0, batch * channels, grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(width);
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t b = plane / channels, c = plane % channels;
          squeeze_plane(from + b * x.stride(0) + c * x.stride(1), height, width, x.stride(2),
                        to_row + plane * height, to_column + plane * width, scratch.view());
        }
      });
    }
  });
  return {row, column};
}

at::Tensor axial_squeeze_backward(const at::Tensor& grad_row, const at::Tensor& grad_column,
                                  bool channels_last) {
  TORCH_CHECK(
      grad_row.dim() == 3 && grad_column.dim() == 3 && grad_row.size(0) == grad_column.size(0) &&
          grad_row.size(1) == grad_column.size(1) &&
          grad_row.scalar_type() == grad_column.scalar_type(),
      "axial_squeeze_backward: row and column must be (B, C, H) and (B, C, W) of one dtype, "
      "got ",
      grad_row.sizes(), " ", grad_row.scalar_type(), " and ", grad_column.sizes(), " ",
      grad_column.scalar_type());
  const int64_t batch = grad_row.size(0), channels = grad_row.size(1), height = grad_row.size(2),
                width = grad_column.size(2);
  at::Tensor grad =
      at::empty({batch, channels, height, width}, grad_row.options(),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  // Channels last: vectors of a pixel's channels beside those of the map.
  const at::Tensor row = (channels_last ? grad_row.transpose(1, 2) : grad_row).contiguous();
  const at::Tensor column =
      (channels_last ? grad_column.transpose(1, 2) : grad_column).contiguous();

  SEAATTN_DISPATCH(row.scalar_type(), "axial_squeeze_backward", [&] {
    const scalar_t* of_row = row.const_data_ptr<scalar_t>();
    const scalar_t* of_column = column.const_data_ptr<scalar_t>();
    scalar_t* to = grad.mutable_data_ptr<scalar_t>();
    if (channels_last) {
      const int64_t line = width * channels;
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, line));
      at::parallel_for(0, batch * height, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          spread_line(of_row + i * channels, of_column + i / height * line, height, width, channels,
                      to + i * line);
        }
      });
    } else {
      const int64_t plane_size = height * width;
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, plane_size));
      at::parallel_for(0, batch * channels, grain, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          spread_plane(of_row + plane * height, of_column + plane * width, height, width,
                       to + plane * plane_size);
        }
      });
    }
  });
  return grad;
}

template <typename T>
MapOf<T> map_of(T* data, const at::Tensor& x) {
  // The stride of an axis of one means nothing.
  return {data, x.stride(0), x.stride(1), x.stride(2), x.size(3) == 1 ? 1 : x.stride(3)};
}

// Numbers from a list of weights, with the sizes that they must have.
const float* weight_of(const at::Tensor& weight, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(weight.sizes() == sizes && weight.scalar_type() == at::kFloat &&
                  weight.device().is_cpu() && weight.is_contiguous(),
              "sea_attention: ", name, " must be contiguous float32 of ", sizes,
              " on the CPU, got ", weight.scalar_type(), " ", weight.sizes());
  return weight.const_data_ptr<float>();
}

at::Tensor sea_attention(const at::Tensor& input, at::TensorList weights, int64_t heads,
                         int64_t key_dim, int64_t activation, double negative_slope, bool hard) {
  TORCH_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0,
              "sea_attention: x must be (B, C, H, W) with C, H, W >= 1, got ", input.sizes());
  TORCH_CHECK(weights.size() == 11 && weights[6].dim() == 4,
              "sea_attention: weights must be the eleven of fold.PanelWeights");
  TORCH_CHECK(heads > 0 && key_dim > 0 && weights[6].size(2) % heads == 0,
              "sea_attention: heads and key_dim must be positive and divide the values, got ",
              heads, " and ", key_dim);
  TORCH_CHECK(0 <= activation && activation < 5, "sea_attention: no activation ", activation);
  const bool channels_last = is_channels_last(input);
  const at::Tensor x =
      channels_last || input.stride(3) == 1 || input.size(3) == 1 ? input : input.contiguous();
  const BlockSizes sizes = {x.size(1),  x.size(2),
                            x.size(3),  heads,
                            key_dim,    weights[6].size(2) / heads,
                            activation, static_cast<float>(negative_slope),
                            hard};
  const int64_t projected = sizes.panels(), values = sizes.value_panels(), lanes = kPanel;
  const int64_t channels = panels_of(sizes.channels);
  const BlockWeights folded = {
      weight_of(weights[0], {projected, sizes.channels, lanes}, "qkv_weight"),
      weight_of(weights[1], {projected * lanes}, "qkv_bias"),
      weight_of(weights[2], {projected, 9, lanes}, "dw_weight"),
      weight_of(weights[3], {projected * lanes}, "dw_bias"),
      weight_of(weights[4], {channels, projected * lanes, lanes}, "pw_weight"),
      weight_of(weights[5], {channels * lanes}, "pw_bias"),
      weight_of(weights[6], {2, values, sizes.values(), lanes}, "encode_weight"),
      weight_of(weights[7], {2, values * lanes}, "encode_bias"),
      weight_of(weights[8], {channels, sizes.values(), lanes}, "proj_weight"),
      weight_of(weights[9], {channels * lanes}, "proj_bias"),
      weight_of(weights[10], {2 * heads * key_dim, sizes.axis_length()}, "position")};
  at::Tensor out =
      at::empty(x.sizes(), x.options(),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (x.size(0) == 0) return out;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const at::Tensor scratch =
      at::empty({block_scratch(sizes, x.size(0), threads)}, x.options().dtype(at::kFloat));
  const Run run = [](int64_t count, const std::function<void(int64_t)>& task) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i);
    });
  };
  SEAATTN_DISPATCH(x.scalar_type(), "sea_attention", [&] {
    run_block(sizes, folded, x.size(0), map_of(x.const_data_ptr<scalar_t>(), x),
              map_of(out.mutable_data_ptr<scalar_t>(), out), threads, run,
              scratch.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(seaattn_kernels, CPU, library) {
  library.impl("axial_squeeze.cpu", axial_squeeze);
  library.impl("axial_squeeze_backward.cpu", axial_squeeze_backward);
  library.impl("sea_attention.cpu", sea_attention);
}

}  // namespace seaattn
