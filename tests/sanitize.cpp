// Runs the kernels of csrc/cpu on buffers of exactly the sizes that they state, for a sanitizer to
// watch, and compares the block with plain loops in double precision. Neither torch nor Python is
// in the process. Returns 1 if a number is wrong.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "axial_attention.h"
#include "block.h"
#include "broadcast_add.h"
#include "depthwise.h"
#include "elementwise.h"
#include "gate.h"
#include "normalize.h"
#include "squeeze.h"

using namespace seaattn;

namespace {

using Numbers = std::vector<float>;

struct Case {
  int64_t batch, channels, height, width, key_dim, heads, value_dim, activation;
  bool hard;
};

const Case kCases[] = {
    {1, 1, 1, 1, 2, 1, 1, 2, true},        {2, 3, 1, 17, 2, 1, 4, 1, true},
    {2, 24, 7, 7, 10, 3, 15, 4, true},     {1, 32, 15, 8, 16, 2, 32, 2, false},
    {1, 40, 100, 3, 20, 2, 20, 3, true},   {3, 33, 19, 23, 24, 4, 48, 2, true},
    {2, 16, 75, 100, 16, 2, 32, 0, false}, {1, 200, 20, 21, 5, 3, 7, 2, true},
    {1, 7, 9, 1000, 3, 5, 9, 2, true},     {5, 18, 260, 13, 16, 4, 32, 2, true},
};

std::mt19937 generator(0);

Numbers normal(int64_t count, double deviation) {
  std::normal_distribution<float> distribution(0, static_cast<float>(deviation));
  Numbers numbers(count);
  for (float& number : numbers) number = distribution(generator);
  return numbers;
}

double activate(double x, int64_t code) {
  switch (code) {
    case 1:
      return std::max(x, 0.0);
    case 2:
      return std::clamp(x, 0.0, 6.0);
    case 3:
      return x < 0 ? 0.1 * x : x;
    case 4:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

// A linear layer: weight (outputs, inputs), bias.
struct Linear {
  Linear(int64_t outputs, int64_t inputs)
      : outputs(outputs),
        inputs(inputs),
        weight(normal(outputs * inputs, 1 / std::sqrt(inputs))),
        bias(normal(outputs, 0.5)) {}

  double operator()(int64_t output, const double* x) const {
    double sum = bias[output];
    for (int64_t k = 0; k < inputs; ++k) sum += x[k] * weight[output * inputs + k];
    return sum;
  }
  int64_t outputs, inputs;
  Numbers weight, bias;
};

// Where output or input `i` of q, k and v lies when keys and values fill panels of their own.
int64_t place(int64_t i, int64_t keys) {
  return i < keys ? i : i - keys + panels_of(keys) * kPanel;
}

// (outputs, inputs) to (panels, inputs', 16), each index moved by a function of it.
template <typename Out, typename In>
Numbers to_panels(const Linear& layer, int64_t panels, int64_t inputs, Out out, In in) {
  Numbers weight(panels * inputs * kPanel, 0.0f);
  for (int64_t n = 0; n < layer.outputs; ++n) {
    for (int64_t k = 0; k < layer.inputs; ++k) {
      weight[(out(n) / kPanel * inputs + in(k)) * kPanel + out(n) % kPanel] =
          layer.weight[n * layer.inputs + k];
    }
  }
  return weight;
}

template <typename Out>
Numbers bias_of(const Linear& layer, int64_t panels, Out out) {
  Numbers bias(panels * kPanel, 0.0f);
  for (int64_t n = 0; n < layer.outputs; ++n) bias[out(n)] = layer.bias[n];
  return bias;
}

struct Block {
  explicit Block(const Case& c)
      : c(c),
        keys(2 * c.heads * c.key_dim),
        values(c.heads * c.value_dim),
        qkv(keys + values, c.channels),
        depthwise(keys + values, 9),
        pointwise(c.channels, keys + values),
        row(values, values),
        column(values, values),
        proj(c.channels, values),
        position(normal(keys * (c.height + c.width), 1)) {}

  double position_of(int64_t channel, int64_t n) const {
    return position[channel * (c.height + c.width) + n];
  }

  // One image (H, W, C) in double precision.
  std::vector<double> operator()(const std::vector<double>& x) const {
    const int64_t h = c.height, w = c.width, all = keys + values;
    std::vector<double> field(h * w * all), axis((h + w) * all, 0.0);
    for (int64_t p = 0; p < h * w; ++p) {
      for (int64_t n = 0; n < all; ++n) {
        const double value = qkv(n, &x[p * c.channels]);
        field[p * all + n] = value;
        axis[p / w * all + n] += value / w;
        axis[(h + p % w) * all + n] += value / h;
      }
    }
    for (int64_t i = 0; i < h + w; ++i) {
      for (int64_t n = 0; n < keys; ++n) axis[i * all + n] += position_of(n, i);
    }
    std::vector<double> encoded((h + w) * values);
    for (int64_t i = 0; i < h + w; ++i) {
      const int64_t begin = i < h ? 0 : h, end = i < h ? h : h + w;
      std::vector<double> attended(values);
      for (int64_t head = 0; head < c.heads; ++head) {
        const int64_t q = head * c.key_dim, k = keys / 2 + q, v = keys + head * c.value_dim;
        std::vector<double> score(end - begin);
        for (int64_t j = begin; j < end; ++j) {
          for (int64_t d = 0; d < c.key_dim; ++d) {
            score[j - begin] += axis[i * all + q + d] * axis[j * all + k + d];
          }
          score[j - begin] /= std::sqrt(c.key_dim);
        }
        const double most = *std::max_element(score.begin(), score.end());
        double sum = 0;
        for (double& s : score) sum += s = std::exp(s - most);
        for (int64_t e = 0; e < c.value_dim; ++e) {
          double out = 0;
          for (int64_t j = begin; j < end; ++j) out += score[j - begin] * axis[j * all + v + e];
          attended[head * c.value_dim + e] = activate(out / sum, c.activation);
        }
      }
      for (int64_t n = 0; n < values; ++n) {
        encoded[i * values + n] = (i < h ? row : column)(n, attended.data());
      }
    }
    std::vector<double> out(h * w * c.channels), hidden(all), mixed(values);
    for (int64_t p = 0; p < h * w; ++p) {
      const int64_t i = p / w, j = p % w;
      for (int64_t n = 0; n < all; ++n) {
        double sum = depthwise.bias[n];
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t y = i + t / 3 - 1, z = j + t % 3 - 1;
          if (0 <= y && y < h && 0 <= z && z < w) {
            sum += field[(y * w + z) * all + n] * depthwise.weight[n * 9 + t];
          }
        }
        hidden[n] = activate(sum, c.activation);
      }
      for (int64_t n = 0; n < values; ++n) {
        mixed[n] = activate(
            field[p * all + keys + n] + encoded[i * values + n] + encoded[(h + j) * values + n],
            c.activation);
      }
      for (int64_t n = 0; n < c.channels; ++n) {
        const double t = proj(n, mixed.data());
        const double weight = c.hard ? std::clamp(t + 3, 0.0, 6.0) / 6 : 1 / (1 + std::exp(-t));
        out[p * c.channels + n] = weight * pointwise(n, hidden.data());
      }
    }
    return out;
  }

  Case c;
  int64_t keys, values;
  Linear qkv, depthwise, pointwise, row, column, proj;
  Numbers position;
};

// Tasks in the order of their numbers, against it, or each in a thread.
void forwards(int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}
void backwards(int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = count; i-- > 0;) task(i);
}
void threads(int64_t count, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < count; ++i) workers.emplace_back(task, i);
  for (std::thread& worker : workers) worker.join();
}

// Strides of a map of which each row is `gap` pixels longer than its width.
template <typename T>
MapOf<T> map_of(T* data, const Case& c, bool channels_last, int64_t gap) {
  const int64_t line = c.width + gap;
  if (channels_last)
    return {data, c.height * c.width * c.channels, 1, c.width * c.channels, c.channels};
  return {data, c.channels * c.height * line, c.height * line, line, 1};
}

template <typename T>
int64_t at(const MapOf<T>& map, int64_t b, int64_t channel, int64_t p, int64_t width) {
  return b * map.image + channel * map.channel + p / width * map.row + p % width * map.pixel;
}

template <typename T>
bool check(const Case& c, const char* dtype, double tolerance) {
  const Block block(c);
  const BlockSizes sizes = {c.channels,
                            c.height,
                            c.width,
                            c.heads,
                            c.key_dim,
                            c.value_dim,
                            static_cast<Activation>(c.activation),
                            0.1f,
                            c.hard};
  const int64_t keys = block.keys, panels = sizes.panels(), values = sizes.value_panels();
  const int64_t channels = panels_of(c.channels);
  const auto same = [](int64_t i) { return i; };
  const auto moved = [&](int64_t i) { return place(i, keys); };
  Numbers qkv = to_panels(block.qkv, panels, c.channels, moved, same);
  Numbers qkv_bias = bias_of(block.qkv, panels, moved);
  Numbers depthwise = to_panels(block.depthwise, panels, 9, moved, same);
  Numbers depthwise_bias = bias_of(block.depthwise, panels, moved);
  Numbers pointwise = to_panels(block.pointwise, channels, panels * kPanel, same, moved);
  Numbers pointwise_bias = bias_of(block.pointwise, channels, same);
  Numbers encode = to_panels(block.row, values, block.values, same, same);
  Numbers encode_bias = bias_of(block.row, values, same);
  for (float weight : to_panels(block.column, values, block.values, same, same)) {
    encode.push_back(weight);
  }
  for (float bias : bias_of(block.column, values, same)) encode_bias.push_back(bias);
  encode.shrink_to_fit();
  encode_bias.shrink_to_fit();
  Numbers proj = to_panels(block.proj, channels, block.values, same, same);
  Numbers proj_bias = bias_of(block.proj, channels, same);
  Numbers position(keys * sizes.axis_length(), std::numeric_limits<float>::quiet_NaN());
  for (int64_t n = 0; n < keys; ++n) {
    for (int64_t i = 0; i < c.height + c.width; ++i) {
      const int64_t to = i < c.height ? i : sizes.column_start() + i - c.height;
      position[n * sizes.axis_length() + to] = static_cast<float>(block.position_of(n, i));
    }
  }
  const BlockWeights weights = {
      qkv.data(),       qkv_bias.data(),       depthwise.data(), depthwise_bias.data(),
      pointwise.data(), pointwise_bias.data(), encode.data(),    encode_bias.data(),
      proj.data(),      proj_bias.data(),      position.data()};

  const int64_t pixels = c.height * c.width, image = pixels * c.channels;
  std::vector<T> x(c.batch * image);
  std::vector<double> truth;
  for (int64_t b = 0; b < c.batch; ++b) {
    std::vector<double> exact(image);
    const Numbers numbers = normal(image, 1);
    for (int64_t i = 0; i < image; ++i) {
      x[b * image + i] = static_cast<T>(numbers[i]);
      exact[i] = static_cast<float>(x[b * image + i]);
    }
    const std::vector<double> out = block(exact);
    truth.insert(truth.end(), out.begin(), out.end());
  }
  double size = 1;
  for (double t : truth) size = std::max(size, std::abs(t));

  for (const bool channels_last : {false, true}) {
    std::vector<T> first;
    for (const int64_t gap : {0, 3}) {
      if (channels_last && gap > 0) continue;
      for (const int64_t workers : {1, 2, 7}) {
        for (const Run& run : {Run(forwards), Run(backwards), Run(threads)}) {
          // Not a number behind a row, so that it shows if it is read.
          const MapOf<const T> shape = map_of<const T>(nullptr, c, channels_last, gap);
          const int64_t length = at(shape, c.batch - 1, c.channels - 1, pixels - 1, c.width) + 1;
          std::vector<T> map(length, static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
          std::vector<T> out(c.batch * image,
                             static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
          for (int64_t b = 0; b < c.batch; ++b) {
            for (int64_t n = 0; n < c.channels; ++n) {
              for (int64_t p = 0; p < pixels; ++p) {
                map[at(shape, b, n, p, c.width)] = x[b * image + p * c.channels + n];
              }
            }
          }
          const int64_t floats = block_scratch(sizes, c.batch, workers);
          const std::unique_ptr<float, void (*)(void*)> scratch(
              static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), std::free);
          std::fill_n(scratch.get(), floats, std::numeric_limits<float>::quiet_NaN());
          const MapOf<T> to = map_of(out.data(), c, channels_last, 0);
          run_block(sizes, weights, c.batch, map_of<const T>(map.data(), c, channels_last, gap), to,
                    workers, run, scratch.get());
          std::vector<T> found(c.batch * image);
          double worst = 0;
          for (int64_t b = 0; b < c.batch; ++b) {
            for (int64_t n = 0; n < c.channels; ++n) {
              for (int64_t p = 0; p < pixels; ++p) {
                const int64_t i = b * image + p * c.channels + n;
                found[i] = out[at(to, b, n, p, c.width)];
                const double error = std::abs(static_cast<float>(found[i]) - truth[i]);
                worst = error <= worst ? worst : error;  // NaN is worse than any
              }
            }
          }
          if (first.empty()) first = found;
          const bool equal = std::equal(found.begin(), found.end(), first.begin(), [](T a, T b) {
            return static_cast<float>(a) == static_cast<float>(b);
          });
          if (!(worst <= tolerance * size) || !equal) {
            std::printf(
                "wrong: %s, C=%ld %ldx%ld, NHWC %d, gap %ld, %ld workers: error %g of %g%s\n",
                dtype, long(c.channels), long(c.height), long(c.width), channels_last, long(gap),
                long(workers), worst, size, equal ? "" : ", other bits than before");
            return false;
          }
        }
      }
    }
  }
  return true;
}

// --- the small operators: their numbers are compared elsewhere ---

template <typename T>
std::vector<T> map_of_normal(int64_t count) {
  std::vector<T> map(count);
  const Numbers numbers = normal(count, 1);
  for (int64_t i = 0; i < count; ++i) map[i] = narrow<T>(numbers[i]);
  return map;
}

template <typename T>
bool finite(const std::vector<T>& numbers) {
  return std::all_of(numbers.begin(), numbers.end(),
                     [](T number) { return std::isfinite(widen(number)); });
}

template <typename T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, narrow<T>(std::numeric_limits<float>::quiet_NaN()));
}

template <typename T>
bool squeeze(int64_t channels, int64_t height, int64_t width) {
  const std::vector<T> x = map_of_normal<T>(channels * height * width);
  std::vector<float> run(width * channels);
  std::vector<double> total(width * channels);
  std::vector<T> row = unwritten<T>(channels * height), column = unwritten<T>(channels * width);
  std::vector<T> grad = unwritten<T>(x.size());
  squeeze_channels(x.data(), height, width, channels, channels, row.data(), column.data(),
                   {run.data(), total.data()});
  if (!finite(row) || !finite(column)) return false;
  for (int64_t i = 0; i < height; ++i) {
    spread_line(row.data(), column.data(), height, width, channels,
                grad.data() + i * width * channels);
  }
  std::vector<float> plane_run(width);
  std::vector<double> plane_total(width);
  for (int64_t c = 0; c < channels; ++c) {
    squeeze_plane(x.data() + c * height * width, height, width, width, row.data() + c * height,
                  column.data() + c * width, {plane_run.data(), plane_total.data()});
    spread_plane(row.data() + c * height, column.data() + c * width, height, width,
                 grad.data() + c * height * width);
  }
  return finite(row) && finite(column) && finite(grad);
}

template <typename T>
bool elementwise(int64_t channels, int64_t height, int64_t width) {
  const int64_t count = channels * height * width;
  const std::vector<T> x = map_of_normal<T>(count), y = map_of_normal<T>(count);
  const std::vector<T> row = map_of_normal<T>(channels * height);
  const std::vector<T> column = map_of_normal<T>(channels * width);
  std::vector<T> out = unwritten<T>(count), other = unwritten<T>(count);
  for (const bool hard : {true, false}) {
    gate(x.data(), y.data(), count, hard, out.data());
    gate_backward(y.data(), x.data(), y.data(), count, hard, out.data(), other.data());
  }
  bool right = finite(out) && finite(other);
  for (int64_t code = 0; code < kActivations; ++code) {
    const Activation activation = static_cast<Activation>(code);
    for (const T* gradient : {static_cast<const T*>(nullptr), y.data()}) {
      out = unwritten<T>(count);
      broadcast_add_plane(gradient, x.data(), row.data(), column.data(), height, width, activation,
                          0.1f, out.data());
      right = right && finite(std::vector<T>(out.begin(), out.begin() + height * width));
      broadcast_add_pixels(gradient, x.data(), row.data(), column.data(), width, channels,
                           activation, 0.1f, out.data());
      right = right && finite(std::vector<T>(out.begin(), out.begin() + width * channels));
    }
  }
  return right;
}

// Maps whose BatchNorm is pending: one plane of NCHW, or all pixels of an NHWC map.
template <typename T>
bool pending(int64_t channels, int64_t height, int64_t width, bool pixels) {
  const int64_t count = pixels ? channels * height * width : height * width;
  const int64_t constants = pixels ? channels : 1;
  const std::vector<T> x = map_of_normal<T>(count), y = map_of_normal<T>(count);
  const std::vector<T> g = map_of_normal<T>(count);
  std::vector<T> out = unwritten<T>(count), other = unwritten<T>(count);
  const Numbers mean = normal(constants, 1), scale = normal(constants, 1),
                shift = normal(constants, 1), row = normal(pixels ? channels : height, 1),
                column = normal(pixels ? height * width * channels : width, 1);
  const Affine affine = {mean.data(), scale.data(), shift.data()};
  const Terms terms = {scale.data(), mean.data()};
  const Lines lines = pixels ? Lines{height * width, channels, true, 0, channels}
                             : Lines{height, width, false, 1, 0};
  const int64_t step = lines.length;
  const auto read = [&](const std::vector<T>& map) { return Reader<const T>{map.data(), step}; };
  std::vector<float> sums(4 * constants);
  std::vector<double> totals(4);
  bool right = true;
  for (int64_t code = 0; code < kActivations; ++code) {
    const Activation act = static_cast<Activation>(code);
    for (const bool axes : {false, true}) {
      const Axes added = axes ? Axes{row.data(), column.data()} : Axes{nullptr, nullptr};
      normalize_lines(lines, {nullptr, 0}, read(y), affine, added, act, 0.1f,
                      Reader<T>{out.data(), step});
      right = right && finite(out);
      if (axes) {
        out = unwritten<T>(count);
        normalize_lines(lines, read(g), read(y), affine, added, act, 0.1f,
                        Reader<T>{out.data(), step});
        right = right && finite(out);
      }
      out = unwritten<T>(count);
      normalize_backward_lines(lines, read(g), read(y), affine, terms, added, act, 0.1f,
                               Reader<T>{out.data(), step});
      right = right && finite(out);
      if (pixels) {
        normalize_sums_lines(lines, read(g), read(y), affine, added, act, 0.1f, sums.data(),
                             sums.data() + constants);
      } else {
        normalize_sums_lines(lines, read(g), read(y), affine, added, act, 0.1f, totals.data(),
                             totals.data() + 1);
      }
    }
  }
  for (const bool hard : {true, false}) {
    const Gated<T> maps = {read(x), read(y), affine, affine, hard};
    out = other = unwritten<T>(count);
    normalize_gate_lines(lines, maps, Reader<T>{out.data(), step});
    right = right && finite(out);
    normalize_gate_backward_lines(lines, read(g), maps, terms, terms, Reader<T>{out.data(), step},
                                  Reader<T>{other.data(), step});
    right = right && finite(out) && finite(other);
    float* vectors[4];
    double* numbers[4];
    for (int i = 0; i < 4; ++i) {
      vectors[i] = sums.data() + i * constants;
      numbers[i] = totals.data() + i;
    }
    if (pixels) {
      normalize_gate_sums_lines(lines, read(g), maps, vectors);
    } else {
      normalize_gate_sums_lines(lines, read(g), maps, numbers);
    }
  }
  if (pixels) {
    moments_of_pixels(lines, read(y), sums.data(), sums.data() + constants);
  } else {
    totals[0] += sum_of_line(y.data(), count) + deviations_of_line(y.data(), count, mean[0]);
  }
  return right && finite(sums) && std::isfinite(totals[0] + totals[1] + totals[2] + totals[3]);
}

template <typename T>
bool convolution(int64_t channels, int64_t height, int64_t width) {
  const Plane plane = {height, width};
  const int64_t pixels = height * width, lanes = kChannels;
  const std::vector<T> y = map_of_normal<T>(channels * pixels);
  const Numbers numbers = normal(10 * lanes, 1);
  const Affine affine = {numbers.data(), numbers.data() + lanes, numbers.data() + 2 * lanes};
  std::vector<float> padded = unwritten<float>(plane.size() * lanes), gradient = padded;
  std::vector<float> line = unwritten<float>((plane.line() + lanes) * lanes);
  std::vector<double> sums(9 * lanes);
  std::vector<T> out = unwritten<T>(channels * pixels);
  pad_channels(y.data(), channels, channels, plane, affine, padded.data());
  pad_channels(y.data(), channels, channels, plane, {nullptr, nullptr, nullptr}, gradient.data());
  convolve_channels(padded.data(), plane, numbers.data(), numbers.data() + 9 * lanes, line.data());
  take_channels(line.data(), channels, channels, plane, out.data());
  correlate_channels(padded.data(), gradient.data(), plane, sums.data());
  bool right = finite(out) && std::isfinite(std::accumulate(sums.begin(), sums.end(), 0.0));
  padded = gradient = unwritten<float>(plane.size());
  line = unwritten<float>(plane.line() + lanes);
  out = unwritten<T>(pixels);
  pad_plane(y.data(), plane, affine, padded.data());
  pad_plane(y.data(), plane, {nullptr, nullptr, nullptr}, gradient.data());
  convolve_plane(padded.data(), plane, numbers.data(), 0.5f, line.data());
  take_plane(line.data(), plane, out.data());
  correlate_plane(padded.data(), gradient.data(), plane, sums.data());
  return right && finite(out) && std::isfinite(std::accumulate(sums.begin(), sums.end(), 0.0));
}

template <typename T>
bool attention(int64_t n, int64_t d, int64_t e, int64_t points) {
  const int64_t stride = attention_stride(n);
  const auto rows = [&](int64_t count) {
    std::vector<float> matrix(count * stride, std::numeric_limits<float>::quiet_NaN());
    const std::vector<T> x = map_of_normal<T>(count * n), table = map_of_normal<T>(count * points);
    std::vector<Sample> samples(n);
    sample(points, n, samples.data());
    std::vector<float> positions(count * stride, std::numeric_limits<float>::quiet_NaN());
    interpolate(table.data(), count, points, samples.data(), n, positions.data(), stride);
    gather(x.data(), n, 1, count, n, positions.data(), stride, matrix.data());
    return matrix;
  };
  const std::vector<float> q = rows(d), k = rows(d), v = rows(e), gradient = rows(e);
  std::vector<float> out = unwritten<float>(e * stride), dv = out;
  std::vector<float> dq = unwritten<float>(d * stride), dk = dq;
  std::vector<float> scratch = unwritten<float>(attend_scratch(n));
  attend(q.data(), k.data(), v.data(), stride, n, d, e, 0.3f, out.data(), stride, scratch.data());
  scratch = unwritten<float>(attend_backward_scratch(n));
  attend_backward(gradient.data(), q.data(), k.data(), v.data(), stride, n, d, e, 0.3f, dq.data(),
                  dk.data(), dv.data(), scratch.data());
  bool right = true;
  for (const std::vector<float>& matrix : {out, dv, dq, dk}) {
    const int64_t count = matrix.size() / stride;
    std::vector<T> dense = unwritten<T>(count * n);
    scatter(matrix.data(), stride, count, n, dense.data());
    right = right && finite(dense);
  }
  std::vector<Sample> samples(n);
  sample(points, n, samples.data());
  std::vector<double> sums(n + points);
  std::vector<T> table = unwritten<T>(points);
  interpolate_backward(dq.data(), d, stride, samples.data(), n, points, sums.data(), table.data());
  return right && finite(table);
}

template <typename T>
bool small_operators(const char* dtype) {
  for (const int64_t channels : {1, 5, 16, 31, 32}) {
    for (const int64_t height : {1, 3, 40}) {
      for (const int64_t width : {1, 7, 16, 33}) {
        if (!squeeze<T>(channels, height, width) || !elementwise<T>(channels, height, width) ||
            !pending<T>(channels, height, width, true) ||
            !pending<T>(channels, height, width, false) ||
            (channels <= kChannels && !convolution<T>(channels, height, width))) {
          return std::printf("wrong: %s, map of %ldx%ldx%ld\n", dtype, long(channels), long(height),
                             long(width)),
                 false;
        }
      }
    }
  }
  for (const int64_t n : {1, 2, 7, 16, 17, 33, 130, 256}) {
    for (const int64_t d : {1, 3, 16, 20}) {
      for (const int64_t points : {1, 16}) {
        if (!attention<T>(n, d, 2 * d - 1, points)) {
          return std::printf("wrong: %s, axis of %ld, D=%ld\n", dtype, long(n), long(d)), false;
        }
      }
    }
  }
  return true;
}

}  // namespace

int main() {
#if defined(__AVX512BW__)
  if (!__builtin_cpu_supports("avx512bw")) return std::puts("this machine has no AVX-512"), 0;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return std::puts("this machine has no AVX2"), 0;
#endif
  if (!small_operators<float>("float32") || !small_operators<c10::BFloat16>("bfloat16") ||
      !small_operators<c10::Half>("float16")) {
    return 1;
  }
  int64_t right = 0;
  for (const Case& c : kCases) {
    if (!check<float>(c, "float32", 2e-5) || !check<c10::BFloat16>(c, "bfloat16", 8e-3) ||
        !check<c10::Half>(c, "float16", 1e-3)) {
      return 1;
    }
    right += 3;
  }
  std::printf("small operators finite, %ld blocks right\n", long(right));
}
