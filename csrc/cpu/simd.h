// One body, compiled for several instruction sets and chosen when the library is loaded, so that a
// library built on one machine runs on another.
//
//   SEAATTN_CLONES   before a function that is no template
//   SEAATTN_INLINE   before the bodies it calls, so that they are compiled with it
//   SEAATTN_SIMD     the instruction sets, as text
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SEAATTN_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#define SEAATTN_INLINE inline __attribute__((always_inline))
#define SEAATTN_SIMD "baseline, avx2, avx512"
#else
#define SEAATTN_CLONES
#define SEAATTN_INLINE inline
#define SEAATTN_SIMD "baseline"
#endif
