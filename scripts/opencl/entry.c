/* The libOpenCL.so.1 that OpenVINO's GPU plugin loads in place of the system's OpenCL loader.
 *
 * It opens Intel's OpenCL runtime for CPUs and forwards all calls to it, except for the functions that devices.c,
 * memory.c, programs.c and launch.c implement. It replaces the loader, so it reads no list of OpenCL vendors. It runs
 * on Linux on x86-64 only, like the runtime.
 */
#define _GNU_SOURCE
#include "layer.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

struct runtime runtime;

static cl_int unavailable(void) { return CL_PLATFORM_NOT_FOUND; }

/* Each exported function is one jump through a pointer, so that forwarding needs no signatures. Until the runtime is
 * open, every pointer leads to unavailable(), and the plugin sees no OpenCL platform. */
#define FUNCTION(version, name)                                                                                        \
    __attribute__((visibility("hidden"))) void *target_##name = (void *)unavailable;                                   \
    __asm__(".pushsection .text\n"                                                                                     \
            ".globl exported_" #name "\n"                                                                              \
            ".type exported_" #name ", @function\n"                                                                    \
            "exported_" #name ":\n"                                                                                    \
            "    jmp *target_" #name "(%rip)\n"                                                                        \
            ".size exported_" #name ", . - exported_" #name "\n"                                                       \
            ".symver exported_" #name ", " #name "@@OPENCL_" version "\n"                                              \
            ".popsection\n");
#include "functions.h"
#undef FUNCTION

static const struct {
    const char *name;
    void **target;
} exported[] = {
#define FUNCTION(version, name) {#name, &target_##name},
#include "functions.h"
#undef FUNCTION
};

static const struct {
    const char *name;
    size_t offset;
} called[] = {
#define CALLED(name) {#name, offsetof(struct runtime, name)}
    CALLED(clGetDeviceIDs),
    CALLED(clGetDeviceInfo),
    CALLED(clCreateSubDevices),
    CALLED(clGetExtensionFunctionAddressForPlatform),
    CALLED(clCreateBuffer),
    CALLED(clCreateProgramWithSource),
    CALLED(clCreateProgramWithBinary),
    CALLED(clBuildProgram),
    CALLED(clGetProgramInfo),
    CALLED(clGetProgramBuildInfo),
    CALLED(clRetainProgram),
    CALLED(clReleaseProgram),
    CALLED(clCreateKernel),
    CALLED(clCreateKernelsInProgram),
    CALLED(clGetKernelInfo),
    CALLED(clReleaseKernel),
    CALLED(clEnqueueNDRangeKernel),
#undef CALLED
};

/* Return the address of a runtime function; if it is missing, write a line to stderr and return NULL. */
static void *address_of(void *library, const char *name) {
    void *address = dlsym(library, name);
    if (address == NULL) fprintf(stderr, "emulated GPU: the OpenCL runtime has no %s\n", name);
    return address;
}

static int find_called(void *library) {
    for (size_t i = 0; i < sizeof called / sizeof *called; i++) {
        void *address = address_of(library, called[i].name);
        if (address == NULL) return 0;
        memcpy((char *)&runtime + called[i].offset, &address, sizeof address);
    }
    return 1;
}

static void *replacement_of(const char *name) {
    static const struct replacement *const tables[] = {device_replacements, memory_replacements, program_replacements,
                                                       launch_replacements};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        for (const struct replacement *one = tables[i]; one->name != NULL; one++)
            if (strcmp(one->name, name) == 0) return one->function;
    return NULL;
}

__attribute__((constructor)) static void open_runtime(void) {
    /* The linker option -rpath names its folder, relative to this library. */
    void *library = dlopen("libintelocl.so", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "emulated GPU: %s\n", dlerror());
        return;
    }
    if (!find_called(library)) return;
    for (size_t i = 0; i < sizeof exported / sizeof *exported; i++) {
        void *function = replacement_of(exported[i].name);
        if (function == NULL) function = address_of(library, exported[i].name);
        if (function != NULL) *exported[i].target = function;
    }
}
