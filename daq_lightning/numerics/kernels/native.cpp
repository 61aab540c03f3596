// The sums of all candidate scales on a CPU, and beside them absmax and codes: every weight is read from memory once,
// and all candidates are evaluated from the first-level cache.
//
//     x = clamp(w * (1 / s), -448, 448)       one float32 product, as in quantize.py
//     q = round(x) * s                        e4m3 grid: 8 steps per binade, even below 2^-6
//     d = w - b,  d_q = q - b,  e = q - w     float32; their products are summed in float32 over at most 1,008
//                                             elements and in float64 beyond
//
// Legend: M out, N in, G groups, C chunks of a group, K candidates.

#include "native.h"

namespace {

constexpr float SMALL = 0x1p-50f, LARGE = 0x1p50f;  // beyond, products are taken in float64

inline float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
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

    template <class Real>
    void add(float scale, Sums& sums) const {
        const float reciprocal = 1.0f / scale;
        Real dot = 0, delta_q_sq = 0, error_sq = 0;
        int32_t with = 0, equals = 0;
#pragma omp simd reduction(+ : dot, delta_q_sq, error_sq, with, equals)
        for (int64_t i = 0; i < count; ++i) {
            const float x = saturate(w[i] * reciprocal), m = float_of(magic(x)), q = ((x + m) - m) * scale;
            const float d = w[i] - b[i], d_q = q - b[i], e = q - w[i];
            if constexpr (sizeof(Real) == 4) {
                dot = add_product(dot, d, d_q);
                delta_q_sq = add_product(delta_q_sq, d_q, d_q);
                error_sq = add_product(error_sq, e, e);
            } else {
                dot += (Real)d * d_q;
                delta_q_sq += (Real)d_q * d_q;
                error_sq += (Real)e * e;
            }
            with += q > b[i] ? sign[i] : 0;
            equals += q == b[i] ? equal[i] : 0;
        }
        // preserved = (up and q > b) + (down and q < b); the second is down less those with q > b or q == b
        const int32_t up_lost = equals & 1023, down_lost = (equals >> 10) & 1023;
        sums.preserved += down + with - down_lost;
        sums.lost += up_lost + down_lost;
        sums.both_zero += equals >> 20;
        sums.dot += dot;
        sums.delta_q_sq += delta_q_sq;
        sums.error_sq += error_sq;
    }
};

}  // namespace

extern "C" {

// counts: int64 [6, G, C, K], n, n_changed, sign_equal, preserved, flipped, lost.
// totals: float64 [4, G, C, K], dot, delta_sq, delta_q_sq, error_sq.
void daq_delta_stats(Matrix weight, Matrix base, Plan plan, const float* scale_GK, int64_t K, int64_t threads,
                     int64_t* counts, double* totals) {
    const Cover cover(plan);
    const int64_t field = cover.items() * K;
    parallel(cover.items(), threads, [&] {
        return [&, piece = std::make_unique<CountedPiece>(), sums = std::vector<Sums>(K)](int64_t item) mutable {
            const Region region = cover.region(item);
            const float* scale_K = scale_GK + item / cover.chunks() * K;
            int64_t changed = 0;
            double delta_sq = 0;
            std::fill(sums.begin(), sums.end(), Sums{});
            piece->each(region, weight, &base, [&] {
                piece->prepare();
                changed += piece->changed;
                delta_sq += piece->delta_sq;
                for (int64_t k = 0; k < K; ++k)
                    piece->fits_float32(scale_K[k]) ? piece->add<float>(scale_K[k], sums[k])
                                                    : piece->add<double>(scale_K[k], sums[k]);
            });
            for (int64_t k = 0; k < K; ++k) {
                int64_t* count = counts + item * K + k;
                double* total = totals + item * K + k;
                count[0 * field] = region.rows * region.cols;
                count[1 * field] = changed;
                count[2 * field] = sums[k].preserved + sums[k].both_zero;
                count[3 * field] = sums[k].preserved;
                count[4 * field] = changed - sums[k].preserved - sums[k].lost;
                count[5 * field] = sums[k].lost;
                total[0 * field] = sums[k].dot;
                total[1 * field] = delta_sq;
                total[2 * field] = sums[k].delta_q_sq;
                total[3 * field] = sums[k].error_sq;
            }
        };
    });
}

// absmax: float32 [G, C]; NaN or infinity where a chunk holds one.
void daq_absmax(Matrix weight, Plan plan, int64_t threads, float* absmax) {
    const Cover cover(plan);
    parallel(cover.items(), threads, [&] {
        return [&, piece = std::make_unique<Piece>()](int64_t item) {
            int32_t high = 0;
            piece->each(cover.region(item), weight, nullptr, [&] {
                for (int64_t i = 0; i < piece->count; ++i) high = std::max(high, bits_of(piece->w[i]) & MAGNITUDE);
            });
            absmax[item] = float_of(high);
        };
    });
}

// codes: uint8 [M, N], e4m3.
void daq_quantize(Matrix weight, Plan plan, const float* scale_G, int64_t threads, uint8_t* codes) {
    const Cover cover(plan);
    parallel(cover.M, threads, [&] {
        return [&, piece = std::make_unique<Piece>()](int64_t row) {
            for (int64_t left = 0; left < cover.N; left += cover.cell_cols) {
                const int64_t group = row / cover.cell_rows * cover.grid_cols() + left / cover.cell_cols;
                const float reciprocal = 1.0f / scale_G[group];
                uint8_t* out = codes + row * cover.N + left;
                piece->each({row, left, 1, std::min(cover.cell_cols, cover.N - left)}, weight, nullptr, [&] {
                    for (int64_t i = 0; i < piece->count; ++i) {
                        const float x = saturate(piece->w[i] * reciprocal), size = float_of(bits_of(x) & MAGNITUDE);
                        const int32_t m = magic(x), steps = bits_of(size + float_of(m)) - m;  // of 2^(e - 3)
                        const int32_t below = ((m - TO_MAGIC) >> 20) - ((127 - 6) << 3);      // codes below the binade
                        out[i] = (uint8_t)((below + steps) | ((bits_of(x) >> 24) & 0x80));
                    }
                    out += piece->count;
                });
            }
        };
    });
}

}  // extern "C"
