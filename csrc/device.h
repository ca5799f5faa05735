// What the parameters of every op can name: the type of a tensor's numbers, a queue of a GPU.
#pragma once

#include <cstdint>

namespace biasmap {

enum class Float : int32_t { kAny, kFloat32, kFloat16, kBfloat16 };

struct CudaQueue {
    int32_t device;
    void *stream; // cudaStream_t; null is the default stream
};

// Concepts of a GPU's kernels at most: matrices of them lie in shared memory.
constexpr int kMostConceptsOnGpu = 16;

} // namespace biasmap
