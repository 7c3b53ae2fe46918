/* Programs: adds the prelude to every source, and caches the binaries of built programs in a folder.
 *
 * Building a model's kernels takes minutes, loading their binaries seconds. The environment variable
 * OV_PHI3_EMULATED_KERNELS names the folder; without it nothing is cached. A file name is a hash of source and options.
 */
#define _GNU_SOURCE
#include "layer.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

__asm__(".pushsection .rodata\n"
        "prelude_text: .incbin \"prelude.cl\"\n"
        "prelude_end:\n"
        ".popsection\n");
extern const char prelude_text[] __attribute__((visibility("hidden")));
extern const char prelude_end[] __attribute__((visibility("hidden")));

/* With an 8-bit KV cache, a kernel of the plugin mixes pointer types. Compilers for GPUs only warn about it. */
static const char more_options[] = " -Wno-error=incompatible-pointer-types";

/* A program that was created from source. */
struct program {
    cl_program handle;
    cl_program from_binary; /* the program that was loaded from the cache instead, or NULL */
    cl_context context;
    uint64_t hash;
    struct program *next;
};

enum { BUCKETS = 1024 };
static struct program *known[BUCKETS];
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static struct program **bucket_of(cl_program handle) { return &known[((uintptr_t)handle >> 4) % BUCKETS]; }

static struct program *find(cl_program handle) {
    pthread_mutex_lock(&guard);
    struct program *one = *bucket_of(handle);
    while (one != NULL && one->handle != handle) one = one->next;
    pthread_mutex_unlock(&guard);
    return one;
}

static void remember(cl_program handle, cl_context context, uint64_t hash) {
    struct program *one = calloc(1, sizeof *one);
    if (one == NULL) return; /* without a record, the binary is not cached */
    *one = (struct program){handle, NULL, context, hash, NULL};
    pthread_mutex_lock(&guard);
    one->next = *bucket_of(handle);
    *bucket_of(handle) = one;
    pthread_mutex_unlock(&guard);
}

/* Return the program that is built: the cached one if there is one. */
static cl_program built(cl_program handle) {
    const struct program *one = find(handle);
    return one != NULL && one->from_binary != NULL ? one->from_binary : handle;
}

/* -- source -------------------------------------------------------------------------------------------------------- */

static uint64_t hashed(uint64_t hash, const char *text, size_t length) { /* FNV-1a */
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
    return hash;
}

static cl_program create_from_source(cl_context context, cl_uint count, const char **texts, const size_t *lengths,
                                     cl_int *error) {
    const char **all = calloc(count + 1, sizeof *all);
    size_t *sizes = calloc(count + 1, sizeof *sizes);
    cl_program program = NULL;
    uint64_t hash = 14695981039346656037u;
    if (all != NULL && sizes != NULL) {
        for (cl_uint i = 0; i <= count; i++) {
            all[i] = i == 0 ? prelude_text : texts[i - 1];
            if (i == 0) sizes[i] = (size_t)(prelude_end - prelude_text);
            else sizes[i] = lengths != NULL && lengths[i - 1] != 0 ? lengths[i - 1] : strlen(texts[i - 1]);
            hash = hashed(hash, all[i], sizes[i]);
        }
        program = runtime.clCreateProgramWithSource(context, count + 1, all, sizes, error);
        if (program != NULL) remember(program, context, hash);
    } else if (error != NULL) {
        *error = CL_OUT_OF_HOST_MEMORY;
    }
    free(all);
    free(sizes);
    return program;
}

/* -- binaries ------------------------------------------------------------------------------------------------------ */

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    unsigned char *content = NULL;
    long length = -1;
    if (file == NULL) return NULL;
    if (fseek(file, 0, SEEK_END) == 0) length = ftell(file);
    if (length > 0) content = malloc((size_t)length);
    rewind(file);
    if (content != NULL && fread(content, 1, (size_t)length, file) != (size_t)length) {
        free(content);
        content = NULL;
    }
    fclose(file);
    *size = length > 0 ? (size_t)length : 0;
    return content;
}

/* Write a file atomically; several processes may write the same file. */
static void write_file(const char *path, const unsigned char *content, size_t size) {
    char *temporary = NULL;
    if (asprintf(&temporary, "%s.XXXXXX", path) < 0) return;
    int handle = mkstemp(temporary);
    FILE *file = handle < 0 ? NULL : fdopen(handle, "wb");
    if (file != NULL) {
        int whole = fwrite(content, 1, size, file) == size;
        whole = fclose(file) == 0 && whole;
        if (!whole || rename(temporary, path) != 0) unlink(temporary);
    }
    free(temporary);
}

static cl_program load_binary(const struct program *program, cl_device_id device, const char *path) {
    size_t size = 0;
    cl_int error = CL_SUCCESS, status = CL_SUCCESS;
    unsigned char *content = read_file(path, &size);
    if (content == NULL) return NULL;
    const unsigned char *binary = content;
    cl_program loaded =
        runtime.clCreateProgramWithBinary(program->context, 1, &device, &size, &binary, &status, &error);
    free(content);
    if (loaded == NULL || error || status) return NULL;
    if (runtime.clBuildProgram(loaded, 1, &device, NULL, NULL, NULL) == CL_SUCCESS) return loaded;
    runtime.clReleaseProgram(loaded);
    return NULL;
}

static void save_binary(cl_program handle, const char *path) {
    size_t size = 0;
    /* One binary: every context of the plugin has one device. */
    if (runtime.clGetProgramInfo(handle, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL) || size == 0) return;
    unsigned char *content = malloc(size);
    if (content == NULL) return;
    if (runtime.clGetProgramInfo(handle, CL_PROGRAM_BINARIES, sizeof content, &content, NULL) == CL_SUCCESS)
        write_file(path, content, size);
    free(content);
}

/* -- building ------------------------------------------------------------------------------------------------------ */

/* Build a program from source. If OV_PHI3_EMULATED_LOG is set, write the compiler's messages on a failure to stderr. */
static cl_int compile(cl_program handle, cl_device_id device, const char *options) {
    size_t size = 0;
    cl_int error = runtime.clBuildProgram(handle, 1, &device, options, NULL, NULL);
    if (!error || getenv("OV_PHI3_EMULATED_LOG") == NULL) return error;
    if (runtime.clGetProgramBuildInfo(handle, device, CL_PROGRAM_BUILD_LOG, 0, NULL, &size) || size == 0) return error;
    char *text = calloc(size + 1, 1);
    if (text != NULL && !runtime.clGetProgramBuildInfo(handle, device, CL_PROGRAM_BUILD_LOG, size, text, NULL))
        fprintf(stderr, "emulated GPU: a program does not build with%s\n%s\n", options, text);
    free(text);
    return error;
}

static cl_int build_with_cache(struct program *program, cl_device_id device, const char *options, const char *folder) {
    char *path = NULL;
    uint64_t hash = hashed(program->hash, options, strlen(options));
    if (asprintf(&path, "%s/%016llx.bin", folder, (unsigned long long)hash) < 0) return CL_OUT_OF_HOST_MEMORY;
    cl_int error = CL_SUCCESS;
    program->from_binary = load_binary(program, device, path);
    if (program->from_binary == NULL) {
        error = compile(program->handle, device, options);
        if (!error) save_binary(program->handle, path);
    }
    free(path);
    return error;
}

static cl_int build(cl_program handle, cl_uint count, const cl_device_id *devices, const char *options,
                    program_callback callback, void *user_data) {
    const char *folder = getenv("OV_PHI3_EMULATED_KERNELS");
    struct program *program = find(handle);
    if (program == NULL || callback != NULL) /* created from a binary of the plugin's */
        return runtime.clBuildProgram(handle, count, devices, options, callback, user_data);
    char *all = NULL;
    cl_device_id device = NULL;
    if (asprintf(&all, "%s%s", options != NULL ? options : "", more_options) < 0) return CL_OUT_OF_HOST_MEMORY;
    cl_int error = CL_SUCCESS;
    if (count > 0) device = devices[0];
    else error = runtime.clGetProgramInfo(handle, CL_PROGRAM_DEVICES, sizeof device, &device, NULL);
    if (!error) error = folder != NULL ? build_with_cache(program, device, all, folder) : compile(handle, device, all);
    free(all);
    return error;
}

/* -- properties ---------------------------------------------------------------------------------------------------- */

static cl_int get_program_info(cl_program handle, cl_uint question, size_t room, void *out, size_t *size) {
    return runtime.clGetProgramInfo(built(handle), question, room, out, size);
}

static cl_int get_build_info(cl_program handle, cl_device_id device, cl_uint question, size_t room, void *out,
                             size_t *size) {
    return runtime.clGetProgramBuildInfo(built(handle), device, question, room, out, size);
}

/* -- lifetime ------------------------------------------------------------------------------------------------------ */

/* By the standard, a program lives as long as its kernels. The runtime destroys it earlier, and the kernels then fail.
 * Therefore every kernel holds a reference to its program, which the last release of the kernel gives back. */
static cl_kernel create_kernel(cl_program handle, const char *name, cl_int *error) {
    cl_kernel kernel = runtime.clCreateKernel(built(handle), name, error);
    if (kernel != NULL) runtime.clRetainProgram(built(handle));
    return kernel;
}

static cl_int create_kernels(cl_program handle, cl_uint room, cl_kernel *kernels, cl_uint *count) {
    cl_uint found = 0; /* the runtime requires this pointer, and the plugin passes NULL */
    cl_int error = runtime.clCreateKernelsInProgram(built(handle), room, kernels, &found);
    for (cl_uint i = 0; !error && kernels != NULL && i < found; i++) runtime.clRetainProgram(built(handle));
    if (count != NULL) *count = found;
    return error;
}

/* Release a program; with its last reference, also its record. The caller holds `guard`. */
static cl_int release_guarded(cl_program handle) {
    cl_uint references = 0;
    cl_int error = runtime.clGetProgramInfo(handle, CL_PROGRAM_REFERENCE_COUNT, sizeof references, &references, NULL);
    if (!error && references == 1) {
        struct program **link = bucket_of(handle);
        while (*link != NULL && (*link)->handle != handle) link = &(*link)->next;
        struct program *last = *link;
        if (last != NULL) {
            *link = last->next;
            if (last->from_binary != NULL) runtime.clReleaseProgram(last->from_binary);
            free(last);
        }
    }
    return runtime.clReleaseProgram(handle);
}

static cl_int release_program(cl_program handle) {
    pthread_mutex_lock(&guard);
    cl_int error = release_guarded(handle);
    pthread_mutex_unlock(&guard);
    return error;
}

static cl_int release_kernel(cl_kernel kernel) {
    cl_uint references = 0;
    cl_program program = NULL;
    pthread_mutex_lock(&guard);
    cl_int error = runtime.clGetKernelInfo(kernel, CL_KERNEL_REFERENCE_COUNT, sizeof references, &references, NULL);
    if (!error) error = runtime.clGetKernelInfo(kernel, CL_KERNEL_PROGRAM, sizeof program, &program, NULL);
    int last = !error && references == 1;
    error = runtime.clReleaseKernel(kernel);
    if (last && !error) release_guarded(program);
    pthread_mutex_unlock(&guard);
    return error;
}

const struct replacement program_replacements[] = {
    {"clCreateProgramWithSource", (void *)create_from_source},
    {"clBuildProgram", (void *)build},
    {"clGetProgramInfo", (void *)get_program_info},
    {"clGetProgramBuildInfo", (void *)get_build_info},
    {"clCreateKernel", (void *)create_kernel},
    {"clCreateKernelsInProgram", (void *)create_kernels},
    {"clReleaseProgram", (void *)release_program},
    {"clReleaseKernel", (void *)release_kernel},
    {NULL, NULL},
};
