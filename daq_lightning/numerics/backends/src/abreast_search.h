// The search of 16 small groups at once: the steps of a Contest in search.cpp, each group in a lane of its own.
//
// Legend: G groups, K candidates of a stage.

#pragma once

#include "abreast.h"
#include "search.h"

namespace {

template <Metric metric, int E>
struct AbreastContest {
    const Search& search;
    const Grid grid;
    Abreast<E> groups;
    AbreastSums sums;                          // of the candidate at hand
    alignas(64) float absmax[ABREAST];         // the plain scales
    alignas(64) double alpha[ABREAST], best[ABREAST];
    alignas(64) int32_t code[ABREAST];         // of the plain scale in E4M3
    alignas(64) double low[ABREAST], high[ABREAST];  // between which the fine candidates lie

    AbreastContest(const Search& s, const Grid& g) : search(s), grid(g) {}

    bool finite(int64_t l) const { return groups.high[l] < EXPONENT && bits_of(absmax[l]) < EXPONENT; }

    void load(const Cover& cover, int64_t first, const Matrix& weight, const Matrix& base) {
        groups.load(cover, first, weight, base);
        const float of_zeros = 1.0f / (float)search.global_scale;
        alignas(64) float plain[ABREAST];
        for (int64_t l = 0; l < ABREAST; ++l) plain[l] = float_of(groups.high[l]) / grid.reach;
        round_scales(plain);
        for (int64_t l = 0; l < ABREAST; ++l) {
            const int32_t bits = groups.high[l];
            absmax[l] = bits >= EXPONENT ? float_of(bits) : bits ? plain[l] : of_zeros;
        }
        if (search.scale_format == EIGHT)
            for (int64_t l = 0; l < ABREAST; ++l)
                code[l] = std::max(1, std::min((int32_t)code_of(absmax[l] * (float)search.global_scale), 126));
        for (int64_t l = 0; l < ABREAST; ++l) alpha[l] = 1;
    }

    void run(const AbreastSums& of_absmax) {
        for (int64_t l = 0; l < ABREAST; ++l) best[l] = score_of(of_absmax, l);
        if (search.scale_format >= POWER) {
            stage(search.K, [&](int64_t k, double* alpha_L) { neighbour(((const double*)search.coarse.data)[k], alpha_L); });
            return;
        }
        stage(search.K, [&](int64_t k, double* alpha_L) {
            std::fill(alpha_L, alpha_L + ABREAST, ((const double*)search.coarse.data)[k]);
        });
        for (int64_t l = 0; l < ABREAST; ++l) {
            low[l] = std::max(alpha[l] - search.radius, search.alpha_min);
            high[l] = std::max(std::min(alpha[l] + search.radius, search.alpha_max), low[l]);
        }
        stage(search.n_fine, [&](int64_t k, double* alpha_L) {
            const double step = ((const double*)search.steps.data)[k];
            for (int64_t l = 0; l < ABREAST; ++l) alpha_L[l] = low[l] + (high[l] - low[l]) * step;
        });
    }

    // The scales of the best so far.
    void scales(float* scale_L) const { scaled(alpha, scale_L); }

   private:
    double score_of(const AbreastSums& of, int64_t l) const {
        return score<metric>(Fixed{E, 0, groups.delta_sq[l]}, of.of(l), search.tau);
    }

    void scaled(const double* alpha_L, float* scale_L) const {
        for (int64_t l = 0; l < ABREAST; ++l) scale_L[l] = (float)((double)absmax[l] * alpha_L[l]);
        round_scales(scale_L);
    }

    void round_scales(float* scale_L) const {
        const float global = (float)search.global_scale;
        const auto round = [&](auto format) {
            for (int64_t l = 0; l < ABREAST; ++l) scale_L[l] = round_scale(scale_L[l], format.value, global);
        };
        switch ((ScaleFormat)search.scale_format) {
            case PLAIN: return round(std::integral_constant<int64_t, PLAIN>());
            case SHORT: return round(std::integral_constant<int64_t, SHORT>());
            case POWER: return round(std::integral_constant<int64_t, POWER>());
            case EIGHT: return round(std::integral_constant<int64_t, EIGHT>());
        }
    }

    // The scale so many steps from each plain one as a multiple of it; 1, which wins nothing, where none is stored.
    void neighbour(double steps, double* alpha_L) const {
        const double least = search.alpha_min, most = search.alpha_max;
        if (search.scale_format == POWER) {
            const double a = std::exp2(steps);
            std::fill(alpha_L, alpha_L + ABREAST, a >= least && a <= most ? a : 1);
            return;
        }
        const int32_t by = (int32_t)steps;
        for (int64_t l = 0; l < ABREAST; ++l) {
            const int32_t other = code[l] + by;
            const double a = value_of(std::max(1, std::min(other, 126))) / value_of(code[l]);
            alpha_L[l] = other >= 1 && other <= 126 && a >= least && a <= most ? a : 1;
        }
    }

    // As Contest::stage.
    template <class Candidate>
    void stage(int64_t K, const Candidate& candidate) {
        alignas(64) double alpha_L[ABREAST], found[ABREAST], value[ABREAST], distance[ABREAST];
        alignas(64) float scale_L[ABREAST];
        for (int64_t l = 0; l < ABREAST; ++l) found[l] = 1, value[l] = -HUGE_SCORE, distance[l] = HUGE_SCORE;
        for (int64_t k = 0; k < K; ++k) {
            candidate(k, alpha_L);
            scaled(alpha_L, scale_L);
            groups.template sums<wanted_by(metric)>(scale_L, grid, sums);
            for (int64_t l = 0; l < ABREAST; ++l) {
                const double v = score_of(sums, l);
                const double far = std::fabs(alpha_L[l] - 1) + (alpha_L[l] < 1 ? 1e-9 : 0.0);
                const bool better = (v > value[l]) | ((v == value[l]) & (far < distance[l]));
                value[l] = better ? v : value[l];
                distance[l] = better ? far : distance[l];
                found[l] = better ? alpha_L[l] : found[l];
            }
        }
        for (int64_t l = 0; l < ABREAST; ++l)
            if (groups.changed[l] && value[l] > best[l]) best[l] = value[l], alpha[l] = found[l];
    }

    static constexpr double HUGE_SCORE = 0x1p1023;
};

}  // namespace
