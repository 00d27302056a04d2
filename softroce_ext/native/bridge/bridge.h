/* bridge.h: what the parts of the preload library share. The library lets stock rdma-core find this NIC where it looks
 * for the kernel's.
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
 * (it may open the device itself; a lock that a thread of the parent held is initialised again then). A vfork child
 * shares this memory and must not change the table: see shares_memory().
 *
 * Parts: real.c (the C library's own functions, fork), channel.c (opening the device), commands.c (write: commands and
 * doorbells), descriptors.c (close, dup, fcntl), paths.c (functions that take a path, stat).
 */
#ifndef BRIDGE_H
#define BRIDGE_H

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_FD 65536
#define HIDDEN_FROM 700 /* the bridge's own descriptors start here, away from those that programs count */

/* ---- the protocol between NIC and bridge ------------------------------------------------------------------------ */

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

/* ---- the table of descriptors ------------------------------------------------------------------------------------ */

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

/* Of this library alone: without this, a part would reach another's names by way of the dynamic linker's tables. */
#pragma GCC visibility push(hidden)

extern _Atomic uint8_t kind_of[MAX_FD];
extern struct channel *_Atomic channel_of[MAX_FD]; /* load it once: another thread's close makes it NULL at any time */
extern pthread_mutex_t table_lock;
extern pid_t self; /* the process whose memory this is; a forked child updates it, a vfork child cannot */

/* The functions that ours stand before: result, name, parameters. */
#define REAL_FUNCTIONS(X)                                 \
	X(int, close, (int))                              \
	X(int, dup, (int))                                \
	X(int, dup2, (int, int))                          \
	X(int, dup3, (int, int, int))                     \
	X(ssize_t, write, (int, const void *, size_t))    \
	X(int, openat, (int, const char *, int, ...))     \
	X(int, fcntl, (int, int, ...))                    \
	X(int, socket, (int, int, int))                   \
	X(FILE *, fopen, (const char *, const char *))    \
	X(DIR *, opendir, (const char *))                 \
	X(int, ftruncate, (int, off_t))
#define DECLARE_REAL(result, name, parameters) extern result(*real_##name) parameters;
REAL_FUNCTIONS(DECLARE_REAL)

void resolve(void);

/* The NIC's run directory. */
const char *run_directory(void);

/* Open the device (cm: rdma_cm's) for the program. Returns its descriptor, or -1 and errno. */
int open_device(int flags, bool cm);

/* Unmap and close what a channel holds and keep its record for the next open. table_lock held. */
void release_channel(struct channel *c);

/* Open a file of the channel's directory. Returns the descriptor, or -1 and errno. */
int open_in(const struct channel *c, const char *name, int flags);

/* Send one datagram to the NIC; length 0: the head alone. Returns what sendmsg does. */
ssize_t send_request(struct channel *c, const struct request *head, const void *body, size_t length);

#pragma GCC visibility pop

/* A library loaded before us may call our functions from its constructor. */
#define READY()                                 \
	do {                                    \
		if (__builtin_expect(!self, 0)) \
			resolve();              \
	} while (0)

static inline int kind(int fd)
{
	return (unsigned)fd < MAX_FD ? atomic_load_explicit(&kind_of[fd], memory_order_acquire) : NOT_OURS;
}

/* True in a vfork child (posix_spawn, Python's subprocess): it has the parent's memory but its own descriptors. */
static inline bool shares_memory(void) { return getpid() != self; }

/* Close a descriptor of our own; a negative number is none. */
static inline void raw_close(int fd)
{
	if (fd >= 0)
		syscall(SYS_close, fd);
}

#endif
