// Pointwise terms of the overlap measures and their derivatives, once for every backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#    define BIASMAP_HD __host__ __device__ __forceinline__
#else
#    define BIASMAP_HD inline
#endif

namespace biasmap {

// A map's soft top-k mask is m = sigmoid(z), z = (x * scale - centre) * slope + offset.
//   scale   power of two that brings the map's range near 1, so that no range over- or underflows
//   centre  float32 nearest to the root; x * scale - centre is then exact for the pixels that
//   matter offset  what rounding the root to `centre` left over, in units of z slope   2 /
//   (temperature * range * scale); 0 for a constant map
struct SoftMap {
    float scale;
    float centre;
    float offset;
    float slope;
};

// exp(-a) for a >= 0, relative error 2e-7, NaN in NaN out. Branch-free, so that loops vectorise.
BIASMAP_HD float exp_minus(float a) {
#if defined(__CUDA_ARCH__)
    return expf(-a);
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
    const float e = exp_minus(std::fabs(z));
    return e / (1.0f + e);
}

BIASMAP_HD float soft_mask(float x, SoftMap s) {
    const float z = soft_argument(x, s);
    const float tail = soft_tail(z);
    return z >= 0.0f ? 1.0f - tail : tail;
}

// d sigmoid / dz
BIASMAP_HD float soft_weight(float m) { return m * (1.0f - m); }

// SoftIoU = I / (2 S - I): both masks have the mass S = fraction * pixels by construction.
BIASMAP_HD float soft_iou(double intersection, double mass) {
    return static_cast<float>(intersection / (2.0 * mass - intersection));
}

// d SoftIoU / d I at that value: 2 S / (2 S - I)^2.
BIASMAP_HD float soft_iou_slope(float iou, double mass) {
    return static_cast<float>((1.0 + iou) * (1.0 + iou) / (2.0 * mass));
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
