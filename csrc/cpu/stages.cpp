#include "stages.h"

#include <algorithm>

#include "simd.h"

#define SEAATTN_BY_ACTIVATION(body, ...) \
  switch (activation) {                  \
    case kIdentity:                      \
      body<kIdentity>(__VA_ARGS__);      \
      break;                             \
    case kRelu:                          \
      body<kRelu>(__VA_ARGS__);          \
      break;                             \
    case kRelu6:                         \
      body<kRelu6>(__VA_ARGS__);         \
      break;                             \
    case kLeakyRelu:                     \
      body<kLeakyRelu>(__VA_ARGS__);     \
      break;                             \
    case kSilu:                          \
      body<kSilu>(__VA_ARGS__);          \
      break;                             \
  }

namespace seaattn {
namespace {

template <Activation kActivation, typename Isa>
SEAATTN_INLINE void convolve(Isa, const float* field, const Segment* segments, int64_t count,
                             const float* weight, const float* bias, float slope, float* out) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  for (int64_t lane = 0; lane < kPanel; lane += kWidth) {
    Vector w[9];
    for (int t = 0; t < 9; ++t) w[t] = *(const Vector*)(weight + t * kPanel + lane);
    const Vector start = *(const Vector*)(bias + lane);
    float* to = out + lane;
    for (const Segment* s = segments; s < segments + count; ++s) {
      const float* above = field + s->above + lane;
      const float* here = field + s->here + lane;
      const float* below = field + s->below + lane;
      for (int64_t p = 0; p < s->pixels; ++p) {
        Vector of_above = start, of_here = {}, of_below = {};
        for (int t = 0; t < 3; ++t) {
          of_above += *(const Vector*)(above + (p + t) * kPanel) * w[t];
          of_here += *(const Vector*)(here + (p + t) * kPanel) * w[3 + t];
          of_below += *(const Vector*)(below + (p + t) * kPanel) * w[6 + t];
        }
        float sums[kWidth];
        *(Vector*)sums = of_above + of_here + of_below;
#pragma omp simd
        for (int l = 0; l < kWidth; ++l) to[l] = activate<kActivation>(sums[l], slope);
        to += kPanel;
      }
    }
  }
}

template <typename Isa>
SEAATTN_INLINE void depthwise_body(const float* field, const Segment* segments, int64_t count,
                                   const float* weight, const float* bias, Activation activation,
                                   float slope, float* out) {
  SEAATTN_BY_ACTIVATION(convolve, Isa(), field, segments, count, weight, bias, slope, out);
}

template <typename Isa>
SEAATTN_INLINE void panel_means_body(const float* field, int64_t height, int64_t width,
                                     int64_t pitch, float* row, float* column) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  const float per_width = 1.0f / width, per_height = 1.0f / height;
  for (int64_t lane = 0; lane < kPanel; lane += kWidth) {
    for (int64_t j = 0; j < width; ++j) *(Vector*)(column + j * kPanel + lane) = Vector{};
    for (int64_t i = 0; i < height; ++i) {
      Vector sum = {};
      for (int64_t j = 0; j < width; ++j) {
        const Vector value = *(const Vector*)(field + (i * pitch + j) * kPanel + lane);
        sum += value;
        *(Vector*)(column + j * kPanel + lane) += value;
      }
      *(Vector*)(row + i * kPanel + lane) = sum * per_width;
    }
    for (int64_t j = 0; j < width; ++j) *(Vector*)(column + j * kPanel + lane) *= per_height;
  }
}

template <Activation kActivation>
SEAATTN_INLINE void mix_body(const float* field, const Segment* segments, int64_t count,
                             const float* row, const float* column, float slope, float* out) {
  for (const Segment* s = segments; s < segments + count; ++s) {
    const float* v = field + s->here + kPanel;
    const float* of_row = row + s->row * kPanel;
    const float* of_column = column + s->column * kPanel;
    for (int64_t p = 0; p < s->pixels; ++p) {
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        const float sum = v[p * kPanel + l] + (of_row[l] + of_column[p * kPanel + l]);
        out[l] = activate<kActivation>(sum, slope);
      }
      out += kPanel;
    }
  }
}

template <Activation kActivation>
SEAATTN_INLINE void activate_body(int64_t count, float* x, float slope) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = activate<kActivation>(x[i], slope);
}

}  // namespace

SEAATTN_VERSIONS(depthwise,
                 (const float* field, const Segment* segments, int64_t count, const float* weight,
                  const float* bias, Activation activation, float slope, float* out),
                 (field, segments, count, weight, bias, activation, slope, out))
SEAATTN_VERSIONS(panel_means,
                 (const float* field, int64_t height, int64_t width, int64_t pitch, float* row,
                  float* column),
                 (field, height, width, pitch, row, column))

SEAATTN_CLONES void mix(const float* field, const Segment* segments, int64_t count,
                        const float* row, const float* column, Activation activation, float slope,
                        float* out) {
  SEAATTN_BY_ACTIVATION(mix_body, field, segments, count, row, column, slope, out);
}

SEAATTN_CLONES void activate(int64_t count, float* x, Activation activation, float slope) {
  SEAATTN_BY_ACTIVATION(activate_body, count, x, slope);
}

SEAATTN_CLONES void add_run(int64_t count, const float* run, double* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
}

SEAATTN_CLONES void round_sums(int64_t pixels, const double* sums, const float* bias, float* out) {
  for (int64_t p = 0; p < pixels; ++p) {
#pragma omp simd
    for (int64_t l = 0; l < kPanel; ++l) {
      out[p * kPanel + l] = static_cast<float>(sums[p * kPanel + l] + bias[l]);
    }
  }
}

}  // namespace seaattn
