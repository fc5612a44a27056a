// Tensor checks and registration of the training operators that read a map whose BatchNorm is
// pending (seaattn_kernels/normalized.py). The schemas are defined in overloads.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "depthwise.h"
#include "maps.h"
#include "normalize.h"
#include "squeeze.h"
#include "tensors.h"

namespace seaattn {
namespace {

// Means, or sums, of float32 along the rows and columns of a map less what is given a channel.
template <typename T>
void squeeze_map(const Map& map, float* row, float* column, bool mean,
                 const float* offset = nullptr) {
  const int64_t channels = map.channels(), height = map.height(), width = map.width();
  const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t block = std::min(kChannelBlock, channels);
  const int64_t tasks = map.batch() * (map.pixels ? blocks : channels);
  const int64_t size = height * width * (map.pixels ? block : 1);
  at::parallel_for(0, tasks, grain(size), [&](int64_t begin, int64_t end) {
    const int64_t numbers = map.pixels ? width * block : width;
    std::vector<float> run(numbers);
    std::vector<double> total(numbers);
    const SqueezeScratch scratch = {run.data(), total.data()};
    for (int64_t task = begin; task < end; ++task) {
      if (map.pixels) {
        const int64_t b = task / blocks, c = task % blocks * kChannelBlock, at = b * channels + c;
        squeeze_channels(map.from<T>(b * height * width).data + c, height, width,
                         std::min(kChannelBlock, channels - c), map.step, row + at * height,
                         column + at * width, scratch, mean, offset ? offset + c : nullptr);
      } else {
        squeeze_plane(map.plane<T>(task / channels, task % channels).data, height, width, width,
                      row + task * height, column + task * width, scratch, mean,
                      offset ? offset[task % channels] : 0.0f);
      }
    }
  });
}

// The mean and the sum of squared deviations of each channel of an NHWC map.
template <typename T>
void moments_of_map(const Map& map, float* mean, float* deviations) {
  const int64_t channels = map.channels(), pixels = map.batch() * map.height() * map.width();
  const int64_t tasks = (pixels + kPixels - 1) / kPixels;
  std::vector<float> means(tasks * channels), squares(tasks * channels);
  at::parallel_for(0, tasks, grain(kPixels * channels), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kPixels;
      moments_of_pixels(lines_of_pixels(map, std::min(kPixels, pixels - first)), map.from<T>(first),
                        means.data() + task * channels, squares.data() + task * channels);
    }
  });
  // Chan, Golub and LeVeque (1979).
  std::vector<double> of_mean(channels), of_squares(channels);
  for (int64_t task = 0; task < tasks; ++task) {
    const double before = static_cast<double>(task * kPixels);
    const double count = static_cast<double>(std::min(kPixels, pixels - task * kPixels));
    const double share = count / (before + count);
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = means[task * channels + c] - of_mean[c];
      of_mean[c] += difference * share;
      of_squares[c] += squares[task * channels + c] + difference * difference * before * share;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(of_mean[c]);
    deviations[c] = static_cast<float>(of_squares[c]);
  }
}

// Those of an NCHW map.
template <typename T>
void moments_of_planes(const Map& map, float* mean, float* deviations) {
  const int64_t batch = map.batch(), size = map.height() * map.width();
  each_group(map, [&](int64_t first, int64_t last) {
    double totals[kGroup] = {};
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = first; c < last; ++c) {
        totals[c - first] += sum_of_line(map.plane<T>(b, c).data, size);
      }
    }
    for (int64_t c = first; c < last; ++c) {
      mean[c] = static_cast<float>(totals[c - first] / (batch * size));
      totals[c - first] = 0.0;
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = first; c < last; ++c) {
        totals[c - first] += deviations_of_line(map.plane<T>(b, c).data, size, mean[c]);
      }
    }
    for (int64_t c = first; c < last; ++c) deviations[c] = static_cast<float>(totals[c - first]);
  });
}

std::tuple<Tensor, Tensor> moments(const Tensor& y) {
  check_map("moments", y);
  const Map map(y, follows_pixels(y));
  const auto options = y.options().dtype(at::kFloat);
  Tensor mean = at::zeros({y.size(1)}, options), deviations = at::zeros({y.size(1)}, options);
  if (y.numel() == 0) return {mean, deviations};
  float* to_mean = mean.mutable_data_ptr<float>();
  float* to_deviations = deviations.mutable_data_ptr<float>();
  SEAATTN_DISPATCH(y.scalar_type(), "moments", [&] {
    if (map.pixels) {
      moments_of_map<scalar_t>(map, to_mean, to_deviations);
    } else {
      moments_of_planes<scalar_t>(map, to_mean, to_deviations);
    }
  });
  return {mean, deviations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> axial_moments(const Tensor& y) {
  auto [mean, deviations] = moments(y);
  const auto options = y.options().dtype(at::kFloat);
  Tensor row = at::empty({y.size(0), y.size(1), y.size(2)}, options);
  Tensor column = at::empty({y.size(0), y.size(1), y.size(3)}, options);
  SEAATTN_DISPATCH(y.scalar_type(), "axial_moments", [&] {
    squeeze_map<scalar_t>(Map(y, follows_pixels(y)), row.mutable_data_ptr<float>(),
                          column.mutable_data_ptr<float>(), true, mean.const_data_ptr<float>());
  });
  return {mean, deviations, row, column};
}

// (C,) or so many of them, in float32.
const float* statistics(const char* name, const Tensor& x, at::IntArrayRef sizes, Tensor& kept) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == at::kFloat, name, ": expected float32 of ",
              sizes, ", got ", x.scalar_type(), " ", x.sizes());
  kept = x.contiguous();
  return kept.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> normalize_affine(const Tensor& mean, const Tensor& deviations,
                                                    const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, int64_t count,
                                                    double eps) {
  const int64_t channels = mean.numel();
  const auto given = [&](const Tensor& x, Tensor& kept) {
    return statistics("normalize_affine", x, {channels}, kept);
  };
  Tensor kept[4];
  const float* of_mean = given(mean, kept[0]);
  const float* squares = given(deviations, kept[1]);
  const float* gamma = weight.has_value() ? given(*weight, kept[2]) : nullptr;
  const float* beta = bias.has_value() ? given(*bias, kept[3]) : nullptr;
  Tensor affine = at::empty({3, channels}, mean.options());
  Tensor inverse = at::empty({channels}, mean.options());
  Tensor unbiased = at::empty({channels}, mean.options());
  float* to = affine.mutable_data_ptr<float>();
  float* to_inverse = inverse.mutable_data_ptr<float>();
  float* to_unbiased = unbiased.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double found = 1.0 / std::sqrt(squares[c] / static_cast<double>(count) + eps);
    to[c] = of_mean[c];
    to[channels + c] = static_cast<float>(gamma ? gamma[c] * found : found);
    to[2 * channels + c] = beta ? beta[c] : 0.0f;
    to_inverse[c] = static_cast<float>(found);
    to_unbiased[c] = static_cast<float>(squares[c] / static_cast<double>(count - 1));
  }
  return {affine, inverse, unbiased};
}

std::tuple<Tensor, Tensor> normalize_terms(const Tensor& sums, const Tensor& inverse,
                                           int64_t count) {
  const int64_t channels = inverse.numel();
  Tensor kept[2];
  const float* from = statistics("normalize_terms", sums, {2, channels}, kept[0]);
  const float* factor = statistics("normalize_terms", inverse, {channels}, kept[1]);
  Tensor terms = at::empty({2, channels}, sums.options());
  Tensor weight = at::empty({channels}, sums.options());
  float* to = terms.mutable_data_ptr<float>();
  float* to_weight = weight.mutable_data_ptr<float>();
  const double share = 1.0 / static_cast<double>(count);
  for (int64_t c = 0; c < channels; ++c) {
    const double gradient = static_cast<double>(from[channels + c]) * factor[c];
    to[c] = static_cast<float>(from[c] * share);
    to[channels + c] = static_cast<float>(gradient * factor[c] * share);
    to_weight[c] = static_cast<float>(gradient);
  }
  return {terms, weight};
}

void check_activation(const char* name, int64_t activation) {
  TORCH_CHECK(0 <= activation && activation < kActivations, name, ": no activation ", activation);
}

// The result, or where there is a gradient of it, that of n(y).
Tensor normalize_map(const char* name, const Tensor* gradient, const Tensor& y,
                     const Tensor& affine, const optional<Tensor>& row,
                     const optional<Tensor>& column, int64_t activation, double slope) {
  check_map(name, y);
  check_activation(name, activation);
  if (gradient) check_like(name, *gradient, y);
  const Map map(y, follows_pixels(y));
  const AxisVectors axes(name, row, column, map, y.scalar_type());
  const Tensor constants = vectors(name, affine, 3, y);
  const optional<Map> upstream =
      gradient ? optional<Map>(Map(*gradient, map.pixels)) : std::nullopt;
  const auto act = static_cast<Activation>(activation);
  const float negative = static_cast<float>(slope);
  Tensor out = empty_map(y);
  SEAATTN_DISPATCH(y.scalar_type(), "normalize", [&] {
    each(
        map,
        [&](int64_t b, int64_t c) {
          Reader<const scalar_t> g = {nullptr, 0};
          if (upstream) g = upstream->plane<scalar_t>(b, c);
          const PlaneAxes added = axes.plane(b * map.channels() + c);
          normalize_lines(added.lines, g, map.plane<scalar_t>(b, c), affine_at(constants, c),
                          added.axes, act, negative, plane_of<scalar_t>(out, b, c));
        },
        [&](int64_t line) {
          const int64_t pixel = line * map.width();
          Reader<const scalar_t> g = {nullptr, 0};
          if (upstream) g = upstream->from<scalar_t>(pixel);
          normalize_lines(lines_of_pixels(map, map.width()), g, map.from<scalar_t>(pixel),
                          affine_at(constants, 0), axes.line(line), act, negative,
                          pixels_of<scalar_t>(out, pixel));
        });
  });
  return out;
}

Tensor normalize(const Tensor& y, const Tensor& affine, const optional<Tensor>& row,
                 const optional<Tensor>& column, int64_t activation, double slope) {
  return normalize_map("normalize", nullptr, y, affine, row, column, activation, slope);
}

std::tuple<Tensor, Tensor, Tensor> normalize_add_backward(const Tensor& gradient, const Tensor& y,
                                                          const Tensor& affine, const Tensor& row,
                                                          const Tensor& column, int64_t activation,
                                                          double slope) {
  Tensor dn =
      normalize_map("normalize_add_backward", &gradient, y, affine, row, column, activation, slope);
  Tensor row_sums = at::empty(row.sizes(), affine.options());
  Tensor column_sums = at::empty(column.sizes(), affine.options());
  SEAATTN_DISPATCH(y.scalar_type(), "normalize_add_backward", [&] {
    squeeze_map<scalar_t>(Map(dn, follows_pixels(y)), row_sums.mutable_data_ptr<float>(),
                          column_sums.mutable_data_ptr<float>(), false);
  });
  return {dn, row_sums, column_sums};
}

// What the two halves of a gradient take: a map, its gradient, constants, axis vectors.
struct Incoming {
  Incoming(const char* name, const Tensor& gradient, const Tensor& y, const Tensor& affine,
           const optional<Tensor>& row, const optional<Tensor>& column, int64_t activation_,
           double slope_)
      : map((check_map(name, y), check_like(name, gradient, y), y), follows_pixels(y)),
        upstream(gradient, map.pixels),
        axes(name, row, column, map, at::kFloat),
        constants(vectors(name, affine, 3, y)),
        activation(static_cast<Activation>(activation_)),
        slope(static_cast<float>(slope_)) {
    check_activation(name, activation_);
    TORCH_CHECK(!axes.given || activation == kIdentity, name,
                ": row and column go with no activation");
  }
  Map map, upstream;
  AxisVectors axes;
  Tensor constants;
  Activation activation;
  float slope;
};

Tensor normalize_sums(const Tensor& gradient, const Tensor& y, const Tensor& affine,
                      const optional<Tensor>& row, const optional<Tensor>& column,
                      int64_t activation, double slope) {
  const Incoming in("normalize_sums", gradient, y, affine, row, column, activation, slope);
  const Map& map = in.map;
  Tensor sums;
  SEAATTN_DISPATCH(y.scalar_type(), "normalize_sums", [&] {
    sums = sums_of<2>(
        map,
        [&](int64_t b, int64_t c, double* const* to) {
          const PlaneAxes added = in.axes.plane(b * map.channels() + c, true);
          normalize_sums_lines(added.lines, in.upstream.plane<scalar_t>(b, c),
                               map.plane<scalar_t>(b, c), affine_at(in.constants, c), added.axes,
                               in.activation, in.slope, to[0], to[1]);
        },
        [&](int64_t line, int64_t first, int64_t count, float* const* to) {
          const int64_t pixel = line * map.width() + first;
          normalize_sums_lines(lines_of_pixels(map, count), in.upstream.from<scalar_t>(pixel),
                               map.from<scalar_t>(pixel), affine_at(in.constants, 0),
                               in.axes.line(line, first), in.activation, in.slope, to[0], to[1]);
        });
  });
  return sums;
}

Tensor normalize_backward(const Tensor& gradient, const Tensor& y, const Tensor& affine,
                          const Tensor& terms_, const optional<Tensor>& row,
                          const optional<Tensor>& column, int64_t activation, double slope) {
  const Incoming in("normalize_backward", gradient, y, affine, row, column, activation, slope);
  const Map& map = in.map;
  const Tensor terms = vectors("normalize_backward", terms_, 2, y);
  Tensor out = empty_map(y);
  SEAATTN_DISPATCH(y.scalar_type(), "normalize_backward", [&] {
    each(
        map,
        [&](int64_t b, int64_t c) {
          const PlaneAxes added = in.axes.plane(b * map.channels() + c);
          normalize_backward_lines(added.lines, in.upstream.plane<scalar_t>(b, c),
                                   map.plane<scalar_t>(b, c), affine_at(in.constants, c),
                                   terms_at(terms, c), added.axes, in.activation, in.slope,
                                   plane_of<scalar_t>(out, b, c));
        },
        [&](int64_t line) {
          const int64_t pixel = line * map.width();
          normalize_backward_lines(
              lines_of_pixels(map, map.width()), in.upstream.from<scalar_t>(pixel),
              map.from<scalar_t>(pixel), affine_at(in.constants, 0), terms_at(terms, 0),
              in.axes.line(line), in.activation, in.slope, pixels_of<scalar_t>(out, pixel));
        });
  });
  return out;
}

// Two maps that are read side by side, in the layout of x.
struct GatedMaps {
  GatedMaps(const char* name, const Tensor& x, const Tensor& y, const Tensor& x_affine,
            const Tensor& y_affine, bool hard_)
      : of_x((check_map(name, x), check_like(name, y, x), x), follows_pixels(x)),
        of_y(y, of_x.pixels),
        x_constants(vectors(name, x_affine, 3, x)),
        y_constants(vectors(name, y_affine, 3, x)),
        hard(hard_) {}

  template <typename T>
  Gated<T> plane(int64_t b, int64_t c) const {
    return {of_x.plane<T>(b, c), of_y.plane<T>(b, c), affine_at(x_constants, c),
            affine_at(y_constants, c), hard};
  }
  template <typename T>
  Gated<T> from(int64_t pixel) const {
    return {of_x.from<T>(pixel), of_y.from<T>(pixel), affine_at(x_constants, 0),
            affine_at(y_constants, 0), hard};
  }

  Map of_x, of_y;
  Tensor x_constants, y_constants;
  bool hard;
};

Tensor normalize_gate(const Tensor& x, const Tensor& y, const Tensor& x_affine,
                      const Tensor& y_affine, bool hard) {
  const GatedMaps maps("normalize_gate", x, y, x_affine, y_affine, hard);
  const Map& map = maps.of_x;
  Tensor out = empty_map(x);
  SEAATTN_DISPATCH(x.scalar_type(), "normalize_gate", [&] {
    each(
        map,
        [&](int64_t b, int64_t c) {
          normalize_gate_lines(lines_of_plane(map), maps.plane<scalar_t>(b, c),
                               plane_of<scalar_t>(out, b, c));
        },
        [&](int64_t line) {
          const int64_t pixel = line * map.width();
          normalize_gate_lines(lines_of_pixels(map, map.width()), maps.from<scalar_t>(pixel),
                               pixels_of<scalar_t>(out, pixel));
        });
  });
  return out;
}

std::tuple<Tensor, Tensor> normalize_gate_sums(const Tensor& gradient, const Tensor& x,
                                               const Tensor& y, const Tensor& x_affine,
                                               const Tensor& y_affine, bool hard) {
  const GatedMaps maps("normalize_gate_sums", x, y, x_affine, y_affine, hard);
  check_like("normalize_gate_sums", gradient, x);
  const Map& map = maps.of_x;
  const Map upstream(gradient, map.pixels);
  Tensor sums;
  SEAATTN_DISPATCH(x.scalar_type(), "normalize_gate_sums", [&] {
    sums = sums_of<4>(
        map,
        [&](int64_t b, int64_t c, double* const* to) {
          normalize_gate_sums_lines(lines_of_plane(map), upstream.plane<scalar_t>(b, c),
                                    maps.plane<scalar_t>(b, c), to);
        },
        [&](int64_t line, int64_t first, int64_t count, float* const* to) {
          const int64_t pixel = line * map.width() + first;
          normalize_gate_sums_lines(lines_of_pixels(map, count), upstream.from<scalar_t>(pixel),
                                    maps.from<scalar_t>(pixel), to);
        });
  });
  return {sums.slice(0, 0, 2).clone(), sums.slice(0, 2, 4).clone()};
}

std::tuple<Tensor, Tensor> normalize_gate_backward(const Tensor& gradient, const Tensor& x,
                                                   const Tensor& y, const Tensor& x_affine,
                                                   const Tensor& y_affine, const Tensor& x_terms,
                                                   const Tensor& y_terms, bool hard) {
  const GatedMaps maps("normalize_gate_backward", x, y, x_affine, y_affine, hard);
  check_like("normalize_gate_backward", gradient, x);
  const Map& map = maps.of_x;
  const Map upstream(gradient, map.pixels);
  const Tensor of_x = vectors("normalize_gate_backward", x_terms, 2, x);
  const Tensor of_y = vectors("normalize_gate_backward", y_terms, 2, x);
  Tensor dx = empty_map(x), dy = empty_map(x);
  SEAATTN_DISPATCH(x.scalar_type(), "normalize_gate_backward", [&] {
    each(
        map,
        [&](int64_t b, int64_t c) {
          normalize_gate_backward_lines(lines_of_plane(map), upstream.plane<scalar_t>(b, c),
                                        maps.plane<scalar_t>(b, c), terms_at(of_x, c),
                                        terms_at(of_y, c), plane_of<scalar_t>(dx, b, c),
                                        plane_of<scalar_t>(dy, b, c));
        },
        [&](int64_t line) {
          const int64_t pixel = line * map.width();
          normalize_gate_backward_lines(
              lines_of_pixels(map, map.width()), upstream.from<scalar_t>(pixel),
              maps.from<scalar_t>(pixel), terms_at(of_x, 0), terms_at(of_y, 0),
              pixels_of<scalar_t>(dx, pixel), pixels_of<scalar_t>(dy, pixel));
        });
  });
  if (follows_pixels(y) != map.pixels) {
    dy = dy.contiguous(map.pixels ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
  }
  return {dx, dy};
}

// What one thread convolves in: copies of the map and of its gradient, and a line of outputs. Of
// NHWC kChannels channels of each.
struct Convolution {
  Convolution(Plane plane_, bool pixels, bool backward) : plane(plane_) {
    const int64_t lanes = pixels ? kChannels : 1;
    padded.resize(plane.size() * lanes);
    line.resize((plane.line() + kChannels) * lanes);
    if (backward) gradient.resize(plane.size() * lanes);
  }
  Plane plane;
  std::vector<float> padded, gradient, line;
};

// Nine weights a channel in float32: (C, 9), or (blocks, 9, kChannels) with zeros past C.
Tensor taps_of(const char* name, const Tensor& weight, const Map& map) {
  const int64_t channels = map.channels();
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({channels, 1, 3, 3}) &&
                  weight.scalar_type() == map.tensor.scalar_type(),
              name, ": weight must be (", channels, ", 1, 3, 3) of the dtype of the map, got ",
              weight.sizes(), " ", weight.scalar_type());
  const Tensor taps = weight.reshape({channels, 9}).to(at::kFloat).contiguous();
  if (!map.pixels) return taps;
  const int64_t blocks = (channels + kChannels - 1) / kChannels;
  Tensor out = at::zeros({9, blocks * kChannels}, taps.options());
  out.slice(1, 0, channels).copy_(taps.t());
  return out.view({9, blocks, kChannels}).transpose(0, 1).contiguous();
}

// of_channels(b, c, count, scratch): of one channel, or of NHWC of up to kChannels of them.
template <typename Channels>
void convolve(const Map& map, bool backward, const Channels& of_channels) {
  const int64_t channels = map.channels(), share = map.pixels ? kChannels : 1;
  const int64_t blocks = (channels + share - 1) / share, size = map.height() * map.width();
  at::parallel_for(0, map.batch() * blocks, grain(size * share), [&](int64_t begin, int64_t end) {
    Convolution scratch({map.height(), map.width()}, map.pixels, backward);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % blocks * share;
      of_channels(task / blocks, c, std::min(share, channels - c), scratch);
    }
  });
}

Tensor depthwise(const Tensor& y, const Tensor& affine, const Tensor& weight,
                 const optional<Tensor>& bias) {
  check_map("depthwise", y);
  const Map map(y, follows_pixels(y));
  const Tensor constants = vectors("depthwise", affine, 3, y);
  const Tensor taps = taps_of("depthwise", weight, map);
  const int64_t channels = map.channels(), size = map.height() * map.width();
  Tensor start = at::zeros({channels + kChannels}, constants.options());
  if (bias.has_value()) {
    TORCH_CHECK(bias->sizes() == at::IntArrayRef({channels}), "depthwise: bias must be (", channels,
                "), got ", bias->sizes());
    start.slice(0, 0, channels).copy_(*bias);
  }
  const float* weights = taps.const_data_ptr<float>();
  const float* starts = start.const_data_ptr<float>();
  Tensor out = empty_map(y);
  SEAATTN_DISPATCH(y.scalar_type(), "depthwise", [&] {
    convolve(map, false, [&](int64_t b, int64_t c, int64_t count, Convolution& scratch) {
      const Plane plane = scratch.plane;
      float *padded = scratch.padded.data(), *line = scratch.line.data();
      if (map.pixels) {
        pad_channels(map.from<scalar_t>(b * size).data + c, map.step, count, plane,
                     affine_at(constants, c), padded);
        convolve_channels(padded, plane, weights + c * 9, starts + c, line);
        take_channels(line, channels, count, plane, pixels_of<scalar_t>(out, b * size).data + c);
      } else {
        pad_plane(map.plane<scalar_t>(b, c).data, plane, affine_at(constants, c), padded);
        convolve_plane(padded, plane, weights + c * 9, starts[c], line);
        take_plane(line, plane, plane_of<scalar_t>(out, b, c).data);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> depthwise_backward(const Tensor& gradient, const Tensor& y,
                                              const Tensor& affine, const Tensor& weight) {
  check_map("depthwise_backward", y);
  check_like("depthwise_backward", gradient, y);
  const Map map(y, follows_pixels(y)), upstream(gradient, map.pixels);
  const Tensor constants = vectors("depthwise_backward", affine, 3, y);
  const Tensor taps = taps_of("depthwise_backward", weight, map).flip(1);
  const int64_t batch = map.batch(), channels = map.channels(), size = map.height() * map.width();
  const float* weights = taps.const_data_ptr<float>();
  const std::vector<float> none(kChannels);
  // Of each image: their sum does not depend on who made them.
  std::vector<double> sums(batch * channels * 9);
  Tensor dn = empty_map(y);
  SEAATTN_DISPATCH(y.scalar_type(), "depthwise_backward", [&] {
    convolve(map, true, [&](int64_t b, int64_t c, int64_t count, Convolution& scratch) {
      const Plane plane = scratch.plane;
      float *padded = scratch.padded.data(), *line = scratch.line.data();
      float* g = scratch.gradient.data();
      double* to = sums.data() + (b * channels + c) * 9;
      if (map.pixels) {
        pad_channels(map.from<scalar_t>(b * size).data + c, map.step, count, plane,
                     affine_at(constants, c), padded);
        pad_channels(upstream.from<scalar_t>(b * size).data + c, upstream.step, count, plane,
                     {nullptr, nullptr, nullptr}, g);
        convolve_channels(g, plane, weights + c * 9, none.data(), line);
        take_channels(line, channels, count, plane, pixels_of<scalar_t>(dn, b * size).data + c);
        double found[9 * kChannels] = {};
        correlate_channels(padded, g, plane, found);
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t t = 0; t < 9; ++t) to[k * 9 + t] = found[t * kChannels + k];
        }
      } else {
        pad_plane(map.plane<scalar_t>(b, c).data, plane, affine_at(constants, c), padded);
        pad_plane(upstream.plane<scalar_t>(b, c).data, plane, {nullptr, nullptr, nullptr}, g);
        convolve_plane(g, plane, weights + c * 9, 0.0f, line);
        take_plane(line, plane, plane_of<scalar_t>(dn, b, c).data);
        correlate_plane(padded, g, plane, to);
      }
    });
  });
  Tensor dweight = at::empty({channels, 1, 3, 3}, constants.options());
  float* to = dweight.mutable_data_ptr<float>();
  for (int64_t k = 0; k < channels * 9; ++k) {
    double total = 0.0;
    for (int64_t b = 0; b < batch; ++b) total += sums[b * channels * 9 + k];
    to[k] = static_cast<float>(total);
  }
  return {dn, dweight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(seaattn_kernels, CPU, library) {
  library.impl("moments.cpu", moments);
  library.impl("axial_moments.cpu", axial_moments);
  library.impl("normalize_affine.cpu", normalize_affine);
  library.impl("normalize_terms.cpu", normalize_terms);
  library.impl("normalize.cpu", normalize);
  library.impl("normalize_sums.cpu", normalize_sums);
  library.impl("normalize_backward.cpu", normalize_backward);
  library.impl("normalize_add_backward.cpu", normalize_add_backward);
  library.impl("normalize_gate.cpu", normalize_gate);
  library.impl("normalize_gate_sums.cpu", normalize_gate_sums);
  library.impl("normalize_gate_backward.cpu", normalize_gate_backward);
  library.impl("depthwise.cpu", depthwise);
  library.impl("depthwise_backward.cpu", depthwise_backward);
}

}  // namespace seaattn
