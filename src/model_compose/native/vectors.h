// Vectors as wide as the processor's registers, and the operations on them that the other files need.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

_Static_assert(sizeof(long) == 8, "Python passes all sizes as 64-bit integers");

// Floats in one vector.
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t unsigned_ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t bfloats __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
// Products of integers use the same sizes on every processor: sixteen products give eight sums.
typedef float floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints8 __attribute__((vector_size(32), aligned(4)));
typedef int16_t shorts8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef int16_t shorts16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t unsigned_bytes16 __attribute__((vector_size(16), aligned(1), may_alias));

enum { FLOAT32, BFLOAT16, INT8, INT4 };  // how numbers are stored

// Adding this number to a float and subtracting it again rounds the float to an integer: 1.5 · 2^23 leaves no bits for
// a fraction.
#define ROUNDER 12582912.0f

static inline floats load(const float* from) { return *(const floats*)from; }
static inline shorts16 load_shorts(const int16_t* from) { return *(const shorts16*)from; }
static inline floats8 to_floats(ints8 values) { return __builtin_convertvector(values, floats8); }

// The next two read sixteen bytes as 16-bit integers. multiply_pairs multiplies sixteen pairs of integers and adds the
// products of neighbours, which gives eight sums. Compilers do not find these instructions by themselves.
#if defined(__AVX2__)
static inline shorts16 load_signed_bytes(const int8_t* from) {
    return (shorts16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void*)from));
}
static inline shorts16 load_unsigned_bytes(const uint8_t* from) {
    return (shorts16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const void*)from));
}
static inline ints8 multiply_pairs(shorts16 a, shorts16 b) { return (ints8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
static inline shorts16 load_signed_bytes(const int8_t* from) {
    return __builtin_convertvector(*(const bytes16*)from, shorts16);
}
static inline shorts16 load_unsigned_bytes(const uint8_t* from) {
    return __builtin_convertvector(*(const unsigned_bytes16*)from, shorts16);
}
static inline ints8 multiply_pairs(shorts16 a, shorts16 b) {
    return ((ints8)a << 16 >> 16) * ((ints8)b << 16 >> 16) + ((ints8)a >> 16) * ((ints8)b >> 16);
}
#endif

// bfloat16 is the upper half of a float32.
static inline floats load_bfloats(const uint16_t* from) {
    return (floats)(__builtin_convertvector(*(const bfloats*)from, unsigned_ints) << 16);
}
static inline float widen(uint16_t upper_half) {
    uint32_t bits = (uint32_t)upper_half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint16_t narrow(float value) {  // rounds to the nearest bfloat16, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The sum of a vector's numbers.
static inline float total8(floats8 values) {
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = values[i] + values[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
static inline float total(floats values) {
#if LANES == 16
    floats8 low, high;
    memcpy(&low, &values, 32), memcpy(&high, (const char*)&values + 32, 32);
    return total8(low + high);
#else
    return total8(values);
#endif
}

static inline floats choose(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

// e^x, wrong by at most 2 units in the last place. e^x = 2^n · e^r with |r| ≤ ln 2 / 2, and e^r is its Taylor series up
// to the 6th power. ln 2 is subtracted in two parts, so that r keeps its last bits.
static inline floats exponential(floats x) {
    x = choose(x < -87, (floats){0} - 87, choose(x > 88, (floats){0} + 88, x));
    const floats n = (x * 1.44269504f + ROUNDER) - ROUNDER;
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const floats e_r = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return e_r * (floats)((__builtin_convertvector(n, ints) + 127) << 23);  // 127 is the exponent's bias
}

// The inner product of two lines of `count` numbers. Two sums at once hide the delay of each addition.
static inline float dot(const float* a, const float* b, long count) {
    floats sum = {0}, other = {0};
    long k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES) {
        sum += load(a + k) * load(b + k);
        other += load(a + k + LANES) * load(b + k + LANES);
    }
    float rest = 0;
    for (; k < count; k++) rest += a[k] * b[k];
    return total(sum + other) + rest;
}
