/* paths.c: /dev/infiniband and /sys/class/infiniband* are below the NIC's run directory, for all that takes a path. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "bridge.h"

#define DEVICE_PREFIX "/dev/infiniband/"
#define SYSFS_PREFIX "/sys/class/infiniband"
#define NETLINK_RDMA_ 20

/* Return `path`, or its place below the run directory written to `buffer` (PATH_MAX bytes). */
static const char *redirect(const char *path, char *buffer)
{
	const char *rest = NULL, *below = NULL;
	int length;

	if (!path || path[0] != '/')
		return path;
	if (!strncmp(path, DEVICE_PREFIX, sizeof DEVICE_PREFIX - 1)) {
		below = "dev/";
		rest = path + sizeof DEVICE_PREFIX - 1;
	} else if (!strcmp(path, "/dev/infiniband")) {
		below = "dev";
		rest = "";
	} else if (!strncmp(path, SYSFS_PREFIX, sizeof SYSFS_PREFIX - 1)) {
		below = "sys/class/infiniband";
		rest = path + sizeof SYSFS_PREFIX - 1;
	} else
		return path;
	length = snprintf(buffer, PATH_MAX, "%s/%s%s", run_directory(), below, rest);
	return length < PATH_MAX ? buffer : path;
}

static bool is_cm(const char *path) { return path && !strcmp(path, DEVICE_PREFIX "rdma_cm"); }
static bool is_device(const char *path) { return path && !strcmp(path, DEVICE_PREFIX "uverbs0"); }

static int do_open(int directory, const char *path, int flags, mode_t mode)
{
	char buffer[PATH_MAX];

	READY();
	if ((is_device(path) || is_cm(path)) && !(flags & O_PATH))
		return open_device(flags, is_cm(path));
	return real_openat(directory, redirect(path, buffer), flags, mode);
}

#define MODE_ARGUMENT(flags)                                      \
	mode_t mode = 0;                                          \
	if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
		va_list list;                                     \
		va_start(list, flags);                            \
		mode = va_arg(list, mode_t);                      \
		va_end(list);                                     \
	}

EXPORT int open(const char *path, int flags, ...)
{
	MODE_ARGUMENT(flags)
	return do_open(AT_FDCWD, path, flags, mode);
}

EXPORT int open64(const char *path, int flags, ...)
{
	MODE_ARGUMENT(flags)
	return do_open(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

EXPORT int openat(int directory, const char *path, int flags, ...)
{
	MODE_ARGUMENT(flags)
	return do_open(directory, path, flags, mode);
}

EXPORT int openat64(int directory, const char *path, int flags, ...)
{
	MODE_ARGUMENT(flags)
	return do_open(directory, path, flags | O_LARGEFILE, mode);
}

/* What a program compiled with _FORTIFY_SOURCE calls when it passes no mode. */
EXPORT int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
EXPORT int __open64_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags | O_LARGEFILE, 0); }
EXPORT int __openat_2(int directory, const char *path, int flags) { return do_open(directory, path, flags, 0); }
EXPORT int __openat64_2(int directory, const char *path, int flags)
{
	return do_open(directory, path, flags | O_LARGEFILE, 0);
}

EXPORT FILE *fopen(const char *path, const char *mode)
{
	char buffer[PATH_MAX];

	READY();
	return real_fopen(redirect(path, buffer), mode);
}

EXPORT FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }

EXPORT DIR *opendir(const char *path)
{
	char buffer[PATH_MAX];

	READY();
	return real_opendir(redirect(path, buffer));
}

EXPORT int access(const char *path, int mode)
{
	char buffer[PATH_MAX];

	return syscall(SYS_faccessat, AT_FDCWD, redirect(path, buffer), mode);
}

EXPORT ssize_t readlink(const char *restrict path, char *restrict target, size_t size)
{
	char buffer[PATH_MAX];

	return syscall(SYS_readlinkat, AT_FDCWD, redirect(path, buffer), target, size);
}

/* ---- stat: on 64-bit Linux struct stat, struct stat64 and the kernel's are one layout ------------------------------- */

static int do_stat(int directory, const char *path, struct stat *out, int flags)
{
	char buffer[PATH_MAX];
	struct channel *c;
	int result = syscall(SYS_newfstatat, directory, redirect(path, buffer), out, flags);

	if (!result && path && !*path && kind(directory) == DEVICE) {
		c = channel_of[directory];
		if (!c) { /* closed meanwhile; the answer is about the file behind it */
			errno = EBADF;
			return -1;
		}
		out->st_mode = S_IFCHR | 0666;
		out->st_rdev = c->rdev;
	}
	return result;
}

EXPORT int stat(const char *restrict path, struct stat *restrict out) { return do_stat(AT_FDCWD, path, out, 0); }
EXPORT int lstat(const char *restrict path, struct stat *restrict out)
{
	return do_stat(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW);
}

EXPORT int fstat(int fd, struct stat *out) { return do_stat(fd, "", out, AT_EMPTY_PATH); }
EXPORT int fstatat(int directory, const char *restrict path, struct stat *restrict out, int flags)
{
	return do_stat(directory, path, out, flags);
}

EXPORT int stat64(const char *restrict path, struct stat64 *restrict out) { return stat(path, (struct stat *)out); }
EXPORT int lstat64(const char *restrict path, struct stat64 *restrict out) { return lstat(path, (struct stat *)out); }
EXPORT int fstat64(int fd, struct stat64 *out) { return fstat(fd, (struct stat *)out); }
EXPORT int fstatat64(int directory, const char *restrict path, struct stat64 *restrict out, int flags)
{
	return do_stat(directory, path, (struct stat *)out, flags);
}

/* The names that programs built against glibc before 2.33 call. */
EXPORT int __xstat(int version, const char *path, struct stat *out) { return (void)version, stat(path, out); }
EXPORT int __lxstat(int version, const char *path, struct stat *out) { return (void)version, lstat(path, out); }
EXPORT int __fxstat(int version, int fd, struct stat *out) { return (void)version, fstat(fd, out); }
EXPORT int __xstat64(int version, const char *path, struct stat64 *out) { return (void)version, stat64(path, out); }
EXPORT int __lxstat64(int version, const char *path, struct stat64 *out) { return (void)version, lstat64(path, out); }
EXPORT int __fxstat64(int version, int fd, struct stat64 *out) { return (void)version, fstat64(fd, out); }

EXPORT int socket(int domain, int type, int protocol)
{
	READY();
	/* On a host with the kernel's ib_core, libibverbs would ask it by netlink and never look at the sysfs picture. */
	if (domain == AF_NETLINK && protocol == NETLINK_RDMA_) {
		errno = EPROTONOSUPPORT;
		return -1;
	}
	return real_socket(domain, type, protocol);
}
