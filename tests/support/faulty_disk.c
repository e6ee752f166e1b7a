// SPDX-License-Identifier: MIT
//
// LD_PRELOAD library that simulates a disk which is slow, gives short reads or fails. It wraps pread(), which the
// reader's threads use, io_uring's system calls, the calls that decide how files are read, and pthread_create(). The
// variables below are its knobs, all off at first; a test sets them through ctypes while the model runs. Reads of
// io_uring can come short, fail and be held back, but not be slowed down; only the last ring made is known.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

// Reads of at most this many bytes are never short: a short read is continued with at least as many.
enum { MIN_BYTES = 4096 };

// knobs
long disk_delay_us  = 0;    // added to each pread()
long disk_hold_at   = 0;    // number of the first pread() that waits, like all after it, until this is 0 again; 0: none
long disk_withheld  = 0;    // bytes by which each read is short
long disk_max       = 0;    // most bytes that a read gives; 0: no limit
long disk_fail_at   = 0;    // number of the first read that fails; 0: none
long disk_n_fail    = 0;    // how many reads fail from there on
long disk_error     = EIO;  // errno of pread(), 0: end of file; io_uring always fails with EBADF
long disk_no_direct = 0;    // open() refuses O_DIRECT
long disk_no_reads  = 0;    // a file that was opened with O_DIRECT refuses to be read
long disk_no_statx  = 0;    // statx(), which tells the alignment of direct reads, fails
long disk_no_uring  = 0;    // errno with which the kernel refuses io_uring
long disk_old_uring = 0;    // io_uring is that of Linux 5.5, without IORING_OP_READ
long disk_bad_from  = 0;    // reads that touch offsets [disk_bad_from, disk_bad_to) fail
long disk_bad_to    = 0;
long disk_cancel    = 0;    // the kernel cancels reads of io_uring; needs Linux 6.10
long disk_hold      = 0;    // how many reads of io_uring are accepted but not completed until disk_let_go()

long disk_enter_error  = 0; // errno with which io_uring_enter() fails; 0: it does not
long disk_enter_waits  = 0; // 1: only calls that wait fail, after submitting; 0: all fail and submit nothing
long disk_n_enter_fail = -1; // how many calls fail; negative: all
long disk_threads_left = -1; // threads that our C++ code can still start; negative: any number

// counters
atomic_long disk_reads          = 0;
atomic_long disk_short          = 0; // short reads
atomic_long disk_odd            = 0; // of these, those that end within a 512-byte block, where no direct read may begin
atomic_long disk_failed         = 0;
atomic_long disk_held           = 0; // reads held so far
atomic_long disk_enter_failed   = 0;
atomic_long disk_threads_failed = 0;

static long next_number(void) {
    return atomic_fetch_add(&disk_reads, 1) + 1;
}

static int is_held(long number) {
    const long first = *(volatile long *) &disk_hold_at;
    return first > 0 && number >= first;
}

static int fails(long number, off_t from, size_t size) {
    const int is_one = (disk_fail_at > 0 && number >= disk_fail_at && number < disk_fail_at + disk_n_fail) ||
                       (from < disk_bad_to && from + (off_t) size > disk_bad_from);
    atomic_fetch_add(&disk_failed, is_one);
    return is_one;
}

// How many of `size` bytes a read gives: all, or fewer in multiples of `unit`.
static size_t given(size_t size, size_t unit) {
    size_t less = disk_withheld > 0 && size > MIN_BYTES ? size - (size_t) disk_withheld : size;
    less        = disk_max > 0 && less > (size_t) disk_max ? (size_t) disk_max : less;
    less        = less < size ? less / unit * unit : size;
    less        = less < MIN_BYTES && size > MIN_BYTES ? MIN_BYTES : less;
    atomic_fetch_add(&disk_short, less < size);
    atomic_fetch_add(&disk_odd, less < size && less % 512 != 0);
    return less;
}

// ---- pread

ssize_t pread(int fd, void * memory, size_t size, off_t offset) {
    const long number = next_number();
    if (disk_delay_us > 0) {
        const struct timespec delay = { disk_delay_us / 1000000, disk_delay_us % 1000000 * 1000 };
        nanosleep(&delay, NULL);
    }
    atomic_fetch_add(&disk_held, is_held(number));
    while (is_held(number)) {
        nanosleep(&(struct timespec) { 0, 1000000 }, NULL);
    }
    if (fails(number, offset, size)) {
        errno = (int) disk_error;
        return disk_error != 0 ? -1 : 0;
    }
    const ssize_t n = syscall(SYS_pread64, fd, memory, size, offset);
    if (n < (ssize_t) size) {
        return n;
    }
    const size_t less = given(size, 1);
    memset((char *) memory + less, 0xA5, size - less); // shows if bytes that were not given are used
    return (ssize_t) less;
}

ssize_t pread64(int fd, void * memory, size_t size, off_t offset) {
    return pread(fd, memory, size, offset);
}

// ---- io_uring

static struct {
    int                    fd;
    struct io_uring_params params;
    char *                 memory;
    struct io_uring_sqe *  sqes;
} ring = { -1, { 0 }, NULL, NULL };

static unsigned * in_ring(unsigned offset) {
    return (unsigned *) (void *) (ring.memory + offset);
}

// A held read reads from a pipe, into which disk_let_go() writes at most HELD bytes: a short read, which is continued.
enum { HELD = 65536 };

static struct {
    int    fd, pipe[2];
    off_t  offset;
    size_t size;
} held[64];

static void hold(struct io_uring_sqe * sqe) {
    const long at   = atomic_load(&disk_held);
    held[at].fd     = sqe->fd;
    held[at].offset = (off_t) sqe->off;
    held[at].size   = sqe->len < HELD ? sqe->len : HELD;
    if (pipe2(held[at].pipe, O_CLOEXEC) != 0) {
        abort();
    }
    sqe->fd = held[at].pipe[0];
    atomic_fetch_add(&disk_held, 1);
}

// Complete the reads held so far.
void disk_let_go(void) {
    void * memory = NULL;
    if (posix_memalign(&memory, MIN_BYTES, HELD) != 0) {
        abort();
    }
    for (long i = 0; i < atomic_load(&disk_held); i++) {
        const ssize_t n = syscall(SYS_pread64, held[i].fd, memory, held[i].size, held[i].offset);
        if (n < 0 || write(held[i].pipe[1], memory, (size_t) n) != n) {
            abort();
        }
        close(held[i].pipe[1]); // the read end stays open for the read
    }
    free(memory);
}

// Change the next n reads of the submission queue. Short ones stay whole blocks, as direct reads must.
static void spoil(unsigned n) {
    const unsigned head = *in_ring(ring.params.sq_off.head);
    const unsigned mask = *in_ring(ring.params.sq_off.ring_mask);
    for (unsigned i = 0; i < n; i++) {
        struct io_uring_sqe * sqe = &ring.sqes[in_ring(ring.params.sq_off.array)[(head + i) & mask]];
        if (disk_old_uring) {
            sqe->opcode = 0xFF; // an unknown operation
            continue;
        }
        if (fails(next_number(), (off_t) sqe->off, sqe->len)) {
            sqe->fd = -1;
            continue;
        }
        if (disk_cancel) {
            sqe->opcode   = IORING_OP_NOP;
            sqe->rw_flags = 1; // IORING_NOP_INJECT_RESULT
            sqe->len      = (unsigned) -ECANCELED;
            continue;
        }
        sqe->len = (unsigned) given(sqe->len, MIN_BYTES);
        if (disk_hold > 0) {
            disk_hold--;
            hold(sqe);
        }
    }
}

long syscall(long number, ...) {
    va_list args;
    va_start(args, number);
    const long a = va_arg(args, long), b = va_arg(args, long), c = va_arg(args, long);
    const long d = va_arg(args, long), e = va_arg(args, long), f = va_arg(args, long);
    va_end(args);
    if (disk_no_uring && number == SYS_io_uring_setup) {
        errno = (int) disk_no_uring;
        return -1;
    }
    const int enters = number == SYS_io_uring_enter && (int) a == ring.fd && ring.sqes != NULL;
    const int breaks = enters && disk_enter_error && disk_n_enter_fail != 0 && (c > 0 || !disk_enter_waits);
    if (enters && (!breaks || disk_enter_waits)) {
        spoil((unsigned) b);
    }
    static long (*next)(long, ...) = NULL;
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "syscall");
    }
    if (breaks) {
        if (disk_enter_waits) {
            next(number, a, b, 0, 0, e, f); // submit the reads without waiting
        }
        disk_n_enter_fail -= disk_n_enter_fail > 0;
        atomic_fetch_add(&disk_enter_failed, 1);
        errno = (int) disk_enter_error;
        return -1;
    }
    const long result = next(number, a, b, c, d, e, f);
    if (disk_old_uring && number == SYS_io_uring_setup && result >= 0) {
        ((struct io_uring_params *) b)->features &=
            IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    }
    if (number == SYS_io_uring_setup && result >= 0) {
        ring.fd     = (int) result;
        ring.params = *(const struct io_uring_params *) b;
        ring.memory = NULL;
        ring.sqes   = NULL;
    }
    return result;
}

void * mmap(void * address, size_t size, int protection, int flags, int fd, off_t offset) {
    void * memory = (void *) syscall(SYS_mmap, address, size, protection, flags, fd, offset);
    if (fd >= 0 && fd == ring.fd && memory != MAP_FAILED) {
        if (offset == IORING_OFF_SQ_RING) {
            ring.memory = memory;
        } else if (offset == IORING_OFF_SQES) {
            ring.sqes = memory;
        }
    }
    return memory;
}

// ---- direct reads

int open(const char * path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const int mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(args, int) : 0;
    va_end(args);
    if (disk_no_direct && (flags & O_DIRECT) != 0) {
        errno = EINVAL;
        return -1;
    }
    return (int) syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

// The library tests with preadv() whether a file can be read directly.
ssize_t preadv(int fd, const struct iovec * parts, int n, off_t offset) {
    if (disk_no_reads && (fcntl(fd, F_GETFL) & O_DIRECT) != 0) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_preadv, fd, parts, n, offset, 0);
}

int statx(int fd, const char * path, int flags, unsigned mask, struct statx * about) {
    if (disk_no_statx) {
        errno = ENOSYS;
        return -1;
    }
    return (int) syscall(SYS_statx, fd, path, flags, mask, about);
}

// ---- threads

// Whether our code starts the thread. RLIMIT_NPROC would hit the threads of others too, which abort the process.
static int is_ours(const void * caller) {
    Dl_info about;
    return dladdr(caller, &about) != 0 && about.dli_fname != NULL &&
           (strstr(about.dli_fname, "libstdc++") != NULL || strstr(about.dli_fname, "ggml-rotary") != NULL);
}

int pthread_create(pthread_t * thread, const pthread_attr_t * how, void * (*run)(void *), void * data) {
    static int (*next)(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *) = NULL;
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "pthread_create");
    }
    if (disk_threads_left >= 0 && is_ours(__builtin_return_address(0))) {
        if (disk_threads_left == 0) {
            atomic_fetch_add(&disk_threads_failed, 1);
            return EAGAIN;
        }
        disk_threads_left--;
    }
    return next(thread, how, run, data);
}
