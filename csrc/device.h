// What the parameters of every op can name: the type of a tensor's numbers, a queue of a GPU.
#pragma once

#include <cstdint>

namespace biasmap {

enum class Float : int32_t { kFloat32, kFloat16, kBfloat16 };

struct CudaQueue {
    int32_t device;
    void *stream; // cudaStream_t; null is the default stream
};

} // namespace biasmap
