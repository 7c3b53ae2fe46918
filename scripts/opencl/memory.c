/* Memory log: lets a test compare the plugin's allocations with what the library promises.
 *
 * If OV_PHI3_EMULATED_MEMORY names a file, every allocation appends a line to it: the kind and the number of bytes.
 */
#include "layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    void *(*device)(cl_context, cl_device_id, const cl_bitfield *, size_t, cl_uint, cl_int *);
    void *(*host)(cl_context, const cl_bitfield *, size_t, cl_uint, cl_int *);
    void *(*shared)(cl_context, cl_device_id, const cl_bitfield *, size_t, cl_uint, cl_int *);
} allocate;

static void record(const char *kind, size_t bytes) {
    const char *path = getenv("OV_PHI3_EMULATED_MEMORY");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file == NULL) return;
    fprintf(file, "%s %zu\n", kind, bytes); /* written at once by fclose, so lines of threads never mix */
    fclose(file);
}

static cl_mem create_buffer(cl_context context, cl_bitfield flags, size_t bytes, void *host, cl_int *error) {
    record("buffer", bytes);
    return runtime.clCreateBuffer(context, flags, bytes, host, error);
}

static void *allocate_device(cl_context context, cl_device_id device, const cl_bitfield *properties, size_t bytes,
                             cl_uint alignment, cl_int *error) {
    record("device", bytes);
    return allocate.device(context, device, properties, bytes, alignment, error);
}

static void *allocate_host(cl_context context, const cl_bitfield *properties, size_t bytes, cl_uint alignment,
                           cl_int *error) {
    record("host", bytes);
    return allocate.host(context, properties, bytes, alignment, error);
}

static void *allocate_shared(cl_context context, cl_device_id device, const cl_bitfield *properties, size_t bytes,
                             cl_uint alignment, cl_int *error) {
    record("shared", bytes);
    return allocate.shared(context, device, properties, bytes, alignment, error);
}

/* Extension functions are not exported: the plugin requests their addresses by name. */
static void *extension_function(cl_platform_id platform, const char *name) {
    static const struct {
        const char *name;
        void *ours;
        void **real;
    } recorded[] = {
        {"clDeviceMemAllocINTEL", (void *)allocate_device, (void **)&allocate.device},
        {"clHostMemAllocINTEL", (void *)allocate_host, (void **)&allocate.host},
        {"clSharedMemAllocINTEL", (void *)allocate_shared, (void **)&allocate.shared},
    };
    void *address = runtime.clGetExtensionFunctionAddressForPlatform(platform, name);
    for (size_t i = 0; i < sizeof recorded / sizeof *recorded && address != NULL; i++) {
        if (strcmp(recorded[i].name, name) != 0) continue;
        memcpy(recorded[i].real, &address, sizeof address);
        return recorded[i].ours;
    }
    return address;
}

const struct replacement memory_replacements[] = {
    {"clCreateBuffer", (void *)create_buffer},
    {"clGetExtensionFunctionAddressForPlatform", (void *)extension_function},
    {NULL, NULL},
};
