#include "panels.h"

#include <algorithm>

#include "elementwise.h"
#include "simd.h"

namespace seaattn {
namespace {

template <int kWidth>
using Float = typename Vectors<kWidth>::Float;

template <int kWidth, typename T>
SEAATTN_INLINE Float<kWidth> read(const T* from) {
  float wide[kWidth];
#pragma omp simd
  for (int l = 0; l < kWidth; ++l) wide[l] = widen(from[l]);
  return *(const Float<kWidth>*)wide;
}

template <int kWidth, typename T>
SEAATTN_INLINE void write(T* to, Float<kWidth> values) {
  float wide[kWidth];
  *(Float<kWidth>*)wide = values;
#pragma omp simd
  for (int l = 0; l < kWidth; ++l) to[l] = narrow<T>(wide[l]);
}

// rows[i][j] -> rows[j][i], by rounds in which the rows of the two halves are interleaved.
template <int kWidth>
SEAATTN_INLINE void transpose(Float<kWidth> (&rows)[kWidth]) {
#if defined(__clang__)
  Float<kWidth> turned[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) turned[j][i] = rows[i][j];
  }
  for (int i = 0; i < kWidth; ++i) rows[i] = turned[i];
#else
  typename Vectors<kWidth>::Integer low, high;
  for (int l = 0; l < kWidth; ++l) {
    low[l] = l / 2 + l % 2 * kWidth;
    high[l] = low[l] + kWidth / 2;
  }
  for (int round = 1; round < kWidth; round *= 2) {
    Float<kWidth> next[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kWidth / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kWidth / 2], high);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
#endif
}

// `kWidth` pixels of up to `kWidth` channels, which lie in rows of the map.
template <int kWidth, typename T>
SEAATTN_INLINE void turn_in(const T* x, int64_t channel_stride, int64_t channels, float* panel) {
  Float<kWidth> rows[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    rows[i] = i < channels ? read<kWidth>(x + i * channel_stride) : Float<kWidth>{};
  }
  transpose<kWidth>(rows);
  for (int i = 0; i < kWidth; ++i) *(Float<kWidth>*)(panel + i * kPanel) = rows[i];
}

template <int kWidth, typename T>
SEAATTN_INLINE void turn_out(const float* panel, int64_t channels, T* out, int64_t channel_stride) {
  Float<kWidth> rows[kWidth];
  for (int i = 0; i < kWidth; ++i) rows[i] = *(const Float<kWidth>*)(panel + i * kPanel);
  transpose<kWidth>(rows);
  for (int i = 0; i < kWidth; ++i) {
    if (i < channels) write<kWidth>(out + i * channel_stride, rows[i]);
  }
}

template <typename Isa, typename T>
SEAATTN_INLINE void to_panels_body(Pixels<const T> x, int64_t channels, int64_t pixels,
                                   float* panels, int64_t stride) {
  constexpr int kWidth = Isa::kWidth;
  const bool rows = x.pixel_stride == 1 && pixels >= kWidth;
  for (int64_t c = 0; c < channels; c += kPanel, panels += stride) {
    const T* from = x.data + c * x.channel_stride;
    const int64_t count = std::min(kPanel, channels - c);
    if (rows) {
      // The last block ends with the last pixel, and writes some pixels again.
      for (int64_t block = 0; block < pixels; block += kWidth) {
        const int64_t p = std::min(block, pixels - kWidth);
        for (int64_t l = 0; l < kPanel; l += kWidth) {
          turn_in<kWidth>(from + l * x.channel_stride + p, x.channel_stride, count - l,
                          panels + p * kPanel + l);
        }
      }
    } else if (count == kPanel && x.channel_stride == 1) {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t l = 0; l < kPanel; l += kWidth) {
          *(Float<kWidth>*)(panels + p * kPanel + l) = read<kWidth>(from + p * x.pixel_stride + l);
        }
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t l = 0; l < kPanel; ++l) {
          panels[p * kPanel + l] =
              l < count ? widen(from[p * x.pixel_stride + l * x.channel_stride]) : 0.0f;
        }
      }
    }
  }
}

template <typename Isa, typename T>
SEAATTN_INLINE void from_panels_body(const float* panels, int64_t stride, int64_t channels,
                                     int64_t pixels, Pixels<T> out) {
  constexpr int kWidth = Isa::kWidth;
  const bool rows = out.pixel_stride == 1 && pixels >= kWidth;
  for (int64_t c = 0; c < channels; c += kPanel, panels += stride) {
    T* to = out.data + c * out.channel_stride;
    const int64_t count = std::min(kPanel, channels - c);
    if (rows) {
      for (int64_t block = 0; block < pixels; block += kWidth) {
        const int64_t p = std::min(block, pixels - kWidth);
        for (int64_t l = 0; l < kPanel; l += kWidth) {
          turn_out<kWidth>(panels + p * kPanel + l, count - l, to + l * out.channel_stride + p,
                           out.channel_stride);
        }
      }
    } else if (count == kPanel && out.channel_stride == 1) {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t l = 0; l < kPanel; l += kWidth) {
          write<kWidth>(to + p * out.pixel_stride + l,
                        *(const Float<kWidth>*)(panels + p * kPanel + l));
        }
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t l = 0; l < count; ++l) {
          to[p * out.pixel_stride + l * out.channel_stride] = narrow<T>(panels[p * kPanel + l]);
        }
      }
    }
  }
}

}  // namespace

#define SEAATTN_PANELS(T)                                                                     \
  SEAATTN_VERSIONS(                                                                           \
      to_panels,                                                                              \
      (Pixels<const T> x, int64_t channels, int64_t pixels, float* panels, int64_t stride),   \
      (x, channels, pixels, panels, stride))                                                  \
  SEAATTN_VERSIONS(                                                                           \
      from_panels,                                                                            \
      (const float* panels, int64_t stride, int64_t channels, int64_t pixels, Pixels<T> out), \
      (panels, stride, channels, pixels, out))

SEAATTN_PANELS(float)
SEAATTN_PANELS(c10::Half)
SEAATTN_PANELS(c10::BFloat16)

}  // namespace seaattn
