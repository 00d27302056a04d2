/* closing.c: a program that has the bridge's parts linked in and brings its table into the state that other threads see
 * while one is between the two stores of close(): the kind is DEVICE still, the channel is gone. The argument names the
 * call to be made then. Exit 0: the call answered as the kernel does for a descriptor that is closed. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "bridge.h"

#define HIDDEN_ONE 900

static int lowest_free(void)
{
	int fd = real_openat(AT_FDCWD, "/dev/null", O_RDWR);

	real_close(fd);
	return fd;
}

int main(int count, char **words)
{
	const char *call = count > 1 ? words[1] : "";
	const uint32_t command[2] = {3, 2};
	struct stat status;
	int fd, other, free_before, result;

	fd = open("/dev/null", O_RDWR);
	other = open("/dev/null", O_RDWR);
	channel_of[fd] = NULL;
	kind_of[fd] = DEVICE;
	free_before = lowest_free();
	errno = 0;
	if (!strcmp(call, "write"))
		result = write(fd, command, sizeof command);
	else if (!strcmp(call, "fstat"))
		result = fstat(fd, &status);
	else if (!strcmp(call, "dup"))
		result = dup(fd);
	else if (!strcmp(call, "dup2"))
		result = dup2(fd, free_before);
	else if (!strcmp(call, "fcntl"))
		result = fcntl(fd, F_DUPFD, 0);
	else if (!strcmp(call, "dup2 onto a hidden one")) {
		kind_of[HIDDEN_ONE] = HIDDEN; /* the look for its channel comes by the one that is closing */
		return dup2(other, HIDDEN_ONE) == HIDDEN_ONE ? 0 : 1;
	} else
		return 2;
	if (result != -1 || errno != EBADF)
		return 3;
	return lowest_free() == free_before ? 0 : 4; /* 4: a descriptor is left of a duplicate that failed */
}
