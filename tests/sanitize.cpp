// Runs the block of csrc/cpu on buffers of exactly the sizes that it states, for a sanitizer to
// watch, and compares it with plain loops in double precision. Neither torch nor Python is in the
// process. Returns 1 if a number is wrong.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "block.h"

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
  const BlockSizes sizes = {c.channels,  c.height,     c.width, c.heads, c.key_dim,
                            c.value_dim, c.activation, 0.1f,    c.hard};
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

}  // namespace

int main() {
#if defined(__AVX512BW__)
  if (!__builtin_cpu_supports("avx512bw")) return std::puts("this machine has no AVX-512"), 0;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return std::puts("this machine has no AVX2"), 0;
#endif
  int64_t right = 0;
  for (const Case& c : kCases) {
    if (!check<float>(c, "float32", 2e-5) || !check<c10::BFloat16>(c, "bfloat16", 8e-3) ||
        !check<c10::Half>(c, "float16", 1e-3)) {
      return 1;
    }
    right += 3;
  }
  std::printf("%ld blocks right\n", long(right));
}
