// The sums of all candidate scales on a CPU, and beside them absmax and codes: every weight is read from
// memory once, and all candidates are evaluated from the first-level cache.
//
//     x = clamp(w * (1 / s), -max, max)       one float32 product, as in quantize.py
//     q = round(x) * s                        to the grid of the format; a 16-bit reader rounds once more
//     d = w - b,  d_q = q - b,  e = q - w     float32; their products are summed in float32 over at most 1,008
//                                             elements and in float64 beyond
//
// Legend: M out, N in, G groups, C chunks of a group, K candidates.

#pragma once

#include "common.h"

namespace {

constexpr float SMALL = 0x1p-50f, LARGE = 0x1p50f;  // beyond, products are taken in float64

inline float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}
inline double add_product(double sum, double a, double b) { return sum + a * b; }

enum Wanted { DIRECTION = 1, ERROR = 2, COUNTS = 4, ALL = 7 };

// What a reader of the file makes of code * scale: to nearest, ties to even. Numbered as the dtypes of Matrix.
enum Reader { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <Reader reader>
inline float read_as(float q) {
    if constexpr (reader == BFLOAT16) {  // the upper half of its bits; the largest float32 become infinite
        const uint32_t bits = (uint32_t)bits_of(q);
        return float_of((int32_t)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u));
    }
    if constexpr (reader == FLOAT16) {  // a grid with one value more, which stands for infinity
        const Grid grid(0x1p16, 0x1p-14, 10);
        const int32_t bits = bits_of(grid.round(grid.saturate(q)));
        return float_of((bits & MAGNITUDE) == bits_of(0x1p16f) ? bits | EXPONENT : bits);
    }
    return q;
}

struct Sums {  // of one candidate
    int64_t preserved, lost, both_zero;
    double dot, delta_q_sq, error_sq;
};

struct CountedPiece : Piece {
    int32_t sign[SIZE];   // of w - b
    int32_t equal[SIZE];  // one, in one of three fields of 10 bits: w > b, w < b, w == b
    int64_t down, changed;
    double delta_sq;
    float largest, smallest_delta;  // magnitudes; the latter of the changed elements

    void prepare() {
        int32_t n_down = 0, n_changed = 0, high = 0, low = EXPONENT;
        float sum = 0;
#pragma omp simd reduction(+ : n_down, n_changed, sum) reduction(max : high) reduction(min : low)
        for (int64_t i = 0; i < count; ++i) {
            const float d = w[i] - b[i];
            const int32_t up = w[i] > b[i], dn = w[i] < b[i], size = bits_of(d) & MAGNITUDE;  // bits order like sizes
            sign[i] = up - dn;
            equal[i] = up ? 1 : dn ? 1 << 10 : 1 << 20;
            n_down += dn;
            n_changed += up | dn;
            sum = add_product(sum, d, d);
            low = std::min(low, size ? size : EXPONENT);
            high = std::max(high, std::max(size, bits_of(w[i]) & MAGNITUDE));
        }
        down = n_down;
        changed = n_changed;
        largest = float_of(high);
        smallest_delta = float_of(low);
        delta_sq = sum;
        if (!fits_float32(1.0f)) {
            delta_sq = 0;
            for (int64_t i = 0; i < count; ++i) {
                const double d = w[i] - b[i];  // the difference itself is float32
                delta_sq += d * d;
            }
        }
    }

    // Squares of the differences under this scale neither overflow nor vanish.
    bool fits_float32(float scale) const {
        return smallest_delta > SMALL && largest < LARGE && scale > SMALL && scale < LARGE;
    }

    // Adds the sums of one candidate, or those among them that an objective needs.
    template <Wanted wanted = ALL>
    void add(float scale, const Grid& grid, Sums& sums) const {
        add_both<wanted, FLOAT32>(scale, grid, sums, sums);
    }

    // Adds all sums of one candidate, and those that a reader in 16 bit sees, in one pass.
    void add_read(Reader reader, float scale, const Grid& grid, Sums& sums, Sums& read) const {
        reader == BFLOAT16 ? add_both<ALL, BFLOAT16>(scale, grid, sums, read)
                           : add_both<ALL, FLOAT16>(scale, grid, sums, read);
    }

    template <Wanted wanted, Reader reader>
    void add_both(float scale, const Grid& grid, Sums& sums, Sums& read) const {
        fits_float32(scale) ? add_in<float, wanted, reader>(scale, grid, sums, read)
                            : add_in<double, wanted, reader>(scale, grid, sums, read);
    }

    template <class Real, Wanted wanted, Reader reader>
    void add_in(float scale, const Grid grid, Sums& sums, Sums& read) const {
        const float reciprocal = 1.0f / scale;
        Real dot = 0, delta_q_sq = 0, error_sq = 0, dot_r = 0, delta_r_sq = 0, error_r_sq = 0;
        int32_t with = 0, equals = 0, with_r = 0, equals_r = 0;
#pragma omp simd reduction(+ : dot, delta_q_sq, error_sq, with, equals) \
    reduction(+ : dot_r, delta_r_sq, error_r_sq, with_r, equals_r)
        for (int64_t i = 0; i < count; ++i) {
            const float q = grid.round(grid.saturate(w[i] * reciprocal)) * scale;
            const float d = w[i] - b[i], d_q = q - b[i], e = q - w[i];
            if constexpr (wanted & DIRECTION) {
                dot = add_product(dot, (Real)d, (Real)d_q);
                delta_q_sq = add_product(delta_q_sq, (Real)d_q, (Real)d_q);
            }
            if constexpr (wanted & ERROR) error_sq = add_product(error_sq, (Real)e, (Real)e);
            if constexpr (wanted & COUNTS) {
                with += q > b[i] ? sign[i] : 0;
                equals += q == b[i] ? equal[i] : 0;
            }
            if constexpr (reader != FLOAT32) {
                const float r = read_as<reader>(q), d_r = r - b[i], e_r = r - w[i];
                dot_r = add_product(dot_r, (Real)d, (Real)d_r);
                delta_r_sq = add_product(delta_r_sq, (Real)d_r, (Real)d_r);
                error_r_sq = add_product(error_r_sq, (Real)e_r, (Real)e_r);
                with_r += r > b[i] ? sign[i] : 0;
                equals_r += r == b[i] ? equal[i] : 0;
            }
        }
        sums.dot += dot;
        sums.delta_q_sq += delta_q_sq;
        sums.error_sq += error_sq;
        if constexpr (wanted & COUNTS) count_signs(with, equals, sums);
        if constexpr (reader != FLOAT32) {
            read.dot += dot_r;
            read.delta_q_sq += delta_r_sq;
            read.error_sq += error_r_sq;
            count_signs(with_r, equals_r, read);
        }
    }

    void count_signs(int32_t with, int32_t equals, Sums& sums) const {
        // preserved = (up and q > b) + (down and q < b); the second is down less those with q > b or q == b
        const int32_t up_lost = equals & 1023, down_lost = (equals >> 10) & 1023;
        sums.preserved += down + with - down_lost;
        sums.lost += up_lost + down_lost;
        sums.both_zero += equals >> 20;
    }
};

// What is summed over a group or chunk whatever the scale.
struct Fixed {
    int64_t n = 0, changed = 0;
    double delta_sq = 0;

    void add(const CountedPiece& piece) {
        n += piece.count;
        changed += piece.changed;
        delta_sq += piece.delta_sq;
    }
};

// One column of DeltaStats: counts [6, ...] n, n_changed, sign_equal, preserved, flipped, lost, and totals
// [4, ...] dot, delta_sq, delta_q_sq, error_sq, each field so many places after the one before.
DAQ_INLINE void write(const Fixed& fixed, const Sums& sums, int64_t* counts, double* totals, int64_t field) {
    counts[0 * field] = fixed.n;
    counts[1 * field] = fixed.changed;
    counts[2 * field] = sums.preserved + sums.both_zero;
    counts[3 * field] = sums.preserved;
    counts[4 * field] = fixed.changed - sums.preserved - sums.lost;
    counts[5 * field] = sums.lost;
    totals[0 * field] = sums.dot;
    totals[1 * field] = fixed.delta_sq;
    totals[2 * field] = sums.delta_q_sq;
    totals[3 * field] = sums.error_sq;
}

}  // namespace
