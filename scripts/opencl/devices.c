/* Device list and device properties: the runtime's CPU device appears as one or two Intel GPUs.
 *
 * The GPUs are of generation 9, without instructions for dot products or matrices. So the plugin selects OpenCL kernels
 * only; oneDNN's kernels are machine code for real GPUs. The environment variable OV_PHI3_EMULATED_GPUS selects the
 * GPUs: "integrated" (the default), "discrete" or "integrated,discrete".
 */
#include "layer.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INTEL = 0x8086, GENERATION_9 = 0x02400009 };

struct gpu {
    const char *kind;
    const char *name;
    cl_uint product;
    cl_bool shares_memory_with_host;
    cl_device_id id;
};

static struct gpu gpus[] = {
    {"integrated", "Intel(R) UHD Graphics 630 (emulated)", 0x3E92, 1, NULL},
    {"discrete", "Intel(R) discrete Graphics (emulated)", 0x3E9B, 0, NULL},
};
enum { INTEGRATED, DISCRETE, KINDS };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static cl_platform_id the_platform;

static int is_wanted(const struct gpu *gpu) {
    const char *wanted = getenv("OV_PHI3_EMULATED_GPUS");
    if (wanted == NULL || *wanted == '\0') wanted = gpus[INTEGRATED].kind;
    return strstr(wanted, gpu->kind) != NULL;
}

/* The runtime has one device. A sub-device with all of its compute units serves as the second device. */
static cl_device_id second_device(cl_device_id device) {
    cl_uint units = 0;
    cl_device_id part = NULL;
    if (runtime.clGetDeviceInfo(device, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof units, &units, NULL)) return NULL;
    const cl_property one_part[] = {CL_DEVICE_PARTITION_BY_COUNTS, (cl_property)units, 0, 0};
    cl_int error = runtime.clCreateSubDevices(device, one_part, 1, &part, NULL);
    if (error) fprintf(stderr, "emulated GPU: no second device: the OpenCL runtime says %d\n", error);
    return error ? NULL : part;
}

static void find_devices(void) {
    cl_device_id device = NULL;
    if (runtime.clGetDeviceIDs(the_platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL)) return;
    if (is_wanted(&gpus[INTEGRATED])) gpus[INTEGRATED].id = device;
    if (is_wanted(&gpus[DISCRETE])) gpus[DISCRETE].id = second_device(device);
}

static cl_int get_device_ids(cl_platform_id platform, cl_bitfield type, cl_uint room, cl_device_id *ids,
                             cl_uint *count) {
    the_platform = platform; /* there is only one */
    pthread_once(&once, find_devices);
    cl_uint found = 0;
    for (int i = 0; i < KINDS && (type & (CL_DEVICE_TYPE_GPU | CL_DEVICE_TYPE_DEFAULT)); i++) {
        if (gpus[i].id == NULL) continue;
        if (ids != NULL && found < room) ids[found] = gpus[i].id;
        found++;
    }
    if (count != NULL) *count = found;
    return found ? CL_SUCCESS : CL_DEVICE_NOT_FOUND;
}

/* Return a property by OpenCL's convention: copy the value if `out` is given, store its size if `size` is given. */
static cl_int answer(const void *value, size_t length, size_t room, void *out, size_t *size) {
    if (size != NULL) *size = length;
    if (out == NULL) return CL_SUCCESS;
    if (room < length) return CL_INVALID_VALUE;
    memcpy(out, value, length);
    return CL_SUCCESS;
}

/* Set `value` to an emulated property that is a number and return its size in bytes; return 0 for other properties. */
static size_t number_of(const struct gpu *gpu, cl_uint question, cl_ulong *value) {
    switch (question) {
    case CL_DEVICE_TYPE: *value = CL_DEVICE_TYPE_GPU; return sizeof(cl_bitfield);
    case CL_DEVICE_VENDOR_ID: *value = INTEL; return sizeof(cl_uint);
    case CL_DEVICE_ID_INTEL: *value = gpu->product; return sizeof(cl_uint);
    case CL_DEVICE_IP_VERSION_INTEL: *value = GENERATION_9; return sizeof(cl_uint);
    case CL_DEVICE_HOST_UNIFIED_MEMORY: *value = gpu->shares_memory_with_host; return sizeof(cl_bool);
    case CL_DEVICE_PARENT_DEVICE: *value = 0; return sizeof(cl_device_id);
    case CL_DEVICE_PARTITION_MAX_SUB_DEVICES: *value = 0; return sizeof(cl_uint);
    /* Bit 0: instructions for 8-bit dot products. Bit 1: instructions for matrices. */
    case CL_DEVICE_FEATURE_CAPABILITIES_INTEL: *value = 0; return sizeof(cl_bitfield);
    /* The sizes of a UHD 630. The plugin selects kernels and work-group sizes by them. */
    case CL_DEVICE_NUM_SLICES_INTEL: *value = 1; return sizeof(cl_uint);
    case CL_DEVICE_NUM_SUB_SLICES_PER_SLICE_INTEL: *value = 3; return sizeof(cl_uint);
    case CL_DEVICE_NUM_EUS_PER_SUB_SLICE_INTEL: *value = 8; return sizeof(cl_uint);
    case CL_DEVICE_NUM_THREADS_PER_EU_INTEL: *value = 7; return sizeof(cl_uint);
    case CL_DEVICE_MAX_COMPUTE_UNITS: *value = 24; return sizeof(cl_uint);
    case CL_DEVICE_MAX_CLOCK_FREQUENCY: *value = 1150; return sizeof(cl_uint);
    case CL_DEVICE_MAX_WORK_GROUP_SIZE: *value = 256; return sizeof(size_t);
    case CL_DEVICE_LOCAL_MEM_SIZE: *value = 65536; return sizeof(cl_ulong);
    default: return 0;
    }
}

/* Return the runtime's extensions and cl_khr_subgroups, which the runtime implements but lists under Intel's name. */
static cl_int extensions_of(cl_device_id device, size_t room, void *out, size_t *size) {
    static const char more[] = " cl_khr_subgroups";
    size_t length = 0;
    cl_int error = runtime.clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, 0, NULL, &length);
    if (error) return error;
    char *text = calloc(length + sizeof more, 1);
    if (text == NULL) return CL_OUT_OF_HOST_MEMORY;
    error = runtime.clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, length, text, NULL);
    if (!error) error = answer(strcat(text, more), strlen(text) + 1, room, out, size);
    free(text);
    return error;
}

static cl_int get_device_info(cl_device_id device, cl_uint question, size_t room, void *out, size_t *size) {
    static const size_t sub_group_sizes[] = {8, 16, 32};
    const struct gpu *gpu = &gpus[device == gpus[DISCRETE].id ? DISCRETE : INTEGRATED];
    cl_ulong value = 0;
    size_t length = number_of(gpu, question, &value); /* x86 is little-endian: the first bytes hold the number */
    if (length) return answer(&value, length, room, out, size);
    switch (question) {
    case CL_DEVICE_NAME: return answer(gpu->name, strlen(gpu->name) + 1, room, out, size);
    case CL_DEVICE_SUB_GROUP_SIZES_INTEL: return answer(sub_group_sizes, sizeof sub_group_sizes, room, out, size);
    case CL_DEVICE_EXTENSIONS: return extensions_of(device, room, out, size);
    default: return runtime.clGetDeviceInfo(device, question, room, out, size);
    }
}

const struct replacement device_replacements[] = {
    {"clGetDeviceIDs", (void *)get_device_ids},
    {"clGetDeviceInfo", (void *)get_device_info},
    {NULL, NULL},
};
