// Pointwise terms of the overlap measures, their derivatives, and the searches for a mask's root
// and for order statistics: once for every backend.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#    define BIASMAP_HD __host__ __device__ __forceinline__
#    define BIASMAP_SEARCH __device__ __forceinline__ // calls functions of the device
#else
#    define BIASMAP_HD inline
#    define BIASMAP_SEARCH inline
#endif

namespace biasmap {

// A map's soft top-k mask is m = sigmoid(z), z = (x * scale - centre) * slope + offset.
struct SoftMap {
    // A power of two that brings the map's range near 1, so that no range over- or underflows.
    float scale;
    // The float32 nearest to the root: x * scale - centre is then exact for the pixels that matter.
    float centre;
    // What rounding the root to `centre` left over, in units of z.
    float offset;
    // 2 / (temperature * range * scale), and 0 for a constant map.
    float slope;
};

// exp(-a) for a >= 0, NaN in NaN out. Relative error 2e-7 on the host, there branch-free, so that
// loops vectorise; on a GPU 2e-7 + 6e-8 a, absolute error 1e-7: one instruction and a product.
BIASMAP_HD float exp_minus(float a) {
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a * -1.44269504f));
    return power;
#else
    constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    const float x = a > 87.0f ? -87.0f : -a;
    const float shifted = x * 1.44269504f + kRound;
    const float k = shifted - kRound;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f; // ln 2 in two parts
    float p = 1.9875691500e-4f;                                  // Cephes expf, |r| <= ln(2) / 2
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000u + 127u) << 23; // 2^k
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
#endif
}

BIASMAP_HD float soft_argument(float x, SoftMap s) {
    return (x * s.scale - s.centre) * s.slope + s.offset;
}

// Distance of sigmoid(z) from its nearer end, in (0, 1/2]: exact to float32 also where m rounds
// to 1.
BIASMAP_HD float soft_tail(float z) {
    const float e = exp_minus(fabsf(z));
#if defined(__CUDA_ARCH__)
    return __fdividef(e, 1.0f + e); // 2 ulp, in a fifth of the instructions
#else
    return e / (1.0f + e);
#endif
}

BIASMAP_HD float soft_mask(float x, SoftMap s) {
    const float z = soft_argument(x, s);
    const float tail = soft_tail(z);
    return z >= 0.0f ? 1.0f - tail : tail;
}

// d sigmoid / dz
BIASMAP_HD float soft_weight(float m) { return m * (1.0f - m); }

// dL/dx = (2 / gamma) w (g - mean) with w = m (1 - m), g = dL/dm and mean = sum(w g) / sum(w).
BIASMAP_HD float implicit_gradient(float m, float g, float mean, SoftMap s) {
    return soft_weight(m) * (g - mean) * s.slope * s.scale;
}

// That mean; all pixels saturated: no pixel moves the mask.
BIASMAP_HD float implicit_mean(double weighted, double weights) {
    return static_cast<float>(weights == 0.0 ? 0.0 : weighted / weights);
}

// Pixels in either of two masks and their hard IoU, from areas that are -1 if a map is not finite.
struct HardIou {
    float iou;
    int32_t either;
};
BIASMAP_HD HardIou hard_iou(int32_t first, int32_t second, int32_t both) {
    if (first < 0 || second < 0)
        return {nanf(""), -1};
    const int32_t either = first + second - both;
    return {either == 0 ? 0.0f : static_cast<float>(static_cast<double>(both) / either), either};
}

// SoftIoU = I / (2 S - I): both masks have the mass S = fraction * pixels by construction.
BIASMAP_HD float soft_iou(double intersection, double mass) {
    return static_cast<float>(intersection / (2.0 * mass - intersection));
}

// d SoftIoU / d I at that value: 2 S / (2 S - I)^2.
BIASMAP_HD float soft_iou_slope(float iou, double mass) {
    return static_cast<float>((1.0 + iou) * (1.0 + iou) / (2.0 * mass));
}

// The mask of a map with a value that is not finite, and of a constant map.
BIASMAP_HD SoftMap unknown_soft_map() {
    const float nan = nanf("");
    return {nan, nan, nan, nan};
}
BIASMAP_HD SoftMap constant_soft_map(double logit) {
    return {0.0f, 0.0f, static_cast<float>(logit), 0.0f};
}

// Of soft masks. A GPU gets the logit from the host.
struct SoftSettings {
    double fraction, temperature, logit; // log(fraction / (1 - fraction))
};
inline SoftSettings soft_settings(double fraction, double temperature) {
    return {fraction, temperature, std::log(fraction) - std::log1p(-fraction)};
}

struct Mass {
    double mass;   // sum of m
    double weight; // sum of m (1 - m)
};

// Search of the root of sum(m) = wanted: Newton from a start near the hard threshold, kept inside a
// shrinking bracket. In values of the map times `scale`.
struct RootSearch {
    double scale, slope, wanted;
    double lo, hi; // sum(m) >= wanted at lo, <= wanted at hi
    double root;
    int pass;

    // The order statistic that a hard mask's threshold is.
    BIASMAP_HD int64_t rank(int64_t n) const {
        const auto below = static_cast<int64_t>(static_cast<double>(n) - wanted);
        return below < n - 1 ? below : n - 1;
    }

    BIASMAP_HD void start(double near) { root = fmin(fmax(near * scale, lo), hi); }

    BIASMAP_HD SoftMap map() const {
        const auto centre = static_cast<float>(root);
        return {static_cast<float>(scale), centre, static_cast<float>((centre - root) * slope),
                static_cast<float>(slope)};
    }

    // Takes the sums at `root` and moves it. True when it is right to float32.
    BIASMAP_HD bool step(Mass at) {
        (at.mass >= wanted ? lo : hi) = root;
        const double newton = root + (at.mass - wanted) / (at.weight * slope);
        // Across a gap of the map's values Newton creeps: after eight passes, halve every other
        // time.
        const bool halve = !(newton > lo && newton < hi) || (pass >= 8 && pass % 2 == 0);
        const double next = halve ? lo + (hi - lo) / 2 : newton;
        const double moved = fabs(next - root) * slope;
        root = next;
        ++pass;
        // Newton's error squares, |next error| <= step^2 / 2 in units of z: 5e-9 after this one.
        return moved < (halve ? 1e-9 : 1e-4) || pass == 100;
    }
};

// For a map of `n` pixels between lo < hi; `start` has to follow.
BIASMAP_HD RootSearch search_root(float lo, float hi, int64_t n, const SoftSettings &settings) {
    const double width = static_cast<double>(hi) - lo;
    int exponent = -ilogb(width);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    RootSearch search{};
    search.scale = ldexp(1.0, exponent);
    search.slope = 2.0 / (settings.temperature * width * search.scale);
    search.wanted = settings.fraction * static_cast<double>(n);
    search.lo = lo * search.scale - settings.logit / search.slope;
    search.hi = hi * search.scale - settings.logit / search.slope;
    return search;
}

// Floats as integers in the same order.
BIASMAP_HD uint32_t order_key(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
BIASMAP_HD float from_order_key(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct Range {
    float lo, hi;
    int bad; // values that are not finite
};

// Largest value up to a pivot, smallest beyond it.
struct Neighbours {
    float below, above;
};

// The order statistics k and k + 1 (from 0; both the largest value if k = n - 1) of a finite map,
// by bisection on the floats' order: at most 32 counts whatever the values and ties (18 on blobs at
// 64 x 64), and no copy of the map.
template <typename Count, typename Beside>
BIASMAP_SEARCH Neighbours order_statistics(int64_t n, int64_t k, Range range,
                                           const Count &count_at_most, const Beside &neighbours) {
    int64_t lo = static_cast<int64_t>(order_key(range.lo)) - 1; // count(<= lo) <= k < count(<= hi)
    int64_t hi = order_key(range.hi);
    int64_t count = n;
    while (hi - lo > 1 && count != k + 1) {
        const int64_t middle = lo + (hi - lo) / 2;
        const int64_t c = count_at_most(from_order_key(static_cast<uint32_t>(middle)));
        if (c > k) {
            hi = middle;
            count = c;
        } else {
            lo = middle;
        }
    }
    const Neighbours at = neighbours(from_order_key(static_cast<uint32_t>(hi)));
    return {at.below, count > k + 1 || k + 1 == n ? at.below : at.above};
}

// Where a mask's root is searched first: near the order statistic k, to 1/256 of the map's range,
// which is a fraction of the mask's edge unless the temperature is far below 0.01.
template <typename Count>
BIASMAP_SEARCH double near_order_statistic(Range range, int64_t k, const Count &count_at_most) {
    double lo = range.lo, hi = range.hi;
    for (int halving = 0; halving < 8; ++halving) {
        const double middle = (lo + hi) / 2;
        (count_at_most(static_cast<float>(middle)) > k ? hi : lo) = middle;
    }
    return (lo + hi) / 2;
}

// Between the order statistics `below` and below + 1 of a map, counted from 0.
struct Position {
    int64_t below;
    double share;
};
inline Position percentile_position(int64_t n, double percentile) {
    const double position = static_cast<double>(n - 1) * (percentile / 100.0);
    const auto below = std::min(static_cast<int64_t>(position), n - 1);
    return {below, position - static_cast<double>(below)};
}

// Linear interpolation exactly as numpy.percentile rounds it for float32. Products are formed in
// double (exact) and rounded once, so that no compiler can fuse them into the addition.
BIASMAP_HD float percentile_lerp(float below, float above, double t) {
    const float difference = above - below;
    if (t >= 0.5) {
        const float weight = static_cast<float>(1.0 - t);
        return above - static_cast<float>(static_cast<double>(difference) * weight);
    }
    const float weight = static_cast<float>(t);
    return below + static_cast<float>(static_cast<double>(difference) * weight);
}

} // namespace biasmap
