// Marks a function that the host and a kernel both call.
#pragma once

#ifdef __CUDACC__
#define RP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RP_HOST_DEVICE inline
#endif
