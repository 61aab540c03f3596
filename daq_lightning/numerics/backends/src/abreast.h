// Small groups, 16 abreast: lane l of every vector belongs to group l, so that nothing is added up across lanes,
// and each group has a scale of its own.
//
// A float32 sum over a group is taken in the order in which sums.h takes it in vectors of WIDTH elements: first the
// elements i, i + WIDTH, i + 2 WIDTH and so on, then one such sum after the other. All sums of such a group come from
// here, except those in float64.
//
// Legend: G groups, E elements of a group.

#pragma once

#include "sums.h"

namespace {

constexpr int64_t ABREAST = 16;

// The elements of a vector: of the sums of a candidate, and of the squares of the update.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, SQUARES_WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8, SQUARES_WIDTH = 8;
#else
constexpr int WIDTH = 1, SQUARES_WIDTH = 4;
#endif

// Whether the groups of a weight are rows of so many elements, all of them whole.
inline bool rows_of(int64_t elements, const Cover& cover) {
    return cover.cell_rows == 1 && cover.cell_cols == elements && cover.N % elements == 0;
}

// The sums of one candidate of each group, or of one element of one group.
struct alignas(64) AbreastSums {
    double dot[ABREAST], delta_q_sq[ABREAST], error_sq[ABREAST];
    int32_t preserved[ABREAST], lost[ABREAST], both_zero[ABREAST];

    Sums of(int64_t l) const { return {preserved[l], lost[l], both_zero[l], dot[l], delta_q_sq[l], error_sq[l]}; }

    void set(int64_t l, const Sums& sums) {
        preserved[l] = (int32_t)sums.preserved, lost[l] = (int32_t)sums.lost, both_zero[l] = (int32_t)sums.both_zero;
        dot[l] = sums.dot, delta_q_sq[l] = sums.delta_q_sq, error_sq[l] = sums.error_sq;
    }
};

struct Part {  // of the sums of one group, as one reader sees it
    float dot, delta_q_sq, error_sq;
    int32_t preserved, lost, both_zero;

    void add(const Part& other) {
        dot += other.dot, delta_q_sq += other.delta_q_sq, error_sq += other.error_sq;
        preserved += other.preserved, lost += other.lost, both_zero += other.both_zero;
    }
};

struct Parts {
    Part plain, read;
};

template <int E>
struct alignas(64) Abreast {
    float w[E][ABREAST], b[E][ABREAST], rows[ABREAST][E];  // rows: the weight once more, group by group
    float largest[ABREAST], smallest_delta[ABREAST];       // magnitudes, as of a CountedPiece
    int32_t high[ABREAST];                                 // bits of the largest |w|
    int32_t n[ABREAST], changed[ABREAST];
    double delta_sq[ABREAST];
    int64_t row, col, count;  // where the first group begins; and how many there are, others are zeros
    std::unique_ptr<CountedPiece> piece = std::make_unique<CountedPiece>();

    void load(const Cover& cover, int64_t first, const Matrix& weight, const Matrix& base) {
        alignas(64) float base_rows[ABREAST][E];
        count = std::min(ABREAST, cover.groups() - first);
        row = first / cover.grid_cols(), col = first % cover.grid_cols() * E;
        int64_t i = row, j = col;
        for (int64_t l = 0; l < count; ++l) {
            read(weight, i, j, E, rows[l]);
            read(base, i, j, E, base_rows[l]);
            j += E;
            if (j == cover.N) j = 0, ++i;
        }
        for (int64_t l = count; l < ABREAST; ++l)
            for (int e = 0; e < E; ++e) rows[l][e] = base_rows[l][e] = 0;
        for (int e = 0; e < E; ++e)
            for (int64_t l = 0; l < ABREAST; ++l) w[e][l] = rows[l][e], b[e][l] = base_rows[l][e];
        prepare();
    }

    void prepare() {
        alignas(64) int32_t most[ABREAST] = {}, least[ABREAST];
        alignas(64) float squares[ABREAST] = {};
        for (int64_t l = 0; l < ABREAST; ++l) n[l] = E, changed[l] = high[l] = 0, least[l] = EXPONENT;
        for (int e = 0; e < E; ++e) {
#pragma omp simd
            for (int64_t l = 0; l < ABREAST; ++l) {
                const int32_t size = bits_of(w[e][l] - b[e][l]) & MAGNITUDE, size_w = bits_of(w[e][l]) & MAGNITUDE;
                changed[l] += (w[e][l] > b[e][l]) | (w[e][l] < b[e][l]);
                least[l] = std::min(least[l], size ? size : EXPONENT);
                most[l] = std::max(most[l], size);
                high[l] = std::max(high[l], size_w);
            }
        }
        for (int i = 0; i < SQUARES_WIDTH; ++i) {
            alignas(64) float lane[ABREAST];
            for (int e = i; e < E; e += SQUARES_WIDTH) {
#pragma omp simd
                for (int64_t l = 0; l < ABREAST; ++l) {
                    const float d = w[e][l] - b[e][l];
                    lane[l] = e == i ? d * d : add_product(lane[l], d, d);
                }
            }
            for (int64_t l = 0; l < ABREAST; ++l) squares[l] += lane[l];
        }
        for (int64_t l = 0; l < ABREAST; ++l) {
            largest[l] = float_of(std::max(most[l], high[l]));
            smallest_delta[l] = float_of(least[l]);
            delta_sq[l] = squares[l];
        }
        for (int64_t l = 0; l < count; ++l)
            if (!fits_float32(l, 1.0f)) delta_sq[l] = alone(l).delta_sq;
    }

    bool fits_float32(int64_t l, float scale) const {
        return smallest_delta[l] > SMALL && largest[l] < LARGE && scale > SMALL && scale < LARGE;
    }

    // Of a group that is not finite.
    void clear(int64_t l) { n[l] = changed[l] = 0, delta_sq[l] = 0; }

    // The sums of one candidate of each group, or those among them that an objective needs.
    template <Wanted wanted>
    void sums(const float* scale_L, const Grid& grid, AbreastSums& sums) {
        sums_in<wanted, FLOAT32>(scale_L, grid, sums, sums);
    }

    // All sums of one candidate of each group, and those that a reader in 16 bit sees.
    void sums_read(Reader reader, const float* scale_L, const Grid& grid, AbreastSums& sums, AbreastSums& read) {
        reader == BFLOAT16 ? sums_in<ALL, BFLOAT16>(scale_L, grid, sums, read)
                           : sums_in<ALL, FLOAT16>(scale_L, grid, sums, read);
    }

    void write_codes(const float* scale_L, const Grid& grid, int64_t N, uint8_t* codes) const {
        codes += row * N + col;  // groups that follow each other lie side by side
        for (int64_t l = 0; l < count; ++l) encode(rows[l], E, 1.0f / scale_L[l], grid, codes + l * E);
    }

   private:
    static constexpr int STEPS = WIDTH == 1 ? E : WIDTH;  // sum after sum; of one element each where WIDTH is 1

    // One group in a piece of its own.
    const CountedPiece& alone(int64_t l) {
        piece->count = E;
        for (int e = 0; e < E; ++e) piece->w[e] = w[e][l], piece->b[e] = b[e][l];
        piece->prepare();
        return *piece;
    }

    template <Wanted wanted, Reader reader>
    __attribute__((noinline)) void sums_in(const float* scale_L, const Grid grid, AbreastSums& sums, AbreastSums& read) {
        alignas(64) float dot[ABREAST], delta_q_sq[ABREAST], error_sq[ABREAST];
        alignas(64) float dot_r[ABREAST], delta_r_sq[ABREAST], error_r_sq[ABREAST];
#pragma omp simd
        for (int64_t l = 0; l < ABREAST; ++l) {
            const Parts found = parts<wanted, reader>(l, scale_L[l], grid);
            dot[l] = found.plain.dot, delta_q_sq[l] = found.plain.delta_q_sq, error_sq[l] = found.plain.error_sq;
            if constexpr (wanted & COUNTS) {
                sums.preserved[l] = found.plain.preserved;
                sums.lost[l] = found.plain.lost;
                sums.both_zero[l] = found.plain.both_zero;
            }
            if constexpr (reader != FLOAT32) {
                dot_r[l] = found.read.dot, delta_r_sq[l] = found.read.delta_q_sq, error_r_sq[l] = found.read.error_sq;
                read.preserved[l] = found.read.preserved;
                read.lost[l] = found.read.lost;
                read.both_zero[l] = found.read.both_zero;
            }
        }
        bool fits = true;
        for (int64_t l = 0; l < ABREAST; ++l) {
            if constexpr (wanted & DIRECTION) sums.dot[l] = dot[l], sums.delta_q_sq[l] = delta_q_sq[l];
            if constexpr (wanted & ERROR) sums.error_sq[l] = error_sq[l];
            if constexpr (reader != FLOAT32)
                read.dot[l] = dot_r[l], read.delta_q_sq[l] = delta_r_sq[l], read.error_sq[l] = error_r_sq[l];
            fits &= fits_float32(l, scale_L[l]);
        }
        for (int64_t l = 0; !fits && l < count; ++l) {
            if (fits_float32(l, scale_L[l])) continue;
            Sums plain{}, as_read{};
            alone(l).template add_both<wanted, reader>(scale_L[l], grid, plain, reader == FLOAT32 ? plain : as_read);
            sums.set(l, plain);
            if constexpr (reader != FLOAT32) read.set(l, as_read);
        }
    }

    template <Wanted wanted, Reader reader>
    DAQ_INLINE Parts parts(int64_t l, float scale, const Grid& grid) const {
        const float reciprocal = 1.0f / scale;
        Parts sum{};
        for (int i = 0; i < STEPS; ++i) {
            Parts lane{};
            add<wanted, reader, 0>(i, l, scale, reciprocal, grid, lane);
            sum.plain.add(lane.plain);
            sum.read.add(lane.read);
        }
        return sum;
    }

    // The elements i, i + STEPS and so on, from the turn-th of them.
    template <Wanted wanted, Reader reader, int turn>
    DAQ_INLINE void add(int i, int64_t l, float scale, float reciprocal, const Grid& grid, Parts& sum) const {
        const int e = i + turn * STEPS;
        const float q = grid.round(grid.saturate(w[e][l] * reciprocal)) * scale;
        add_seen<wanted, turn == 0>(w[e][l], b[e][l], q, sum.plain);
        if constexpr (reader != FLOAT32) add_seen<ALL, turn == 0>(w[e][l], b[e][l], read_as<reader>(q), sum.read);
        if constexpr ((turn + 1) * STEPS < E) add<wanted, reader, turn + 1>(i, l, scale, reciprocal, grid, sum);
    }

    template <Wanted wanted, bool first>
    static DAQ_INLINE void add_seen(float w, float b, float q, Part& sum) {
        const float d = w - b, d_q = q - b, e = q - w;
        if constexpr (wanted & DIRECTION) {
            sum.dot = first ? d * d_q : add_product(sum.dot, d, d_q);
            sum.delta_q_sq = first ? d_q * d_q : add_product(sum.delta_q_sq, d_q, d_q);
        }
        if constexpr (wanted & ERROR) sum.error_sq = first ? e * e : add_product(sum.error_sq, e, e);
        if constexpr (wanted & COUNTS) {
            const int32_t up = w > b, down = w < b, equal = q == b;
            sum.preserved += (up & (q > b)) | (down & (q < b));
            sum.lost += (up | down) & equal;
            sum.both_zero += (1 ^ (up | down)) & equal;
        }
    }
};

}  // namespace
