// The functions that Python calls (Kernels in __init__.py). `decode` computes all layers of the lean decoder for a step
// in which each row has one new token; the others are its parts, for steps that also have prompts. Such a step is
// limited by how fast the weights are read and by the count of its operations, so all of it is one call. Activations
// are float32, whatever the weights are; where the weights are integers, a product rounds its input to 16 bits.
//
// Whatever a pointer leads to is contiguous. Comments give shapes with the size that varies fastest last.
//
// Each exported function opens a team of threads. The static functions are entered by the whole team: its threads share
// the loops (`omp for`) and wait for each other at the end of each loop, unless it says `nowait`. The exported
// functions return DONE, or NO_MEMORY or NO_THREADS (memory.h), and then they have changed nothing.

#include <stddef.h>

#include "adapters.h"
#include "attention.h"
#include "linear.h"
#include "memory.h"

// A product and what the adapters in use add to it.
typedef struct {
    Affine base;
    Stack adapters;
} Projection;

// A decoder layer. attention_norm, mlp_norm (size): weights of its two norms. qk_norm: as `norms` of attend_rows.
// window: as there. qkv: the products for queries, keys and values as one; gate_up: those for gate and up as one.
typedef struct {
    const float *attention_norm, *mlp_norm, *qk_norm;
    int64_t window;
    Projection qkv, out, gate_up, down;
} Layer;

// Python has copies of these structs. Each line says how many fields one has, its size, and where each field lies:
// Python compares these numbers with its own before it calls anything.
const int64_t layout_of_affine[] = {6,
                                    sizeof(Affine),
                                    offsetof(Affine, kind),
                                    offsetof(Affine, outputs),
                                    offsetof(Affine, inputs),
                                    offsetof(Affine, weight),
                                    offsetof(Affine, scales),
                                    offsetof(Affine, bias)};
const int64_t layout_of_stack[] = {
    4, sizeof(Stack), offsetof(Stack, a), offsetof(Stack, b), offsetof(Stack, rank), offsetof(Stack, layout)};
const int64_t layout_of_projection[] = {2, sizeof(Projection), offsetof(Projection, base),
                                        offsetof(Projection, adapters)};
const int64_t layout_of_layer[] = {8,
                                   sizeof(Layer),
                                   offsetof(Layer, attention_norm),
                                   offsetof(Layer, mlp_norm),
                                   offsetof(Layer, qk_norm),
                                   offsetof(Layer, window),
                                   offsetof(Layer, qkv),
                                   offsetof(Layer, out),
                                   offsetof(Layer, gate_up),
                                   offsetof(Layer, down)};
const int64_t layout_of_heads[] = {5,
                                   sizeof(Heads),
                                   offsetof(Heads, heads),
                                   offsetof(Heads, key_heads),
                                   offsetof(Heads, size),
                                   offsetof(Heads, eps),
                                   offsetof(Heads, scaling)};
const int64_t layout_of_cache_rows[] = {8,
                                        sizeof(CacheRows),
                                        offsetof(CacheRows, first_token),
                                        offsetof(CacheRows, count),
                                        offsetof(CacheRows, first_row),
                                        offsetof(CacheRows, capacity),
                                        offsetof(CacheRows, kind),
                                        offsetof(CacheRows, cached),
                                        offsetof(CacheRows, keys),
                                        offsetof(CacheRows, values)};

// How many threads each call may use from now on.
void use_threads(long count) { threads = count; }

// output (tokens, outputs) = input (tokens, inputs) Wᵀ + bias.
int linear(const Affine* affine, const float* input, float* output, long tokens) {
    const ProductMemory memory = reserve_products(tokens, affine->inputs);
    const long team = whole_team();
    const int result = !has_products(&memory) ? NO_MEMORY : team ? DONE : NO_THREADS;
    if (result == DONE) {
#pragma omp parallel num_threads(team)
        multiply(affine, input, output, tokens, &memory);
    }
    free_products(&memory);
    return result;
}

// output (outputs, inputs) = W as float32. W is stored as any other kind.
int expand(const Affine* affine, float* output) {
    const long inputs = affine->inputs, groups = groups_in(inputs), row_bytes = groups * GROUP * 2;
    char* rows = reserve(threads * row_bytes);  // one for each thread
    if (rows == NULL) return NO_MEMORY;
    const long team = whole_team();
    if (team) {
#pragma omp parallel for schedule(static) num_threads(team)
        for (long o = 0; o < affine->outputs; o++) {
            float* wide = output + o * inputs;
            if (affine->kind < INT8) {
                unpack(affine, o, 1, wide);
                continue;
            }
            const int16_t* numbers = unpack(affine, o, 1, rows + omp_get_thread_num() * row_bytes);
            for (long g = 0; g < groups; g++) {
                const float scale = affine->scales[affine->kind == INT8 ? o : o * groups + g];
                const float offset = affine->kind == INT8 ? 0 : affine->scales[(affine->outputs + o) * groups + g];
                const long count = inputs - g * GROUP < GROUP ? inputs - g * GROUP : GROUP;
#pragma omp simd
                for (long i = 0; i < count; i++) wide[g * GROUP + i] = numbers[g * GROUP + i] * scale + offset;
            }
        }
    }
    free(rows);
    return team ? DONE : NO_THREADS;
}

// What a stack adds: output (tokens, outputs) += ((input Aᵀ) ⊙ v) B.
int low_rank(const float* input, const float* a, const float* v, const float* b, float* output, long tokens,
             long inputs, long rank, long outputs) {
    const Stack stack = {a, b, rank, 0};
    float* middle = reserve(tokens * rank * sizeof(float));
    if (middle == NULL) return NO_MEMORY;
    const long team = team_for(tokens * rank * (inputs + outputs));
    if (team) {
#pragma omp parallel num_threads(team)
        add_stack(&stack, v, input, output, tokens, inputs, outputs, middle);
    }
    free(middle);
    return team ? DONE : NO_THREADS;
}

// attend_rows, for the rows of a step that have one new token while others read prompts.
int attend(const CacheRows* rows, long layer, const Heads* heads, const float* norms, long window, const float* qkv,
           const float* cosine, const float* sine, float* output) {
    const AttentionMemory memory = reserve_attention(heads, longest_of(rows, 1));
    if (memory.memory == NULL) return NO_MEMORY;
    const long team = whole_team();
    if (team) {
#pragma omp parallel num_threads(team)
        attend_rows(rows, layer, heads, norms, window, qkv, cosine, sine, output, &memory);
    }
    free(memory.memory);
    return team ? DONE : NO_THREADS;
}

// hidden += change, where there is one; then RMSNorm: normed = hidden / √(mean hidden² + eps) · weight. hidden, change
// and normed (rows, size); weight (size).
static void add_and_normalise(float* hidden, const float* change, const float* weight, float* normed, long rows,
                              long size, float eps) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        float *sum = hidden + row * size, *to = normed + row * size;
        if (change != NULL) {
#pragma omp simd
            for (long i = 0; i < size; i++) sum[i] += change[row * size + i];
        }
        const float scale = 1 / sqrtf(dot(sum, sum, size) / size + eps);
#pragma omp simd
        for (long i = 0; i < size; i++) to[i] = sum[i] * scale * weight[i];
    }
}

// SwiGLU: output (rows, size) = silu(gate) · up, where silu(g) = g / (1 + e^-g). A row of gate_up (rows, 2 · size) is
// its gate, then its up.
static void multiply_gate(const float* gate_up, float* output, long rows, long size) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float* to = output + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES)
            *(floats*)(to + i) = load(gate + i) / (1 + exponential(-load(gate + i))) * load(up + i);
        for (; i < size; i++) to[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

int add_norm(float* hidden, const float* change, const float* weight, float* normed, long rows, long size, float eps) {
    const long team = team_for(rows * size);
    if (!team) return NO_THREADS;
#pragma omp parallel num_threads(team)
    add_and_normalise(hidden, change, weight, normed, rows, size, eps);
    return DONE;
}

int silu_mul(const float* gate_up, float* output, long rows, long size) {
    const long team = team_for(rows * size);
    if (!team) return NO_THREADS;
#pragma omp parallel num_threads(team)
    multiply_gate(gate_up, output, rows, size);
    return DONE;
}

// What a step keeps between the parts of a layer, for all tokens.
typedef struct {
    float* qkv;       // (tokens, (heads + 2 · key_heads) · head size): queries, keys, values
    float* attended;  // (tokens, heads · head size): what attention gives
    float* gate_up;   // (tokens, 2 · inner size): gate, then up
    float* gated;     // (tokens, inner size): silu(gate) · up
    float* change;    // (tokens, size): what attention, or the MLP, adds to the hidden state
    float* middle;    // (tokens, the largest rank of a stack): for adapters
    ProductMemory products;
    AttentionMemory attention;
} StepMemory;

static long greater(long a, long b) { return a > b ? a : b; }

static StepMemory reserve_step(const Layer* layers, long count, const Heads* heads, long longest, long tokens) {
    const long size = layers->qkv.base.inputs, inner = layers->down.base.inputs, attending = layers->out.base.inputs;
    const long bytes = tokens * sizeof(float);
    long rank = 0;
    for (const Layer* layer = layers; layer < layers + count; layer++)
        rank = greater(rank, greater(greater(layer->qkv.adapters.rank, layer->out.adapters.rank),
                                     greater(layer->gate_up.adapters.rank, layer->down.adapters.rank)));
    return (StepMemory){
        .qkv = reserve(bytes * layers->qkv.base.outputs),
        .attended = reserve(bytes * attending),
        .gate_up = reserve(bytes * 2 * inner),
        .gated = reserve(bytes * inner),
        .change = reserve(bytes * size),
        .middle = reserve(bytes * rank),
        .products = reserve_products(tokens, greater(greater(size, inner), attending)),
        .attention = reserve_attention(heads, longest),
    };
}
static int has_step(const StepMemory* memory) {
    return memory->qkv && memory->attended && memory->gate_up && memory->gated && memory->change && memory->middle &&
           has_products(&memory->products) && memory->attention.memory;
}
static void free_step(const StepMemory* memory) {
    free(memory->qkv), free(memory->attended), free(memory->gate_up), free(memory->gated), free(memory->change);
    free(memory->middle), free_products(&memory->products), free(memory->attention.memory);
}

// The product with the base's weights, then what the adapters add. vs[layout]: a stack's v.
static void project(const Projection* projection, const float* const* vs, const float* input, float* output,
                    long tokens, const StepMemory* memory) {
    const Affine* base = &projection->base;
    const Stack* adapters = &projection->adapters;
    multiply(base, input, output, tokens, &memory->products);
    if (adapters->rank)
        add_stack(adapters, vs[adapters->layout], input, output, tokens, base->inputs, base->outputs, memory->middle);
}

// All layers of a step in which each row has one new token. `groups`: its rows of the KV cache, in group_count runs of
// neighbours. hidden (tokens, size): the tokens' embeddings; overwritten. normed (tokens, size): the last layer's
// output, normalised with the weight last_norm (size).
int decode(const Layer* layers, long count, const float* const* vs, const CacheRows* groups, long group_count,
           const Heads* heads, const float* cosine, const float* sine, const float* last_norm, float* hidden,
           float* normed, long tokens) {
    const long size = layers->qkv.base.inputs, inner = layers->down.base.inputs;
    const StepMemory memory = reserve_step(layers, count, heads, longest_of(groups, group_count), tokens);
    const long team = whole_team();
    const int result = !has_step(&memory) ? NO_MEMORY : team ? DONE : NO_THREADS;
    if (result == DONE) {
#pragma omp parallel num_threads(team)
        {
            for (long number = 0; number < count; number++) {
                const Layer* layer = layers + number;

                // Add what the MLP of the layer before gave to the hidden state (the first layer starts from the
                // embeddings), and normalise for attention.
                add_and_normalise(hidden, number ? memory.change : NULL, layer->attention_norm, normed, tokens, size,
                                  heads->eps);

                // Queries, keys and values of all tokens, in one product.
                project(&layer->qkv, vs, normed, memory.qkv, tokens, &memory);

                // Rotate queries and keys to their positions, store keys and values in the cache, and let each query
                // look at its row's tokens.
                for (const CacheRows* rows = groups; rows < groups + group_count; rows++)
                    attend_rows(rows, number, heads, layer->qk_norm, layer->window, memory.qkv, cosine, sine,
                                memory.attended, &memory.attention);
#pragma omp barrier  // the next product reads the attention of all heads

                // Mix what the heads found back into the size of the hidden state.
                project(&layer->out, vs, memory.attended, memory.change, tokens, &memory);

                // Add that to the hidden state, and normalise for the MLP.
                add_and_normalise(hidden, memory.change, layer->mlp_norm, normed, tokens, size, heads->eps);

                // The MLP: widen by two products at once, let one gate the other, and narrow again. The next layer, or
                // the last norm, adds its output to the hidden state.
                project(&layer->gate_up, vs, normed, memory.gate_up, tokens, &memory);
                multiply_gate(memory.gate_up, memory.gated, tokens, inner);
                project(&layer->down, vs, memory.gated, memory.change, tokens, &memory);
            }
            // Add what the last MLP gave, and normalise for the output head.
            add_and_normalise(hidden, memory.change, last_norm, normed, tokens, size, heads->eps);
        }
    }
    free_step(&memory);
    return result;
}
