// Overlap of attribution maps: hard percentile IoU, exact soft top-k masks, SoftIoU and gradients.
// Kernels know plain pointers; the caller owns all memory, inputs are contiguous, indices checked.
// Float32 in and out, long sums in double. The same inputs give the same bits on one machine,
// whatever the number of threads.
#pragma once

#include <cstdint>

#include "overlap_math.h"

namespace biasmap {

struct PairsIouParams {
    const float *maps;     // [B, K, N]
    const int64_t *pairs;  // [P, 2] concept indices
    float *iou;            // [B, P] out; NaN if either map has a non-finite value
    int32_t *union_pixels; // [B, P] out; -1 there
    int32_t *area;         // [B, K] out: pixels in each mask; -1 there
    uint64_t *masks;       // [B, K, ceil(N / 64)] scratch: one bit a pixel
    int64_t batch, concepts, pixels, pair_count;
    double percentile; // in [0, 100)
};

struct SoftTopkParams {
    const float *x; // [M, N]
    float *mask;    // [M, N] out; NaN where x has a non-finite value in the row
    SoftMap *state; // [M] out
    int64_t rows, pixels;
    double fraction, temperature;
};

struct SoftTopkBackwardParams {
    const float *grad;    // [M, N]
    const float *mask;    // [M, N]
    const SoftMap *state; // [M]
    float *grad_x;        // [M, N] out
    int64_t rows, pixels;
};

struct SoftIouParams {
    const float *maps;    // [B, K, N]
    const int64_t *pairs; // [P, 2]
    float *iou;           // [B, P] out
    SoftMap *state;       // [B, K] out; zeros for a map that no pair names
    int64_t batch, concepts, pixels, pair_count;
    double fraction, temperature;
};

struct SoftIouBackwardParams {
    const float *grad;    // [B, P]
    const float *iou;     // [B, P] from the forward pass
    const float *maps;    // [B, K, N]
    const int64_t *pairs; // [P, 2]
    const SoftMap *state; // [B, K] from the forward pass
    float *grad_maps;     // [B, K, N] out
    int64_t batch, concepts, pixels, pair_count;
    double fraction;
};

void pairs_iou_cpu(const PairsIouParams &p);
void soft_topk_cpu(const SoftTopkParams &p);
void soft_topk_backward_cpu(const SoftTopkBackwardParams &p);
void soft_iou_cpu(const SoftIouParams &p);
void soft_iou_backward_cpu(const SoftIouBackwardParams &p);

// The instruction set that the CPU kernels run with on this machine.
const char *cpu_isa();

} // namespace biasmap
