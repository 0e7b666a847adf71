/* Plays a filesystem that lacks something, in one folder of an ordinary one.
 *
 * Preloaded into a process (LD_PRELOAD) it does nothing until filesystem_mount is called with the folder, and the traits
 * of the filesystem that the folder is to be on, or the environment has PLAYED_FILESYSTEM=traits:folder, which processes
 * that are started inherit. Calls about other files are not touched, but where all else is to be read-only.
 */
#include "preloaded.h"

#include <pwd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/statvfs.h>

enum trait {
    NO_LOCK = 1 << 0,        /* flock answers ENOLCK: Lustre without -o flock, NFSv3 without lockd */
    EMPTY_LOCK = 1 << 1,     /* flock answers, and locks nothing: NFS with local_lock, some FUSE */
    NFS4_LOCK = 1 << 2,      /* an exclusive lock wants a descriptor that can write */
    NEW_INODES = 1 << 3,     /* another inode number at every look */
    NO_FOLDER_SYNC = 1 << 4, /* fsync of a folder answers EINVAL: CIFS, some FUSE */
    NO_MAPPING = 1 << 5,     /* mmap answers ENODEV: FUSE with direct_io, 9p */
    NO_EXCHANGE = 1 << 6,    /* renameat2 with a flag answers EINVAL: NFS, CIFS, overlayfs */
    NO_DIRECT = 1 << 7,      /* O_DIRECT answers EINVAL: tmpfs, some FUSE */
    QUOTA = 1 << 8,          /* writing above the limit answers EDQUOT */
    SHORT_WRITES = 1 << 9,   /* every write takes half of it */
    NO_ALLOCATION = 1 << 10, /* a file cannot be made longer than what was written: EOPNOTSUPP */
    FULL_AT_CLOSE = 1 << 11, /* above the limit, close of a file that was written answers ENOSPC: NFS */
    FULL_AT_SYNC = 1 << 12,  /* above the limit, fsync of a file that was written answers ENOSPC */
    NO_RENAME_OVER = 1 << 13,/* rename onto an empty folder answers EEXIST: CIFS */
    NO_STATVFS = 1 << 14,    /* statvfs answers ENOSYS */
    NO_ADVICE = 1 << 15,     /* posix_fadvise answers EINVAL */
    LATE_DIRECT = 1 << 16,   /* O_DIRECT opens, and writing through it answers EINVAL */
    READ_ONLY_ELSE = 1 << 17,/* everything outside the folder is on a read-only filesystem: EROFS */
    NAMELESS = 1 << 18,      /* the user has no entry in passwd */
};

static unsigned traits;
static atomic_long limit, written;
static atomic_ulong inode = 1000000;

/* From now on the folder has these traits; limit: bytes that can be written. Zero traits: an ordinary one again. */
void filesystem_mount(const char *where, unsigned which, long bytes) {
    strncpy(folder, where, sizeof folder - 1);
    atomic_store(&limit, bytes);
    atomic_store(&written, 0);
    traits = which;
}

__attribute__((constructor)) static void inherit(void) {
    const char *played = getenv("PLAYED_FILESYSTEM"), *colon = played ? strchr(played, ':') : NULL;
    if (colon) filesystem_mount(colon + 1, (unsigned)atol(played), LONG_MAX);
}

#define FAIL_IF(hit, number) \
    if (hit) {               \
        errno = number;      \
        return -1;           \
    }

static int has(enum trait trait, const char *path) { return (traits & trait) && is_inside(path); }
static int has_at(enum trait trait, int descriptor) { return (traits & trait) && is_descriptor_inside(descriptor); }
static int is_folder(int descriptor) {
    struct stat status;
    return REAL(fstat)(descriptor, &status) == 0 && S_ISDIR(status.st_mode);
}
static int can_write(int descriptor) { return (fcntl(descriptor, F_GETFL) & O_ACCMODE) != O_RDONLY; }
static int is_full(void) { return atomic_load(&written) > atomic_load(&limit); }

int flock(int descriptor, int operation) {
    FAIL_IF(has_at(NO_LOCK, descriptor), ENOLCK)
    if (has_at(EMPTY_LOCK, descriptor)) return 0;
    FAIL_IF((operation & LOCK_EX) && has_at(NFS4_LOCK, descriptor) && !can_write(descriptor), EBADF)
    return REAL(flock)(descriptor, operation);
}

#define STATUS(name, kind, at, inside, ...)                                           \
    int name(__VA_ARGS__, struct kind *status) {                                      \
        int result = REAL(name)(at, status);                                          \
        if (result == 0 && (inside)) status->st_ino = atomic_fetch_add(&inode, 1);    \
        return result;                                                                \
    }
STATUS(stat, stat, path, has(NEW_INODES, path), const char *path)
STATUS(lstat, stat, path, has(NEW_INODES, path), const char *path)
STATUS(fstat, stat, descriptor, has_at(NEW_INODES, descriptor), int descriptor)
STATUS(stat64, stat64, path, has(NEW_INODES, path), const char *path)
STATUS(lstat64, stat64, path, has(NEW_INODES, path), const char *path)
STATUS(fstat64, stat64, descriptor, has_at(NEW_INODES, descriptor), int descriptor)
#define STATUS_AT(name, kind)                                                          \
    int name(int at, const char *path, struct kind *status, int flags) {              \
        int result = REAL(name)(at, path, status, flags);                             \
        int inside = path[0] == '/' ? has(NEW_INODES, path) : has_at(NEW_INODES, at); \
        if (result == 0 && inside) status->st_ino = atomic_fetch_add(&inode, 1);      \
        return result;                                                                \
    }
STATUS_AT(fstatat, stat)
STATUS_AT(fstatat64, stat64)

static int sync_refused(int descriptor) {
    if (has_at(NO_FOLDER_SYNC, descriptor) && is_folder(descriptor)) return EINVAL;
    if (has_at(FULL_AT_SYNC, descriptor) && can_write(descriptor) && is_full()) return ENOSPC;
    return 0;
}
int fsync(int descriptor) {
    int number = sync_refused(descriptor);
    FAIL_IF(number, number)
    return REAL(fsync)(descriptor);
}
int fdatasync(int descriptor) {
    int number = sync_refused(descriptor);
    FAIL_IF(number, number)
    return REAL(fdatasync)(descriptor);
}
int close(int descriptor) {
    int full = has_at(FULL_AT_CLOSE, descriptor) && can_write(descriptor) && is_full();
    int result = REAL(close)(descriptor);
    FAIL_IF(full, ENOSPC)
    return result;
}

void *mmap(void *where, size_t size, int protection, int flags, int descriptor, off_t from) {
    if (!(flags & MAP_ANONYMOUS) && has_at(NO_MAPPING, descriptor)) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return REAL(mmap)(where, size, protection, flags, descriptor, from);
}
void *mmap64(void *where, size_t size, int protection, int flags, int descriptor, off64_t from) {
    if (!(flags & MAP_ANONYMOUS) && has_at(NO_MAPPING, descriptor)) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return REAL(mmap64)(where, size, protection, flags, descriptor, from);
}

static int covers_an_empty_folder(const char *old, const char *new) {
    struct stat one, other;
    return has(NO_RENAME_OVER, new) && REAL(stat)(old, &one) == 0 && S_ISDIR(one.st_mode) &&
           REAL(stat)(new, &other) == 0 && S_ISDIR(other.st_mode);
}
int rename(const char *old, const char *new) {
    FAIL_IF(covers_an_empty_folder(old, new), EEXIST)
    return REAL(rename)(old, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    FAIL_IF(flags && has(NO_EXCHANGE, new), EINVAL)
    return REAL(renameat2)(from, old, to, new, flags);
}

/* How much of a write is taken: -1 for none. */
static ssize_t taken(int descriptor, size_t size) {
    if (has_at(QUOTA, descriptor) && is_full()) return -1;
    if ((traits & (QUOTA | FULL_AT_CLOSE | FULL_AT_SYNC)) && is_descriptor_inside(descriptor))
        atomic_fetch_add(&written, (long)size);
    return has_at(SHORT_WRITES, descriptor) && size > 1 ? (ssize_t)(size / 2) : (ssize_t)size;
}
static int is_direct(int descriptor) { return fcntl(descriptor, F_GETFL) & O_DIRECT; }

#define WRITING(name, ...)                                                             \
    FAIL_IF(has_at(LATE_DIRECT, descriptor) && is_direct(descriptor), EINVAL)          \
    ssize_t some = taken(descriptor, size);                                            \
    FAIL_IF(some < 0, EDQUOT)                                                          \
    return REAL(name)(descriptor, buffer, (size_t)some, ##__VA_ARGS__);
ssize_t write(int descriptor, const void *buffer, size_t size) { WRITING(write) }
ssize_t pwrite(int descriptor, const void *buffer, size_t size, off_t at) { WRITING(pwrite, at) }
ssize_t pwrite64(int descriptor, const void *buffer, size_t size, off64_t at) { WRITING(pwrite64, at) }

int ftruncate(int descriptor, off_t size) {
    FAIL_IF(has_at(NO_ALLOCATION, descriptor), EOPNOTSUPP) return REAL(ftruncate)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    FAIL_IF(has_at(NO_ALLOCATION, descriptor), EOPNOTSUPP) return REAL(ftruncate64)(descriptor, size);
}
int posix_fallocate(int descriptor, off_t from, off_t size) {
    return has_at(NO_ALLOCATION, descriptor) ? EOPNOTSUPP : REAL(posix_fallocate)(descriptor, from, size);
}
int posix_fadvise(int descriptor, off_t from, off_t size, int advice) {
    return has_at(NO_ADVICE, descriptor) ? EINVAL : REAL(posix_fadvise)(descriptor, from, size, advice);
}
int posix_fadvise64(int descriptor, off64_t from, off64_t size, int advice) {
    return has_at(NO_ADVICE, descriptor) ? EINVAL : REAL(posix_fadvise64)(descriptor, from, size, advice);
}
int statvfs(const char *path, struct statvfs *status) {
    FAIL_IF(has(NO_STATVFS, path), ENOSYS) return REAL(statvfs)(path, status);
}
int statvfs64(const char *path, struct statvfs64 *status) {
    FAIL_IF(has(NO_STATVFS, path), ENOSYS) return REAL(statvfs64)(path, status);
}

static int is_read_only(const char *path) {
    if (!(traits & READ_ONLY_ELSE)) return 0;
    char cwd[PATH_MAX];
    const char *whole = path[0] == '/' ? path : getcwd(cwd, sizeof cwd);
    return whole && !is_inside(whole) && strncmp(whole, "/dev/", 5) && strncmp(whole, "/proc/", 6);
}
int mkdir(const char *path, mode_t mode) {
    FAIL_IF(is_read_only(path), EROFS)
    return REAL(mkdir)(path, mode);
}
struct passwd *getpwuid(uid_t user) { return (traits & NAMELESS) ? NULL : REAL(getpwuid)(user); }
int getpwuid_r(uid_t user, struct passwd *entry, char *buffer, size_t size, struct passwd **result) {
    if (traits & NAMELESS) return *result = NULL, 0;
    return REAL(getpwuid_r)(user, entry, buffer, size, result);
}

#define OPENING(name, path_inside, ...)                          \
    TAKE_MODE                                                    \
    FAIL_IF((flags & O_DIRECT) && (path_inside), EINVAL)         \
    FAIL_IF((flags & (O_WRONLY | O_RDWR | O_CREAT)) && is_read_only(path), EROFS) \
    return REAL(name)(__VA_ARGS__, flags, mode);
int open(const char *path, int flags, ...) { OPENING(open, has(NO_DIRECT, path), path) }
int open64(const char *path, int flags, ...) { OPENING(open64, has(NO_DIRECT, path), path) }
