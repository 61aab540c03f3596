// The whole search of one group after the other, while it is in the cache: absmax scale, coarse candidates,
// fine candidates, the sums of the scale that wins (to one or two readers), and its codes. The same steps as
// ../../search/stages.py in the same float64, so both give the same bits; only the sums that the objective
// does not need are left out until the winner is known.
//
// Legend: G groups, K candidates of a stage.

#include <numeric>

#include "abreast_search.h"

namespace {

constexpr int64_t RUN = 1 << 14;  // elements that a thread takes at a time, at least

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
        if (high) absmax = round_scale(absmax, search.scale_format, (float)search.global_scale);
        return true;
    }

    // Of the scale of an alpha; see zero_of in ../../quantize.py.
    int32_t zero_of(double a) const {
        if (!zero_points || smallest == largest) return 0;
        const float codes = std::nearbyint(-(float)((double)smallest * a) / scale(a)) + grid.low;
        return (int32_t)std::max(std::min(codes, grid.max), grid.low);
    }

    float scale(double a) const { return round_scale((float)((double)absmax * a), search.scale_format, (float)search.global_scale); }

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
        const int32_t code = code_of(absmax * (float)search.global_scale);
        for (int64_t k = 0; k < search.K; ++k) {
            const double steps = ((const double*)search.coarse.data)[k];
            const int32_t other = code + (int32_t)steps;
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

// Where the sums of a run of groups lie: those of small groups go to a thread many at a time, since what neighbours
// write shares cache lines, and fields lie so far apart that they push each other out of the cache.
struct Written {
    const int64_t G, sides, run;
    const int64_t room = run + 24;  // of one field: for ABREAST more, and not a power of two
    const int64_t part = sides * room;
    std::vector<int64_t> counts_P;  // side s of group i of a run: counts_P[s * room + i], further fields `part` places on
    std::vector<double> totals_P;

    Written(int64_t G, int64_t sides, int64_t run)
        : G(G), sides(sides), run(run), counts_P(6 * part), totals_P(4 * part) {}

    void write_side(int64_t side, int64_t i, const Fixed& fixed, const Sums& sums) {
        write(fixed, sums, &counts_P[side * room + i], &totals_P[side * room + i], part);
    }

    template <int E>
    void write_sides(int64_t side, int64_t i, const Abreast<E>& groups, const AbreastSums& sums) {
        int64_t* counts = &counts_P[side * room + i];
        double* totals = &totals_P[side * room + i];
        for (int64_t l = 0; l < ABREAST; ++l)
            write(Fixed{groups.n[l], groups.changed[l], groups.delta_sq[l]}, sums.of(l), counts + l, totals + l, part);
    }

    void copy_to(const Found& found, int64_t first, int64_t pool) const {
        const int64_t count = std::min(run, G - first);
        for (int64_t side = 0; side < sides; ++side) {
            for (int64_t f = 0; f < 6; ++f)
                copy(&counts_P[f * part + side * room], count, pool, (int64_t*)found.counts.data + ((f * sides + side) * G + first) / pool);
            for (int64_t f = 0; f < 4; ++f)
                copy(&totals_P[f * part + side * room], count, pool, (double*)found.totals.data + ((f * sides + side) * G + first) / pool);
        }
    }

   private:
    template <class T>
    static void copy(const T* values, int64_t count, int64_t pool, T* out) {
        if (pool == 1) {
            std::memcpy(out, values, count * sizeof(T));
            return;
        }
        for (int64_t start = 0; start < count; start += pool) {
            T sums[8] = {}, total = 0;  // 8 sums beside each other, in one order on every processor
            for (int64_t i = 0; i < pool; ++i) sums[i % 8] += values[start + i];
            for (const T sum : sums) total += sum;
            *out++ = total;
        }
    }
};

template <Metric metric>
void search_one(Contest<metric>& contest, const Matrix& weight, const Matrix& base, const Cover& cover, int64_t g,
                int64_t i, Written& written, const Found& found) {
    const Search& search = contest.search;
    const Region region = cover.cell(g);
    const bool finite = contest.load(region, weight, base);
    ((float*)found.scale.data)[g] = contest.absmax;
    ((double*)found.alpha.data)[g] = 1;
    if (!finite) {
        for (int64_t side = 0; side < written.sides; ++side) written.write_side(side, i, Fixed(), Sums{});
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
    written.write_side(0, i, contest.fixed, of_best);
    written.write_side(1, i, contest.fixed, of_absmax);
    if (search.reader) written.write_side(2, i, contest.fixed, as_read);
    contest.write_codes(region, scale, cover.N, (uint8_t*)found.codes.data);
    ((float*)found.scale.data)[g] = scale;
    ((double*)found.alpha.data)[g] = contest.alpha;
    if (found.zero.bytes) ((int8_t*)found.zero.data)[g] = (int8_t)contest.zero;
}

// The groups from `first` on, which are the i-th and following of a run.
template <Metric metric, int E>
void search_abreast(AbreastContest<metric, E>& contest, const Matrix& weight, const Matrix& base, const Cover& cover,
                    int64_t first, int64_t i, Written& written, const Found& found) {
    AbreastSums of_absmax, of_best, as_read;
    alignas(64) float scale_L[ABREAST];
    Abreast<E>& groups = contest.groups;
    contest.load(cover, first, weight, base);
    contest.scales(scale_L);
    groups.template sums<ALL>(scale_L, contest.grid, of_absmax);
    contest.run(of_absmax);
    contest.scales(scale_L);
    if (contest.search.reader)
        groups.sums_read((Reader)contest.search.reader, scale_L, contest.grid, of_best, as_read);
    else
        groups.template sums<ALL>(scale_L, contest.grid, of_best);
    groups.write_codes(scale_L, contest.grid, cover.N, (uint8_t*)found.codes.data);
    for (int64_t l = 0; l < groups.count; ++l) {
        if (contest.finite(l)) continue;
        scale_L[l] = contest.absmax[l];
        contest.alpha[l] = 1;
        groups.clear(l);
        for (AbreastSums* sums : {&of_absmax, &of_best, &as_read}) sums->set(l, Sums{});
    }
    std::memcpy((float*)found.scale.data + first, scale_L, groups.count * sizeof(float));
    std::memcpy((double*)found.alpha.data + first, contest.alpha, groups.count * sizeof(double));
    written.write_sides(0, i, groups, of_best);
    written.write_sides(1, i, groups, of_absmax);
    if (contest.search.reader) written.write_sides(2, i, groups, as_read);
}

// search(contest, group, its number in the run, where results go) for one group, or `abreast` at once, after the other
template <class MakeContest, class SearchSome>
void search_runs(const Cover& cover, const Search& told, int64_t threads, const Found& found, int64_t abreast,
                 const MakeContest& make_contest, const SearchSome& search) {
    const int64_t G = cover.groups(), sides = told.reader ? 3 : 2, elements = cover.cell_rows * cover.cell_cols;
    const int64_t whole = told.pool / std::gcd(told.pool, abreast) * abreast;
    const int64_t run = ceil_div(ceil_div(RUN, elements), whole) * whole;
    parallel(ceil_div(G, run), threads, [&] {
        return [&, contest = make_contest(), written = Written(G, sides, run)](int64_t item) mutable {
            const int64_t first = item * run, count = std::min(run, G - first);
            for (int64_t i = 0; i < count; i += abreast) search(*contest, first + i, i, written);
            written.copy_to(found, first, told.pool);
        };
    });
}

template <Metric metric>
void search_all(const Matrix& weight, const Matrix& base, const Cover& cover, const Grid& grid, const Search& told,
                int64_t threads, const Found& found) {
    const auto abreast = [&](auto elements) {
        using Some = AbreastContest<metric, elements.value>;
        search_runs(cover, told, threads, found, ABREAST, [&] { return std::make_unique<Some>(told, grid); },
                    [&](Some& contest, int64_t g, int64_t i, Written& written) {
                        search_abreast(contest, weight, base, cover, g, i, written, found);
                    });
    };
    if (!found.zero.bytes && rows_of(16, cover)) return abreast(std::integral_constant<int, 16>());
    if (!found.zero.bytes && rows_of(32, cover)) return abreast(std::integral_constant<int, 32>());
    using One = Contest<metric>;
    const int64_t elements = cover.cell_rows * cover.cell_cols;
    search_runs(cover, told, threads, found, 1, [&] { return std::make_unique<One>(told, grid, found.zero.bytes > 0, elements); },
                [&](One& contest, int64_t g, int64_t i, Written& written) {
                    search_one(contest, weight, base, cover, g, i, written, found);
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
    const bool pools = search.pool >= 1 && search.pool <= G && G % search.pool == 0;
    check.need(pools, "the groups whose sums are added up");
    check.array<int64_t>(found.counts, pools ? 6 * sides * (G / search.pool) : 0, "counts");
    check.array<double>(found.totals, pools ? 4 * sides * (G / search.pool) : 0, "totals");
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
