// What a step of few tokens is made of, each one call where torch would need several: on a CPU such a step is bound by
// reading the weights and by the count of its operations. Activations are float32 throughout, whatever the weights are.
// Compiled by native.py where there is a C compiler. All pointers are to contiguous memory unless a stride is given.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t uints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t ubytes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { MUCH = 1 << 16 };  // operations from which a second thread pays
enum { GROUP = 32, OUTPUTS = 6, TOKENS = 2 };  // the tile: so many sums are kept in registers

// LANES bytes as integers. Compilers do not find the one instruction by themselves.
#if defined(__AVX512F__)
static inline ints widen_signed(const int8_t *p) { return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
static inline ints widen_unsigned(const uint8_t *p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
#elif defined(__AVX2__)
static inline ints widen_signed(const int8_t *p) { return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline ints widen_unsigned(const uint8_t *p) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
#else
static inline ints widen_signed(const int8_t *p) { return __builtin_convertvector(*(const bytes *)p, ints); }
static inline ints widen_unsigned(const uint8_t *p) { return __builtin_convertvector(*(const ubytes *)p, ints); }
#endif
static inline vec floats(ints v) { return __builtin_convertvector(v, vec); }
static inline vec load(const float *p) { return *(const vec *)p; }
static inline vec widen(const uint16_t *p) { return (vec)(__builtin_convertvector(*(const halves *)p, uints) << 16); }
static inline float widen_one(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t narrow(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}
static inline vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }
// e^x to 2 units in the last place: 2^n · e^r with |r| ≤ ln 2 / 2, and e^r by its Taylor series to the 6th power.
static inline vec exponential(vec x) {
    x = choose(x < -87, (vec){0} - 87, choose(x > 88, (vec){0} + 88, x));
    const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds: 1.5 · 2^23 leaves no bits for a fraction
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const vec e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return e * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}
static inline float dot(const float *a, const float *b, long n) {
    vec sum = {0}, other = {0};
    long k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        sum += load(a + k) * load(b + k);
        other += load(a + k + LANES) * load(b + k + LANES);
    }
    float rest = 0;
    for (; k < n; k++) rest += a[k] * b[k];
    return total(sum + other) + rest;
}

static int threads = 1;
void use_threads(long count) { threads = count; }

static long row_bytes(int kind, long inputs) {
    return kind == FLOAT32 ? 4 * inputs : kind == BFLOAT16 ? 2 * inputs : kind == INT8 ? inputs : inputs / 2;
}

// One row of weights as float32. scales: one for each output (INT8), or scale and offset for each group (INT4), which are
// stored as halves of two bytes of a group: byte i holds input i low and input i + 16 high.
static void expand_row(int kind, const void *row, const float *scales, long output, long inputs, float *out) {
    if (kind == FLOAT32) {
        memcpy(out, row, 4 * inputs);
    } else if (kind == BFLOAT16) {
        const uint16_t *w = row;
        long k = 0;
        for (; k + LANES <= inputs; k += LANES) *(vec *)(out + k) = widen(w + k);
        for (; k < inputs; k++) out[k] = widen_one(w[k]);
    } else if (kind == INT8) {
        const int8_t *w = row;
        long k = 0;
        for (; k + LANES <= inputs; k += LANES) *(vec *)(out + k) = floats(widen_signed(w + k)) * scales[output];
        for (; k < inputs; k++) out[k] = w[k] * scales[output];
    } else {
        const uint8_t *w = row;
        const float *pair = scales + output * (inputs / GROUP) * 2;
        for (long g = 0; g < inputs / GROUP; g++, pair += 2, w += GROUP / 2, out += GROUP)
            for (int i = 0; i < GROUP / 2; i += LANES) {
                const ints q = widen_unsigned(w + i);
                *(vec *)(out + i) = floats(q & 15) * pair[0] + pair[1];
                *(vec *)(out + i + GROUP / 2) = floats(q >> 4) * pair[0] + pair[1];
            }
    }
}

// One output for one token, straight from the stored row. sums: of x over each group (INT4).
static inline float product(int kind, const void *row, const float *scales, long output, long inputs, const float *x,
                            const float *sums) {
    vec a = {0}, b = {0};
    long k = 0;
    float rest = 0;
    if (kind == FLOAT32) return dot(row, x, inputs);
    if (kind == BFLOAT16) {
        const uint16_t *w = row;
        for (; k + 2 * LANES <= inputs; k += 2 * LANES) {
            a += widen(w + k) * load(x + k);
            b += widen(w + k + LANES) * load(x + k + LANES);
        }
        for (; k < inputs; k++) rest += widen_one(w[k]) * x[k];
        return total(a + b) + rest;
    }
    if (kind == INT8) {
        const int8_t *w = row;
        for (; k + 2 * LANES <= inputs; k += 2 * LANES) {
            a += floats(widen_signed(w + k)) * load(x + k);
            b += floats(widen_signed(w + k + LANES)) * load(x + k + LANES);
        }
        for (; k < inputs; k++) rest += w[k] * x[k];
        return (total(a + b) + rest) * scales[output];
    }
    const uint8_t *w = row;
    const float *pair = scales + output * (inputs / GROUP) * 2;
    for (long g = 0; g < inputs / GROUP; g++, w += GROUP / 2, x += GROUP) {
        vec inner = {0};
        for (int i = 0; i < GROUP / 2; i += LANES) {
            const ints q = widen_unsigned(w + i);
            inner += floats(q & 15) * load(x + i);
            inner += floats(q >> 4) * load(x + i + GROUP / 2);
        }
        a += inner * pair[2 * g];
        rest += pair[2 * g + 1] * sums[g];
    }
    return total(a) + rest;
}

// sums[outputs][tokens] of a tile; w: OUTPUTS rows, x: TOKENS rows, each `inputs` apart.
static inline void tile(const float *w, const float *x, long inputs, float sums[OUTPUTS][TOKENS]) {
    vec acc[OUTPUTS][TOKENS] = {0};
    long k = 0;
    for (; k + LANES <= inputs; k += LANES)
        for (int t = 0; t < TOKENS; t++) {
            vec xs = load(x + t * inputs + k);
            for (int o = 0; o < OUTPUTS; o++) acc[o][t] += load(w + o * inputs + k) * xs;
        }
    for (int o = 0; o < OUTPUTS; o++)
        for (int t = 0; t < TOKENS; t++) {
            float rest = 0;
            for (long i = k; i < inputs; i++) rest += w[o * inputs + i] * x[t * inputs + i];
            sums[o][t] = total(acc[o][t]) + rest;
        }
}

// y (tokens, outputs) = x (tokens, inputs) Wᵀ + bias (or NULL)
void linear(int kind, const void *weight, const float *scales, const float *bias, const float *x, float *y, long tokens,
            long outputs, long inputs) {
    const long bytes_of_row = row_bytes(kind, inputs);
    float *sums = NULL;
    if (kind == INT4) {
        sums = malloc(tokens * (inputs / GROUP) * sizeof(float));
        for (long g = 0; g < tokens * (inputs / GROUP); g++) {
            float sum = 0;
            for (int i = 0; i < GROUP; i++) sum += x[g * GROUP + i];
            sums[g] = sum;
        }
    }
#pragma omp parallel num_threads(threads)
    {
        float *rows = tokens < TOKENS ? NULL : malloc(OUTPUTS * inputs * sizeof(float));
#pragma omp for schedule(static)
        for (long block = 0; block < (outputs + OUTPUTS - 1) / OUTPUTS; block++) {
            const long first = block * OUTPUTS, count = outputs - first < OUTPUTS ? outputs - first : OUTPUTS;
            long t = 0;
            if (rows != NULL && count == OUTPUTS) {
                const float *w = rows;
                if (kind == FLOAT32)
                    w = (const float *)weight + first * inputs;
                else
                    for (int o = 0; o < OUTPUTS; o++)
                        expand_row(kind, (const char *)weight + (first + o) * bytes_of_row, scales, first + o, inputs,
                                   rows + o * inputs);
                for (; t + TOKENS <= tokens; t += TOKENS) {
                    float result[OUTPUTS][TOKENS];
                    tile(w, x + t * inputs, inputs, result);
                    for (int o = 0; o < OUTPUTS; o++)
                        for (int i = 0; i < TOKENS; i++)
                            y[(t + i) * outputs + first + o] = result[o][i] + (bias ? bias[first + o] : 0);
                }
            }
            for (; t < tokens; t++)
                for (long o = first; o < first + count; o++)
                    y[t * outputs + o] = product(kind, (const char *)weight + o * bytes_of_row, scales, o, inputs,
                                                 x + t * inputs, sums ? sums + t * (inputs / GROUP) : NULL) +
                                         (bias ? bias[o] : 0);
        }
        free(rows);
    }
    free(sums);
}

// All weights as float32, (outputs, inputs).
void expand(int kind, const void *weight, const float *scales, float *out, long outputs, long inputs) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < outputs; o++)
        expand_row(kind, (const char *)weight + o * row_bytes(kind, inputs), scales, o, inputs, out + o * inputs);
}

// y (tokens, outputs) += alpha · ((x Aᵀ) ⊙ v) B. a (rank, inputs), v (tokens, rank), b (rank, outputs)
void low_rank(const float *x, const float *a, const float *v, const float *b, float *y, long tokens, long inputs, long rank,
              long outputs, float alpha) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * rank * (inputs + outputs) > MUCH)
    for (long t = 0; t < tokens; t++) {
        const float *in = x + t * inputs, *scales = v + t * rank;
        float *to = y + t * outputs;
        for (long r = 0; r < rank; r += 4) {  // four at once read and write y once
            float z[4] = {0};
            const float *from[4];
            int used = 0;
            for (int i = 0; i < 4; i++) {
                from[i] = b + (r + i < rank ? r + i : r) * outputs;
                if (r + i < rank && scales[r + i] != 0) {  // 0: an adapter of another row
                    z[i] = dot(in, a + (r + i) * inputs, inputs) * scales[r + i] * alpha;
                    used = 1;
                }
            }
            if (!used) continue;
#pragma omp simd
            for (long o = 0; o < outputs; o++)
                to[o] += z[0] * from[0][o] + z[1] * from[1][o] + z[2] * from[2][o] + z[3] * from[3][o];
        }
    }
}

// x += y where y is given; out = x / √(mean x² + eps) · weight. (rows, size) each; weight (size)
void add_norm(float *x, const float *y, const float *weight, float *out, long rows, long size, float eps) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > MUCH)
    for (long row = 0; row < rows; row++) {
        float *sum = x + row * size, *to = out + row * size;
        if (y != NULL) {
#pragma omp simd
            for (long i = 0; i < size; i++) sum[i] += y[row * size + i];
        }
        const float scale = 1 / sqrtf(dot(sum, sum, size) / size + eps);
#pragma omp simd
        for (long i = 0; i < size; i++) to[i] = sum[i] * scale * weight[i];
    }
}

// out (rows, size) = silu(gate) · up; both stand side by side in gate_up (rows, 2 · size)
void silu_mul(const float *gate_up, float *out, long rows, long size) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > MUCH)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *to = out + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES)
            *(vec *)(to + i) = load(gate + i) / (1 + exponential(-load(gate + i))) * load(up + i);
        for (; i < size; i++) to[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

// A head's rotary position, with its norm before that where weight is given. cosine, sine: (dim); rotating halves is a swap,
// with the first half's sign in the sine.
static void rotate(const float *in, const float *cosine, const float *sine, const float *weight, float eps, long dim,
                   float *out) {
    float head[dim];
    const float scale = weight ? 1 / sqrtf(dot(in, in, dim) / dim + eps) : 1;
    for (long i = 0; i < dim; i++) head[i] = in[i] * scale * (weight ? weight[i] : 1);
    const long half = dim / 2;
    for (long i = 0; i < half; i++) {
        out[i] = head[i] * cosine[i] + head[i + half] * sine[i];
        out[i + half] = head[i + half] * cosine[i + half] + head[i] * sine[i + half];
    }
}

static void put(void *kept, int kind, long at, const float *values, long dim) {
    if (kind == FLOAT32)
        memcpy((float *)kept + at, values, dim * sizeof(float));
    else
        for (long i = 0; i < dim; i++) ((uint16_t *)kept + at)[i] = narrow(values[i]);
}

static const float *get(const void *kept, int kind, long at, long dim, float *scratch) {
    if (kind == FLOAT32) return (const float *)kept + at;
    expand_row(BFLOAT16, (const uint16_t *)kept + at, NULL, 0, dim, scratch);
    return scratch;
}

static void softmax(float *line, long n) {
    float most = line[0], sum = 0;
    vec sums = {0};
    long k = 0;
    for (long i = 1; i < n; i++) most = line[i] > most ? line[i] : most;
    for (; k + LANES <= n; k += LANES) sums += *(vec *)(line + k) = exponential(load(line + k) - most);
    for (; k < n; k++) sum += line[k] = expf(line[k] - most);
    sum = 1 / (sum + total(sums));
    for (long i = 0; i < n; i++) line[i] *= sum;
}

// Attention of one new token for each of `tokens` neighbouring rows of a block, over what the row has cached; stores its key
// and value first. qkv (tokens, (heads + 2 · groups) · dim); norms ((heads + groups), dim) or NULL; keys, values: row 0 of the
// tokens, (rows, groups, capacity, dim) of `kind`; starts: what each row has cached; window: how far back it looks, 0 for
// all; out (tokens, heads · dim).
void attend(const float *qkv, const float *cosine, const float *sine, const float *norms, float eps, void *keys,
            void *values, int kind, long capacity, const int64_t *starts, long window, float scaling, float *out,
            long tokens, long heads, long groups, long dim) {
    const long shared = heads / groups, width = (heads + 2 * groups) * dim;
    long work = 0;
    for (long t = 0; t < tokens; t++) work += starts[t] + 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (work * heads * dim > MUCH)
    for (long job = 0; job < tokens * groups; job++) {
        const long t = job / groups, g = job % groups, end = starts[t] + 1;
        const long begin = window && end > window ? end - window : 0, row = (t * groups + g) * capacity * dim;
        const float *in = qkv + t * width, *c = cosine + t * dim, *s = sine + t * dim;
        float scratch[dim], q[shared * dim];
        float *scores = malloc(shared * (end - begin) * sizeof(float));
        rotate(in + (heads + g) * dim, c, s, norms ? norms + (heads + g) * dim : NULL, eps, dim, scratch);
        put(keys, kind, row + starts[t] * dim, scratch, dim);
        put(values, kind, row + starts[t] * dim, in + (heads + groups + g) * dim, dim);
        for (long h = 0; h < shared; h++) {
            const long head = g * shared + h;
            rotate(in + head * dim, c, s, norms ? norms + head * dim : NULL, eps, dim, q + h * dim);
        }
        for (long k = begin; k < end; k++) {
            const float *key = get(keys, kind, row + k * dim, dim, scratch);
            for (long h = 0; h < shared; h++) scores[h * (end - begin) + k - begin] = dot(q + h * dim, key, dim) * scaling;
        }
        for (long h = 0; h < shared; h++) {
            softmax(scores + h * (end - begin), end - begin);
        }
        float *to = out + (t * heads + g * shared) * dim;
        memset(to, 0, shared * dim * sizeof(float));
        for (long k = begin; k < end; k++) {
            const float *value = get(values, kind, row + k * dim, dim, scratch);
            for (long h = 0; h < shared; h++) {
                const float share = scores[h * (end - begin) + k - begin];
#pragma omp simd
                for (long i = 0; i < dim; i++) to[h * dim + i] += share * value[i];
            }
        }
        free(scores);
    }
}
