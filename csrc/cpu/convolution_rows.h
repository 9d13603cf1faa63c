// The table: an algorithm is three small matrices, applied to rows and to columns of an image alike.
//
// In one dimension a tile reads kIn neighbouring inputs x, from `step * tile - before` on, and makes kOut
// neighbouring outputs y from `kOut * tile` on:
//
//   v = B x,    p_j = (G w)_j * v[kV of j],    m = sums of the p_j with one kM of j,    y = A m
//
// and the products p_j mix channels. Products that share an output column are added by the matrix product
// itself, products that share an input column read one transformed input. In two dimensions everything is the
// Kronecker product with itself. kB, kA and kG were made by the Cook-Toom construction from the points named
// beside them (infinity is always one), and by hand for kUp9 and kDown9; tests hold every row against direct
// convolution in double.
#pragma once

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr double kHalf = 0.5, kThird = 1.0 / 3, kSixth = 1.0 / 6, kFifteenth = 1.0 / 15;

// out[2i] = w0 (x[i-1] - x[i]) + S x[i],  out[2i+1] = S x[i] + w2 (x[i+1] - x[i]),  S = w0 + w1 + w2
struct Up9 {
  static constexpr int kTaps = 3, kIn = 3, kStep = 1, kBefore = 1, kOut = 2, kV = 3, kM = 3, kProducts = 3;
  static constexpr double kB[kV][kIn] = {{1, -1, 0}, {0, 1, 0}, {0, -1, 1}};
  static constexpr double kG[kProducts][kTaps] = {{1, 0, 0}, {1, 1, 1}, {0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 0}, {0, 1, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2}, kMOf[kProducts] = {0, 1, 2};
};

// out[j] = w0 (x[2j-1] - x[2j+1]) + S (x[2j] + x[2j+1]) + w2 (x[2j+2] - x[2j])
struct Down9 {
  static constexpr int kTaps = 3, kIn = 4, kStep = 2, kBefore = 1, kOut = 1, kV = 3, kM = 1, kProducts = 3;
  static constexpr double kB[kV][kIn] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {{1, 0, 0}, {1, 1, 1}, {0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2}, kMOf[kProducts] = {0, 0, 0};
};

// Points 0, 1, -1. kBefore is the task's padding.
struct Same2 {
  static constexpr int kTaps = 3, kIn = 4, kStep = 2, kBefore = -1, kOut = 2, kV = 4, kM = 4, kProducts = 4;
  static constexpr double kB[kV][kIn] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {
      {1, 0, 0}, {kHalf, kHalf, kHalf}, {kHalf, -kHalf, kHalf}, {0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3}, kMOf[kProducts] = {0, 1, 2, 3};
};

// Points 0, 1, -1, 1/2, -2: half the error of the usual 0, 1, -1, 2, -2.
struct Same4 {
  static constexpr int kTaps = 3, kIn = 6, kStep = 4, kBefore = -1, kOut = 4, kV = 6, kM = 6, kProducts = 6;
  static constexpr double kB[kV][kIn] = {{1, -1.5, -2, 1.5, 1, 0}, {0, 1, -.5, -2.5, -1, 0},
                                         {0, 1, -2.5, .5, 1, 0},   {0, 2, 1, -2, -1, 0},
                                         {0, 1, -2, -1, 2, 0},     {0, 1, -1.5, -2, 1.5, 1}};
  static constexpr double kG[kProducts][kTaps] = {{1, 0, 0},
                                                  {-kThird, -kThird, -kThird},
                                                  {-kThird, kThird, -kThird},
                                                  {16 * kFifteenth, 8 * kFifteenth, 4 * kFifteenth},
                                                  {kFifteenth / 2, -kFifteenth, 2 * kFifteenth},
                                                  {0, 0, 1}};
  static constexpr double kA[kOut][kM] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, .5, -2, 0}, {0, 1, 1, .25, 4, 0}, {0, 1, -1, .125, -8, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5}, kMOf[kProducts] = {0, 1, 2, 3, 4, 5};
};

// out[i] = w0 x[2i-1] + w2 x[2i+1] + w1 x[2i] + w3 x[2i+2]: two filters of two taps, each with points 0, 1,
// and one output transform.
struct Strided2 {
  static constexpr int kTaps = 4, kIn = 6, kStep = 4, kBefore = 1, kOut = 2, kV = 6, kM = 3, kProducts = 6;
  static constexpr double kB[kV][kIn] = {{1, 0, -1, 0, 0, 0}, {0, 0, 1, 0, 0, 0}, {0, 0, -1, 0, 1, 0},
                                         {0, 1, 0, -1, 0, 0}, {0, 0, 0, 1, 0, 0}, {0, 0, 0, -1, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {{1, 0, 0, 0}, {1, 0, 1, 0}, {0, 0, 1, 0},
                                                  {0, 1, 0, 0}, {0, 1, 0, 1}, {0, 0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 0}, {0, 1, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5}, kMOf[kProducts] = {0, 1, 2, 0, 1, 2};
};

// out[2i] = w3 x[i-1] + w1 x[i],  out[2i+1] = w2 x[i] + w0 x[i+1]: as above, with an output transform each.
// The windows of the two filters, x[i-1], x[i], x[i+1] and x[i], x[i+1], x[i+2], share a difference.
struct Transposed2 {
  static constexpr int kTaps = 4, kIn = 4, kStep = 2, kBefore = 1, kOut = 4, kV = 5, kM = 6, kProducts = 6;
  static constexpr double kB[kV][kIn] = {
      {1, -1, 0, 0}, {0, 1, 0, 0}, {0, -1, 1, 0}, {0, 0, 1, 0}, {0, 0, -1, 1}};
  static constexpr double kG[kProducts][kTaps] = {{0, 0, 0, 1},  {0, 1, 0, 1}, {0, 1, 0, 0},
                                                  {0, 0, -1, 0}, {1, 0, 1, 0}, {1, 0, 0, 0}};
  static constexpr double kA[kOut][kM] = {
      {1, 1, 0, 0, 0, 0}, {0, 0, 0, 1, 1, 0}, {0, 1, 1, 0, 0, 0}, {0, 0, 0, 0, 1, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 2, 3, 4}, kMOf[kProducts] = {0, 1, 2, 3, 4, 5};
};

// The two-tap filters of four outputs, points 0, 1, -1, -2.
struct Strided4 {
  static constexpr int kTaps = 4, kIn = 10, kStep = 8, kBefore = 1, kOut = 4, kV = 10, kM = 5, kProducts = 10;
  static constexpr double kB[kV][kIn] = {{2, 0, 1, 0, -2, 0, -1, 0, 0, 0}, {0, 0, 2, 0, 3, 0, 1, 0, 0, 0},
                                         {0, 0, -2, 0, 1, 0, 1, 0, 0, 0},  {0, 0, 1, 0, 0, 0, -1, 0, 0, 0},
                                         {0, 0, -2, 0, -1, 0, 2, 0, 1, 0}, {0, 2, 0, 1, 0, -2, 0, -1, 0, 0},
                                         {0, 0, 0, 2, 0, 3, 0, 1, 0, 0},   {0, 0, 0, -2, 0, 1, 0, 1, 0, 0},
                                         {0, 0, 0, 1, 0, 0, 0, -1, 0, 0},  {0, 0, 0, -2, 0, -1, 0, 2, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {
      {kHalf, 0, 0, 0}, {kSixth, 0, kSixth, 0}, {kHalf, 0, -kHalf, 0}, {kSixth, 0, -kThird, 0}, {0, 0, 1, 0},
      {0, kHalf, 0, 0}, {0, kSixth, 0, kSixth}, {0, kHalf, 0, -kHalf}, {0, kSixth, 0, -kThird}, {0, 0, 0, 1}};
  static constexpr double kA[kOut][kM] = {
      {1, 1, 1, 1, 0}, {0, 1, -1, -2, 0}, {0, 1, 1, 4, 0}, {0, 1, -1, -8, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  static constexpr int kMOf[kProducts] = {0, 1, 2, 3, 4, 0, 1, 2, 3, 4};
};

struct Transposed4 {
  static constexpr int kTaps = 4, kIn = 6, kStep = 4, kBefore = 1, kOut = 8, kV = 10, kM = 10, kProducts = 10;
  static constexpr double kB[kV][kIn] = {{2, 1, -2, -1, 0, 0}, {0, 2, 3, 1, 0, 0},   {0, -2, 1, 1, 0, 0},
                                         {0, 1, 0, -1, 0, 0},  {0, -2, -1, 2, 1, 0}, {0, 2, 1, -2, -1, 0},
                                         {0, 0, 2, 3, 1, 0},   {0, 0, -2, 1, 1, 0},  {0, 0, 1, 0, -1, 0},
                                         {0, 0, -2, -1, 2, 1}};
  static constexpr double kG[kProducts][kTaps] = {
      {0, 0, 0, kHalf}, {0, kSixth, 0, kSixth}, {0, -kHalf, 0, kHalf}, {0, -kThird, 0, kSixth}, {0, 1, 0, 0},
      {0, 0, kHalf, 0}, {kSixth, 0, kSixth, 0}, {-kHalf, 0, kHalf, 0}, {-kThird, 0, kSixth, 0}, {1, 0, 0, 0}};
  static constexpr double kA[kOut][kM] = {{1, 1, 1, 1, 0, 0, 0, 0, 0, 0},   {0, 0, 0, 0, 0, 1, 1, 1, 1, 0},
                                          {0, 1, -1, -2, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 1, -1, -2, 0},
                                          {0, 1, 1, 4, 0, 0, 0, 0, 0, 0},   {0, 0, 0, 0, 0, 0, 1, 1, 4, 0},
                                          {0, 1, -1, -8, 1, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 1, -1, -8, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  static constexpr int kMOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
};

// out[i] = w0 x[2i-1] + w2 x[2i+1] + w1 x[2i]: a filter of two taps, points 0, 1, and one of a single tap, whose
// products are added to those that only one output has.
struct StridedOfThree {
  static constexpr int kTaps = 3, kIn = 5, kStep = 4, kBefore = 1, kOut = 2, kV = 5, kM = 3, kProducts = 5;
  static constexpr double kB[kV][kIn] = {
      {1, 0, -1, 0, 0}, {0, 0, 1, 0, 0}, {0, 0, -1, 0, 1}, {0, 1, 0, 0, 0}, {0, 0, 0, 1, 0}};
  static constexpr double kG[kProducts][kTaps] = {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}, {0, 1, 0}};
  static constexpr double kA[kOut][kM] = {{1, 1, 0}, {0, 1, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4}, kMOf[kProducts] = {0, 1, 2, 0, 2};
};

// out[2i] = w1 x[i],  out[2i+1] = w2 x[i] + w0 x[i+1].
struct TransposedOfThree {
  static constexpr int kTaps = 3, kIn = 3, kStep = 2, kBefore = 0, kOut = 4, kV = 4, kM = 5, kProducts = 5;
  static constexpr double kB[kV][kIn] = {{1, -1, 0}, {0, 1, 0}, {0, -1, 1}, {1, 0, 0}};
  static constexpr double kG[kProducts][kTaps] = {{0, 0, 1}, {1, 0, 1}, {1, 0, 0}, {0, 1, 0}, {0, 1, 0}};
  static constexpr double kA[kOut][kM] = {{0, 0, 0, 1, 0}, {1, 1, 0, 0, 0}, {0, 0, 0, 0, 1}, {0, 1, 1, 0, 0}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 1}, kMOf[kProducts] = {0, 1, 2, 3, 4};
};

// Four taps of stride 1, points 5/4, -5/4, 3/8, -3/8: a third of the error of 0, 1, -1, 1/2. kBefore is the task's padding.
struct SameOfFour2 {
  static constexpr int kTaps = 4, kIn = 5, kStep = 2, kBefore = -1, kOut = 2, kV = 5, kM = 5, kProducts = 5;
  static constexpr double a = 1.25, b = .375;
  static constexpr double na = 1 / (2 * a * (a * a - b * b)), nb = 1 / (2 * b * (b * b - a * a));
  static constexpr double kB[kV][kIn] = {{-a * b * b, -b * b, a, 1, 0},
                                         {a * b * b, -b * b, -a, 1, 0},
                                         {-b * a * a, -a * a, b, 1, 0},
                                         {b * a * a, -a * a, -b, 1, 0},
                                         {a * a * b * b, 0, -a * a - b * b, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {{na, na * a, na * a * a, na * a * a * a},
                                                  {-na, na * a, -na * a * a, na * a * a * a},
                                                  {nb, nb * b, nb * b * b, nb * b * b * b},
                                                  {-nb, nb * b, -nb * b * b, nb * b * b * b},
                                                  {0, 0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 1, 1, 0}, {a, -a, b, -b, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4}, kMOf[kProducts] = {0, 1, 2, 3, 4};
};

// Four taps of stride 1 as two filters of two taps, of which each product is one of two such filters two pixels apart:
// points 5/8 and -5/8 twice over, which make a third of the rounding of 0 and 1. Of one filter, with n = 1 / 2a,
//   out[i] = n (w0 + a w1) (a x[i] + x[i+1]) + n (a w1 - w0) (x[i+1] - a x[i]),
// and out[i+1] is a times their difference, and w1 (x[i+2] - a a x[i]).
struct SameOfFour4 {
  static constexpr int kTaps = 4, kIn = 7, kStep = 4, kBefore = -1, kOut = 4, kV = 9, kM = 9, kProducts = 9;
  static constexpr double a = .625, c = a * a, n = 1 / (2 * a), h = n * a, q = h * h;
  static constexpr double kB[kV][kIn] = {
      {c, a, a, 1, 0, 0, 0},       {-c, a, -a, 1, 0, 0, 0},     {-c * a, 0, a - c, 0, 1, 0, 0},
      {-c, -a, a, 1, 0, 0, 0},     {c, -a, -a, 1, 0, 0, 0},     {c * a, 0, -a - c, 0, 1, 0, 0},
      {-c * a, -c, 0, 0, a, 1, 0}, {c * a, -c, 0, 0, -a, 1, 0}, {c * c, 0, -c, 0, -c, 0, 1}};
  static constexpr double kG[kProducts][kTaps] = {{n * n, n * h, n * h, q},
                                                  {-n * n, n * h, -n * h, q},
                                                  {0, n, 0, h},
                                                  {-n * n, -n * h, n * h, q},
                                                  {n * n, -n * h, -n * h, q},
                                                  {0, -n, 0, h},
                                                  {0, 0, n, h},
                                                  {0, 0, -n, h},
                                                  {0, 0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 0, 1, 1, 0, 0, 0, 0},
                                          {a, -a, 1, a, -a, 1, 0, 0, 0},
                                          {a, a, 0, -a, -a, 0, 1, 1, 0},
                                          {c, -c, a, -c, c, -a, a, -a, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8},
                       kMOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
};

// Four taps with three outputs, points 0, 1, -1, 1/2, -2: the inputs' transform is that of Same4.
struct SameOfFour3 {
  static constexpr int kTaps = 4, kIn = 6, kStep = 3, kBefore = -1, kOut = 3, kV = 6, kM = 6, kProducts = 6;
  static constexpr double kB[kV][kIn] = {{1, -1.5, -2, 1.5, 1, 0}, {0, 1, -.5, -2.5, -1, 0},
                                         {0, 1, -2.5, .5, 1, 0},   {0, 2, 1, -2, -1, 0},
                                         {0, 1, -2, -1, 2, 0},     {0, 1, -1.5, -2, 1.5, 1}};
  static constexpr double kG[kProducts][kTaps] = {
      {1, 0, 0, 0},
      {-kThird, -kThird, -kThird, -kThird},
      {-kThird, kThird, -kThird, kThird},
      {16 * kFifteenth, 8 * kFifteenth, 4 * kFifteenth, 2 * kFifteenth},
      {kFifteenth / 2, -kFifteenth, 2 * kFifteenth, -4 * kFifteenth},
      {0, 0, 0, 1}};
  static constexpr double kA[kOut][kM] = {{1, 1, 1, 1, 1, 0}, {0, 1, -1, .5, -2, 0}, {0, 1, 1, .25, 4, 1}};
  static constexpr int kVOf[kProducts] = {0, 1, 2, 3, 4, 5}, kMOf[kProducts] = {0, 1, 2, 3, 4, 5};
};

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern
