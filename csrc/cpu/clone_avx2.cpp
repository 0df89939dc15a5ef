#include "clone.h"

#if defined(__x86_64__)
FASTKD_CLONE(avx2, __attribute__((flatten, target("arch=x86-64-v3"))))
#endif
