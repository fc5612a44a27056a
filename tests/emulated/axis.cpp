// The entries of csrc/cuda/axis.cu.

#include "axis.cu"

#undef SEAATTN_ENTRY
#undef __cluster_dims__
#define __cluster_dims__(X, Y, Z) {X, Y, Z}
#define SEAATTN_ENTRY(NAME, T, D, E, HEADS)                                                \
  entry("axis_" #NAME "_" #D "_" #E "_" #HEADS, SEAATTN_CLUSTER(HEADS), seaattn::kThreads, \
        axis_##NAME##_##D##_##E##_##HEADS),

namespace emulated {

static const Entry all[] = {
    SEAATTN_ENTRIES(f16, ) SEAATTN_ENTRIES(bf16, )  // with a comma after each
};
const Entry* const entries = all;
const int entry_count = sizeof all / sizeof *all;

}  // namespace emulated
