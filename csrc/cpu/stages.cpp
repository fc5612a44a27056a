#include "stages.h"

#include <algorithm>

#include "lanes.h"

namespace seaattn {
namespace {

enum Code { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu };

// NaN is neither below nor above a bound, and goes through.
template <int kCode>
SEAATTN_INLINE Lanes act(Lanes x, float negative_slope) {
  if constexpr (kCode == kRelu) return at_least(Lanes{}, x);
  if constexpr (kCode == kRelu6) return clamp6(x);
  if constexpr (kCode == kLeakyRelu) return select(x < 0.0f, x * negative_slope, x);
  if constexpr (kCode == kSilu) return x * sigmoid(x);
  return x;
}

template <int kCode>
SEAATTN_INLINE void depthwise_body(const float* field, const Segment* segments, int64_t count,
                                   const float* weight, const float* bias, float slope,
                                   float* out) {
  Lanes w[9];
  for (int t = 0; t < 9; ++t) w[t] = load(weight + t * kPanel);
  const Lanes start = load(bias);
  for (const Segment* s = segments; s < segments + count; ++s) {
    const float* above = field + s->above;
    const float* here = field + s->here;
    const float* below = field + s->below;
    for (int64_t p = 0; p < s->pixels; ++p) {
      Lanes of_above = start, of_here = {}, of_below = {};
      for (int t = 0; t < 3; ++t) {
        of_above += load(above + (p + t) * kPanel) * w[t];
        of_here += load(here + (p + t) * kPanel) * w[3 + t];
        of_below += load(below + (p + t) * kPanel) * w[6 + t];
      }
      store(out, act<kCode>(of_above + of_here + of_below, slope));
      out += kPanel;
    }
  }
}

template <int kCode>
SEAATTN_INLINE void mix_body(const float* field, const Segment* segments, int64_t count,
                             const float* row, const float* column, float slope, float* out) {
  for (const Segment* s = segments; s < segments + count; ++s) {
    const float* v = field + s->here + kPanel;
    const float* of_column = column + s->column * kPanel;
    const Lanes of_row = load(row + s->row * kPanel);
    for (int64_t p = 0; p < s->pixels; ++p) {
      const Lanes sum = load(v + p * kPanel) + (of_row + load(of_column + p * kPanel));
      store(out, act<kCode>(sum, slope));
      out += kPanel;
    }
  }
}

template <int kCode>
SEAATTN_INLINE void activate_body(int64_t count, float* x, float slope) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, act<kCode>(load(x + i), slope));
}

#define SEAATTN_BY_ACTIVATION(body, ...)    \
  switch (activation.code) {                \
    case kRelu:                             \
      return body<kRelu>(__VA_ARGS__);      \
    case kRelu6:                            \
      return body<kRelu6>(__VA_ARGS__);     \
    case kLeakyRelu:                        \
      return body<kLeakyRelu>(__VA_ARGS__); \
    case kSilu:                             \
      return body<kSilu>(__VA_ARGS__);      \
    default:                                \
      return body<kIdentity>(__VA_ARGS__);  \
  }

}  // namespace

SEAATTN_CLONES void depthwise(const float* field, const Segment* segments, int64_t count,
                              const float* weight, const float* bias, Activation activation,
                              float* out){SEAATTN_BY_ACTIVATION(depthwise_body, field, segments,
                                                                count, weight, bias,
                                                                activation.negative_slope, out)}

SEAATTN_CLONES void mix(const float* field, const Segment* segments, int64_t count,
                        const float* row, const float* column, Activation activation,
                        float* out){SEAATTN_BY_ACTIVATION(mix_body, field, segments, count, row,
                                                          column, activation.negative_slope, out)}

SEAATTN_CLONES void activate(int64_t count, float* x, Activation activation){
    SEAATTN_BY_ACTIVATION(activate_body, count, x, activation.negative_slope)}

SEAATTN_CLONES void weigh(int64_t count, float* x, const float* y, bool hard) {
  if (hard) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(x + i, clamp6(load(x + i) + 3.0f) * (1.0f / 6.0f) * load(y + i));
    }
  } else {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(x + i, sigmoid(load(x + i)) * load(y + i));
    }
  }
}

SEAATTN_CLONES void panel_means(const float* field, int64_t height, int64_t width, int64_t pitch,
                                float* row, float* column) {
  std::fill(column, column + width * kPanel, 0.0f);
  for (int64_t i = 0; i < height; ++i) {
    Lanes sum = {};
    for (int64_t j = 0; j < width; ++j) {
      const Lanes value = load(field + (i * pitch + j) * kPanel);
      sum += value;
      store(column + j * kPanel, load(column + j * kPanel) + value);
    }
    store(row + i * kPanel, sum / static_cast<float>(width));
  }
  for (int64_t j = 0; j < width; ++j) {
    store(column + j * kPanel, load(column + j * kPanel) / static_cast<float>(height));
  }
}

SEAATTN_CLONES void add_run(int64_t count, const float* run, double* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
}

SEAATTN_CLONES void round_sums(int64_t pixels, const double* sums, const float* bias, float* out) {
  for (int64_t i = 0; i < pixels * kPanel; ++i) {
    out[i] = static_cast<float>(sums[i] + bias[i % kPanel]);
  }
}

}  // namespace seaattn
