// The live adapters' part of a product.

#pragma once

#include "vectors.h"

// What adapters add to a product: ((x Aᵀ) ⊙ v) B. a (rank, inputs), b (rank, outputs); v (tokens, rank) is the layout's.
typedef struct {
    const float *a, *b;
    int64_t rank, layout;
} Stack;

// z (tokens, rank): scratch. What is 0 in v is an adapter of another row, and nothing is computed for it.
static void add_stack(const Stack* s, const float* v, const float* x, float* y, long tokens, long inputs, long outputs,
                      float* z) {
    const long rank = s->rank, chunk = 256, chunks = (outputs + chunk - 1) / chunk;
#pragma omp for schedule(dynamic, 16)
    for (long i = 0; i < tokens * rank; i++)
        z[i] = v[i] == 0 ? 0 : v[i] * dot(x + i / rank * inputs, s->a + i % rank * inputs, inputs);
#pragma omp for schedule(static)
    for (long job = 0; job < tokens * chunks; job++) {
        const long t = job / chunks, first = job % chunks * chunk, end = first + chunk < outputs ? first + chunk : outputs;
        const float* zs = z + t * rank;
        float* to = y + t * outputs;
        for (long r = 0; r < rank; r += 4) {  // four at once read and write y once
            float share[4] = {0};
            const float* from[4];
            for (int i = 0; i < 4; i++) {
                from[i] = s->b + (r + i < rank ? r + i : r) * outputs;
                if (r + i < rank) share[i] = zs[r + i];
            }
            if (share[0] == 0 && share[1] == 0 && share[2] == 0 && share[3] == 0) continue;
#pragma omp simd
            for (long o = first; o < end; o++)
                to[o] += share[0] * from[0][o] + share[1] * from[1][o] + share[2] * from[2][o] + share[3] * from[3][o];
        }
    }
}
