// Attention of a step in which each row has one new token, over the rows of the KV cache.

#pragma once

#include "vectors.h"

// A head's rotary position, with its norm before that where weight is given. cosine, sine: (dim); rotating halves is a swap,
// with the first half's sign in the sine.
static void rotate(const float* in, const float* cosine, const float* sine, const float* weight, float eps, long dim,
                   float* out) {
    float head[dim];
    const float scale = weight ? 1 / sqrtf(dot(in, in, dim) / dim + eps) : 1;
    for (long i = 0; i < dim; i++) head[i] = in[i] * scale * (weight ? weight[i] : 1);
    const long half = dim / 2;
    for (long i = 0; i < half; i++) {
        out[i] = head[i] * cosine[i] + head[i + half] * sine[i];
        out[i + half] = head[i + half] * cosine[i + half] + head[i] * sine[i + half];
    }
}

static void put(void* kept, int kind, long at, const float* values, long dim) {
    if (kind == FLOAT32)
        memcpy((float*)kept + at, values, dim * sizeof(float));
    else
        for (long i = 0; i < dim; i++) ((uint16_t*)kept + at)[i] = narrow(values[i]);
}

static const float* get(const void* kept, int kind, long at, long dim, float* scratch) {
    if (kind == FLOAT32) return (const float*)kept + at;
    const uint16_t* h = (const uint16_t*)kept + at;
    long k = 0;
    for (; k + LANES <= dim; k += LANES) *(vec*)(scratch + k) = widen(h + k);
    for (; k < dim; k++) scratch[k] = widen_one(h[k]);
    return scratch;
}

static void softmax(float* line, long n) {
    float most = line[0], sum = 0;
    vec sums = {0};
    long k = 0;
    for (long i = 1; i < n; i++) most = line[i] > most ? line[i] : most;
    for (; k + LANES <= n; k += LANES) sums += *(vec*)(line + k) = exponential(load(line + k) - most);
    for (; k < n; k++) sum += line[k] = expf(line[k] - most);
    sum = 1 / (sum + total(sums));
    for (long i = 0; i < n; i++) line[i] *= sum;
}

// Of all layers. heads: of queries; groups: of keys and of values; dim: of a head; eps: of the norms.
typedef struct {
    int64_t heads, groups, dim;
    float eps, scaling;
} Shape;

// Tokens at..at+count-1 of a step, one for each of the rows first..first+count-1 of a block of the KV cache: keys[layer] and
// values[layer] (rows, groups, capacity, dim) of `kind`; starts (count): what each row has cached.
typedef struct {
    int64_t at, count, first, capacity, kind;
    const int64_t* starts;
    void *const *keys, *const *values;
} Run;

// Stores the tokens' keys and values, then attends. qkv (tokens, (heads + 2 · groups) · dim); cosine, sine (tokens, dim); norms
// ((heads + groups), dim) or NULL; window: how far back a token looks, 0 for all; out (tokens, heads · dim). Its threads do
// not wait for each other behind it.
static void attend_run(const Run* run, long layer, const Shape* shape, const float* norms, long window, const float* qkv,
                       const float* cosine, const float* sine, float* out) {
    const long heads = shape->heads, groups = shape->groups, dim = shape->dim, shared = heads / groups;
    void *keys = run->keys[layer], *values = run->values[layer];
#pragma omp for schedule(dynamic) nowait
    for (long job = 0; job < run->count * groups; job++) {
        const long g = job % groups, t = run->at + job / groups, start = run->starts[job / groups], end = start + 1;
        const long begin = window && end > window ? end - window : 0;
        const long row = ((run->first + job / groups) * groups + g) * run->capacity * dim;
        const float *in = qkv + t * (heads + 2 * groups) * dim, *c = cosine + t * dim, *s = sine + t * dim;
        float scratch[dim], q[shared * dim];
        float* scores = malloc(shared * (end - begin) * sizeof(float));
        rotate(in + (heads + g) * dim, c, s, norms ? norms + (heads + g) * dim : NULL, shape->eps, dim, scratch);
        put(keys, run->kind, row + start * dim, scratch, dim);
        put(values, run->kind, row + start * dim, in + (heads + groups + g) * dim, dim);
        for (long h = 0; h < shared; h++) {
            const long head = g * shared + h;
            rotate(in + head * dim, c, s, norms ? norms + head * dim : NULL, shape->eps, dim, q + h * dim);
        }
        for (long k = begin; k < end; k++) {
            const float* key = get(keys, run->kind, row + k * dim, dim, scratch);
            for (long h = 0; h < shared; h++)
                scores[h * (end - begin) + k - begin] = dot(q + h * dim, key, dim) * shape->scaling;
        }
        for (long h = 0; h < shared; h++) softmax(scores + h * (end - begin), end - begin);
        float* to = out + (t * heads + g * shared) * dim;
        memset(to, 0, shared * dim * sizeof(float));
        for (long k = begin; k < end; k++) {
            const float* value = get(values, run->kind, row + k * dim, dim, scratch);
            for (long h = 0; h < shared; h++) {
                const float share = scores[h * (end - begin) + k - begin];
#pragma omp simd
                for (long i = 0; i < dim; i++) to[h * dim + i] += share * value[i];
            }
        }
        free(scores);
    }
}
