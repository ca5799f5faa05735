// What the CUDA kernels share: number types, sums over a block, the launch. For .cu files only.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.h"

namespace biasmap {

constexpr unsigned kEveryLane = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ T from_float(float x);
template <> __device__ inline float from_float(float x) { return x; }
template <> __device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// Calls `with` with a number of that type.
template <typename With> void with_type(Float type, const With &with) {
    switch (type) {
    case Float::kFloat32:
        return with(float{});
    case Float::kFloat16:
        return with(__half{});
    case Float::kBfloat16:
        return with(__nv_bfloat16{});
    case Float::kAny:
        return;
    }
}

// Another lane's value, of any plain type.
template <typename V> __device__ V shuffled(V value, int lanes) {
    static_assert(sizeof(V) % sizeof(unsigned) == 0);
    unsigned words[sizeof(V) / sizeof(unsigned)];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (unsigned &word : words)
        word = __shfl_xor_sync(kEveryLane, word, lanes);
    memcpy(&value, words, sizeof value);
    return value;
}

__device__ inline float combined(float a, float b) { return a + b; }

// The values of a warp's lanes combined, in every lane. The order is fixed: same bits every time.
template <typename V> __device__ V combine_warp(V value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = combined(value, shuffled(value, lanes));
    return value;
}

// The values of a block's threads combined, in every thread. All of them have to call it; `partial`
// has one V per warp.
template <typename V> __device__ V combine_block(V value, V nothing, V *partial) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = combine_warp(value);
    __syncthreads(); // `partial` may still be read
    if (lane == 0)
        partial[warp] = value;
    __syncthreads();
    return combine_warp(lane < blockDim.x / 32 ? partial[lane] : nothing);
}

inline void check(cudaError_t status, const char *op) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(op) + ": CUDA error " + cudaGetErrorName(status) +
                                 " (" + cudaGetErrorString(status) + ")");
}

// Makes a device current, and the one before again at the end.
class DeviceGuard {
public:
    DeviceGuard(int device, const char *op) {
        check(cudaGetDevice(&before_), op);
        if (before_ == device)
            before_ = -1;
        else
            check(cudaSetDevice(device), op);
    }
    ~DeviceGuard() {
        if (before_ >= 0)
            cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard &) = delete;

private:
    int before_ = -1;
};

// Dynamic shared memory that a kernel gets without asking: 48 KiB, less at most 16 of static.
constexpr size_t kOrdinaryShared = 32 * 1024;
// The most that any launch asks for: a block may have 99 KiB in all on 8.6 and 8.9, more on 8.0 and
// 9.0.
constexpr size_t kMostShared = 64 * 1024;

struct Shape {
    dim3 grid;
    unsigned threads;
    size_t shared; // bytes of dynamic shared memory
};

// Puts a kernel into the caller's queue: it allocates nothing and waits for nothing.
template <typename Arguments>
void launch(const char *op, void (*kernel)(Arguments), const Shape &shape,
            const Arguments &arguments, const CudaQueue &queue) {
    if (shape.grid.x == 0 || shape.grid.y == 0)
        return;
    const DeviceGuard guard(queue.device, op);
    // Always the same number: a launch on another thread, or in a captured graph, relies on it too.
    if (shape.shared > kOrdinaryShared)
        check(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kMostShared)),
              op);
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments), op);
}

} // namespace biasmap
