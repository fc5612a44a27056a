// A map weighed by the sigmoid of another, and the gradients. Raw pointers only: no tensors here.
//
//   hard:  sigma(t) = clamp(t + 3, 0, 6) / 6          true:  sigma(t) = 1 / (1 + exp(-t))
//   out = sigma(x) * y        dx = dout * y * sigma'(x)        dy = dout * sigma(x)
//
// sigma' of the hard one is zero at -3 and 3 themselves and beyond, as PyTorch has it. All maps
// share one dense layout: `n` elements from each pointer on. Arithmetic is float32.
#pragma once

#include <cstdint>

namespace seaattn {

template <typename T>
void gate(const T* x, const T* y, int64_t n, bool hard, T* out);

template <typename T>
void gate_backward(const T* gradient, const T* x, const T* y, int64_t n, bool hard, T* dx, T* dy);

}  // namespace seaattn
