// Tensor checks and registration of the CPU operators. The schemas are defined in overloads.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "block.h"
#include "broadcast_add.h"
#include "gate.h"
#include "simd.h"
#include "squeeze.h"
#include "tensors.h"

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

// What one thread sums into.
struct Scratch {
  explicit Scratch(int64_t columns) : run(columns), total(columns) {}
  SqueezeScratch view() {
    return {run.data(), total.data()};
  }
  std::vector<float> run;
  std::vector<double> total;
};

// The map in the layout of `like`, whose operators read neighbours.
at::Tensor dense(const at::Tensor& x, const at::Tensor& like) {
  return x.contiguous(is_channels_last(like) ? at::MemoryFormat::ChannelsLast
                                             : at::MemoryFormat::Contiguous);
}

at::Tensor empty_like_map(const at::Tensor& x) {
  return at::empty(
      x.sizes(), x.options(),
      is_channels_last(x) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

std::tuple<at::Tensor, at::Tensor> squeeze(const at::Tensor& input, bool mean) {
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
                           to_column + (b * channels + c) * width, scratch.view(), mean);
        }
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kGrain / (height * width));
      at::parallel_for(0, batch * channels, grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(width);
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t b = plane / channels, c = plane % channels;
          squeeze_plane(from + b * x.stride(0) + c * x.stride(1), height, width, x.stride(2),
                        to_row + plane * height, to_column + plane * width, scratch.view(), mean);
        }
      });
    }
  });
  return {row, column};
}

std::tuple<at::Tensor, at::Tensor> axial_squeeze(const at::Tensor& x) {
  return squeeze(x, true);
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

// The result; where there is a gradient of it, that of v, and in NCHW the sums of that along its
// rows and columns, each plane's while it is in a cache.
at::Tensor broadcast_add_map(const at::Tensor* gradient, const at::Tensor& v, const at::Tensor& row,
                             const at::Tensor& column, int64_t activation, double slope,
                             at::Tensor* row_sums = nullptr, at::Tensor* column_sums = nullptr) {
  TORCH_CHECK(v.dim() == 4 && row.sizes() == v.sizes().slice(0, 3) && column.dim() == 3 &&
                  column.size(0) == v.size(0) && column.size(1) == v.size(1) &&
                  column.size(2) == v.size(3) && row.scalar_type() == v.scalar_type() &&
                  column.scalar_type() == v.scalar_type(),
              "broadcast_add: v, row and column must be (B, C, H, W), (B, C, H), (B, C, W) of one "
              "dtype, got ",
              v.sizes(), " ", v.scalar_type(), ", ", row.sizes(), " ", row.scalar_type(), ", ",
              column.sizes(), " ", column.scalar_type());
  TORCH_CHECK(
      !gradient || (gradient->sizes() == v.sizes() && gradient->scalar_type() == v.scalar_type()),
      "broadcast_add_backward: the gradient must be like v, ", v.sizes(), " ", v.scalar_type(),
      ", got ", gradient->sizes(), " ", gradient->scalar_type());
  TORCH_CHECK(0 <= activation && activation < kActivations, "broadcast_add: no activation ",
              activation);
  const bool channels_last = is_channels_last(v);
  const at::Tensor from = dense(v, v), of_gradient = gradient ? dense(*gradient, v) : at::Tensor();
  // Channels last: vectors of a pixel's channels beside those of the map.
  const at::Tensor rows = (channels_last ? row.transpose(1, 2) : row).contiguous();
  const at::Tensor columns = (channels_last ? column.transpose(1, 2) : column).contiguous();
  at::Tensor out = empty_like_map(v);
  const int64_t batch = v.size(0), channels = v.size(1), height = v.size(2), width = v.size(3);
  const auto act = static_cast<Activation>(activation);
  const float negative = static_cast<float>(slope);

  SEAATTN_DISPATCH(v.scalar_type(), "broadcast_add", [&] {
    const scalar_t* of_v = from.const_data_ptr<scalar_t>();
    const scalar_t* upstream = gradient ? of_gradient.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* of_row = rows.const_data_ptr<scalar_t>();
    const scalar_t* of_column = columns.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    scalar_t* to_row = row_sums ? row_sums->mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* to_column = column_sums ? column_sums->mutable_data_ptr<scalar_t>() : nullptr;
    // A task is a plane, or a line of pixels.
    const int64_t size = channels_last ? width * channels : height * width;
    const int64_t tasks = batch * (channels_last ? height : channels);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(to_row ? width : 0);
      for (int64_t task = begin; task < end; ++task) {
        const scalar_t* g = upstream ? upstream + task * size : nullptr;
        if (channels_last) {
          broadcast_add_pixels(g, of_v + task * size, of_row + task * channels,
                               of_column + task / height * size, width, channels, act, negative,
                               to + task * size);
          continue;
        }
        broadcast_add_plane(g, of_v + task * size, of_row + task * height, of_column + task * width,
                            height, width, act, negative, to + task * size);
        if (to_row) {
          squeeze_plane(to + task * size, height, width, width, to_row + task * height,
                        to_column + task * width, scratch.view(), false);
        }
      }
    });
  });
  return out;
}

at::Tensor broadcast_add(const at::Tensor& v, const at::Tensor& row, const at::Tensor& column,
                         int64_t activation, double slope) {
  return broadcast_add_map(nullptr, v, row, column, activation, slope);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> broadcast_add_backward(
    const at::Tensor& gradient, const at::Tensor& v, const at::Tensor& row,
    const at::Tensor& column, int64_t activation, double slope) {
  if (is_channels_last(v)) {
    at::Tensor dv = broadcast_add_map(&gradient, v, row, column, activation, slope);
    auto [row_sums, column_sums] = squeeze(dv, false);
    return {dv, row_sums, column_sums};
  }
  at::Tensor row_sums = at::empty(row.sizes(), row.options());
  at::Tensor column_sums = at::empty(column.sizes(), column.options());
  at::Tensor dv =
      broadcast_add_map(&gradient, v, row, column, activation, slope, &row_sums, &column_sums);
  return {dv, row_sums, column_sums};
}

void check_gate(const at::Tensor& x, const at::Tensor& y) {
  TORCH_CHECK(x.dim() == 4 && x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type(),
              "gate: all maps must be (B, C, H, W) of one shape and dtype, got ", x.sizes(), " ",
              x.scalar_type(), " and ", y.sizes(), " ", y.scalar_type());
}

// Calls body(begin, count) for runs of whole vectors, so that the last elements, which make none,
// are the same ones on any number of threads.
template <typename Body>
void for_runs(int64_t n, const Body& body) {
  constexpr int64_t kRun = 64;
  at::parallel_for(0, (n + kRun - 1) / kRun, kGrain / kRun, [&](int64_t begin, int64_t end) {
    body(begin * kRun, std::min(end * kRun, n) - begin * kRun);
  });
}

at::Tensor gate_map(const at::Tensor& x, const at::Tensor& y, bool hard) {
  check_gate(x, y);
  const at::Tensor of_x = dense(x, x), of_y = dense(y, x);
  at::Tensor out = empty_like_map(x);
  SEAATTN_DISPATCH(x.scalar_type(), "gate", [&] {
    const scalar_t* from_x = of_x.const_data_ptr<scalar_t>();
    const scalar_t* from_y = of_y.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_runs(x.numel(), [&](int64_t begin, int64_t count) {
      gate(from_x + begin, from_y + begin, count, hard, to + begin);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gate_map_backward(const at::Tensor& gradient,
                                                     const at::Tensor& x, const at::Tensor& y,
                                                     bool hard) {
  check_gate(x, y);
  check_gate(x, gradient);
  const at::Tensor upstream = dense(gradient, x), of_x = dense(x, x), of_y = dense(y, x);
  at::Tensor dx = empty_like_map(x), dy = empty_like_map(x);
  SEAATTN_DISPATCH(x.scalar_type(), "gate_backward", [&] {
    const scalar_t* from = upstream.const_data_ptr<scalar_t>();
    const scalar_t* from_x = of_x.const_data_ptr<scalar_t>();
    const scalar_t* from_y = of_y.const_data_ptr<scalar_t>();
    scalar_t* to_x = dx.mutable_data_ptr<scalar_t>();
    scalar_t* to_y = dy.mutable_data_ptr<scalar_t>();
    for_runs(x.numel(), [&](int64_t begin, int64_t count) {
      gate_backward(from + begin, from_x + begin, from_y + begin, count, hard, to_x + begin,
                    to_y + begin);
    });
  });
  return {dx, dy};
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
  TORCH_CHECK(0 <= activation && activation < kActivations, "sea_attention: no activation ",
              activation);
  const bool channels_last = is_channels_last(input);
  const at::Tensor x =
      channels_last || input.stride(3) == 1 || input.size(3) == 1 ? input : input.contiguous();
  const BlockSizes sizes = {x.size(1),
                            x.size(2),
                            x.size(3),
                            heads,
                            key_dim,
                            weights[6].size(2) / heads,
                            static_cast<Activation>(activation),
                            static_cast<float>(negative_slope),
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
  library.impl("broadcast_add.cpu", broadcast_add);
  library.impl("broadcast_add_backward.cpu", broadcast_add_backward);
  library.impl("gate.cpu", gate_map);
  library.impl("gate_backward.cpu", gate_map_backward);
  library.impl("sea_attention.cpu", sea_attention);
}

}  // namespace seaattn
