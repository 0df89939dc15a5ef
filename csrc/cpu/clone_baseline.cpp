#define FASTKD_ISA baseline
#include "clone.h"

// double is for accuracy, not for speed: it has no clones.
void fastkd::cpu::kd_rows_double(const KdRows& call, std::atomic<int64_t>& next) {
  baseline::kd_rows_of<double>(call, next);
}
void fastkd::cpu::topk_rows_double(const TopkRows& call, std::atomic<int64_t>& next) {
  baseline::topk_rows_of<double>(call, next);
}
