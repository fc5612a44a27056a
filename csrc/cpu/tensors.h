// What the tensor checks of several operators share.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

#define SEAATTN_DISPATCH(dtype, name, ...)                                       \
  AT_DISPATCH_SWITCH(dtype, name,                                                \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

namespace seaattn {

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

inline bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

}  // namespace seaattn
