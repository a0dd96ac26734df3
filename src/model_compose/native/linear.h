// Products with weights as they are stored, and what they need: inputs rounded to integers, rows of weights unpacked.

#pragma once

#include "memory.h"
#include "vectors.h"

enum { GROUP = 32 };                            // inputs that share a scale
enum { FLOATS = 6, INTEGERS = 8, TOKENS = 2 };  // a tile has this many outputs × TOKENS; their sums fit into registers
enum { AHEAD = 2048 };  // bytes that we fetch ahead, since the processor's own prefetching stops at the end of a page

#define NOT_INLINED __attribute__((noinline))  // a tile that is compiled on its own is faster

// output = input Wᵀ + bias. bias (outputs), or NULL. weight (outputs, inputs), one row after the other, is of one of four
// kinds:
//   FLOAT32, BFLOAT16: as they are.
//   INT8: each row is filled up with zeros to whole groups. scales (outputs): w = number · scale.
//   INT4: two inputs in a byte. A group of 32 inputs has 16 bytes; byte i holds input i in its low half and input i + 16
//     in its high half. scales (2, outputs, groups): all scales, then all offsets: w = number · scale + offset.
typedef struct {
    int64_t kind, outputs, inputs;
    const void* weight;
    const float *scales, *bias;
} Affine;

static long groups_in(long inputs) { return (inputs + GROUP - 1) / GROUP; }

static const void* weight_row(const Affine* affine, long output) {
    const long bytes = affine->kind == FLOAT32    ? 4 * affine->inputs
                       : affine->kind == BFLOAT16 ? 2 * affine->inputs
                       : affine->kind == INT8     ? groups_in(affine->inputs) * GROUP
                                                  : affine->inputs / 2;
    return (const char*)affine->weight + output * bytes;
}

// An input in 16-bit integers, which weights of integers are multiplied by. Each group of a token has a scale of its
// own: input ≈ numbers · scale, with an error of 2⁻¹⁶ of the group's largest number. numbers (tokens, groups · GROUP);
// scales (tokens, groups); sums (groups, stride): of the input over each group, which the offsets of INT4 are
// multiplied by.
typedef struct {
    int16_t* numbers;
    float *scales, *sums;
    long stride;
} Rounded;

// What products need beside their input and output. tiles: a part for each thread, of tile_bytes each, which holds a
// tile's rows of weights unpacked and, behind rows_bytes, what the offsets of INT4 add to the tile's outputs.
typedef struct {
    Rounded rounded;
    char* tiles;
    long tile_bytes, rows_bytes;
} ProductMemory;

static long padded(long tokens) {
    return tokens == 1 ? 1 : (tokens + 7) / 8 * 8;
}  // we add sums of eight tokens at once

// For products of so many tokens with at most so many inputs. What the system had no memory for is NULL.
static ProductMemory reserve_products(long tokens, long inputs) {
    const long groups = groups_in(inputs), stride = padded(tokens);
    // FLOATS rows of 4 bytes a number; INTEGERS rows of 2 bytes a number are smaller.
    const long rows = tokens < TOKENS ? 0 : groups * GROUP * FLOATS * (long)sizeof(float);
    const long offsets = INTEGERS * stride * (long)sizeof(float);
    const long tile_bytes = (rows + offsets + 127) / 64 * 64;  // whole cache lines: threads must not share one
    const Rounded rounded = {reserve(tokens * groups * GROUP * 2), reserve(tokens * groups * 4),
                             reserve(stride * groups * 4), stride};
    return (ProductMemory){rounded, reserve(threads * tile_bytes), tile_bytes, rows};
}
static int has_products(const ProductMemory* memory) {
    return memory->rounded.numbers && memory->rounded.scales && memory->rounded.sums && memory->tiles;
}
static void free_products(const ProductMemory* memory) {
    free(memory->rounded.numbers), free(memory->rounded.scales), free(memory->rounded.sums), free(memory->tiles);
}

static void round_group(const float* input, int16_t* numbers, float* scale, float* sum) {
    floats8 most = {0};
    const floats8 parts[4] = {*(const floats8*)input, *(const floats8*)(input + 8), *(const floats8*)(input + 16),
                              *(const floats8*)(input + 24)};
    for (int i = 0; i < 4; i++) {
        const floats8 size = (floats8)((ints8)parts[i] & 0x7fffffff);  // without its sign
        const ints8 larger = size > most;
        most = (floats8)(((ints8)size & larger) | ((ints8)most & ~larger));
    }
    float greatest = 0;
    for (int i = 0; i < 8; i++) greatest = most[i] > greatest ? most[i] : greatest;
    *sum = total8((parts[0] + parts[1]) + (parts[2] + parts[3]));
    *scale =
        greatest / 32767 + (*sum - *sum);  // an input that is not finite makes the scale, and so the output, not finite
    const float inverse = greatest > 1e-30f ? 32767 / greatest : 0;
    for (int i = 0; i < 4; i++) {
        const floats8 rounded = (parts[i] * inverse + ROUNDER) - ROUNDER;
        *(shorts8*)(numbers + 8 * i) = __builtin_convertvector(__builtin_convertvector(rounded, ints8), shorts8);
    }
}

// Rounds input (tokens, inputs).
static void round_input(const float* input, long tokens, long inputs, const Rounded* rounded) {
    const long groups = groups_in(inputs), stride = rounded->stride;
#pragma omp for schedule(static)
    for (long token = 0; token < stride; token++)
        for (long g = 0; g < groups; g++) {
            float filled_up[GROUP] = {0};
            const float* from = input + token * inputs + g * GROUP;
            float* sum = rounded->sums + g * stride + token;
            if (token >= tokens) {  // add_offsets reads the sums of eight tokens at a time
                *sum = 0;
                continue;
            }
            if (inputs - g * GROUP < GROUP) from = memcpy(filled_up, from, (inputs - g * GROUP) * sizeof(float));
            const long group = token * groups + g;
            round_group(from, rounded->numbers + group * GROUP, rounded->scales + group, sum);
        }
}

// One output of one token, without the bias, computed from the weights as they are stored.
static float one_output(const Affine* affine, long output, const float* input, const Rounded* rounded, long token) {
    const void* row = weight_row(affine, output);
    const long inputs = affine->inputs, groups = groups_in(inputs), stride = rounded->stride;
    if (affine->kind == FLOAT32) return dot(row, input, inputs);
    if (affine->kind == BFLOAT16) {
        const uint16_t* weights = row;
        floats sums[4] = {0};
        long k = 0;
        float rest = 0;
        for (; k + 4 * LANES <= inputs; k += 4 * LANES) {
            __builtin_prefetch(weights + k + AHEAD / 2);
            for (int i = 0; i < 4; i++) sums[i] += load_bfloats(weights + k + i * LANES) * load(input + k + i * LANES);
        }
        for (; k < inputs; k++) rest += widen(weights[k]) * input[k];
        return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }
    const int16_t* numbers = rounded->numbers + token * groups * GROUP;
    const float* input_scales = rounded->scales + token * groups;
    floats8 sums[2] = {0};
    if (affine->kind == INT8) {
        const int8_t* weights = row;
        for (long g = 0; g < groups; g++, weights += GROUP, numbers += GROUP) {
            __builtin_prefetch(weights + AHEAD);
            sums[g & 1] += to_floats(multiply_pairs(load_signed_bytes(weights), load_shorts(numbers)) +
                                     multiply_pairs(load_signed_bytes(weights + 16), load_shorts(numbers + 16))) *
                           input_scales[g];
        }
        return total8(sums[0] + sums[1]) * affine->scales[output];
    }
    const uint8_t* weights = row;
    const float *scales = affine->scales + output * groups, *offsets = scales + affine->outputs * groups;
    float rest = 0;
    for (long g = 0; g < groups; g++, weights += GROUP / 2, numbers += GROUP) {
        __builtin_prefetch(weights + AHEAD);
        const shorts16 both = load_unsigned_bytes(weights);
        sums[g & 1] += to_floats(multiply_pairs(both & 15, load_shorts(numbers)) +
                                 multiply_pairs(both >> 4, load_shorts(numbers + 16))) *
                       (input_scales[g] * scales[g]);
        rest += offsets[g] * rounded->sums[g * stride + token];
    }
    return total8(sums[0] + sums[1]) + rest;
}

// `count` rows of weights from `first` on, as the tiles take them: float32, or integers of 16 bits in whole groups.
// Where the weights are stored otherwise, the rows are unpacked into `room`.
static const void* unpack(const Affine* affine, long first, long count, void* room) {
    const long inputs = affine->inputs, groups = groups_in(inputs);
    if (affine->kind == FLOAT32) return weight_row(affine, first);
    for (long o = 0; o < count; o++) {
        const void* row = weight_row(affine, first + o);
        if (affine->kind == BFLOAT16) {
            const uint16_t* weights = row;
            float* wide = (float*)room + o * inputs;
            long k = 0;
            for (; k + LANES <= inputs; k += LANES) *(floats*)(wide + k) = load_bfloats(weights + k);
            for (; k < inputs; k++) wide[k] = widen(weights[k]);
            continue;
        }
        int16_t* wide = (int16_t*)room + o * groups * GROUP;
        for (long g = 0; g < groups; g++, wide += GROUP) {
            if (affine->kind == INT8) {
                *(shorts16*)wide = load_signed_bytes((const int8_t*)row + g * GROUP);
                *(shorts16*)(wide + 16) = load_signed_bytes((const int8_t*)row + g * GROUP + 16);
            } else {
                const shorts16 both = load_unsigned_bytes((const uint8_t*)row + g * GROUP / 2);
                *(shorts16*)wide = both & 15;
                *(shorts16*)(wide + 16) = both >> 4;
            }
        }
    }
    return room;
}

// results[output][token] of a tile. rows: FLOATS rows of weights; input: TOKENS tokens; each `inputs` long. As a
// function of its own, since the compiler keeps all sums in registers then.
static NOT_INLINED void tile_of_floats(const float* rows, const float* input, long inputs, float results[][TOKENS]) {
    floats sums[FLOATS][TOKENS] = {0};
    long k = 0;
    for (; k + LANES <= inputs; k += LANES)
        for (int t = 0; t < TOKENS; t++) {
            const floats part = load(input + t * inputs + k);
            for (int o = 0; o < FLOATS; o++) sums[o][t] += load(rows + o * inputs + k) * part;
        }
    for (int o = 0; o < FLOATS; o++)
        for (int t = 0; t < TOKENS; t++) {
            float rest = 0;
            for (long i = k; i < inputs; i++) rest += rows[o * inputs + i] * input[t * inputs + i];
            results[o][t] = total(sums[o][t]) + rest;
        }
}

// The same for INTEGERS rows of integers. row_scales (INTEGERS, groups) for INT4, or NULL; numbers, input_scales: of
// the tile's first token.
static NOT_INLINED void tile_of_integers(const int16_t* rows, const float* row_scales, const int16_t* numbers,
                                         const float* input_scales, long groups, float results[][TOKENS]) {
    const long inputs = groups * GROUP;
    floats8 sums[INTEGERS][TOKENS] = {0};
    for (long g = 0, k = 0; g < groups; g++, k += GROUP)
        for (int o = 0; o < INTEGERS; o++)
            for (int t = 0; t < TOKENS; t++) {
                const int16_t *weights = rows + o * inputs + k, *input = numbers + t * inputs + k;
                floats8 sum = to_floats(multiply_pairs(load_shorts(weights), load_shorts(input)) +
                                        multiply_pairs(load_shorts(weights + 16), load_shorts(input + 16)));
                if (row_scales != NULL) sum *= row_scales[o * groups + g];
                sums[o][t] += sum * input_scales[t * groups + g];
            }
    for (int o = 0; o < INTEGERS; o++)
        for (int t = 0; t < TOKENS; t++) results[o][t] = total8(sums[o][t]);
}

// What the offsets of INT4 add to `count` outputs from `first` on: added (count, stride).
static void add_offsets(const Affine* affine, long first, long count, const Rounded* rounded, float* added) {
    const long groups = groups_in(affine->inputs), stride = rounded->stride;
    const float* offsets = affine->scales + (affine->outputs + first) * groups;
    for (long o = 0; o < count; o++)
        for (long t = 0; t < stride; t += 8) {
            floats8 sum = {0};
            for (long g = 0; g < groups; g++)
                sum += *(const floats8*)(rounded->sums + g * stride + t) * offsets[o * groups + g];
            *(floats8*)(added + o * stride + t) = sum;
        }
}

// `count` outputs from `first` on, for all tokens. Tiles take as many outputs as they have, and TOKENS tokens at a
// time; what is left over, and all tokens where there are fewer outputs, goes one by one. Meanwhile the next rows of
// weights are fetched.
static void multiply_block(const Affine* affine, long first, long count, const float* input, float* output, long tokens,
                           const ProductMemory* memory) {
    const Rounded* rounded = &memory->rounded;
    const long inputs = affine->inputs, outputs = affine->outputs, groups = groups_in(inputs), stride = rounded->stride;
    const int integers = affine->kind >= INT8;
    const int whole = count == (integers ? INTEGERS : FLOATS) && tokens >= TOKENS;
    const long last = first + 2 * count <= outputs ? first + 2 * count : outputs;
    const char *next = weight_row(affine, first + count), *end = weight_row(affine, last);
    const long share = (end - next) / (tokens / TOKENS + 1) + 64;  // bytes to fetch during one tile
    char* room = memory->tiles + omp_get_thread_num() * memory->tile_bytes;
    float* added = (float*)(room + memory->rows_bytes);
    long token = 0;
    if (whole) {
        const void* rows = unpack(affine, first, count, room);
        if (affine->kind == INT4) add_offsets(affine, first, count, rounded, added);
        for (; token + TOKENS <= tokens; token += TOKENS) {
            float results[INTEGERS][TOKENS];
            for (const char* stop = next + share; next < stop && next < end; next += 64) __builtin_prefetch(next, 0, 2);
            const int16_t* numbers = rounded->numbers + token * groups * GROUP;
            const float* input_scales = rounded->scales + token * groups;
            if (!integers)
                tile_of_floats(rows, input + token * inputs, inputs, results);
            else if (affine->kind == INT8)
                tile_of_integers(rows, NULL, numbers, input_scales, groups, results);
            else
                tile_of_integers(rows, affine->scales + first * groups, numbers, input_scales, groups, results);
            for (int o = 0; o < count; o++)
                for (int t = 0; t < TOKENS; t++) {
                    const float sum = affine->kind == INT8   ? results[o][t] * affine->scales[first + o]
                                      : affine->kind == INT4 ? results[o][t] + added[o * stride + token + t]
                                                             : results[o][t];
                    output[(token + t) * outputs + first + o] = sum + (affine->bias ? affine->bias[first + o] : 0);
                }
        }
    }
    for (; token < tokens; token++)
        for (long o = first; o < first + count; o++)
            output[token * outputs + o] =
                one_output(affine, o, input + token * inputs, rounded, token) + (affine->bias ? affine->bias[o] : 0);
}

// output (tokens, outputs) = input (tokens, inputs) Wᵀ + bias.
static void multiply(const Affine* affine, const float* input, float* output, long tokens,
                     const ProductMemory* memory) {
    const long size = affine->kind >= INT8 ? INTEGERS : FLOATS;
    if (affine->kind >= INT8) round_input(input, tokens, affine->inputs, &memory->rounded);
#pragma omp for schedule(dynamic, 8)
    for (long first = 0; first < affine->outputs; first += size)
        multiply_block(affine, first, affine->outputs - first < size ? affine->outputs - first : size, input, output,
                       tokens, memory);
}
