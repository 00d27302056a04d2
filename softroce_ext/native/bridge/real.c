/* real.c: the C library's own functions behind the bridge's; the owner of this memory, across fork; the table's storage. */
#include <dlfcn.h>

#include "bridge.h"

_Atomic uint8_t kind_of[MAX_FD];
struct channel *_Atomic channel_of[MAX_FD];
pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
pid_t self;

#define DEFINE_REAL(result, name, parameters) result(*real_##name) parameters;
REAL_FUNCTIONS(DEFINE_REAL)

static void before_fork(void) { pthread_mutex_lock(&table_lock); }
static void parent_forked(void) { pthread_mutex_unlock(&table_lock); }
static void child_forked(void)
{
	self = getpid();
	pthread_mutex_unlock(&table_lock);
}

#define RESOLVE(result, name, parameters)       \
	if (!real_##name)                       \
		*(void **)&real_##name = dlsym(RTLD_NEXT, #name);

__attribute__((constructor)) void resolve(void)
{
	REAL_FUNCTIONS(RESOLVE)
	if (!self) {
		self = getpid();
		pthread_atfork(before_fork, parent_forked, child_forked);
	}
}
