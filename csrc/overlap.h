// Overlap of attribution maps: hard percentile IoU, exact soft top-k masks, SoftIoU and gradients.
// Kernels know plain pointers; the caller owns all memory, inputs are contiguous. Maps are float32
// on the CPU and of type `type` on a GPU, everything else is float32, long sums are double. The
// same inputs give the same bits on one machine, whatever the number of threads.
#pragma once

#include <cstdint>

#include "device.h"
#include "overlap_math.h"

namespace biasmap {

// Concept indices [P, 2]: checked where they lie on the host, which is where a GPU's kernels also
// take up to kPairsByValue of them from; those on a GPU cannot be checked without waiting for it.
constexpr int64_t kPairsByValue = 1024;
// A GPU's kernels keep one row a concept in shared memory, and concept indices in a byte.
constexpr int64_t kMostConceptsOnGpu = 128;

// Masks of up to 16 KiB a set stay in a GPU's shared memory, others in the caller's scratch, read
// back from L2 (one bit a pixel: 8 concepts at 128 x 128 just fit).
constexpr int64_t kSharedMaskWords = 2048;

// Words of scratch for one map's mask.
inline int64_t mask_words(int64_t concepts, int64_t pixels, bool on_gpu) {
    const int64_t words = (pixels + 63) / 64;
    return on_gpu && concepts * words <= kSharedMaskWords ? 0 : words;
}

struct Pairs {
    const int64_t *data;
    int64_t count;
    bool on_host;
};

struct PairsIouParams {
    const void *maps; // [B, K, N]
    Float type;
    Pairs pairs;
    float *iou;            // [B, P] out; NaN if either map has a non-finite value
    int32_t *union_pixels; // [B, P] out; -1 there
    int32_t *area;         // [B, K] out: pixels in each mask; -1 there
    uint64_t *masks;       // [B, K, mask_words] scratch: one bit a pixel
    int64_t batch, concepts, pixels;
    double percentile; // in [0, 100)
};

struct SoftTopkParams {
    const void *x; // [M, N]
    Float type;
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
    const void *maps; // [B, K, N]
    Float type;
    Pairs pairs;
    float *iou;     // [B, P] out
    SoftMap *state; // [B, K] out; zeros for a map that no pair names
    int64_t batch, concepts, pixels;
    double fraction, temperature;
};

struct SoftIouBackwardParams {
    const float *grad; // [B, P]
    const float *iou;  // [B, P] from the forward pass
    const void *maps;  // [B, K, N]
    Float type;
    Pairs pairs;
    const SoftMap *state; // [B, K] from the forward pass
    void *grad_maps;      // [B, K, N] out, of type `type`
    int64_t batch, concepts, pixels;
    double fraction;
};

void pairs_iou_cpu(const PairsIouParams &p);
void soft_topk_cpu(const SoftTopkParams &p);
void soft_topk_backward_cpu(const SoftTopkBackwardParams &p);
void soft_iou_cpu(const SoftIouParams &p);
void soft_iou_backward_cpu(const SoftIouBackwardParams &p);

// One launch each. A pair of concepts that there are not gives NaN, and no gradient.
void pairs_iou_cuda(const PairsIouParams &p, const CudaQueue &queue);
void soft_topk_cuda(const SoftTopkParams &p, const CudaQueue &queue);
void soft_topk_backward_cuda(const SoftTopkBackwardParams &p, const CudaQueue &queue);
void soft_iou_cuda(const SoftIouParams &p, const CudaQueue &queue);
void soft_iou_backward_cuda(const SoftIouBackwardParams &p, const CudaQueue &queue);

// The instruction set that the CPU kernels run with on this machine.
const char *cpu_isa();

} // namespace biasmap
