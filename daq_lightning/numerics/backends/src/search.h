// What a search is told and finds, the scales that it may take, and what its objectives make of sums; the same
// float64 as in ../../search and ../../objectives.py.
//
// Legend: G groups, K candidates of a stage.

#pragma once

#include "sums.h"

extern "C" {

struct Search {
    int64_t metric, scale_format;  // a Metric; a ScaleFormat
    int64_t K, n_fine;             // candidates of the two stages
    double tau, alpha_min, alpha_max, radius;
    Array coarse, steps;           // float64: alpha, [K], or of a grid of its own the steps from the plain scale;
                                   // n_fine steps over [0, 1]
    int64_t reader;                // a Reader, whose sums are wanted as well; or FLOAT32, which asks for none
    double global_scale;           // a power of two, of scales in E4M3
    int64_t pool;                  // neighbouring groups whose sums come added up
};

// Numbered as SCALE_FORMATS in ../../formats; the last two have a grid of their own.
enum ScaleFormat { PLAIN = 0, SHORT = 1, POWER = 2, EIGHT = 3 };

struct Found {
    Array scale;   // float32 [G]; NaN or infinity where the group holds one
    Array alpha;   // float64 [G]
    Array counts;  // int64 [6, S, G / pool]: of the scale found, of absmax, of that found as the reader sees it
    Array totals;  // float64 [4, S, G / pool]; S is 3, or 2 without a reader; see write()
    Array codes;   // uint8 [M, N]
    Array zero;    // int8 [G] of a format with zero points, else nothing
};
}

namespace {

// Never below the smallest normal number; see round_scale in ../../quantize.py.
DAQ_INLINE float round_scale(float scale, int64_t format, float global) {
    scale = std::max(scale, 0x1p-126f);
    uint32_t bits = (uint32_t)bits_of(scale);
    if (format == SHORT) bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    if (format == POWER) bits = (bits + 0x007fffffu) & 0xff800000u;
    if (format == EIGHT) return OF_E4M3.round(std::max(std::min(scale * global, 448.0f), 0x1p-9f)) / global;
    return float_of((int32_t)bits);
}

// The value of a code of E4M3, and the code of one of its values.
inline double value_of(int32_t code) { return code < 8 ? (double)code * 0x1p-9 : (double)float_of((code + 960) << 20); }
inline int32_t code_of(float value) { return value < 0x1p-6f ? (int32_t)(value * 512) : (bits_of(value) >> 20) - 960; }

constexpr Wanted wanted_by(Metric metric) { return metric == SIGN ? COUNTS : metric == MSE ? ERROR : DIRECTION; }

// What the objective makes of the sums of a group in which something changed; see ../../objectives.py.
template <Metric metric>
DAQ_INLINE double score(const Fixed& fixed, const Sums& sums, double tau) {
    if (metric == SIGN) return (double)(sums.preserved + sums.both_zero) / (double)fixed.n;
    if (metric == MSE) return -(sums.error_sq / (double)fixed.n);
    if (metric == COSINE) {
        const double norms = std::sqrt(fixed.delta_sq * sums.delta_q_sq);
        return norms > 0 ? std::max(-1.0, std::min(1.0, sums.dot / norms)) : 0.0;
    }
    const double rho = sums.dot / fixed.delta_sq;
    return -((rho - 1) * (rho - 1) + tau * (sums.delta_q_sq / fixed.delta_sq - rho * rho));
}

}  // namespace
