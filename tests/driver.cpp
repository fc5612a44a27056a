// Stands in for libcuda.so.1 where there is no GPU: a launch calls a function of test_launcher.py.

using Launch = int(void* function, unsigned programs, unsigned threads, unsigned shared_bytes,
                   void* stream, void** parameters);

static Launch* on_launch = nullptr;

extern "C" {

void set_launch(Launch* launch) {
  on_launch = launch;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** parameters, void** extra) {
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra != nullptr) return 1;
  return on_launch ? on_launch(function, grid_x, block_x, shared_bytes, stream, parameters) : 0;
}

int cuCtxGetCurrent(void** context) {
  *context = &on_launch;
  return 0;
}

int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
}
