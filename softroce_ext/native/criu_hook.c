/*
 * criu_hook: the CRIU plugin that lets the NIC stop while the program is frozen and its memory not yet copied.
 *
 * CRIU (`-L DIR` at dump) calls PAUSE_DEVICES for each process just before it freezes the tree and CHECKPOINT_DEVICES
 * for each process when the whole tree is frozen, before the first page is read. At the second moment the virtual NIC
 * must stop writing into the program's memory; later writes would be lost. So this plugin asks the agent,
 * over the Unix stream socket named by TESTBED_CRIU_SOCKET, and waits for its answer:
 *
 *   plugin                         agent
 *   "pause PID\n"            →     (no answer; reports when the freeze started)
 *   "checkpoint PID\n"       →     "go\n": carry on | anything else or end of file: CRIU gives up and the program resumes
 *
 * Both are sent once for a dump, for the first process CRIU names; the agent finds the others itself, since they are
 * frozen. At restore the plugin does nothing.
 *
 * The declarations below are the binary interface of CRIU plugins as CRIU documents it (plugin version 0.2, since CRIU
 * 1.x; hook numbers since 3.19): CRIU's header is not packaged by Debian, and the interface is these few lines. The table
 * is only as long as needed: CRIU refuses one longer than its own.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { HOOK_PAUSE_DEVICES = 10, HOOK_CHECKPOINT_DEVICES = 11, HOOKS = 12, STAGE_DUMP = 0 };

struct plugin_descriptor {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int result);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[HOOKS];
};

static int agent = -1;
static int pause_told, checkpoint_told;

static int tell(const char *what, int pid)
{
	char line[64];
	int length = snprintf(line, sizeof line, "%s %d\n", what, pid);

	if (send(agent, line, (size_t)length, MSG_NOSIGNAL) == length)
		return 0;
	fprintf(stderr, "criu_hook: cannot tell the agent '%s': %s\n", what, strerror(errno));
	return -errno;
}

/* One line from the agent; 0 if it is "go". CRIU's alarm (--timeout) must not cut the wait short, hence EINTR. */
static int wait_for_go(void)
{
	char line[16];
	size_t used = 0;
	ssize_t got;

	while (used < sizeof line) {
		got = recv(agent, line + used, sizeof line - used, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		used += (size_t)got;
		if (line[used - 1] == '\n')
			break;
	}
	return used == 3 && memcmp(line, "go\n", 3) == 0 ? 0 : -ECANCELED;
}

static int start(int stage)
{
	const char *path = getenv("TESTBED_CRIU_SOCKET");
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (stage != STAGE_DUMP)
		return 0;
	if (!path || strlen(path) >= sizeof address.sun_path) {
		fprintf(stderr, "criu_hook: TESTBED_CRIU_SOCKET is missing or too long\n");
		return -1;
	}
	strcpy(address.sun_path, path);
	agent = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (agent < 0 || connect(agent, (struct sockaddr *)&address, sizeof address) < 0) {
		fprintf(stderr, "criu_hook: %s: %s\n", path, strerror(errno));
		return -1;
	}
	return 0;
}

static void finish(int stage, int result)
{
	(void)stage;
	(void)result;
	if (agent >= 0)
		close(agent);
	agent = -1;
}

static int pause_devices(int pid)
{
	if (pause_told)
		return 0;
	pause_told = 1;
	return tell("pause", pid);
}

static int checkpoint_devices(int pid)
{
	int failed;

	if (checkpoint_told)
		return 0;
	checkpoint_told = 1;
	failed = tell("checkpoint", pid);
	return failed ? failed : wait_for_go();
}

/* CRIU looks this symbol up by name; everything else stays hidden. */
__attribute__((visibility("default"))) struct plugin_descriptor CR_PLUGIN_DESC = {
	.name = "migros_testbed",
	.init = start,
	.exit = finish,
	.version = 0x000200, /* 0.2.0 */
	.max_hooks = HOOKS,
	.hooks = {
		[HOOK_PAUSE_DEVICES] = (void *)pause_devices,
		[HOOK_CHECKPOINT_DEVICES] = (void *)checkpoint_devices,
	},
};
