// One block for one set of maps [K, N] (one map, for the soft top-k): its K roots or thresholds one
// after the other, then its pairs, so that one launch does everything, nothing has to be zeroed
// beforehand, and blocks never wait for one another. At 256 sets that fills a GPU; one set of two
// maps, as in guidance, leaves most of it idle, for microseconds of a UNet call's milliseconds. A
// cooperative launch would spread one set over the GPU, and has limits on its grid and its company.
#include "overlap.h"
#include "overlap_block.h"

namespace biasmap {
namespace {

// Two blocks of these on a multiprocessor leave a thread 80 registers; with kThreads it is 64, and
// the 36 sums of `gram` spill.
constexpr unsigned kGramThreads = 384;
// A map of this size is kept in shared memory, 64 KiB, larger ones are read from L2 in every pass.
constexpr int64_t kCachedPixels = 16384;
static_assert(kCachedPixels * sizeof(float) + kSharedMaskWords * sizeof(uint64_t) <= kMostShared);
// Concepts whose masks a thread holds in registers at once.
constexpr int kGroup = 8;

// ---- pairs of concepts -----------------------------------------------------------------------

struct Pair {
    int first, second; // -1 if there is no such concept
};

// Lies in the kernel's parameters: a list on the host needs no copy to the GPU, hence no waiting.
struct PairList {
    const int64_t *on_gpu; // null: `value` holds them
    int count, concepts;
    uint8_t value[2 * kPairsByValue];

    __device__ Pair operator[](int i) const {
        if (on_gpu == nullptr)
            return {value[2 * i], value[2 * i + 1]};
        const int64_t first = on_gpu[2 * i], second = on_gpu[2 * i + 1];
        const bool there = first >= 0 && first < concepts && second >= 0 && second < concepts;
        return there ? Pair{static_cast<int>(first), static_cast<int>(second)} : Pair{-1, -1};
    }
};

PairList listed(const Pairs &pairs, int64_t concepts) {
    PairList list{};
    list.count = static_cast<int>(pairs.count), list.concepts = static_cast<int>(concepts);
    if (pairs.on_host)
        std::copy_n(pairs.data, 2 * pairs.count, list.value);
    else
        list.on_gpu = pairs.data;
    return list;
}

// Whether a pair names the concept; the answer for the whole block, which has to ask together.
__device__ bool is_named(const PairList &pairs, int concept) {
    int found = 0;
    for (int i = threadIdx.x; i < pairs.count; i += blockDim.x) {
        const Pair pair = pairs[i];
        found |= pair.first == concept || pair.second == concept;
    }
    return __syncthreads_or(found) != 0;
}

// ---- the kernels -----------------------------------------------------------------------------

struct PairsIouArguments {
    PairsIouParams p;
    PairList pairs;
    Position at;
    bool masks_in_shared;
};

template <typename T, bool kCached>
__global__ void __launch_bounds__(kThreads, 2)
    pairs_iou_kernel(const __grid_constant__ PairsIouArguments arguments) {
    __shared__ Work work;
    extern __shared__ float dynamic_shared[]; // [N] if cached, then the masks if they fit
    const PairsIouParams &p = arguments.p;
    const PairList &pairs = arguments.pairs;
    const auto n = static_cast<unsigned>(p.pixels);
    const auto concepts = static_cast<int>(p.concepts);
    const int64_t set = blockIdx.x;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const unsigned words = (n + 63) / 64 * 2; // of 32 bits
    int32_t *area = p.area + set * concepts;
    uint32_t *masks = arguments.masks_in_shared
                          ? reinterpret_cast<uint32_t *>(dynamic_shared + (kCached ? p.pixels : 0))
                          : reinterpret_cast<uint32_t *>(p.masks) + set * concepts * words;

    // 1) one mask a map
    for (int k = 0; k < concepts; ++k) {
        const Map<T, kCached> x{static_cast<const T *>(p.maps) + (set * concepts + k) * p.pixels,
                                dynamic_shared};
        const float threshold = percentile_of(x, n, arguments.at, work);
        int count = 0;
        for (unsigned word = warp; word < words; word += warps) {
            const unsigned i = 32 * word + lane;
            const unsigned bits = __ballot_sync(kEveryLane, i < n && x[i] > threshold);
            if (lane == 0) {
                masks[k * words + word] = bits;
                count += __popc(bits);
            }
        }
        count = combine_block(count, 0, work.partial.counts);
        if (threadIdx.x == 0)
            area[k] = threshold == threshold ? count : -1;
        __syncthreads();
    }

    // 2) pairs, one a warp
    for (int i = warp; i < pairs.count; i += warps) {
        const Pair pair = pairs[i];
        float iou = nanf("");
        int either = -1;
        if (pair.first >= 0 && area[pair.first] >= 0 && area[pair.second] >= 0) {
            const uint32_t *first = masks + pair.first * words;
            const uint32_t *second = masks + pair.second * words;
            int both = 0;
            for (unsigned word = lane; word < words; word += 32)
                both += __popc(first[word] & second[word]);
            both = combine_warp(both);
            either = area[pair.first] + area[pair.second] - both;
            iou = either == 0 ? 0.0f : static_cast<float>(static_cast<double>(both) / either);
        }
        if (lane == 0) {
            p.iou[set * pairs.count + i] = iou;
            p.union_pixels[set * pairs.count + i] = either;
        }
    }
}

struct SoftTopkArguments {
    SoftTopkParams p;
    SoftSettings settings;
};

template <typename T, bool kCached>
__global__ void __launch_bounds__(kThreads, 2)
    soft_topk_kernel(const __grid_constant__ SoftTopkArguments arguments) {
    __shared__ Work work;
    extern __shared__ float dynamic_shared[]; // [N] if cached
    const SoftTopkParams &p = arguments.p;
    const auto n = static_cast<unsigned>(p.pixels);
    const int64_t row = blockIdx.x;
    const Map<T, kCached> x{static_cast<const T *>(p.x) + row * p.pixels, dynamic_shared};
    const SoftMap s = solve_soft_map(x, n, arguments.settings, work);
    if (threadIdx.x == 0)
        p.state[row] = s;
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x)
        p.mask[row * p.pixels + i] = soft_mask(x[i], s);
}

__global__ void __launch_bounds__(kThreads)
    soft_topk_backward_kernel(const __grid_constant__ SoftTopkBackwardParams p) {
    __shared__ Mass partial[kWarps];
    __shared__ float mean;
    const auto n = static_cast<unsigned>(p.pixels);
    const int64_t row = blockIdx.x;
    const float *grad = p.grad + row * p.pixels, *mask = p.mask + row * p.pixels;

    Mass sums{0.0, 0.0}; // w g, w
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const float w = soft_weight(mask[i]);
        sums.mass += w * grad[i];
        sums.weight += w;
    }
    sums = combine_block(sums, Mass{0.0, 0.0}, partial);
    if (threadIdx.x == 0)
        mean = implicit_mean(sums.mass, sums.weight);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x)
        p.grad_x[row * p.pixels + i] = implicit_gradient(mask[i], grad[i], mean, p.state[row]);
}

struct SoftIouArguments {
    SoftIouParams p;
    PairList pairs;
    SoftSettings settings;
};

// The masks of one set, by the roots in shared memory.
template <typename T> struct Masks {
    const T *maps; // [K, N]
    int64_t pixels;
    const SoftMap *states; // [K]
    const bool *named;     // [K]
    int concepts;

    // 0 for a map that no pair names, whatever is in it
    __device__ float at(int concept, unsigned i) const {
        if (concept >= concepts || !named[concept])
            return 0.0f;
        return soft_mask(to_float(maps[concept * pixels + i]), states[concept]);
    }
};

struct GramWork {
    float partial[kWarps][kGroup * kGroup];
    double sums[kGroup * kGroup];
};

// sum(m_a m_b) of the concepts a from `row` and b from `column` on, into `work.sums` [kGroup,
// kColumns]. On the diagonal, row == column, only a <= b.
template <int kColumns, bool kDiagonal, typename T>
__device__ void gram(const Masks<T> &masks, unsigned n, int row, int column, GramWork &work) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (unsigned start = 0; start < n; start += kRun * blockDim.x) {
        const unsigned end = min(n, start + kRun * blockDim.x);
        float sums[kGroup][kColumns] = {};
        for (unsigned i = start + threadIdx.x; i < end; i += blockDim.x) {
            float a[kGroup], b[kColumns];
#pragma unroll
            for (int r = 0; r < kGroup; ++r)
                a[r] = masks.at(row + r, i);
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                b[c] = kDiagonal ? a[c] : masks.at(column + c, i);
#pragma unroll
            for (int r = 0; r < kGroup; ++r)
#pragma unroll
                for (int c = kDiagonal ? r : 0; c < kColumns; ++c)
                    sums[r][c] += a[r] * b[c];
        }
#pragma unroll
        for (int r = 0; r < kGroup; ++r)
#pragma unroll
            for (int c = kDiagonal ? r : 0; c < kColumns; ++c) {
                const float sum = combine_warp(sums[r][c]);
                if (lane == 0)
                    work.partial[warp][r * kColumns + c] = sum;
            }
        __syncthreads();
        for (int at = threadIdx.x; at < kGroup * kColumns; at += blockDim.x) {
            if (kDiagonal && at % kColumns < at / kColumns)
                continue;
            double sum = start == 0 ? 0.0 : work.sums[at];
            for (unsigned w = 0; w < warps; ++w)
                sum += work.partial[w][at];
            work.sums[at] = sum;
        }
        __syncthreads();
    }
}

// The pairs between one group of concepts and another, or the same.
template <int kColumns, bool kDiagonal, typename T>
__device__ void pairs_between(const SoftIouArguments &arguments, const Masks<T> &masks, int row,
                              int column, GramWork &work) {
    const SoftIouParams &p = arguments.p;
    const PairList &pairs = arguments.pairs;
    const auto place = [&](Pair pair) {
        const int r = min(pair.first, pair.second) - row;
        const int c = max(pair.first, pair.second) - column;
        return r >= 0 && r < kGroup && c >= 0 && c < kColumns ? r * kColumns + c : -1;
    };
    int any = 0;
    for (int i = threadIdx.x; i < pairs.count; i += blockDim.x)
        any |= place(pairs[i]) >= 0;
    if (!__syncthreads_or(any))
        return;

    gram<kColumns, kDiagonal>(masks, static_cast<unsigned>(p.pixels), row, column, work);
    const double mass = p.fraction * static_cast<double>(p.pixels);
    for (int i = threadIdx.x; i < pairs.count; i += blockDim.x) {
        const int at = place(pairs[i]);
        if (at >= 0)
            p.iou[blockIdx.x * static_cast<int64_t>(pairs.count) + i] =
                soft_iou(work.sums[at], mass);
    }
}

template <typename T, bool kCached>
__global__ void __launch_bounds__(kGramThreads, 2)
    soft_iou_kernel(const __grid_constant__ SoftIouArguments arguments) {
    __shared__ Work work;
    __shared__ GramWork sums;
    __shared__ SoftMap states[kMostConceptsOnGpu];
    __shared__ bool named[kMostConceptsOnGpu];
    extern __shared__ float dynamic_shared[]; // [N] if cached
    const SoftIouParams &p = arguments.p;
    const auto n = static_cast<unsigned>(p.pixels);
    const auto concepts = static_cast<int>(p.concepts);
    const int64_t set = blockIdx.x;
    const T *maps = static_cast<const T *>(p.maps) + set * concepts * p.pixels;

    // 1) one root a map, however many pairs share it
    for (int k = 0; k < concepts; ++k) {
        SoftMap s{0.0f, 0.0f, 0.0f, 0.0f};
        const bool wanted = is_named(arguments.pairs, k);
        if (wanted)
            s = solve_soft_map(Map<T, kCached>{maps + k * p.pixels, dynamic_shared}, n,
                               arguments.settings, work);
        if (threadIdx.x == 0) {
            named[k] = wanted;
            states[k] = s;
            p.state[set * concepts + k] = s;
        }
    }
    __syncthreads();

    // 2) pairs, a group of concepts against another at a time
    const Masks<T> masks{maps, p.pixels, states, named, concepts};
    for (int row = 0; row < concepts; row += kGroup) {
        pairs_between<kGroup, true>(arguments, masks, row, row, sums);
        for (int column = row + kGroup; column < concepts; column += kGroup / 2)
            pairs_between<kGroup / 2, false>(arguments, masks, row, column, sums);
    }
    for (int i = threadIdx.x; i < arguments.pairs.count; i += blockDim.x)
        if (arguments.pairs[i].first < 0)
            p.iou[set * arguments.pairs.count + i] = nanf("");
}

struct SoftIouBackwardArguments {
    SoftIouBackwardParams p;
    PairList pairs;
};

struct BackwardWork {
    float factor[kMostConceptsOnGpu][kGroup]; // dL/dm of this block's concepts = factor . masks
    SoftMap states[kMostConceptsOnGpu];
    bool needed[kMostConceptsOnGpu]; // a mask in those products, or one of this block's
    float partial[kWarps][2 * kGroup];
    double sums[2 * kGroup]; // w g, then w
    float mean[kGroup];
};

// One block for up to kGroup of a set's maps.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    soft_iou_backward_kernel(const __grid_constant__ SoftIouBackwardArguments arguments) {
    __shared__ BackwardWork work;
    const SoftIouBackwardParams &p = arguments.p;
    const PairList &pairs = arguments.pairs;
    const auto n = static_cast<unsigned>(p.pixels);
    const auto concepts = static_cast<int>(p.concepts);
    const int64_t set = blockIdx.x;
    const int own = blockIdx.y * kGroup; // first of this block's concepts
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const T *maps = static_cast<const T *>(p.maps) + set * concepts * p.pixels;
    T *grads = static_cast<T *>(p.grad_maps) + set * concepts * p.pixels;

    // 1) dL/dm as a matrix over masks: each gets its partners. The masses are constant: they drop
    // out. One thread a concept adds, in the order of the pairs.
    for (int at = threadIdx.x; at < concepts * kGroup; at += blockDim.x)
        work.factor[at / kGroup][at % kGroup] = 0.0f;
    for (int k = threadIdx.x; k < concepts; k += blockDim.x)
        work.states[k] = p.state[set * concepts + k];
    __syncthreads();
    if (threadIdx.x < kGroup) {
        const int concept = own + static_cast<int>(threadIdx.x);
        const double mass = p.fraction * static_cast<double>(p.pixels);
        for (int i = 0; i < pairs.count; ++i) {
            const Pair pair = pairs[i];
            if (pair.first != concept && pair.second != concept)
                continue;
            const int64_t at = set * pairs.count + i;
            const float factor = p.grad[at] * soft_iou_slope(p.iou[at], mass);
            if (pair.first == concept)
                work.factor[pair.second][threadIdx.x] += factor;
            if (pair.second == concept)
                work.factor[pair.first][threadIdx.x] += factor;
        }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < concepts; k += blockDim.x) {
        bool needed = false;
        for (int r = 0; r < kGroup; ++r) {
            needed = needed || work.factor[k][r] != 0.0f;
            if (k == own + r) // this block's own: unless nothing is asked of it
                for (int other = 0; other < concepts; ++other)
                    needed = needed || work.factor[other][r] != 0.0f;
        }
        work.needed[k] = needed;
    }
    __syncthreads();

    // The own masks m and their dL/dm, g, at one pixel. A map that is not finite has NaN as factor
    // of its partners, and must not reach others: its mask counts as 0.
    const auto masks_at = [&](unsigned i, float (&m)[kGroup], float (&g)[kGroup]) {
#pragma unroll
        for (int r = 0; r < kGroup; ++r)
            m[r] = g[r] = 0.0f;
        for (int first = 0; first < concepts; first += kGroup) {
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                const int k = first + j;
                if (k >= concepts || !work.needed[k])
                    continue;
                const SoftMap s = work.states[k];
                const float mask = soft_mask(to_float(maps[k * p.pixels + i]), s);
                const float known = s.scale == s.scale ? mask : 0.0f;
#pragma unroll
                for (int r = 0; r < kGroup; ++r)
                    g[r] += work.factor[k][r] * known;
                if (first == own)
                    m[j] = mask;
            }
        }
    };

    // 2) sums of w g and of w, with w = m (1 - m)
    for (unsigned start = 0; start < n; start += kRun * blockDim.x) {
        const unsigned end = min(n, start + kRun * blockDim.x);
        float sums[2 * kGroup] = {};
        for (unsigned i = start + threadIdx.x; i < end; i += blockDim.x) {
            float m[kGroup], g[kGroup];
            masks_at(i, m, g);
#pragma unroll
            for (int r = 0; r < kGroup; ++r) {
                const float w = soft_weight(m[r]);
                sums[r] += w * g[r];
                sums[kGroup + r] += w;
            }
        }
#pragma unroll
        for (int at = 0; at < 2 * kGroup; ++at) {
            const float sum = combine_warp(sums[at]);
            if (lane == 0)
                work.partial[warp][at] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 2 * kGroup) {
            double sum = start == 0 ? 0.0 : work.sums[threadIdx.x];
            for (unsigned w = 0; w < warps; ++w)
                sum += work.partial[w][threadIdx.x];
            work.sums[threadIdx.x] = sum;
        }
        __syncthreads();
    }
    if (threadIdx.x < kGroup)
        work.mean[threadIdx.x] =
            implicit_mean(work.sums[threadIdx.x], work.sums[kGroup + threadIdx.x]);
    __syncthreads();

    // 3) masks again, cheaper than keeping them, and through them
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        float m[kGroup], g[kGroup];
        masks_at(i, m, g);
#pragma unroll
        for (int r = 0; r < kGroup; ++r) {
            const int k = own + r;
            if (k >= concepts)
                continue;
            const float gradient =
                work.needed[k] ? implicit_gradient(m[r], g[r], work.mean[r], work.states[k]) : 0.0f;
            grads[k * p.pixels + i] = from_float<T>(gradient);
        }
    }
}

// ---- launches --------------------------------------------------------------------------------

// Enough threads for eight pixels each, in whole warps.
unsigned threads_for(int64_t pixels, unsigned most = kThreads) {
    unsigned threads = 32;
    while (threads < most && threads * 8 < pixels)
        threads *= 2;
    return std::min(threads, most);
}

// Calls `with` with a number of that type.
template <typename With> void with_type(Float type, const With &with) {
    switch (type) {
    case Float::kFloat32:
        return with(float{});
    case Float::kFloat16:
        return with(__half{});
    case Float::kBfloat16:
        return with(__nv_bfloat16{});
    }
}

template <typename Arguments>
void launch_cached(const char *op, void (*cached)(Arguments), void (*uncached)(Arguments),
                   int64_t blocks, int64_t pixels, unsigned threads, size_t more_shared,
                   const Arguments &arguments, const CudaQueue &queue) {
    const bool fits = pixels <= kCachedPixels;
    const size_t shared = (fits ? static_cast<size_t>(pixels) * sizeof(float) : 0) + more_shared;
    launch(op, fits ? cached : uncached, {dim3(static_cast<unsigned>(blocks)), threads, shared},
           arguments, queue);
}

SoftSettings soft_settings(double fraction, double temperature) {
    return {fraction, logit_of(fraction), temperature};
}

} // namespace

void pairs_iou_cuda(const PairsIouParams &p, const CudaQueue &queue) {
    if (p.batch == 0 || p.concepts == 0)
        return;
    const bool fits = mask_words(p.concepts, p.pixels, true) == 0;
    const auto words = static_cast<size_t>(p.concepts * ((p.pixels + 63) / 64));
    const PairsIouArguments arguments{p, listed(p.pairs, p.concepts),
                                      percentile_position(p.pixels, p.percentile), fits};
    with_type(p.type, [&](auto number) {
        using T = decltype(number);
        launch_cached("pairs_iou", pairs_iou_kernel<T, true>, pairs_iou_kernel<T, false>, p.batch,
                      p.pixels, threads_for(p.pixels), fits ? words * sizeof(uint64_t) : 0,
                      arguments, queue);
    });
}

void soft_topk_cuda(const SoftTopkParams &p, const CudaQueue &queue) {
    if (p.rows == 0)
        return;
    const SoftTopkArguments arguments{p, soft_settings(p.fraction, p.temperature)};
    with_type(p.type, [&](auto number) {
        using T = decltype(number);
        launch_cached("soft_topk", soft_topk_kernel<T, true>, soft_topk_kernel<T, false>, p.rows,
                      p.pixels, threads_for(p.pixels), 0, arguments, queue);
    });
}

void soft_topk_backward_cuda(const SoftTopkBackwardParams &p, const CudaQueue &queue) {
    if (p.rows == 0)
        return;
    launch("soft_topk_backward", soft_topk_backward_kernel,
           {dim3(static_cast<unsigned>(p.rows)), threads_for(p.pixels), 0}, p, queue);
}

void soft_iou_cuda(const SoftIouParams &p, const CudaQueue &queue) {
    if (p.batch == 0 || p.concepts == 0)
        return;
    const SoftIouArguments arguments{p, listed(p.pairs, p.concepts),
                                     soft_settings(p.fraction, p.temperature)};
    with_type(p.type, [&](auto number) {
        using T = decltype(number);
        launch_cached("soft_iou", soft_iou_kernel<T, true>, soft_iou_kernel<T, false>, p.batch,
                      p.pixels, threads_for(p.pixels, kGramThreads), 0, arguments, queue);
    });
}

void soft_iou_backward_cuda(const SoftIouBackwardParams &p, const CudaQueue &queue) {
    if (p.batch == 0 || p.concepts == 0)
        return;
    const SoftIouBackwardArguments arguments{p, listed(p.pairs, p.concepts)};
    const auto groups = static_cast<unsigned>((p.concepts + kGroup - 1) / kGroup);
    with_type(p.type, [&](auto number) {
        using T = decltype(number);
        launch("soft_iou_backward", soft_iou_backward_kernel<T>,
               {dim3(static_cast<unsigned>(p.batch), groups), threads_for(p.pixels), 0}, arguments,
               queue);
    });
}

} // namespace biasmap
