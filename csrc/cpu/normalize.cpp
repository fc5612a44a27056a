#include "normalize.h"

#include <algorithm>

#include "elementwise.h"
#include "simd.h"

namespace seaattn {
namespace {

constexpr int kLanes = 16;
typedef Vectors<kLanes>::Float Lanes;
// Elements of a line that are summed in float32.
constexpr int64_t kRun = 2048;
// A division takes longer than all that is around it.
constexpr float kSixth = 1.0f / 6.0f;

template <bool kPixelwise>
SEAATTN_INLINE float constant(const float* values, int64_t k) {
  return values[kPixelwise ? k : 0];
}

template <bool kPixelwise>
SEAATTN_INLINE float normalized(float y, Affine affine, int64_t k) {
  return (y - constant<kPixelwise>(affine.mean, k)) * constant<kPixelwise>(affine.scale, k) +
         constant<kPixelwise>(affine.shift, k);
}

template <bool kPixelwise>
SEAATTN_INLINE float added(Axes axes, int64_t k) {
  return constant<kPixelwise>(axes.row, k) + axes.column[k];
}

SEAATTN_INLINE Axes at_line(Axes axes, const Lines& lines, int64_t line) {
  if (!axes.row) return axes;
  return {axes.row + line * lines.row_step, axes.column + line * lines.column_step};
}

// What an element puts out, by position in its line.
template <bool kPixelwise, bool kAxes, bool kBackward, Activation kActivation, typename T>
struct Activated {
  const T *gradient, *y;
  Affine affine;
  Axes axes;
  float slope;

  SEAATTN_INLINE float operator()(int64_t k) const {
    float z = normalized<kPixelwise>(widen(y[k]), affine, k);
    if constexpr (kAxes) z += added<kPixelwise>(axes, k);
    if constexpr (kBackward) {
      return activate_backward<kActivation>(widen(gradient[k]), z, slope);
    } else {
      return activate<kActivation>(z, slope);
    }
  }
};

// The gradient of n(y), and y less its mean.
struct Pair {
  float gradient, deviation;
};

template <bool kPixelwise, bool kAxes, Activation kActivation, typename T>
struct Incoming {
  const T *gradient, *y;
  Affine affine;
  Axes axes;
  float slope;

  SEAATTN_INLINE Pair operator()(int64_t k) const {
    const float value = widen(y[k]), g = widen(gradient[k]);
    const float deviation = value - constant<kPixelwise>(affine.mean, k);
    if constexpr (kAxes) {
      return {g + added<kPixelwise>(axes, k), deviation};
    } else {
      const float z = normalized<kPixelwise>(value, affine, k);
      return {activate_backward<kActivation>(g, z, slope), deviation};
    }
  }
};

// The gradients of n(x) and of n(y), and both maps less their means.
struct PairOfPairs {
  Pair x, y;
};

template <bool kPixelwise, bool kHard, typename T>
struct ThroughGate {
  const T *gradient, *x, *y;
  Affine of_x, of_y;

  SEAATTN_INLINE PairOfPairs operator()(int64_t k) const {
    const float g = widen(gradient[k]), from_x = widen(x[k]), from_y = widen(y[k]);
    const float t = normalized<kPixelwise>(from_x, of_x, k);
    const float weighed = g * normalized<kPixelwise>(from_y, of_y, k);
    const float x_deviation = from_x - constant<kPixelwise>(of_x.mean, k);
    const float y_deviation = from_y - constant<kPixelwise>(of_y.mean, k);
    if constexpr (kHard) {
      const float shifted = t + 3.0f;
      const float inside = choose((shifted <= 0.0f) | (shifted >= 6.0f), 0.0f, weighed * kSixth);
      return {{inside, x_deviation}, {g * (clamp6(shifted) * kSixth), y_deviation}};
    } else {
      const float weight = sigmoid(t);
      return {{weighed * weight * (1.0f - weight), x_deviation}, {g * weight, y_deviation}};
    }
  }
};

// Adds what `pairs` gives at each position of a line to sums of one channel.
template <int kCount, typename Pairs>
SEAATTN_INLINE void sum_line(int64_t length, const Pairs& pairs, double* const* sums) {
  for (int64_t begin = 0; begin < length; begin += kRun) {
    const int64_t end = std::min(begin + kRun, length);
    Lanes parts[2 * kCount] = {};
    float tail[2 * kCount] = {};
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      float g[kCount][kLanes], deviation[kCount][kLanes];
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) pairs.put(k + l, l, g, deviation);
      for (int i = 0; i < kCount; ++i) {
        const Lanes gradient = *(const Lanes*)g[i];
        parts[2 * i] += gradient;
        parts[2 * i + 1] += gradient * *(const Lanes*)deviation[i];
      }
    }
    for (; k < end; ++k) {
      float g[kCount][kLanes], deviation[kCount][kLanes];
      pairs.put(k, 0, g, deviation);
      for (int i = 0; i < kCount; ++i) {
        tail[2 * i] += g[i][0];
        tail[2 * i + 1] += g[i][0] * deviation[i][0];
      }
    }
    for (int i = 0; i < 2 * kCount; ++i) {
      *sums[i] += static_cast<double>(sum_of(parts[i])) + tail[i];
    }
  }
}

template <typename Function>
struct One {
  Function pair;
  template <typename Buffer>
  SEAATTN_INLINE void put(int64_t k, int l, Buffer& g, Buffer& deviation) const {
    const Pair found = pair(k);
    g[0][l] = found.gradient;
    deviation[0][l] = found.deviation;
  }
};

template <typename Function>
struct Two {
  Function pairs;
  template <typename Buffer>
  SEAATTN_INLINE void put(int64_t k, int l, Buffer& g, Buffer& deviation) const {
    const PairOfPairs found = pairs(k);
    g[0][l] = found.x.gradient;
    deviation[0][l] = found.x.deviation;
    g[1][l] = found.y.gradient;
    deviation[1][l] = found.y.deviation;
  }
};

template <typename Value, typename T>
SEAATTN_INLINE void put_line(const Value& value, int64_t length, T* to) {
#pragma omp simd
  for (int64_t k = 0; k < length; ++k) to[k] = narrow<T>(value(k));
}

template <bool kPixelwise, bool kAxes, Activation kActivation, typename T>
SEAATTN_INLINE void normalize_body(Lines lines, Reader<const T> y, Affine affine, Axes axes,
                                   float slope, Reader<T> out) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const Activated<kPixelwise, kAxes, false, kActivation, T> value = {
        nullptr, y.data + line * y.step, affine, at_line(axes, lines, line), slope};
    put_line(value, lines.length, out.data + line * out.step);
  }
}

template <bool kPixelwise, bool kAxes, Activation kActivation, typename T>
SEAATTN_INLINE void add_backward_body(Lines lines, Reader<const T> gradient, Reader<const T> y,
                                      Affine affine, Axes axes, float slope, Reader<T> out) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const Activated<kPixelwise, kAxes, true, kActivation, T> value = {
        gradient.data + line * gradient.step, y.data + line * y.step, affine,
        at_line(axes, lines, line), slope};
    put_line(value, lines.length, out.data + line * out.step);
  }
}

template <bool kPixelwise, bool kAxes, Activation kActivation, typename T, typename Sum>
SEAATTN_INLINE void sums_body(Lines lines, Reader<const T> gradient, Reader<const T> y,
                              Affine affine, Axes axes, float slope, Sum* sum, Sum* dot) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const Incoming<kPixelwise, kAxes, kActivation, T> pair = {gradient.data + line * gradient.step,
                                                              y.data + line * y.step, affine,
                                                              at_line(axes, lines, line), slope};
    if constexpr (kPixelwise) {
#pragma omp simd
      for (int64_t k = 0; k < lines.length; ++k) {
        const Pair found = pair(k);
        sum[k] += found.gradient;
        dot[k] += found.gradient * found.deviation;
      }
    } else {
      Sum* const sums[] = {sum, dot};
      sum_line<1>(lines.length, One<decltype(pair)>{pair}, sums);
    }
  }
}

template <bool kPixelwise>
SEAATTN_INLINE float to_raw(float gradient, float deviation, const Affine& affine,
                            const Terms& terms, int64_t k) {
  return constant<kPixelwise>(affine.scale, k) *
         (gradient - constant<kPixelwise>(terms.offset, k) -
          deviation * constant<kPixelwise>(terms.factor, k));
}

template <bool kPixelwise, bool kAxes, Activation kActivation, typename T>
SEAATTN_INLINE void backward_body(Lines lines, Reader<const T> gradient, Reader<const T> y,
                                  Affine affine, Terms terms, Axes axes, float slope,
                                  Reader<T> out) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const Incoming<kPixelwise, kAxes, kActivation, T> pair = {gradient.data + line * gradient.step,
                                                              y.data + line * y.step, affine,
                                                              at_line(axes, lines, line), slope};
    T* to = out.data + line * out.step;
#pragma omp simd
    for (int64_t k = 0; k < lines.length; ++k) {
      const Pair found = pair(k);
      to[k] = narrow<T>(to_raw<kPixelwise>(found.gradient, found.deviation, affine, terms, k));
    }
  }
}

template <bool kPixelwise, bool kHard, typename T>
SEAATTN_INLINE void gate_body(Lines lines, const Gated<T>& maps, Reader<T> out) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const T *x = maps.x.data + line * maps.x.step, *y = maps.y.data + line * maps.y.step;
    T* to = out.data + line * out.step;
#pragma omp simd
    for (int64_t k = 0; k < lines.length; ++k) {
      const float t = normalized<kPixelwise>(widen(x[k]), maps.of_x, k);
      const float weight = kHard ? clamp6(t + 3.0f) * kSixth : sigmoid(t);
      to[k] = narrow<T>(weight * normalized<kPixelwise>(widen(y[k]), maps.of_y, k));
    }
  }
}

template <bool kPixelwise, bool kHard, typename T>
SEAATTN_INLINE ThroughGate<kPixelwise, kHard, T> through_gate(Reader<const T> gradient,
                                                              const Gated<T>& maps, int64_t line) {
  return {gradient.data + line * gradient.step, maps.x.data + line * maps.x.step,
          maps.y.data + line * maps.y.step, maps.of_x, maps.of_y};
}

template <bool kPixelwise, bool kHard, typename T, typename Sum>
SEAATTN_INLINE void gate_sums_body(Lines lines, Reader<const T> gradient, const Gated<T>& maps,
                                   Sum* const* sums) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const auto pairs = through_gate<kPixelwise, kHard>(gradient, maps, line);
    if constexpr (kPixelwise) {
      Sum *of_x = sums[0], *x_dot = sums[1], *of_y = sums[2], *y_dot = sums[3];
#pragma omp simd
      for (int64_t k = 0; k < lines.length; ++k) {
        const PairOfPairs found = pairs(k);
        of_x[k] += found.x.gradient;
        x_dot[k] += found.x.gradient * found.x.deviation;
        of_y[k] += found.y.gradient;
        y_dot[k] += found.y.gradient * found.y.deviation;
      }
    } else {
      sum_line<2>(lines.length, Two<decltype(pairs)>{pairs}, sums);
    }
  }
}

template <bool kPixelwise, bool kHard, typename T>
SEAATTN_INLINE void gate_backward_body(Lines lines, Reader<const T> gradient, const Gated<T>& maps,
                                       Terms of_x, Terms of_y, Reader<T> dx, Reader<T> dy) {
  for (int64_t line = 0; line < lines.count; ++line) {
    const auto pairs = through_gate<kPixelwise, kHard>(gradient, maps, line);
    T *to_x = dx.data + line * dx.step, *to_y = dy.data + line * dy.step;
#pragma omp simd
    for (int64_t k = 0; k < lines.length; ++k) {
      const PairOfPairs found = pairs(k);
      to_x[k] =
          narrow<T>(to_raw<kPixelwise>(found.x.gradient, found.x.deviation, maps.of_x, of_x, k));
      to_y[k] =
          narrow<T>(to_raw<kPixelwise>(found.y.gradient, found.y.deviation, maps.of_y, of_y, k));
    }
  }
}

// The sum of y, or of its squared deviations from `mean`.
template <bool kSquared, typename T>
SEAATTN_INLINE double line_body(const T* y, int64_t length, float mean) {
  double total = 0.0;
  for (int64_t begin = 0; begin < length; begin += kRun) {
    const int64_t end = std::min(begin + kRun, length);
    Lanes part = {};
    float tail = 0.0f;
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      float deviation[kLanes];
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) deviation[l] = widen(y[k + l]) - mean;
      const Lanes lanes = *(const Lanes*)deviation;
      part += kSquared ? lanes * lanes : lanes;
    }
    for (; k < end; ++k) {
      const float deviation = widen(y[k]) - mean;
      tail += kSquared ? deviation * deviation : deviation;
    }
    total += static_cast<double>(sum_of(part)) + tail;
  }
  return total;
}

template <typename T>
SEAATTN_INLINE void moments_body(Lines lines, Reader<const T> y, float* mean, float* deviations) {
  const int64_t channels = lines.length;
  std::fill(mean, mean + channels, 0.0f);
  std::fill(deviations, deviations + channels, 0.0f);
  // Of values less the first pixel's, which are of the size of a deviation.
  for (int64_t line = 1; line < lines.count; ++line) {
    const T* pixel = y.data + line * y.step;
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) mean[k] += widen(pixel[k]) - widen(y.data[k]);
  }
  const float share = 1.0f / lines.count;
#pragma omp simd
  for (int64_t k = 0; k < channels; ++k) mean[k] = widen(y.data[k]) + mean[k] * share;
  for (int64_t line = 0; line < lines.count; ++line) {
    const T* pixel = y.data + line * y.step;
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      const float deviation = widen(pixel[k]) - mean[k];
      deviations[k] += deviation * deviation;
    }
  }
}

}  // namespace

// One call of a body for each activation; `kFirst` are the template arguments before it.
#define SEAATTN_ACTIVATIONS(body, kFirst, kSecond, ...)      \
  switch (activation) {                                      \
    case kIdentity:                                          \
      return body<kFirst, kSecond, kIdentity>(__VA_ARGS__);  \
    case kRelu:                                              \
      return body<kFirst, kSecond, kRelu>(__VA_ARGS__);      \
    case kRelu6:                                             \
      return body<kFirst, kSecond, kRelu6>(__VA_ARGS__);     \
    case kLeakyRelu:                                         \
      return body<kFirst, kSecond, kLeakyRelu>(__VA_ARGS__); \
    case kSilu:                                              \
      return body<kFirst, kSecond, kSilu>(__VA_ARGS__);      \
  }

// Clones need functions that are no templates: one set for each dtype. What is added along the axes
// goes with no activation, except in a forward and its gradient.
#define SEAATTN_INSTANTIATE(T)                                                                     \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_lines<T>(Lines lines, Reader<const T> gradient, Reader<const T> y, \
                                         Affine affine, Axes axes, Activation activation,          \
                                         float slope, Reader<T> out) {                             \
    if (gradient.data && lines.pixels) {                                                           \
      SEAATTN_ACTIVATIONS(add_backward_body, true, true, lines, gradient, y, affine, axes, slope,  \
                          out)                                                                     \
    } else if (gradient.data) {                                                                    \
      SEAATTN_ACTIVATIONS(add_backward_body, false, true, lines, gradient, y, affine, axes, slope, \
                          out)                                                                     \
    } else if (lines.pixels && axes.row) {                                                         \
      SEAATTN_ACTIVATIONS(normalize_body, true, true, lines, y, affine, axes, slope, out)          \
    } else if (lines.pixels) {                                                                     \
      SEAATTN_ACTIVATIONS(normalize_body, true, false, lines, y, affine, axes, slope, out)         \
    } else if (axes.row) {                                                                         \
      SEAATTN_ACTIVATIONS(normalize_body, false, true, lines, y, affine, axes, slope, out)         \
    } else {                                                                                       \
      SEAATTN_ACTIVATIONS(normalize_body, false, false, lines, y, affine, axes, slope, out)        \
    }                                                                                              \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_sums_lines<T, float>(                                              \
      Lines lines, Reader<const T> gradient, Reader<const T> y, Affine affine, Axes axes,          \
      Activation activation, float slope, float* sum, float* dot) {                                \
    if (axes.row) {                                                                                \
      return sums_body<true, true, kIdentity>(lines, gradient, y, affine, axes, slope, sum, dot);  \
    }                                                                                              \
    SEAATTN_ACTIVATIONS(sums_body, true, false, lines, gradient, y, affine, axes, slope, sum, dot) \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_sums_lines<T, double>(                                             \
      Lines lines, Reader<const T> gradient, Reader<const T> y, Affine affine, Axes axes,          \
      Activation activation, float slope, double* sum, double* dot) {                              \
    if (axes.row) {                                                                                \
      return sums_body<false, true, kIdentity>(lines, gradient, y, affine, axes, slope, sum, dot); \
    }                                                                                              \
    SEAATTN_ACTIVATIONS(sums_body, false, false, lines, gradient, y, affine, axes, slope, sum,     \
                        dot)                                                                       \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_backward_lines<T>(                                                 \
      Lines lines, Reader<const T> gradient, Reader<const T> y, Affine affine, Terms terms,        \
      Axes axes, Activation activation, float slope, Reader<T> out) {                              \
    if (lines.pixels && axes.row) {                                                                \
      return backward_body<true, true, kIdentity>(lines, gradient, y, affine, terms, axes, slope,  \
                                                  out);                                            \
    } else if (axes.row) {                                                                         \
      return backward_body<false, true, kIdentity>(lines, gradient, y, affine, terms, axes, slope, \
                                                   out);                                           \
    } else if (lines.pixels) {                                                                     \
      SEAATTN_ACTIVATIONS(backward_body, true, false, lines, gradient, y, affine, terms, axes,     \
                          slope, out)                                                              \
    } else {                                                                                       \
      SEAATTN_ACTIVATIONS(backward_body, false, false, lines, gradient, y, affine, terms, axes,    \
                          slope, out)                                                              \
    }                                                                                              \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_gate_lines<T>(Lines lines, Gated<T> maps, Reader<T> out) {         \
    SEAATTN_GATED(gate_body, lines, maps, out)                                                     \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_gate_sums_lines<T, float>(Lines lines, Reader<const T> gradient,   \
                                                          Gated<T> maps, float* const sums[4]) {   \
    if (maps.hard) return gate_sums_body<true, true>(lines, gradient, maps, sums);                 \
    return gate_sums_body<true, false>(lines, gradient, maps, sums);                               \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_gate_sums_lines<T, double>(Lines lines, Reader<const T> gradient,  \
                                                           Gated<T> maps, double* const sums[4]) { \
    if (maps.hard) return gate_sums_body<false, true>(lines, gradient, maps, sums);                \
    return gate_sums_body<false, false>(lines, gradient, maps, sums);                              \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void normalize_gate_backward_lines<T>(Lines lines, Reader<const T> gradient,      \
                                                       Gated<T> maps, Terms of_x, Terms of_y,      \
                                                       Reader<T> dx, Reader<T> dy) {               \
    SEAATTN_GATED(gate_backward_body, lines, gradient, maps, of_x, of_y, dx, dy)                   \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES double deviations_of_line<T>(const T* y, int64_t length, float mean) {            \
    return line_body<true>(y, length, mean);                                                       \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES double sum_of_line<T>(const T* y, int64_t length) {                               \
    return line_body<false>(y, length, 0.0f);                                                      \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void moments_of_pixels<T>(Lines lines, Reader<const T> y, float* mean,            \
                                           float* deviations) {                                    \
    moments_body(lines, y, mean, deviations);                                                      \
  }

#define SEAATTN_GATED(body, ...)                         \
  if (lines.pixels) {                                    \
    if (maps.hard) return body<true, true>(__VA_ARGS__); \
    return body<true, false>(__VA_ARGS__);               \
  }                                                      \
  if (maps.hard) return body<false, true>(__VA_ARGS__);  \
  return body<false, false>(__VA_ARGS__);

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
