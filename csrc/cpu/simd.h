// One body, compiled for several instruction sets and chosen when the library is loaded, so that a
// library built on one machine runs on another.
//
//   SEAATTN_CLONES    before a function that is no template
//   SEAATTN_INLINE    before the bodies it calls, so that they are compiled with it
//   SEAATTN_VERSIONS  a function whose body, `name_body`, is a template over the instruction set
//   SEAATTN_SIMD      the instruction sets, as text
//
// SEAATTN_ISA (Baseline, Avx2, Avx512) fixes one of them, for the compiler's flags to match.
#pragma once

#include <cstdint>

namespace seaattn {

// Vectors of the language, wherever they lie in memory.
template <int kWidth>
struct Vectors {
  typedef float Float __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
  typedef int32_t Integer __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
};

// What a body may ask of an instruction set: the floats of a register, and the rows of pixels and
// the panels of sixteen columns whose sums a matrix product keeps in registers.
struct Baseline {
#if defined(__aarch64__)
  static constexpr int kWidth = 4, kRows = 6, kPanels = 1;  // 24 of 32 registers
#else
  static constexpr int kWidth = 4, kRows = 3, kPanels = 1;  // 12 of 16
#endif
};
struct Avx2 {
  static constexpr int kWidth = 8, kRows = 6, kPanels = 1;  // 12 of 16
};
struct Avx512 {
  static constexpr int kWidth = 16, kRows = 6, kPanels = 4;  // 24 of 32
};

}  // namespace seaattn

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(SEAATTN_ISA)
#define SEAATTN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define SEAATTN_INLINE inline __attribute__((always_inline))
#define SEAATTN_VERSIONS(name, parameters, arguments)                         \
  __attribute__((target("default"))) void name##_versions parameters {        \
    name##_body<Baseline> arguments;                                          \
  }                                                                           \
  __attribute__((target("arch=x86-64-v3"))) void name##_versions parameters { \
    name##_body<Avx2> arguments;                                              \
  }                                                                           \
  __attribute__((target("arch=x86-64-v4"))) void name##_versions parameters { \
    name##_body<Avx512> arguments;                                            \
  }                                                                           \
  void name parameters {                                                      \
    name##_versions arguments;                                                \
  }
#define SEAATTN_SIMD "baseline, avx2, avx512"
#else
#ifndef SEAATTN_ISA
#define SEAATTN_ISA Baseline
#endif
#define SEAATTN_CLONES
#define SEAATTN_INLINE inline
#define SEAATTN_VERSIONS(name, parameters, arguments) \
  void name parameters {                              \
    name##_body<SEAATTN_ISA> arguments;               \
  }
#define SEAATTN_SIMD "baseline"
#endif

namespace seaattn {

// The sum of sixteen lanes, halves upon halves.
SEAATTN_INLINE float sum_of(const Vectors<16>::Float& lanes) {
  const Vectors<8>::Float* eights = (const Vectors<8>::Float*)&lanes;
  const Vectors<8>::Float eight = eights[0] + eights[1];
  const Vectors<4>::Float* fours = (const Vectors<4>::Float*)&eight;
  const Vectors<4>::Float four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace seaattn
