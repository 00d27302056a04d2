/* commands.c: what a program writes to the device: commands that wait for the NIC's answer, doorbells that do not. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>

#include "bridge.h"

/* The uverbs framing (ib_uverbs_cmd_hdr, ib_uverbs_ex_cmd_hdr). */
#define EXTENDED 0x80000000u
#define POST_SEND 28u
#define REQ_NOTIFY_CQ 23u
/* rdma_cm's (rdma_ucm_cmd_hdr): a command's body starts with the response pointer, CREATE_ID's has it second. */
#define CM_CREATE_ID 0u
#define CM_GET_EVENT 12u

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

/* Ask for a completion event. False: there is no such completion queue, the NIC will say so. */
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
		/* Another thread has closed the descriptor meanwhile: in the kernel this call would keep waiting. */
		if (errno == EIO && !atomic_load(&c->broken) &&
		    (kind(fd) != DEVICE || channel_of[fd] != c || memcmp(id, c->id, sizeof id)))
			return pause();
		if (errno != EAGAIN)
			return result;
		if (syscall(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK) {
			errno = EAGAIN;
			return -1;
		}
		/* Not poll: a checkpoint would end it with EINTR, while this call is restarted. */
		if (syscall(SYS_ppoll, &wait, 1, NULL, NULL, 0) < 0)
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
	if (!c) { /* closed since the query */
		errno = EBADF;
		return -1;
	}
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
		if (!error)
			return (ssize_t)length;
		if (error != EINVAL) {
			errno = error;
			return -1;
		}
		/* not this one, or not yet: the NIC says why */
	}
	/* header 8, CQ handle 4, solicited only 4 */
	if (words[0] == REQ_NOTIFY_CQ && length >= 16 && arm(c, words[2], words[3] != 0))
		return (ssize_t)length;
	return command(c, buffer, length);
}
