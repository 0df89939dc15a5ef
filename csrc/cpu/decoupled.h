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
  // KL = softplus(b) - softplus(a) - p (b - a), of either class: of the rarer one in q. Either of
  // the odds may be infinite.
  const double sign = b > 0 ? -1 : 1;
  const double p = logistic(sign * a), size = std::fabs(a);
  const auto product = [](double x, double y) { return x == 0 ? 0 : x * y; };
  double divergence =
      softplus(sign * b) - softplus(-size) - product(logistic(-size), size) - product(p, sign * b);
  if (std::fabs(gap) < 1e-4) {  // its series
    divergence = p * (1 - p) * gap * gap * (0.5 + (1 - 2 * p) * sign * gap / 6);
  }
  return {std::fmax(divergence, 0.0), delta};
}

}  // namespace fastkd::cpu::FASTKD_ISA
