#include "dispatch.h"

#define FASTKD_ISA baseline
#define FASTKD_DOUBLE
#include "kernels-inl.h"
