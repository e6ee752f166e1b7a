// SPDX-License-Identifier: MIT
//
// LD_PRELOAD library: a disk that is slow, stingy or broken. It stands in front of pread(), which the reader's threads
// use, of the system calls of io_uring, and of what decides how files are read. The variables below are its knobs, all
// off at first; a test turns them through ctypes while the model runs. io_uring can be made to give less and to fail,
// not to be slow or to wait; one ring is known, the last one made.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

// Reads of at most this many bytes come whole: where a read that came short goes on, at least so much is asked for.
enum { LEAST = 4096 };

// knobs
long disk_delay_us  = 0;   // that each read takes longer
long disk_hold_at   = 0;   // number of the first read that waits, as do all after it, until this is 0 again; 0: none
long disk_withheld  = 0;   // bytes that a read comes short of what was asked
long disk_most      = 0;   // bytes that a read gives at most; 0: no limit
long disk_fail_at   = 0;   // number of the first read that fails; 0: none
long disk_n_fail    = 0;   // and how many do
long disk_error     = EIO; // with this; 0: end of file. io_uring always says EBADF
long disk_no_direct = 0;   // open() refuses O_DIRECT
long disk_no_statx  = 0;   // statx() does not tell how direct reads must be aligned
long disk_no_uring  = 0;   // the kernel refuses io_uring

// what happened
atomic_long disk_reads  = 0;
atomic_long disk_short  = 0; // reads that gave less
atomic_long disk_odd    = 0; // of these, those that ended where no direct read may begin
atomic_long disk_failed = 0;
atomic_long disk_held   = 0; // reads that have begun to wait

static long next_number(void) {
    return atomic_fetch_add(&disk_reads, 1) + 1;
}

static int is_held(long number) {
    const long first = *(volatile long *) &disk_hold_at;
    return first > 0 && number >= first;
}

static int fails(long number) {
    const int is_one = disk_fail_at > 0 && number >= disk_fail_at && number < disk_fail_at + disk_n_fail;
    atomic_fetch_add(&disk_failed, is_one);
    return is_one;
}

// What is given of `size` bytes: less than that, in multiples of `unit`, or all.
static size_t given(size_t size, size_t unit) {
    size_t less = disk_withheld > 0 && size > LEAST ? size - (size_t) disk_withheld : size;
    less        = disk_most > 0 && less > (size_t) disk_most ? (size_t) disk_most : less;
    less        = less < size ? less / unit * unit : size;
    less        = less < LEAST && size > LEAST ? LEAST : less;
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
    if (fails(number)) {
        errno = (int) disk_error;
        return disk_error != 0 ? -1 : 0;
    }
    const ssize_t n = syscall(SYS_pread64, fd, memory, size, offset);
    if (n < (ssize_t) size) {
        return n;
    }
    const size_t less = given(size, 1);
    memset((char *) memory + less, 0xA5, size - less); // what was not given must not be used
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

// Change the reads that are about to be handed over. A direct read must be of whole blocks, so that less is, too.
static void spoil(unsigned n) {
    const unsigned head = *in_ring(ring.params.sq_off.head);
    const unsigned mask = *in_ring(ring.params.sq_off.ring_mask);
    for (unsigned i = 0; i < n; i++) {
        struct io_uring_sqe * sqe = &ring.sqes[in_ring(ring.params.sq_off.array)[(head + i) & mask]];
        if (fails(next_number())) {
            sqe->fd = -1;
            continue;
        }
        sqe->len = (unsigned) given(sqe->len, LEAST);
    }
}

long syscall(long number, ...) {
    va_list args;
    va_start(args, number);
    const long a = va_arg(args, long), b = va_arg(args, long), c = va_arg(args, long);
    const long d = va_arg(args, long), e = va_arg(args, long), f = va_arg(args, long);
    va_end(args);
    if (disk_no_uring && number == SYS_io_uring_setup) {
        errno = EPERM;
        return -1;
    }
    if (number == SYS_io_uring_enter && (int) a == ring.fd && ring.sqes != NULL) {
        spoil((unsigned) b);
    }
    static long (*next)(long, ...) = NULL;
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "syscall");
    }
    const long result = next(number, a, b, c, d, e, f);
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

// ---- how a file is read

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

int statx(int fd, const char * path, int flags, unsigned mask, struct statx * about) {
    if (disk_no_statx) {
        errno = ENOSYS;
        return -1;
    }
    return (int) syscall(SYS_statx, fd, path, flags, mask, about);
}
