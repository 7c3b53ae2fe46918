/* Kernel launches: the layer turns every work-group into a one-dimensional one.
 *
 * On a GPU, a sub-group consists of work-items with consecutive linear ids, across all dimensions. The runtime forms
 * sub-groups along dimension 0 only: a group of 1 x 16 would become 16 sub-groups of one work-item. Therefore each
 * group is launched as a row with the same number of work-items, and prelude.cl computes the original ids in the
 * kernels. The original group size is passed to the kernels as the global offset, which the plugin never uses.
 */
#include "layer.h"

enum { DIMENSIONS = 3 };

static cl_int enqueue_kernel(cl_command_queue queue, cl_kernel kernel, cl_uint dimensions, const size_t *offset,
                             const size_t *global, const size_t *local, cl_uint waits, const cl_event *wait_for,
                             cl_event *event) {
    size_t group[DIMENSIONS] = {1, 1, 1}, items[DIMENSIONS] = {1, 1, 1};
    if (dimensions < 1 || dimensions > DIMENSIONS) return CL_INVALID_WORK_DIMENSION;
    for (cl_uint i = 0; i < dimensions; i++) {
        if (offset != NULL && offset[i] != 0) return CL_INVALID_GLOBAL_OFFSET;
        if (local != NULL) group[i] = local[i];
        items[i] = global[i];
        if (group[i] == 0 || items[i] % group[i] != 0) return CL_INVALID_WORK_GROUP_SIZE;
    }
    const size_t row[DIMENSIONS] = {group[0] * group[1] * group[2], 1, 1};
    const size_t rows[DIMENSIONS] = {items[0] / group[0] * row[0], items[1] / group[1], items[2] / group[2]};
    return runtime.clEnqueueNDRangeKernel(queue, kernel, DIMENSIONS, group, rows, row, waits, wait_for, event);
}

const struct replacement launch_replacements[] = {
    {"clEnqueueNDRangeKernel", (void *)enqueue_kernel},
    {NULL, NULL},
};
