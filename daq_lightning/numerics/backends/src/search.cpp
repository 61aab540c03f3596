// The whole search of one group after the other, while it is in the cache: absmax scale, coarse candidates,
// fine candidates, the sums of the scale that wins (to one or two readers), and its codes. The same steps as
// ../../search/stages.py in the same float64, so both give the same bits; only the sums that the objective
// does not need are left out until the winner is known.
//
// Legend: G groups, K candidates of a stage.

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
};

// Numbered as SCALE_FORMATS in ../../formats; the last two have a grid of their own.
enum ScaleFormat { PLAIN = 0, SHORT = 1, POWER = 2, EIGHT = 3 };

struct Found {
    Array scale;   // float32 [G]; NaN or infinity where the group holds one
    Array alpha;   // float64 [G]
    Array counts;  // int64 [6, S, G]: of the scale found, of absmax, of the scale found as the reader sees it
    Array totals;  // float64 [4, S, G]; S is 3, or 2 without a reader; see write()
    Array codes;   // uint8 [M, N]
    Array zero;    // int8 [G] of a format with zero points, else nothing
};
}

namespace {

constexpr int64_t RUN = 1 << 14;  // elements that a thread takes at a time, at least

// Never below the smallest normal number; see round_scale in ../../quantize.py.
float round_scale(float scale, const Search& search) {
    scale = std::max(scale, 0x1p-126f);
    uint32_t bits = (uint32_t)bits_of(scale);
    if (search.scale_format == SHORT) bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    if (search.scale_format == POWER) bits = (bits + 0x007fffffu) & 0xff800000u;
    if (search.scale_format == EIGHT) {
        const float global = (float)search.global_scale;
        return OF_E4M3.round(std::max(std::min(scale * global, 448.0f), 0x1p-9f)) / global;
    }
    return float_of((int32_t)bits);
}

// The value of a code of E4M3, and the code of one of its values.
double value_of(int64_t code) { return code < 8 ? (double)code * 0x1p-9 : (double)float_of((int32_t)(code + 960) << 20); }
int64_t code_of(float value) { return value < 0x1p-6f ? (int64_t)(value * 512) : (bits_of(value) >> 20) - 960; }

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
    std::vector<double> neighbours;  // and what a stage needs, kept for the next
    std::vector<Sums> sums_K;
    std::vector<float> scale_K;
    std::vector<int32_t> zero_K;
    std::vector<Grid> grid_K;
    Fixed fixed;
    int64_t filled;
    float absmax;  // the plain scale
    double alpha, best;
    const bool zero_points;
    float smallest, largest;  // of the group and 0
    int32_t zero;             // of the best

    Contest(const Search& s, const Grid& g, bool zero_points, int64_t elements)
        : search(s), grid(g), pieces(ceil_div(elements, Piece::SIZE) + 2), zero_points(zero_points) {}

    // False if the group holds NaN or infinity.
    bool load(const Region& region, const Matrix& weight, const Matrix& base) {
        CountedPiece* piece = pieces.data();
        int32_t high = 0;
        fixed = Fixed();
        smallest = largest = 0;
        each(piece, region, weight, &base, [&] {
            high = std::max(high, piece->largest_bits());
            if (zero_points) piece->extremes(smallest, largest);
            piece->prepare();
            fixed.add(*piece++);
        });
        filled = piece - pieces.data();
        absmax = high ? (zero_points ? largest - smallest : float_of(high)) / grid.reach : 1.0f / (float)search.global_scale;
        if (high >= EXPONENT) absmax = float_of(high);
        if (high >= EXPONENT || bits_of(absmax) >= EXPONENT) return false;
        if (high) absmax = round_scale(absmax, search);
        return true;
    }

    // Of the scale of an alpha; see zero_of in ../../quantize.py.
    int32_t zero_of(double a) const {
        if (!zero_points || smallest == largest) return 0;
        const float codes = std::nearbyint(-(float)((double)smallest * a) / scale(a)) + grid.low;
        return (int32_t)std::max(std::min(codes, grid.max), grid.low);
    }

    float scale(double a) const { return round_scale((float)((double)absmax * a), search); }

    template <Wanted wanted>
    Sums sums(float s, int32_t zero) const {
        Sums total{};
        const Grid less = grid.less(zero);
        for (int64_t i = 0; i < filled; ++i) pieces[i].template add<wanted>(s, less, total);
        return total;
    }

    void sums_read(float s, Sums& total, Sums& read) const {
        total = read = Sums{};
        for (int64_t i = 0; i < filled; ++i) pieces[i].add_read((Reader)search.reader, s, grid.less(zero), total, read);
    }

    // Candidates against the incumbent: a strictly better score wins; of equal candidates the one nearest to
    // alpha 1, of two as near the larger.
    void stage(const double* alpha_K, int64_t K) {
        zero_K.resize(K);
        for (int64_t k = 0; k < K; ++k) zero_K[k] = zero_of(alpha_K[k]);
        stage_with_zeros(alpha_K, K);
    }

    // The zero points beside that of the best alpha.
    void stage_of_zeros() {
        const double alpha_K[2] = {alpha, alpha};
        zero_K = {std::min(zero + 1, (int32_t)grid.max), std::max(zero - 1, (int32_t)grid.low)};
        stage_with_zeros(alpha_K, 2);
    }

    void stage_with_zeros(const double* alpha_K, int64_t K) {
        sums_K.assign(K, Sums{});
        scale_K.resize(K);
        grid_K.assign(K, grid);
        for (int64_t k = 0; k < K; ++k) scale_K[k] = scale(alpha_K[k]);
        for (int64_t k = 0; zero_points && k < K; ++k) grid_K[k] = grid.less(zero_K[k]);
        for (int64_t i = 0; i < filled; ++i)
            for (int64_t k = 0; k < K; ++k)
                pieces[i].template add<wanted_by(metric)>(scale_K[k], grid_K[k], sums_K[k]);
        int64_t winner = -1;
        double value = 0, distance = 0;
        for (int64_t k = 0; k < K; ++k) {
            const double v = score<metric>(fixed, sums_K[k], search.tau);
            const double far = std::fabs(alpha_K[k] - 1) + (alpha_K[k] < 1 ? 1e-9 : 0.0);
            if (winner < 0 || v > value || (v == value && far < distance)) winner = k, value = v, distance = far;
        }
        if (K && value > best) best = value, alpha = alpha_K[winner], zero = zero_K[winner];
    }

    // Over the scales that can be stored beside the plain one; see neighbours in ../../search/grid.py.
    void stage_of_neighbours() {
        neighbours.clear();
        const int64_t code = code_of(absmax * (float)search.global_scale);
        for (int64_t k = 0; k < search.K; ++k) {
            const double steps = ((const double*)search.coarse.data)[k];
            const int64_t other = code + (int64_t)steps;
            const bool power = search.scale_format == POWER, stored = power || (other >= 1 && other <= 126);
            const double a = power ? std::exp2(steps) : stored ? value_of(other) / value_of(code) : 1;
            if (stored && a >= search.alpha_min && a <= search.alpha_max) neighbours.push_back(a);
        }
        stage(neighbours.data(), (int64_t)neighbours.size());
    }

    void run(const Sums& of_absmax) {
        alpha = 1;
        zero = zero_of(1);
        if (!fixed.changed) return;  // no evidence
        best = score<metric>(fixed, of_absmax, search.tau);
        search.scale_format >= POWER ? stage_of_neighbours() : coarse_and_fine();
        if (zero_points) stage_of_zeros();
    }

    void coarse_and_fine() {
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
                encode(pieces[i].w + done, run, 1.0f / s, grid, row + col, zero);
                done += run;
                col += run;
                if (col == region.cols) col = 0, row += N;
            }
    }
};

template <Metric metric>
void search_all(const Matrix& weight, const Matrix& base, const Cover& cover, const Grid& grid, const Search& search,
                int64_t threads, const Found& found) {
    const int64_t G = cover.groups(), sides = search.reader ? 3 : 2;
    float* scale_G = (float*)found.scale.data;
    double *alpha_G = (double*)found.alpha.data, *totals = (double*)found.totals.data;
    int64_t* counts = (int64_t*)found.counts.data;
    // small groups go to a thread many at a time: what neighbours write shares cache lines, and fields lie so far
    // apart that they push each other out of the cache
    const int64_t elements = cover.cell_rows * cover.cell_cols, run = ceil_div(RUN, elements), part = sides * run;
    // side s of group i of a run: counts_P[s * run + i], and further fields `part` places on
    const auto search_group = [&](Contest<metric>& contest, int64_t g, int64_t* counts_P, double* totals_P) {
        const Region region = cover.cell(g);
        const bool finite = contest.load(region, weight, base);
        scale_G[g] = contest.absmax;
        alpha_G[g] = 1;
        const auto write_side = [&](int64_t side, const Fixed& fixed, const Sums& sums) {
            write(fixed, sums, counts_P + side * run, totals_P + side * run, part);
        };
        if (!finite) {
            for (int64_t side = 0; side < sides; ++side) write_side(side, Fixed(), Sums{});
            return;
        }
        const int32_t plain_zero = contest.zero_of(1);
        const Sums of_absmax = contest.template sums<ALL>(contest.scale(1), plain_zero);
        contest.run(of_absmax);
        const float scale = contest.scale(contest.alpha);
        Sums of_best = of_absmax, as_read;
        if (search.reader)
            contest.sums_read(scale, of_best, as_read);
        else if (contest.alpha != 1 || contest.zero != plain_zero)
            of_best = contest.template sums<ALL>(scale, contest.zero);
        write_side(0, contest.fixed, of_best);
        write_side(1, contest.fixed, of_absmax);
        if (search.reader) write_side(2, contest.fixed, as_read);
        contest.write_codes(region, scale, cover.N, (uint8_t*)found.codes.data);
        scale_G[g] = scale;
        alpha_G[g] = contest.alpha;
        if (found.zero.bytes) ((int8_t*)found.zero.data)[g] = (int8_t)contest.zero;
    };
    parallel(ceil_div(G, run), threads, [&] {
        return [&, contest = Contest<metric>(search, grid, found.zero.bytes > 0, elements), counts_P = std::vector<int64_t>(6 * part),
                totals_P = std::vector<double>(4 * part)](int64_t item) mutable {
            const int64_t first = item * run, count = std::min(run, G - first);
            for (int64_t i = 0; i < count; ++i)
                search_group(contest, first + i, counts_P.data() + i, totals_P.data() + i);
            for (int64_t side = 0; side < sides; ++side) {
                for (int64_t f = 0; f < 6; ++f)
                    std::memcpy(counts + (f * sides + side) * G + first, &counts_P[f * part + side * run], 8 * count);
                for (int64_t f = 0; f < 4; ++f)
                    std::memcpy(totals + (f * sides + side) * G + first, &totals_P[f * part + side * run], 8 * count);
            }
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
    check.need(search.scale_format >= PLAIN && search.scale_format <= EIGHT, "the scale format");
    check.need(search.global_scale >= 0x1p-119 && search.global_scale <= 0x1p117, "the global scale");
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
    if (found.zero.bytes) check.array<int8_t>(found.zero, G, "zero points");
    check.need(!found.zero.bytes || format.storage == INTEGER, "zero points of this format");
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
