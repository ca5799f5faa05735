// What a block of a GPU does with one map: its range, its percentile, the root of its soft mask.
// Every function is for all threads of the block together unless it says otherwise.
#pragma once

#include "cuda_block.h"
#include "overlap_math.h"

namespace biasmap {

constexpr unsigned kThreads = 512, kWarps = kThreads / 32; // at most
constexpr int kBins = 256;
// Float sums of a thread run over so many pixels at most, then go into a double.
constexpr unsigned kRun = 64;

__device__ inline Mass combined(Mass a, Mass b) { return {a.mass + b.mass, a.weight + b.weight}; }

struct Range {
    float lo, hi;
    int bad; // values that are not finite
};
__device__ inline Range combined(Range a, Range b) {
    return {fminf(a.lo, b.lo), fmaxf(a.hi, b.hi), a.bad + b.bad};
}

struct Least {
    uint32_t key;
};
__device__ inline Least combined(Least a, Least b) { return {min(a.key, b.key)}; }

// What a block's threads tell one another about the map in hand.
struct Work {
    int histogram[kBins];
    union {
        Range ranges[kWarps];
        Mass masses[kWarps];
        Least keys[kWarps];
        int counts[kWarps];
    } partial;
    bool done;
    RootSearch search;
    SoftMap map;
    uint32_t key; // of the order statistic, as far as it is known
    int rank;     // of it among the values that agree so far
    int equal;    // how many those are
    float threshold;
};

template <typename T, bool kCached> struct Map {
    const T *global;
    float *cache; // shared memory; a thread only meets the pixels that it put there

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

// The map's range, and the map in the cache. In warp 0.
template <typename X> __device__ Range load_map(const X &x, unsigned n, Work &work) {
    Range range{FLT_MAX, -FLT_MAX, 0};
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const float value = x.load(i);
        range.lo = fminf(range.lo, value);
        range.hi = fmaxf(range.hi, value);
        range.bad += !(fabsf(value) <= FLT_MAX);
    }
    return combine_block(range, Range{FLT_MAX, -FLT_MAX, 0}, work.partial.ranges);
}

__device__ inline void clear(int *histogram) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x)
        histogram[bin] = 0;
}

struct Bin {
    int index, before, count; // `before`: values in the bins before
};

// The bin that holds the value of this rank, counted from 0. For one warp, every lane of it.
__device__ inline Bin find_bin(const int *histogram, int rank) {
    constexpr int kOwn = kBins / 32;
    const int lane = threadIdx.x % 32;
    int own[kOwn], sum = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
        sum += own[j] = histogram[lane * kOwn + j];
    int upto = sum; // of this lane and those before it
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int below = __shfl_up_sync(kEveryLane, upto, lanes);
        upto += lane >= lanes ? below : 0;
    }
    Bin found{0, 0, 0};
    int before = upto - sum;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        if (rank >= before && rank < before + own[j])
            found = {lane * kOwn + j, before, own[j]};
        before += own[j];
    }
    const int who = __ffs(__ballot_sync(kEveryLane, found.count > 0)) - 1;
    return {__shfl_sync(kEveryLane, found.index, who), __shfl_sync(kEveryLane, found.before, who),
            __shfl_sync(kEveryLane, found.count, who)};
}

// numpy.percentile(x, percentile, method="linear"), bit for bit; NaN if a value is not finite.
// Exact selection, eight bits of the floats' order at a time.
template <typename X>
__device__ inline float percentile_of(const X &x, unsigned n, Position at, Work &work) {
    const Range range = load_map(x, n, work);
    if (threadIdx.x == 0) {
        work.done = range.bad > 0;
        work.threshold = nanf("");
        work.key = 0, work.rank = static_cast<int>(at.below);
    }
    __syncthreads();
    if (work.done)
        return work.threshold;

    for (int shift = 24; shift >= 0; shift -= 8) {
        clear(work.histogram);
        __syncthreads();
        const uint32_t key = work.key, known = shift == 24 ? 0 : ~0u << (shift + 8);
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
            const uint32_t mine = order_key(x[i]);
            if ((mine & known) == key)
                atomicAdd(&work.histogram[mine >> shift & (kBins - 1)], 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const Bin bin = find_bin(work.histogram, work.rank);
            __syncwarp();
            if (threadIdx.x == 0) {
                work.key |= static_cast<uint32_t>(bin.index) << shift;
                work.rank -= bin.before;
                work.equal = bin.count;
            }
        }
        __syncthreads();
    }

    const uint32_t key = work.key;
    Least next{order_key(FLT_MAX)};
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const uint32_t mine = order_key(x[i]);
        if (mine > key)
            next.key = min(next.key, mine);
    }
    next = combine_block(next, Least{order_key(FLT_MAX)}, work.partial.keys);
    if (threadIdx.x == 0) {
        const bool same = work.rank + 1 < work.equal || at.below + 1 == n;
        const float below = from_order_key(key);
        work.threshold = percentile_lerp(below, same ? below : from_order_key(next.key), at.share);
    }
    __syncthreads();
    return work.threshold;
}

// This thread's part of the sums: see mask_mass in overlap_cpu.cpp.
template <typename X> __device__ Mass mask_mass(const X &x, unsigned n, SoftMap s) {
    Mass total{0.0, 0.0};
    for (unsigned i = threadIdx.x; i < n;) {
        const unsigned end = min(n, i + kRun * blockDim.x);
        float tails = 0.0f, weight = 0.0f;
        int above = 0;
#pragma unroll 4
        for (; i < end; i += blockDim.x) {
            const float z = soft_argument(x[i], s);
            const float tail = soft_tail(z);
            tails += z >= 0.0f ? -tail : tail;
            weight += soft_weight(tail);
            above += z >= 0.0f;
        }
        total.mass += above + static_cast<double>(tails);
        total.weight += weight;
    }
    return total;
}

struct SoftSettings {
    double fraction, logit, temperature;
};

// Root of sum(m) = fraction * n. The start is read off a histogram over the map's range: bins of
// range / 256 are fractions of the masks' edge unless the temperature is far below 0.01.
template <typename X>
__device__ inline SoftMap solve_soft_map(const X &x, unsigned n, const SoftSettings &settings,
                                         Work &work) {
    clear(work.histogram);
    const Range range = load_map(x, n, work);
    if (threadIdx.x == 0) {
        work.done = range.bad > 0 || range.lo == range.hi;
        if (work.done)
            work.map = range.bad > 0 ? unknown_soft_map() : constant_soft_map(settings.logit);
        else
            work.search = search_root(range.lo, range.hi, n, settings.fraction, settings.logit,
                                      settings.temperature);
        work.partial.ranges[0] = range;
    }
    __syncthreads();
    if (work.done)
        return work.map;

    const auto scale = static_cast<float>(work.search.scale);
    const float lo = work.partial.ranges[0].lo * scale;
    const float width = work.partial.ranges[0].hi * scale - lo;
    const float bins = kBins / width;
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const int bin = static_cast<int>((x[i] * scale - lo) * bins);
        atomicAdd(&work.histogram[min(bin, kBins - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const auto rank = static_cast<int>(min(n - work.search.wanted, n - 1.0));
        const Bin bin = find_bin(work.histogram, rank);
        if (threadIdx.x == 0) {
            const double inside = (rank - bin.before + 0.5) / bin.count;
            work.search.start(lo + (bin.index + inside) * width / kBins);
            work.map = work.search.map();
        }
    }
    __syncthreads();

    for (;;) {
        const Mass mass =
            combine_block(mask_mass(x, n, work.map), Mass{0.0, 0.0}, work.partial.masses);
        if (threadIdx.x == 0) {
            work.done = work.search.step(mass);
            work.map = work.search.map();
        }
        __syncthreads();
        if (work.done)
            return work.map;
    }
}

} // namespace biasmap
