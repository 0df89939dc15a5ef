// Which columns of a row the soft term reads, and reading them: all, those above a threshold, or a
// few gathered; without the label where it has a term of its own.
#pragma once
#include "load.h"
#include "math.h"
#include "select.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class KeptColumns {
 public:
  struct Chunk {
    const T *student, *teacher;
    int64_t n;
  };

  // `after`: the row that this thread is likely to compute next.
  KeptColumns(const DenseRows& call, Workspace<T>& work, int64_t row, int64_t after)
      : call_(call),
        work_(work),
        row_(row),
        after_(after),
        columns_(call.vocab_size),
        kept_(call.kept(row)),
        label_(call.target_weight ? call.labels[row] : -1) {}

  // Finds the classes that are kept, before any column is read. False: a NaN was met.
  bool select() {
    if (kept_ == call_.vocab_size) return true;
    teacher_ = stored_teacher(0, columns_, work_.teacher());
    threshold_ = kth_largest(teacher_, columns_, kept_, work_.a(), work_.b());
    if (std::isnan(threshold_)) return false;  // a NaN leaves the teacher without an order
    const int64_t few = columns_ / 32;
    if (kept_ <= few && gather(few)) {
      return !row_has_nan<T>(call_.student, row_, call_.vocab_size);
    }
    has_threshold_ = true;
    return true;
  }

  int64_t count() const { return columns_; }
  // The classes that the columns read are, where they are not all, but gathered; else null.
  const int32_t* classes() const { return student_ ? work_.kept_columns() : nullptr; }
  // Whether columns below the threshold are read as well, which do not take part.
  bool has_threshold() const { return has_threshold_; }
  T threshold() const { return threshold_; }
  bool decoupled() const { return label_ >= 0; }
  T label_student() const { return label_student_; }
  T label_teacher() const { return label_teacher_; }

  Chunk load(int64_t begin, int64_t n) {
    return load(begin, n,
                student_ ? student_ + begin
                         : load_columns<T>(call_.student, row_, begin, n, work_.scratch(0)));
  }
  // Loads the teacher's columns beside the student's, which are given.
  Chunk load(int64_t begin, int64_t n, const T* student) {
    const Chunk chunk{student,
                      teacher_ ? teacher_ + begin : stored_teacher(begin, n, work_.scratch(1)), n};
    const bool holds_label = label_ >= begin && label_ < begin + n && !student_;
    return holds_label ? leave_out_label(chunk, label_ - begin) : chunk;
  }

  // Moves what is saved of a chunk's last column back to where it belongs; the label's is 0.
  void put_label_back() {
    if (student_) return;
    const int64_t last = std::min((label_ / kChunk + 1) * kChunk, columns_) - 1;
    for (T* saved : {work_.a(), work_.b()}) {
      saved[last] = saved[label_];
      saved[label_] = 0;
    }
  }

  // The logits of both sides where the teacher's is among the largest.
  Offsets<T> beside_top() const {
    int64_t top = label_ == 0 ? 1 : 0;
    const int64_t stride = columns_ / 256 + 1;
    for (int64_t i = 0; i < columns_; i += stride) {
      if (teacher_[i] > teacher_[top] && i != label_) top = i;
    }
    T beside = student_at(top);
    if (!std::isfinite(beside)) beside = -kInf<T>;  // the class may be a pruned one
    return {teacher_[top], beside};
  }

  // The student's later columns, and the teacher's: where this row's have been read, those of the
  // next row, unless it is so long that they would be gone from the cache by then.
  Ahead ahead(int64_t begin) const {
    const auto later = [&](const Rows& rows) {
      return address_ahead(rows, row_, after_, call_.vocab_size, begin);
    };
    const int64_t bytes = call_.teacher.logits.element_bytes();
    const uintptr_t student = later(call_.student);
    const int64_t student_bytes = call_.student.element_bytes();
    if (!teacher_) return {later(call_.teacher.logits), student, bytes, student_bytes};
    if (call_.vocab_size * bytes <= kLongRow) {
      return {call_.teacher.logits.address(after_, begin), student, bytes, student_bytes};
    }
    const auto again = reinterpret_cast<uintptr_t>(teacher_ + begin + kAhead);
    return {again, student, sizeof(T), student_bytes};
  }

 private:
  // The bytes of a teacher's row from which on the next row is not touched early, measured with an
  // L2 of 2 MiB. At 501 KiB pruned rows take 1.31 times the time of rows that are not pruned, and
  // 1.38 times if the next row is touched; at 128 KiB 1.52 times, and 1.39 times if it is touched.
  static constexpr int64_t kLongRow = 384 << 10;

  // Few classes are taken out of their rows: the others cost no exponential. False where ties make
  // them many.
  bool gather(int64_t few) {
    int32_t* classes = work_.kept_columns();
    int64_t count = columns_from(teacher_, columns_, threshold_, few, classes);
    if (count > few) return false;
    if (label_ >= 0) {
      int64_t others = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (classes[i] != label_) classes[others++] = classes[i];
      }
      count = others;
      label_student_ = student_at(label_);
      label_teacher_ = teacher_[label_];
    }
    T* teacher = work_.kept_teacher();
    for (int64_t i = 0; i < count; ++i) teacher[i] = teacher_[classes[i]];
    student_ = gather_columns<T>(call_.student, row_, classes, count, work_.kept_student());
    teacher_ = teacher;
    columns_ = count;
    return true;
  }

  T student_at(int64_t column) const {
    T value;
    return *load_columns<T>(call_.student, row_, column, 1, &value);
  }

  const T* stored_teacher(int64_t begin, int64_t n, T* scratch) {
    if (!call_.teacher.probs) return load_columns<T>(call_.teacher.logits, row_, begin, n, scratch);
    dispatch<T>(call_.teacher.logits.dtype, [&](auto* stored) {
      using Stored = std::remove_pointer_t<decltype(stored)>;
      const Stored* probs = static_cast<const Stored*>(call_.teacher.logits.data) +
                            call_.teacher.logits.offset(row_) + begin;
      logarithms(probs, n, scratch);
    });
    return scratch;
  }

  // Copies of the chunk in which the last column has taken the label's place.
  Chunk leave_out_label(Chunk chunk, int64_t label) {
    label_student_ = chunk.student[label];
    label_teacher_ = chunk.teacher[label];
    const auto without = [&](const T* from, T* to) {
      std::copy(from, from + chunk.n, to);
      to[label] = from[chunk.n - 1];
      return to;
    };
    return {without(chunk.student, work_.scratch(4)), without(chunk.teacher, work_.scratch(5)),
            chunk.n - 1};
  }

  const DenseRows& call_;
  Workspace<T>& work_;
  const int64_t row_, after_;
  int64_t columns_;
  const int64_t kept_;          // how many of them are kept
  const int64_t label_;         // that is left out; -1: none
  const T* teacher_ = nullptr;  // converted whole where classes are pruned, or gathered
  const T* student_ = nullptr;  // gathered
  T threshold_ = 0;             // the smallest teacher logit kept
  bool has_threshold_ = false;
  T label_student_ = 0, label_teacher_ = 0;
};

}  // namespace fastkd::cpu::FASTKD_ISA
