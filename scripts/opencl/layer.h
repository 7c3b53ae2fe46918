/* Shared declarations: the functions of the OpenCL runtime, and the replacements that each part of the layer has. */
#ifndef OV_PHI3_LAYER_H
#define OV_PHI3_LAYER_H

#include "opencl.h"

/* Functions of the OpenCL runtime that the layer calls. open_runtime() in entry.c fills them in before any call. */
struct runtime {
    cl_int (*clGetDeviceIDs)(cl_platform_id, cl_bitfield, cl_uint, cl_device_id *, cl_uint *);
    cl_int (*clGetDeviceInfo)(cl_device_id, cl_uint, size_t, void *, size_t *);
    cl_int (*clCreateSubDevices)(cl_device_id, const cl_property *, cl_uint, cl_device_id *, cl_uint *);
    void *(*clGetExtensionFunctionAddressForPlatform)(cl_platform_id, const char *);
    cl_mem (*clCreateBuffer)(cl_context, cl_bitfield, size_t, void *, cl_int *);
    cl_program (*clCreateProgramWithSource)(cl_context, cl_uint, const char **, const size_t *, cl_int *);
    cl_program (*clCreateProgramWithBinary)(cl_context, cl_uint, const cl_device_id *, const size_t *,
                                            const unsigned char **, cl_int *, cl_int *);
    cl_int (*clBuildProgram)(cl_program, cl_uint, const cl_device_id *, const char *, program_callback, void *);
    cl_int (*clGetProgramInfo)(cl_program, cl_uint, size_t, void *, size_t *);
    cl_int (*clGetProgramBuildInfo)(cl_program, cl_device_id, cl_uint, size_t, void *, size_t *);
    cl_int (*clRetainProgram)(cl_program);
    cl_int (*clReleaseProgram)(cl_program);
    cl_kernel (*clCreateKernel)(cl_program, const char *, cl_int *);
    cl_int (*clCreateKernelsInProgram)(cl_program, cl_uint, cl_kernel *, cl_uint *);
    cl_int (*clGetKernelInfo)(cl_kernel, cl_uint, size_t, void *, size_t *);
    cl_int (*clReleaseKernel)(cl_kernel);
    cl_int (*clEnqueueNDRangeKernel)(cl_command_queue, cl_kernel, cl_uint, const size_t *, const size_t *,
                                     const size_t *, cl_uint, const cl_event *, cl_event *);
};
extern struct runtime runtime;

/* An OpenCL function that the layer implements. Each table ends with a NULL name. */
struct replacement {
    const char *name;
    void *function;
};
extern const struct replacement device_replacements[];
extern const struct replacement memory_replacements[];
extern const struct replacement program_replacements[];
extern const struct replacement launch_replacements[];

#endif
