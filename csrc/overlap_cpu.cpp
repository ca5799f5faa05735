#include "overlap.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <memory>
#include <vector>

#include <omp.h>

#include "cpu.h"

namespace biasmap {
namespace {

// Below this many pixels, starting threads costs more than it saves.
constexpr int64_t kParallelPixels = 1 << 15;
// Float sums run over one block at most, then go into a double.
constexpr int64_t kBlock = 256;

bool worth_threads(int64_t pixels) { return pixels > kParallelPixels && may_use_threads(); }

BIASMAP_CLONES Range range_of(const float *x, int64_t n) {
    float lo = FLT_MAX, hi = -FLT_MAX;
    int bad = 0;
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(+ : bad)
    for (int64_t i = 0; i < n; ++i) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
        bad += !(std::fabs(x[i]) <= FLT_MAX);
    }
    return {lo, hi, bad};
}

BIASMAP_CLONES int64_t count_at_most(const float *x, int64_t n, float pivot) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i)
        count += x[i] <= pivot;
    return count;
}

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

// numpy.percentile(x, percentile, method="linear"), bit for bit; NaN if a value is not finite.
float percentile_of(const float *x, int64_t n, double percentile) {
    const Range range = range_of(x, n);
    if (range.bad > 0)
        return std::numeric_limits<float>::quiet_NaN();
    const Position at = percentile_position(n, percentile);
    const Neighbours values = order_statistics(
        n, at.below, range, [&](float pivot) { return count_at_most(x, n, pivot); },
        [&](float pivot) { return neighbours(x, n, pivot); });
    return percentile_lerp(values.below, values.above, at.share);
}

// Writes one bit per pixel, x > threshold, and returns how many are set. By way of bytes, whose
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

struct PairSums {
    double both, first, second; // of m_a m_b, w_a m_b and m_a w_b, with w = m (1 - m)
};

BIASMAP_CLONES PairSums sums_of_pair(const float *a, const float *b, int64_t n) {
    PairSums total{0.0, 0.0, 0.0};
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        float both = 0.0f, first = 0.0f, second = 0.0f;
#pragma omp simd reduction(+ : both, first, second)
        for (int64_t i = start; i < end; ++i) {
            both += a[i] * b[i];
            first += soft_weight(a[i]) * b[i];
            second += soft_weight(b[i]) * a[i];
        }
        total.both += both, total.first += first, total.second += second;
    }
    return total;
}

BIASMAP_CLONES void add_scaled(float *out, float factor, const float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        out[i] += factor * x[i];
}

// sum(w g) and sum(w), with w = m (1 - m).
BIASMAP_CLONES Mass weighted_sums(const float *mask, const float *grad, int64_t n) {
    Mass total{0.0, 0.0};
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = std::min(n, start + kBlock);
        float weighted = 0.0f, weights = 0.0f;
#pragma omp simd reduction(+ : weighted, weights)
        for (int64_t i = start; i < end; ++i) {
            const float w = soft_weight(mask[i]);
            weighted += w * grad[i];
            weights += w;
        }
        total.mass += weighted, total.weight += weights;
    }
    return total;
}

// From dL/dm to dL/dx; `grad` may be `out`.
BIASMAP_CLONES void through_mask(const float *grad, const float *mask, float mean, SoftMap s,
                                 int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        out[i] = implicit_gradient(mask[i], grad[i], mean, s);
}

SoftMap solve_soft_map(const float *x, int64_t n, const SoftSettings &settings) {
    const Range range = range_of(x, n);
    if (range.bad > 0)
        return unknown_soft_map();
    if (range.lo == range.hi)
        return constant_soft_map(settings.logit);

    RootSearch search = search_root(range.lo, range.hi, n, settings);
    search.start(near_order_statistic(range, search.rank(n),
                                      [&](float pivot) { return count_at_most(x, n, pivot); }));
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

// A thread's own memory, kept for its next call.
float *scratch(int64_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<size_t>(count))
        memory.resize(static_cast<size_t>(count));
    return memory.data();
}

} // namespace

void pairs_iou_cpu(const PairsIouParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const int64_t words = (p.pixels + 63) / 64, count = p.batch * p.concepts;
    const bool parallel = worth_threads(count * p.pixels);
    const std::unique_ptr<uint64_t[]> all_masks(new uint64_t[static_cast<size_t>(count * words)]);

    // 1) one mask per map
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t map = 0; map < count; ++map) {
        const float *x = maps + map * p.pixels;
        const float threshold = percentile_of(x, p.pixels, p.percentile);
        const int32_t area = pack_mask(x, p.pixels, threshold, all_masks.get() + map * words);
        p.threshold[map] = threshold;
        p.area[map] = threshold == threshold ? area : -1;
    }

    // 2) pairs
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        const int32_t *area = p.area + b * p.concepts;
        const uint64_t *masks = all_masks.get() + b * p.concepts * words;
        for (int64_t i = 0; i < p.pairs.count; ++i) {
            const int64_t first = p.pairs.data[2 * i], second = p.pairs.data[2 * i + 1];
            const int64_t at = b * p.pairs.count + i;
            const int32_t both = count_common(masks + first * words, masks + second * words, words);
            const HardIou hard = hard_iou(area[first], area[second], both);
            p.iou[at] = hard.iou, p.union_pixels[at] = hard.either;
        }
    }
}

void soft_topk_cpu(const SoftTopkParams &p) {
#pragma omp parallel for if (worth_threads(p.rows * p.pixels)) schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
        const float *x = static_cast<const float *>(p.x) + row * p.pixels;
        p.state[row] = solve_soft_map(x, p.pixels, p.settings);
        write_mask(x, p.pixels, p.state[row], p.mask + row * p.pixels);
    }
}

void soft_topk_backward_cpu(const SoftTopkBackwardParams &p) {
#pragma omp parallel for if (worth_threads(p.rows * p.pixels)) schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
        const float *grad = p.grad + row * p.pixels, *mask = p.mask + row * p.pixels;
        const Mass sums = weighted_sums(mask, grad, p.pixels);
        through_mask(grad, mask, implicit_mean(sums.mass, sums.weight), p.state[row], p.pixels,
                     static_cast<float *>(p.grad_x) + row * p.pixels);
    }
}

void soft_iou_cpu(const SoftIouParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const bool parallel = worth_threads(p.batch * p.concepts * p.pixels);
    const std::vector<char> used = named_by_pairs(p.pairs, p.concepts);
    const double mass = p.settings.fraction * static_cast<double>(p.pixels);

    // 1) one root per map, however many pairs share it
#pragma omp parallel for if (parallel) schedule(dynamic, 4)
    for (int64_t map = 0; map < p.batch * p.concepts; ++map)
        p.state[map] = used[static_cast<size_t>(map % p.concepts)]
                           ? solve_soft_map(maps + map * p.pixels, p.pixels, p.settings)
                           : SoftMap{0.0f, 0.0f, 0.0f, 0.0f};

    // 2) masks of one set at a time, then its pairs
#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        float *masks = scratch(p.concepts * p.pixels);
        float *means = p.means + b * p.concepts * p.concepts;
        std::vector<double> weights(static_cast<size_t>(p.concepts));
        std::fill_n(means, p.concepts * p.concepts, 0.0f);
        for (int64_t k = 0; k < p.concepts; ++k)
            if (used[static_cast<size_t>(k)]) {
                float *mask = masks + k * p.pixels;
                write_mask(maps + (b * p.concepts + k) * p.pixels, p.pixels,
                           p.state[b * p.concepts + k], mask);
                weights[static_cast<size_t>(k)] = weighted_sums(mask, mask, p.pixels).weight;
            }
        for (int64_t i = 0; i < p.pairs.count; ++i) {
            const int64_t first = p.pairs.data[2 * i], second = p.pairs.data[2 * i + 1];
            const PairSums sums =
                sums_of_pair(masks + first * p.pixels, masks + second * p.pixels, p.pixels);
            p.iou[b * p.pairs.count + i] = soft_iou(sums.both, mass);
            means[first * p.concepts + second] =
                implicit_mean(sums.first, weights[static_cast<size_t>(first)]);
            means[second * p.concepts + first] =
                implicit_mean(sums.second, weights[static_cast<size_t>(second)]);
        }
    }
}

void soft_iou_backward_cpu(const SoftIouBackwardParams &p) {
    const auto *maps = static_cast<const float *>(p.maps);
    const bool parallel = worth_threads(p.batch * p.concepts * p.pixels);
    const std::vector<char> used = named_by_pairs(p.pairs, p.concepts);
    const double mass = p.settings.fraction * static_cast<double>(p.pixels);

#pragma omp parallel for if (parallel) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
        float *masks = scratch(p.concepts * p.pixels);
        float *grads = static_cast<float *>(p.grad_maps) + b * p.concepts * p.pixels;
        const SoftMap *state = p.state + b * p.concepts;
        std::vector<float> mean(static_cast<size_t>(p.concepts)); // of each map's dL/dm, under w
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
            for (const int64_t k : {pair[0], pair[1]}) {
                const int64_t partner = pair[0] + pair[1] - k;
                add_scaled(grads + k * p.pixels, factor, masks + partner * p.pixels, p.pixels);
                mean[static_cast<size_t>(k)] +=
                    factor * p.means[(b * p.concepts + k) * p.concepts + partner];
            }
        }
        // 3) through the masks, in place
        for (int64_t k = 0; k < p.concepts; ++k)
            if (used[static_cast<size_t>(k)])
                through_mask(grads + k * p.pixels, masks + k * p.pixels,
                             mean[static_cast<size_t>(k)], state[k], p.pixels,
                             grads + k * p.pixels);
    }
}

} // namespace biasmap
