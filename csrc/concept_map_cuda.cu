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
// Concepts of one block: more of them read the queries again.
constexpr int kConcepts = 8;
// Numbers of a query or a key in hand at once, and keys.
constexpr int kChunk = 8, kKeys = 4;

// Numbers that travel in one access of 16 bytes.
template <typename T> struct alignas(16) Packed {
    T values[16 / sizeof(T)];
};

// `wide`: kChunk numbers are there, side by side and aligned.
template <typename T>
__device__ void load(const T *from, int64_t stride, int count, bool wide, float (&to)[kChunk]) {
    if (wide) {
        constexpr int kPack = 16 / sizeof(T);
#pragma unroll
        for (int start = 0; start < kChunk; start += kPack) {
            const auto pack = *reinterpret_cast<const Packed<T> *>(from + start);
#pragma unroll
            for (int e = 0; e < kPack; ++e)
                to[start + e] = to_float(pack.values[e]);
        }
    } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            to[e] = e < count ? to_float(from[e * stride]) : 0.0f;
    }
}

template <typename T>
__device__ void store(const float (&from)[kChunk], T *to, int64_t stride, int count, bool wide) {
    if (wide) {
        constexpr int kPack = 16 / sizeof(T);
#pragma unroll
        for (int start = 0; start < kChunk; start += kPack) {
            Packed<T> pack;
#pragma unroll
            for (int e = 0; e < kPack; ++e)
                pack.values[e] = from_float<T>(from[start + e]);
            *reinterpret_cast<Packed<T> *>(to + start) = pack;
        }
    } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            if (e < count)
                to[e * stride] = from_float<T>(from[e]);
    }
}

// One head's attention at a lane's pixels: softmax over the tokens of q k'^T; 0 beyond the tokens.
template <typename T, int kTokens, int kPixels>
__device__ void attention(const T *(&query)[kPixels], int64_t stride, const float *keys, int depth,
                          int tokens, bool wide, float (&scores)[kTokens][kPixels]) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            scores[t][j] = 0.0f;

    for (int c = 0; c < depth; c += kChunk) {
        float q[kPixels][kChunk];
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
            load(query[j] + c * stride, stride, depth - c, wide, q[j]);
#pragma unroll
        for (int first = 0; first < kTokens; first += kKeys) {
            if (first >= tokens)
                continue;
#pragma unroll
            for (int t = first; t < first + kKeys; ++t) {
                float key[kChunk];
                load(keys + min(t, tokens - 1) * depth + c, 1, depth - c, wide, key);
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

struct ConceptMapArguments {
    ConceptMapParams p;
    bool wide;
};

template <typename T, int kTokens, int kPixels>
__global__ void __launch_bounds__(32 * kWarps)
    concept_map_kernel(const __grid_constant__ ConceptMapArguments arguments) {
    __shared__ float weights[kConcepts][kTokens];
    __shared__ float partial[kWarps][kConcepts][32 * kPixels];
    const ConceptMapParams &p = arguments.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const auto depth = static_cast<int>(p.depth), tokens = static_cast<int>(p.tokens);
    const Tile<kPixels> tile(p.pixels);
    const int first = blockIdx.y * kConcepts; // of this block's concepts
    const int count = min(kConcepts, static_cast<int>(p.concepts) - first);

    for (int at = threadIdx.x; at < count * kTokens; at += blockDim.x) {
        const int k = at / kTokens, t = at % kTokens;
        weights[k][t] = t < tokens ? p.weights[(first + k) * p.tokens + t] : 0.0f;
    }
    for (int k = 0; k < count; ++k)
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
        attention(query, p.strides[3], p.keys + head * p.tokens * p.depth, depth, tokens,
                  arguments.wide, probability);
        for (int k = 0; k < count; ++k) {
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
    for (int at = threadIdx.x; at < count * 32 * kPixels; at += blockDim.x) {
        const int k = at / (32 * kPixels), place = at % (32 * kPixels);
        if (tile.pixel + place >= tile.n)
            continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w)
            sum += partial[w][k][place];
        float *map = p.maps + (tile.image * p.concepts + first + k) * p.pixels;
        map[tile.pixel + place] = p.add ? map[tile.pixel + place] + sum : sum;
    }
}

struct ConceptMapBackwardArguments {
    ConceptMapBackwardParams p;
    bool wide;
};

template <typename T, int kTokens, int kPixels>
__global__ void __launch_bounds__(32 * kWarps, kTokens <= 32 ? 2 : 1)
    concept_map_backward_kernel(const __grid_constant__ ConceptMapBackwardArguments arguments) {
    __shared__ float outer[kTokens][32 * kPixels];
    const ConceptMapBackwardParams &p = arguments.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const auto depth = static_cast<int>(p.depth), tokens = static_cast<int>(p.tokens);
    const bool wide = arguments.wide;
    const Tile<kPixels> tile(p.pixels);

    // 1) dL/dA, the same for all heads; 0 beyond the tokens
    for (int at = threadIdx.x; at < kTokens * 32 * kPixels; at += blockDim.x) {
        const int t = at / (32 * kPixels), place = at % (32 * kPixels);
        const float *grad = p.grad + tile.image * p.concepts * p.pixels;
        float sum = 0.0f;
        if (t < tokens && tile.pixel + place < tile.n)
            for (int k = 0; k < p.concepts; ++k)
                sum += p.weights[k * p.tokens + t] * grad[k * p.pixels + tile.pixel + place];
        outer[t][place] = sum;
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
        attention(query, p.strides[3], keys, depth, tokens, wide, inner);
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
                    load(keys + min(t, tokens - 1) * depth + c, 1, depth - c, wide, key);
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
                    store(sums[j],
                          grad + tile.of_lane(j) * p.grad_strides[2] + c * p.grad_strides[3],
                          p.grad_strides[3], depth - c, wide);
        }
    }
}

bool aligned(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every kChunk numbers of a [B, heads, n, d] tensor lie side by side and aligned.
bool is_wide(const void *data, const int64_t *strides, int64_t depth) {
    return aligned(data) && depth % kChunk == 0 && strides[3] == 1 && strides[0] % kChunk == 0 &&
           strides[1] % kChunk == 0 && strides[2] % kChunk == 0;
}

// Calls `with` with a number of the type, the least sufficient capacity of tokens, and the pixels
// of a lane: as many as registers allow.
template <typename With> void with_shape(Float type, int64_t tokens, const With &with) {
    const auto by_tokens = [&](auto number) {
        if (tokens <= 16)
            with(number, std::integral_constant<int, 16>{}, std::integral_constant<int, 2>{});
        else if (tokens <= 32)
            with(number, std::integral_constant<int, 32>{}, std::integral_constant<int, 1>{});
        else
            with(number, std::integral_constant<int, kMostTokens>{},
                 std::integral_constant<int, 1>{});
    };
    switch (type) {
    case Float::kFloat32:
        return by_tokens(float{});
    case Float::kFloat16:
        return by_tokens(__half{});
    case Float::kBfloat16:
        return by_tokens(__nv_bfloat16{});
    }
}

unsigned threads_for(int64_t heads) {
    return 32 * static_cast<unsigned>(std::min<int64_t>(heads, kWarps));
}

} // namespace

void concept_map_cuda(const ConceptMapParams &p, const CudaQueue &queue) {
    if (p.batch == 0 || p.pixels == 0 || p.concepts == 0)
        return;
    const bool wide = is_wide(p.query, p.strides, p.depth) && aligned(p.keys);
    const auto groups = static_cast<unsigned>((p.concepts + kConcepts - 1) / kConcepts);
    with_shape(p.type, p.tokens, [&](auto number, auto tokens, auto pixels) {
        using T = decltype(number);
        constexpr int kPixels = decltype(pixels)::value;
        const auto blocks = static_cast<unsigned>(p.batch * Tile<kPixels>::tiles(p.pixels));
        launch("concept_map", concept_map_kernel<T, decltype(tokens)::value, kPixels>,
               {dim3(blocks, groups), threads_for(p.heads), 0}, ConceptMapArguments{p, wide},
               queue);
    });
}

void concept_map_backward_cuda(const ConceptMapBackwardParams &p, const CudaQueue &queue) {
    if (p.batch == 0 || p.pixels == 0)
        return;
    const bool wide = is_wide(p.query, p.strides, p.depth) && aligned(p.keys) &&
                      is_wide(p.grad_query, p.grad_strides, p.depth);
    with_shape(p.type, p.tokens, [&](auto number, auto tokens, auto pixels) {
        using T = decltype(number);
        constexpr int kPixels = decltype(pixels)::value;
        const auto blocks = static_cast<unsigned>(p.batch * Tile<kPixels>::tiles(p.pixels));
        launch("concept_map_backward",
               concept_map_backward_kernel<T, decltype(tokens)::value, kPixels>,
               {dim3(blocks), threads_for(p.heads), 0}, ConceptMapBackwardArguments{p, wide},
               queue);
    });
}

} // namespace biasmap
