// Pixel by pixel, tokens side by side in vectors: queries are read where they lie, and nothing as
// large as the attention matrix is stored.
#include "concept_map.h"

#include <algorithm>
#include <vector>

#include "cpu_clones.h"

namespace biasmap {
namespace {

// Sixteen floats: one register of AVX-512, two of AVX2.
using Lanes = float __attribute__((vector_size(64)));
using LanesInMemory = float __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
// Pixels in one inner loop: with more, their sums do not fit AVX2's registers.
constexpr int64_t kRows = 6;
// Pixels of one piece of work, and below how many numbers threads cost more than they save.
constexpr int64_t kTile = 48, kParallelNumbers = 1 << 16;

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// out[r] = sum over c of a[r][c] * b[c] for rows r of `a` with any strides, `b` [columns, width]
// and `out` [rows, width], the width whole vectors.
BIASMAP_CLONES void multiply(const float *a, int64_t row_stride, int64_t stride, int64_t rows,
                             int64_t columns, const float *b, int64_t width, float *out) {
    for (int64_t first = 0; first < rows; first += kRows) {
        const float *row[kRows];
        for (int64_t r = 0; r < kRows; ++r) // beyond the last, that one again
            row[r] = a + std::min(first + r, rows - 1) * row_stride;
        const int64_t count = std::min(kRows, rows - first);
        for (int64_t start = 0; start < width; start += kLanes) {
            Lanes sums[kRows] = {};
            for (int64_t c = 0; c < columns; ++c) {
                const Lanes other = *reinterpret_cast<const LanesInMemory *>(b + c * width + start);
#pragma GCC unroll 6
                for (int64_t r = 0; r < kRows; ++r)
                    sums[r] += row[r][c * stride] * other;
            }
            for (int64_t r = 0; r < count; ++r)
                *reinterpret_cast<LanesInMemory *>(out + (first + r) * width + start) = sums[r];
        }
    }
}

// Softmax of each row, in place, after `mask` is added: 0 for a token, -FLT_MAX for padding. The
// exponentials are one long loop: within a row, GCC does not vectorise them.
BIASMAP_CLONES void softmax(float *scores, const float *mask, int64_t rows, int64_t width) {
    const auto *masks = reinterpret_cast<const LanesInMemory *>(mask);
    const int64_t count = width / kLanes;
    auto *row = reinterpret_cast<LanesInMemory *>(scores);
    for (int64_t r = 0; r < rows; ++r, row += count) {
        Lanes most = row[0] += masks[0];
        for (int64_t i = 1; i < count; ++i) {
            row[i] += masks[i];
            most = row[i] > most ? row[i] : most;
        }
        float top = most[0];
        for (int64_t t = 1; t < kLanes; ++t)
            top = most[t] > top ? most[t] : top;
        for (int64_t i = 0; i < count; ++i)
            row[i] = top - row[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < rows * width; ++i)
        scores[i] = exp_minus(scores[i]);
    row = reinterpret_cast<LanesInMemory *>(scores);
    for (int64_t r = 0; r < rows; ++r, row += count) {
        Lanes sums = row[0];
        for (int64_t i = 1; i < count; ++i)
            sums += row[i];
        float sum = 0.0f;
        for (int64_t t = 0; t < kLanes; ++t)
            sum += sums[t];
        for (int64_t i = 0; i < count; ++i)
            row[i] *= 1.0f / sum;
    }
}

BIASMAP_CLONES void add_to(float *sums, const float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        sums[i] += x[i];
}

// From A to dL/ds with dL/dA, row by row, in place.
BIASMAP_CLONES void through_softmax(float *inner, const float *outer, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        float *p = inner + r * width;
        const float *g = outer + r * width;
        float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t t = 0; t < width; ++t)
            mean += p[t] * g[t];
#pragma omp simd
        for (int64_t t = 0; t < width; ++t)
            p[t] = softmax_gradient(p[t], g[t], mean);
    }
}

std::vector<float> padding_mask(int64_t tokens, int64_t width) {
    std::vector<float> mask(static_cast<size_t>(width), -FLT_MAX);
    std::fill_n(mask.begin(), tokens, 0.0f);
    return mask;
}

// [heads, T', d] as [heads, d, width of T'], the padding zero.
std::vector<float> transposed(const float *keys, int64_t heads, int64_t tokens, int64_t depth,
                              int64_t width) {
    std::vector<float> found(static_cast<size_t>(heads * depth * width), 0.0f);
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < depth; ++c)
                found[static_cast<size_t>((h * depth + c) * width + t)] =
                    keys[(h * tokens + t) * depth + c];
    return found;
}

// [heads, T', d] as [heads, T', width of d], the padding zero.
std::vector<float> widened(const float *keys, int64_t rows, int64_t depth, int64_t width) {
    std::vector<float> found(static_cast<size_t>(rows * width), 0.0f);
    for (int64_t row = 0; row < rows; ++row)
        std::copy_n(keys + row * depth, depth, found.data() + row * width);
    return found;
}

} // namespace

void concept_map_cpu(const ConceptMapParams &p) {
    const auto *query = static_cast<const float *>(p.query);
    const int64_t width = padded(p.tokens), tiles = (p.pixels + kTile - 1) / kTile;
    const std::vector<float> mask = padding_mask(p.tokens, width);
    const std::vector<float> keys = transposed(p.keys, p.heads, p.tokens, p.depth, width);
#pragma omp parallel if (p.batch * p.heads * p.pixels * p.depth > kParallelNumbers)
    {
        std::vector<float> attention(static_cast<size_t>(kTile * width)), sums(attention.size());
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = tile * kTile, rows = std::min(kTile, p.pixels - first);
                std::fill(sums.begin(), sums.end(), 0.0f);
                // 1) heads
                for (int64_t h = 0; h < p.heads; ++h) {
                    const float *q =
                        query + b * p.strides[0] + h * p.strides[1] + first * p.strides[2];
                    multiply(q, p.strides[2], p.strides[3], rows, p.depth,
                             keys.data() + h * p.depth * width, width, attention.data());
                    softmax(attention.data(), mask.data(), rows, width);
                    add_to(sums.data(), attention.data(), rows * width);
                }
                // 2) concepts
                for (int64_t k = 0; k < p.concepts; ++k) {
                    float *map = p.maps + (b * p.concepts + k) * p.pixels + first;
                    const float *weights = p.weights + k * p.tokens;
                    for (int64_t r = 0; r < rows; ++r) {
                        float value = 0.0f;
                        for (int64_t t = 0; t < p.tokens; ++t)
                            value += weights[t] * sums[static_cast<size_t>(r * width + t)];
                        map[r] = p.add ? map[r] + value : value;
                    }
                }
            }
    }
}

void concept_map_backward_cpu(const ConceptMapBackwardParams &p) {
    const auto *query = static_cast<const float *>(p.query);
    auto *grad_query = static_cast<float *>(p.grad_query);
    const int64_t width = padded(p.tokens), wide = padded(p.depth);
    const int64_t tiles = (p.pixels + kTile - 1) / kTile;
    const std::vector<float> mask = padding_mask(p.tokens, width);
    const std::vector<float> keys = transposed(p.keys, p.heads, p.tokens, p.depth, width);
    const std::vector<float> rows_of_keys = widened(p.keys, p.heads * p.tokens, p.depth, wide);
#pragma omp parallel if (p.batch * p.heads * p.pixels * p.depth > kParallelNumbers)
    {
        std::vector<float> inner(static_cast<size_t>(kTile * width)), outer(inner.size());
        std::vector<float> grads(static_cast<size_t>(kTile * wide));
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = tile * kTile, rows = std::min(kTile, p.pixels - first);
                // 1) dL/dA, the same for all heads
                std::fill(outer.begin(), outer.end(), 0.0f);
                for (int64_t k = 0; k < p.concepts; ++k)
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t t = 0; t < p.tokens; ++t)
                            outer[static_cast<size_t>(r * width + t)] +=
                                p.weights[k * p.tokens + t] *
                                p.grad[(b * p.concepts + k) * p.pixels + first + r];
                // 2) heads: attention again, cheaper than keeping it, then through it
                for (int64_t h = 0; h < p.heads; ++h) {
                    const float *q =
                        query + b * p.strides[0] + h * p.strides[1] + first * p.strides[2];
                    multiply(q, p.strides[2], p.strides[3], rows, p.depth,
                             keys.data() + h * p.depth * width, width, inner.data());
                    softmax(inner.data(), mask.data(), rows, width);
                    through_softmax(inner.data(), outer.data(), rows, width);
                    multiply(inner.data(), width, 1, rows, p.tokens,
                             rows_of_keys.data() + h * p.tokens * wide, wide, grads.data());
                    float *grad = grad_query + b * p.grad_strides[0] + h * p.grad_strides[1] +
                                  first * p.grad_strides[2];
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t c = 0; c < p.depth; ++c)
                            grad[r * p.grad_strides[2] + c * p.grad_strides[3]] =
                                grads[static_cast<size_t>(r * wide + c)];
                }
            }
    }
}

} // namespace biasmap
