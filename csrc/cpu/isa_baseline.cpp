#define FASTKD_ISA baseline
#include "kernels-inl.h"

// double is for accuracy, not for speed: it has no clones.
void fastkd::cpu::dense_rows_double(const DenseRows& call, std::atomic<int64_t>& next) {
  baseline::dense_rows_of<double>(call, next);
}
void fastkd::cpu::sparse_rows_double(const SparseRows& call, std::atomic<int64_t>& next) {
  baseline::sparse_rows_of<double>(call, next);
}
