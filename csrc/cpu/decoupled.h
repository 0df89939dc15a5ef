// The divergence of the label's class against all others together, from both sides' log-odds.
#pragma once
#include "math.h"

namespace fastkd::cpu::FASTKD_ISA {

struct Binary {
  double divergence = 0;  // KL((p, 1 - p) || (q, 1 - q))
  double delta = 0;       // q - p
};

// p and q are the logistic functions of the odds; no digit is lost where either is near 0 or 1, nor
// where the two agree.
inline Binary binary_divergence(double teacher_odds, double student_odds) {
  double a = teacher_odds, b = student_odds;
  if (std::isnan(a) || std::isnan(b)) return {kNaN<double>, kNaN<double>};
  if (a == b) return {};  // perhaps both infinite
  const auto logistic = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto softplus = [](double x) {
    return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x)));
  };
  const double gap = b - a;
  const double delta = gap > 0 ? -logistic(b) * logistic(-a) * std::expm1(-gap)
                               : logistic(a) * logistic(-b) * std::expm1(gap);
  if (std::fabs(gap) < 1) {
    // Sum of q ((1 + y) ln(1 + y) - y) with 1 + y = p / q: what follows would cancel.
    const double y = logistic(-a) * std::expm1(-gap), y_others = logistic(a) * std::expm1(gap);
    return {logistic(b) * log_terms(y, 1 + y).excess +
                logistic(-b) * log_terms(y_others, 1 + y_others).excess,
            delta};
  }
  // KL = softplus(b) - softplus(a) - p (b - a), of either class: of the rarer one in q. Either of
  // the odds may be infinite.
  const double sign = b > 0 ? -1 : 1;
  const double p = logistic(sign * a), size = std::fabs(a);
  const auto product = [](double x, double y) { return x == 0 ? 0 : x * y; };
  const double divergence =
      softplus(sign * b) - softplus(-size) - product(logistic(-size), size) - product(p, sign * b);
  return {std::fmax(divergence, 0.0), delta};
}

}  // namespace fastkd::cpu::FASTKD_ISA
