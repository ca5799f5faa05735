#include "overlap.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <memory>
#include <vector>

#include <omp.h>

#include "cpu_clones.h"

namespace biasmap {
namespace {

// Below this many pixels, starting threads costs more than it saves.
constexpr int64_t kParallelPixels = 1 << 15;
// Float sums run over one block at most, then go into a double.
constexpr int64_t kBlock = 256;

struct Range {
    float lo, hi;
    bool finite;
};

BIASMAP_CLONES Range range_of(const float *x, int64_t n) {
    float lo = FLT_MAX, hi = -FLT_MAX;
    int bad = 0;
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(+ : bad)
    for (int64_t i = 0; i < n; ++i) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
        bad += !(std::fabs(x[i]) <= FLT_MAX);
    }
    return {lo, hi, bad == 0};
}

BIASMAP_CLONES int64_t count_at_most(const float *x, int64_t n, float pivot) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i)
        count += x[i] <= pivot;
    return count;
}

struct Neighbours {
    float below, above; // largest x <= pivot, smallest x > pivot
};

BIASMAP_CLONES Neighbours neighbours(const float *x, int64_t n, float pivot) {
    float below = -FLT_MAX, above = FLT_MAX;
#pragma omp simd reduction(max : below) reduction(min : above)
    for (int64_t i = 0; i < n; ++i) {
        const float low = x[i] <= pivot ? x[i] : -FLT_MAX;
        const float high = x[i] <= pivot ? FLT_MAX : x[i];
        below = low > below ? low : below;
        above = high < above ? high : above;
    }
    return {below, above};
}

// The order statistics k and k + 1 (from 0; both the largest value if k = n - 1) of a finite map.
// Bisection on the floats' order with a vectorised count: at most 32 passes whatever the values and
// ties (18 on blobs at 64 x 64, 4.6 us), no copy of the map. nth_element took 24 us.
Neighbours order_statistics(const float *x, int64_t n, int64_t k, Range range) {
    int64_t lo = static_cast<int64_t>(order_key(range.lo)) - 1; // count(<= lo) <= k < count(<= hi)
    int64_t hi = order_key(range.hi);
    int64_t count = n;
    while (hi - lo > 1 && count != k + 1) {
        const int64_t middle = lo + (hi - lo) / 2;
        const int64_t c = count_at_most(x, n, from_order_key(static_cast<uint32_t>(middle)));
        if (c > k) {
            hi = middle;
            count = c;
        } else {
            lo = middle;
        }
    }
    const Neighbours found = neighbours(x, n, from_order_key(static_cast<uint32_t>(hi)));
    return {found.below, count > k + 1 || k + 1 == n ? found.below : found.above};
}

// numpy.percentile(x, percentile, method="linear"), bit for bit.
float percentile_of(const float *x, int64_t n, double percentile, Range range) {
    const Position at = percentile_position(n, percentile);
    const Neighbours s = order_statistics(x, n, at.below, range);
    return percentile_lerp(s.below, s.above, at.share);
}

// Writes one bit a pixel, x > threshold, and returns how many are set. By way of bytes, whose
// compare vectorises: one multiplication then gathers eight of them (6 times as fast as shifting
// bits).
BIASMAP_CLONES int32_t pack_mask(const float *x, int64_t n, float threshold, uint64_t *words) {
    int32_t area = 0;
    for (int64_t start = 0; start < n; start += 64) {
        uint8_t above[64] = {};
        if (n - start >= 64) { // a constant count, so that the loop is unrolled away
            for (int j = 0; j < 64; ++j)
                above[j] = x[start + j] > threshold;
        } else {
            for (int j = 0; j < n - start; ++j)
                above[j] = x[start + j] > threshold;
        }
        uint64_t word = 0;
        for (int group = 0; group < 8; ++group) {
            uint64_t bytes;
            std::memcpy(&bytes, above + 8 * group, sizeof bytes);
            word |= (bytes * 0x0102040810204080u >> 56) << (8 * group);
        }
        words[start / 64] = word;
        area += __builtin_popcountll(word);
    }
    return area;
}

BIASMAP_CLONES int32_t count_common(const uint64_t *a, const uint64_t *b, int64_t words) {
    int32_t count = 0;
    for (int64_t i = 0; i < words; ++i)
        count += __builtin_popcountll(a[i] & b[i]);
    return count;
}

// Saturated pixels are counted, only the distance to 0 or 1 is summed: the error of the float sums
// is then relative to the pixels in between, and the root is right to float32 however few they are.
BIASMAP_CLONES Mass mask_mass(const float *x, int64_t n, SoftMap s) {
    Mass total{0.0, 0.0};
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        float tails = 0.0f, weight = 0.0f;
        int above = 0;
#pragma omp simd reduction(+ : tails, weight, above)
        for (int64_t i = start; i < end; ++i) {
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

BIASMAP_CLONES void write_mask(const float *x, int64_t n, SoftMap s, float *mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        mask[i] = soft_mask(x[i], s);
}

BIASMAP_CLONES double dot(const float *a, const float *b, int64_t n) {
    double total = 0.0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; ++i)
            sum += a[i] * b[i];
        total += sum;
    }
    return total;
}

BIASMAP_CLONES void add_scaled(float *out, float factor, const float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        out[i] += factor * x[i];
}

// From dL/dm to dL/dx; `grad` may be `out`.
BIASMAP_CLONES void through_mask(const float *grad, const float *mask, SoftMap s, int64_t n,
                                 float *out) {
    double weights = 0.0, weighted = 0.0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        float block_weights = 0.0f, block_weighted = 0.0f;
#pragma omp simd reduction(+ : block_weights, block_weighted)
        for (int64_t i = start; i < end; ++i) {
            const float w = soft_weight(mask[i]);
            block_weights += w;
            block_weighted += w * grad[i];
        }
        weights += block_weights;
        weighted += block_weighted;
    }
    const float mean = implicit_mean(weighted, weights);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        out[i] = implicit_gradient(mask[i], grad[i], mean, s);
}

SoftMap solve_soft_map(const float *x, int64_t n, double fraction, double temperature) {
    const Range range = range_of(x, n);
    const double logit = logit_of(fraction);
    if (!range.finite)
        return unknown_soft_map();
    if (range.lo == range.hi)
        return constant_soft_map(logit);

    RootSearch search = search_root(range.lo, range.hi, n, fraction, logit, temperature);
    const auto k = std::min(static_cast<int64_t>(static_cast<double>(n) - search.wanted), n - 1);
    search.start(order_statistics(x, n, k, range).below * search.scale);
    while (!search.step(mask_mass(x, n, search.map()))) {
    }
    return search.map();
}

std::vector<char> named_by_pairs(const Pairs &pairs, int64_t concepts) {
    std::vector<char> used(static_cast<size_t>(concepts), 0);
    for (int64_t i = 0; i < 2 * pairs.count; ++i)
        used[static_cast<size_t>(pairs.data[i])] = 1;
    return used;
}

// One set of masks [K, N] for each thread.
class MaskScratch {
public:
    MaskScratch(int64_t concepts, int64_t pixels)
        : size_(concepts * pixels),
          data_(new float[static_cast<size_t>(size_ * omp_get_max_threads())]) {}
    float *mine() { return data_.get() + size_ * omp_get_thread_num(); }

private:
    int64_t size_;
    std::unique_ptr<float[]> data_;
};

} // namespace

void pairs_iou_cpu(const PairsIouParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const int64_t words = (p.pixels + 63) / 64;
    const bool parallel = p.batch * p.concepts * p.pixels > kParallelPixels;

    // 1) one mask a map
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t map = 0; map < p.batch * p.concepts; ++map) {
        const float *x = maps + map * p.pixels;
        const Range range = range_of(x, p.pixels);
        p.area[map] = -1;
        if (range.finite)
            p.area[map] = pack_mask(x, p.pixels, percentile_of(x, p.pixels, p.percentile, range),
                                    p.masks + map * words);
    }

    // 2) pairs
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        const int32_t *area = p.area + b * p.concepts;
        const uint64_t *masks = p.masks + b * p.concepts * words;
        for (int64_t i = 0; i < p.pairs.count; ++i) {
            const int64_t first = p.pairs.data[2 * i], second = p.pairs.data[2 * i + 1];
            float iou = std::numeric_limits<float>::quiet_NaN();
            int32_t either = -1;
            if (area[first] >= 0 && area[second] >= 0) {
                const int32_t both =
                    count_common(masks + first * words, masks + second * words, words);
                either = area[first] + area[second] - both;
                iou = either == 0 ? 0.0f : static_cast<float>(static_cast<double>(both) / either);
            }
            p.iou[b * p.pairs.count + i] = iou;
            p.union_pixels[b * p.pairs.count + i] = either;
        }
    }
}

void soft_topk_cpu(const SoftTopkParams &p) {
#pragma omp parallel for if (p.rows * p.pixels > kParallelPixels) schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
        const float *x = static_cast<const float *>(p.x) + row * p.pixels;
        p.state[row] = solve_soft_map(x, p.pixels, p.fraction, p.temperature);
        write_mask(x, p.pixels, p.state[row], p.mask + row * p.pixels);
    }
}

void soft_topk_backward_cpu(const SoftTopkBackwardParams &p) {
#pragma omp parallel for if (p.rows * p.pixels > kParallelPixels) schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t at = row * p.pixels;
        through_mask(p.grad + at, p.mask + at, p.state[row], p.pixels, p.grad_x + at);
    }
}

void soft_iou_cpu(const SoftIouParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const bool parallel = p.batch * p.concepts * p.pixels > kParallelPixels;
    const std::vector<char> used = named_by_pairs(p.pairs, p.concepts);
    const double mass = p.fraction * static_cast<double>(p.pixels);
    MaskScratch scratch(p.concepts, p.pixels);

    // 1) one root a map, however many pairs share it
#pragma omp parallel for if (parallel) schedule(dynamic, 4)
    for (int64_t map = 0; map < p.batch * p.concepts; ++map)
        p.state[map] =
            used[static_cast<size_t>(map % p.concepts)]
                ? solve_soft_map(maps + map * p.pixels, p.pixels, p.fraction, p.temperature)
                : SoftMap{0.0f, 0.0f, 0.0f, 0.0f};

    // 2) masks of one set at a time, then its pairs
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        float *masks = scratch.mine();
        for (int64_t k = 0; k < p.concepts; ++k)
            if (used[static_cast<size_t>(k)])
                write_mask(maps + (b * p.concepts + k) * p.pixels, p.pixels,
                           p.state[b * p.concepts + k], masks + k * p.pixels);
        for (int64_t i = 0; i < p.pairs.count; ++i) {
            const float *first = masks + p.pairs.data[2 * i] * p.pixels;
            const float *second = masks + p.pairs.data[2 * i + 1] * p.pixels;
            p.iou[b * p.pairs.count + i] = soft_iou(dot(first, second, p.pixels), mass);
        }
    }
}

void soft_iou_backward_cpu(const SoftIouBackwardParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const bool parallel = p.batch * p.concepts * p.pixels > kParallelPixels;
    const std::vector<char> used = named_by_pairs(p.pairs, p.concepts);
    const double mass = p.fraction * static_cast<double>(p.pixels);
    MaskScratch scratch(p.concepts, p.pixels);

#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        float *masks = scratch.mine();
        float *grads = static_cast<float *>(p.grad_maps) + b * p.concepts * p.pixels;
        const SoftMap *state = p.state + b * p.concepts;
        std::fill_n(grads, p.concepts * p.pixels, 0.0f);
        // 1) masks again: cheaper than keeping them
        for (int64_t k = 0; k < p.concepts; ++k)
            if (used[static_cast<size_t>(k)])
                write_mask(maps + (b * p.concepts + k) * p.pixels, p.pixels, state[k],
                           masks + k * p.pixels);
        // 2) dL/dm: each mask gets its partner. The masses are constant, and so drop out.
        for (int64_t i = 0; i < p.pairs.count; ++i) {
            const int64_t at = b * p.pairs.count + i;
            const float factor = p.grad[at] * soft_iou_slope(p.iou[at], mass);
            const int64_t *pair = p.pairs.data + 2 * i;
            const int64_t first = pair[0] * p.pixels, second = pair[1] * p.pixels;
            add_scaled(grads + first, factor, masks + second, p.pixels);
            add_scaled(grads + second, factor, masks + first, p.pixels);
        }
        // 3) through the masks, in place
        for (int64_t k = 0; k < p.concepts; ++k)
            if (used[static_cast<size_t>(k)])
                through_mask(grads + k * p.pixels, masks + k * p.pixels, state[k], p.pixels,
                             grads + k * p.pixels);
    }
}

const char *cpu_isa() {
#if defined(BIASMAP_X86_LEVELS)
    if (__builtin_cpu_supports("x86-64-v4"))
        return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3"))
        return "x86-64-v3";
#endif
    return "baseline";
}

} // namespace biasmap
