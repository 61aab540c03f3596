// The whole search of one group after the other, while it is in the cache: absmax scale, coarse candidates,
// fine candidates, the sums of the scale that wins (to one or two readers), and its codes. The same steps as
// ../../search/stages.py in the same float64, so both give the same bits; only the sums that the objective
// does not need are left out until the winner is known.
//
// Legend: G groups, K candidates of a stage.

#include "sums.h"

extern "C" {

struct Search {
    int64_t metric, scale_format;  // a Metric; 0 float32, 1 bfloat16, 2 ue8m0
    int64_t K, n_fine;             // candidates of the two stages
    double tau, alpha_min, alpha_max, radius;
    Array coarse, steps;           // float64: alpha, [K]; n_fine steps over [0, 1]
    int64_t reader;                // a Reader, whose sums are wanted as well; or FLOAT32, which asks for none
};

struct Found {
    Array scale;   // float32 [G]; NaN or infinity where the group holds one
    Array alpha;   // float64 [G]
    Array counts;  // int64 [6, S, G]: of the scale found, of absmax, of the scale found as the reader sees it
    Array totals;  // float64 [4, S, G]; S is 3, or 2 without a reader; see write()
    Array codes;   // uint8 [M, N]
};
}

namespace {

// Never below the smallest normal number; see round_scale in ../../quantize.py.
float round_scale(float scale, int64_t format) {
    scale = std::max(scale, 0x1p-126f);
    uint32_t bits = (uint32_t)bits_of(scale);
    if (format == 1) bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    if (format == 2) bits = (bits + 0x007fffffu) & 0xff800000u;
    return float_of((int32_t)bits);
}

constexpr Wanted wanted_by(Metric metric) { return metric == SIGN ? COUNTS : metric == MSE ? ERROR : DIRECTION; }

// What the objective makes of the sums of a group in which something changed; see ../../objectives.py.
template <Metric metric>
double score(const Fixed& fixed, const Sums& sums, double tau) {
    if (metric == SIGN) return (double)(sums.preserved + sums.both_zero) / (double)fixed.n;
    if (metric == MSE) return -(sums.error_sq / (double)fixed.n);
    if (metric == COSINE) {
        const double norms = std::sqrt(fixed.delta_sq * sums.delta_q_sq);
        return norms > 0 ? std::max(-1.0, std::min(1.0, sums.dot / norms)) : 0.0;
    }
    const double rho = sums.dot / fixed.delta_sq;
    return -((rho - 1) * (rho - 1) + tau * (sums.delta_q_sq / fixed.delta_sq - rho * rho));
}

// A group in the cache and the best of its candidates so far.
template <Metric metric>
struct Contest {
    const Search& search;
    const Grid grid;
    std::vector<CountedPiece> pieces;
    Fixed fixed;
    int64_t filled;
    float absmax;  // the absmax scale
    double alpha, best;

    Contest(const Search& s, const Grid& g, int64_t elements)
        : search(s), grid(g), pieces(ceil_div(elements, Piece::SIZE) + 2) {}

    // False if the group holds NaN or infinity.
    bool load(const Region& region, const Matrix& weight, const Matrix& base) {
        CountedPiece* piece = pieces.data();
        int32_t high = 0;
        fixed = Fixed();
        each(piece, region, weight, &base, [&] {
            high = std::max(high, piece->largest_bits());
            piece->prepare();
            fixed.add(*piece++);
        });
        filled = piece - pieces.data();
        absmax = high ? float_of(high) / grid.max : 1.0f;
        if (high >= EXPONENT) return false;
        if (high) absmax = round_scale(absmax, search.scale_format);
        return true;
    }

    float scale(double a) const { return round_scale((float)((double)absmax * a), search.scale_format); }

    template <Wanted wanted>
    Sums sums(float s) const {
        Sums total{};
        for (int64_t i = 0; i < filled; ++i) pieces[i].template add<wanted>(s, grid, total);
        return total;
    }

    void sums_read(float s, Sums& total, Sums& read) const {
        total = read = Sums{};
        for (int64_t i = 0; i < filled; ++i) pieces[i].add_read((Reader)search.reader, s, grid, total, read);
    }

    // Candidates against the incumbent: a strictly better score wins; of equal candidates the one nearest to
    // alpha 1, of two as near the larger.
    void stage(const double* alpha_K, int64_t K) {
        std::vector<Sums> sums_K(K, Sums{});
        std::vector<float> scale_K(K);
        for (int64_t k = 0; k < K; ++k) scale_K[k] = scale(alpha_K[k]);
        for (int64_t i = 0; i < filled; ++i)
            for (int64_t k = 0; k < K; ++k) pieces[i].template add<wanted_by(metric)>(scale_K[k], grid, sums_K[k]);
        int64_t winner = -1;
        double value = 0, distance = 0;
        for (int64_t k = 0; k < K; ++k) {
            const double v = score<metric>(fixed, sums_K[k], search.tau);
            const double far = std::fabs(alpha_K[k] - 1) + (alpha_K[k] < 1 ? 1e-9 : 0.0);
            if (winner < 0 || v > value || (v == value && far < distance)) winner = k, value = v, distance = far;
        }
        if (value > best) best = value, alpha = alpha_K[winner];
    }

    void run(const Sums& of_absmax) {
        alpha = 1;
        if (!fixed.changed) return;  // no evidence
        best = score<metric>(fixed, of_absmax, search.tau);
        stage((const double*)search.coarse.data, search.K);
        if (!search.n_fine) return;
        const double low = std::max(alpha - search.radius, search.alpha_min);
        const double high = std::max(std::min(alpha + search.radius, search.alpha_max), low);
        std::vector<double> fine(search.n_fine);
        for (int64_t k = 0; k < search.n_fine; ++k) fine[k] = low + (high - low) * ((const double*)search.steps.data)[k];
        stage(fine.data(), search.n_fine);
    }

    void write_codes(const Region& region, float s, int64_t N, uint8_t* codes) const {
        int64_t col = 0;
        uint8_t* row = codes + region.row * N + region.col;
        for (int64_t i = 0; i < filled; ++i)
            for (int64_t done = 0; done < pieces[i].count;) {
                const int64_t run = std::min(region.cols - col, pieces[i].count - done);
                encode(pieces[i].w + done, run, 1.0f / s, grid, row + col);
                done += run;
                col += run;
                if (col == region.cols) col = 0, row += N;
            }
    }
};

template <Metric metric>
void search_all(const Matrix& weight, const Matrix& base, const Cover& cover, const Grid& grid, const Search& search,
                int64_t threads, const Found& found) {
    const int64_t G = cover.groups(), sides = search.reader ? 3 : 2, field = sides * G;
    float* scale_G = (float*)found.scale.data;
    double *alpha_G = (double*)found.alpha.data, *totals = (double*)found.totals.data;
    int64_t* counts = (int64_t*)found.counts.data;
    parallel(G, threads, [&] {
        return [&, contest = Contest<metric>(search, grid, cover.cell_rows * cover.cell_cols)](int64_t g) mutable {
            const Region region = cover.cell(g);
            const bool finite = contest.load(region, weight, base);
            scale_G[g] = contest.absmax;
            alpha_G[g] = 1;
            if (!finite) {
                for (int64_t side = 0; side < sides; ++side)
                    write(Fixed(), Sums{}, counts + side * G + g, totals + side * G + g, field);
                return;
            }
            const Sums of_absmax = contest.template sums<ALL>(contest.scale(1));
            contest.run(of_absmax);
            const float scale = contest.scale(contest.alpha);
            Sums of_best = of_absmax, as_read;
            if (search.reader)
                contest.sums_read(scale, of_best, as_read);
            else if (contest.alpha != 1)
                of_best = contest.template sums<ALL>(scale);
            write(contest.fixed, of_best, counts + g, totals + g, field);
            write(contest.fixed, of_absmax, counts + G + g, totals + G + g, field);
            if (search.reader) write(contest.fixed, as_read, counts + 2 * G + g, totals + 2 * G + g, field);
            contest.write_codes(region, scale, cover.N, (uint8_t*)found.codes.data);
            scale_G[g] = scale;
            alpha_G[g] = contest.alpha;
        };
    });
}

}  // namespace

extern "C" {

// Cells must be small enough for a thread's cache; a group is searched by one thread.
const char* daq_search(Matrix weight, Matrix base, Plan plan, Format format, Search search, int64_t threads,
                       Found found) {
    Check check(plan, threads);
    check.format(format);
    const Grid grid(format);
    const Cover& cover = check.cover;
    const int64_t G = cover.groups(), K = search.K, most = Check::MOST, sides = search.reader ? 3 : 2;
    check.need(search.metric >= SIGN && search.metric <= HYBRID, "the metric");
    check.need(search.scale_format >= 0 && search.scale_format <= 2, "the scale format");
    check.need(search.reader >= FLOAT32 && search.reader <= FLOAT16, "the dtype of the reader");
    check.need(K >= 1 && K <= most && search.n_fine >= 0 && search.n_fine <= most, "the number of candidates");
    check.matrix(weight, "weight");
    check.matrix(base, "base");
    check.array<double>(search.coarse, K, "candidates");
    check.array<double>(search.steps, search.n_fine, "steps");
    check.array<float>(found.scale, G, "scales");
    check.array<double>(found.alpha, G, "alpha");
    check.array<int64_t>(found.counts, 6 * sides * G, "counts");
    check.array<double>(found.totals, 4 * sides * G, "totals");
    check.array<uint8_t>(found.codes, cover.M * cover.N, "codes");
    return check.then([&] {
        switch ((Metric)search.metric) {
            case SIGN: return search_all<SIGN>(weight, base, cover, grid, search, threads, found);
            case COSINE: return search_all<COSINE>(weight, base, cover, grid, search, threads, found);
            case MSE: return search_all<MSE>(weight, base, cover, grid, search, threads, found);
            case HYBRID: return search_all<HYBRID>(weight, base, cover, grid, search, threads, found);
        }
    });
}

}  // extern "C"
