// SPDX-License-Identifier: MIT
//
// LD_PRELOAD library that makes resources run out. The kind of call named by the environment variable EXHAUST fails
// when libggml-rotary.so makes it, itself or through the standard library; calls of llama.cpp and Python succeed.
//
//   EXHAUST=malloc          memory: malloc, calloc, realloc, aligned_alloc, posix_memalign, operator new
//   EXHAUST=mmap            address space: mmap and mremap
//   EXHAUST=open            files: open, fopen
//   EXHAUST=pread           reads
//   EXHAUST=io_uring_setup  making a ring
//   EXHAUST=io_uring_enter  using it
//   EXHAUST=pthread_create  threads
//   EXHAUST_AT=n            the n-th of these calls since the start of the process fails; 0: none
//   EXHAUST_N=m             number of calls that fail from there on; 1 by default
//   EXHAUST_LIBRARY=name    part of the calling library's path, instead of libggml-rotary
//
// A test sets the same knobs through ctypes, exhaust_at and exhaust_n, or exhaust_site, which fails the first call from
// one call site in the library. Sites are numbered from 1 as they are met. Nothing is counted while exhaust_on is 0;
// with exhaust_ring, it becomes 1 when an io_uring_enter() that waits fails.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <unwind.h>

enum { MAX_SITES = 4096 };

// knobs
atomic_long exhaust_on   = 0;
atomic_long exhaust_at   = 0;
atomic_long exhaust_n    = 1;
atomic_long exhaust_site = 0;
atomic_long exhaust_ring = 0;

// what happened
atomic_long exhaust_calls  = 0; // while exhaust_on
atomic_long exhaust_failed = 0;
atomic_long exhaust_sites  = 0;
long        exhaust_offset[MAX_SITES + 1]; // of a call site in the library, by its number

static char         wanted[32];
static char         library[64] = "libggml-rotary";
static uintptr_t    begin, end; // of the library's code
static __thread int inside;     // this thread is in a call of this file's own

static int is_library(struct dl_phdr_info * info, size_t size, void * data) {
    (void) size, (void) data;
    if (info->dlpi_name == NULL || strstr(info->dlpi_name, library) == NULL) {
        return 0;
    }
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) * header = &info->dlpi_phdr[i];
        if (header->p_type == PT_LOAD && (header->p_flags & PF_X) != 0) {
            begin = info->dlpi_addr + header->p_vaddr;
            end   = begin + header->p_memsz;
        }
    }
    return 1;
}

// Whether the standard library made a call, which then counts as its caller's.
static int is_standard(uintptr_t at) {
    static uintptr_t known[8][2];
    static int       n_known = 0;
    for (int i = 0; i < n_known; i++) {
        if (at >= known[i][0] && at < known[i][1]) {
            return 1;
        }
    }
    Dl_info info;
    if (dladdr((void *) at, &info) == 0 || info.dli_fname == NULL ||
        (strstr(info.dli_fname, "libstdc++") == NULL && strstr(info.dli_fname, "libc.so") == NULL &&
         strstr(info.dli_fname, "exhaustion") == NULL)) {
        return 0;
    }
    const uintptr_t page = at & ~(uintptr_t) 4095;
    if (n_known < 8) { // racing threads lose an entry at worst
        known[n_known][0] = page;
        known[n_known][1] = page + 4096;
        n_known++;
    }
    return 1;
}

static _Unwind_Reason_Code look(struct _Unwind_Context * context, void * data) {
    const uintptr_t at    = (uintptr_t) _Unwind_GetIP(context);
    uintptr_t *     asker = data;
    if (at >= begin && at < end) {
        *asker = at;
        return _URC_END_OF_STACK;
    }
    return is_standard(at) ? _URC_NO_REASON : _URC_END_OF_STACK;
}

static long number_of(long offset) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&mutex);
    long i = 1;
    while (i <= exhaust_sites && exhaust_offset[i] != offset) {
        i++;
    }
    if (i > exhaust_sites && i <= MAX_SITES) {
        exhaust_offset[i] = offset;
        exhaust_sites     = i;
    }
    pthread_mutex_unlock(&mutex);
    return i;
}

// Whether this call of `function` is to fail.
static int fails(const char * function) {
    if (!exhaust_on || inside || strcmp(function, wanted) != 0) {
        return 0;
    }
    inside          = 1;
    uintptr_t asker = 0;
    if (begin == 0) {
        dl_iterate_phdr(is_library, NULL);
    }
    if (begin != 0) {
        _Unwind_Backtrace(look, &asker);
    }
    int is_one = 0;
    if (asker != 0) {
        const long number = atomic_fetch_add(&exhaust_calls, 1) + 1;
        const long site   = number_of((long) (asker - begin));
        const long at     = exhaust_at;
        is_one            = at > 0 && number >= at && number < at + exhaust_n;
        if (exhaust_site > 0 && site == exhaust_site) {
            exhaust_site = 0; // the first call only
            is_one       = 1;
        }
        atomic_fetch_add(&exhaust_failed, is_one);
    }
    inside = 0;
    return is_one;
}

__attribute__((constructor)) static void read_environment(void) {
    const char * name = getenv("EXHAUST");
    const char * at   = getenv("EXHAUST_AT");
    const char * n    = getenv("EXHAUST_N");
    const char * whom = getenv("EXHAUST_LIBRARY");
    snprintf(wanted, sizeof(wanted), "%s", name != NULL ? name : "");
    if (whom != NULL) {
        snprintf(library, sizeof(library), "%s", whom);
    }
    exhaust_n  = n != NULL ? atol(n) : 1;
    exhaust_at = at != NULL ? atol(at) : 0;
    exhaust_on = exhaust_at > 0;
}

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next = NULL;                                                                              \
    if (next == NULL) {                                                                                                \
        inside++;                                                                                                      \
        *(void **) (void *) &next = dlsym(RTLD_NEXT, #name);                                                           \
        inside--;                                                                                                      \
    }

// ---- memory

extern void * __libc_malloc(size_t);
extern void * __libc_calloc(size_t, size_t);
extern void * __libc_realloc(void *, size_t);
extern void * __libc_memalign(size_t, size_t);

static int memory_fails(void) {
    if (fails("malloc")) {
        errno = ENOMEM;
        return 1;
    }
    return 0;
}

void * malloc(size_t size) {
    return memory_fails() ? NULL : __libc_malloc(size);
}

void * calloc(size_t n, size_t size) {
    return memory_fails() ? NULL : __libc_calloc(n, size);
}

void * realloc(void * memory, size_t size) {
    return memory_fails() ? NULL : __libc_realloc(memory, size);
}

void * aligned_alloc(size_t align, size_t size) {
    return memory_fails() ? NULL : __libc_memalign(align, size);
}

int posix_memalign(void ** memory, size_t align, size_t size) {
    *memory = memory_fails() ? NULL : __libc_memalign(align, size);
    return *memory != NULL ? 0 : ENOMEM;
}

// ---- address space

void * mmap(void * address, size_t size, int protection, int flags, int fd, off_t offset) {
    if (fails("mmap")) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    NEXT(mmap)
    return next(address, size, protection, flags, fd, offset);
}

void * mmap64(void * address, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap(address, size, protection, flags, fd, offset);
}

void * mremap(void * old, size_t old_size, size_t size, int flags, ...) {
    va_list args;
    va_start(args, flags);
    void * to = (flags & MREMAP_FIXED) != 0 ? va_arg(args, void *) : NULL;
    va_end(args);
    if (fails("mmap")) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    NEXT(mremap)
    return next(old, old_size, size, flags, to);
}

// ---- files

int open(const char * path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const int mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(args, int) : 0;
    va_end(args);
    if (fails("open")) {
        errno = EMFILE;
        return -1;
    }
    NEXT(open)
    return next(path, flags, mode);
}

int open64(const char * path, int flags, ...) __attribute__((alias("open")));

FILE * fopen(const char * path, const char * how) {
    if (fails("open")) {
        errno = EMFILE;
        return NULL;
    }
    NEXT(fopen)
    return next(path, how);
}

FILE * fopen64(const char * path, const char * how) {
    return fopen(path, how);
}

ssize_t pread(int fd, void * memory, size_t size, off_t offset) {
    if (fails("pread")) {
        errno = EIO;
        return -1;
    }
    NEXT(pread)
    return next(fd, memory, size, offset);
}

ssize_t pread64(int fd, void * memory, size_t size, off_t offset) {
    return pread(fd, memory, size, offset);
}

long syscall(long number, ...) {
    va_list args;
    va_start(args, number);
    const long a = va_arg(args, long), b = va_arg(args, long), c = va_arg(args, long);
    const long d = va_arg(args, long), e = va_arg(args, long), f = va_arg(args, long);
    va_end(args);
    if ((number == SYS_io_uring_setup && fails("io_uring_setup")) ||
        (number == SYS_io_uring_enter && fails("io_uring_enter"))) {
        errno = ENOMEM;
        return -1;
    }
    NEXT(syscall)
    const long result = next(number, a, b, c, d, e, f);
    if (exhaust_ring && number == SYS_io_uring_enter && c > 0 && result < 0) {
        exhaust_on = 1;
    }
    return result;
}

// ---- threads

int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*function)(void *), void * data) {
    if (fails("pthread_create")) {
        return EAGAIN;
    }
    NEXT(pthread_create)
    return next(thread, attributes, function, data);
}
