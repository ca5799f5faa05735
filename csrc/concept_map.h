// Attribution maps of one cross-attention layer from its queries, and the gradient to them, without
// ever storing the attention matrix. Kernels know plain pointers; the caller owns all memory.
#pragma once

#include "device.h"
#include "overlap_math.h"

namespace biasmap {

// A = softmax over T' of (q k'^T), maps = sum over heads and tokens of weights * A.
struct Attention {
    const void *query;    // [B, heads, n, d]
    int64_t strides[4];   // of it, in elements
    Float type;           // of it, and of its gradient
    const float *keys;    // [heads, T', d], already times 1 / sqrt(d)
    const float *weights; // [K, T']
    int64_t batch, heads, pixels, depth, tokens, concepts;
};

struct ConceptMapParams : Attention {
    float *maps; // [B, K, n] out
    bool add;    // to what is in `maps`
};

struct ConceptMapBackwardParams : Attention {
    const float *grad; // [B, K, n]
    void *grad_query;  // [B, heads, n, d] out
    int64_t grad_strides[4];
};

// Maps [P', B, K, n] that those of the first P' prompts are added to, a map's pixels in a row.
struct PromptMaps {
    float *data;
    int64_t strides[4]; // in elements
    int64_t prompts;
};

// The same for P prompts at once, from the U different tokens that they have among them.
struct PromptMapsParams {
    const float *query;     // [B, n, heads * d]
    int64_t strides[3];     // of it, in elements
    const float *keys;      // [heads, U, d], already times 1 / sqrt(d)
    const float *members;   // [P, U]: how often a prompt has a token
    const float *weights;   // [P, K, U]
    const PromptMaps *maps; // [targets] out
    int64_t targets;
    int64_t batch, heads, pixels, depth, tokens, prompts, concepts;
};

// Of a GPU's kernels: T' at most (77 for CLIP), and numbers that they read at once, in one or two
// accesses of 16 bytes. d and all strides but the last, 1, are multiples of it.
constexpr int kMostTokens = 80, kChunk = 8;

// dL/ds of a softmax's argument: p = softmax(s), g = dL/dp, mean = sum(p g).
BIASMAP_HD float softmax_gradient(float p, float g, float mean) { return p * (g - mean); }

// On the CPU this is what records; reference.py gives the gradient there.
void prompt_maps_cpu(const PromptMapsParams &p);
void concept_map_cuda(const ConceptMapParams &p, const CudaQueue &queue);
void concept_map_backward_cuda(const ConceptMapBackwardParams &p, const CudaQueue &queue);

} // namespace biasmap
