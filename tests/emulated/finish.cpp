// The entries of csrc/cuda/finish.cu.

#include "finish.cu"

#undef SEAATTN_ENTRY
#undef __cluster_dims__
#define __cluster_dims__(X, Y, Z) {X, Y, Z}
#define SEAATTN_ENTRY(NAME, T, TH, N, PARTS, BLOCKS)                                          \
  entry("finish_" #NAME "_" #TH "_" #N "_" #PARTS, SEAATTN_CLUSTER(PARTS), seaattn::kThreads, \
        finish_##NAME##_##TH##_##N##_##PARTS),

namespace emulated {

static const Entry all[] = {
    SEAATTN_ENTRIES(f16, ) SEAATTN_ENTRIES(bf16, )  // with a comma after each
};
const Entry* const entries = all;
const int entry_count = sizeof all / sizeof *all;

}  // namespace emulated
