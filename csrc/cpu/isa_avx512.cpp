#include "dispatch.h"

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FASTKD_ISA avx512
#define FASTKD_AVX512
#if defined(FASTKD_ONE_SET)
#define FASTKD_DOUBLE
#endif
#include "kernels-inl.h"
#endif
