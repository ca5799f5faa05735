// Pixels side by side in vectors, tile by tile: of every token that the prompts have among them one
// score and one exponential, then each prompt's softmax as a quotient of sums. Nothing as large as
// the attention matrix is stored.
#include "concept_map.h"

#include <algorithm>
#include <vector>

#include <omp.h>

#if defined(__SSE__)
#    include <xmmintrin.h>
#endif

#include "cpu_clones.h"

namespace biasmap {
namespace {

// Sixteen floats: one register of AVX-512, two of AVX2.
using Lanes = float __attribute__((vector_size(64), may_alias));
constexpr int64_t kLanes = 16, kTile = 64, kVectors = kTile / kLanes;
// Tokens in one inner loop: with more, their sums do not fit AVX2's registers.
constexpr int64_t kTokens = 6;
// Below this many products, starting threads costs more than it saves.
constexpr int64_t kParallelProducts = 1 << 18;
// Smallest sum of exponentials that is divided by: its largest terms are then far above the
// smallest of `exp_minus`, and those that are not do not count beside them.
constexpr float kSmall = 0x1p-60f;

// One number of every pixel of a tile.
struct alignas(64) Row {
    union {
        float at[kTile];
        Lanes lanes[kVectors];
    };
};

struct Term {
    int64_t token;
    float weight;
};
// A weighted sum over tokens, without those of no weight.
using Sum = std::vector<Term>;

std::vector<Sum> sums_of(const float *weights, int64_t rows, int64_t tokens) {
    std::vector<Sum> found(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t t = 0; t < tokens; ++t)
            if (const float weight = weights[row * tokens + t]; weight != 0.0f)
                found[static_cast<size_t>(row)].push_back({t, weight});
    return found;
}

// The queries of `count` pixels, all heads: one row for each of a head's d columns. In a last tile
// that is not full, the last pixel is repeated. Pixels in the outer loops: what lies together in
// memory is read together.
void transpose(const PromptMapsParams &p, const float *query, int64_t count, Row *columns) {
    const int64_t head = p.strides[1], pixel = p.strides[2], column = p.strides[3];
#if defined(__SSE__)
    if (column == 1 && count == kTile && p.depth % 4 == 0) {
        for (int64_t r = 0; r < kTile; r += 4)
            for (int64_t h = 0; h < p.heads; ++h)
                for (int64_t c = 0; c < p.depth; c += 4) {
                    const float *at = query + h * head + r * pixel + c;
                    Row *to = columns + h * p.depth + c;
                    __m128 w = _mm_loadu_ps(at), x = _mm_loadu_ps(at + pixel),
                           y = _mm_loadu_ps(at + 2 * pixel), z = _mm_loadu_ps(at + 3 * pixel);
                    _MM_TRANSPOSE4_PS(w, x, y, z);
                    _mm_store_ps(to[0].at + r, w);
                    _mm_store_ps(to[1].at + r, x);
                    _mm_store_ps(to[2].at + r, y);
                    _mm_store_ps(to[3].at + r, z);
                }
        return;
    }
#endif
    for (int64_t r = 0; r < kTile; ++r)
        for (int64_t h = 0; h < p.heads; ++h) {
            const float *at = query + h * head + std::min(r, count - 1) * pixel;
            for (int64_t c = 0; c < p.depth; ++c)
                columns[h * p.depth + c].at[r] = at[c * column];
        }
}

// scores[t] = sum over c of keys[t][c] * columns[c]
BIASMAP_CLONES void multiply(const float *keys, int64_t tokens, int64_t depth, const Row *columns,
                             Row *scores) {
    for (int64_t first = 0; first < tokens; first += kTokens) {
        const float *key[kTokens];
        for (int64_t i = 0; i < kTokens; ++i) // beyond the last, that one again
            key[i] = keys + std::min(first + i, tokens - 1) * depth;
        const int64_t count = std::min(kTokens, tokens - first);
        for (int64_t v = 0; v < kVectors; ++v) {
            Lanes sums[kTokens] = {};
            for (int64_t c = 0; c < depth; ++c) {
                const Lanes column = columns[c].lanes[v];
#pragma GCC unroll 6
                for (int64_t i = 0; i < kTokens; ++i)
                    sums[i] += key[i][c] * column;
            }
            for (int64_t i = 0; i < count; ++i)
                scores[first + i].lanes[v] = sums[i];
        }
    }
}

// Scores to exponentials of their differences from each pixel's largest.
BIASMAP_CLONES void exponentials(int64_t tokens, Row *scores) {
    for (int64_t v = 0; v < kVectors; ++v) {
        Lanes top = scores[0].lanes[v];
        for (int64_t t = 1; t < tokens; ++t) {
            const Lanes score = scores[t].lanes[v];
            top = score > top ? score : top;
        }
        alignas(64) float tops[kLanes];
        *reinterpret_cast<Lanes *>(tops) = top;
        for (int64_t t = 0; t < tokens; ++t) {
            float *score = scores[t].at + v * kLanes;
#pragma omp simd
            for (int64_t r = 0; r < kLanes; ++r)
                score[r] = exp_minus(tops[r] - score[r]);
        }
    }
}

inline void add_up(const Sum &sum, const Row *rows, Lanes (&total)[kVectors]) {
    for (const Term &term : sum)
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v)
            total[v] += term.weight * rows[term.token].lanes[v];
}

// Whether all are large enough to divide by: a NaN is not.
inline bool divisible(const Lanes (&sums)[kVectors]) {
    alignas(64) float at[kTile];
    std::copy_n(sums, kVectors, reinterpret_cast<Lanes *>(at));
    int small = 0;
#pragma omp simd reduction(+ : small)
    for (int64_t r = 0; r < kTile; ++r)
        small += !(at[r] >= kSmall);
    return small == 0;
}

// Adds one prompt's softmax, summed over the tokens of each of its concepts, from exponentials.
// Adds nothing and returns false where `checked` finds their sum too small to divide by.
BIASMAP_CLONES bool add_prompt(const Sum &tokens, const Sum *weights, int64_t concepts,
                               const Row *rows, bool checked, Row *found) {
    Lanes sums[kVectors] = {};
    add_up(tokens, rows, sums);
    if (checked && !divisible(sums))
        return false;
    for (int64_t k = 0; k < concepts; ++k) {
        Lanes part[kVectors] = {};
        add_up(weights[k], rows, part);
        for (int64_t v = 0; v < kVectors; ++v)
            found[k].lanes[v] += part[v] / sums[v];
    }
    return true;
}

// Scores of one prompt to exponentials of the differences from its own largest.
void exponentials_of(const Sum &tokens, Row *scores) {
    for (int64_t r = 0; r < kTile; ++r) {
        float top = scores[tokens.front().token].at[r];
        for (const Term &term : tokens)
            top = std::max(top, scores[term.token].at[r]);
        for (const Term &term : tokens)
            scores[term.token].at[r] = std::exp(scores[term.token].at[r] - top);
    }
}

// What a thread works in.
struct Space {
    std::vector<Row> columns, all, own, found;
    explicit Space(const PromptMapsParams &p)
        : columns(static_cast<size_t>(p.heads * p.depth)), all(static_cast<size_t>(p.tokens)),
          own(all.size()), found(static_cast<size_t>(p.prompts * p.concepts)) {}
};

// Adds the maps of one head to `space.found`, from the tile's columns.
void add_head(const PromptMapsParams &p, int64_t head, const std::vector<Sum> &members,
              const std::vector<Sum> &weights, Space &space) {
    const float *keys = p.keys + head * p.tokens * p.depth;
    const Row *columns = space.columns.data() + head * p.depth;
    multiply(keys, p.tokens, p.depth, columns, space.all.data());
    exponentials(p.tokens, space.all.data());
    for (int64_t prompt = 0; prompt < p.prompts; ++prompt) {
        const Sum &tokens = members[static_cast<size_t>(prompt)];
        const Sum *own = weights.data() + prompt * p.concepts;
        Row *found = space.found.data() + prompt * p.concepts;
        if (add_prompt(tokens, own, p.concepts, space.all.data(), true, found))
            continue;
        // All of its scores are far below another prompt's.
        multiply(keys, p.tokens, p.depth, columns, space.own.data());
        exponentials_of(tokens, space.own.data());
        add_prompt(tokens, own, p.concepts, space.own.data(), false, found);
    }
}

// Adds the tile's maps of image `b` to a target.
void add_tile(const PromptMapsParams &p, const PromptMaps &maps, int64_t b, int64_t first,
              int64_t count, const Space &space) {
    for (int64_t prompt = 0; prompt < p.prompts; ++prompt)
        for (int64_t k = 0; k < p.concepts; ++k) {
            const Row &row = space.found[static_cast<size_t>(prompt * p.concepts + k)];
            float *map = maps.data + prompt * maps.strides[0] + b * maps.strides[1] +
                         k * maps.strides[2] + first;
            for (int64_t r = 0; r < count; ++r)
                map[r] += row.at[r];
        }
}

} // namespace

void prompt_maps_cpu(const PromptMapsParams &p) {
    const std::vector<Sum> members = sums_of(p.members, p.prompts, p.tokens);
    const std::vector<Sum> weights = sums_of(p.weights, p.prompts * p.concepts, p.tokens);
    const int64_t tiles = (p.pixels + kTile - 1) / kTile;
    const bool parallel = p.batch * p.heads * p.pixels * p.depth * p.tokens > kParallelProducts;
    std::vector<Space> spaces(static_cast<size_t>(parallel ? omp_get_max_threads() : 1), Space(p));

#pragma omp parallel for if (parallel) collapse(2) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            Space &space = spaces[static_cast<size_t>(omp_get_thread_num())];
            const int64_t first = tile * kTile, count = std::min(kTile, p.pixels - first);
            std::fill(space.found.begin(), space.found.end(), Row{});
            transpose(p, p.query + b * p.strides[0] + first * p.strides[2], count,
                      space.columns.data());
            for (int64_t h = 0; h < p.heads; ++h)
                add_head(p, h, members, weights, space);
            for (int64_t target = 0; target < p.targets; ++target)
                add_tile(p, p.maps[target], b, first, count, space);
        }
}

} // namespace biasmap
