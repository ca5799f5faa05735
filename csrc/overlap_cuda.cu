// A block per map searches its percentile or the root of its soft mask; a second launch then takes
// a set's maps together: their hard masks as bits, or sums over pairs of soft masks. Nothing has to
// be zeroed beforehand, and blocks never wait for one another.
#include "overlap.h"
#include "overlap_block.h"

namespace biasmap {
namespace {

// A map of this size is kept in shared memory, 64 KiB, larger ones are read from L2 in every pass.
constexpr int64_t kCachedPixels = 16384;
static_assert(kCachedPixels * sizeof(float) <= kMostShared);
constexpr int kConcepts = kMostConceptsOnGpu;
// A block of sums takes this many maps against as many.
constexpr int kGroup = 4;
constexpr unsigned kSumThreads = 256;
// Pixels of a thread in the backward pass.
constexpr unsigned kPixels = 4;

struct Pair {
    uint8_t first, second;
};

// With the pairs in the kernel's parameters: they need no copy to the GPU, hence no waiting.
template <typename Params> struct WithPairs {
    Params p;
    Pair pairs[kMostPairsOnGpu];

    explicit WithPairs(const Params &params) : p(params), pairs() {
        for (int64_t i = 0; i < 2 * p.pairs.count; i += 2)
            pairs[i / 2] = {static_cast<uint8_t>(p.pairs.data[i]),
                            static_cast<uint8_t>(p.pairs.data[i + 1])};
    }
};

// A set's maps [K, N].
template <typename T> __device__ const T *maps_of(const MapSets &p, int64_t set) {
    return static_cast<const T *>(p.maps) + set * p.concepts * p.pixels;
}

// What is asked of every map: its percentile, or the root of its soft mask.
struct SearchArguments {
    const void *maps; // [M, N]
    int64_t pixels;
    Position at;
    float *threshold; // [M] out; null: the root is asked for
    SoftSettings settings;
    SoftMap *state; // [M] out
    float *mask;    // [M, N] out; null: not asked for
};

template <typename T, bool kCached>
__global__ void __launch_bounds__(kThreads, 2)
    search_kernel(const __grid_constant__ SearchArguments p) {
    __shared__ Work work;
    extern __shared__ float dynamic_shared[]; // [N] if cached
    const auto n = static_cast<unsigned>(p.pixels);
    const int64_t first = blockIdx.x * p.pixels;
    const Map<T, kCached> x{static_cast<const T *>(p.maps) + first, dynamic_shared, n};
    if (p.threshold != nullptr) {
        const float threshold = percentile_of(x, p.at, work);
        if (threadIdx.x == 0)
            p.threshold[blockIdx.x] = threshold;
        return;
    }
    const SoftMap s = solve_soft_map(x, p.settings, work);
    if (threadIdx.x == 0)
        p.state[blockIdx.x] = s;
    if (p.mask != nullptr)
        for (unsigned i = threadIdx.x; i < n; i += blockDim.x)
            p.mask[first + i] = soft_mask(x[i], s);
}

// A warp has 32 pixels of all masks as one word per concept, and a lane counts eight of the 16 x 16
// intersections.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pairs_iou_kernel(const __grid_constant__ WithPairs<PairsIouParams> arguments) {
    static_assert(kConcepts == 16, "two lanes per row of intersections");
    __shared__ int common[kConcepts][kConcepts];
    __shared__ float thresholds[kConcepts];
    const PairsIouParams &p = arguments.p;
    const auto n = static_cast<unsigned>(p.pixels);
    const int concepts = static_cast<int>(p.concepts), lane = threadIdx.x % 32;
    const int64_t set = blockIdx.x;
    const T *maps = maps_of<T>(p, set);
    for (int at = threadIdx.x; at < kConcepts * kConcepts; at += blockDim.x)
        common[at / kConcepts][at % kConcepts] = 0;
    if (const int k = threadIdx.x; k < concepts)
        thresholds[k] = p.threshold[set * concepts + k];
    __syncthreads();

    // 1) pixels in each two masks
    const int row = lane / 2, column = lane % 2 * 8; // of this lane
    int counts[8] = {};
    for (unsigned first = threadIdx.x - lane; first < n; first += blockDim.x) {
        const unsigned i = first + lane;
        unsigned word = 0; // lane k: that of concept k
        for (int k = 0; k < concepts; ++k) {
            const bool above = i < n && to_float(maps[k * p.pixels + i]) > thresholds[k];
            const unsigned bits = __ballot_sync(kEveryLane, above);
            word = lane == k ? bits : word;
        }
        const unsigned mask = __shfl_sync(kEveryLane, word, row);
#pragma unroll
        for (int c = 0; c < 8; ++c)
            counts[c] += __popc(mask & __shfl_sync(kEveryLane, word, column + c));
    }
#pragma unroll
    for (int c = 0; c < 8; ++c)
        atomicAdd(&common[row][column + c], counts[c]);
    __syncthreads();

    // 2) pairs
    const auto area = [&](int k) { return thresholds[k] == thresholds[k] ? common[k][k] : -1; };
    if (const int k = threadIdx.x; k < concepts)
        p.area[set * concepts + k] = area(k);
    for (int i = threadIdx.x; i < p.pairs.count; i += blockDim.x) {
        const Pair pair = arguments.pairs[i];
        const HardIou hard =
            hard_iou(area(pair.first), area(pair.second), common[pair.first][pair.second]);
        p.iou[set * p.pairs.count + i] = hard.iou;
        p.union_pixels[set * p.pairs.count + i] = hard.either;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    soft_topk_backward_kernel(const __grid_constant__ SoftTopkBackwardParams p) {
    __shared__ Sums<2> work; // w g, w
    const auto n = static_cast<unsigned>(p.pixels);
    const int64_t first = blockIdx.x * p.pixels;
    const float *grad = p.grad + first, *mask = p.mask + first;
    sum_pixels(n, work, [&](unsigned i, float (&sums)[2]) {
        const float w = soft_weight(mask[i]);
        sums[0] += w * grad[i];
        sums[1] += w;
    });
    const float mean = implicit_mean(work.total[0], work.total[1]);
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x)
        static_cast<T *>(p.grad_x)[first + i] =
            from_float<T>(implicit_gradient(mask[i], grad[i], mean, p.state[blockIdx.x]));
}

// One block for the masks of one group against those of another, or the same.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 2)
    soft_iou_kernel(const __grid_constant__ WithPairs<SoftIouParams> arguments) {
    constexpr int kMasks = kGroup * kGroup;
    __shared__ Sums<2 * kMasks + kGroup> work; // of m_r m_c, w_r m_c and w_r; w = m (1 - m)
    __shared__ SoftMap states[2][kGroup];
    const SoftIouParams &p = arguments.p;
    const int concepts = static_cast<int>(p.concepts), groups = (concepts + kGroup - 1) / kGroup;
    const int64_t set = blockIdx.x;
    const int first[2] = {static_cast<int>(blockIdx.y) / groups * kGroup,
                          static_cast<int>(blockIdx.y) % groups * kGroup}; // row, column
    const T *maps = maps_of<T>(p, set);
    if (threadIdx.x < 2 * kGroup) {
        const int side = threadIdx.x / kGroup, r = threadIdx.x % kGroup;
        states[side][r] = p.state[set * concepts + min(first[side] + r, concepts - 1)];
    }
    __syncthreads();

    const auto masks_at = [&](int side, unsigned i, float (&masks)[kGroup]) {
#pragma unroll
        for (int r = 0; r < kGroup; ++r)
            if (const int k = first[side] + r; k < concepts)
                masks[r] = soft_mask(to_float(maps[k * p.pixels + i]), states[side][r]);
    };
    sum_pixels(static_cast<unsigned>(p.pixels), work, [&](unsigned i, auto &sums) {
        float a[kGroup] = {}, b[kGroup] = {};
        masks_at(0, i, a);
        masks_at(1, i, b);
#pragma unroll
        for (int r = 0; r < kGroup; ++r) {
            const float w = soft_weight(a[r]);
#pragma unroll
            for (int c = 0; c < kGroup; ++c) {
                sums[r * kGroup + c] += a[r] * b[c];
                sums[kMasks + r * kGroup + c] += w * b[c];
            }
            sums[2 * kMasks + r] += w;
        }
    });

    if (threadIdx.x < kMasks) {
        const int r = threadIdx.x / kGroup, c = threadIdx.x % kGroup;
        const int row = first[0] + r, column = first[1] + c;
        if (row < concepts && column < concepts)
            p.means[(set * concepts + row) * concepts + column] =
                implicit_mean(work.total[kMasks + threadIdx.x], work.total[2 * kMasks + r]);
    }
    const double mass = p.settings.fraction * static_cast<double>(p.pixels);
    for (int i = threadIdx.x; i < p.pairs.count; i += blockDim.x) {
        const Pair pair = arguments.pairs[i];
        const int r = pair.first - first[0], c = pair.second - first[1];
        if (r >= 0 && r < kGroup && c >= 0 && c < kGroup)
            p.iou[set * p.pairs.count + i] = soft_iou(work.total[r * kGroup + c], mass);
    }
}

// One block for some pixels of a set.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 2)
    soft_iou_backward_kernel(const __grid_constant__ WithPairs<SoftIouBackwardParams> arguments) {
    __shared__ float factors[kConcepts][kConcepts]; // dL/dm_k = sum over j of factors[k][j] m_j
    __shared__ float means[kConcepts];              // of that, under w = m (1 - m)
    __shared__ SoftMap states[kConcepts];
    const SoftIouBackwardParams &p = arguments.p;
    const int concepts = static_cast<int>(p.concepts);
    const int64_t set = blockIdx.x;
    const T *maps = maps_of<T>(p, set);
    T *grads = static_cast<T *>(p.grad_maps) + set * concepts * p.pixels;

    // 1) each mask gets its partners, in the order of the pairs. The masses are constant: they drop
    // out.
    const double mass = p.settings.fraction * static_cast<double>(p.pixels);
    for (int at = threadIdx.x; at < kConcepts * kConcepts; at += blockDim.x) {
        const int k = at / kConcepts, partner = at % kConcepts;
        float factor = 0.0f;
        for (int i = 0; i < p.pairs.count; ++i) {
            const Pair pair = arguments.pairs[i];
            const int times = (pair.first == k && pair.second == partner) +
                              (pair.second == k && pair.first == partner);
            const int64_t of_pair = set * p.pairs.count + i;
            if (times > 0)
                factor += times * p.grad[of_pair] * soft_iou_slope(p.iou[of_pair], mass);
        }
        factors[k][partner] = factor;
    }
    __syncthreads();
    if (const int k = threadIdx.x; k < kConcepts) {
        float mean = 0.0f;
        for (int j = 0; j < concepts; ++j) // a mean of a map that is not finite is NaN
            if (k < concepts && factors[k][j] != 0.0f)
                mean += factors[k][j] * p.means[(set * concepts + k) * concepts + j];
        means[k] = mean;
        const SoftMap s = p.state[set * concepts + min(k, concepts - 1)];
        states[k] = s.scale == s.scale ? s : SoftMap{0.0f, 0.0f, 0.0f, 0.0f};
    }
    __syncthreads();

    // 2) masks again, cheaper than keeping them, and through them. A map that is not finite has NaN
    // as factor of its partners, and must not reach others: its mask counts as 0.
    const unsigned n = static_cast<unsigned>(p.pixels), step = gridDim.y * blockDim.x;
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += step) {
        float masks[kConcepts] = {};
#pragma unroll
        for (int k = 0; k < kConcepts; ++k)
            if (k < concepts) {
                const float mask = soft_mask(to_float(maps[k * p.pixels + i]), states[k]);
                masks[k] = mask == mask ? mask : 0.0f;
            }
#pragma unroll
        for (int k = 0; k < kConcepts; ++k)
            if (k < concepts) {
                float g = 0.0f;
#pragma unroll
                for (int j = 0; j < kConcepts; ++j)
                    g += factors[k][j] * masks[j];
                const float gradient = implicit_gradient(masks[k], g, means[k], states[k]);
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
    return threads;
}

void search_maps(const char *op, Float type, int64_t count, const SearchArguments &arguments,
                 const CudaQueue &queue) {
    const bool fits = arguments.pixels <= kCachedPixels;
    const size_t shared = fits ? static_cast<size_t>(arguments.pixels) * sizeof(float) : 0;
    with_type(type, [&](auto number) {
        using T = decltype(number);
        launch(op, fits ? search_kernel<T, true> : search_kernel<T, false>,
               {dim3(static_cast<unsigned>(count)), threads_for(arguments.pixels), shared},
               arguments, queue);
    });
}

} // namespace

std::string cuda_refusal(int device) {
    try {
        const DeviceGuard guard(device, "CUDA kernels");
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(
                  &attributes, reinterpret_cast<const void *>(&soft_topk_backward_kernel<float>)),
              "CUDA kernels");
    } catch (const std::runtime_error &error) {
        cudaGetLastError(); // torch must not find it
        return error.what();
    }
    return "";
}

void pairs_iou_cuda(const PairsIouParams &p, const CudaQueue &queue) {
    const Position at = percentile_position(p.pixels, p.percentile);
    search_maps("pairs_iou", p.type, p.batch * p.concepts,
                {p.maps, p.pixels, at, p.threshold, {}, nullptr, nullptr}, queue);
    with_type(p.type, [&](auto number) {
        launch("pairs_iou", pairs_iou_kernel<decltype(number)>,
               {dim3(static_cast<unsigned>(p.batch)), threads_for(p.pixels), 0},
               WithPairs<PairsIouParams>(p), queue);
    });
}

void soft_topk_cuda(const SoftTopkParams &p, const CudaQueue &queue) {
    search_maps("soft_topk", p.type, p.rows,
                {p.x, p.pixels, {}, nullptr, p.settings, p.state, p.mask}, queue);
}

void soft_topk_backward_cuda(const SoftTopkBackwardParams &p, const CudaQueue &queue) {
    with_type(p.type, [&](auto number) {
        launch("soft_topk_backward", soft_topk_backward_kernel<decltype(number)>,
               {dim3(static_cast<unsigned>(p.rows)), threads_for(p.pixels), 0}, p, queue);
    });
}

void soft_iou_cuda(const SoftIouParams &p, const CudaQueue &queue) {
    search_maps("soft_iou", p.type, p.batch * p.concepts,
                {p.maps, p.pixels, {}, nullptr, p.settings, p.state, nullptr}, queue);
    const auto groups = static_cast<unsigned>((p.concepts + kGroup - 1) / kGroup);
    with_type(p.type, [&](auto number) {
        launch("soft_iou", soft_iou_kernel<decltype(number)>,
               {dim3(static_cast<unsigned>(p.batch), groups * groups),
                threads_for(p.pixels, kSumThreads), 0},
               WithPairs<SoftIouParams>(p), queue);
    });
}

void soft_iou_backward_cuda(const SoftIouBackwardParams &p, const CudaQueue &queue) {
    if (p.concepts == 0)
        return;
    const unsigned threads = threads_for(p.pixels, kSumThreads);
    const int64_t blocks = (p.pixels + kPixels * threads - 1) / (kPixels * threads);
    const dim3 grid(static_cast<unsigned>(p.batch),
                    static_cast<unsigned>(std::min<int64_t>(blocks, 1024)));
    with_type(p.type, [&](auto number) {
        launch("soft_iou_backward", soft_iou_backward_kernel<decltype(number)>, {grid, threads, 0},
               WithPairs<SoftIouBackwardParams>(p), queue);
    });
}

} // namespace biasmap
