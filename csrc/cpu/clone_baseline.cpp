#include "clone.h"

FASTKD_CLONE(baseline, __attribute__((flatten)))
