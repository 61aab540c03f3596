// The best scale of every group among ALL scales of [1, 2) x absmax, for bfloat16 weights; see ../exact.py for the
// mathematics and for a readable form of the same search.
//
// A group is reduced to n and sum(delta) per distinct magnitude |w| = (m / 128) * 2^(l + b), m = 128 ... 255, where 2^b
// is the binade of the absmax scale. As the scale grows by a factor of two every |w| / scale falls by one binade and
// passes 8 midpoints between codes. Where it passes them depends on m alone, so one table of 2,048 events, sorted once,
// serves every group: per event two or three additions keep
//
//     A = sum n c^2,   C = sum n c |w|,   P = sum c delta         c = code
//
// and between two events the objective is a smooth function of the scale with at most one maximum.
// Units: everything is divided by 2^b.

#include "native.h"

namespace {

constexpr int LOWEST = -10, HIGHEST = 9, LEVELS = HIGHEST - LOWEST + 1, M = 128;  // below LOWEST codes are 0

struct Event {
    double sigma;      // the scale, in [1, 2)
    int m;             // index of the mantissa, m - 128
    int level;         // of the only element class concerned (even part of the grid); NORMAL: all levels at once
    int octaves;       // binade of the code's midpoint = l - octaves
    double dA, dC, dP;  // changes per unit of weight
};
constexpr int NORMAL = 99;

std::vector<Event> make_events() {
    std::vector<Event> events;
    for (int m = 0; m < M; ++m) {
        const double mantissa = 1 + m / 128.0;
        auto add = [&](double midpoint, bool normal, int binade, double step) {  // midpoint in [1, 2)
            double sigma = mantissa / midpoint;
            const int octaves = sigma < 1 ? 1 : 0;
            sigma *= 1 << octaves;
            const double shrink = normal ? std::ldexp(1, -octaves) : std::ldexp(1, binade);
            const int level = normal ? NORMAL : binade + octaves;
            const double value = normal ? mantissa : std::ldexp(mantissa, level);
            events.push_back({sigma, m, level, octaves, -2 * step * midpoint * shrink * shrink, -step * shrink * value,
                              -step * shrink});
        };
        for (int odd = 17; odd < 32; odd += 2) add(odd / 16.0, true, 0, 1 / 8.0);
        for (int odd = 1; odd < 16; odd += 2) {  // odd * 2^-10
            const int bits = std::ilogb(odd);
            add(std::ldexp(odd, -bits), false, bits - 10, std::ldexp(1, 1 - bits));
        }
    }
    std::stable_sort(events.begin(), events.end(), [](const Event& a, const Event& b) { return a.sigma < b.sigma; });
    return events;
}

struct Best {
    double value = -1e300, scale = 1, low = 1, high = 1;
    void offer(double v, double s, double from, double to) {
        if (v > value) value = v, scale = s, low = from, high = to;
    }
    // Well inside its interval, where float32 codes are the promised ones.
    double safe_scale() const {
        const double hair = 0x1p-22, from = low * (1 + hair), to = high * (1 - hair);
        return from < to ? std::max(from, std::min(scale, to)) : (low + high) / 2;
    }
};

// The objective as a function of the scale, for given A, C and P.
struct Objective {
    Metric metric;
    double tau, n, w_sq, delta_w, delta_sq, per_delta_sq;  // the last is 1 / delta_sq

    // cosine: cos * |cos| * delta_sq;   mse: -error_sq;   hybrid: itself
    double at(double s, double A, double C, double P) const {
        const double error_sq = s * (s * A - 2 * C) + w_sq, shift = s * P - delta_w;  // shift = dot - delta_sq
        if (metric == MSE) return -error_sq;
        const double dot = shift + delta_sq, delta_q_sq = error_sq + 2 * shift + delta_sq;
        if (metric == COSINE) return delta_q_sq > 0 ? dot * std::fabs(dot) / delta_q_sq : 0;
        const double rho = dot * per_delta_sq;
        return -((rho - 1) * (rho - 1) + tau * (delta_q_sq * per_delta_sq - rho * rho));
    }

    void best_within(double low, double high, double A, double C, double P, Best& best) const {
        double above, below;  // the stationary point is above / below
        if (metric == MSE) {
            above = C, below = A;
        } else if (metric == HYBRID) {
            const double start = 1 - delta_w * per_delta_sq, slope = P * per_delta_sq;  // rho = start + slope * s
            above = slope * (1 - start) + tau * (start * slope - (P - C) * per_delta_sq);
            below = slope * slope * (1 - tau) + tau * A * per_delta_sq;
        } else {
            const double dot = delta_sq - delta_w, B = P - C, b_sq = w_sq - 2 * delta_w + delta_sq;
            above = dot * B - P * b_sq;
            below = P * B - dot * A;
            const double dot_there = P * above + dot * below;  // times below
            if (below == 0 || (dot_there > 0) != (below > 0)) {  // none, or a minimum: the best is at an end
                best.offer(at(low, A, C, P), low, low, high);
                best.offer(at(high, A, C, P), high, low, high);
                return;
            }
        }
        if (below < 0) above = -above, below = -below;
        // no branch on where it lies, which no processor could predict
        const double s = below > 0 ? std::min(std::max(above / below, low), high) : above > 0 ? high : low;
        best.offer(at(s, A, C, P), s, low, high);
    }

    double score(double value, double unit) const {
        if (metric == MSE) return value / n * unit * unit;
        if (metric == HYBRID) return value;
        return std::copysign(std::sqrt(std::fabs(value) / delta_sq), value);
    }
};

struct Bin {
    double n, delta;
};

// The code of value / scale in float32, as everywhere.
double code_of(double value, double scale) {
    const float x = saturate((float)value * (1.0f / (float)scale)), m = float_of(magic(x));
    return (x + m) - m;
}

// The code under a scale that is larger by a hair: ties round down.
double code_above(double value, double scale) {
    const double x = value / scale, step = std::ldexp(1, std::max(std::ilogb(x), -6) - 3);
    return std::ceil(x / step - 0.5) * step;
}

struct Tables {
    std::vector<Event> events = make_events();
    double mantissa[M], code[M][M];  // code_of(mantissa[m], mantissa[j]) at [j][m]

    Tables() {
        for (int m = 0; m < M; ++m) mantissa[m] = 1 + m / 128.0;
        for (int j = 0; j < M; ++j)
            for (int m = 0; m < M; ++m) code[j][m] = code_of(mantissa[m], mantissa[j]);
    }
};

struct Group {
    const Tables& tables;
    Bin bins[LEVELS][M];
    // by how many octaves the code's binade lies below the element's: sums over the levels whose codes are normal
    double n_normal[3][M], delta_normal[3][M];
    struct Low {
        int m, level;
        double value, n, delta;
    };
    std::vector<Low> lows;  // classes whose codes are subnormal under some scale
    Objective objective;
    bool changed;

    explicit Group(const Tables& t) : tables(t) {}

    void clear() {
        std::memset(bins, 0, sizeof bins);
        lows.clear();
        objective.n = objective.w_sq = objective.delta_w = objective.delta_sq = 0;
        changed = false;
    }

    void add(const Piece& piece, int32_t binade) {
        const int32_t first = (binade + LOWEST + 127) << 7;
        const float unit = std::ldexp(1.0f, -binade);
        double w_sq = 0, delta_w = 0, delta_sq = 0;
        int32_t n_changed = 0;
#pragma omp simd reduction(+ : w_sq, delta_w, delta_sq, n_changed)
        for (int64_t i = 0; i < piece.count; ++i) {
            const double w = piece.w[i] * unit, d = (piece.w[i] - piece.b[i]) * unit;
            w_sq += w * w;
            delta_w += d * w;
            delta_sq += d * d;
            n_changed += piece.w[i] != piece.b[i];
        }
        for (int64_t i = 0; i < piece.count; ++i) {
            const int32_t bits = bits_of(piece.w[i]), bin = ((bits & MAGNITUDE) >> 16) - first;
            if (bin < 0) continue;
            const float d = (piece.w[i] - piece.b[i]) * unit;
            bins[0][bin].n += 1;
            bins[0][bin].delta += float_of(bits_of(d) ^ (bits & ~MAGNITUDE));  // -w and w have opposite codes
        }
        objective.n += piece.count;
        objective.w_sq += w_sq;
        objective.delta_w += delta_w;
        objective.delta_sq += delta_sq;
        changed |= n_changed > 0;
    }

    void sum_levels() {
        std::memset(n_normal, 0, sizeof n_normal);
        std::memset(delta_normal, 0, sizeof delta_normal);
        for (int l = LOWEST; l <= HIGHEST; ++l) {
            const double two = std::ldexp(1, l);
            for (int octaves = 0; octaves < std::min(3, l + 7); ++octaves)
                for (int m = 0; m < M; ++m) {
                    n_normal[octaves][m] += bins[l - LOWEST][m].n * two * two;
                    delta_normal[octaves][m] += bins[l - LOWEST][m].delta * two;
                }
            for (int m = 0; l < -4 && m < M; ++m) {
                const Bin& bin = bins[l - LOWEST][m];
                if (bin.n) lows.push_back({m, l, tables.mantissa[m] * two, bin.n, bin.delta});
            }
        }
    }

    // A, C and P under mantissa * 2^shift. code_M: of mantissa[m] under the scale's mantissa; code: of anything.
    template <class Code>
    void sums_at(double scale_mantissa, int shift, const double* code_M, const Code& code, double& A, double& C,
                 double& P) const {
        double a = 0, c = 0, p = 0;
        const double half = shift ? 0.5 : 1;
        const int turn = (int)std::ceil((scale_mantissa - 1) * M);  // from here on mantissas reach the scale's
        for (int upper = 0; upper < 2; ++upper) {
            const double *n_M = n_normal[1 - upper + shift], *delta_M = delta_normal[1 - upper + shift];
#pragma omp simd reduction(+ : a, c, p)
            for (int m = upper ? turn : 0; m < (upper ? M : turn); ++m) {
                const double k = code_M[m] * half;
                a += k * k * n_M[m];
                c += k * tables.mantissa[m] * n_M[m];
                p += k * delta_M[m];
            }
        }
        for (const Low& low : lows) {
            if (low.level - (low.m < turn) - shift >= -6) continue;
            const double k = code(low.value, scale_mantissa * (1 + shift));
            a += k * k * low.n;
            c += k * low.value * low.n;
            p += k * low.delta;
        }
        A = a, C = c, P = p;
    }

    // Between the events.
    void sweep(double start, Best& best) const {
        double A, C, P, low = start;
        double code_M[M];
        for (int m = 0; m < M; ++m) code_M[m] = code_above(tables.mantissa[m], start);
        sums_at(start, 0, code_M, code_above, A, C, P);
        const std::vector<Event>& events = tables.events;
        const size_t first = std::upper_bound(events.begin(), events.end(), start,
                                              [](double s, const Event& e) { return s < e.sigma; }) - events.begin();
        for (int octave = 0; octave < 2; ++octave) {
            const double two = 1 << octave;
            for (size_t i = octave ? 0 : first; i < (octave ? first : events.size()); ++i) {
                const Event& event = events[i];
                const bool normal = event.level == NORMAL;
                const int level = event.level + octave - LOWEST;
                const int octaves = event.octaves + octave;
                const double count = normal ? n_normal[octaves][event.m] : bins[level][event.m].n;
                if (count == 0) continue;
                const double sum = normal ? delta_normal[octaves][event.m] : bins[level][event.m].delta;
                const double high = event.sigma * two;
                if (high > low) objective.best_within(low, high, A, C, P, best);
                low = high;
                A += event.dA * count * (normal ? 1 / (two * two) : 1);
                C += event.dC * count * (normal ? 1 / two : two);
                P += event.dP * sum * (normal ? 1 / two : 1);
            }
        }
        if (2 * start > low) objective.best_within(low, 2 * start, A, C, P, best);
    }

    // Scales with 8 significant bits: all there are in bfloat16, else those that are exact ties between codes.
    void points(double start, bool all, Best& best) const {
        bool wanted[M];
        for (int j = 0; j < M; ++j) wanted[j] = all || j % 16 == 0;  // m / odd with odd = 17 ... 31 is j / 8
        for (const Low& low : lows)
            for (int odd = 1; odd < 16; odd += 2)
                if ((M + low.m) % odd == 0) {
                    const int quotient = (M + low.m) / odd;
                    wanted[(quotient << (7 - std::ilogb(quotient))) - M] = true;
                }
        for (int j = 0; j < 2 * M; ++j) {
            if (!wanted[j % M]) continue;
            const int shift = j >= M;
            const double mantissa = 1 + j % M / 128.0, scale = std::ldexp(mantissa, shift);
            if (scale < start || scale > 2 * start) continue;
            double A, C, P;
            sums_at(mantissa, shift, tables.code[j % M], code_of, A, C, P);
            best.offer(objective.at(scale, A, C, P), scale, scale, scale);
        }
    }
};

}  // namespace

extern "C" {

// best: float32 [G], the scale. promise: float64 [G], its score. A group without evidence keeps scale_G and scores NaN.
const char* daq_exact(Matrix weight, Matrix base, Plan plan, Array scales, int64_t metric, double tau, int64_t points_only,
                      int64_t threads, Array best_scales, Array promises) {
    Check check(plan, threads);
    const Cover& cover = check.cover;
    check.need(metric == COSINE || metric == MSE || metric == HYBRID, "the metric");
    check.matrix(weight, "weight");
    check.matrix(base, "base");
    check.array<float>(scales, cover.groups(), "scales");
    check.array<float>(best_scales, cover.groups(), "best scales");
    check.array<double>(promises, cover.groups(), "promises");
    return check.then([&] {
        const float* scale_G = (const float*)scales.data;
        float* best_G = (float*)best_scales.data;
        double* promise_G = (double*)promises.data;
        static const Tables tables;
        parallel(cover.groups(), threads, [&] {
            return [&, buffer = std::make_unique<Piece>(), group = std::make_unique<Group>(tables)](int64_t g) {
                Piece* piece = buffer.get();
                const int32_t binade = std::ilogb(scale_G[g]);
                best_G[g] = scale_G[g];
                promise_G[g] = std::nan("");
                if (binade < -110 || binade > 110) return;
                group->clear();
                group->objective.metric = (Metric)metric;
                group->objective.tau = tau;
                each(piece, cover.cell(g), weight, &base, [&] { group->add(*piece, binade); });
                if (!group->changed) return;
                group->objective.per_delta_sq = 1 / group->objective.delta_sq;
                group->sum_levels();
                const double start = std::ldexp((double)scale_G[g], -binade);
                Best best;
                group->points(start, points_only, best);
                if (!points_only) group->sweep(start, best);
                best_G[g] = std::ldexp((float)best.safe_scale(), binade);
                promise_G[g] = group->objective.score(best.value, std::ldexp(1, binade));
            };
        });
    });
}

}  // extern "C"
