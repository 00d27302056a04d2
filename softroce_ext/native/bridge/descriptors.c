/* descriptors.c: the program closes and duplicates its descriptors of the device; the bridge's own are kept apart. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>

#include "bridge.h"

EXPORT int close(int fd)
{
	struct channel *c;
	int k;

	READY();
	k = kind(fd);
	if (k == NOT_OURS || shares_memory())
		return real_close(fd);
	if (k == HIDDEN) { /* a program that closes whatever it does not know */
		errno = EBADF;
		return -1;
	}
	pthread_mutex_lock(&table_lock);
	c = channel_of[fd];
	channel_of[fd] = NULL;
	atomic_store_explicit(&kind_of[fd], NOT_OURS, memory_order_release);
	if (c && --c->references == 0) {
		if (c->owner == self)
			pthread_mutex_lock(&c->lock); /* a command of another thread ends first */
		release_channel(c);
		if (c->owner == self)
			pthread_mutex_unlock(&c->lock);
	}
	pthread_mutex_unlock(&table_lock);
	return real_close(fd);
}

/* Before dup2/dup3 onto a number of the bridge: move its descriptor away, or give the program's own device up. */
static void vacate(int target)
{
	struct channel *c;
	int moved;

	if (kind(target) == DEVICE) {
		close(target);
		return;
	}
	for (int fd = 0; fd < MAX_FD && kind(target) == HIDDEN; fd++) {
		if (kind(fd) != DEVICE)
			continue;
		c = channel_of[fd];
		if (!c)
			continue;
		int *slots[] = {&c->socket, &c->doorbell, &c->reply};
		for (unsigned i = 0; i < 3; i++) {
			if (*slots[i] != target)
				continue;
			moved = syscall(SYS_fcntl, target, F_DUPFD_CLOEXEC, HIDDEN_FROM);
			if (moved < 0 || moved >= MAX_FD)
				continue;
			atomic_store(&kind_of[moved], HIDDEN);
			*slots[i] = moved;
			atomic_store(&kind_of[target], NOT_OURS);
		}
	}
}

static int duplicated(int from, int to)
{
	struct channel *c;

	if (to < 0 || to == from || kind(from) != DEVICE || shares_memory())
		return to;
	if (to >= MAX_FD) {
		raw_close(to);
		errno = EMFILE;
		return -1;
	}
	pthread_mutex_lock(&table_lock);
	c = channel_of[from];
	if (c) {
		c->references++;
		channel_of[to] = c;
		atomic_store_explicit(&kind_of[to], DEVICE, memory_order_release);
	}
	pthread_mutex_unlock(&table_lock);
	if (!c) { /* another thread has closed it meanwhile */
		raw_close(to);
		errno = EBADF;
		return -1;
	}
	return to;
}

EXPORT int dup(int fd)
{
	READY();
	return duplicated(fd, real_dup(fd));
}

EXPORT int dup2(int from, int to)
{
	READY();
	if (from != to && kind(to) != NOT_OURS && !shares_memory() && syscall(SYS_fcntl, from, F_GETFD) >= 0)
		vacate(to);
	return duplicated(from, real_dup2(from, to));
}

EXPORT int dup3(int from, int to, int flags)
{
	READY();
	if (from != to && kind(to) != NOT_OURS && !shares_memory() && syscall(SYS_fcntl, from, F_GETFD) >= 0)
		vacate(to);
	return duplicated(from, real_dup3(from, to, flags));
}

EXPORT int fcntl(int fd, int request, ...)
{
	va_list list;
	long argument;
	int result;

	READY();
	va_start(list, request);
	argument = va_arg(list, long);
	va_end(list);
	result = real_fcntl(fd, request, argument);
	return request == F_DUPFD || request == F_DUPFD_CLOEXEC ? duplicated(fd, result) : result;
}

EXPORT int fcntl64(int fd, int request, ...) __attribute__((alias("fcntl")));

/* A character device cannot be truncated; the tmpfs file behind it can, and the NIC has it mapped. */
EXPORT int ftruncate(int fd, off_t length)
{
	READY();
	if (kind(fd) == DEVICE) {
		errno = EINVAL;
		return -1;
	}
	return real_ftruncate(fd, length);
}

EXPORT int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
