/* bridge.c: the preload library that lets stock rdma-core find our NIC where it looks for the kernel's.
 *
 * It redirects /dev/infiniband and /sys/class/infiniband* to the NIC's run directory, and carries what a program
 * writes to the device's descriptor to the NIC process. It knows of the uverbs ABI (kernel header
 * rdma/ib_user_verbs.h) only: where a command's header keeps its lengths and the response pointer; that POST_SEND
 * with no work request is a doorbell; that REQ_NOTIFY_CQ is a byte in shared memory; and that the first response word
 * of two commands is a descriptor to be opened here.
 *
 * The channel is made of things that a checkpoint can carry, all found by path and none connected:
 *   the descriptor the program holds   ctx/<id>/queues, a tmpfs file (so mmap works and ioctl answers ENOTTY by itself)
 *   doorbell                           a FIFO, written only when the NIC may be asleep
 *   commands                           an unbound datagram socket; the NIC reads the sender's verified credentials
 *   answers                            a mailbox in the control area, and its sequence number through the FIFO `reply`
 * The NIC is the only writer of `reply`: its death is the end of that file, hence EIO here and not a hang.
 *
 * Threads: the table of descriptors has one lock, each channel's commands another; a doorbell takes none.
 * Fork: a child inherits descriptors that belong to its parent's memory, so its commands and doorbells fail with EIO
 * (it may open the device itself). A vfork child shares our memory and must not change the table: see shares_memory().
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define DEFAULT_RUN "/run/migros/nic"
#define DEVICE_PREFIX "/dev/infiniband/"
#define SYSFS_PREFIX "/sys/class/infiniband"
#define MAX_FD 65536
#define HIDDEN_FROM 700 /* our own descriptors live from here, out of the way of programs that count theirs */
#define NETLINK_RDMA_ 20
#define OPEN_TIMEOUT_MS 10000

/* The uverbs framing (ib_uverbs_cmd_hdr, ib_uverbs_ex_cmd_hdr). */
#define EXTENDED 0x80000000u
#define POST_SEND 28u
#define REQ_NOTIFY_CQ 23u
/* rdma_cm's (rdma_ucm_cmd_hdr): the response pointer is the first word of a command's body, but of CREATE_ID's the second. */
#define CM_CREATE_ID 0u
#define CM_GET_EVENT 12u

/* The control area at the start of `queues`; softroce_ext/uverbs/channel.py has the same numbers. */
#define CONTROL_BYTES 200704u
#define LAYOUT_VERSION 2u
#define AT_PENDING 0
#define AT_LAYOUT 4
#define AT_MAILBOX 64
#define AT_MAY_POST 4096
#define AT_DIRTY 69632
#define AT_ARMED 135168
#define HANDLES 65536u
#define CQ_EXISTS 0x80
#define ARMED_NEXT 1
#define ARMED_SOLICITED 2
#define MAILBOX_DATA 3904

struct mailbox {
	uint32_t sequence;
	int32_t error;   /* an errno, or 0 */
	uint32_t length; /* bytes of data */
	uint32_t install; /* 1: open the file `name` of the context's directory, its number is response word 0 */
	char name[112];
	uint8_t data[MAILBOX_DATA];
};

#define MAGIC 0x4252474du /* "MGRB" */
enum { KIND_OPEN = 1, KIND_COMMAND = 2, KIND_OPEN_CM = 3 };

struct request { /* ahead of every datagram; `name` is the answer's FIFO (OPEN) or the context's id (COMMAND) */
	uint32_t magic;
	uint16_t version, kind;
	uint32_t sequence, reserved;
	char name[48];
};

struct opened { /* the answer to OPEN */
	int32_t error;
	uint32_t major, minor, layout;
	char id[48];
};

struct channel {
	struct channel *next_free;
	pthread_mutex_t lock;
	int references; /* descriptors of the program that mean this channel; under table_lock */
	pid_t owner;
	bool cm; /* an open of rdma_cm: the program's descriptor is the FIFO `events` */
	int socket, doorbell, reply;
	uint32_t sequence;
	atomic_bool broken; /* the NIC is gone */
	uint8_t *control;
	dev_t rdev;
	struct sockaddr_un server;
	char id[48];
	char directory[128];
};

enum { NOT_OURS = 0, DEVICE = 1, HIDDEN = 2 };
static _Atomic uint8_t kind_of[MAX_FD];
static struct channel *channel_of[MAX_FD];
static struct channel *free_channels;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t self; /* the process whose memory this is; a forked child updates it, a vfork child cannot */

/* ---- the functions that ours stand before ------------------------------------------------------------------- */

static int (*real_close)(int);
static int (*real_dup)(int);
static int (*real_dup2)(int, int);
static int (*real_dup3)(int, int, int);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_openat)(int, const char *, int, ...);
static int (*real_fcntl)(int, int, ...);
static int (*real_socket)(int, int, int);
static FILE *(*real_fopen)(const char *, const char *);
static DIR *(*real_opendir)(const char *);
static int (*real_ftruncate)(int, off_t);

#define RESOLVE(name)                                                                        \
	do {                                                                                 \
		if (!real_##name)                                                            \
			*(void **)&real_##name = dlsym(RTLD_NEXT, #name);                    \
	} while (0)

static void after_fork(void) { self = getpid(); }

static void before_fork(void) { pthread_mutex_lock(&table_lock); }
static void parent_forked(void) { pthread_mutex_unlock(&table_lock); }
static void child_forked(void)
{
	after_fork();
	pthread_mutex_unlock(&table_lock);
}

__attribute__((constructor)) static void resolve(void)
{
	RESOLVE(close);
	RESOLVE(dup);
	RESOLVE(dup2);
	RESOLVE(dup3);
	RESOLVE(write);
	RESOLVE(openat);
	RESOLVE(fcntl);
	RESOLVE(socket);
	RESOLVE(fopen);
	RESOLVE(opendir);
	RESOLVE(ftruncate);
	if (!self) {
		self = getpid();
		pthread_atfork(before_fork, parent_forked, child_forked);
	}
}

/* A library loaded before us may call our functions from its constructor. */
#define READY()                          \
	do {                             \
		if (__builtin_expect(!self, 0)) \
			resolve();       \
	} while (0)

static int kind(int fd) { return (unsigned)fd < MAX_FD ? atomic_load_explicit(&kind_of[fd], memory_order_acquire) : NOT_OURS; }

/* True in a vfork child (posix_spawn, Python's subprocess): it has the parent's memory but its own descriptors. */
static bool shares_memory(void) { return getpid() != self; }

static void retry_close(int fd)
{
	if (fd >= 0)
		syscall(SYS_close, fd);
}

/* ---- opening the device --------------------------------------------------------------------------------------- */

static const char *run_directory(void)
{
	const char *run = secure_getenv("SOFTROCE_RUN");
	return run && *run ? run : DEFAULT_RUN;
}

/* Move a descriptor of ours out of the program's range and mark it. Returns the new number or -1. */
static int hide(int fd)
{
	int high;

	if (fd < 0)
		return -1;
	high = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, HIDDEN_FROM);
	if (high >= 0)
		retry_close(fd);
	else
		high = fd; /* a low limit on descriptors: stay where we are */
	if (high >= MAX_FD) {
		retry_close(high);
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
		retry_close(fd);
	}
}

static int open_in(const struct channel *c, const char *name, int flags)
{
	char path[192];

	snprintf(path, sizeof path, "%s/%s", c->directory, name);
	return syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0);
}

static ssize_t send_request(struct channel *c, const struct request *head, const void *body, size_t length)
{
	struct iovec parts[2] = {{(void *)head, sizeof *head}, {(void *)body, length}};
	struct msghdr message = {.msg_name = &c->server, .msg_namelen = sizeof c->server, .msg_iov = parts, .msg_iovlen = length ? 2 : 1};
	ssize_t sent;

	do
		sent = sendmsg(c->socket, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent;
}

/* Ask the NIC for a context; the answer comes through a FIFO of our making. Returns 0 or an errno. */
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
		snprintf(head.name, sizeof head.name, "open-%d-%lx-%x", (int)getpid(), (unsigned long)now.tv_nsec, atomic_fetch_add(&counter, 1));
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
	retry_close(wait.fd);
	unlink(path);
	return result;
}

static void release_channel(struct channel *c)
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

static int open_device(int flags, bool cm)
{
	struct opened answer = {0};
	struct channel *c;
	void *map;
	int fd = -1, area = -1, error;

	pthread_mutex_lock(&table_lock);
	c = free_channels;
	if (c)
		free_channels = c->next_free;
	else if ((c = calloc(1, sizeof *c)))
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
		retry_close(area);
	if (error) {
		retry_close(fd);
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

/* ---- commands and doorbells ------------------------------------------------------------------------------------ */

/* Where the response of a command goes and how much of it there may be. False: a malformed header. */
static bool response_of(const uint8_t *buffer, size_t length, uint8_t **where, size_t *room)
{
	uint32_t command;
	uint16_t out_words, provider_out_words;
	uint64_t pointer = 0;

	memcpy(&command, buffer, 4);
	memcpy(&out_words, buffer + 6, 2);
	*room = 0;
	if (command & EXTENDED) {
		if (length < 24)
			return false;
		memcpy(&pointer, buffer + 8, 8);
		memcpy(&provider_out_words, buffer + 18, 2);
		*room = 8u * ((size_t)out_words + provider_out_words);
	} else if (out_words) {
		if (length < 16)
			return false;
		memcpy(&pointer, buffer + 8, 8);
		*room = 4u * (size_t)out_words;
	}
	*where = (uint8_t *)(uintptr_t)pointer;
	return true;
}

/* The same of a command of rdma_cm. */
static bool cm_response_of(const uint8_t *buffer, size_t length, uint8_t **where, size_t *room)
{
	uint32_t command;
	uint16_t out;
	uint64_t pointer = 0;
	size_t at;

	memcpy(&command, buffer, 4);
	memcpy(&out, buffer + 6, 2);
	at = command == CM_CREATE_ID ? 16 : 8;
	*room = out;
	if (out) {
		if (length < at + 8)
			return false;
		memcpy(&pointer, buffer + at, 8);
	}
	*where = (uint8_t *)(uintptr_t)pointer;
	return true;
}

/* Send one command and copy the answer out of the mailbox. Returns 0 or an errno. Channel locked. */
static int exchange(struct channel *c, const uint8_t *buffer, size_t length, uint8_t *where, size_t room)
{
	struct request head = {.magic = MAGIC, .version = LAYOUT_VERSION, .kind = KIND_COMMAND};
	const struct mailbox *box = (const struct mailbox *)(c->control + AT_MAILBOX);
	uint32_t answered;
	uint32_t descriptor;
	ssize_t got;
	size_t copied;
	int fd;

	head.sequence = ++c->sequence;
	memcpy(head.name, c->id, sizeof head.name);
	if (send_request(c, &head, buffer, length) < 0) {
		if (errno == EMSGSIZE)
			return EINVAL;
		atomic_store(&c->broken, true);
		return EIO;
	}
	do {
		got = read(c->reply, &answered, sizeof answered);
		if (got == 0 || (got < 0 && errno != EINTR)) {
			atomic_store(&c->broken, true);
			return EIO;
		}
	} while (got != sizeof answered || answered != head.sequence);
	if (box->error)
		return box->error;
	copied = box->length < MAILBOX_DATA ? box->length : MAILBOX_DATA;
	if (copied > room)
		copied = room;
	if (where && copied)
		memcpy(where, box->data, copied);
	if (box->install && where && copied >= sizeof descriptor) {
		char name[sizeof box->name];

		memcpy(name, box->name, sizeof name);
		name[sizeof name - 1] = 0;
		fd = open_in(c, name, O_RDONLY | O_NONBLOCK);
		if (fd < 0)
			return errno;
		syscall(SYS_fcntl, fd, F_SETFL, syscall(SYS_fcntl, fd, F_GETFL) & ~O_NONBLOCK);
		descriptor = fd;
		memcpy(where, &descriptor, sizeof descriptor);
	}
	return 0;
}

static ssize_t command(struct channel *c, const void *buffer, size_t length)
{
	uint8_t *where = NULL;
	size_t room;
	sigset_t all, before;
	int cancel, error;

	if (!(c->cm ? cm_response_of : response_of)(buffer, length, &where, &room)) {
		errno = EINVAL;
		return -1;
	}
	/* The kernel finishes a command before it delivers a signal: a handler that jumps away must not leave the
	 * channel locked or an answer unread. The same holds for cancellation. */
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_mutex_lock(&c->lock);
	error = c->control && !atomic_load(&c->broken) ? exchange(c, buffer, length, where, room) : EIO;
	pthread_mutex_unlock(&c->lock);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_setcancelstate(cancel, NULL);
	if (error) {
		errno = error;
		return -1;
	}
	return (ssize_t)length;
}

/* Tell the NIC that a send queue has work. No system call while the NIC is awake. Returns 0 or an errno. */
static int ring(struct channel *c, uint32_t handle)
{
	uint8_t *control = c->control;
	_Atomic uint32_t *pending = (_Atomic uint32_t *)(void *)(control + AT_PENDING);

	if (!control || atomic_load_explicit(&c->broken, memory_order_relaxed))
		return EIO;
	if (handle >= HANDLES || !((volatile uint8_t *)control)[AT_MAY_POST + handle])
		return EINVAL;
	atomic_store_explicit((_Atomic uint8_t *)(control + AT_DIRTY + handle), 1, memory_order_release);
	if (atomic_exchange(pending, 1) == 0)
		syscall(SYS_write, c->doorbell, "", 1); /* a full FIFO is a rung bell */
	return 0;
}

/* Ask for a completion event. False: there is no such completion queue, the NIC shall say so. */
static bool arm(struct channel *c, uint32_t handle, bool solicited_only)
{
	_Atomic uint8_t *armed;
	uint8_t before;

	if (handle >= HANDLES || !c->control || atomic_load_explicit(&c->broken, memory_order_relaxed))
		return false;
	armed = (_Atomic uint8_t *)(c->control + AT_ARMED + handle);
	before = atomic_load(armed);
	if (!(before & CQ_EXISTS))
		return false;
	/* Sequentially consistent: the program looks at the queue after this, the NIC looks here after it has published. */
	if (!solicited_only)
		atomic_exchange(armed, CQ_EXISTS | ARMED_NEXT);
	else if (before != (CQ_EXISTS | ARMED_NEXT))
		atomic_compare_exchange_strong(armed, &before, CQ_EXISTS | ARMED_SOLICITED);
	return true;
}

/* A command of rdma_cm. The NIC never waits; GET_EVENT of a program that wants to wait does so at its own descriptor. */
static ssize_t cm_command(struct channel *c, int fd, const void *buffer, size_t length)
{
	struct pollfd wait = {.fd = fd, .events = POLLIN};
	char id[sizeof c->id];
	uint32_t operation;
	ssize_t result;

	memcpy(&operation, buffer, 4);
	memcpy(id, c->id, sizeof id);
	for (;;) {
		result = command(c, buffer, length);
		if (result >= 0 || operation != CM_GET_EVENT)
			return result;
		/* Another thread has closed the descriptor meanwhile: in the kernel this call would go on waiting. */
		if (errno == EIO && !atomic_load(&c->broken) && (kind(fd) != DEVICE || channel_of[fd] != c || memcmp(id, c->id, sizeof id)))
			return pause();
		if (errno != EAGAIN)
			return result;
		if (syscall(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK) {
			errno = EAGAIN;
			return -1;
		}
		if (poll(&wait, 1, -1) < 0)
			return -1;
	}
}

EXPORT ssize_t write(int fd, const void *buffer, size_t length)
{
	const uint32_t *words = buffer;
	struct channel *c;
	int error;

	READY();
	if (kind(fd) != DEVICE)
		return real_write(fd, buffer, length);
	c = channel_of[fd];
	if (c->owner != self) {
		errno = EIO;
		return -1;
	}
	if (length < 8) {
		errno = EINVAL;
		return -1;
	}
	if (c->cm)
		return cm_command(c, fd, buffer, length);
	/* header 8, response pointer 8, QP handle 4, number of work requests 4 */
	if (words[0] == POST_SEND && length >= 24 && words[5] == 0) {
		error = ring(c, words[4]);
		if (error) {
			errno = error;
			return -1;
		}
		return (ssize_t)length;
	}
	/* header 8, CQ handle 4, solicited only 4 */
	if (words[0] == REQ_NOTIFY_CQ && length >= 16 && arm(c, words[2], words[3] != 0))
		return (ssize_t)length;
	return command(c, buffer, length);
}

/* ---- descriptors: close and the dup family ----------------------------------------------------------------------- */

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

/* Before dup2/dup3 onto one of our numbers: move ours away, or give the program's own device up. */
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
	if (to < 0 || to == from || kind(from) != DEVICE || shares_memory())
		return to;
	if (to >= MAX_FD) {
		retry_close(to);
		errno = EMFILE;
		return -1;
	}
	pthread_mutex_lock(&table_lock);
	channel_of[to] = channel_of[from];
	channel_of[to]->references++;
	atomic_store_explicit(&kind_of[to], DEVICE, memory_order_release);
	pthread_mutex_unlock(&table_lock);
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

static int do_fcntl(int fd, int request, long argument)
{
	int result = real_fcntl(fd, request, argument);

	return request == F_DUPFD || request == F_DUPFD_CLOEXEC ? duplicated(fd, result) : result;
}

EXPORT int fcntl(int fd, int request, ...)
{
	va_list list;
	long argument;

	READY();
	va_start(list, request);
	argument = va_arg(list, long);
	va_end(list);
	return do_fcntl(fd, request, argument);
}

EXPORT int fcntl64(int fd, int request, ...)
{
	va_list list;
	long argument;

	READY();
	va_start(list, request);
	argument = va_arg(list, long);
	va_end(list);
	return do_fcntl(fd, request, argument);
}

/* A character device cannot be cut; the tmpfs file behind it could, and the NIC has it mapped. */
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

/* ---- paths --------------------------------------------------------------------------------------------------------- */

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
EXPORT int __openat64_2(int directory, const char *path, int flags) { return do_open(directory, path, flags | O_LARGEFILE, 0); }

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
	int result = syscall(SYS_newfstatat, directory, redirect(path, buffer), out, flags);

	if (!result && path && !*path && kind(directory) == DEVICE) {
		out->st_mode = S_IFCHR | 0666;
		out->st_rdev = channel_of[directory]->rdev;
	}
	return result;
}

EXPORT int stat(const char *restrict path, struct stat *restrict out) { return do_stat(AT_FDCWD, path, out, 0); }
EXPORT int lstat(const char *restrict path, struct stat *restrict out) { return do_stat(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW); }
EXPORT int fstat(int fd, struct stat *out) { return do_stat(fd, "", out, AT_EMPTY_PATH); }
EXPORT int fstatat(int directory, const char *restrict path, struct stat *restrict out, int flags) { return do_stat(directory, path, out, flags); }
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
	/* On a host with the kernel's ib_core, libibverbs would ask it by netlink and never look at our sysfs. */
	if (domain == AF_NETLINK && protocol == NETLINK_RDMA_) {
		errno = EPROTONOSUPPORT;
		return -1;
	}
	return real_socket(domain, type, protocol);
}
