/* Makes the n-th call of a kind fail, or do less than it was asked for, where it is about a file in one folder.
 *
 * Preloaded into a process (LD_PRELOAD) it does nothing until fault_arm is called. It stands before libc's own
 * functions, so that whatever calls those meets it: Python, torch, the safetensors library. Calls about other
 * files are neither counted nor touched.
 */
#include "preloaded.h"

enum kind { NONE, READ, WRITE, SYNC, RENAME, ALLOCATE, OPEN, REMOVE };

static enum kind armed = NONE;
static long first_failing;
static int failing_errno; /* 0: a short transfer instead */
static int for_ever;
static atomic_long count;

/* From the nth call of a kind on (counted from 1), fail with an errno; that one alone, or all that follow too. */
void fault_arm(const char *where, int kind, long nth, int error, int sticky) {
    strncpy(folder, where, sizeof folder - 1);
    first_failing = nth, failing_errno = error, for_ever = sticky;
    atomic_store(&count, 0);
    armed = (enum kind)kind;
}

/* How many calls of the armed kind there were. */
long fault_calls(void) { return atomic_load(&count); }

/* Whether this call is one that goes wrong. */
static int is_hit(enum kind kind, int inside) {
    if (armed != kind || !inside) return 0;
    long number = atomic_fetch_add(&count, 1) + 1;
    return number == first_failing || (for_ever && number > first_failing);
}

static int is_hit_at(enum kind kind, int descriptor) {
    return armed == kind && is_hit(kind, is_descriptor_inside(descriptor));
}

#define FAIL_IF(hit)               \
    if (hit) {                     \
        errno = failing_errno;     \
        return -1;                 \
    }

/* A transfer of bytes: fails, or moves half of what it was asked for, but one byte at least. */
#define TRANSFER(name, kind, buffer, ...)                                                  \
    if (is_hit_at(kind, descriptor)) {                                                     \
        FAIL_IF(failing_errno)                                                             \
        size = size > 1 ? size / 2 : size;                                                 \
    }                                                                                      \
    return REAL(name)(descriptor, buffer, size, ##__VA_ARGS__);

ssize_t read(int descriptor, void *buffer, size_t size) { TRANSFER(read, READ, buffer) }
ssize_t pread(int descriptor, void *buffer, size_t size, off_t at) { TRANSFER(pread, READ, buffer, at) }
ssize_t pread64(int descriptor, void *buffer, size_t size, off64_t at) { TRANSFER(pread64, READ, buffer, at) }
ssize_t write(int descriptor, const void *buffer, size_t size) { TRANSFER(write, WRITE, buffer) }
ssize_t pwrite(int descriptor, const void *buffer, size_t size, off_t at) { TRANSFER(pwrite, WRITE, buffer, at) }
ssize_t pwrite64(int descriptor, const void *buffer, size_t size, off64_t at) { TRANSFER(pwrite64, WRITE, buffer, at) }

/* Of vectors, a short transfer takes half of the first piece. */
#define VECTOR(name, kind, ...)                                                            \
    struct iovec half;                                                                     \
    if (is_hit_at(kind, descriptor)) {                                                     \
        FAIL_IF(failing_errno)                                                             \
        half = pieces[0], half.iov_len = half.iov_len > 1 ? half.iov_len / 2 : half.iov_len; \
        pieces = &half, size = 1;                                                          \
    }                                                                                      \
    return REAL(name)(descriptor, pieces, size, ##__VA_ARGS__);

ssize_t readv(int descriptor, const struct iovec *pieces, int size) { VECTOR(readv, READ) }
ssize_t writev(int descriptor, const struct iovec *pieces, int size) { VECTOR(writev, WRITE) }
ssize_t preadv(int descriptor, const struct iovec *pieces, int size, off_t at) { VECTOR(preadv, READ, at) }
ssize_t preadv64(int descriptor, const struct iovec *pieces, int size, off64_t at) { VECTOR(preadv64, READ, at) }
ssize_t pwritev(int descriptor, const struct iovec *pieces, int size, off_t at) { VECTOR(pwritev, WRITE, at) }
ssize_t pwritev64(int descriptor, const struct iovec *pieces, int size, off64_t at) { VECTOR(pwritev64, WRITE, at) }
ssize_t preadv64v2(int descriptor, const struct iovec *pieces, int size, off64_t at, int flags) {
    VECTOR(preadv64v2, READ, at, flags)
}
ssize_t pwritev64v2(int descriptor, const struct iovec *pieces, int size, off64_t at, int flags) {
    VECTOR(pwritev64v2, WRITE, at, flags)
}

int fsync(int descriptor) { FAIL_IF(is_hit_at(SYNC, descriptor)) return REAL(fsync)(descriptor); }
int fdatasync(int descriptor) { FAIL_IF(is_hit_at(SYNC, descriptor)) return REAL(fdatasync)(descriptor); }

int ftruncate(int descriptor, off_t size) {
    FAIL_IF(is_hit_at(ALLOCATE, descriptor)) return REAL(ftruncate)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    FAIL_IF(is_hit_at(ALLOCATE, descriptor)) return REAL(ftruncate64)(descriptor, size);
}
int fallocate(int descriptor, int mode, off_t from, off_t size) {
    FAIL_IF(is_hit_at(ALLOCATE, descriptor)) return REAL(fallocate)(descriptor, mode, from, size);
}
int posix_fallocate(int descriptor, off_t from, off_t size) {
    return is_hit_at(ALLOCATE, descriptor) ? failing_errno : REAL(posix_fallocate)(descriptor, from, size);
}
int mkdir(const char *path, mode_t mode) {
    FAIL_IF(is_hit(ALLOCATE, is_inside(path))) return REAL(mkdir)(path, mode);
}

int rename(const char *old, const char *new) {
    FAIL_IF(is_hit(RENAME, is_inside(new))) return REAL(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    FAIL_IF(is_hit(RENAME, is_inside(new))) return REAL(renameat)(from, old, to, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    FAIL_IF(is_hit(RENAME, is_inside(new))) return REAL(renameat2)(from, old, to, new, flags);
}

int unlink(const char *path) { FAIL_IF(is_hit(REMOVE, is_inside(path))) return REAL(unlink)(path); }
int rmdir(const char *path) { FAIL_IF(is_hit(REMOVE, is_inside(path))) return REAL(rmdir)(path); }
int unlinkat(int at, const char *path, int flags) {
    FAIL_IF(path[0] == '/' ? is_hit(REMOVE, is_inside(path)) : is_hit_at(REMOVE, at))
    return REAL(unlinkat)(at, path, flags);
}

#define OPENING(name, inside, ...)              \
    TAKE_MODE                                   \
    FAIL_IF(inside) return REAL(name)(__VA_ARGS__, flags, mode);

int open(const char *path, int flags, ...) { OPENING(open, is_hit(OPEN, is_inside(path)), path) }
int open64(const char *path, int flags, ...) { OPENING(open64, is_hit(OPEN, is_inside(path)), path) }
int openat(int at, const char *path, int flags, ...) {
    OPENING(openat, path[0] == '/' ? is_hit(OPEN, is_inside(path)) : is_hit_at(OPEN, at), at, path)
}
int openat64(int at, const char *path, int flags, ...) {
    OPENING(openat64, path[0] == '/' ? is_hit(OPEN, is_inside(path)) : is_hit_at(OPEN, at), at, path)
}
