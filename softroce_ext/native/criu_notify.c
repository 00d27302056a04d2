/*
 * criu_notify: CRIU's action script (`--action-script`), as a program, because a shell costs milliseconds of blackout.
 *
 * CRIU runs it at every stage with CRTOOLS_SCRIPT_ACTION set. At the stages listed in TESTBED_CRIU_STAGES
 * (comma-separated) it connects to the agent's Unix stream socket TESTBED_CRIU_SOCKET, writes
 * "script STAGE PID\n" (PID = the tree's root as the agent sees it, 0 when CRIU does not say), and blocks until the agent
 * answers: "go\n" ends it with status 0, anything else or the agent's end with status 1. So
 *
 *   post-dump      status 0: CRIU kills the frozen source; 1: CRIU resumes it, open TCP connections included
 *   post-restore   status 0: CRIU lets the restored program run; 1: CRIU kills it
 *
 * At any other stage it ends at once with status 0.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int listed(const char *stage, const char *stages)
{
	size_t length = strlen(stage);

	while (stages && *stages) {
		const char *end = strchrnul(stages, ',');

		if ((size_t)(end - stages) == length && memcmp(stages, stage, length) == 0)
			return 1;
		stages = *end ? end + 1 : end;
	}
	return 0;
}

static int fail(const char *what)
{
	fprintf(stderr, "criu_notify: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(void)
{
	const char *stage = getenv("CRTOOLS_SCRIPT_ACTION"), *path = getenv("TESTBED_CRIU_SOCKET");
	const char *pid = getenv("CRTOOLS_INIT_PID");
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char line[128];
	size_t used = 0;
	ssize_t got;
	int agent, length;

	if (!stage || !listed(stage, getenv("TESTBED_CRIU_STAGES")))
		return 0;
	if (!path || strlen(path) >= sizeof address.sun_path) {
		errno = EINVAL;
		return fail("TESTBED_CRIU_SOCKET");
	}
	strcpy(address.sun_path, path);
	agent = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (agent < 0 || connect(agent, (struct sockaddr *)&address, sizeof address) < 0)
		return fail(path);
	length = snprintf(line, sizeof line, "script %s %s\n", stage, pid ? pid : "0");
	if (length >= (int)sizeof line || send(agent, line, (size_t)length, MSG_NOSIGNAL) != length)
		return fail("send");
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
	return used == 3 && memcmp(line, "go\n", 3) == 0 ? 0 : 1;
}
