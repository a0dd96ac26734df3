// Products with weights as they are stored.

#pragma once

#include "vectors.h"

enum { GROUP = 32 };                            // inputs that share a scale
enum { FLOATS = 6, INTEGERS = 8, TOKENS = 2 };  // tiles: outputs × tokens whose sums are kept in registers
enum { AHEAD = 2048 };                          // bytes that are fetched ahead: the processor stops where a page ends

// y = x Wᵀ + bias. weight: (outputs, inputs), rows one behind the other: float32; bfloat16; INT8, each row filled up with zeros
// to whole groups, with scales (outputs); or INT4, two in a byte, where byte i of a group's 16 holds input i low and i + 16
// high, with scales (outputs, groups) and behind these the offsets, of the same shape. bias (outputs) or NULL.
typedef struct {
    int64_t kind, outputs, inputs;
    const void* weight;
    const float *scales, *bias;
} Affine;

static long groups_of(const Affine* w) { return (w->inputs + GROUP - 1) / GROUP; }
static const void* row_of(const Affine* w, long output) {
    const long bytes = w->kind == FLOAT32    ? 4 * w->inputs
                       : w->kind == BFLOAT16 ? 2 * w->inputs
                       : w->kind == INT8     ? groups_of(w) * GROUP
                                             : w->inputs / 2;
    return (const char*)w->weight + output * bytes;
}

// Activations in 16 bits: x ≈ q · scale for each group of a token, with an error of 2⁻¹⁶ of the group's greatest. q (tokens,
// groups · GROUP); scales (tokens, groups); sums of x over each group (groups, stride), for the offsets of INT4.
typedef struct {
    int16_t* q;
    float *scales, *sums;
    long stride;
} Digits;

static long padded(long tokens) { return tokens == 1 ? 1 : (tokens + 7) / 8 * 8; }  // eight at a time
static void* reserve(long bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }
static Digits reserve_digits(long tokens, long inputs) {
    const long groups = (inputs + GROUP - 1) / GROUP;
    Digits d = {reserve(tokens * groups * GROUP * 2), reserve(tokens * groups * 4), reserve(padded(tokens) * groups * 4),
                padded(tokens)};
    return d;
}
static void release(Digits d) { free(d.q), free(d.scales), free(d.sums); }

static void digits_of_group(const float* x, int16_t* q, float* scale, float* sum) {
    vec8 most = {0};
    const vec8 v[4] = {*(const vec8*)x, *(const vec8*)(x + 8), *(const vec8*)(x + 16), *(const vec8*)(x + 24)};
    for (int i = 0; i < 4; i++) {
        const vec8 size = (vec8)((ints8)v[i] & 0x7fffffff);
        const ints8 more = size > most;
        most = (vec8)(((ints8)size & more) | ((ints8)most & ~more));
    }
    float greatest = 0;
    for (int i = 0; i < 8; i++) greatest = most[i] > greatest ? most[i] : greatest;
    *sum = total8((v[0] + v[1]) + (v[2] + v[3]));
    *scale = greatest / 32767 + (*sum - *sum);  // not finite where x is not
    const float inverse = greatest > 1e-30f ? 32767 / greatest : 0;
    for (int i = 0; i < 4; i++) {
        const vec8 rounded = (v[i] * inverse + 12582912.0f) - 12582912.0f;  // 1.5 · 2^23 leaves no bits for a fraction
        *(shorts8*)(q + 8 * i) = __builtin_convertvector(__builtin_convertvector(rounded, ints8), shorts8);
    }
}

static void digits(const float* x, long tokens, long inputs, const Digits* d) {
    const long groups = (inputs + GROUP - 1) / GROUP, stride = d->stride;
#pragma omp for schedule(static)
    for (long t = 0; t < stride; t++)
        for (long g = 0; g < groups; g++) {
            float last[GROUP] = {0};
            const float* from = x + t * inputs + g * GROUP;
            float* sum = d->sums + g * stride + t;
            if (t >= tokens) {  // INT4 takes the sums of eight tokens at a time
                *sum = 0;
                continue;
            }
            if (inputs - g * GROUP < GROUP) from = memcpy(last, from, (inputs - g * GROUP) * sizeof(float));
            digits_of_group(from, d->q + (t * groups + g) * GROUP, d->scales + t * groups + g, sum);
        }
}

// One output for one token, straight from the stored row.
static float product(const Affine* w, long output, const float* x, const Digits* d, long token) {
    const void* row = row_of(w, output);
    const long groups = groups_of(w), stride = d->stride;
    if (w->kind == FLOAT32) return dot(row, x, w->inputs);
    if (w->kind == BFLOAT16) {
        const uint16_t* h = row;
        vec sums[4] = {0};
        long k = 0;
        float rest = 0;
        for (; k + 4 * LANES <= w->inputs; k += 4 * LANES) {
            __builtin_prefetch(h + k + AHEAD / 2);
            for (int i = 0; i < 4; i++) sums[i] += widen(h + k + i * LANES) * load(x + k + i * LANES);
        }
        for (; k < w->inputs; k++) rest += widen_one(h[k]) * x[k];
        return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }
    const int16_t* q = d->q + token * groups * GROUP;
    const float* scales = d->scales + token * groups;
    vec8 sums[2] = {0};
    if (w->kind == INT8) {
        const int8_t* b = row;
        for (long g = 0; g < groups; g++, b += GROUP, q += GROUP) {
            __builtin_prefetch(b + AHEAD);
            sums[g & 1] +=
                floats(pairs(signed_bytes(b), load16(q)) + pairs(signed_bytes(b + 16), load16(q + 16))) * scales[g];
        }
        return total8(sums[0] + sums[1]) * w->scales[output];
    }
    const uint8_t* b = row;
    const float *own = w->scales + output * groups, *offsets = own + w->outputs * groups;
    float rest = 0;
    for (long g = 0; g < groups; g++, b += GROUP / 2, q += GROUP) {
        __builtin_prefetch(b + AHEAD);
        const shorts two = unsigned_bytes(b);
        sums[g & 1] += floats(pairs(two & 15, load16(q)) + pairs(two >> 4, load16(q + 16))) * (scales[g] * own[g]);
        rest += offsets[g] * d->sums[g * stride + token];
    }
    return total8(sums[0] + sums[1]) + rest;
}

// Rows of weights as the tiles take them: float32, or 16-bit integers.
static const void* unpack(const Affine* w, long first, long count, void* scratch) {
    const long inputs = w->inputs, groups = groups_of(w);
    if (w->kind == FLOAT32) return row_of(w, first);
    for (long o = 0; o < count; o++) {
        const void* row = row_of(w, first + o);
        if (w->kind == BFLOAT16) {
            float* out = (float*)scratch + o * inputs;
            long k = 0;
            for (; k + LANES <= inputs; k += LANES) *(vec*)(out + k) = widen((const uint16_t*)row + k);
            for (; k < inputs; k++) out[k] = widen_one(((const uint16_t*)row)[k]);
            continue;
        }
        int16_t* out = (int16_t*)scratch + o * groups * GROUP;
        for (long g = 0; g < groups; g++, out += GROUP) {
            if (w->kind == INT8) {
                *(shorts*)out = signed_bytes((const int8_t*)row + g * GROUP);
                *(shorts*)(out + 16) = signed_bytes((const int8_t*)row + g * GROUP + 16);
            } else {
                const shorts two = unsigned_bytes((const uint8_t*)row + g * GROUP / 2);
                *(shorts*)out = two & 15;
                *(shorts*)(out + 16) = two >> 4;
            }
        }
    }
    return scratch;
}

// out[output][token] of a tile; w: FLOATS rows, x: TOKENS rows, each `inputs` apart.
static inline void tile_of_floats(const float* w, const float* x, long inputs, float out[][TOKENS]) {
    vec sums[FLOATS][TOKENS] = {0};
    long k = 0;
    for (; k + LANES <= inputs; k += LANES)
        for (int t = 0; t < TOKENS; t++) {
            const vec xs = load(x + t * inputs + k);
            for (int o = 0; o < FLOATS; o++) sums[o][t] += load(w + o * inputs + k) * xs;
        }
    for (int o = 0; o < FLOATS; o++)
        for (int t = 0; t < TOKENS; t++) {
            float rest = 0;
            for (long i = k; i < inputs; i++) rest += w[o * inputs + i] * x[t * inputs + i];
            out[o][t] = total(sums[o][t]) + rest;
        }
}

// The same for INTEGERS rows. own: their scales (INTEGERS, groups), for INT4.
static inline void tile_of_integers(const int16_t* w, const float* own, const int16_t* q, const float* scales, long groups,
                                    float out[][TOKENS]) {
    const long inputs = groups * GROUP;
    vec8 sums[INTEGERS][TOKENS] = {0};
    for (long g = 0, k = 0; g < groups; g++, k += GROUP)
        for (int o = 0; o < INTEGERS; o++)
            for (int t = 0; t < TOKENS; t++) {
                const int16_t *a = w + o * inputs + k, *b = q + t * inputs + k;
                vec8 sum = floats(pairs(load16(a), load16(b)) + pairs(load16(a + 16), load16(b + 16)));
                if (own != NULL) sum *= own[o * groups + g];
                sums[o][t] += sum * scales[t * groups + g];
            }
    for (int o = 0; o < INTEGERS; o++)
        for (int t = 0; t < TOKENS; t++) out[o][t] = total8(sums[o][t]);
}

// What the offsets of INT4 add: out (count, stride).
static void add_offsets(const Affine* w, long first, long count, const Digits* d, float* out) {
    const long groups = groups_of(w);
    const float* offsets = w->scales + (w->outputs + first) * groups;
    for (long o = 0; o < count; o++)
        for (long t = 0; t < d->stride; t += 8) {
            vec8 sum = {0};
            for (long g = 0; g < groups; g++) sum += *(const vec8*)(d->sums + g * d->stride + t) * offsets[o * groups + g];
            *(vec8*)(out + o * d->stride + t) = sum;
        }
}

// y (tokens, outputs) for all tokens of a block of a tile's outputs; scratch holds its rows unpacked. The tokens that are left
// over, and all where the block is not whole, go one by one.
static void block_of(const Affine* w, long first, long count, const float* x, const Digits* d, float* y, long tokens,
                     void* scratch) {
    const int integers = w->kind >= INT8, whole = count == (integers ? INTEGERS : FLOATS) && tokens >= TOKENS;
    const long groups = groups_of(w), last = first + 2 * count <= w->outputs ? first + 2 * count : w->outputs;
    const char *next = row_of(w, first + count), *end = row_of(w, last);
    const long share = (end - next) / (tokens / TOKENS + 1) + 64;
    float offsets[INTEGERS * padded(tokens)];
    long t = 0;
    if (whole) {
        const void* rows = unpack(w, first, count, scratch);
        if (w->kind == INT4) add_offsets(w, first, count, d, offsets);
        for (; t + TOKENS <= tokens; t += TOKENS) {
            float out[INTEGERS][TOKENS];
            for (const char* stop = next + share; next < stop && next < end; next += 64) __builtin_prefetch(next, 0, 2);
            const int16_t* q = d->q + t * groups * GROUP;
            if (!integers)
                tile_of_floats(rows, x + t * w->inputs, w->inputs, out);
            else if (w->kind == INT8)
                tile_of_integers(rows, NULL, q, d->scales + t * groups, groups, out);
            else
                tile_of_integers(rows, w->scales + first * groups, q, d->scales + t * groups, groups, out);
            for (int o = 0; o < count; o++)
                for (int i = 0; i < TOKENS; i++) {
                    const float sum = w->kind == INT8   ? out[o][i] * w->scales[first + o]
                                      : w->kind == INT4 ? out[o][i] + offsets[o * d->stride + t + i]
                                                        : out[o][i];
                    y[(t + i) * w->outputs + first + o] = sum + (w->bias ? w->bias[first + o] : 0);
                }
        }
    }
    for (; t < tokens; t++)
        for (long o = first; o < first + count; o++)
            y[t * w->outputs + o] = product(w, o, x + t * w->inputs, d, t) + (w->bias ? w->bias[o] : 0);
}

static void multiply(const Affine* w, const float* x, float* y, long tokens, const Digits* d) {
    const long size = w->kind >= INT8 ? INTEGERS : FLOATS;
    void* scratch = tokens < TOKENS || w->kind == FLOAT32 ? NULL : reserve(size * groups_of(w) * GROUP * sizeof(float));
    if (w->kind >= INT8) digits(x, tokens, w->inputs, d);
#pragma omp for schedule(dynamic, 8)
    for (long first = 0; first < w->outputs; first += size)
        block_of(w, first, w->outputs - first < size ? w->outputs - first : size, x, d, y, tokens, scratch);
    free(scratch);
}
