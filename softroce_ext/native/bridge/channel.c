/* channel.c: opening the device: a context of the NIC, and the descriptors and the memory that lead to it. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <time.h>

#include "bridge.h"

#define DEFAULT_RUN "/run/migros/nic"
#define OPEN_TIMEOUT_MS 10000

static struct channel *free_channels;

const char *run_directory(void)
{
	const char *run = secure_getenv("SOFTROCE_RUN");
	return run && *run ? run : DEFAULT_RUN;
}

/* Move a descriptor of the bridge out of the program's range and mark it. Returns the new number or -1. */
static int hide(int fd)
{
	int high;

	if (fd < 0)
		return -1;
	high = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, HIDDEN_FROM);
	if (high >= 0)
		raw_close(fd);
	else
		high = fd; /* a low limit on descriptors: stay where we are */
	if (high >= MAX_FD) {
		raw_close(high);
		errno = EMFILE;
		return -1;
	}
	atomic_store_explicit(&kind_of[high], HIDDEN, memory_order_release);
	return high;
}

static void unhide(int fd)
{
	if (fd >= 0) {
		atomic_store_explicit(&kind_of[fd], NOT_OURS, memory_order_release);
		raw_close(fd);
	}
}

int open_in(const struct channel *c, const char *name, int flags)
{
	char path[192];

	snprintf(path, sizeof path, "%s/%s", c->directory, name);
	return syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0);
}

ssize_t send_request(struct channel *c, const struct request *head, const void *body, size_t length)
{
	struct iovec parts[2] = {{(void *)head, sizeof *head}, {(void *)body, length}};
	struct msghdr message = {
		.msg_name = &c->server,
		.msg_namelen = sizeof c->server,
		.msg_iov = parts,
		.msg_iovlen = length ? 2 : 1,
	};
	ssize_t sent;

	do
		sent = sendmsg(c->socket, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent;
}

/* Ask the NIC for a context; the answer comes through a FIFO that is made here. Returns 0 or an errno. */
static int ask_open(struct channel *c, struct opened *answer)
{
	static atomic_uint counter;
	struct request head = {.magic = MAGIC, .version = LAYOUT_VERSION, .kind = c->cm ? KIND_OPEN_CM : KIND_OPEN};
	char path[192];
	struct timespec now;
	struct pollfd wait = {.fd = -1, .events = POLLIN};
	int result = 0, got;

	clock_gettime(CLOCK_REALTIME, &now);
	for (;;) {
		snprintf(head.name, sizeof head.name, "open-%d-%lx-%x", (int)getpid(), (unsigned long)now.tv_nsec,
			 atomic_fetch_add(&counter, 1));
		snprintf(path, sizeof path, "%s/ctx/%s", run_directory(), head.name);
		if (!mkfifo(path, 0600))
			break;
		if (errno != EEXIST)
			return ENXIO;
	}
	wait.fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
	if (wait.fd < 0)
		result = errno;
	else if (send_request(c, &head, NULL, 0) < 0)
		result = ENXIO;
	else {
		do
			got = poll(&wait, 1, OPEN_TIMEOUT_MS);
		while (got < 0 && errno == EINTR);
		if (got <= 0 || read(wait.fd, answer, sizeof *answer) != sizeof *answer)
			result = EIO;
		else
			result = answer->error;
	}
	raw_close(wait.fd);
	unlink(path);
	return result;
}

void release_channel(struct channel *c)
{
	if (c->control)
		munmap(c->control, CONTROL_BYTES);
	c->control = NULL;
	unhide(c->socket);
	unhide(c->doorbell);
	unhide(c->reply);
	/* The record is kept for the next open: a doorbell that races with close reads it, as a misbehaving program may. */
	c->next_free = free_channels;
	free_channels = c;
}

int open_device(int flags, bool cm)
{
	struct opened answer = {0};
	struct channel *c;
	void *map;
	int fd = -1, area = -1, error;

	pthread_mutex_lock(&table_lock);
	c = free_channels;
	if (c) {
		free_channels = c->next_free;
		/* The parent's: a thread that is not in this process may have held its lock at the fork. Of a record of our
		 * own the lock stays, a thread may be waiting for it. */
		if (c->owner != self)
			pthread_mutex_init(&c->lock, NULL);
	} else if ((c = calloc(1, sizeof *c)))
		pthread_mutex_init(&c->lock, NULL);
	if (!c) {
		pthread_mutex_unlock(&table_lock);
		errno = ENOMEM;
		return -1;
	}
	c->cm = cm;
	c->doorbell = c->reply = -1;
	c->server.sun_family = AF_UNIX;
	snprintf(c->server.sun_path, sizeof c->server.sun_path, "%s/uverbs.sock", run_directory());
	c->socket = hide(syscall(SYS_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	error = c->socket < 0 ? errno : ask_open(c, &answer);
	if (!error && answer.layout != LAYOUT_VERSION)
		error = EPROTO;
	if (!error) {
		answer.id[sizeof answer.id - 1] = 0;
		memcpy(c->id, answer.id, sizeof c->id);
		snprintf(c->directory, sizeof c->directory, "%s/ctx/%s", run_directory(), c->id);
		c->rdev = makedev(answer.major, answer.minor);
		c->owner = self;
		c->sequence = 0;
		c->references = 1;
		atomic_store(&c->broken, false);
		/* Read and write: a doorbell after the NIC's death must not raise SIGPIPE. */
		c->doorbell = hide(open_in(c, "doorbell", O_RDWR | O_NONBLOCK));
		c->reply = hide(open_in(c, "reply", O_RDONLY | O_NONBLOCK));
		area = open_in(c, "queues", O_RDWR);
		fd = cm ? open_in(c, "events", O_RDONLY | O_NONBLOCK) : area;
		if (c->doorbell < 0 || c->reply < 0 || area < 0 || fd < 0 || fd >= MAX_FD)
			error = fd >= MAX_FD ? EMFILE : errno;
	}
	if (!error) {
		syscall(SYS_fcntl, c->reply, F_SETFL, syscall(SYS_fcntl, c->reply, F_GETFL) & ~O_NONBLOCK);
		if (!(flags & O_CLOEXEC))
			syscall(SYS_fcntl, fd, F_SETFD, 0);
		if (cm && !(flags & O_NONBLOCK))
			syscall(SYS_fcntl, fd, F_SETFL, syscall(SYS_fcntl, fd, F_GETFL) & ~O_NONBLOCK);
		map = mmap(NULL, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, area, 0);
		if (map == MAP_FAILED)
			error = errno;
		else
			c->control = map;
	}
	if (area != fd)
		raw_close(area);
	if (error) {
		raw_close(fd);
		release_channel(c);
		fd = -1;
	} else {
		channel_of[fd] = c;
		atomic_store_explicit(&kind_of[fd], DEVICE, memory_order_release);
	}
	pthread_mutex_unlock(&table_lock);
	if (error)
		errno = error;
	return fd;
}
