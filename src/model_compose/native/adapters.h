// What the live adapters add to a product.

#pragma once

#include "vectors.h"

// The factors of all adapters in use at one module, one adapter's ranks after the other's: a (rank, inputs), b (rank,
// outputs). They add ((x Aᵀ) ⊙ v) B to the product, where v (tokens, rank) holds each token's weight times the
// adapter's scaling. layout: which of a step's v belongs to this stack.
typedef struct {
    const float *a, *b;
    int64_t rank, layout;
} Stack;

enum { COLUMNS = 256 };  // outputs that a thread takes at a time

// output (tokens, outputs) += ((input Aᵀ) ⊙ v) B. middle (tokens, rank) is scratch memory for (input Aᵀ) ⊙ v.
// v = 0 means that this token does not use the adapter, so we compute nothing for it.
static void add_stack(const Stack* stack, const float* v, const float* input, float* output, long tokens, long inputs,
                      long outputs, float* middle) {
    const long rank = stack->rank, chunks = (outputs + COLUMNS - 1) / COLUMNS;
#pragma omp for schedule(dynamic, 16)
    for (long i = 0; i < tokens * rank; i++)
        middle[i] = v[i] == 0 ? 0 : v[i] * dot(input + i / rank * inputs, stack->a + i % rank * inputs, inputs);
#pragma omp for schedule(static)
    for (long job = 0; job < tokens * chunks; job++) {
        const long token = job / chunks, first = job % chunks * COLUMNS;
        const long end = first + COLUMNS < outputs ? first + COLUMNS : outputs;
        const float* factors = middle + token * rank;
        float* sums = output + token * outputs;
        for (long r = 0; r < rank;
             r += 4) {  // four rows of B at once, so that `sums` is read and written once for them
            float factor[4] = {0};
            const float* row[4];
            for (int i = 0; i < 4; i++) {
                row[i] = stack->b + (r + i < rank ? r + i : r) * outputs;
                if (r + i < rank) factor[i] = factors[r + i];
            }
            if (factor[0] == 0 && factor[1] == 0 && factor[2] == 0 && factor[3] == 0) continue;
#pragma omp simd
            for (long o = first; o < end; o++)
                sums[o] +=
                    factor[0] * row[0][o] + factor[1] * row[1][o] + factor[2] * row[2][o] + factor[3] * row[3][o];
        }
    }
}
