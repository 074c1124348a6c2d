/* What hand-vectorised code reaches: plain Lloyd on unit vectors from given centers, nothing skipped, nothing seeded.
 *
 * P and K are known at compile time, sixteen keys are compared with four centers at a time in registers, users are
 * dealt to threads one by one. An empty cluster keeps its center. Built and called by benchmarks/cluster.py:
 *     cc -O3 -march=native -ffast-math -pthread -shared -fPIC -DP=16 -DK=32 limit.c
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *keys;    /* [num_users, n, P] */
    const float *centers; /* [num_users, K, P] */
    uint8_t *labels;      /* [num_users, n] */
    long num_users, n;
    int num_iterations;
    atomic_long next;
} work;

static void assign(const floats *tiles, long num_tiles, const float *centers, int32_t *labels) {
    for (long t = 0; t < num_tiles; t++) {
        const floats *x = tiles + t * P;
        floats best = {0};
        ints label = {0};
        best -= 3; /* below any similarity of unit vectors */
        for (int k = 0; k < K; k += 4) {
            const float *c = centers + k * P;
            floats s[4] = {x[0] * c[0], x[0] * c[P], x[0] * c[2 * P], x[0] * c[3 * P]};
            for (int d = 1; d < P; d++)
                for (int j = 0; j < 4; j++)
                    s[j] += x[d] * c[j * P + d];
            for (int j = 0; j < 4; j++) {
                ints better = s[j] > best;
                label = (better & (k + j)) | (~better & label);
                best = (floats)((better & (ints)s[j]) | (~better & (ints)best));
            }
        }
        memcpy(labels + t * LANES, &label, sizeof label);
    }
}

static void update(const float *keys, long n, const int32_t *labels, float *centers) {
    static _Thread_local float sums[K * P];
    memset(sums, 0, sizeof sums);
    for (long i = 0; i < n; i++)
        for (int d = 0; d < P; d++)
            sums[labels[i] * P + d] += keys[i * P + d];
    for (int k = 0; k < K; k++) {
        float square = 0;
        for (int d = 0; d < P; d++)
            square += sums[k * P + d] * sums[k * P + d];
        if (square > 0)
            for (int d = 0; d < P; d++)
                centers[k * P + d] = sums[k * P + d] / sqrtf(square);
    }
}

static void *run(void *argument) {
    work *w = argument;
    long num_tiles = (w->n + LANES - 1) / LANES;
    floats *tiles = aligned_alloc(64, num_tiles * P * sizeof(floats));
    int32_t *labels = aligned_alloc(64, num_tiles * sizeof(ints));
    float centers[K * P];
    for (long user; (user = atomic_fetch_add(&w->next, 1)) < w->num_users;) {
        const float *keys = w->keys + user * w->n * P;
        memset(tiles + (num_tiles - 1) * P, 0, P * sizeof(floats));
        for (long i = 0; i < w->n; i++)
            for (int d = 0; d < P; d++)
                ((float *)tiles)[(i / LANES * P + d) * LANES + i % LANES] = keys[i * P + d];
        memcpy(centers, w->centers + user * K * P, sizeof centers);
        for (int iteration = 0; iteration < w->num_iterations; iteration++) {
            assign(tiles, num_tiles, centers, labels);
            update(keys, w->n, labels, centers);
        }
        assign(tiles, num_tiles, centers, labels);
        for (long i = 0; i < w->n; i++)
            w->labels[user * w->n + i] = labels[i];
    }
    free(tiles);
    free(labels);
    return NULL;
}

void limit(const float *keys, const float *centers, uint8_t *labels, long num_users, long n, int num_iterations,
           int num_threads) {
    work w = {keys, centers, labels, num_users, n, num_iterations, 0};
    pthread_t threads[num_threads];
    for (int t = 0; t < num_threads; t++)
        pthread_create(&threads[t], NULL, run, &w);
    for (int t = 0; t < num_threads; t++)
        pthread_join(threads[t], NULL);
}
