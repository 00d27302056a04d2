/*
 * app_init: starts one application in a pid namespace of its own, in a shape that CRIU can checkpoint.
 *
 *   app_init --dir DIR [--cwd DIR] [--policy idle|batch|other] [--env NAME=VALUE]... -- COMMAND [ARGUMENT]...
 *
 * It becomes three processes:
 *
 *   launcher   the process that was started. Stays outside: prints "init PID\n" (PID as the caller sees it), closes
 *              its output, waits for init and passes its exit status on. It is not part of the checkpoint. If its
 *              standard input is a pipe, that is a lifeline: at its end of file, which comes however the holder
 *              dies, init is killed, and with it the namespace. (PR_SET_PDEATHSIG would follow the thread that forked.)
 *   init       pid 1 of the new namespace and root of the dumped tree: own session, no descriptor but 0, 1, 2
 *              (/dev/null, DIR/stdout, DIR/stderr, both append-only, so that a restored tree continues at the end),
 *              no terminal. Reaps orphans, forwards SIGTERM and SIGINT, writes DIR/exit when the command ends.
 *   command    COMMAND, found through PATH, with the --env variables added (init itself runs without them, so that a
 *              preloaded library is mapped into the application only).
 *
 * --policy is the scheduling policy (sched(7)) of init and command. RDMA programs poll, and beside them
 * a NIC or a switch that wakes up waits for the end of a time slice, milliseconds. SCHED_IDLE gives way to it at once.
 *
 * DIR/exit appears atomically and holds "code N\n" or "signal N\n", then "at SECONDS\n" (wall clock; CLOCK_MONOTONIC is
 * not comparable across a restore, which gives the tree a time namespace). After a migration it is in DIR of the
 * host where the command ended, while the source's launcher only sees its init killed.
 *
 * Exit status: the command's; 128 + N after signal N; 125 when app_init itself failed (a reason on standard error);
 * 127 or 126 when the command could not be executed (a reason in DIR/stderr).
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OWN_FAILURE = 125, NOT_EXECUTABLE = 126, NOT_FOUND = 127 };

/* The child a signal is passed to: init for the launcher, the command for init. 0 until it exists. */
static volatile sig_atomic_t child;

static void die(const char *what)
{
	fprintf(stderr, "app_init: %s: %s\n", what, strerror(errno));
	exit(OWN_FAILURE);
}

static void forward(int signal)
{
	int saved = errno;

	if (child > 0)
		kill((pid_t)child, signal);
	errno = saved;
}

/* The launcher's end (its agent died): nothing may outlive it, and killing init empties the namespace. */
static void end_namespace(int signal)
{
	(void)signal;
	if (child > 0)
		kill((pid_t)child, SIGKILL);
}

static void on_signal(int signal, void (*handler)(int))
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART };

	sigemptyset(&action.sa_mask);
	if (sigaction(signal, &action, NULL) < 0)
		die("sigaction");
}

static void block_forwarded(int how)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(how, &set, NULL);
}

static void reopen(const char *path, int flags, int descriptor)
{
	int opened = open(path, flags | O_NOCTTY, 0644);

	if (opened < 0)
		die(path);
	if (opened != descriptor) {
		if (dup2(opened, descriptor) < 0)
			die("dup2");
		close(opened);
	}
}

/* DIR/NAME in memory of its own. */
static char *inside(const char *directory, const char *name)
{
	char *path;

	if (asprintf(&path, "%s/%s", directory, name) < 0)
		die("asprintf");
	return path;
}

static void write_exit_file(const char *path, const char *temporary, int status)
{
	char text[96];
	struct timespec now;
	int length, file;

	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(text, sizeof text, "%s %d\nat %lld.%06ld\n", WIFSIGNALED(status) ? "signal" : "code",
			  WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), (long long)now.tv_sec,
			  now.tv_nsec / 1000);
	file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (file < 0 || write(file, text, (size_t)length) != length || close(file) < 0 || rename(temporary, path) < 0)
		fprintf(stderr, "app_init: %s: %s\n", path, strerror(errno));
}

static _Noreturn void run_command(char **command, char **environment, int count)
{
	on_signal(SIGTERM, SIG_DFL);
	on_signal(SIGINT, SIG_DFL);
	block_forwarded(SIG_UNBLOCK);
	for (int i = 0; i < count; i++)
		putenv(environment[i]);
	execvp(command[0], command);
	fprintf(stderr, "app_init: cannot execute %s: %s\n", command[0], strerror(errno));
	_exit(errno == ENOENT ? NOT_FOUND : NOT_EXECUTABLE);
}

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* pid 1 of the namespace. Never returns. */
static _Noreturn void run_init(const char *directory, const char *cwd, char **command, char **environment, int count)
{
	const char *exit_file = inside(directory, "exit"), *unfinished = inside(directory, ".exit.new");
	pid_t main_child, ended;
	int status;

	if (setsid() < 0)
		die("setsid");
	reopen("/dev/null", O_RDONLY, STDIN_FILENO);
	reopen(inside(directory, "stdout"), O_WRONLY | O_CREAT | O_APPEND, STDOUT_FILENO);
	reopen(inside(directory, "stderr"), O_WRONLY | O_CREAT | O_APPEND, STDERR_FILENO);
	if (close_range(3, ~0U, 0) < 0)
		die("close_range");
	if (chdir(cwd) < 0)
		die(cwd);
	prctl(PR_SET_DUMPABLE, 1);
	on_signal(SIGTERM, forward);
	on_signal(SIGINT, forward);

	main_child = fork(); /* the forwarded signals are still blocked: none is lost before `child` is set */
	if (main_child < 0)
		die("fork");
	if (main_child == 0)
		run_command(command, environment, count);
	child = main_child;
	block_forwarded(SIG_UNBLOCK);

	for (;;) {
		ended = waitpid(-1, &status, 0);
		if (ended < 0 && errno == EINTR)
			continue;
		if (ended < 0)
			die("waitpid");
		if (ended == main_child && (WIFEXITED(status) || WIFSIGNALED(status)))
			break;
	}
	child = 0;
	write_exit_file(exit_file, unfinished, status);
	_exit(exit_code(status)); /* the kernel kills everything else in the namespace */
}

/* Return when init has ended; kill it when the lifeline on standard input, if there is one, has been closed. */
static void hold_lifeline(pid_t init)
{
	struct pollfd watched[2] = { { .fd = STDIN_FILENO }, { .events = POLLIN } };
	struct stat input;

	watched[1].fd = pidfd_open(init, 0);
	if (watched[1].fd < 0 || fstat(STDIN_FILENO, &input) < 0 || !S_ISFIFO(input.st_mode))
		return;
	while (!(watched[1].revents & POLLIN)) {
		if (poll(watched, 2, -1) > 0 && (watched[0].revents & POLLHUP)) {
			end_namespace(0);
			return;
		}
	}
}

static _Noreturn void usage(const char *problem)
{
	fprintf(stderr,
		"app_init: %s\nusage: app_init --dir DIR [--cwd DIR] [--policy idle|batch|other] [--env NAME=VALUE]... -- "
		"COMMAND [ARGUMENT]...\n",
		problem);
	exit(OWN_FAILURE);
}

static int policy_named(const char *name)
{
	if (strcmp(name, "idle") == 0)
		return SCHED_IDLE;
	if (strcmp(name, "batch") == 0)
		return SCHED_BATCH;
	if (strcmp(name, "other") == 0)
		return SCHED_OTHER;
	usage("--policy is idle, batch or other");
}

int main(int argc, char **argv)
{
	const struct sched_param no_priority = { 0 };
	const char *directory = NULL, *cwd = NULL;
	char **environment = calloc((size_t)argc, sizeof *environment);
	char resolved[PATH_MAX];
	int count = 0, policy = -1, i, status;
	pid_t init;

	if (!environment)
		die("calloc");
	for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i += 2) {
		if (i + 1 >= argc)
			usage("an option lacks its value");
		if (strcmp(argv[i], "--dir") == 0)
			directory = argv[i + 1];
		else if (strcmp(argv[i], "--cwd") == 0)
			cwd = argv[i + 1];
		else if (strcmp(argv[i], "--policy") == 0)
			policy = policy_named(argv[i + 1]);
		else if (strcmp(argv[i], "--env") == 0 && strchr(argv[i + 1], '='))
			environment[count++] = argv[i + 1];
		else
			usage("unknown option, or --env without '='");
	}
	if (!directory || i + 1 >= argc)
		usage("--dir and a command are needed");
	if (!realpath(directory, resolved))
		die(directory);

	block_forwarded(SIG_BLOCK);
	if (unshare(CLONE_NEWPID) < 0)
		die("unshare(CLONE_NEWPID)");
	init = fork();
	if (init < 0)
		die("fork");
	if (init == 0 && policy >= 0 && sched_setscheduler(0, policy, &no_priority) < 0)
		die("sched_setscheduler");
	if (init == 0)
		run_init(resolved, cwd ? cwd : resolved, argv + i + 1, environment, count);

	child = init;
	on_signal(SIGTERM, end_namespace);
	on_signal(SIGINT, end_namespace);
	on_signal(SIGHUP, end_namespace);
	block_forwarded(SIG_UNBLOCK);
	printf("init %d\n", (int)init);
	if (fflush(stdout) != 0)
		end_namespace(0); /* there is no reader: the agent is gone already */
	if (close_range(1, ~0U, 0) < 0)
		die("close_range");
	hold_lifeline(init);
	while (waitpid(init, &status, 0) < 0)
		if (errno != EINTR)
			return OWN_FAILURE;
	return exit_code(status);
}
