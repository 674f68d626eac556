/* A CUDA driver without a GPU, for what is to be compiled but not run: device memory is host memory, and a launch does nothing.
 * It shows a device of compute capability CAPABILITY (90 unless set), and appends to the file PTX what PTX it is given, and a
 * line each time that it is waited for. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef unsigned long long Pointer;

static int capability(void) {
    const char *text = getenv("CAPABILITY");
    return text ? atoi(text) : 90;
}

Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
Result cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "none", length), device; }
Result cuDeviceGetPCIBusId(char *id, int length, int device) { return strncpy(id, "0000:00:00.0", length), device; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)4 << 30, device; }

Result cuDeviceGetLuid(char *luid, unsigned *mask, int device) {
    memset(luid, 0, 8);
    return *mask = 1, device;
}

/* By the numbers of CUdevice_attribute. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;             /* threads of a block */
    case 2: case 3: *value = 1024; break;     /* block, x and y */
    case 4: *value = 64; break;               /* block, z */
    case 5: *value = 2147483647; break;       /* grid, x */
    case 6: case 7: *value = 65535; break;    /* grid, y and z */
    case 8: *value = 49152; break;            /* shared memory of a block */
    case 10: *value = 32; break;              /* warp */
    case 16: *value = 132; break;             /* multiprocessors */
    case 75: *value = capability() / 10; break;
    case 76: *value = capability() % 10; break;
    case 97: *value = 101376; break;          /* shared memory of a block, on request */
    default: *value = 1;
    }
    return device;
}

static int anything;
static Result some(void **handle) { return *handle = &anything, 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return some(context) + device; }
Result cuCtxGetCurrent(void **context) { return some(context); }
Result cuStreamCreate(void **stream, unsigned flags) { return some(stream) + 0 * flags; }
Result cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return some(stream) + 0 * flags + 0 * priority; }
Result cuEventCreate(void **event, unsigned flags) { return some(event) + 0 * flags; }

static Result note(const char *text) {
    const char *path = getenv("PTX");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fputs(text, file);
        fclose(file);
    }
    return 0;
}
Result cuModuleLoadData(void **module, const void *image) { return note(image) + some(module); }
Result cuEventSynchronize(void *event) { return event ? note("// waited\n") : 1; }
Result cuStreamSynchronize(void *stream) { return note("// waited\n") + 0 * !stream; }
Result cuCtxSynchronize(void) { return note("// waited\n"); }

Result cuModuleGetFunction(void **function, void *module, const char *name) { return module && name ? some(function) : 1; }
Result cuEventElapsedTime_v2(float *ms, void *from, void *to) { return *ms = 1, from && to ? 0 : 1; }
Result cuEventElapsedTime(float *ms, void *from, void *to) { return cuEventElapsedTime_v2(ms, from, to); }
Result cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0; }

static Result take(Pointer *memory, size_t bytes) {
    *memory = (Pointer)calloc(1, bytes ? bytes : 1);
    return *memory ? 0 : 2;
}
Result cuMemAlloc_v2(Pointer *memory, size_t bytes) { return take(memory, bytes); }
Result cuMemAllocAsync(Pointer *memory, size_t bytes, void *stream) { return take(memory, bytes) + 0 * !stream; }
Result cuMemAllocHost_v2(void **memory, size_t bytes) { return take((Pointer *)memory, bytes); }
Result cuMemFree_v2(Pointer memory) { return free((void *)memory), 0; }
Result cuMemFreeAsync(Pointer memory, void *stream) { return free((void *)memory), 0 * !stream; }
Result cuMemFreeHost(void *memory) { return free(memory), 0; }

static Result copy(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
Result cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes) { return copy((void *)to, from, bytes); }
Result cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes) { return copy(to, (void *)from, bytes); }
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes) { return copy((void *)to, (void *)from, bytes); }

/* Whatever their arguments. */
#define NOTHING(name) Result name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuDevicePrimaryCtxRelease)
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuStreamWaitEvent)
NOTHING(cuStreamDestroy_v2)
NOTHING(cuStreamQuery)
NOTHING(cuEventRecord)
NOTHING(cuEventQuery)
NOTHING(cuEventDestroy_v2)
NOTHING(cuFuncSetAttribute)
NOTHING(cuLaunchKernel)
NOTHING(cuLaunchKernelEx)
NOTHING(cuMemcpy2DAsync_v2)
NOTHING(cuMemsetD8Async)
