/* One pool of threads for all kernels of the CPU.
 *
 * A region is a number of items that may run in any order and at once. All threads, the caller's too, take items off
 * one counter: each time half of their even share of what is left, so that neighbours, whose memory follows, stay
 * together, and none waits long for the last. The caller waits for items that were taken, and never for a thread: one
 * that comes late, since another program has its core, finds nothing left.
 *
 * Threads start with the first region. Without work they spin for about the gap between two regions of a pass, and then
 * sleep. One region is shared at a time: another caller's, or that of an item, runs where it is called.
 */
#ifndef LOSART_POOL_H
#define LOSART_POOL_H

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define POOL_SPIN 100000 /* nanoseconds: four in five gaps between two regions of a pass are shorter */
#define POOL_SHARES 2    /* of a thread's even share it takes one; more end what kernels prefetch more often */
#define POOL_LEFT_BITS 24
#define POOL_LEFT (((uint64_t)1 << POOL_LEFT_BITS) - 1)

typedef void (*PoolItem)(void *state, ptrdiff_t item);

static struct {
    /* The region's number, and below it how many items are left to take. Who takes some by compare-and-swap knows that
     * the region is still the one whose number was read, which does not end before they have run. */
    _Alignas(64) atomic_uint_least64_t ticket;
    atomic_int regions, idle; /* threads that sleep until there is another */
    _Alignas(64) atomic_int unfinished;
    atomic_int waiting; /* whether the caller sleeps until it is 0 */
    _Alignas(64) PoolItem run;
    void *state;
    int count, started;
    atomic_int threads; /* the caller's too */
    atomic_flag shared;
} pool = {.threads = 1, .shared = ATOMIC_FLAG_INIT};

/* Sleep while the word is as it was seen, and wake all that do. */
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static void pool_sleep(atomic_int *word, int seen)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void pool_wake(atomic_int *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

static void pool_forget_sleepers(void) {}
#else
static pthread_mutex_t pool_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t pool_changed = PTHREAD_COND_INITIALIZER;

static void pool_sleep(atomic_int *word, int seen)
{
    pthread_mutex_lock(&pool_mutex);
    while (atomic_load(word) == seen) pthread_cond_wait(&pool_changed, &pool_mutex);
    pthread_mutex_unlock(&pool_mutex);
}

static void pool_wake(atomic_int *word)
{
    (void)word;
    pthread_mutex_lock(&pool_mutex);
    pthread_mutex_unlock(&pool_mutex);
    pthread_cond_broadcast(&pool_changed);
}

static void pool_forget_sleepers(void)
{
    pthread_mutex_init(&pool_mutex, NULL);
    pthread_cond_init(&pool_changed, NULL);
}
#endif

static int pool_has_work(void) { return (atomic_load(&pool.ticket) & POOL_LEFT) != 0; }

static int pool_has_finished(void) { return atomic_load(&pool.unfinished) == 0; }

static void pool_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static int64_t pool_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* Whoever makes it ready changes the word, then looks for sleepers. */
static void pool_wait(int (*ready)(void), atomic_int *word, atomic_int *sleepers)
{
    int64_t end = pool_nanoseconds() + POOL_SPIN;
    int seen;
    do {
        for (int i = 0; i < 16; i++) {
            if (ready()) return;
            pool_pause();
        }
    } while (pool_nanoseconds() < end);
    atomic_fetch_add(sleepers, 1);
    while (seen = atomic_load(word), !ready()) pool_sleep(word, seen);
    atomic_fetch_sub(sleepers, 1);
}

/* Takes items and runs them until none is left. */
static void pool_take(void)
{
    uint64_t ticket = atomic_load(&pool.ticket);
    int left;
    while ((left = (int)(ticket & POOL_LEFT)) != 0) {
        int some = 1 + (left - 1) / (POOL_SHARES * pool.threads);
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket - (uint64_t)some)) continue;
        for (int item = pool.count - left, end = item + some; item < end; item++) pool.run(pool.state, item);
        if (atomic_fetch_sub(&pool.unfinished, some) == some && atomic_load(&pool.waiting)) pool_wake(&pool.unfinished);
        ticket = atomic_load(&pool.ticket);
    }
}

static void *pool_thread(void *unused)
{
    for (;;) {
        pool_wait(pool_has_work, &pool.regions, &pool.idle);
        pool_take();
    }
    return unused;
}

/* A forked child has none of the threads, nor what they were about to do. */
static void pool_forked(void)
{
    pool.started = 0;
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.unfinished, 0);
    atomic_store(&pool.idle, 0);
    atomic_store(&pool.waiting, 0);
    atomic_flag_clear(&pool.shared);
    pool_forget_sleepers();
}

/* Starts the threads, or as many as there can be. Signals are for the others. */
static void pool_start(void)
{
    static int forks_safely;
    pthread_attr_t detached;
    pthread_t thread;
    sigset_t all, before;
    forks_safely = forks_safely || pthread_atfork(NULL, NULL, pool_forked) == 0;
    sigfillset(&all);
    if (forks_safely && pthread_attr_init(&detached) == 0) {
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (pool.started + 1 < pool.threads && pthread_create(&thread, &detached, pool_thread, NULL) == 0)
            pool.started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&detached);
    }
    pool.threads = pool.started + 1;
}

/* How many threads there may be, the caller among them. Before any region. */
static void pool_set_threads(int threads) { pool.threads = threads; }

static int pool_threads(void) { return pool.threads; }

/* Runs items 0 .. count - 1, by all threads or where it is called. */
static void pool_run(PoolItem run, void *state, ptrdiff_t count, int share)
{
    if (!share || pool.threads < 2 || count < 2 || (uint64_t)count > POOL_LEFT ||
        atomic_flag_test_and_set(&pool.shared)) {
        for (ptrdiff_t item = 0; item < count; item++) run(state, item);
        return;
    }
    if (pool.started + 1 < pool.threads) pool_start();
    pool.run = run;
    pool.state = state;
    pool.count = (int)count;
    atomic_store(&pool.unfinished, (int)count);
    uint64_t number = (atomic_load(&pool.ticket) >> POOL_LEFT_BITS) + 1;
    atomic_store(&pool.ticket, number << POOL_LEFT_BITS | (uint64_t)count);
    atomic_fetch_add(&pool.regions, 1);
    if (atomic_load(&pool.idle)) pool_wake(&pool.regions);
    pool_take();
    pool_wait(pool_has_finished, &pool.unfinished, &pool.waiting);
    atomic_flag_clear(&pool.shared);
}

#endif
