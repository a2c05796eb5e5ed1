// A CUDA driver without a device: it remembers what it is asked to launch, and refuses tensor maps that a device would refuse.
// Built as libcuda.so.1, which Triton's own launcher links to. CUDA driver API: results are 0, or an error's number.
#include <stdint.h>
#include <string.h>

typedef unsigned Unsigned;
typedef struct {
    Unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    Unsigned attribute_count;
} Config;

int launches = 0, maps = 0, refused = 0, wanted = 0;
Unsigned last_grid[3], last_threads;
uint64_t parameters[1024], last_map[16];

int cuInit(Unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *size, int limit) { return *size = 0, 0; }
int cuCtxSetLimit(int limit, size_t size) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuDevicePrimaryCtxRetain_v2(void **context, int device) { return *context = (void *)1, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "refused", 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)2, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)3, 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { return *count = 1, 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) { return memcpy(value, &address, 8), 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuTensorMapEncodeIm2col(void) { return 1; }

// Of an H100: shared memory of a block if asked for (97), compute capability (75, 76), threads of a warp (10).
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 97 ? 232448 : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 10 ? 32 : 65536;
    return 0;
}

// Threads of a block (0), registers, and no local memory (3).
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    return *value = attribute == 0 ? 1024 : attribute == 3 ? 0 : 128, 0;
}

// What the documentation of cuTensorMapEncodeTiled asks for, without interleaving.
int cuTensorMapEncodeTiled(void *map, int type, Unsigned rank, void *address, const uint64_t *shape, const uint64_t *strides,
                           const Unsigned *box, const Unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
    Unsigned size = type == 6 || type == 9 ? 2 : 0;  // float16, bfloat16
    Unsigned span[] = {0, 32, 64, 128};
    int valid = size && rank >= 1 && rank <= 5 && (uintptr_t)map % 64 == 0 && (uintptr_t)address % 16 == 0 && interleave == 0 &&
                box[0] * size % 16 == 0 && swizzle >= 0 && swizzle <= 3 && (!swizzle || box[0] * size <= span[swizzle]);
    for (Unsigned i = 0; i < rank; i++) {
        valid = valid && shape[i] >= 1 && shape[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
        valid = valid && (i + 1 == rank || (strides[i] % 16 == 0 && strides[i] < 1ull << 40));
        last_map[2 + i] = shape[i];
        last_map[8 + i] = i + 1 < rank ? strides[i] : 0;
    }
    last_map[0] = (uint64_t)(uintptr_t)address, last_map[1] = rank;
    maps++, refused += !valid;
    return !valid;
}

int cuLaunchKernelEx(const Config *config, void *function, void **arguments, void **extra) {
    launches++;
    memcpy(last_grid, config->grid, sizeof last_grid);
    last_threads = config->block[0];
    for (int i = 0; i < wanted; i++) memcpy(parameters + i, arguments[i], 8);
    return 0;
}
