// Bilinear algorithms for the convolutions of GANs, and plain ones for few channels and few pixels. See
// convolution.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// The rows of the table in convolution_rows.h, in its order.
enum class ConvolutionRow {
  kUp9 = 0,             // nearest x2, then 3x3
  kDown9,               // 3x3, then the sum of each 2x2
  kSame2,               // 3x3 stride 1, F(2x2)
  kSame4,               // 3x3 stride 1, F(4x4)
  kStrided2,            // 4x4 stride 2 padding 1, two-tap phases F(2x2)
  kStrided4,            // the same, F(4x4)
  kTransposed2,         // transposed 4x4 stride 2 padding 1, two-tap phases F(2x2)
  kTransposed4,         // the same, F(4x4)
  kStridedOfThree,      // 3x3 stride 2 padding 1: a two-tap phase by F(2x2), and one of one tap
  kTransposedOfThree,   // transposed 3x3 stride 2 padding 1 with output padding 1, likewise
  kSameOfFour2,         // 4x4 stride 1, F(2x2)
  kSameOfFour3,         // 4x4 stride 1, F(3x3)
  kDirect,              // any square kernel of stride 1: the convolution itself
  kStridedDirect,       // 4x4 stride 2 padding 1: the same
  kTransposedDirect,    // transposed 4x4 stride 2 padding 1: the same
  kStridedStreamed,     // 4x4 stride 2 padding 1, as one product of matrices
  kTransposedStreamed,  // transposed 4x4 stride 2 padding 1: the same
  kPointwise,           // 1x1 stride 1, as a product of matrices
  kSameOfFour4,         // 4x4 stride 1, two-tap filters of two-tap filters
};
constexpr int kConvolutionRows = 19;

// A batch of images: [images, channels, height, width], contiguous or channels_last.
struct ConvolutionImages {
  int64_t channels, height, width;
  bool channels_last;
  void* data;
  int border =
      0;  // what stands outside: 0 zeros, 1 the pixels mirrored at the outermost ones, 2 these themselves
};

struct Convolution {
  int64_t images;
  ConvolutionImages in, out;  // for the weight gradient, `out` is the gradient that came in
  int64_t padding;            // of stride 1; the other rows have their own
  int64_t taps;               // of kDirect, in each direction; the other rows have their own
  // Weight, or where its gradient goes: element (out channel o, in channel i, tap y, x) at
  // o * stride_out + i * stride_in + y * stride_y + x * stride_x.
  void* weight;
  int64_t stride_out, stride_in, stride_y, stride_x;
  bool flip;         // the taps are read back to front
  double scale;      // of the weight
  const void* bias;  // [out.channels] or null
  double slope;      // of a leaky ReLU on the result; 1 for none
};

struct ConvolutionKernels {
  void (*forward[kDtypes][kConvolutionRows])(const Convolution&, const Parallel&);
  void (*weight_gradient[kDtypes][kConvolutionRows])(const Convolution&, const Parallel&);
};

GANKERN_KERNELS(ConvolutionKernels, convolution)

}  // namespace gankern
