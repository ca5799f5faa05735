// Overlap of attribution maps: hard percentile IoU, exact soft top-k masks, SoftIoU and gradients.
// Kernels know plain pointers; the caller owns all memory, inputs are contiguous. Maps are float32
// on the CPU and of type `type` on a GPU, everything else is float32, long sums are double. The
// same inputs give the same bits on one machine, whatever the number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "device.h"
#include "overlap_math.h"

namespace biasmap {

// Pairs of a GPU's kernels at most: they lie in the parameters, so that nothing waits for a copy.
constexpr int kMostPairsOnGpu = 1024;

// Concept indices [P, 2] on the host.
struct Pairs {
    const int64_t *data;
    int64_t count;
};

// B sets of K maps with N pixels, and which of a set's maps are compared.
struct MapSets {
    const void *maps; // [B, K, N]
    Float type;
    Pairs pairs;
    int64_t batch, concepts, pixels;
};

struct PairsIouParams : MapSets {
    float *iou;            // [B, P] out; NaN if either map has a non-finite value
    int32_t *union_pixels; // [B, P] out; -1 there
    int32_t *area;         // [B, K] out: pixels in each mask; -1 there
    float *threshold;      // [B, K] out: the percentile; NaN there
    double percentile;     // in [0, 100)
};

// A non-finite value in a row gives NaN.
struct SoftTopkParams {
    const void *x;  // [M, N]
    Float type;     // of it, and of its gradient
    float *mask;    // [M, N] out
    SoftMap *state; // [M] out
    int64_t rows, pixels;
    SoftSettings settings;
};

struct SoftTopkBackwardParams : SoftTopkParams { // with what the forward pass gave
    const float *grad;                           // [M, N]
    void *grad_x;                                // [M, N] out
};

// With w = m (1 - m), a map's gradient needs only the means of its partners' masks under w: with
// those of the forward pass at hand, the backward pass reads the maps once.
struct SoftIouParams : MapSets {
    float *iou;     // [B, P] out
    SoftMap *state; // [B, K] out
    float *means;   // [B, K, K] out: sum(w_k m_j) / sum(w_k) of every pair (k, j) and (j, k)
    SoftSettings settings;
};

struct SoftIouBackwardParams : SoftIouParams { // with what the forward pass gave
    const float *grad;                         // [B, P]
    void *grad_maps;                           // [B, K, N] out, of type `type`
};

void pairs_iou_cpu(const PairsIouParams &p);
void soft_topk_cpu(const SoftTopkParams &p);
void soft_topk_backward_cpu(const SoftTopkBackwardParams &p);
void soft_iou_cpu(const SoftIouParams &p);
void soft_iou_backward_cpu(const SoftIouBackwardParams &p);

// Why a GPU cannot run the kernels: its architecture, or its driver. Empty if it can.
std::string cuda_refusal(int device);

void pairs_iou_cuda(const PairsIouParams &p, const CudaQueue &queue);
void soft_topk_cuda(const SoftTopkParams &p, const CudaQueue &queue);
void soft_topk_backward_cuda(const SoftTopkBackwardParams &p, const CudaQueue &queue);
void soft_iou_cuda(const SoftIouParams &p, const CudaQueue &queue);
void soft_iou_backward_cuda(const SoftIouBackwardParams &p, const CudaQueue &queue);

} // namespace biasmap
