// What a block of a GPU does with one map: its range, its percentile, the root of its soft mask.
// Every function is for all threads of the block together, and gives all of them its result.
#pragma once

#include "cuda_block.h"
#include "overlap_math.h"

namespace biasmap {

constexpr unsigned kThreads = 512, kWarps = kThreads / 32; // at most
// Float sums of a thread run over this many pixels at most, then go into a double.
constexpr unsigned kRun = 64;

__device__ inline Range combined(Range a, Range b) {
    return {fminf(a.lo, b.lo), fmaxf(a.hi, b.hi), a.bad + b.bad};
}
__device__ inline Neighbours combined(Neighbours a, Neighbours b) {
    return {fmaxf(a.below, b.below), fminf(a.above, b.above)};
}

// What a block's threads tell one another in `sum_pixels`.
template <int kSums> struct Sums {
    float partial[kWarps][kSums];
    double total[kSums];
};

// Sums over n pixels of what `add(i, sums)` adds for each, into `work.total`. The order is fixed.
template <int kSums, typename Add>
__device__ void sum_pixels(unsigned n, Sums<kSums> &work, const Add &add) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (unsigned start = 0; start < n; start += kRun * blockDim.x) {
        const unsigned end = min(n, start + kRun * blockDim.x);
        float sums[kSums] = {};
#pragma unroll(kSums < 4 ? 4 : 1)
        for (unsigned i = start + threadIdx.x; i < end; i += blockDim.x)
            add(i, sums);
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
            const float sum = combine_warp(sums[s]);
            if (lane == 0)
                work.partial[warp][s] = sum;
        }
        __syncthreads();
        for (int s = threadIdx.x; s < kSums; s += blockDim.x) {
            double total = start == 0 ? 0.0 : work.total[s];
            for (unsigned w = 0; w < warps; ++w)
                total += work.partial[w][s];
            work.total[s] = total;
        }
        __syncthreads();
    }
}

// What they tell one another about the map in hand.
struct Work {
    union {
        Range ranges[kWarps];
        Neighbours neighbours[kWarps];
    } partial;
    Sums<1> count;
    Sums<3> mass;
    RootSearch search;
    SoftMap map;
    bool done;
};

template <typename T, bool kCached> struct Map {
    const T *global;
    float *cache; // shared memory; a thread only meets the pixels that it put there
    unsigned n;

    __device__ float load(unsigned i) const {
        const float x = to_float(global[i]);
        if constexpr (kCached)
            cache[i] = x;
        return x;
    }
    __device__ float operator[](unsigned i) const {
        if constexpr (kCached)
            return cache[i];
        else
            return to_float(global[i]);
    }
};

// The map's range, and the map in the cache.
template <typename X> __device__ Range load_map(const X &x, Work &work) {
    Range range{FLT_MAX, -FLT_MAX, 0};
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < x.n; i += blockDim.x) {
        const float value = x.load(i);
        range.lo = fminf(range.lo, value);
        range.hi = fmaxf(range.hi, value);
        range.bad += !(fabsf(value) <= FLT_MAX);
    }
    return combine_block(range, Range{FLT_MAX, -FLT_MAX, 0}, work.partial.ranges);
}

template <typename X> struct CountAtMost {
    const X &x;
    Work &work;

    __device__ int64_t operator()(float pivot) const {
        sum_pixels(x.n, work.count, [&](unsigned i, float (&sum)[1]) {
            sum[0] += x[i] <= pivot ? 1.0f : 0.0f; // exact: at most 32 kRun of them
        });
        return static_cast<int64_t>(work.count.total[0]);
    }
};

// numpy.percentile(x, percentile, method="linear"), bit for bit; NaN if a value is not finite.
template <typename X> __device__ inline float percentile_of(const X &x, Position at, Work &work) {
    const Range range = load_map(x, work);
    if (range.bad > 0)
        return nanf("");
    const auto neighbours = [&](float pivot) {
        Neighbours beside{-FLT_MAX, FLT_MAX};
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < x.n; i += blockDim.x) {
            if (x[i] <= pivot)
                beside.below = fmaxf(beside.below, x[i]);
            else
                beside.above = fminf(beside.above, x[i]);
        }
        return combine_block(beside, Neighbours{-FLT_MAX, FLT_MAX}, work.partial.neighbours);
    };
    const Neighbours values =
        order_statistics(x.n, at.below, range, CountAtMost<X>{x, work}, neighbours);
    return percentile_lerp(values.below, values.above, at.share);
}

// Root of sum(m) = fraction * n; the sums are those of mask_mass in overlap_cpu.cpp.
template <typename X>
__device__ inline SoftMap solve_soft_map(const X &x, const SoftSettings &settings, Work &work) {
    const Range range = load_map(x, work);
    if (range.bad > 0)
        return unknown_soft_map();
    if (range.lo == range.hi)
        return constant_soft_map(settings.logit);
    if (threadIdx.x == 0)
        work.search = search_root(range.lo, range.hi, x.n, settings);
    __syncthreads();
    const double start =
        near_order_statistic(range, work.search.rank(x.n), CountAtMost<X>{x, work});
    if (threadIdx.x == 0) {
        work.search.start(start);
        work.map = work.search.map();
    }
    __syncthreads();
    for (;;) {
        const SoftMap s = work.map;
        sum_pixels(x.n, work.mass, [&](unsigned i, float (&sums)[3]) {
            const float z = soft_argument(x[i], s);
            const float tail = soft_tail(z);
            sums[0] += z >= 0.0f ? -tail : tail;
            sums[1] += z >= 0.0f ? 1.0f : 0.0f;
            sums[2] += soft_weight(tail);
        });
        if (threadIdx.x == 0) {
            const double *sums = work.mass.total;
            work.done = work.search.step({sums[1] + sums[0], sums[2]});
            work.map = work.search.map();
        }
        __syncthreads();
        if (work.done)
            return work.map;
    }
}

} // namespace biasmap
