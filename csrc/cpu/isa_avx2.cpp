#include "dispatch.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#define FASTKD_ISA avx2
#define FASTKD_AVX2
#if defined(FASTKD_ONE_SET)
#define FASTKD_DOUBLE
#endif
#include "kernels-inl.h"
#endif
