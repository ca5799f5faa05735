// Just enough of CUDA to run this package's kernels on a CPU, so that their algorithms, barriers
// and indices are tested without a GPU. Every CUDA thread of a block is a fiber; blocks run one
// after another. Fibers run in a shuffled order between two points of synchronisation, so that a
// missing barrier shows; a barrier that not all threads reach is an error. It says nothing about
// speed, about the GPU's own instructions, or about memory that another block writes.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local // static in a function: blocks run one at a time

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char *what) { // a fiber's stack cannot be unwound from outside
    std::fprintf(stderr, "emulated CUDA: %s (block %u, thread %u)\n", what, blockIdx.x,
                 threadIdx.x);
    std::abort();
}

enum class Wait { kNothing, kXor, kIndex, kBallot, kBlock, kDone };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait;
    uint64_t value, result; // that a lane shows the others, and gets
    int argument;
};

constexpr size_t kStack = 64 * 1024, kMostThreads = 1024;

struct Block {
    std::vector<Thread> threads{kMostThreads};
    ucontext_t scheduler;
    unsigned count = 0, current = 0;
    void (*body)(void *) = nullptr;
    void *argument = nullptr;
    uint32_t seed = 1;

    static Block &get() {
        static Block block;
        return block;
    }
    unsigned random(unsigned below) {
        seed = seed * 1664525u + 1013904223u;
        return (seed >> 8) % below;
    }

    // Called by a fiber: waits until all that have to be there are.
    uint64_t meet(Wait wait, uint64_t value, int argument) {
        Thread &mine = threads[current];
        mine.wait = wait, mine.value = value, mine.argument = argument;
        swapcontext(&mine.context, &scheduler);
        return mine.result;
    }

    static void enter() {
        Block &block = get();
        block.body(block.argument);
        block.threads[block.current].wait = Wait::kDone;
        swapcontext(&block.threads[block.current].context, &block.scheduler);
    }

    void resume(unsigned thread) {
        current = thread;
        threadIdx = dim3(thread, 0, 0);
        threads[thread].wait = Wait::kNothing;
        swapcontext(&scheduler, &threads[thread].context);
    }

    // Lets a warp's lanes go on if all of them are at the same point. True if they did.
    bool release_warp(unsigned first) {
        Thread *lanes = &threads[first];
        const Wait wait = lanes[0].wait;
        if (wait == Wait::kBlock || wait == Wait::kDone)
            return false;
        uint64_t ballot = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (lanes[lane].wait != wait)
                fail("the lanes of a warp are at different points");
            ballot |= static_cast<uint64_t>(lanes[lane].value != 0) << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int other = lanes[lane].argument;
            int source = lane;
            if (wait == Wait::kXor)
                source = lane ^ other;
            else if (wait == Wait::kIndex)
                source = other & 31;
            lanes[lane].result = wait == Wait::kBallot ? ballot : lanes[source].value;
        }
        run(first, 32);
        return true;
    }

    void run(unsigned first, unsigned many) {
        const unsigned start = random(many), step = 2 * random(many) + 1;
        for (unsigned i = 0; i < many; ++i) // many is a power of two: every thread once
            resume(first + (start + i * step) % many);
    }

    void release_block() {
        for (unsigned i = 0; i < count; ++i)
            if (threads[i].wait != threads[0].wait)
                fail("the threads of a block are at different points");
    }

    void launch(unsigned size) {
        if (size % 32 != 0 || size == 0 || size > kMostThreads)
            fail("a block must have whole warps");
        count = size;
        for (unsigned i = 0; i < count; ++i) {
            Thread &thread = threads[i];
            if (!thread.stack)
                thread.stack.reset(new char[kStack]);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = kStack;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, &Block::enter, 0);
        }
        do {
            const unsigned warps = count / 32, start = random(warps);
            for (unsigned w = 0; w < warps; ++w) {
                const unsigned first = (start + w) % warps * 32;
                run(first, 32);
                while (release_warp(first)) {
                }
            }
            release_block();
        } while (threads[0].wait != Wait::kDone);
    }
};

template <typename T> uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <typename T> T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T> T shuffle(unsigned mask, Wait wait, T value, int argument) {
    if (mask != 0xffffffffu)
        fail("only whole warps are emulated");
    return from_bits<T>(Block::get().meet(wait, bits_of(value), argument));
}

// Dynamic shared memory that the next launch may have.
inline size_t dynamic_limit = 48 * 1024;

// Whether the device has kernels of its architecture.
inline bool usable = true;

} // namespace emulation

inline void __syncthreads() { emulation::Block::get().meet(emulation::Wait::kBlock, 0, 0); }
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulation::shuffle(mask, emulation::Wait::kXor, value, lanes);
}
template <typename T> T __shfl_sync(unsigned mask, T value, int lane) {
    return emulation::shuffle(mask, emulation::Wait::kIndex, value, lane);
}
inline unsigned __ballot_sync(unsigned, bool is) {
    return static_cast<unsigned>(emulation::Block::get().meet(emulation::Wait::kBallot, is, 0));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicAdd(int *to, int value) {
    const int before = *to;
    *to += value;
    return before;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void *;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
inline const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : "cudaErrorNoKernelImageForDevice";
}
inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidValue
               ? "invalid argument"
               : "no kernel image is available for execution on the device";
}
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
    return emulation::usable ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int bytes) {
    // With the static part below 99 KiB, the least of all GPUs since 8.0. Never another number: a
    // kernel of another thread may be about to start with it.
    static int before = bytes;
    if (bytes > 90 * 1024 || bytes != before)
        return cudaErrorInvalidValue;
    emulation::dynamic_limit = static_cast<size_t>(bytes);
    return cudaSuccess;
}

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Arguments),
                               const Arguments &arguments) {
    static_assert(sizeof(Arguments) <= 4096, "a kernel's parameters");
    if (config->dynamicSmemBytes > emulation::dynamic_limit || config->gridDim.x == 0 ||
        config->gridDim.y == 0 || config->gridDim.y > 65535)
        return cudaErrorInvalidValue;
    emulation::dynamic_limit = 48 * 1024;
    struct Call {
        void (*kernel)(Arguments);
        const Arguments &arguments;
    } call{kernel, arguments};
    emulation::Block &block = emulation::Block::get();
    block.body = [](void *argument) {
        const auto &call = *static_cast<Call *>(argument);
        call.kernel(call.arguments);
    };
    block.argument = &call;
    gridDim = config->gridDim, blockDim = config->blockDim;
    for (unsigned y = 0; y < gridDim.y; ++y)
        for (unsigned x = 0; x < gridDim.x; ++x) {
            blockIdx = dim3(x, y, 0);
            block.launch(blockDim.x);
        }
    return cudaSuccess;
}
