// The lean decoder's step on a CPU: all layers of a step that decodes in one call, and products for all others. Such a step
// is bound by reading the weights and by the count of its operations. Activations are float32 throughout, whatever the
// weights are; where these are integers, a product takes them in 16 bits.
// Compiled by __init__.py where there is a C compiler. All pointers are to contiguous memory unless a stride is given.
//
// What the file exports opens a team of threads. The functions below are entered by the whole team: its threads share their
// loops and wait for each other behind them.

#include "adapters.h"
#include "attention.h"
#include "linear.h"

enum { MUCH = 1 << 16 };  // operations from which a second thread pays

static int threads = 1;
void use_threads(long count) { threads = count; }

void linear(const Affine* w, const float* x, float* y, long tokens) {
    const Digits d = reserve_digits(tokens, w->inputs);
#pragma omp parallel num_threads(threads)
    multiply(w, x, y, tokens, &d);
    release(d);
}

// W as float32 (outputs, inputs), from anything else.
void expand(const Affine* w, float* out) {
    const long groups = groups_of(w);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < w->outputs; o++) {
        float* to = out + o * w->inputs;
        if (w->kind < INT8) {
            unpack(w, o, 1, to);
            continue;
        }
        int16_t q[groups * GROUP];
        unpack(w, o, 1, q);
        for (long g = 0; g < groups; g++) {
            const float scale = w->scales[w->kind == INT8 ? o : o * groups + g];
            const float offset = w->kind == INT8 ? 0 : w->scales[(w->outputs + o) * groups + g];
            const long last = w->inputs - g * GROUP < GROUP ? w->inputs - g * GROUP : GROUP;
#pragma omp simd
            for (long i = 0; i < last; i++) to[g * GROUP + i] = q[g * GROUP + i] * scale + offset;
        }
    }
}

void low_rank(const float* x, const float* a, const float* v, const float* b, float* y, long tokens, long inputs, long rank,
              long outputs) {
    const Stack stack = {a, b, rank, 0};
    float* z = reserve(tokens * rank * sizeof(float));
#pragma omp parallel num_threads(threads) if (tokens * rank * (inputs + outputs) > MUCH)
    add_stack(&stack, v, x, y, tokens, inputs, outputs, z);
    free(z);
}

// Attention of a run in a step that has prompts, too.
void attend(const Run* run, long layer, const Shape* shape, const float* norms, long window, const float* qkv,
            const float* cosine, const float* sine, float* out) {
#pragma omp parallel num_threads(threads)
    attend_run(run, layer, shape, norms, window, qkv, cosine, sine, out);
}

// x += y where y is given; out = x / √(mean x² + eps) · weight. (rows, size) each; weight (size)
static void add_norm_of(float* x, const float* y, const float* weight, float* out, long rows, long size, float eps) {
#pragma omp for schedule(static)
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
static void silu_mul_of(const float* gate_up, float* out, long rows, long size) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float* to = out + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES)
            *(vec*)(to + i) = load(gate + i) / (1 + exponential(-load(gate + i))) * load(up + i);
        for (; i < size; i++) to[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

void add_norm(float* x, const float* y, const float* weight, float* out, long rows, long size, float eps) {
#pragma omp parallel num_threads(threads) if (rows * size > MUCH)
    add_norm_of(x, y, weight, out, rows, size, eps);
}

void silu_mul(const float* gate_up, float* out, long rows, long size) {
#pragma omp parallel num_threads(threads) if (rows * size > MUCH)
    silu_mul_of(gate_up, out, rows, size);
}

// A product and what the adapters add to it. scales[layout]: a stack's v.
typedef struct {
    Affine base;
    Stack adapters;
} Projection;

static void project(const Projection* p, const float* const* scales, const float* x, float* y, long tokens, const Digits* d,
                    float* z) {
    multiply(&p->base, x, y, tokens, d);
    if (p->adapters.rank)
        add_stack(&p->adapters, scales[p->adapters.layout], x, y, tokens, p->base.inputs, p->base.outputs, z);
}

// qkv and gate_up: fused. qk_norm: as `norms` in attend_run.
typedef struct {
    const float *norm, *mlp_norm, *qk_norm;
    int64_t window;
    Projection qkv, out, gate_up, down;
} Layer;

static long greater(long a, long b) { return a > b ? a : b; }

// All layers of a step whose tokens are one of each row. x (tokens, size): the embeddings, and scratch; normed (tokens, size):
// the last layer's output, normed by `norm`.
void decode(const Layer* layers, long count, const float* const* scales, const Run* runs, long run_count,
            const Shape* shape, const float* cosine, const float* sine, const float* norm, float* x, float* normed,
            long tokens) {
    const long size = layers->qkv.base.inputs, inner = layers->down.base.inputs, attending = layers->out.base.inputs;
    long rank = 0;
    for (const Layer* l = layers; l < layers + count; l++)
        rank = greater(rank, greater(greater(l->qkv.adapters.rank, l->out.adapters.rank),
                                     greater(l->gate_up.adapters.rank, l->down.adapters.rank)));
    float *qkv = reserve(tokens * layers->qkv.base.outputs * sizeof(float)),
          *attended = reserve(tokens * attending * sizeof(float));
    float *gate_up = reserve(tokens * 2 * inner * sizeof(float)), *gated = reserve(tokens * inner * sizeof(float));
    float *y = reserve(tokens * size * sizeof(float)), *z = reserve(tokens * rank * sizeof(float));
    const Digits d = reserve_digits(tokens, greater(greater(size, inner), attending));
#pragma omp parallel num_threads(threads)
    {
        for (long number = 0; number < count; number++) {
            const Layer* layer = layers + number;
            add_norm_of(x, number ? y : NULL, layer->norm, normed, tokens, size, shape->eps);
            project(&layer->qkv, scales, normed, qkv, tokens, &d, z);
            for (const Run* run = runs; run < runs + run_count; run++)
                attend_run(run, number, shape, layer->qk_norm, layer->window, qkv, cosine, sine, attended);
#pragma omp barrier
            project(&layer->out, scales, attended, y, tokens, &d, z);
            add_norm_of(x, y, layer->mlp_norm, normed, tokens, size, shape->eps);
            project(&layer->gate_up, scales, normed, gate_up, tokens, &d, z);
            silu_mul_of(gate_up, gated, tokens, inner);
            project(&layer->down, scales, gated, y, tokens, &d, z);
        }
        add_norm_of(x, y, norm, normed, tokens, size, shape->eps);
    }
    free(qkv), free(attended), free(gate_up), free(gated), free(y), free(z);
    release(d);
}
