// Attention for rows that have one new token each, over what the KV cache holds of them.

#pragma once

#include "memory.h"
#include "vectors.h"

// The sizes of attention, the same in all layers. heads: of the queries; key_heads: of the keys, and of the values;
// size: of one head; eps: of the norms; scaling: what each inner product of a query and a key is multiplied by.
typedef struct {
    int64_t heads, key_heads, size;
    float eps, scaling;
} Heads;

// Rows of the KV cache that lie one behind the other in a block, and their new tokens. The step's tokens first_token to
// first_token + count - 1 belong to the block's rows first_row to first_row + count - 1. cached (count): how many
// tokens each row had before this step. keys[layer] and values[layer]: (rows, key_heads, capacity, size) each, stored
// as `kind`.
typedef struct {
    int64_t first_token, count, first_row, capacity, kind;
    const int64_t* cached;
    void *const *keys, *const *values;
} CacheRows;

// What one thread needs for the query heads that share a key head. queries (shared, size); line (size): a key or a
// value in float32; scores (shared, the longest row).
typedef struct {
    float *queries, *line, *scores;
} AttentionScratch;

// Of all threads; each finds its own part. bytes: of one part.
typedef struct {
    char* memory;
    long bytes, shared, size;
} AttentionMemory;

static long longest_of(const CacheRows* groups, long count) {
    long longest = 0;
    for (const CacheRows* rows = groups; rows < groups + count; rows++)
        for (long i = 0; i < rows->count; i++)
            if (rows->cached[i] + 1 > longest) longest = rows->cached[i] + 1;
    return longest;
}

static AttentionMemory reserve_attention(const Heads* heads, long longest) {
    const long shared = heads->heads / heads->key_heads;
    const long numbers = shared * heads->size + heads->size + shared * longest;
    const long bytes =
        (numbers * (long)sizeof(float) + 127) / 64 * 64;  // whole cache lines: threads must not share one
    return (AttentionMemory){reserve(threads * bytes), bytes, shared, heads->size};
}

static AttentionScratch part_of_attention(const AttentionMemory* all) {
    float* queries = (float*)(all->memory + omp_get_thread_num() * all->bytes);
    float* line = queries + all->shared * all->size;
    return (AttentionScratch){queries, line, line + all->size};
}

// A head's numbers, rotated to their position (RoPE): the two halves change places, and `sine` already carries the
// minus sign of the first half. Where a norm's weight is given, the head is normalised first. input, output, cosine,
// sine, weight: (size).
static void rotate(const float* input, const float* cosine, const float* sine, const float* weight, float eps,
                   long size, float* output) {
    float head[size];
    const float scale = weight ? 1 / sqrtf(dot(input, input, size) / size + eps) : 1;
    for (long i = 0; i < size; i++) head[i] = input[i] * scale * (weight ? weight[i] : 1);
    const long half = size / 2;
    for (long i = 0; i < half; i++) {
        output[i] = head[i] * cosine[i] + head[i + half] * sine[i];
        output[i + half] = head[i + half] * cosine[i + half] + head[i] * sine[i + half];
    }
}

// Writes a head's key or value into the cache, `at` numbers behind its start.
static void store(void* cache, int kind, long at, const float* numbers, long size) {
    if (kind == FLOAT32)
        memcpy((float*)cache + at, numbers, size * sizeof(float));
    else
        for (long i = 0; i < size; i++) ((uint16_t*)cache + at)[i] = narrow(numbers[i]);
}

// A head's key or value in float32: in the cache itself, or widened into `line`.
static const float* fetch(const void* cache, int kind, long at, long size, float* line) {
    if (kind == FLOAT32) return (const float*)cache + at;
    const uint16_t* stored = (const uint16_t*)cache + at;
    long k = 0;
    for (; k + LANES <= size; k += LANES) *(floats*)(line + k) = load_bfloats(stored + k);
    for (; k < size; k++) line[k] = widen(stored[k]);
    return line;
}

static void softmax(float* scores, long count) {
    float most = scores[0], sum = 0;
    floats sums = {0};
    long k = 0;
    for (long i = 1; i < count; i++) most = scores[i] > most ? scores[i] : most;
    for (; k + LANES <= count; k += LANES) sums += *(floats*)(scores + k) = exponential(load(scores + k) - most);
    for (; k < count; k++) sum += scores[k] = expf(scores[k] - most);
    sum = 1 / (sum + total(sums));
    for (long i = 0; i < count; i++) scores[i] *= sum;
}

// Stores the new tokens' keys and values in the cache, then computes their attention. One job is one row and one key
// head with all query heads that share it. qkv (tokens, (heads + 2 · key_heads) · size): queries, then keys, then
// values. cosine, sine (tokens, size). norms (heads + key_heads, size), or NULL where queries and keys are not
// normalised. window: how many tokens back a token looks, itself included; 0 for all. output (tokens, heads · size).
// Threads do not wait for each other at the end of this function.
static void attend_rows(const CacheRows* rows, long layer, const Heads* heads, const float* norms, long window,
                        const float* qkv, const float* cosine, const float* sine, float* output,
                        const AttentionMemory* memory) {
    const long query_heads = heads->heads, key_heads = heads->key_heads, size = heads->size;
    const long shared = query_heads / key_heads;
    void *keys = rows->keys[layer], *values = rows->values[layer];
    const AttentionScratch own = part_of_attention(memory);
#pragma omp for schedule(dynamic) nowait
    for (long job = 0; job < rows->count * key_heads; job++) {
        const long key_head = job % key_heads, number = job / key_heads, token = rows->first_token + number;
        const long cached = rows->cached[number], end = cached + 1;
        const long begin = window && end > window ? end - window : 0, length = end - begin;
        const long in_cache = ((rows->first_row + number) * key_heads + key_head) * rows->capacity * size;
        const float* input = qkv + token * (query_heads + 2 * key_heads) * size;
        const float *turn_cosine = cosine + token * size, *turn_sine = sine + token * size;

        // The new key is rotated to its position; the value is stored as it is.
        const float* key_norm = norms ? norms + (query_heads + key_head) * size : NULL;
        rotate(input + (query_heads + key_head) * size, turn_cosine, turn_sine, key_norm, heads->eps, size, own.line);
        store(keys, rows->kind, in_cache + cached * size, own.line, size);
        store(values, rows->kind, in_cache + cached * size, input + (query_heads + key_heads + key_head) * size, size);

        // The queries are rotated, too.
        for (long h = 0; h < shared; h++) {
            const long head = key_head * shared + h;
            rotate(input + head * size, turn_cosine, turn_sine, norms ? norms + head * size : NULL, heads->eps, size,
                   own.queries + h * size);
        }

        // Scores: how much each query looks at each earlier token and at its own, as parts of 1.
        for (long k = begin; k < end; k++) {
            const float* key = fetch(keys, rows->kind, in_cache + k * size, size, own.line);
            for (long h = 0; h < shared; h++)
                own.scores[h * length + k - begin] = dot(own.queries + h * size, key, size) * heads->scaling;
        }
        for (long h = 0; h < shared; h++) softmax(own.scores + h * length, length);

        // The output is the sum of the values, each times its score.
        float* sums = output + (token * query_heads + key_head * shared) * size;
        memset(sums, 0, shared * size * sizeof(float));
        for (long k = begin; k < end; k++) {
            const float* value = fetch(values, rows->kind, in_cache + k * size, size, own.line);
            for (long h = 0; h < shared; h++) {
                const float score = own.scores[h * length + k - begin];
#pragma omp simd
                for (long i = 0; i < size; i++) sums[h * size + i] += score * value[i];
            }
        }
    }
}
