// A warp takes one head of 32 or 64 neighbouring pixels, a lane one or two of them: scores, softmax
// and the sum over concepts stay in the lane's registers, keys come through L1, where every lane
// asks for the same 16 bytes. A block's warps take the heads in turn and add up in shared memory.
// Queries are read once, as `to_q` leaves them: [B, n, heads * d], so that a block reads whole
// rows.
#include "concept_map.h"
#include "cuda_block.h"

namespace biasmap {
namespace {

constexpr int kWarps = 8; // at most
constexpr int kConcepts = kMostConceptsOnGpu;
// Keys in hand at once, kChunk numbers of each.
constexpr int kKeys = 4;

// Numbers that travel in one access of 16 bytes.
template <typename T> struct alignas(16) Packed {
    T values[16 / sizeof(T)];
};

template <typename T> __device__ void load(const T *from, float (&to)[kChunk]) {
    constexpr int kPack = 16 / sizeof(T);
#pragma unroll
    for (int start = 0; start < kChunk; start += kPack) {
        const auto pack = *reinterpret_cast<const Packed<T> *>(from + start);
#pragma unroll
        for (int e = 0; e < kPack; ++e)
            to[start + e] = to_float(pack.values[e]);
    }
}

template <typename T> __device__ void store(const float (&from)[kChunk], T *to) {
    constexpr int kPack = 16 / sizeof(T);
#pragma unroll
    for (int start = 0; start < kChunk; start += kPack) {
        Packed<T> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e)
            pack.values[e] = from_float<T>(from[start + e]);
        *reinterpret_cast<Packed<T> *>(to + start) = pack;
    }
}

// One head's attention at a lane's pixels: softmax over the tokens of q k'^T; 0 beyond the tokens.
template <typename T, int kTokens, int kPixels>
__device__ void attention(const T *(&query)[kPixels], const float *keys, int depth, int tokens,
                          float (&scores)[kTokens][kPixels]) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            scores[t][j] = 0.0f;

    for (int c = 0; c < depth; c += kChunk) {
        float q[kPixels][kChunk];
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            load(query[j] + c, q[j]);
#pragma unroll
        for (int first = 0; first < kTokens; first += kKeys) {
            if (first >= tokens)
                continue;
#pragma unroll
            for (int t = first; t < first + kKeys; ++t) {
                float key[kChunk];
                load(keys + min(t, tokens - 1) * depth + c, key);
#pragma unroll
                for (int e = 0; e < kChunk; ++e)
#pragma unroll
                    for (int j = 0; j < kPixels; ++j)
                        scores[t][j] += q[j][e] * key[e];
            }
        }
    }

#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        float most = scores[0][j];
#pragma unroll
        for (int t = 1; t < kTokens; ++t)
            most = t < tokens ? fmaxf(most, scores[t][j]) : most;
        float sum = 0.0f;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            scores[t][j] = t < tokens ? exp_minus(most - scores[t][j]) : 0.0f;
            sum += scores[t][j];
        }
        const float factor = 1.0f / sum;
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
            scores[t][j] *= factor;
    }
}

// A block's pixels of one image: tiles of 32 * kPixels.
template <int kPixels> struct Tile {
    int64_t image;
    int pixel; // first of the tile
    int n;

    __device__ Tile(int64_t pixels)
        : image(blockIdx.x / tiles(pixels)),
          pixel(static_cast<int>(blockIdx.x % tiles(pixels)) * 32 * kPixels),
          n(static_cast<int>(pixels)) {}
    static __host__ __device__ unsigned tiles(int64_t pixels) {
        return static_cast<unsigned>((pixels + 32 * kPixels - 1) / (32 * kPixels));
    }
    // A lane's j-th pixel. Beyond the last, that one again: read in vain, never written.
    __device__ int of_lane(int j) const {
        return min(pixel + 32 * j + static_cast<int>(threadIdx.x % 32), n - 1);
    }
    __device__ bool has(int j) const {
        return pixel + 32 * j + static_cast<int>(threadIdx.x % 32) < n;
    }
};

template <typename T, int kTokens, int kPixels>
__global__ void __launch_bounds__(32 * kWarps, kTokens <= 32 ? 2 : 1)
    concept_map_kernel(const __grid_constant__ ConceptMapParams p) {
    __shared__ float weights[kConcepts][kTokens];
    __shared__ float partial[kWarps][kConcepts][32 * kPixels];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const auto depth = static_cast<int>(p.depth), tokens = static_cast<int>(p.tokens);
    const Tile<kPixels> tile(p.pixels);
    const auto concepts = static_cast<int>(p.concepts);

    for (int at = threadIdx.x; at < concepts * kTokens; at += blockDim.x) {
        const int k = at / kTokens, t = at % kTokens;
        weights[k][t] = t < tokens ? p.weights[k * p.tokens + t] : 0.0f;
    }
    for (int k = 0; k < concepts; ++k)
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            partial[warp][k][32 * j + lane] = 0.0f;
    __syncthreads();

    // 1) a warp's heads
    for (int head = warp; head < p.heads; head += warps) {
        const T *query[kPixels];
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            query[j] = static_cast<const T *>(p.query) + tile.image * p.strides[0] +
                       head * p.strides[1] + tile.of_lane(j) * p.strides[2];
        float probability[kTokens][kPixels];
        attention(query, p.keys + head * p.tokens * p.depth, depth, tokens, probability);
        for (int k = 0; k < concepts; ++k) {
            float sum[kPixels] = {};
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int j = 0; j < kPixels; ++j)
                    sum[j] += weights[k][t] * probability[t][j];
#pragma unroll
            for (int j = 0; j < kPixels; ++j)
                partial[warp][k][32 * j + lane] += sum[j];
        }
    }
    __syncthreads();

    // 2) sum over warps, always in the same order
    for (int at = threadIdx.x; at < concepts * 32 * kPixels; at += blockDim.x) {
        const int k = at / (32 * kPixels), pixel = at % (32 * kPixels);
        if (tile.pixel + pixel >= tile.n)
            continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w)
            sum += partial[w][k][pixel];
        float *map = p.maps + (tile.image * concepts + k) * p.pixels;
        map[tile.pixel + pixel] = p.add ? map[tile.pixel + pixel] + sum : sum;
    }
}

template <typename T, int kTokens, int kPixels>
__global__ void __launch_bounds__(32 * kWarps, kTokens <= 32 ? 2 : 1)
    concept_map_backward_kernel(const __grid_constant__ ConceptMapBackwardParams p) {
    __shared__ float outer[kTokens][32 * kPixels];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const auto depth = static_cast<int>(p.depth), tokens = static_cast<int>(p.tokens);
    const Tile<kPixels> tile(p.pixels);

    // 1) dL/dA, the same for all heads; 0 beyond the tokens
    for (int at = threadIdx.x; at < kTokens * 32 * kPixels; at += blockDim.x) {
        const int t = at / (32 * kPixels), pixel = at % (32 * kPixels);
        const float *grad = p.grad + tile.image * p.concepts * p.pixels;
        float sum = 0.0f;
        if (t < tokens && tile.pixel + pixel < tile.n)
            for (int k = 0; k < p.concepts; ++k)
                sum += p.weights[k * p.tokens + t] * grad[k * p.pixels + tile.pixel + pixel];
        outer[t][pixel] = sum;
    }
    __syncthreads();

    // 2) a warp's heads: attention again, cheaper than keeping it, then through it
    for (int head = warp; head < p.heads; head += warps) {
        const T *query[kPixels];
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            query[j] = static_cast<const T *>(p.query) + tile.image * p.strides[0] +
                       head * p.strides[1] + tile.of_lane(j) * p.strides[2];
        const float *keys = p.keys + head * p.tokens * p.depth;
        float inner[kTokens][kPixels]; // A, then dL/ds
        attention(query, keys, depth, tokens, inner);
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            float mean = 0.0f;
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
                mean += inner[t][j] * outer[t][32 * j + lane];
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
                inner[t][j] = softmax_gradient(inner[t][j], outer[t][32 * j + lane], mean);
        }
        T *grad = static_cast<T *>(p.grad_query) + tile.image * p.grad_strides[0] +
                  head * p.grad_strides[1];
        for (int c = 0; c < depth; c += kChunk) {
            float sums[kPixels][kChunk] = {};
#pragma unroll
            for (int start = 0; start < kTokens; start += kKeys) {
                if (start >= tokens)
                    continue;
#pragma unroll
                for (int t = start; t < start + kKeys; ++t) { // dL/ds is 0 beyond the tokens
                    float key[kChunk];
                    load(keys + min(t, tokens - 1) * depth + c, key);
#pragma unroll
                    for (int e = 0; e < kChunk; ++e)
#pragma unroll
                        for (int j = 0; j < kPixels; ++j)
                            sums[j][e] += inner[t][j] * key[e];
                }
            }
#pragma unroll
            for (int j = 0; j < kPixels; ++j)
                if (tile.has(j))
                    store(sums[j], grad + tile.of_lane(j) * p.grad_strides[2] + c);
        }
    }
}

// Launches `kernel_of(number, tokens, pixels)`: of the least sufficient capacity of tokens, with as
// many pixels per lane as registers allow.
template <typename Params, typename KernelOf>
void launch_tiles(const char *op, const Params &p, const KernelOf &kernel_of,
                  const CudaQueue &queue) {
    const unsigned threads = 32 * static_cast<unsigned>(std::min<int64_t>(p.heads, kWarps));
    with_type(p.type, [&](auto number) {
        const auto by_shape = [&](auto tokens, auto pixels) {
            const int64_t tiles = Tile<decltype(pixels)::value>::tiles(p.pixels);
            launch(op, kernel_of(number, tokens, pixels),
                   {dim3(static_cast<unsigned>(p.batch * tiles)), threads, 0}, p, queue);
        };
        if (p.tokens <= 16)
            by_shape(std::integral_constant<int, 16>{}, std::integral_constant<int, 2>{});
        else if (p.tokens <= 32)
            by_shape(std::integral_constant<int, 32>{}, std::integral_constant<int, 1>{});
        else
            by_shape(std::integral_constant<int, kMostTokens>{}, std::integral_constant<int, 1>{});
    });
}

} // namespace

void concept_map_cuda(const ConceptMapParams &p, const CudaQueue &queue) {
    const auto kernel_of = [](auto number, auto tokens, auto pixels) {
        return concept_map_kernel<decltype(number), decltype(tokens)::value,
                                  decltype(pixels)::value>;
    };
    launch_tiles("concept_map", p, kernel_of, queue);
}

void concept_map_backward_cuda(const ConceptMapBackwardParams &p, const CudaQueue &queue) {
    const auto kernel_of = [](auto number, auto tokens, auto pixels) {
        return concept_map_backward_kernel<decltype(number), decltype(tokens)::value,
                                           decltype(pixels)::value>;
    };
    launch_tiles("concept_map_backward", p, kernel_of, queue);
}

} // namespace biasmap
