#include "clone.h"

#if defined(__x86_64__)
FASTKD_CLONE(avx512, __attribute__((flatten, target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif
