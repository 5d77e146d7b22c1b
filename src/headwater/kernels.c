/* Fused CPU kernels for the row-wise work of a decode step and of the loss: one pass over memory where torch needs five to ten.
   The installation compiles this file; kernels.py declares the argument types. Everything is float32 and row-major.

   Each row is computed by one thread in a fixed order, so results do not depend on the number of threads. No fast-math: NaN and
   infinity propagate; only sums marked `omp simd` may be reordered. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))
/* One build runs everywhere: the loader selects the clone for the processor. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FITTED __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FITTED __attribute__((noinline))
#endif
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
#define EIGHT(place) (*(Eight *)(place))
#define MANY 16384 /* numbers; for less work a second thread costs more than it saves */
#define LANES 16   /* cache columns whose keys are interleaved; also defined in kernels.py */
#define BLOCK 128  /* tokens; a draw is located first among block masses, then within its block */

/* e^x to 2 ulp, 0 below -87; a polynomial (Cephes) that compilers vectorize. */
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to an integer */
    float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power;
    power.bits = ((int32_t)n + 127) << 23;
    p *= power.value;
    return x < -87.0f ? 0.0f : p;
}

/* out = x · weight / rms(x); weight may be null. */
INLINE void normed(const float *x, const float *weight, float *out, int width, float eps) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < width; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / width + eps);
    if (weight) {
#pragma omp simd
        for (int i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
    } else {
#pragma omp simd
        for (int i = 0; i < width; i++) out[i] = x[i] * scale;
    }
}

FITTED static void norm_row(const float *x, const float *weight, float *out, int width, float eps) {
    normed(x, weight, out, width, eps);
}

void norm_rows(const float *x, const float *weight, float *out, int64_t rows, int width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > MANY)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * width, weight, out + row * width, width, eps);
}

/* gate_up (rows, 2 · width) -> silu(gate) · up (rows, width). */
FITTED static void gate_row(const float *gate, const float *up, float *out, int width) {
#pragma omp simd
    for (int i = 0; i < width; i++) out[i] = gate[i] * up[i] / (1.0f + exponential(-gate[i]));
}

void gate_rows(const float *gate_up, float *out, int64_t rows, int width) {
#pragma omp parallel for schedule(static) if (rows * width > MANY)
    for (int64_t row = 0; row < rows; row++)
        gate_row(gate_up + row * 2 * width, gate_up + row * 2 * width + width, out + row * width, width);
}

/* One head after its projection: RMS norm if the model has one, then RoPE on interleaved pairs (cos and sin interleaved). */
INLINE void headed(const float *x, const float *weight, const float *turn, float *out, int width, float eps) {
    if (weight) normed(x, weight, out, width, eps);
    else memcpy(out, x, width * sizeof(float));
    for (int i = 0; i < width; i += 2) {
        float re = out[i] * turn[i] - out[i + 1] * turn[i + 1];
        out[i + 1] = out[i] * turn[i + 1] + out[i + 1] * turn[i];
        out[i] = re;
    }
}

/* Attention of one query head to `count` columns. q (width) is already scaled; keys (columns / LANES, width, LANES), so that LANES
   scores accumulate in parallel; values (columns, width). Two accumulators per result hide the latency of additions. */
INLINE void attended(const float *q, const float *keys, const float *values, float *score, float *out, int64_t count, int width) {
    float most = -INFINITY, total = 0.0f;
    for (int64_t block = 0; block * LANES < count; block++) {
        const float *key = keys + block * LANES * width;
        Eight low = {0.0f}, high = low, low_too = low, high_too = low;
        int i = 0;
        for (; i + 2 <= width; i += 2, key += 2 * LANES) {
            low += q[i] * EIGHT(key), high += q[i] * EIGHT(key + 8);
            low_too += q[i + 1] * EIGHT(key + LANES), high_too += q[i + 1] * EIGHT(key + LANES + 8);
        }
        EIGHT(score + block * LANES) = low + low_too;
        EIGHT(score + block * LANES + 8) = high + high_too;
    }
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < count; t++) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < count; t++) total += score[t] = exponential(score[t] - most);
    float share = 1.0f / total;
    int first = 0;
    for (; first + 16 <= width; first += 16) {
        const float *value = values + first;
        Eight low = {0.0f}, high = low, low_too = low, high_too = low;
        int64_t t = 0;
        for (; t + 2 <= count; t += 2, value += 2 * width) {
            low += score[t] * EIGHT(value), high += score[t] * EIGHT(value + 8);
            low_too += score[t + 1] * EIGHT(value + width), high_too += score[t + 1] * EIGHT(value + width + 8);
        }
        if (t < count) low += score[t] * EIGHT(value), high += score[t] * EIGHT(value + 8);
        EIGHT(out + first) = (low + low_too) * share;
        EIGHT(out + first + 8) = (high + high_too) * share;
    }
    for (; first < width; first++) {
        float sum = 0.0f;
        for (int64_t t = 0; t < count; t++) sum += score[t] * values[t * width + first];
        out[first] = sum * share;
    }
}

/* New token of one row: norm and RoPE of its heads, write keys and values to cache column `column`, attend to all columns up to it.
   scratch  columns + width floats */
FITTED static void attend_row(const float *qkv, const float *weight, const float *turn, float *keys, float *values, float *out,
                              float *scratch, int64_t column, int heads, int kv_heads, int width, int64_t columns, float eps) {
    int group = heads / kv_heads;
    float scale = 1.0f / sqrtf((float)width), *score = scratch, *one = scratch + columns;
    for (int head = 0; head < kv_heads; head++) {
        float *key = keys + head * columns * width, *value = values + head * columns * width;
        int n = heads + head;
        headed(qkv + n * width, weight ? weight + n * width : 0, turn, one, width, eps);
        float *place = key + column / LANES * LANES * width + column % LANES;
        for (int i = 0; i < width; i++) place[i * LANES] = one[i];
        memcpy(value + column * width, qkv + (n + kv_heads) * width, width * sizeof(float));
        for (int g = 0; g < group; g++) {
            n = head * group + g;
            headed(qkv + n * width, weight ? weight + n * width : 0, turn, one, width, eps);
            for (int i = 0; i < width; i++) one[i] *= scale;
            attended(one, key, value, score, out + n * width, column + 1, width);
        }
    }
}

/* Decode attention: one new token for each of `rows` rows.

   qkv      (rows, (heads + 2 · kv_heads) · width)     weight   (heads + kv_heads, width) or null
   turns    (positions, width)                         position (rows)
   keys     (rows, kv_heads, columns / LANES, width, LANES): columns is a multiple of LANES
   values   (rows, kv_heads, columns, width)           out      (rows, heads · width) */
void attend_rows(const float *qkv, const float *weight, const float *turns, const int64_t *position, float *keys,
                 float *values, float *out, int64_t rows, int heads, int kv_heads, int width, int64_t columns, float eps) {
    int64_t size = kv_heads * columns * width;
#pragma omp parallel if (rows > 1)
    {
        float *scratch = malloc((columns + width) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            attend_row(qkv + row * (heads + 2 * kv_heads) * width, weight, turns + position[row] * width, keys + row * size,
                       values + row * size, out + row * heads * width, scratch, position[row], heads, kv_heads, width,
                       columns, eps);
        free(scratch);
    }
}

/* Inverse-CDF sampling: the token at which the CDF of softmax(logits · inverse_temperature) passes `draw`; its log-prob goes to
   *logp. A row with NaN gives an arbitrary token and log-prob NaN. mass  scratch, one number per block */
FITTED static int64_t draw_row(const float *l, double draw, float *logp, double *mass, int64_t width, float inverse_temperature) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK, last = 0;
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t v = 0; v < width; v++) most = l[v] > most ? l[v] : most;
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * BLOCK < width ? (b + 1) * BLOCK : width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = b * BLOCK; v < end; v++) sum += exponential((l[v] - most) * inverse_temperature);
        mass[b] = sum;
        total += sum;
        if (sum > 0.0f) last = b; /* rounding may push the target past the end: never stop in a block without mass */
    }
    double target = draw * total, before = 0.0;
    int64_t b = 0, chosen = 0;
    while (b < last && !(before + mass[b] > target)) before += mass[b++];
    int64_t end = (b + 1) * BLOCK < width ? (b + 1) * BLOCK : width;
    for (int64_t v = b * BLOCK; v < end && !(before > target); v++) {
        float p = exponential((l[v] - most) * inverse_temperature);
        before += p;
        if (p > 0.0f) chosen = v;
    }
    *logp = (float)((double)((l[chosen] - most) * inverse_temperature) - log(total));
    return chosen;
}

void draw_rows(const float *logits, const double *draws, int64_t *token, float *logp, int64_t rows, int64_t width,
               float inverse_temperature) {
#pragma omp parallel if (rows * width > MANY)
    {
        double *mass = malloc((width / BLOCK + 1) * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            token[row] = draw_row(logits + row * width, draws[row], logp + row, mass, width, inverse_temperature);
        free(mass);
    }
}

/* Up to four rows of x (there, width) times LANES packed columns (width, LANES), of which `wide` are real. Meanwhile memory from
   `ahead` is prefetched, advancing `stride` numbers with each of the `width`. */
FITTED static void four_rows(const float *x, const float *packed, const float *bias, float *out, int64_t there, int width,
                             int64_t columns, int64_t wide, int add, const float *ahead, int stride) {
    const float *x0 = x, *x1 = there > 1 ? x + width : x, *x2 = there > 2 ? x + 2 * width : x, *x3 = there > 3 ? x + 3 * width : x;
    Eight a0 = {0.0f}, b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0, a3 = a0, b3 = a0;
    for (int i = 0; i < width; i++) {
        Eight a = EIGHT(packed + i * LANES), b = EIGHT(packed + i * LANES + 8);
        __builtin_prefetch(ahead + i * stride, 0, 2);
        a0 += x0[i] * a, b0 += x0[i] * b, a1 += x1[i] * a, b1 += x1[i] * b;
        a2 += x2[i] * a, b2 += x2[i] * b, a3 += x3[i] * a, b3 += x3[i] * b;
    }
    Eight sums[4][2] = {{a0, b0}, {a1, b1}, {a2, b2}, {a3, b3}};
    for (int64_t row = 0; row < there; row++, out += columns) {
        float *sum = (float *)sums[row];
        for (int64_t lane = 0; bias && lane < wide; lane++) sum[lane] += bias[lane];
        for (int64_t lane = 0; add && lane < wide; lane++) sum[lane] += out[lane];
        memcpy(out, sum, wide * sizeof(float));
    }
}

/* out (rows, columns) = x (rows, width) · Wᵀ + bias, or out += if `add`. Every weight is read from memory once.

   packed (columns / LANES rounded up, width, LANES): W (columns, width) with zeros for missing columns
   bias   (columns) or null */
void linear_rows(const float *x, const float *packed, const float *bias, float *out, int64_t rows, int width, int64_t columns, int add) {
    int64_t blocks = (columns + LANES - 1) / LANES, passes = (rows + 3) / 4;
    int stride = passes <= LANES ? LANES / passes : 0; /* the next block is in cache after the last pass over this one */
#pragma omp parallel for schedule(static) if (rows * columns * width > 16 * MANY)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * LANES, wide = columns - first < LANES ? columns - first : LANES;
        const float *next = packed + (block + 1 < blocks ? block + 1 : block) * LANES * width;
        for (int64_t row = 0; row < rows; row += 4)
            four_rows(x + row * width, packed + first * width, bias ? bias + first : 0, out + row * columns + first,
                      rows - row < 4 ? rows - row : 4, width, columns, wide, add, next + row / 4 * width * stride, stride);
    }
}

/* Interleave `there` (up to LANES) rows of `width` numbers: (width, LANES), with zeros for missing rows. */
FITTED static void side_by_side(const float *rows, int64_t there, int width, float *out) {
    for (int i = 0; i < width; i++)
        for (int64_t lane = 0; lane < LANES; lane++) out[i * LANES + lane] = lane < there ? rows[lane * width + i] : 0.0f;
}

/* Whether product_rows is faster than the BLAS that torch calls: measured so with 32-byte vectors (AVX2 without AVX-512). */
int product_pays(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !__builtin_cpu_supports("avx512f");
#else
    return 0;
#endif
}

/* As linear_rows, for many rows and an unpacked weight (columns, width), which is packed on the fly. */
void product_rows(const float *x, const float *weight, const float *bias, float *out, int64_t rows, int width, int64_t columns) {
#pragma omp parallel
    {
        float *packed = malloc(LANES * width * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t first = 0; first < columns; first += LANES) {
            int64_t wide = columns - first < LANES ? columns - first : LANES;
            side_by_side(weight + first * width, wide, width, packed);
            for (int64_t row = 0; row < rows; row += 4)
                four_rows(x + row * width, packed, bias ? bias + first : 0, out + row * columns + first,
                          rows - row < 4 ? rows - row : 4, width, columns, wide, 0, packed, 0);
        }
        free(packed);
    }
}

/* Loss statistics: MEASURES numbers for a row of logits, with or without the teacher's. log p(v) = (logit − most) − lse. */
enum { MOST, LSE, TEACHER_MOST, TEACHER_LSE, LOGP, ENTROPY, REVERSE, FORWARD, TEACHER_LOGP, MEASURES };

INLINE void log_sum(const float *l, int64_t width, float *most_out, float *lse_out) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t v = 0; v < width; v++) most = l[v] > most ? l[v] : most;
    double total = 0.0;
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t end = first + BLOCK < width ? first + BLOCK : width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = first; v < end; v++) sum += exponential(l[v] - most);
        total += sum;
    }
    *most_out = most, *lse_out = (float)log(total);
}

FITTED static void measure_row(const float *l, const float *teacher, int64_t target, float *out, int64_t width) {
    log_sum(l, width, out + MOST, out + LSE);
    if (teacher) log_sum(teacher, width, out + TEACHER_MOST, out + TEACHER_LSE);
    float most = out[MOST], lse = out[LSE], teacher_most = out[TEACHER_MOST], teacher_lse = out[TEACHER_LSE];
    double entropy = 0.0, reverse = 0.0, forward = 0.0;
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t end = first + BLOCK < width ? first + BLOCK : width;
        float e = 0.0f, r = 0.0f, f = 0.0f;
        if (teacher) {
#pragma omp simd reduction(+ : e, r, f)
            for (int64_t v = first; v < end; v++) {
                float ours = (l[v] - most) - lse, theirs = (teacher[v] - teacher_most) - teacher_lse;
                float p = exponential(ours);
                e += p * ours;
                r += p * (ours - theirs);
                f += exponential(theirs) * (theirs - ours);
            }
        } else {
#pragma omp simd reduction(+ : e)
            for (int64_t v = first; v < end; v++) {
                float ours = (l[v] - most) - lse;
                e += exponential(ours) * ours;
            }
        }
        entropy -= e, reverse += r, forward += f;
    }
    out[LOGP] = (l[target] - most) - lse;
    out[ENTROPY] = (float)entropy, out[REVERSE] = (float)reverse, out[FORWARD] = (float)forward;
    out[TEACHER_LOGP] = teacher ? (teacher[target] - teacher_most) - teacher_lse : 0.0f;
}

void measure_rows(const float *logits, const float *teacher, const int64_t *target, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > MANY)
    for (int64_t row = 0; row < rows; row++)
        measure_row(logits + row * width, teacher ? teacher + row * width : 0, target[row], out + row * MEASURES, width);
}

/* Overwrite a row's logits with the gradient of the loss with respect to them.
   by  derivatives of the loss by log p(target), KL(student ‖ teacher) and KL(teacher ‖ student) */
FITTED static void slope_row(float *l, const float *teacher, int64_t target, const float *held, const float *by, int64_t width) {
    float most = held[MOST], lse = held[LSE], teacher_most = held[TEACHER_MOST], teacher_lse = held[TEACHER_LSE];
    float kl = held[REVERSE], by_logp = by[0], by_reverse = by[1], by_forward = by[2];
    if (teacher && by_forward != 0.0f) {
#pragma omp simd
        for (int64_t v = 0; v < width; v++) {
            float ours = (l[v] - most) - lse, theirs = (teacher[v] - teacher_most) - teacher_lse, p = exponential(ours);
            l[v] = p * (by_reverse * (ours - theirs - kl) - by_logp) + by_forward * (p - exponential(theirs));
        }
    } else if (teacher) {
#pragma omp simd
        for (int64_t v = 0; v < width; v++) {
            float ours = (l[v] - most) - lse, theirs = (teacher[v] - teacher_most) - teacher_lse;
            l[v] = exponential(ours) * (by_reverse * (ours - theirs - kl) - by_logp);
        }
    } else {
#pragma omp simd
        for (int64_t v = 0; v < width; v++) l[v] = exponential((l[v] - most) - lse) * -by_logp;
    }
    l[target] += by_logp;
}

/* by (rows, 3) */
void slope_rows(float *logits, const float *teacher, const int64_t *target, const float *held, const float *by, int64_t rows,
                int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > MANY)
    for (int64_t row = 0; row < rows; row++)
        slope_row(logits + row * width, teacher ? teacher + row * width : 0, target[row], held + row * MEASURES, by + row * 3, width);
}
