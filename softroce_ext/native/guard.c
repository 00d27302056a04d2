/* guard.c: lets a NIC survive a program that truncates the file they share.
 *
 * The shared queues are in a tmpfs file that the program can truncate (by a raw system call; the bridge refuses
 * ftruncate). The NIC's next access to them would raise SIGBUS. Here that page is replaced by private zeros instead:
 * the program loses its queue, while the NIC and every other program continue.
 */
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

static uintptr_t page_mask;
static volatile sig_atomic_t pages_replaced;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	void *page = (void *)((uintptr_t)info->si_addr & page_mask);

	(void)context;
	if (info->si_code == BUS_ADRERR &&
	    mmap(page, ~page_mask + 1, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == page) {
		pages_replaced++;
		return;
	}
	signal(number, SIG_DFL); /* another kind of fault: the access is repeated and ends the process */
}

/* Install the handler; 0, or -1 with errno. */
EXPORT int guard_install(void)
{
	struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};

	page_mask = ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
	sigemptyset(&action.sa_mask);
	return sigaction(SIGBUS, &action, NULL);
}

/* Return how many pages were replaced. */
EXPORT int guard_pages_replaced(void) { return pages_replaced; }
