// Precedes every kernel source. Work-groups are one-dimensional, and the global offset is their original size: see
// launch.c.

#define OV_PHI3_INLINE inline __attribute__((always_inline))

OV_PHI3_INLINE size_t ov_phi3_local_size(uint dimension) {
    return dimension < 3 ? get_global_offset(dimension) : 1;
}

OV_PHI3_INLINE size_t ov_phi3_local_id(uint dimension) {
    const size_t item = get_local_id(0), width = get_global_offset(0), height = get_global_offset(1);
    return dimension == 0 ? item % width
         : dimension == 1 ? item / width % height
         : dimension == 2 ? item / (width * height) : 0;
}

OV_PHI3_INLINE size_t ov_phi3_global_id(uint dimension) {
    return dimension < 3 ? get_group_id(dimension) * ov_phi3_local_size(dimension) + ov_phi3_local_id(dimension) : 0;
}

OV_PHI3_INLINE size_t ov_phi3_global_size(uint dimension) {
    return dimension < 3 ? get_num_groups(dimension) * ov_phi3_local_size(dimension) : 1;
}

OV_PHI3_INLINE size_t ov_phi3_global_linear_id(void) {
    return (ov_phi3_global_id(2) * ov_phi3_global_size(1) + ov_phi3_global_id(1)) * ov_phi3_global_size(0) +
           ov_phi3_global_id(0);
}

#define get_local_size(dimension) ov_phi3_local_size(dimension)
#define get_enqueued_local_size(dimension) ov_phi3_local_size(dimension)
#define get_local_id(dimension) ov_phi3_local_id(dimension)
#define get_global_id(dimension) ov_phi3_global_id(dimension)
#define get_global_size(dimension) ov_phi3_global_size(dimension)
#define get_global_linear_id() ov_phi3_global_linear_id()
#define get_global_offset(dimension) ((size_t)0)

// Kernels declare their original group size, which a one-dimensional group does not have.
#define reqd_work_group_size(...) work_group_size_hint(1, 1, 1)

// RMSNorm squares negative numbers with it, which OpenCL leaves undefined: GPUs return the square, the runtime NaN.
#define native_powr(base, exponent) pow(convert_float(base), (float)(exponent))

#line 1
