// Vectors of the widest registers, and what is done with them.

#pragma once

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
// Integers: always eight sums, of sixteen products.
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints8 __attribute__((vector_size(32), aligned(4)));
typedef int16_t shorts8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t ubytes __attribute__((vector_size(16), aligned(1), may_alias));

enum { FLOAT32, BFLOAT16, INT8, INT4 };  // how numbers are stored

// Sixteen bytes as 16-bit integers, and eight sums of two neighbours' products. Compilers do not find the instructions.
#if defined(__AVX2__)
static inline shorts signed_bytes(const int8_t* p) { return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void*)p)); }
static inline shorts unsigned_bytes(const uint8_t* p) {
    return (shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const void*)p));
}
static inline ints8 pairs(shorts a, shorts b) { return (ints8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
static inline shorts signed_bytes(const int8_t* p) { return __builtin_convertvector(*(const bytes*)p, shorts); }
static inline shorts unsigned_bytes(const uint8_t* p) { return __builtin_convertvector(*(const ubytes*)p, shorts); }
static inline ints8 pairs(shorts a, shorts b) {
    return ((ints8)a << 16 >> 16) * ((ints8)b << 16 >> 16) + ((ints8)a >> 16) * ((ints8)b >> 16);
}
#endif
static inline vec8 floats(ints8 v) { return __builtin_convertvector(v, vec8); }
static inline shorts load16(const int16_t* p) { return *(const shorts*)p; }
static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec widen(const uint16_t* p) { return (vec)(__builtin_convertvector(*(const halves*)p, uints) << 16); }
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
static inline float total8(vec8 v) {
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = v[i] + v[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
static inline float total(vec v) {
#if LANES == 16
    vec8 low, high;
    memcpy(&low, &v, 32), memcpy(&high, (const char*)&v + 32, 32);
    return total8(low + high);
#else
    return total8(v);
#endif
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
static inline float dot(const float* a, const float* b, long n) {
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
