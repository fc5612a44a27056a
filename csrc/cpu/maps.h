// Tensors as the training operators read them: planes of NCHW maps, pixels of NHWC ones, constants
// of channels, vectors along the axes; and how the threads share a map.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "normalize.h"
#include "tensors.h"

namespace seaattn {

using at::Tensor;
using std::optional;

// Pixels of an NHWC map whose sums are one task's, whatever the number of threads.
constexpr int64_t kTaskPixels = 1024;
// Channels of an NCHW map whose sums are one task's, and elements of an image that they have.
constexpr int64_t kGroup = 32, kGroupElements = 2048;

// A map whose planes, or whose pixels, are dense: where it lies, or a copy.
struct Map {
  Map(const Tensor& x, bool channels_last) : pixels(channels_last) {
    const int64_t h = x.size(2), w = x.size(3);
    const auto steps = [&](int axis, int64_t stride) {
      return x.size(axis) == 1 || x.stride(axis) == stride;
    };
    if (pixels) {
      const int64_t pixel = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : x.stride(0);
      const bool dense =
          steps(1, 1) && pixel >= x.size(1) && steps(2, w * pixel) && steps(0, h * w * pixel);
      tensor = dense ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
      step = dense ? pixel : x.size(1);
    } else {
      const bool dense = steps(3, 1) && steps(2, w) && steps(1, h * w) && x.stride(0) >= 0;
      tensor = dense ? x : x.contiguous();
      step = tensor.stride(0);
    }
  }

  int64_t batch() const {
    return tensor.size(0);
  }
  int64_t channels() const {
    return tensor.size(1);
  }
  int64_t height() const {
    return tensor.size(2);
  }
  int64_t width() const {
    return tensor.size(3);
  }

  // One plane, line by line where something is added along the axes.
  template <typename T>
  Reader<const T> plane(int64_t b, int64_t c) const {
    return {tensor.const_data_ptr<T>() + b * step + c * height() * width(), width()};
  }
  // Of NHWC, from a pixel on.
  template <typename T>
  Reader<const T> from(int64_t pixel) const {
    return {tensor.const_data_ptr<T>() + pixel * step, step};
  }

  Tensor tensor;
  bool pixels;
  int64_t step;  // from image to image, or from pixel to pixel
};

// A new map, which is dense.
template <typename T>
Reader<T> plane_of(const Tensor& out, int64_t b, int64_t c) {
  const int64_t width = out.size(3), size = out.size(2) * width;
  return {out.mutable_data_ptr<T>() + (b * out.size(1) + c) * size, width};
}

template <typename T>
Reader<T> pixels_of(const Tensor& out, int64_t pixel) {
  return {out.mutable_data_ptr<T>() + pixel * out.size(1), out.size(1)};
}

// Whether what is made of a map has its channels beside another.
inline bool follows_pixels(const Tensor& y) {
  return y.stride(1) == 1 && !y.is_contiguous();
}

inline Tensor empty_map(const Tensor& y) {
  return at::empty(
      y.sizes(), y.options(),
      follows_pixels(y) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

inline void check_map(const char* name, const Tensor& y) {
  TORCH_CHECK(y.dim() == 4 && y.size(1) > 0 && y.size(2) > 0 && y.size(3) > 0, name,
              ": a map must be (B, C, H, W) with C, H, W >= 1, got ", y.sizes());
}

inline void check_like(const char* name, const Tensor& other, const Tensor& y) {
  TORCH_CHECK(other.sizes() == y.sizes() && other.scalar_type() == y.scalar_type(), name,
              ": maps must be of one shape and dtype, got ", other.sizes(), " ",
              other.scalar_type(), " and ", y.sizes(), " ", y.scalar_type());
}

// The rows of a (count, C) tensor of float32.
inline Tensor vectors(const char* name, const Tensor& x, int64_t count, const Tensor& y) {
  TORCH_CHECK(
      x.dim() == 2 && x.size(0) == count && x.size(1) == y.size(1) && x.scalar_type() == at::kFloat,
      name, ": expected float32 of (", count, ", ", y.size(1), "), got ", x.scalar_type(), " ",
      x.sizes());
  return x.contiguous();
}

inline Affine affine_at(const Tensor& affine, int64_t c) {
  const float* data = affine.const_data_ptr<float>();
  const int64_t channels = affine.size(1);
  return {data + c, data + channels + c, data + 2 * channels + c};
}

inline Terms terms_at(const Tensor& terms, int64_t c) {
  const float* data = terms.const_data_ptr<float>();
  return {data + c, data + terms.size(1) + c};
}

// What is added to a plane, as its lines take it.
struct PlaneAxes {
  Lines lines;
  Axes axes;
  c10::SmallVector<float, 400> sums;
};

// Axis vectors in float32, beside another as the map has its channels.
struct AxisVectors {
  AxisVectors(const char* name, const optional<Tensor>& row_, const optional<Tensor>& column_,
              const Map& map, at::ScalarType dtype)
      : given(row_.has_value()), height(map.height()), width(map.width()) {
    TORCH_CHECK(row_.has_value() == column_.has_value(), name, ": row and column, both or neither");
    if (!given) return;
    const at::IntArrayRef sizes = map.tensor.sizes();
    TORCH_CHECK(row_->sizes() == sizes.slice(0, 3) && column_->dim() == 3 &&
                    column_->size(0) == sizes[0] && column_->size(1) == sizes[1] &&
                    column_->size(2) == sizes[3] && row_->scalar_type() == dtype &&
                    column_->scalar_type() == dtype,
                name, ": row and column must be (B, C, H) and (B, C, W) of ", dtype, ", got ",
                row_->sizes(), " ", row_->scalar_type(), " and ", column_->sizes(), " ",
                column_->scalar_type(), " beside ", sizes);
    row = (map.pixels ? row_->transpose(1, 2) : *row_).to(at::kFloat).contiguous();
    column = (map.pixels ? column_->transpose(1, 2) : *column_).to(at::kFloat).contiguous();
  }

  // Rows that fill no vectors, or each of which would have to be summed up, are added for the plane
  // as one line.
  PlaneAxes plane(int64_t plane, bool sums = false) const {
    static const float kZero = 0.0f;
    PlaneAxes out = {{1, height * width, false, 0, 0}, {nullptr, nullptr}, {}};
    if (!given) return out;
    const float* of_row = row.const_data_ptr<float>() + plane * height;
    const float* of_column = column.const_data_ptr<float>() + plane * width;
    if (width >= 64 || (width % 16 == 0 && !sums)) {
      out.lines = {height, width, false, 1, 0};
      out.axes = {of_row, of_column};
      return out;
    }
    out.sums.resize(height * width);
    float* to = out.sums.data();
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) to[i * width + j] = of_row[i] + of_column[j];
    }
    out.axes = {&kZero, to};
    return out;
  }

  // Of one row of pixels, from the pixel `first` on.
  Axes line(int64_t line, int64_t first = 0) const {
    if (!given) return {nullptr, nullptr};
    const int64_t channels = row.size(2);
    return {row.const_data_ptr<float>() + line * channels,
            column.const_data_ptr<float>() + (line / height * width + first) * channels};
  }

  bool given;
  int64_t height, width;
  Tensor row, column;
};

inline Lines lines_of_plane(const Map& map) {
  return {1, map.height() * map.width(), false, 0, 0};
}

inline Lines lines_of_pixels(const Map& map, int64_t count) {
  return {count, map.channels(), true, 0, map.channels()};
}

inline int64_t grain(int64_t size) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
}

// of_plane(b, c) for each plane, or of_line(line) for each row of pixels.
template <typename Plane, typename Line>
void each(const Map& map, const Plane& of_plane, const Line& of_line) {
  const int64_t channels = map.channels();
  const int64_t size = map.pixels ? map.width() * channels : map.height() * map.width();
  const int64_t tasks = map.batch() * (map.pixels ? map.height() : channels);
  at::parallel_for(0, tasks, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      if (map.pixels) {
        of_line(task);
      } else {
        of_plane(task / channels, task % channels);
      }
    }
  });
}

// of_channels(first, last) for groups of channels whose planes of one image are some pages of
// memory: a channel of many small images would be read from as many pages.
template <typename Group>
void each_group(const Map& map, const Group& of_channels) {
  const int64_t channels = map.channels(), size = map.height() * map.width();
  const int64_t group = std::clamp<int64_t>(kGroupElements / size, 1, kGroup);
  const int64_t tasks = (channels + group - 1) / group;
  at::parallel_for(0, tasks, grain(map.batch() * size * group), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      of_channels(task * group, std::min((task + 1) * group, channels));
    }
  });
}

// Sums over a map of `kCount` numbers a channel, (kCount, C) of float32.
//
// of_plane(b, c, double* const sums[kCount]) adds to those of one channel;
// of_pixels(line, first, count, float* const sums[kCount]), of pixels first.. of one row of them.
template <int kCount, typename Plane, typename Pixels>
Tensor sums_of(const Map& map, const Plane& of_plane, const Pixels& of_pixels) {
  const int64_t batch = map.batch(), channels = map.channels(), height = map.height(),
                width = map.width();
  Tensor out = at::empty({kCount, channels}, map.tensor.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  if (!map.pixels) {
    each_group(map, [&](int64_t first, int64_t last) {
      double totals[kGroup][kCount] = {};
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t c = first; c < last; ++c) {
          double* sums[kCount];
          for (int i = 0; i < kCount; ++i) sums[i] = &totals[c - first][i];
          of_plane(b, c, sums);
        }
      }
      for (int64_t c = first; c < last; ++c) {
        for (int i = 0; i < kCount; ++i) {
          to[i * channels + c] = static_cast<float>(totals[c - first][i]);
        }
      }
    });
    return out;
  }
  const int64_t lines = batch * height, share = std::max<int64_t>(1, kTaskPixels / width);
  const int64_t tasks = (lines + share - 1) / share, numbers = kCount * channels;
  std::vector<double> totals(tasks * numbers);
  at::parallel_for(0, tasks, grain(share * width * channels), [&](int64_t begin, int64_t end) {
    std::vector<float> parts(numbers);
    float* sums[kCount];
    for (int i = 0; i < kCount; ++i) sums[i] = parts.data() + i * channels;
    for (int64_t task = begin; task < end; ++task) {
      double* total = totals.data() + task * numbers;
      int64_t held = 0;
      const auto flush = [&] {
        for (int64_t k = 0; k < numbers; ++k) total[k] += parts[k];
        std::fill(parts.begin(), parts.end(), 0.0f);
        held = 0;
      };
      std::fill(parts.begin(), parts.end(), 0.0f);
      for (int64_t line = task * share; line < std::min((task + 1) * share, lines); ++line) {
        for (int64_t first = 0; first < width; first += kPixels) {
          const int64_t count = std::min(kPixels, width - first);
          if (held + count > kPixels) flush();
          of_pixels(line, first, count, sums);
          held += count;
        }
      }
      flush();
    }
  });
  for (int64_t k = 0; k < numbers; ++k) {
    double total = 0.0;
    for (int64_t task = 0; task < tasks; ++task) total += totals[task * numbers + k];
    to[k] = static_cast<float>(total);
  }
  return out;
}

}  // namespace seaattn
