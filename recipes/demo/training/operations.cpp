// Training operations on one CPU core with AVX512-BF16, each in one pass over its rows. compiled.py
// builds and calls them; operations.py has the same in plain torch. Arrays are contiguous unless a
// stride is given. bf16 is stored as its 16 bits. Widths are multiples of 16.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;
using pair = uint32_t;  // two neighbours along the inner dimension of a product, the first in the lower half

static inline __m512 bits(__m512i x) { return _mm512_castsi512_ps(x); }
static inline __m512 load(const bf16* p) { return bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline __m512 all(float x) { return _mm512_set1_ps(x); }

static inline __m512i interleaved(__m512 first, __m512 second) {
    return _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(second)), 16), _mm512_cvtepu16_epi32(narrow(first)));
}

static inline __m512 exponential(__m512 x) {  // 3e-6 of the value; zero far below
    const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, all(1.44269504f)), all(-150.0f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(y, whole);
    __m512 sum = all(0.00133336f);
    for (float factor : {0.00961813f, 0.05550411f, 0.24022651f, 0.69314718f, 1.0f}) sum = _mm512_fmadd_ps(sum, part, all(factor));
    return _mm512_scalef_ps(sum, whole);
}

static inline __m512 sigmoid(__m512 x) { return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), exponential(_mm512_sub_ps(all(0.0f), x)))); }

// ---------------------------------------------------------------------------------------------------------------- products

constexpr int ROWS = 6;  // per tile of a product: 6 x 4 vectors of sums leave room in 32 registers

struct Left {  // the pair of row m and inner index k is at[m * row + k * inner]
    const pair* at;
    long row, inner;
};

template <int COLUMNS>
static inline void tile(Left a, const pair* b, long b_inner, float* c, long c_row, int inner, bool add) {
    __m512 sums[ROWS][COLUMNS];
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < COLUMNS; n++) sums[m][n] = add ? load(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    for (int k = 0; k < inner; k++) {
        __m512bh right[COLUMNS];
        for (int n = 0; n < COLUMNS; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + k * b_inner + 16 * n);
        for (int m = 0; m < ROWS; m++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a.at[m * a.row + k * a.inner]);
            for (int n = 0; n < COLUMNS; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], left, right[n]);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < COLUMNS; n++) store(c + m * c_row + 16 * n, sums[m][n]);
}

// c (+)= a b for ``rows`` rounded up to ROWS and ``columns`` vectors; b[k * b_inner + n] is a pair of column n.
static void product(int rows, int columns, Left a, const pair* b, long b_inner, float* c, long c_row, int inner, bool add) {
    for (int n = 0; n < columns; n += 4)
        for (int m = 0; m < rows; m += ROWS) {
            const Left part{a.at + m * a.row, a.row, a.inner};
            float* to = c + m * c_row + 16 * n;
            switch (std::min(4, columns - n)) {
                case 4: tile<4>(part, b + 16 * n, b_inner, to, c_row, inner, add); break;
                case 3: tile<3>(part, b + 16 * n, b_inner, to, c_row, inner, add); break;
                case 2: tile<2>(part, b + 16 * n, b_inner, to, c_row, inner, add); break;
                default: tile<1>(part, b + 16 * n, b_inner, to, c_row, inner, add);
            }
        }
}

// --------------------------------------------------------------------------------------------------------------- attention

constexpr int NOPE = 32, ROPE = 32, HEAD = 64, VALUE = 64, KV = NOPE + VALUE;
constexpr int BLOCK = 48;       // query rows at a time; documents are padded to a multiple
constexpr int KEYS = 240;       // keys at a time in the backward pass
constexpr int WIDTH = KEYS + 16;

static long up(long n, long unit) { return (n + unit - 1) / unit * unit; }

struct Rotation {  // float by token and pair of dimensions
    const float *cosines, *sines;
};

// Pairs (2i, 2i + 1) of 32 dimensions; first members come first in the result.
static inline void rotate(const bf16* from, bf16* to, Rotation turn, long token) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512 even = bits(_mm512_slli_epi32(both, 16)), odd = bits(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
    const __m512 c = load(turn.cosines + 16 * token), s = load(turn.sines + 16 * token);
    store(to, _mm512_fmsub_ps(even, c, _mm512_mul_ps(odd, s)));
    store(to + 16, _mm512_fmadd_ps(odd, c, _mm512_mul_ps(even, s)));
}

static inline void rotate_back(const float* from, bf16* to, Rotation turn, long token) {
    const __m512 first = load(from), second = load(from + 16);
    const __m512 c = load(turn.cosines + 16 * token), s = load(turn.sines + 16 * token);
    const __m512 even = _mm512_fmadd_ps(first, c, _mm512_mul_ps(second, s)), odd = _mm512_fmsub_ps(second, c, _mm512_mul_ps(first, s));
    _mm512_storeu_si512(to, interleaved(even, odd));
}

// Rows [size, HEAD] as pairs of dimensions [HEAD / 2, size] and as pairs of rows [size / 2, HEAD].
static void pair_dims(const bf16* rows, long size, pair* to) {
    const pair* from = (const pair*)rows;
    for (long row = 0; row < size; row += 16)
        for (int k = 0; k < HEAD / 2; k++) {
            const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(HEAD / 2));
            _mm512_storeu_si512(to + k * size + row, _mm512_i32gather_epi32(places, (const int*)(from + row * HEAD / 2 + k), 4));
        }
}

static void pair_rows(const bf16* rows, long size, pair* to) {
    for (long row = 0; row < size; row += 2)
        for (int d = 0; d < HEAD; d += 16)
            _mm512_storeu_si512(to + row / 2 * HEAD + d, interleaved(load(rows + row * HEAD + d), load(rows + (row + 1) * HEAD + d)));
}

struct Inputs {  // q [T, heads, HEAD], kv [T, heads, KV], rope [T, ROPE] with a stride
    const bf16 *q, *kv, *rope;
    long rope_stride, heads;
    Rotation turn;
};

struct Document {  // one head: rotated rows, padded with zeros
    long length, size;
    std::vector<bf16> q, k, v;

    Document(const Inputs& in, long first, long length_, long head)
        : length(length_), size(up(length_, BLOCK)), q(size * HEAD), k(size * HEAD), v(size * HEAD) {
        for (long t = 0; t < length; t++) {
            const bf16* from = in.q + ((first + t) * in.heads + head) * HEAD;
            memcpy(&q[t * HEAD], from, 2 * NOPE);
            rotate(from + NOPE, &q[t * HEAD + NOPE], in.turn, first + t);
            from = in.kv + ((first + t) * in.heads + head) * KV;
            memcpy(&k[t * HEAD], from, 2 * NOPE);
            rotate(in.rope + (first + t) * in.rope_stride, &k[t * HEAD + NOPE], in.turn, first + t);
            memcpy(&v[t * HEAD], from + NOPE, 2 * VALUE);
        }
    }
};

static inline __mmask16 seen(long row, long key) {  // mask of 16 keys: those not behind the row
    return row >= key + 15 ? 0xffff : row < key ? 0 : (__mmask16)((1u << (row - key + 1)) - 1);
}

// Turns a row's scores into unnormalised probabilities. Returns their sum and the largest score.
static float chances_of(const float* scores, bf16* chances, long row, long keys, float scale, float& largest) {
    __m512 most = all(-INFINITY);
    for (long key = 0; key < keys; key += 16) most = _mm512_mask_max_ps(most, seen(row, key), most, load(scores + key));
    largest = scale * _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (long key = 0; key < keys; key += 16) {
        const __m512 each = _mm512_maskz_mov_ps(seen(row, key), exponential(_mm512_fmsub_ps(load(scores + key), all(scale), all(largest))));
        sum = _mm512_add_ps(sum, each);
        store(chances + key, each);
    }
    return _mm512_reduce_add_ps(sum);
}

// out [T, heads, VALUE]; log_sums [T, heads] is kept for the backward pass.
extern "C" void attention_forward(const bf16* q, const bf16* kv, const bf16* rope, long rope_stride, const float* cosines, const float* sines,
                                  const int64_t* lengths, long documents, long heads, float scale, bf16* out, float* log_sums) {
    const Inputs in{q, kv, rope, rope_stride, heads, {cosines, sines}};
    for (long document = 0, first = 0; document < documents; first += lengths[document++])
        for (long head = 0; head < heads; head++) {
            const Document d(in, first, lengths[document], head);
            std::vector<pair> keys(d.size * HEAD / 2), values(d.size * HEAD / 2);
            pair_dims(d.k.data(), d.size, keys.data());
            pair_rows(d.v.data(), d.size, values.data());
            std::vector<float> scores(BLOCK * d.size), result(BLOCK * VALUE);
            std::vector<bf16> chances(BLOCK * d.size);
            for (long start = 0; start < d.length; start += BLOCK) {
                const long rows = std::min<long>(BLOCK, d.length - start), num = std::min(d.size, up(start + rows, 16));
                product(rows, num / 16, {(const pair*)&d.q[start * HEAD], HEAD / 2, 1}, keys.data(), d.size, scores.data(), d.size, HEAD / 2, false);
                float sums[BLOCK], largest[BLOCK];
                for (long m = 0; m < rows; m++)
                    sums[m] = chances_of(&scores[m * d.size], &chances[m * d.size], start + m, num, scale, largest[m]);
                product(rows, VALUE / 16, {(const pair*)chances.data(), d.size / 2, 1}, values.data(), VALUE, result.data(), VALUE, num / 2, false);
                for (long m = 0; m < rows; m++) {
                    const long at = (first + start + m) * heads + head;
                    log_sums[at] = largest[m] + std::log(sums[m]);
                    for (int n = 0; n < VALUE; n += 16) store(out + at * VALUE + n, _mm512_mul_ps(load(&result[m * VALUE + n]), all(1 / sums[m])));
                }
            }
        }
}

// Gradients of a block's scores and probabilities, from the scores and from the products of the
// gradient with the values; in both orders of pairs.
struct Block {
    float scores[BLOCK * WIDTH], inner[BLOCK * WIDTH];
    bf16 dscores[BLOCK * WIDTH];
    pair dscores_pairs[BLOCK / 2 * WIDTH], chances_pairs[BLOCK / 2 * WIDTH];

    void differentiate(long start, long rows, long first_key, long keys, float scale, const float* log_sums, const float* means) {
        for (long m = 0; m < rows; m += 2) {
            for (long key = 0; key < keys; key += 16) {
                __m512 chances[2], grads[2];
                for (int i = 0; i < 2; i++) {
                    const long at = (m + i) * WIDTH + key, row = start + m + i;
                    const __m512 each = exponential(_mm512_fmsub_ps(load(scores + at), all(scale), all(log_sums[row])));
                    chances[i] = _mm512_maskz_mov_ps(seen(row, first_key + key), each);
                    grads[i] = _mm512_mul_ps(_mm512_mul_ps(chances[i], all(scale)), _mm512_sub_ps(load(inner + at), all(means[row])));
                    store(dscores + at, grads[i]);
                }
                _mm512_storeu_si512(chances_pairs + m / 2 * WIDTH + key, interleaved(chances[0], chances[1]));
                _mm512_storeu_si512(dscores_pairs + m / 2 * WIDTH + key, interleaved(grads[0], grads[1]));
            }
            memset(chances_pairs + m / 2 * WIDTH + keys, 0, 64);  // products go on to a multiple of ROWS
            memset(dscores_pairs + m / 2 * WIDTH + keys, 0, 64);
        }
    }
};

static void head_backward(const Inputs& in, long first, long length, long head, float scale, const bf16* out, const float* log_sums,
                          const bf16* grad, bf16* dq, bf16* dkv, float* drope) {
    const Document d(in, first, length, head);
    const long half = d.size * HEAD / 2;
    std::vector<bf16> g(d.size * HEAD);
    std::vector<float> sums(d.size), means(d.size), dq_rows(d.size * HEAD), dk((KEYS + ROWS) * HEAD), dv((KEYS + ROWS) * HEAD);
    std::vector<pair> keys(half), values(half), key_rows(half), query_rows(half), grad_rows(half);
    for (long t = 0; t < length; t++) {
        const long at = (first + t) * in.heads + head;
        memcpy(&g[t * HEAD], grad + at * HEAD, 2 * HEAD);
        sums[t] = log_sums[at];
        __m512 mean = _mm512_setzero_ps();
        for (int n = 0; n < VALUE; n += 16) mean = _mm512_fmadd_ps(load(grad + at * VALUE + n), load(out + at * VALUE + n), mean);
        means[t] = _mm512_reduce_add_ps(mean);
    }
    pair_dims(d.k.data(), d.size, keys.data());
    pair_dims(d.v.data(), d.size, values.data());
    pair_rows(d.k.data(), d.size, key_rows.data());
    pair_rows(d.q.data(), d.size, query_rows.data());
    pair_rows(g.data(), d.size, grad_rows.data());
    std::vector<Block> blocks(1);
    Block& b = blocks[0];
    for (long key = 0; key < length; key += KEYS) {
        std::fill(dk.begin(), dk.end(), 0.0f);
        std::fill(dv.begin(), dv.end(), 0.0f);
        for (long start = key; start < length; start += BLOCK) {
            const long rows = up(std::min<long>(BLOCK, length - start), ROWS), num = std::min({(long)KEYS, d.size - key, up(start + rows - key, 16)});
            product(rows, num / 16, {(const pair*)&d.q[start * HEAD], HEAD / 2, 1}, &keys[key], d.size, b.scores, WIDTH, HEAD / 2, false);
            product(rows, num / 16, {(const pair*)&g[start * HEAD], HEAD / 2, 1}, &values[key], d.size, b.inner, WIDTH, HEAD / 2, false);
            b.differentiate(start, rows, key, num, scale, sums.data(), means.data());
            product(rows, HEAD / 16, {(const pair*)b.dscores, WIDTH / 2, 1}, &key_rows[key / 2 * HEAD], HEAD, &dq_rows[start * HEAD], HEAD, num / 2, true);
            product(num, HEAD / 16, {b.dscores_pairs, 1, WIDTH}, &query_rows[start / 2 * HEAD], HEAD, dk.data(), HEAD, rows / 2, true);
            product(num, VALUE / 16, {b.chances_pairs, 1, WIDTH}, &grad_rows[start / 2 * HEAD], HEAD, dv.data(), HEAD, rows / 2, true);
        }
        for (long n = 0; n < std::min<long>(KEYS, length - key); n++) {
            bf16* to = dkv + ((first + key + n) * in.heads + head) * KV;
            for (int i = 0; i < NOPE; i += 16) store(to + i, load(&dk[n * HEAD + i]));
            for (int i = 0; i < VALUE; i += 16) store(to + NOPE + i, load(&dv[n * HEAD + i]));
            float* turned = drope + (key + n) * ROPE;
            for (int i = 0; i < ROPE; i += 16) store(turned + i, _mm512_add_ps(load(turned + i), load(&dk[n * HEAD + NOPE + i])));
        }
    }
    for (long t = 0; t < length; t++) {
        bf16* to = dq + ((first + t) * in.heads + head) * HEAD;
        for (int i = 0; i < NOPE; i += 16) store(to + i, load(&dq_rows[t * HEAD + i]));
        rotate_back(&dq_rows[t * HEAD + NOPE], to + NOPE, in.turn, first + t);
    }
}

extern "C" void attention_backward(const bf16* q, const bf16* kv, const bf16* rope, long rope_stride, const float* cosines, const float* sines,
                                   const int64_t* lengths, long documents, long heads, float scale, const bf16* out, const float* log_sums,
                                   const bf16* grad, bf16* dq, bf16* dkv, bf16* drope) {
    const Inputs in{q, kv, rope, rope_stride, heads, {cosines, sines}};
    for (long document = 0, first = 0; document < documents; first += lengths[document++]) {
        std::vector<float> turned(lengths[document] * ROPE);
        for (long head = 0; head < heads; head++)
            head_backward(in, first, lengths[document], head, scale, out, log_sums, grad, dq, dkv, turned.data());
        for (long t = 0; t < lengths[document]; t++) rotate_back(&turned[t * ROPE], drope + (first + t) * ROPE, in.turn, first + t);
    }
}

// -------------------------------------------------------------------------------------------------------------------- norm

template <class X>
static void norm(const X* x, const float* weight, long rows, long width, float epsilon, bf16* out, float* scales) {
    for (long t = 0; t < rows; t++, x += width, out += width) {
        __m512 sum = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 16) sum = _mm512_fmadd_ps(load(x + d), load(x + d), sum);
        scales[t] = 1 / std::sqrt(_mm512_reduce_add_ps(sum) / width + epsilon);
        for (long d = 0; d < width; d += 16) store(out + d, _mm512_mul_ps(_mm512_mul_ps(load(x + d), all(scales[t])), load(weight + d)));
    }
}

template <class X>
static void norm_back(const X* x, const float* weight, const float* scales, const bf16* grad, long rows, long width, X* dx, float* dweight) {
    for (long t = 0; t < rows; t++, x += width, grad += width, dx += width) {
        const __m512 scale = all(scales[t]);
        __m512 sum = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 16) {
            const __m512 part = _mm512_mul_ps(_mm512_mul_ps(load(x + d), scale), load(grad + d));
            store(dweight + d, _mm512_add_ps(load(dweight + d), part));
            sum = _mm512_fmadd_ps(part, load(weight + d), sum);
        }
        const __m512 mean = _mm512_mul_ps(all(_mm512_reduce_add_ps(sum) / width), scale);
        for (long d = 0; d < width; d += 16) {
            const __m512 whole = _mm512_fnmadd_ps(load(x + d), mean, _mm512_mul_ps(load(grad + d), load(weight + d)));
            store(dx + d, _mm512_mul_ps(whole, scale));
        }
    }
}

extern "C" void norm_forward(const void* x, long is_float, const float* weight, long rows, long width, float epsilon, bf16* out, float* scales) {
    if (is_float) norm((const float*)x, weight, rows, width, epsilon, out, scales);
    else norm((const bf16*)x, weight, rows, width, epsilon, out, scales);
}

// ``dweight`` starts as zeros.
extern "C" void norm_backward(const void* x, long is_float, const float* weight, const float* scales, const bf16* grad, long rows, long width,
                              void* dx, float* dweight) {
    if (is_float) norm_back((const float*)x, weight, scales, grad, rows, width, (float*)dx, dweight);
    else norm_back((const bf16*)x, weight, scales, grad, rows, width, (bf16*)dx, dweight);
}

// ----------------------------------------------------------------------------------------------------------------- experts

// silu(gate) * up, of rows that hold both [rows, 2 width].
extern "C" void swiglu_forward(const bf16* both, long rows, long width, bf16* out) {
    for (long t = 0; t < rows; t++, both += 2 * width, out += width)
        for (long d = 0; d < width; d += 16) {
            const __m512 gate = load(both + d);
            store(out + d, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), load(both + width + d)));
        }
}

extern "C" void swiglu_backward(const bf16* both, const bf16* grad, long rows, long width, bf16* dboth) {
    for (long t = 0; t < rows; t++, both += 2 * width, dboth += 2 * width, grad += width)
        for (long d = 0; d < width; d += 16) {
            const __m512 gate = load(both + d), up = load(both + width + d), g = load(grad + d), chance = sigmoid(gate);
            const __m512 act = _mm512_mul_ps(gate, chance);
            const __m512 slope = _mm512_fmadd_ps(act, _mm512_sub_ps(all(1.0f), chance), chance);
            store(dboth + d, _mm512_mul_ps(_mm512_mul_ps(g, up), slope));
            store(dboth + width + d, _mm512_mul_ps(g, act));
        }
}

// The row of each (token, choice). Rows are sorted by expert; each expert's part is padded to a
// multiple of ``unit``. ``ends`` by expert.
extern "C" void place_rows(const int64_t* ids, long choices, long experts, long unit, int64_t* places, int64_t* ends) {
    std::vector<int64_t> next(experts);
    for (long i = 0; i < choices; i++) next[ids[i]]++;
    for (long e = 0, end = 0; e < experts; e++) {
        const long count = next[e];
        next[e] = end;
        ends[e] = end += up(count, unit);
    }
    for (long i = 0; i < choices; i++) places[i] = next[ids[i]]++;
}

// Copies x [T, width] to its places among rows that start as zeros.
extern "C" void spread_rows(const bf16* x, const int64_t* places, long tokens, long top_k, long width, bf16* rows) {
    for (long t = 0; t < tokens; t++)
        for (long k = 0; k < top_k; k++) memcpy(rows + places[t * top_k + k] * width, x + t * width, 2 * width);
}

// Sums over choices, weighted by ``weights`` [T, K] if given.
extern "C" void gather_rows(const bf16* rows, const int64_t* places, const float* weights, long tokens, long top_k, long width, bf16* out) {
    for (long t = 0; t < tokens; t++)
        for (long d = 0; d < width; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (long i = t * top_k; i < (t + 1) * top_k; i++)
                sum = _mm512_fmadd_ps(load(rows + places[i] * width + d), all(weights ? weights[i] : 1.0f), sum);
            store(out + t * width + d, sum);
        }
}

// Backward pass of the weighted sum: gradients of rows, which start as zeros, and of weights.
extern "C" void gather_backward(const bf16* rows, const int64_t* places, const float* weights, const bf16* grad, long tokens, long top_k, long width,
                                bf16* drows, float* dweights) {
    for (long t = 0; t < tokens; t++)
        for (long i = t * top_k; i < (t + 1) * top_k; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (long d = 0; d < width; d += 16) {
                const __m512 g = load(grad + t * width + d);
                sum = _mm512_fmadd_ps(load(rows + places[i] * width + d), g, sum);
                store(drows + places[i] * width + d, _mm512_mul_ps(g, all(weights[i])));
            }
            dweights[i] = _mm512_reduce_add_ps(sum);
        }
}
